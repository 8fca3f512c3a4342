"""SRCNN, the first convolutional network for super-resolution (Dong et al., TPAMI 2016)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn
from torch.nn import functional as F

from .bicubic_arch import upsample_bicubic


@ARCH_REGISTRY.register()
class SRCNN(nn.Module):
    """Three convolutions on the bicubically enlarged image (SRCNN of MLRN's Table 1).

    The defaults are the 9-1-5 network on Y, 8,129 parameters at every scale, the table's 8K. Its
    52.7G Mult-Adds are those of the 9-5-5 network, `kernel_sizes=(9, 5, 5)`, which has 57,281. As
    in the authors' test code the border of every convolution's input is repeated outwards.

    Args:
        num_in_ch, num_out_ch: channels of the input image, 1 for Y, and of the output image.
        upscale: scale factor; it changes the bicubic enlargement alone.
        num_feat: channels after the first and after the second convolution.
        kernel_sizes: widths of the three kernels, odd.
    """

    def __init__(
        self,
        num_in_ch: int = 1,
        num_out_ch: int = 1,
        upscale: int = 4,
        num_feat: Sequence[int] = (64, 32),
        kernel_sizes: Sequence[int] = (9, 1, 5),
    ) -> None:
        super().__init__()
        if len(num_feat) != 2:
            raise ValueError(f"num_feat must be two numbers, not {num_feat!r}.")
        if len(kernel_sizes) != 3 or not all(size % 2 for size in kernel_sizes):
            raise ValueError(f"kernel_sizes must be three odd numbers, not {kernel_sizes!r}.")
        self.upscale = upscale
        channels = (num_in_ch, *num_feat, num_out_ch)
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv2d(channels[i], channels[i + 1], k, padding=k // 2, padding_mode="replicate")
            for i, k in enumerate(kernel_sizes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Enlarge `x`, (n, num_in_ch, h, w) in [0, 1]; the output is not clamped."""
        f1 = F.relu(self.conv1(upsample_bicubic(x, self.upscale)))
        f2 = F.relu(self.conv2(f1))
        return self.conv3(f2)
