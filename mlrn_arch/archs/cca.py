"""Contrast-aware channel attention (CCA), of IMDN and of the RFDN of MLRN's Table 1."""

from __future__ import annotations

import torch
from torch import nn


class CCA(nn.Module):
    """Contrast-aware channel attention: mean plus standard deviation decide over a channel.

    Names in the state dict are those of https://github.com/Zheng222/IMDN.

    Args:
        num_feat: channels of input and output, at least 1.
        squeeze_feat: channels inside, at least 1.
    """

    def __init__(self, num_feat: int, squeeze_feat: int) -> None:
        super().__init__()
        self.conv_du = nn.Sequential(
            nn.Conv2d(num_feat, squeeze_feat, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(squeeze_feat, num_feat, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Weigh every channel of `x`, (n, num_feat, h, w), by a value in (0, 1); same shape."""
        # In half precision a sum over an image would lose the contrast.
        f = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean = f.mean(dim=(2, 3), keepdim=True)
        variance = (f - mean).square().mean(dim=(2, 3), keepdim=True)
        # The root of exactly 0, a flat channel, has no gradient.
        contrast = variance.clamp_min(torch.finfo(f.dtype).tiny).sqrt()
        return x * self.conv_du((contrast + mean).to(x.dtype))
