"""`mlrn test`, also `python -m mlrn_arch.test` for torchrun: BasicSR's test pipeline."""

from __future__ import annotations

import os
import sys

if not __package__:  # `python mlrn_arch/test.py`: this folder's names are no modules
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# isort: split
from collections.abc import Sequence
from typing import Any

from mlrn_arch import compat, data, errors, machine, options
from mlrn_arch.models.validation import build_model


def main(argv: Sequence[str] | None = None) -> int:
    """Test as an option file says and print a table of the scores; returns 0."""
    opt, args, notes = options.read("test", argv)
    metrics = list(opt["val"].get("metrics", {}))
    rows = [["set", "images", *metrics]]

    def make_model(opt: dict[str, Any]) -> Any:
        model = build_model(opt)
        validate = model.validation

        def validation(loader: Any, **kwargs: Any) -> None:
            validate(loader, **kwargs)
            found = getattr(model, "metric_results", {})  # of the first process, if there are more
            scores = [f"{found[name]:.4f}" if name in found else "-" for name in metrics]
            rows.append([loader.dataset.opt["name"], str(len(loader.dataset)), *scores])

        model.validation = validation
        return model

    replaced = {"build_dataloader": data.build_dataloader, "build_model": make_model}
    with machine.exact_fp32():
        compat.run_pipeline("test", opt, args, notes, **replaced)
    if opt["rank"] == 0:
        print(f"results: {os.path.relpath(opt['path']['results_root'])}", file=sys.stderr)
        for name, *cells in rows:
            print(f"{name:12}" + "".join(f" {cell:>9}" for cell in cells))
    return 0


if __name__ == "__main__":
    sys.exit(errors.run("mlrn test", main))
