"""How much memory this process has taken, and how much it may still take."""

import re
import resource
from pathlib import Path

# Where Linux tells a container's limit and use, of version 2 and 1; in a container its own group
# is the root of the tree that it sees.
GROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


STATUS = Path("/proc/self/status")


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    # getrusage starts from the size of the process that started this one.
    if STATUS.is_file() and (found := re.search(r"^VmHWM:\s+(\d+) kB", STATUS.read_text(), re.M)):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_memory() -> int:
    """Bytes that can be taken without swapping, within the limit of a container."""
    import psutil

    free = psutil.virtual_memory().available
    for limit, usage in GROUP_FILES:
        if (allowed := _number(limit)) is not None and (used := _number(usage)) is not None:
            free = min(free, max(0, allowed - used))
    return free


def _number(path: str) -> int | None:
    """The number in a file; None where there is none (`max`: no limit)."""
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
