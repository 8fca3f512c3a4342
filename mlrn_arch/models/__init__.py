"""The models and their losses: importing this package registers them with BasicSR."""

from mlrn_arch.models import fast_sr_model, psnr_loss

__all__ = ["fast_sr_model", "psnr_loss"]
