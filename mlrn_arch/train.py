"""`mlrn train`, also `python -m mlrn_arch.train` for torchrun: BasicSR's training pipeline."""

from __future__ import annotations

import os
import sys

if not __package__:  # `python mlrn_arch/train.py`: this folder's names are no modules
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# isort: split
from mlrn_arch import compat, data, errors, options  # before BasicSR, which needs compat
from mlrn_arch.models.fast_sr_model import FastSRModel

# isort: split
import signal
import threading
from collections.abc import Sequence
from typing import Any

from basicsr.models import build_model
from basicsr.utils.registry import MODEL_REGISTRY


def main(argv: Sequence[str] | None = None) -> int:
    """Train as an option file says; raises `UserError` for a fault in it.

    Returns 0, or 1 if a validation failed."""
    opt, args, notes = options.read("train", argv)
    replaced = replacements(opt)
    if replaced:
        signal.signal(signal.SIGINT, FastSRModel.ask_to_stop)
        signal.signal(signal.SIGTERM, FastSRModel.ask_to_stop)
        if args.time_limit is not None:
            timer = threading.Timer(args.time_limit * 60, FastSRModel.time_is_up)
            timer.daemon = True
            timer.start()
    elif args.time_limit is not None:
        raise errors.UserError(f"--time_limit: {opt['model_type']} cannot; FastSRModel can")
    compat.run_pipeline("train", opt, args, notes, **replaced)
    return int(FastSRModel.validation_failed)


def replacements(opt: dict[str, Any]) -> dict[str, Any]:
    """What a `FastSRModel` puts in the place of the pipeline's own: nothing for other models.

    The sampler can continue inside an epoch, the loader seeds every sample, and the model knows
    the sampler, to save its position.
    """
    if not issubclass(MODEL_REGISTRY.get(opt["model_type"]), FastSRModel):
        return {}
    samplers: list[data.ResumableSampler] = []

    def make_sampler(*args: Any) -> data.ResumableSampler:
        samplers.append(data.ResumableSampler(*args))
        return samplers[-1]

    def make_model(opt: dict[str, Any]) -> FastSRModel:
        model = build_model(opt)
        model.sampler = samplers[-1]
        return model

    return {
        "EnlargedSampler": make_sampler,
        "build_dataloader": data.build_dataloader,
        "build_model": make_model,
    }


if __name__ == "__main__":
    sys.exit(errors.run("mlrn train", main))
