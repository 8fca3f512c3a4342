"""What a network costs: counts of one forward pass, and times taken in turns.

parameters   all parameters of the network
mult-adds    multiplications of convolutions (grouped, transposed and deformable ones too), linear
             layers, matrix products and attention, each with its addition; biases, activations,
             pooling, interpolation and other products and sums are not counted
FLOPs        as the NTIRE challenge counts: mult-adds, plus 1 for each output element of ReLU,
             LeakyReLU, PReLU, ELU and ReLU6, plus 2 for each of BatchNorm2d (1 if not affine);
             the challenge's counter errs in transposed convolutions and in linear layers on more
             than two dimensions, this one does not
acts         output elements of all convolutions
conv         calls of a convolution
peak MiB     weights, input, and the most that the tensors of a forward pass take at one time;
             workspace inside a kernel is not counted
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary
from tqdm import tqdm

from mlrn_arch.errors import UserError, first_line
from mlrn_arch.inference.backends import quiet

RELU_LIKE = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.ReLU6)
DEFORMABLE = torch.ops.torchvision.deform_conv2d
CONVOLUTIONS = (torch.ops.aten.convolution.default, DEFORMABLE.default)


class _Tally(TorchDispatchMode):
    """Sees every operator of a forward pass: counts convolutions and the bytes alive."""

    def __init__(self, held: Sequence[Tensor]) -> None:
        super().__init__()
        self.activations = self.convolutions = self.peak = 0
        self.alive = WeakIdKeyDictionary()  # bytes by storage
        self._add(held)

    def _add(self, tensors: Sequence[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()  # views and in-place results share one
                self.alive[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self.alive.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._add(tree_leaves(result))
        if func in CONVOLUTIONS:
            self.activations += result.numel()
            self.convolutions += 1
        return result


def count(
    network: nn.Module,
    shape: Sequence[int],
    upscale: float,
    dtype: torch.dtype = torch.float32,
) -> dict[str, int]:
    """Count what one pass of an input of `shape`, (n, c, h, w), costs; the network is not changed.

    Returns `parameters`, `mult_adds`, `flops`, `activations`, `convolutions` and `peak_bytes`, for
    weights and input of `dtype`; `UserError` if the output has not `upscale` times the size.
    """
    for device in ("meta", "cpu"):  # some networks look at values; the meta device has none
        try:
            counts, size = _count_on(network, torch.zeros(*shape, device=device, dtype=dtype))
            break
        except Exception as error:  # each network fails in its own way
            reason = first_line(error)
    else:
        raise UserError(f"cannot take an input of {' x '.join(map(str, shape))}: {reason}")
    expected = (shape[-2] * upscale, shape[-1] * upscale)
    if size[-2:] != expected:
        returned = f"{size[-1]}x{size[-2]}" if len(size) > 2 else "no image"
        raise UserError(
            f"returns {returned} where x{upscale} of {shape[-1]}x{shape[-2]} would be "
            f"{expected[1]}x{expected[0]}; if it has another scale, give it with --upscale"
        )
    return counts


def _count_on(network: nn.Module, x: Tensor) -> tuple[dict[str, int], tuple[int, ...]]:
    """The counts of a pass on x's device, and the size of what it returns."""
    network = copy.deepcopy(network).to(x.device, x.dtype)
    extra: list[int] = []

    def add_extra(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        extra.append(output.numel() * (2 if getattr(module, "affine", False) else 1))

    for module in network.modules():
        if isinstance(module, (*RELU_LIKE, nn.BatchNorm2d)):
            module.register_forward_hook(add_extra)
    tally = _Tally([*network.parameters(), *network.buffers(), x])
    deformable = {DEFORMABLE: lambda x, w, *_, out_shape, **__: 2 * prod(out_shape) * prod(w[1:])}
    flops = FlopCounterMode(display=False, custom_mapping=deformable)
    # Under inference_mode the tally would miss the parts of composite operators.
    with torch.no_grad(), flops, tally:
        y = network(x)
    mult_adds = flops.get_total_flops() // 2
    counts = {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "mult_adds": mult_adds,
        "flops": mult_adds + sum(extra),
        "activations": tally.activations,
        "convolutions": tally.convolutions,
        "peak_bytes": tally.peak,
    }
    return counts, tuple(getattr(y, "shape", ()))


def times_in_turns(calls: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Milliseconds of a call, for each function in each round: noise then meets all of them."""
    with quiet():  # it imports setuptools and looks for a CUDA compiler
        from torch.utils.benchmark import Timer
    threads = torch.get_num_threads()
    timers = [Timer("call()", globals={"call": call}, num_threads=threads) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for _ in tqdm(range(rounds), desc="rounds", disable=None if calls else True):
        for timer, turns in zip(timers, times, strict=True):
            turns.append(timer.blocked_autorange(min_run_time=0.1).median * 1e3)
    return times
