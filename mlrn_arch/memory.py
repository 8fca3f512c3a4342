"""Memory of the CPU: how much is free, and how to keep it for the next training step."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path, PurePosixPath


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that are free to this process.

    Args:
        root: The folder of `proc` and `sys`.

    Returns:
        What the machine has available or, if that is less, what the limits of the container or
        batch job leave: of control groups of version 1 and 2, the process's own and all above it.
    """
    free = 4 * 2**30  # of a machine that does not tell
    # Any other system than Linux lacks these files.
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line[:13] == "MemAvailable:")
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                top, limit, usage = "", "memory.max", "memory.current"
            elif "memory" in controllers.split(","):
                top, limit, usage = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            else:
                continue
            # A container may see no more than the topmost of them, which then is its own.
            for part in (PurePosixPath(path), *PurePosixPath(path).parents):
                group = root / "sys/fs/cgroup" / top / part.relative_to("/")
                if (group / limit).exists() and (most := (group / limit).read_text()) != "max\n":
                    used = int((group / usage).read_text())
                    free = min(free, int(most) - used + _cached(group / "memory.stat"))
    return max(free, 0)


def _cached(stat: Path) -> int:
    """Bytes of files that a group is charged with, and that make way for what it allocates."""
    values = dict(line.split() for line in stat.read_text().splitlines())
    # With "total_" it is that of the groups below as well, which version 2 counts anyway.
    kinds = ("inactive_file", "active_file")
    return sum(int(values.get(f"total_{kind}", values.get(kind, 0))) for kind in kinds)


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
