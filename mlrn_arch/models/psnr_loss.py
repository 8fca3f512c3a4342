"""PSNR, by which test sets are scored, as a loss."""

from __future__ import annotations

import torch
from basicsr.utils.color_util import rgb2ycbcr_pt
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

# The squared error that rounding to 8 bits adds on average: to RGB, and through RGB to Y.
ROUNDING = 1 / 12 / 255**2
Y_ROUNDING = ROUNDING * (65.481**2 + 128.553**2 + 24.966**2) / 255**2


@LOSS_REGISTRY.register()
class PSNRLoss(nn.Module):
    """Minus the mean PSNR of a batch's images, on RGB, on Y, or between the two.

    In dB a tenth less error counts the same in every image, where L1 and MSE follow the hardest
    ones. Images are scored as rounded to 8 bits: RGB reaches 58.9 dB at most, and Y 63.7 dB.

    Args:
        y_weight: Share of the PSNR on Y, 0 to 1; the rest is on RGB. Y alone lets colours drift.
        floor: This share of the batch's mean squared error is added to the error of every image.
            Without it the flattest crops, whose error is almost 0, decide the gradient.
    """

    def __init__(self, loss_weight: float = 1.0, y_weight: float = 0.0, floor: float = 0.0) -> None:
        super().__init__()
        if floor < 0:
            raise ValueError(f"floor must not be negative, but is {floor}")
        if not 0 <= y_weight <= 1:
            raise ValueError(f"y_weight must be from 0 to 1, not {y_weight}")
        self.loss_weight, self.y_weight, self.floor = loss_weight, y_weight, floor

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compare images in [0, 1], RGB (n, 3, h, w) or Y (n, 1, h, w); returns dB, fp32."""
        pred, target = pred.float(), target.float()
        loss = self._minus_psnr(pred, target, ROUNDING)
        if self.y_weight and pred.shape[1] == 3:
            y = rgb2ycbcr_pt(pred, y_only=True), rgb2ycbcr_pt(target, y_only=True)
            loss = loss.lerp(self._minus_psnr(*y, Y_ROUNDING), self.y_weight)
        return self.loss_weight * loss

    def _minus_psnr(self, pred: Tensor, target: Tensor, rounding: float) -> Tensor:
        error = (pred - target).square().mean(dim=(1, 2, 3))
        return 10 * torch.log10(error + self.floor * error.detach().mean() + rounding).mean()
