"""MLRN for BasicSR: importing this package makes BasicSR import and know our networks."""

from mlrn_arch import compat  # first: without it `import basicsr` fails

# isort: split
from mlrn_arch import archs, models
from mlrn_arch.networks import create_model
from mlrn_arch.shipped import names as list_models
from mlrn_arch.version import __version__

__all__ = ["Upscaler", "__version__", "archs", "compat", "create_model", "list_models", "models"]


def __getattr__(name: str):
    if name == "Upscaler":  # only then: what it needs is slower to import than all the rest
        from mlrn_arch.inference.upscaler import Upscaler

        return Upscaler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
