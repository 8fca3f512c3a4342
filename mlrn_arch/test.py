"""`mlrn test`, also `python -m mlrn_arch.test` for torchrun: BasicSR's test pipeline."""

from __future__ import annotations

import os
import sys

if not __package__:  # `python mlrn_arch/test.py`: this folder's names are no modules
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# isort: split
from collections.abc import Sequence
from typing import Any

from mlrn_arch import compat, data, errors, options
from mlrn_arch.models.validation import build_model


def main(argv: Sequence[str] | None = None) -> int:
    """Test as an option file says; raises `UserError` for a fault in it. Returns 0."""
    replaced: dict[str, Any] = {"build_model": build_model}
    replaced["build_dataloader"] = data.build_dataloader
    opt, args, notes = options.read("test", argv)
    compat.run_pipeline("test", opt, args, notes, **replaced)
    return 0


if __name__ == "__main__":
    sys.exit(errors.run("mlrn test", main))
