"""Where an image is cut into overlapping tiles, and how their outputs are put together."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from mlrn_arch.archs.tile import STRIDE
from mlrn_arch.machine import free_memory

OVERLAP = 80  # input pixels that neighbouring tiles share; figures in README
LARGEST, SMALLEST = 1024, 192  # pixels a side


def cut(side: int, tile: int) -> tuple[list[int], int]:
    """Where tiles start along a side, at multiples of ESA's stride from both ends; their length."""
    if side <= tile:
        return [0], side
    number, length = 1, side
    while length > tile:
        number += 1
        length = math.ceil((side + (number - 1) * OVERLAP) / number)
        length += (side - length) % STRIDE
    strides = (side - length) // STRIDE
    return [round(i * strides / (number - 1)) * STRIDE for i in range(number)], length


def weights(starts: list[int], length: int, scale: int, device: torch.device) -> list[Tensor]:
    """What outputs of tiles count along a side: together 1, and nothing at the rim of a tile."""
    shares = [torch.ones(length * scale, device=device) for _ in starts]
    for i, (start, following) in enumerate(itertools.pairwise(starts)):
        n = (start + length - following) * scale
        ramp = ((torch.arange(n, device=device) + 0.5) / n * 2 - 0.5).clamp_(0, 1)
        shares[i][-n:] -= ramp
        shares[i + 1][:n] = ramp
    return shares


def choose(image: Tensor, scale: int, pixel: float, device: torch.device) -> int:
    """The longest side of a tile that needs no more than half of what the output leaves.

    `image` is (h, w, c); the network needs `pixel` bytes for one of its pixels.
    """
    height, width, channels = image.shape
    if device.type == "cuda":  # what torch's cache can give back is free, too
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
    else:
        free = free_memory() - height * width * scale**2 * max(4, channels * image.element_size())
    row = 6 * width * channels * scale**2  # float32, and a half more to round them
    side = LARGEST
    while side > SMALLEST and 2 * (side * side * pixel + side * row) > free:
        side -= 32
    return side
