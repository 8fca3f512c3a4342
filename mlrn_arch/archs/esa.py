"""Enhanced spatial attention (ESA), the attention that closes every block of MLRN and of RLFN."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

# The stride-2 convolution and the 7-wide pool, both unpadded, leave nothing of fewer pixels.
MIN_SIZE = 15


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
            padding: Any = (0, torch.sym_max(0, MIN_SIZE - w), 0, torch.sym_max(0, MIN_SIZE - h))
            coarse = F.pad(coarse, padding, mode="replicate")
        coarse = F.max_pool2d(self.conv2(coarse), kernel_size=7, stride=3)
        coarse = self.upsample(self.refine(coarse), (h, w))
        return x * torch.sigmoid(self.conv4(coarse + self.conv_f(c1)))

    def refine(self, coarse: torch.Tensor) -> torch.Tensor:
        """Map pooled features, (n, esa_feat, h, w), to the same shape; RFDN has more here."""
        return self.conv3(coarse)

    def upsample(self, coarse: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Stretch `coarse`, (n, esa_feat, h', w'), over `size`, (h, w)."""
        return F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
