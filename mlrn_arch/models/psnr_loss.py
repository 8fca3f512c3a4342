"""PSNR, by which test sets are scored, as a loss."""

from __future__ import annotations

import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import nn

ROUNDING = 1 / 12 / 255**2  # the squared error that rounding to 8 bits adds on average


@LOSS_REGISTRY.register()
class PSNRLoss(nn.Module):
    """Minus the mean PSNR of a batch's images, on RGB.

    The mean absolute or squared error of a batch is that of its hardest images; in dB a tenth
    less error counts the same in each. Images are scored as rounded to 8 bits, so that 58.9 dB is
    the most one can have.

    Args:
        loss_weight: factor of the loss.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compare images in [0, 1], (n, c, h, w); returns a scalar in dB, fp32."""
        error = (pred.float() - target.float()).square().mean(dim=(1, 2, 3))
        return self.loss_weight * 10 * torch.log10(error + ROUNDING).mean()
