"""Training on a CPU in fp32 with kernels of our own, where a C++ compiler is at hand.

PyTorch convolves directly there. Winograd's algorithm needs a quarter of the multiplications of a
3x3 convolution; results differ by rounding, about 1e-5 of the largest value.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Compiled and linked in two steps: linked with -ffast-math, a library changes the rounding of the
# whole process. Linked without OpenMP's library, it uses the threads of PyTorch's.
COMPILE = "-O3 -march=native -ffast-math -fopenmp -fPIC -std=c++17 -c".split()

# The transform of a weight along one side, and of both sides at once: (36, 9).
_SIDE = torch.tensor(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64
)
_BOTH_SIDES = (torch.kron(_SIDE, _SIDE) / 24**2).float()


@functools.cache
def _library() -> ctypes.CDLL:
    """Compile the kernels for this very CPU (seconds; nothing is kept on disk) and load them.

    Raises:
        OSError: There is no compiler, or what it made cannot be loaded.
        subprocess.SubprocessError: It failed.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("there is no C++ compiler")
    source = Path(__file__).with_suffix(".cpp")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        part, whole = Path(folder, "kernels.o"), Path(folder, "kernels.so")
        for command in ([*COMPILE, source, "-o", part], ["-shared", part, "-o", whole, "-lm"]):
            subprocess.run([compiler, *command], check=True, capture_output=True, timeout=120)
        library = ctypes.CDLL(str(whole))
    pointer, size, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.conv3x3.argtypes = [pointer] * 4 + [size] * 5 + [threads]
    library.conv3x3_weight.argtypes = [pointer] * 3 + [size] * 5 + [threads]
    library.gelu.argtypes = [pointer] * 3 + [size, threads]
    return library


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`conv2d` of (n, c, h, w) with (o, c, 3, 3), padded by 1."""
    x = x.contiguous(memory_format=torch.channels_last)
    (n, c, h, w), o = x.shape, len(weight)
    taps = functional.pad(weight.permute(2, 3, 1, 0), (0, -o % _library().lanes()))
    transformed = _BOTH_SIDES @ taps.reshape(9, -1)
    y = torch.empty((n, o, h, w), memory_format=torch.channels_last)
    _library().conv3x3(
        x.data_ptr(),
        transformed.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        *(n, h, w, c, o),
        torch.get_num_threads(),
    )
    return y


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x, gy = (image.contiguous(memory_format=torch.channels_last) for image in (x, gy))
        gx = gweight = gbias = None
        if ctx.needs_input_grad[0]:
            gx = _convolve(gy, weight.flip(2, 3).transpose(0, 1), None)
        if ctx.needs_input_grad[1]:
            (n, c, h, w), o, threads = x.shape, len(weight), torch.get_num_threads()
            parts = torch.zeros(threads, 36, c, o + -o % _library().lanes())
            pointers = (tensor.data_ptr() for tensor in (x, gy, parts))
            _library().conv3x3_weight(*pointers, n, h, w, c, o, threads)
            taps = _BOTH_SIDES.T @ parts.sum(0).flatten(1)
            gweight = taps.view(3, 3, c, -1)[..., :o].permute(3, 2, 0, 1)
        if ctx.needs_input_grad[2]:
            gbias = gy.sum((0, 2, 3))
        return gx, gweight, gbias


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        y, slope = torch.empty_like(x), torch.empty_like(x)
        pointers = (tensor.data_ptr() for tensor in (x, y, slope))
        _library().gelu(*pointers, x.numel(), torch.get_num_threads())
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> Tensor:
        return gy * ctx.saved_tensors[0]


def _ours(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.dtype == torch.float32 and x.device.type == "cpu"


class _Conv3x3(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if not _ours(x):
            return super().forward(x)
        return _Winograd.apply(x, self.weight, self.bias)


class _Conv1x1(nn.Conv2d):
    """As a product of matrices, which is quicker for PyTorch than the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        if not _ours(x):
            return super().forward(x)
        y = functional.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)
        return y.permute(0, 3, 1, 2)


class _FastGELU(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return _GELU.apply(x) if _ours(x) else super().forward(x)


def use_in(network: nn.Module) -> None:
    """Let a network's convolutions and GELUs train with these kernels; evaluation stays as it is.

    Args:
        network: On the CPU, in fp32. Its 3x3 convolutions of stride 1 and enough channels, its
            1x1 convolutions and its exact GELUs change their class in place; parameters and their
            names stay.

    Raises:
        OSError, subprocess.SubprocessError: The kernels cannot be built here.
    """
    lanes = _library().lanes()
    for module in network.modules():
        if type(module) is nn.GELU and module.approximate == "none":
            module.__class__ = _FastGELU
        elif type(module) is nn.Conv2d:
            side = module.kernel_size[0]
            shape = (module.kernel_size, module.stride, module.padding, module.dilation)
            plain = module.groups == 1 and module.padding_mode == "zeros"
            if not plain or shape != ((side,) * 2, (1, 1), (side // 2,) * 2, (1, 1)):
                continue
            if side == 3 and min(module.in_channels, module.out_channels) >= lanes:
                module.__class__ = _Conv3x3
            elif side == 1:
                module.__class__ = _Conv1x1
