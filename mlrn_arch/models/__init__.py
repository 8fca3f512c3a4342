"""The models: importing this package registers them with BasicSR."""

from mlrn_arch.models import fast_sr_model

__all__ = ["fast_sr_model"]
