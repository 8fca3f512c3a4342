"""MLRN that begins as a trained RLFN, or as an MLRN of another scale or image range."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from mlrn_arch.archs.mlrn_arch import MLRN

# Of the weights that read or make channels which a teacher does not have.
NEW = 0.1


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
            {k: v for k, v in tensors.items() if not k.startswith("upsampler.")}
            for tensors in (network.state_dict(), state)
        )
        if misfit := [k for k in own if k not in theirs or own[k].shape != theirs[k].shape]:
            raise ValueError(f"this MLRN has other features or blocks: {misfit[0]}")
        network.load_state_dict(theirs, strict=False)
        _upsampler(network, state)
    elif {"conv_1.weight", "block_1.c1_r.weight", "upsampler.0.weight"} <= state.keys():
        _from_rlfn(network, state)
    else:
        raise ValueError("these are neither RLFN's weights nor MLRN's")
    network.conv_first.weight *= img_range / network.img_range
    for parameter in network.upsampler[0].parameters():
        parameter *= network.img_range / img_range


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
        if hasattr(block.mixer, "depthwise"):
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
