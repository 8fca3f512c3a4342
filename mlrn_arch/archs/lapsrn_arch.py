"""LapSRN, the Laplacian pyramid super-resolution network (Lai et al., CVPR 2017)."""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn
from torch.nn import functional as F


class PyramidLevel(nn.Module):
    """One level of the pyramid: doubles the features and the image."""

    def __init__(self, num_img_ch: int, num_feat: int, num_conv: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(num_feat, num_feat, 3, padding=1) for _ in range(num_conv)
        )
        self.feat_up = nn.ConvTranspose2d(num_feat, num_feat, 4, stride=2, padding=1)
        self.residual = nn.Conv2d(num_feat, num_img_ch, 3, padding=1)
        # Begins as bilinear enlargement and is trained; one kernel serves every channel.
        self.img_up = nn.ConvTranspose2d(1, 1, 4, stride=2, padding=1, bias=False)
        line = torch.tensor([0.25, 0.75, 0.75, 0.25])
        with torch.no_grad():
            self.img_up.weight.copy_(torch.outer(line, line).reshape(1, 1, 4, 4))

    def forward(self, f: torch.Tensor, img: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for conv in self.convs:
            f = F.leaky_relu(conv(f), 0.2)
        f = F.leaky_relu(self.feat_up(f), 0.2)
        n, c, h, w = img.shape
        enlarged = self.img_up(img.reshape(n * c, 1, h, w)).reshape(n, c, 2 * h, 2 * w)
        return f, enlarged + self.residual(f)


@ARCH_REGISTRY.register()
class LapSRN(nn.Module):
    """Laplacian pyramid super-resolution network (LapSRN of MLRN's Table 1).

    The defaults are the x4 network with 5 convolutions a level on Y: 640 + 250,833 parameters a
    level, 251,473 at x2 and 502,306 at x4, the table's 251K and 502K. Only the image of the last
    level is returned, so a loss sees no other.

    Args:
        num_in_ch, num_out_ch: channels of the images, equal; 1 is Y.
        upscale: scale factor, a power of 2; each level doubles.
        num_feat: channels of the features.
        num_conv: number of convolutions in a level before its features are doubled.
    """

    def __init__(
        self,
        num_in_ch: int = 1,
        num_out_ch: int = 1,
        upscale: int = 4,
        num_feat: int = 64,
        num_conv: int = 5,
    ) -> None:
        super().__init__()
        if upscale == 1 or upscale & (upscale - 1):
            raise ValueError(f"upscale must be a power of 2 above 1, not {upscale}.")
        if num_in_ch != num_out_ch:
            raise ValueError(
                "every level adds to the enlarged image, so num_in_ch and num_out_ch must be "
                f"equal, not {num_in_ch} and {num_out_ch}."
            )
        self.conv_first = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        self.levels = nn.ModuleList(
            PyramidLevel(num_in_ch, num_feat, num_conv) for _ in range(upscale.bit_length() - 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Enlarge `x`, (n, num_in_ch, h, w) in [0, 1]; the output is not clamped."""
        f = F.leaky_relu(self.conv_first(x), 0.2)
        for level in self.levels:
            f, x = level(f, x)
        return x
