"""What this machine can do: devices, precisions, free memory, installed packages."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from mlrn_arch.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("cpu", "cuda", "mps")


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name; None means a GPU if there is one, else the CPU."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    no_cuda = device.type == "cuda" and not torch.cuda.is_available()
    if no_cuda or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"device {device}: torch finds no GPU here; use cpu")
    return device


def name_of(device: torch.device) -> str:
    """The name of a GPU, or of the processor with its cores and the threads that torch uses."""
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
    """Whether a device computes in bf16 natively; False on CPUs where torch < 2.11 cannot tell."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))


def fits_fp16(network: torch.nn.Module) -> bool:
    """Whether features stay far below fp16's largest number, 65,504: at an image range up to 1."""
    # The output would not tell: attention hides an overflow from it.
    return all(getattr(module, "img_range", 1) <= 1 for module in network.modules())


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """Keep cuDNN's fp32 convolutions in fp32; its default on Ampere and later GPUs is TF32."""
    try:
        before = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the program has chosen itself, by torch's newer interface
        yield
        return
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def cores() -> int:
    """How many processor cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def missing(*packages: str) -> list[str]:
    """Which of `packages` are not installed."""
    return [package for package in packages if not importlib.util.find_spec(package)]


def need(what: str, *packages: str) -> None:
    """Raise `UserError`, with the command that installs them, if one of `packages` is missing."""
    if lacking := missing(*packages):
        raise UserError(
            f"{what} needs {' and '.join(lacking)}, not installed in this Python; "
            f"pip install {' '.join(lacking)}"
        )


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may still allocate; `root` is the folder of `proc`, `sys`.

    The least of what the machine has available and what each limit of a container or batch job
    leaves: control groups of version 1 and 2, the process's own and all above it.
    """
    free = 4 * 2**30  # where the system does not say
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
            # A container may see only the topmost group, which is its own then.
            for part in (PurePosixPath(path), *PurePosixPath(path).parents):
                group = root / "sys/fs/cgroup" / top / part.relative_to("/")
                if (group / limit).exists() and (most := (group / limit).read_text()) != "max\n":
                    used = int((group / usage).read_text())
                    free = min(free, int(most) - used + _cached(group / "memory.stat"))
    return max(free, 0)


def _cached(stat: Path) -> int:
    """Bytes of cached files that a group is charged with, and that allocations can replace."""
    values = dict(line.split() for line in stat.read_text().splitlines())
    # Version 1's "total_" includes the groups below, as version 2 does anyway.
    kinds = ("inactive_file", "active_file")
    return sum(int(values.get(f"total_{kind}", values.get(kind, 0))) for kind in kinds)
