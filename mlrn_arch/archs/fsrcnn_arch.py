"""FSRCNN, the fast super-resolution convolutional network (Dong et al., ECCV 2016)."""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn


@ARCH_REGISTRY.register()
class FSRCNN(nn.Module):
    """An hourglass of convolutions and one deconvolution (FSRCNN of MLRN's Table 1).

    The defaults are FSRCNN(56, 12, 4) on Y. Its paper, and the table's 12K after it, count the
    12,464 weights of the convolutions; with biases and PReLU slopes there are 12,809 parameters,
    at every scale. FSRCNN-s is `num_feat=32, shrink_feat=5, num_mapping=1`.

    Args:
        num_in_ch, num_out_ch: channels of the input image, 1 for Y, and of the output image.
        upscale: scale factor, at most 9.
        num_feat: channels of the wide features, `d` in the paper.
        shrink_feat: channels of the narrow features, `s` in the paper.
        num_mapping: number of 3x3 convolutions between them, `m` in the paper.
    """

    def __init__(
        self,
        num_in_ch: int = 1,
        num_out_ch: int = 1,
        upscale: int = 4,
        num_feat: int = 56,
        shrink_feat: int = 12,
        num_mapping: int = 4,
    ) -> None:
        super().__init__()
        if upscale > 9:
            raise ValueError(f"upscale must be at most 9, the kernel's width, not {upscale}.")
        self.feature_extraction = nn.Sequential(
            nn.Conv2d(num_in_ch, num_feat, 5, padding=2), nn.PReLU(num_feat)
        )
        self.shrinking = nn.Sequential(nn.Conv2d(num_feat, shrink_feat, 1), nn.PReLU(shrink_feat))
        self.mapping = nn.Sequential()
        for _ in range(num_mapping):
            self.mapping.append(nn.Conv2d(shrink_feat, shrink_feat, 3, padding=1))
            self.mapping.append(nn.PReLU(shrink_feat))
        self.expanding = nn.Sequential(nn.Conv2d(shrink_feat, num_feat, 1), nn.PReLU(num_feat))
        self.deconvolution = nn.ConvTranspose2d(
            num_feat, num_out_ch, 9, stride=upscale, padding=4, output_padding=upscale - 1
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Enlarge `x`, (n, num_in_ch, h, w) in [0, 1]; the output is not clamped."""
        f = self.shrinking(self.feature_extraction(x))
        return self.deconvolution(self.expanding(self.mapping(f)))
