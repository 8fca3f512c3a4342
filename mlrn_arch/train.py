"""`mlrn train`, also `python -m mlrn_arch.train` for torchrun: BasicSR's training pipeline."""

from __future__ import annotations

import os
import sys

if not __package__:  # `python mlrn_arch/train.py`: this folder's names are no modules
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# isort: split
from mlrn_arch import compat, data, errors, options  # before BasicSR, which needs compat
from mlrn_arch.models.fast_sr_model import FastSRModel
from mlrn_arch.models.validation import build_model

# isort: split
import signal
import threading
from collections.abc import Sequence
from itertools import count, takewhile
from typing import Any

from basicsr.train import init_tb_loggers
from basicsr.utils.registry import MODEL_REGISTRY


def main(argv: Sequence[str] | None = None) -> int:
    """Train as an option file says, or raise `UserError`; 1 if a validation or save failed."""
    opt, args, notes = options.read("train", argv)
    fast = issubclass(MODEL_REGISTRY.get(opt["model_type"]), FastSRModel)
    if fast:
        signal.signal(signal.SIGINT, FastSRModel.ask_to_stop)
        signal.signal(signal.SIGTERM, FastSRModel.ask_to_stop)
        if args.time_limit is not None:
            timer = threading.Timer(args.time_limit * 60, FastSRModel.time_is_up)
            timer.daemon = True
            timer.start()
    elif args.time_limit is not None:
        raise errors.UserError(f"--time_limit: {opt['model_type']} cannot; FastSRModel can")
    parts: dict[str, Any] = {}
    compat.run_pipeline("train", opt, args, notes, **replacements(opt, parts))
    return int(fast and parts["model"].failed)


def replacements(opt: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """What takes the place of the pipeline's own functions; `parts` collects what they make.

    For a `FastSRModel` the sampler can continue inside an epoch, the loader seeds every sample,
    and the model knows both, to save the sampler's position and to validate after a resume.
    """
    if not issubclass(MODEL_REGISTRY.get(opt["model_type"]), FastSRModel):
        return {"build_model": build_model}
    parts["val_loaders"] = []

    def make_tb_loggers(opt: dict[str, Any]) -> Any:
        parts["tb_logger"] = init_tb_loggers(opt)
        return parts["tb_logger"]

    def make_loader(dataset: Any, dataset_opt: dict[str, Any], **kwargs: Any) -> Any:
        loader = data.build_dataloader(dataset, dataset_opt, **kwargs)
        if dataset_opt["phase"] == "train":
            parts["sampler"] = kwargs["sampler"]
        else:
            parts["val_loaders"].append(loader)
        return loader

    def unfinished(epoch: int) -> bool:
        return parts["model"].done < opt["train"]["total_iter"]

    def make_model(opt: dict[str, Any]) -> FastSRModel:
        model = build_model(opt)
        vars(model).update(parts)
        parts["model"] = model
        return model

    return {
        "init_tb_loggers": make_tb_loggers,
        "EnlargedSampler": data.ResumableSampler,
        "build_dataloader": make_loader,
        "build_model": make_model,
        # BasicSR's count of epochs takes the batch that the loader drops for a whole one, and a
        # resume with another batch size or data set for a run that always had it.
        "range": lambda epoch, _: takewhile(unfinished, count(epoch)),
    }


if __name__ == "__main__":
    sys.exit(errors.run("mlrn train", main))
