"""MLRN that starts from trained weights: RLFN's, or another MLRN's."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from mlrn_arch import checkpoints
from mlrn_arch.archs.mlrn_arch import MLRN
from mlrn_arch.errors import UserError

NEW = 0.1  # share of the initial weights, for channels that the teacher does not have
LARGEST_STEP = 0.1  # learning rate over RMS of the last weights: at 0.26 Set5 loses 0.5 dB


def inherit_weights(network: torch.nn.Module, path: str) -> None:
    """Start an MLRN from a checkpoint of RLFN (image range 255 unless noted) or MLRN.

    Raises:
        UserError: It is no checkpoint, of another network, or does not fit; or `network` is no
            MLRN.
    """
    if not isinstance(network, MLRN):
        raise UserError(f"{type(network).__name__} inherits from no other network; MLRN does")
    state = checkpoints.state_dict(checkpoints.read(path), path=path)
    try:
        rlfn = "conv_1.weight" in state
        theirs = checkpoints.noted(state) if rlfn else checkpoints.deduce(state)
        inherit(network, state, theirs.get("img_range", 255.0 if rlfn else 1.0))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def too_fast(network: torch.nn.Module, lr: float) -> str | None:
    """Why training would destroy the weights of an MLRN, or None.

    A step of Adam changes each weight by about `lr`. In image range 1 the last layer's weights are
    255 times smaller than in range 255, often smaller than `lr`.
    """
    if not isinstance(network, MLRN):
        return None
    rms = float(network.upsampler[0].weight.detach().square().mean().sqrt())
    if lr <= LARGEST_STEP * rms:
        return None
    return (
        f"the last layer's weights are about {rms:.1e}, and each step at train:optim_g:lr {lr:g} "
        "would change them by as much: training would destroy the network; "
        + (
            "set network_g:img_range=255, where they are 255 times larger, or fine-tune by "
            f"options/finetune_MLRN_x{network.upscale}.yml"
            if network.img_range < 255
            else f"lower train:optim_g:lr to {LARGEST_STEP * rms:.0e}"
        )
    )


@torch.no_grad()
def inherit(network: MLRN, state: Mapping[str, torch.Tensor], img_range: float) -> None:
    """Start a network from trained weights: from RLFN's with the mixers to be learned.

    A block of MLRN is RLFN's but for its third 3x3 convolution, which became the mixer, and for
    its activation. All else is taken over: with those two put back, the network computes what
    RLFN computes, except near the border, within 2 pixels of which zero padding and replication
    differ. Of channels that RLFN lacks, `num_in_ch` carry the input to the upsampler, which
    subtracts what the bilinear branch adds. The mixer starts as the middle of the convolution.

    Args:
        network: Of any scale and image range, changed in place. With the mixer `convmix` or
            `pointwise`, as many blocks as `state` and at least as many features; with the
            bilinear branch, at least `num_in_ch` more.
        state: Of RLFN, or of an MLRN with the same arguments but for `upscale` and `img_range`.
        img_range: The image range that `state` computes in: 255 for RLFN's published weights.

    Raises:
        ValueError: `state` is of another network, or does not fit `network`.
    """
    if {"conv_first.weight", "conv_after_body.weight", "upsampler.0.weight"} <= state.keys():
        own, theirs = (
            {(k, v.shape) for k, v in tensors.items() if not k.startswith("upsampler.")}
            for tensors in (network.state_dict(), state)
        )
        if differing := sorted(own ^ theirs):
            raise ValueError(f"this MLRN has other features, blocks or mixer: {differing[0][0]}")
        noted = {"act": "gelu", "bilinear": True, **checkpoints.noted(state)}
        act = "gelu" if isinstance(network.body[0].act, nn.GELU) else "lrelu"
        if checkpoints.noted(state) and (act, network.bilinear) != (
            noted["act"],
            noted["bilinear"],
        ):
            raise ValueError(f"it has act: {noted['act']} and bilinear: {noted['bilinear']}")
        rest = {k: v for k, v in state.items() if not k.startswith("upsampler.")}
        network.load_state_dict(rest, strict=False)
        _upsampler(network, state)
    elif {"conv_1.weight", "block_1.c1_r.weight", "upsampler.0.weight"} <= state.keys():
        _from_rlfn(network, state)
    else:
        raise ValueError("these are neither RLFN's weights nor MLRN's")
    checkpoints.convert_range(network, img_range)


def _from_rlfn(network: MLRN, state: Mapping[str, torch.Tensor]) -> None:
    blocks = len({key.split(".")[0] for key in state if key.startswith("block_")})
    num_feat, num_in_ch = state["conv_1.weight"].shape[:2]
    width, mid = network.conv_first.out_channels, len(state["block_1.c1_r.weight"])
    if len(network.body) != blocks:
        raise ValueError(f"RLFN has {blocks} blocks here, this MLRN {len(network.body)}")
    if network.conv_first.in_channels != num_in_ch:
        raise ValueError(f"RLFN has {num_in_ch} input channels here")
    if width < max(num_feat + num_in_ch * network.bilinear, mid):
        raise ValueError(
            f"RLFN has {num_feat} features ({mid} inside a block) here; this MLRN needs "
            f"{max(num_feat + num_in_ch * network.bilinear, mid)} or more, not {width}"
        )
    if isinstance(network.body[0].mixer, nn.Identity):
        raise ValueError("mixer: none has nothing in place of RLFN's third convolution")

    _embed(network.conv_first, state, "conv_1")
    _embed(network.conv_after_body, state, "conv_2")
    _upsampler(network, state)
    for conv in (network.conv_first, network.conv_after_body):
        conv.weight[num_feat:] *= NEW
    if network.bilinear:
        rgb = slice(num_feat, num_feat + num_in_ch)
        network.conv_first.weight[rgb] = 0
        network.conv_first.weight[rgb, :, 1, 1] = torch.eye(num_in_ch)
        network.conv_after_body.weight[rgb] = 0
        taps = _bilinear_taps(network.upscale)
        minus = -torch.einsum("py,qx->pqyx", taps, taps).flatten(0, 1)
        weight = network.upsampler[0].weight.unflatten(0, (num_in_ch, -1))
        for channel in range(num_in_ch):
            weight[channel, :, num_feat + channel] = minus

    for i, block in enumerate(network.body, 1):
        names = {"conv1": "c1_r", "conv2": "c2_r", "conv3": "c5"}
        names |= {f"esa.{k}": f"esa.{k}" for k in ("conv1", "conv_f", "conv2", "conv3", "conv4")}
        for own, theirs in names.items():
            _embed(block.get_submodule(own), state, f"block_{i}.{theirs}")
        pointwise, third = block.mixer.pointwise, state[f"block_{i}.c3_r.weight"]
        pointwise.weight.zero_()
        pointwise.weight[:num_feat, :mid] = third[:, :, 1:2, 1:2]
        pointwise.weight[range(mid, width), range(mid, width)] += NEW
        pointwise.bias.zero_()
        pointwise.bias[:num_feat] = state[f"block_{i}.c3_r.bias"]
        if block.mixer.depthwise is not None:
            block.mixer.depthwise.weight *= 0.3
            block.mixer.depthwise.bias.zero_()


def _embed(conv: nn.Conv2d, state: Mapping[str, torch.Tensor], name: str) -> None:
    """Put a convolution into the first rows and columns of a larger one, which leaves it alone."""
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    if any(own < theirs for own, theirs in zip(conv.weight.shape, weight.shape, strict=True)):
        raise ValueError(f"RLFN's {name} is larger than this MLRN's")
    rows, columns = weight.shape[:2]
    conv.weight[:rows] = 0
    conv.weight[:rows, :columns] = weight
    conv.bias.zero_()
    conv.bias[:rows] = bias


def _upsampler(network: MLRN, state: Mapping[str, torch.Tensor]) -> None:
    """Take over an upsampler; for another scale its filters are interpolated between phases."""
    own, colours = network.upsampler[0], network.upsampler[0].out_channels // network.upscale**2
    weight, bias = state["upsampler.0.weight"], state["upsampler.0.bias"]
    scale = math.isqrt(len(weight) // colours)
    if colours * scale**2 != len(weight):
        raise ValueError(f"the weights are not of {colours} output channels")

    def rescaled(tensor: torch.Tensor) -> torch.Tensor:
        phases = tensor.reshape(colours, scale, scale, -1).permute(0, 3, 1, 2)
        size = (network.upscale, network.upscale)
        phases = F.interpolate(phases, size, mode="bilinear", align_corners=False)
        return phases.permute(0, 2, 3, 1).reshape(-1, *tensor.shape[1:])

    _embed(
        own, {"upsampler.weight": rescaled(weight), "upsampler.bias": rescaled(bias)}, "upsampler"
    )


def _bilinear_taps(scale: int) -> torch.Tensor:
    """Bilinear enlargement along an axis as `scale` filters of 3 taps, (scale, 3)."""
    where = (torch.arange(scale) + 0.5) / scale - 0.5
    return (1 - (where[:, None] - torch.tensor([-1.0, 0.0, 1.0])).abs()).clamp(min=0)
