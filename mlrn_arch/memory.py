"""Memory of the CPU: how much is free, and how to keep it for the next training step."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path


def free_memory() -> int:
    """Bytes of memory that are free, to this machine or to the container it runs in."""
    free = 4 * 2**30  # of a machine that does not tell
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line[:13] == "MemAvailable:")
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, StopIteration, ValueError):
        pass  # no Linux, or no control groups
    return max(free, 0)


def keep_freed_memory(processes: int) -> None:
    """After the first training step: keep what a step frees for the next, on Linux with glibc.

    By default glibc gives large blocks back as they are freed, and the system clears every page
    of them anew: half of the time at a batch of 64. Kept blocks fragment, and take up to 2.2 times
    the memory (measured there), so it stays as it is where that is not free.

    Args:
        processes: How many on this machine do the same.
    """
    # Other C libraries have no such function, other systems no such module.
    with contextlib.suppress(AttributeError, ImportError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if free_memory() > 2.5 * peak * processes:
            mallopt(-4, 0)  # M_MMAP_MAX: all blocks come from the heap,
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: which does not shrink
