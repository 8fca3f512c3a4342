"""RFDN, the residual feature distillation network (Liu et al., ECCV Workshops 2020).

Names in the state dict are those of https://github.com/njulj/RFDN, so that the published
checkpoint, that of the AIM 2020 challenge, loads strictly.
"""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from .cca import CCA
from .checks import check_img_range
from .esa import ESA


class ChallengeESA(ESA):
    """Enhanced spatial attention with two more convolutions in its coarse branch."""

    def __init__(self, num_feat: int, esa_feat: int) -> None:
        super().__init__(num_feat, esa_feat)
        self.conv_max = nn.Conv2d(esa_feat, esa_feat, 3, padding=1)
        self.conv3_ = nn.Conv2d(esa_feat, esa_feat, 3, padding=1)

    def refine(self, coarse: torch.Tensor) -> torch.Tensor:
        return self.conv3_(torch.relu(self.conv3(torch.relu(self.conv_max(coarse)))))


class RFDB(nn.Module):
    """Residual feature distillation block."""

    def __init__(self, num_feat: int, attention: str) -> None:
        super().__init__()
        distilled = num_feat // 2
        for i in range(1, 4):
            self.add_module(f"c{i}_d", nn.Conv2d(num_feat, distilled, 1))
            self.add_module(f"c{i}_r", nn.Conv2d(num_feat, num_feat, 3, padding=1))
        self.c4 = nn.Conv2d(num_feat, distilled, 3, padding=1)
        self.c5 = nn.Conv2d(distilled * 4, num_feat, 1)
        if attention == "cca":
            self.cca = CCA(num_feat, num_feat // 4)
        else:
            self.esa = ChallengeESA(num_feat, num_feat // 4)
        self.attention = attention
        self.act = nn.LeakyReLU(0.05)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for i in range(1, 4):
            kept.append(self.act(self.get_submodule(f"c{i}_d")(x)))
            x = self.act(self.get_submodule(f"c{i}_r")(x) + x)
        kept.append(self.act(self.c4(x)))
        return self.get_submodule(self.attention)(self.c5(torch.cat(kept, dim=1)))


@ARCH_REGISTRY.register()
class RFDN(nn.Module):
    """Residual feature distillation network for super-resolution (RFDN of MLRN's Table 1).

    The defaults are RFDN x4 of the table (549,624 parameters; x2 has 534,036, x3 540,531), whose
    blocks end in a channel attention; RFDN-L is `num_feat=52`. The network of the AIM 2020
    challenge, the only one whose checkpoint is published, is
    `num_feat=50, num_block=4, attention="esa", img_range=255` at x4 (433,448 parameters).

    Args:
        num_in_ch, num_out_ch: channels of the input and of the output image.
        num_feat: channels of the features, at least 4.
        num_block: number of RFDBs.
        upscale: scale factor; 2, 3 and 4 in the paper.
        attention: `"cca"`, contrast-aware channel attention, or `"esa"`, enhanced spatial
            attention with the challenge network's two extra convolutions.
        img_range: as in `MLRN`. The published checkpoint needs 255.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 48,
        num_block: int = 6,
        upscale: int = 4,
        attention: str = "cca",
        img_range: float = 1.0,
    ) -> None:
        super().__init__()
        check_img_range(img_range)
        if num_feat < 4:
            raise ValueError(f"num_feat must be at least 4, not {num_feat}.")
        if attention not in ("cca", "esa"):
            raise ValueError(f"attention must be cca or esa, not {attention!r}.")
        self.num_block = num_block
        self.img_range = float(img_range)
        self.fea_conv = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        for i in range(1, num_block + 1):
            self.add_module(f"B{i}", RFDB(num_feat, attention))
        self.c = nn.Sequential(
            nn.Conv2d(num_feat * num_block, num_feat, 1), nn.LeakyReLU(0.05, inplace=True)
        )
        self.LR_conv = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.upsampler = nn.Sequential(
            nn.Conv2d(num_feat, num_out_ch * upscale**2, 3, padding=1), nn.PixelShuffle(upscale)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Enlarge `x`, (n, num_in_ch, h, w) in [0, 1]; the output is not clamped."""
        shallow = self.fea_conv(x * self.img_range)
        features = []
        deep = shallow
        for i in range(1, self.num_block + 1):
            deep = self.get_submodule(f"B{i}")(deep)
            features.append(deep)
        deep = self.LR_conv(self.c(torch.cat(features, dim=1)))
        return self.upsampler(deep + shallow) / self.img_range
