"""Enhanced spatial attention (ESA), the attention that closes every block of MLRN and of RLFN."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

# The stride-2 convolution and the 7-wide pool, both unpadded, leave nothing of fewer pixels.
MIN_SIZE = 15
STRIDE, FIRST = 6, 7  # pixels between the centres of coarse features, and where the first one lies


class ESA(nn.Module):
    """Enhanced spatial attention in RLFN's form; `H_ESA` of MLRN's eq. 5.

    An input narrower or lower than 15 pixels is continued by replication for the attention's
    coarse branch only; every other input passes through exactly the published computation.

    Args:
        num_feat: channels of input and output, at least 1.
        esa_feat: channels inside, at least 1 (16 in both papers).
    """

    # For exporters: pads by nothing where nothing is missing, so that a graph without branches
    # is right at every size.
    always_pad = False
    tile: SimpleNamespace | None = None  # set by OnTile

    def __init__(self, num_feat: int, esa_feat: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_feat, esa_feat, 1)
        self.conv_f = nn.Conv2d(esa_feat, esa_feat, 1)
        self.conv2 = nn.Conv2d(esa_feat, esa_feat, 3, stride=2)
        self.conv3 = nn.Conv2d(esa_feat, esa_feat, 3, padding=1)
        self.conv4 = nn.Conv2d(esa_feat, num_feat, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Weigh every element of `x`, (n, num_feat, h, w), by a value in (0, 1); same shape."""
        h, w = x.shape[-2:]
        c1 = self.conv1(x)
        coarse = c1
        # A plain branch: an export whose dynamic sizes are declared large enough decides it once
        # and stays dynamic, and no graph carries a padding that does nothing. Declare at least
        # 21 to torch.export: below, the pooled map is one pixel wide, which it specialises on.
        if self.always_pad or h < MIN_SIZE or w < MIN_SIZE:
            # sym_max: max would fix the size in an exported graph.
            padding = (0, torch.sym_max(0, MIN_SIZE - w), 0, torch.sym_max(0, MIN_SIZE - h))
            coarse = F.pad(coarse, padding, mode="replicate")
        coarse = F.max_pool2d(self.conv2(coarse), kernel_size=7, stride=3)
        coarse = self.refine(coarse)
        if self.tile is not None:
            coarse = _interpolate(coarse, *self.tile.shifts)
        else:
            coarse = F.interpolate(coarse, size=(h, w), mode="bilinear", align_corners=False)
        return x * torch.sigmoid(self.conv4(coarse + self.conv_f(c1)))

    def refine(self, coarse: torch.Tensor) -> torch.Tensor:
        """Map pooled features, (n, esa_feat, h, w), to the same shape; RFDN has more here."""
        return self.conv3(coarse)


def _interpolate(coarse: torch.Tensor, *shifts: torch.Tensor) -> torch.Tensor:
    """Bilinear interpolation of `coarse`, (n, c, h', w'), at the shifts of rows and columns."""
    weights = []
    for shift, size in zip(shifts, coarse.shape[-2:], strict=True):
        # In float32, for positions are larger than what half precision tells apart.
        pixels = torch.arange(shift.shape[0], device=shift.device, dtype=torch.float32)
        positions = (pixels - FIRST) / STRIDE + shift.float()
        cells = torch.arange(size, device=shift.device, dtype=torch.float32)
        weight = (1 - (positions[:, None] - cells).abs()).clamp(min=0)
        weights.append(weight.to(coarse.dtype))
    return weights[0] @ coarse @ weights[1].transpose(0, 1)  # OpenVINO does not know mT


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
                module.tile = self.tile

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
