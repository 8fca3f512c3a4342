"""ESA on a part of an image, as if it saw the whole."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import torch
from torch import nn

from .esa import ESA

STRIDE, FIRST = 6, 7  # pixels between the centres of coarse features, and where the first one lies


class OnTile(nn.Module):
    """A network with ESA that makes of a tile of an image what it makes of the whole image.

    ESA stretches its coarse map to the borders of its input, so that features are applied up to 6
    pixels from where they were computed, by their place in the image. This network is told that
    place; only at the rim of a tile, where it lacks the surroundings, its output is another.

    Args:
        network: is copied.
    """

    channels = 5  # of its input

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        self.tile = SimpleNamespace(shifts=None)
        for module in self.network.modules():
            if isinstance(module, ESA):
                vars(module)["upsample"] = functools.partial(_interpolate, self.tile)

    @staticmethod
    def shifts(start: int, length: int, side: int) -> torch.Tensor:
        """How far ESA moves features along one axis of a tile, (length,), in coarse cells.

        Args:
            start: first pixel of the tile in the image, a multiple of `STRIDE`.
            length: pixels of the tile, at least `MIN_SIZE`.
            side: pixels of the image.
        """
        cells = ((side - 3) // 2 + 1 - 7) // 3 + 1
        pixels = torch.arange(length, dtype=torch.float64)
        # Where F.interpolate(align_corners=False) looks in the coarse map of the whole image.
        whole = ((pixels + start + 0.5) * cells / side - 0.5).clamp(0, cells - 1)
        return (whole - start // STRIDE - (pixels - FIRST) / STRIDE).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 5, h, w): RGB of the tile, and as planes the shifts of its rows and columns."""
        self.tile.shifts = x[0, 3, :, 0], x[0, 4, 0, :]
        return self.network(x[:, :3])


def _interpolate(
    tile: SimpleNamespace, coarse: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """`ESA.upsample` at the shifts of the tile's rows and columns."""
    weights = []
    for shift, cells in zip(tile.shifts, coarse.shape[-2:], strict=True):
        # In float32, for positions are larger than what half precision tells apart.
        pixels = torch.arange(shift.shape[0], device=shift.device, dtype=torch.float32)
        positions = (pixels - FIRST) / STRIDE + shift.float()
        centres = torch.arange(cells, device=shift.device, dtype=torch.float32)
        weight = (1 - (positions[:, None] - centres).abs()).clamp(min=0)
        weights.append(weight.to(coarse.dtype))
    return weights[0] @ coarse @ weights[1].transpose(0, 1)  # OpenVINO does not know mT
