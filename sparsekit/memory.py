"""How much memory this process may still take."""

from pathlib import Path

import psutil

# Where Linux tells a container's limit and use, of version 2 and 1; in a container its own group
# is the root of the tree that it sees.
GROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def available_memory() -> int:
    """Bytes that can be taken without swapping, within the limit of a container."""
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
