"""The models and their losses: importing this package registers them with BasicSR."""

from mlrn_arch.models import distill_model, fast_sr_model, psnr_loss

__all__ = ["distill_model", "fast_sr_model", "psnr_loss"]
