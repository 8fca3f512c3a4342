"""Bicubic upsampling as MATLAB does it: Table 1's reference, and the input of SRCNN and IDN."""

from __future__ import annotations

from functools import reduce

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn


def _taps(upscale: int) -> list[list[float]]:
    # Keys' cubic, a = -0.5, at the distances of an output pixel of each phase to the input pixels
    # -2 to 2 about its own; torch's own bicubic has a = -0.75.
    def cubic(x: float) -> float:
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    centres = [(phase + 0.5) / upscale - 0.5 for phase in range(upscale)]
    return [[cubic(abs(centre - i)) for i in range(-2, 3)] for centre in centres]


def _upsample_rows(x: torch.Tensor, upscale: int) -> torch.Tensor:
    height = x.shape[-2]
    second = 1 if height > 1 else 0  # of a single row its mirror image is itself
    padded = torch.cat(
        [
            x[..., second : second + 1, :],
            x[..., :1, :],
            x,
            x[..., height - 1 :, :],
            x[..., height - 1 - second : height - second, :],
        ],
        dim=-2,
    )
    # Products and sums, no convolution: autocast leaves them in the precision of the input.
    phases = [
        reduce(
            torch.add, (tap * padded[..., i : i + height, :] for i, tap in enumerate(taps) if tap)
        )
        for taps in _taps(upscale)
    ]
    return torch.stack(phases, dim=-2).flatten(-3, -2)


def upsample_bicubic(x: torch.Tensor, upscale: int) -> torch.Tensor:
    """Enlarge images as MATLAB's `imresize(img, upscale)` does on floating-point images.

    Keys' cubic (1981, a = -0.5); the image is mirrored at its border (the edge pixel repeated).

    Args:
        x: images of any range, (n, c, h, w), floating-point.
        upscale: the factor, an integer of at least 1.

    Returns:
        (n, c, h * upscale, w * upscale), not clamped.
    """
    return _upsample_rows(_upsample_rows(x, upscale).mT, upscale).mT


@ARCH_REGISTRY.register()
class Bicubic(nn.Module):
    """MATLAB's bicubic upsampling as a network without parameters ("Bicubic" of Table 1).

    Args:
        upscale: scale factor.
    """

    def __init__(self, upscale: int = 4) -> None:
        super().__init__()
        self.upscale = upscale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Enlarge `x`, (n, c, h, w) in [0, 1], to (n, c, h * upscale, w * upscale).

        The result overshoots [0, 1] by a little at edges; it is not clamped.
        """
        return upsample_bicubic(x, self.upscale)
