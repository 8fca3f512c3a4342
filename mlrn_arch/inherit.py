"""MLRN that starts from trained weights: RLFN's, or another MLRN's."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlrn_arch import checkpoints
from mlrn_arch.archs.mlrn_arch import MLRN
from mlrn_arch.checkpoints import StateDict
from mlrn_arch.errors import UserError

NEW = 0.1  # share of the initial weights, for channels that RLFN lacks
LARGEST_STEP = 0.05  # learning rate over the last weights' RMS: x4 loses 0.4 dB on Set5, 1.3 at 0.1


def inherit_weights(network: nn.Module, path: str) -> None:
    """Start an MLRN from a checkpoint of RLFN (image range 255 if none is noted) or of MLRN."""
    if not isinstance(network, MLRN):
        raise UserError(f"{type(network).__name__} inherits from no other network; MLRN does")
    state = checkpoints.state_dict(checkpoints.read(path), path=path)
    try:
        rlfn = "conv_1.weight" in state
        theirs = checkpoints.noted(state) if rlfn else checkpoints.deduce(state)
        inherit(network, state, theirs.get("img_range", 255.0 if rlfn else 1.0))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def check_rate(network: nn.Module, lr: float) -> None:
    """Raise `UserError` if training would destroy the weights of an MLRN.

    A step of Adam changes each weight by about `lr`. In image range 1 the last layer's weights are
    255 times smaller than in range 255, and often smaller than `lr`.
    """
    if not isinstance(network, MLRN):
        return
    size = float(next(network.upsampler.parameters()).detach().square().mean().sqrt())
    if lr <= LARGEST_STEP * size:
        return
    way = f"lower train:optim_g:lr to {LARGEST_STEP * size:.0e}"
    if network.img_range < 255:
        way = f"set network_g:img_range=255, or use options/finetune_MLRN_x{network.upscale}.yml"
    raise UserError(
        f"the last layer's weights are about {size:.1e}, and each step changes them by up to "
        f"train:optim_g:lr {lr:g}, which destroys the network; {way}"
    )


@torch.no_grad()
def inherit(network: MLRN, state: StateDict, img_range: float) -> None:
    """Start a network from trained weights: from RLFN's with the mixers to be learned.

    RLFN's block has a third 3x3 convolution in place of the mixer, and another activation. All else
    is taken over: with those two put back, the network computes what RLFN computes, except within
    2 pixels of the border, where zero padding and replication differ. `num_in_ch` of the channels
    that RLFN lacks carry the input to the upsampler, which subtracts what the bilinear branch
    adds. The mixer starts as the middle of the convolution.

    `state` is of RLFN, or of an MLRN that differs in `upscale` and `img_range` alone; else
    `ValueError` is raised. It computes in `img_range`, 255 for RLFN's published weights.
    """
    own: StateDict = {name: parameter.data for name, parameter in network.named_parameters()}
    if {"conv_1.weight", "block_1.c1_r.weight", "upsampler.0.weight"} <= state.keys():
        _from_rlfn(network, own, state)
    elif {"conv_first.weight", "conv_after_body.weight", "upsampler.0.weight"} <= state.keys():
        shapes, theirs = (
            {(k, v.shape) for k, v in tensors.items() if not k.startswith("upsampler.")}
            for tensors in (own, state)
        )
        if differing := sorted(shapes ^ theirs):
            raise ValueError(f"this MLRN has other features, blocks or mixer: {differing[0][0]}")
        if noted := checkpoints.noted(state):
            act, bilinear = noted.get("act", "gelu"), noted.get("bilinear", True)
            gelu = any(isinstance(module, nn.GELU) for module in network.modules())
            if (act == "gelu", bilinear) != (gelu, network.bilinear):
                raise ValueError(f"this MLRN differs from act: {act}, bilinear: {bilinear}")
        for name, _ in shapes:
            own[name].copy_(state[name])
        _upsampler(network, own, state)
    else:
        raise ValueError("these are neither RLFN's weights nor MLRN's")
    checkpoints.convert_range(network, img_range)


def _from_rlfn(network: MLRN, own: StateDict, state: StateDict) -> None:
    blocks = len({key.split(".")[0] for key in state if key.startswith("block_")})
    num_feat, num_in_ch = state["conv_1.weight"].shape[:2]
    width, mid = len(own["conv_first.weight"]), len(state["block_1.c1_r.weight"])
    needed = max(num_feat + num_in_ch * network.bilinear, mid)
    fits = (len(network.body), own["conv_first.weight"].shape[1]) == (blocks, num_in_ch)
    if not fits or width < needed:
        raise ValueError(
            f"RLFN has {blocks} blocks, {num_feat} features ({mid} inside a block) and {num_in_ch} "
            f"input channels here; MLRN needs the same blocks and channels, and {needed} features"
        )
    if "body.0.mixer.pointwise.weight" not in own:
        raise ValueError("mixer: none has nothing in place of RLFN's third convolution")

    for name, theirs in (("conv_first", "conv_1"), ("conv_after_body", "conv_2")):
        _embed(own, name, state[f"{theirs}.weight"], state[f"{theirs}.bias"])
        own[f"{name}.weight"][num_feat:] *= NEW
    _upsampler(network, own, state)
    if network.bilinear:
        rgb = slice(num_feat, num_feat + num_in_ch)
        own["conv_first.weight"][rgb] = 0
        own["conv_first.weight"][rgb, :, 1, 1] = torch.eye(num_in_ch)
        own["conv_after_body.weight"][rgb] = 0
        # Bilinear enlargement along an axis: `upscale` filters of 3 taps.
        where = (torch.arange(network.upscale) + 0.5) / network.upscale - 0.5
        taps = (1 - (where[:, None] - torch.tensor([-1.0, 0.0, 1.0])).abs()).clamp(min=0)
        minus = -torch.einsum("py,qx->pqyx", taps, taps).flatten(0, 1)
        weight = own["upsampler.0.weight"].unflatten(0, (num_in_ch, -1))
        for channel in range(num_in_ch):
            weight[channel, :, num_feat + channel] = minus

    names = {"conv1": "c1_r", "conv2": "c2_r", "conv3": "c5"}
    names |= {f"esa.{k}": f"esa.{k}" for k in ("conv1", "conv_f", "conv2", "conv3", "conv4")}
    for i in range(blocks):
        block, theirs = f"body.{i}", f"block_{i + 1}"
        for name, inner in names.items():
            weight, bias = (state[f"{theirs}.{inner}.{kind}"] for kind in ("weight", "bias"))
            _embed(own, f"{block}.{name}", weight, bias)
        pointwise = own[f"{block}.mixer.pointwise.weight"].zero_()
        pointwise[:num_feat, :mid] = state[f"{theirs}.c3_r.weight"][:, :, 1:2, 1:2]
        pointwise[range(mid, width), range(mid, width)] += NEW
        own[f"{block}.mixer.pointwise.bias"].zero_()[:num_feat] = state[f"{theirs}.c3_r.bias"]
        if f"{block}.mixer.depthwise.weight" in own:
            own[f"{block}.mixer.depthwise.weight"] *= 0.3
            own[f"{block}.mixer.depthwise.bias"].zero_()


def _embed(own: StateDict, name: str, weight: Tensor, bias: Tensor) -> None:
    """Put a convolution into the first rows and columns of a larger one, which leaves it alone."""
    larger = own[f"{name}.weight"]
    if any(a < b for a, b in zip(larger.shape, weight.shape, strict=True)):
        raise ValueError(f"RLFN's {name} is larger than this MLRN's")
    rows, columns = weight.shape[:2]
    larger[:rows] = 0
    larger[:rows, :columns] = weight
    own[f"{name}.bias"].zero_()[:rows] = bias


def _upsampler(network: MLRN, own: StateDict, state: StateDict) -> None:
    """Take over an upsampler; for another scale its filters are interpolated between phases."""
    weight, bias = state["upsampler.0.weight"], state["upsampler.0.bias"]
    colours = len(own["upsampler.0.weight"]) // network.upscale**2
    scale = math.isqrt(len(weight) // colours)
    if colours * scale**2 != len(weight):
        raise ValueError(f"the weights are not of {colours} output channels")

    def rescaled(tensor: Tensor) -> Tensor:
        phases = tensor.reshape(colours, scale, scale, -1).permute(0, 3, 1, 2)
        size = (network.upscale, network.upscale)
        phases = F.interpolate(phases, size, mode="bilinear", align_corners=False)
        return phases.permute(0, 2, 3, 1).reshape(-1, *tensor.shape[1:])

    _embed(own, "upsampler.0", rescaled(weight), rescaled(bias))
