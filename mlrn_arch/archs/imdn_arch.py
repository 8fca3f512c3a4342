"""IMDN, the information multi-distillation network (Hui et al., ACM Multimedia 2019).

Names in the state dict are those of https://github.com/Zheng222/IMDN, so that the published
checkpoints load strictly.
"""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from .cca import CCA


class IMDB(nn.Module):
    """Information multi-distillation block: each convolution keeps a quarter of its channels."""

    def __init__(self, num_feat: int) -> None:
        super().__init__()
        distilled = num_feat // 4
        remaining = num_feat - distilled
        self.split = (distilled, remaining)
        self.c1 = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.c2 = nn.Conv2d(remaining, num_feat, 3, padding=1)
        self.c3 = nn.Conv2d(remaining, num_feat, 3, padding=1)
        self.c4 = nn.Conv2d(remaining, distilled, 3, padding=1)
        self.c5 = nn.Conv2d(num_feat, num_feat, 1)
        self.cca = CCA(num_feat, max(1, num_feat // 16))
        self.act = nn.LeakyReLU(0.05)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        remaining = x
        for conv in (self.c1, self.c2, self.c3):
            distilled, remaining = self.act(conv(remaining)).split(self.split, dim=1)
            kept.append(distilled)
        kept.append(self.c4(remaining))
        return self.c5(self.cca(torch.cat(kept, dim=1))) + x


@ARCH_REGISTRY.register()
class IMDN(nn.Module):
    """Information multi-distillation network for super-resolution (IMDN of MLRN's Table 1).

    The defaults are IMDN x4 (715,176 parameters; x2 has 694,404, x3 703,059). The published
    checkpoints take and give [0, 1] as well.

    Args:
        num_in_ch, num_out_ch: channels of the input and of the output image.
        num_feat: channels of the features, a multiple of 4.
        num_block: number of IMDBs.
        upscale: scale factor; 2, 3 and 4 in the paper.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 64,
        num_block: int = 6,
        upscale: int = 4,
    ) -> None:
        super().__init__()
        if num_feat % 4:
            raise ValueError(f"num_feat must be a multiple of 4, not {num_feat}.")
        self.num_block = num_block
        self.fea_conv = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        for i in range(1, num_block + 1):
            self.add_module(f"IMDB{i}", IMDB(num_feat))
        self.c = nn.Sequential(
            nn.Conv2d(num_feat * num_block, num_feat, 1), nn.LeakyReLU(0.05, inplace=True)
        )
        self.LR_conv = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.upsampler = nn.Sequential(
            nn.Conv2d(num_feat, num_out_ch * upscale**2, 3, padding=1), nn.PixelShuffle(upscale)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Enlarge `x`, (n, num_in_ch, h, w) in [0, 1]; the output is not clamped."""
        shallow = self.fea_conv(x)
        features = []
        deep = shallow
        for i in range(1, self.num_block + 1):
            deep = self.get_submodule(f"IMDB{i}")(deep)
            features.append(deep)
        return self.upsampler(self.LR_conv(self.c(torch.cat(features, dim=1))) + shallow)
