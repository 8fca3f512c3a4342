"""MLRN for BasicSR: importing this package makes BasicSR import and know our networks."""

from mlrn_arch import compat  # first: without it `import basicsr` fails

# isort: split
from mlrn_arch import archs, models
from mlrn_arch.weights import create_model

__version__ = "0.1.0"
__all__ = ["archs", "compat", "create_model", "models"]
