"""Memory of this process: its peak, the available amount and the heap; Linux and macOS."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# glibc up to 2.37 cannot reuse a freed chunk for an aligned one of the same size (glibc bug 14581),
# and torch asks for aligned ones: the heap grows with every block. Chunks of this size or more are
# therefore mapped on their own; smaller ones stay in the heap, where they cost no page faults.
MAPPED_BYTES = 8 << 20
# The top of the heap is kept up to this size; otherwise glibc would keep 128 kB only.
KEPT_BYTES = 64 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
STATUS = Path("/proc/self/status")
PEAK_RESET = Path("/proc/self/clear_refs")
# The control groups of this process, and the folder with their limits.
GROUPS = Path("/proc/self/cgroup")
GROUP_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryUse:
    """Work that holds a whole model in memory."""

    purpose: str
    hint: str
    """Hint if the model does not fit."""


def peak_memory() -> int:
    """The largest resident size of this process so far, or since `watch_peak`, in bytes."""
    # getrusage starts from the size of the parent process.
    if STATUS.is_file() and (match := re.search(r"^VmHWM:\s+(\d+) kB", STATUS.read_text(), re.M)):
        return int(match[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def watch_peak() -> None:
    """Reset `peak_memory`, if the system can (Linux).

    Elsewhere the peak remains that of the whole process, earlier work included.
    """
    with contextlib.suppress(OSError):
        PEAK_RESET.write_text("5")


def available_memory() -> int:
    """Bytes that can be allocated without swapping, within the limits of container and group."""
    import psutil

    return max(0, min(psutil.virtual_memory().available, *_room_in_groups(), sys.maxsize))


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python's or torch's allocator failed; on a CPU torch raises a plain RuntimeError."""
    torch_failed = isinstance(error, RuntimeError) and re.search(
        r"out of memory|not enough memory|can't allocate memory", str(error), re.IGNORECASE
    )
    return isinstance(error, MemoryError) or bool(torch_failed)


def _room_in_groups() -> Iterator[int]:
    """The room left in each memory group of this process, from its own up to the root."""
    lines = GROUPS.read_text().splitlines() if GROUPS.is_file() else []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if not controllers:  # version 2
            root, files = GROUP_ROOT, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            root = GROUP_ROOT / "memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        limit, usage, prefix = files
        path = PurePosixPath(name)
        for group in (path, *path.parents):
            folder = root / str(group).lstrip("/")
            allowed, used = _number(folder / limit), _number(folder / usage)
            if allowed is not None and used is not None:
                yield allowed - used + _file_cache(folder / "memory.stat", prefix)


def _file_cache(stat: Path, prefix: str) -> int:
    """Bytes of cached files in a group's memory, which count as used and are freed when needed."""
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split(" ", 1) for line in lines if " " in line)
    return sum(int(values.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))


def _number(path: Path) -> int | None:
    """The number in a file; None if there is none (`max`: no limit)."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def steady_heap() -> None:
    """Keep the resident size from growing with the model's depth; only glibc has these calls."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, MAPPED_BYTES)
        set_option(M_TRIM_THRESHOLD, KEPT_BYTES)


def keep_heap() -> None:
    """Keep freed memory in the process, for training, which allocates the same amount every step.

    Each page from the system costs a page fault, which is a good part of the time of a step.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_MAX, 0)
        set_option(M_TRIM_THRESHOLD, 2**31 - 1)


def trim_heap() -> None:
    """Return free memory of glibc's heap to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
