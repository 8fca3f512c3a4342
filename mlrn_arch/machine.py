"""What this machine can do: devices, precisions, free memory, installed packages."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
from pathlib import Path, PurePosixPath

import torch

from mlrn_arch.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("cpu", "cuda", "mps")


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """The device of a name; a GPU if there is one and None is given.

    Raises:
        UserError: It is a GPU, and torch finds none.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if not found.get(device.type, lambda: True)():
        raise UserError(f"device {device}: torch finds no GPU here; use cpu")
    return device


def name_of(device: torch.device) -> str:
    """The GPU, or the processor with its cores and the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as lines:
            cpu = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{cpu} ({os.cpu_count()} cores), {threads} thread{'s' * (threads > 1)}"


def computes_in_bf16(device: str = "cpu") -> bool:
    """Whether bf16 is more than an emulation on a device; no, if torch <2.11 can't tell."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def cores() -> int:
    """How many processor cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def missing(*packages: str) -> list[str]:
    """Those of `packages` that are not installed."""
    return [package for package in packages if not importlib.util.find_spec(package)]


def need(what: str, *packages: str) -> None:
    """Raise `UserError`, with the command that installs them, if one of `packages` is missing."""
    if lacking := missing(*packages):
        raise UserError(
            f"{what} needs {' and '.join(lacking)}, which this Python lacks; "
            f"pip install {' '.join(lacking)}"
        )


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
