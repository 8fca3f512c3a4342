"""RLFN, the residual local feature network (Kong et al., CVPR Workshops 2022), MLRN's origin.

Names in the state dict are those of https://github.com/bytedance/RLFN, so that the published
checkpoints load strictly.
"""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from .checks import check_img_range
from .esa import ESA


class RLFB(nn.Module):
    """Residual local feature block: three 3x3 convolutions, residual, 1x1 convolution, ESA."""

    def __init__(self, num_feat: int, mid_feat: int, esa_feat: int = 16) -> None:
        super().__init__()
        self.c1_r = nn.Conv2d(num_feat, mid_feat, 3, padding=1)
        self.c2_r = nn.Conv2d(mid_feat, mid_feat, 3, padding=1)
        self.c3_r = nn.Conv2d(mid_feat, num_feat, 3, padding=1)
        self.c5 = nn.Conv2d(num_feat, num_feat, 1)
        self.esa = ESA(num_feat, esa_feat)
        self.act = nn.LeakyReLU(0.05, inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.act(self.c1_r(x))
        out = self.act(self.c2_r(out))
        out = self.act(self.c3_r(out))
        return self.esa(self.c5(out + x))


@ARCH_REGISTRY.register()
class RLFN(nn.Module):
    """Residual local feature network for super-resolution (RLFN of MLRN's Table 1).

    The defaults are RLFN x4 (543,740 parameters); RLFN-S is `num_feat=48`; the network of the
    NTIRE 2022 challenge is `num_feat=46, mid_feat=48, num_block=4`.

    Args:
        num_in_ch, num_out_ch: channels of the input and of the output image.
        num_feat: channels of the features.
        num_block: number of RLFBs.
        upscale: scale factor; 2 and 4 in the paper.
        mid_feat: channels inside a block; None means `num_feat`.
        esa_feat: channels inside the attention.
        img_range: as in `MLRN`. The published checkpoints need 255.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 52,
        num_block: int = 6,
        upscale: int = 4,
        mid_feat: int | None = None,
        esa_feat: int = 16,
        img_range: float = 255.0,
    ) -> None:
        super().__init__()
        mid_feat = num_feat if mid_feat is None else mid_feat
        check_img_range(img_range)
        self.num_block = num_block
        self.img_range = float(img_range)
        self.conv_1 = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        for i in range(1, num_block + 1):
            self.add_module(f"block_{i}", RLFB(num_feat, mid_feat, esa_feat))
        self.conv_2 = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.upsampler = nn.Sequential(
            nn.Conv2d(num_feat, num_out_ch * upscale**2, 3, padding=1), nn.PixelShuffle(upscale)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Enlarge `x`, (n, num_in_ch, h, w) in [0, 1]; the output is not clamped."""
        shallow = self.conv_1(x * self.img_range)
        deep = shallow
        for i in range(1, self.num_block + 1):
            deep = self.get_submodule(f"block_{i}")(deep)
        return self.upsampler(self.conv_2(deep) + shallow) / self.img_range
