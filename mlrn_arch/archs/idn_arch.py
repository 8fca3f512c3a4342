"""IDN, the information distillation network (Hui et al., CVPR 2018)."""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn
from torch.nn import functional as F

from .bicubic_arch import upsample_bicubic


class DBlock(nn.Module):
    """Information distillation block: an enhancement unit and a compression unit."""

    def __init__(self, num_feat: int) -> None:
        super().__init__()
        d = num_feat // 4  # by so much each layer is wider or narrower, and so much is kept
        self.distilled = d
        self.conv1 = nn.Conv2d(num_feat, num_feat - d, 3, padding=1)
        self.conv2 = nn.Conv2d(num_feat - d, num_feat - 2 * d, 3, padding=1, groups=4)
        self.conv3 = nn.Conv2d(num_feat - 2 * d, num_feat, 3, padding=1)
        self.conv4 = nn.Conv2d(num_feat - d, num_feat, 3, padding=1)
        self.conv5 = nn.Conv2d(num_feat, num_feat - d, 3, padding=1, groups=4)
        self.conv6 = nn.Conv2d(num_feat - d, num_feat + d, 3, padding=1)
        self.compression = nn.Conv2d(num_feat + d, num_feat, 1)
        self.act = nn.LeakyReLU(0.05)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        p1 = x
        for conv in (self.conv1, self.conv2, self.conv3):
            p1 = self.act(conv(p1))
        kept, p2 = p1[:, : self.distilled], p1[:, self.distilled :]
        for conv in (self.conv4, self.conv5, self.conv6):
            p2 = self.act(conv(p2))
        return self.act(self.compression(p2 + torch.cat([x, kept], dim=1)))


@ARCH_REGISTRY.register()
class IDN(nn.Module):
    """Information distillation network (IDN of MLRN's Table 1).

    The defaults are the published network on Y, 552,769 parameters at every scale. It adds to the
    bicubically enlarged image. Table 1's Mult-Adds are those of `num_in_ch=3, num_out_ch=3`.

    Args:
        num_in_ch, num_out_ch: channels of the images, equal; 1 is Y.
        upscale: scale factor, at most 9; 2, 3 and 4 in the paper.
        num_feat: channels of the features, a multiple of 16.
        num_block: number of distillation blocks.
    """

    def __init__(
        self,
        num_in_ch: int = 1,
        num_out_ch: int = 1,
        upscale: int = 4,
        num_feat: int = 64,
        num_block: int = 4,
    ) -> None:
        super().__init__()
        if upscale > 9:
            raise ValueError(f"upscale must be at most 9, not {upscale}.")
        if num_feat % 16:
            raise ValueError(f"num_feat must be a multiple of 16, not {num_feat}.")
        if num_in_ch != num_out_ch:
            raise ValueError(
                "the enlarged input is added to the output, so num_in_ch and num_out_ch must be "
                f"equal, not {num_in_ch} and {num_out_ch}."
            )
        self.upscale = upscale
        self.conv1 = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        self.conv2 = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.blocks = nn.Sequential(*(DBlock(num_feat) for _ in range(num_block)))
        # The authors leave out the first upscale - 1 rows and columns of the image and begin the
        # deconvolution, of padding 8, there. The smaller padding gives those rows and columns too.
        self.upsample = nn.ConvTranspose2d(
            num_feat, num_out_ch, 17, stride=upscale, padding=9 - upscale
        )
        self.act = nn.LeakyReLU(0.05)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Enlarge `x`, (n, num_in_ch, h, w) in [0, 1]; the output is not clamped."""
        enlarged = upsample_bicubic(x, self.upscale)
        f = self.act(self.conv2(self.act(self.conv1(x))))
        residual = self.upsample(self.blocks(f))
        return enlarged + F.pad(residual, (0, 1 - self.upscale, 0, 1 - self.upscale))
