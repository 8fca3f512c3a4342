"""Validations and tests: the outputs and scores of a data set."""

from __future__ import annotations

import inspect
import math
import os
import statistics
import types
import warnings
from typing import Any

import cv2
import torch
from basicsr.metrics import calculate_metric
from basicsr.models import build_model as build_stock_model
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger, imwrite, tensor2img
from basicsr.utils.registry import METRIC_REGISTRY
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from mlrn_arch.errors import UserError

Scores = dict[str, dict[str, float]]  # path of the LR image -> name of the metric -> value


def build_model(opt: dict[str, Any]) -> Any:
    """BasicSR's `build_model`; models that validate as `SRModel` does use `validate` instead."""
    model = build_stock_model(opt)
    if getattr(type(model), "nondist_validation", None) is SRModel.nondist_validation:
        model.nondist_validation = types.MethodType(validate, model)
    return model


def validate(
    model: Any, loader: Any, current_iter: Any, tb_logger: Any, save_img: bool, shared: bool = False
) -> None:
    """Score the images of a loader, log the means and update the best results.

    With `shared` every process scores its share of the images, and all get the same means.
    """
    name, scores, failure = loader.dataset.opt["name"], Scores(), None
    if shared:
        rank, world_size = model.opt["rank"], model.opt["world_size"]
        share = Subset(loader.dataset, range(rank, len(loader.dataset), world_size))
        loader = DataLoader(share, num_workers=loader.num_workers)
    try:
        for data in tqdm(loader, name, disable=not model.opt["val"].get("pbar", False)):
            tb, path = None if scores else tb_logger, data["lq_path"][0]  # shows the first image
            scores[path] = _score(model, data, name, current_iter, tb, save_img)
    except Exception as error:
        if not shared:
            raise
        failure = error  # raised below: the other processes must not wait for this one
    if shared:
        gathered: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(gathered, (scores, failure and str(failure)))
        for theirs, reason in gathered:
            if reason is not None:
                raise failure or UserError(reason)
            scores |= theirs
    _summarize(model, name, scores, current_iter, tb_logger)


def _score(
    model: Any, data: dict[str, Any], set_name: str, current_iter: Any, tb_logger: Any, save: bool
) -> dict[str, float]:
    """Run a model on an image, save its output, and compute the metrics of `val:metrics`."""
    for tensor in ("lq", "gt", "output"):  # of the last training batch or image
        vars(model).pop(tensor, None)
    model.feed_data(data)
    model.test()
    visuals = model.get_current_visuals()
    if tb_logger:
        for kind, image in visuals.items():
            tb_logger.add_image(f"{set_name}/{kind}", image[0].clamp(0, 1), current_iter)
    images = {"img": tensor2img([visuals["result"]])}
    if "gt" in visuals:
        images["img2"] = tensor2img([visuals["gt"]])
    val = model.opt["val"]
    if save:
        name = os.path.splitext(os.path.basename(data["lq_path"][0]))[0]
        file = os.path.join(name, f"{name}_{current_iter}.png")
        if not model.is_train:
            file = f"{name}_{val['suffix'] or model.opt['name']}.png"
        imwrite(images["img"], os.path.join(model.opt["path"]["visualization"], set_name, file))
    found = {}
    for metric, opt in (val.get("metrics") or {}).items():
        needed = inspect.signature(METRIC_REGISTRY.get(opt["type"])).parameters
        if "img2" in images or "img2" not in needed:
            try:
                with warnings.catch_warnings():  # NumPy warns of the mean of nothing
                    warnings.simplefilter("ignore", RuntimeWarning)
                    found[metric] = float(calculate_metric(images, opt))
            except cv2.error:  # crop_border leaves nothing of the image
                found[metric] = math.nan
    return found


def _summarize(model: Any, name: str, scores: Scores, current_iter: Any, tb_logger: Any) -> None:
    """Average the finite values of each metric; the log names the other images."""
    # PSNR is infinite where the output equals GT. Images smaller than SSIM's window have no SSIM.
    model.metric_results = {}
    best_results = vars(model).setdefault("best_metric_results", {}).setdefault(name, {})
    for metric, opt in (model.opt["val"].get("metrics") or {}).items():
        values = {path: found[metric] for path, found in scores.items() if metric in found}
        finite = [value for value in values.values() if math.isfinite(value)]
        odd = [f"{path} ({v})" for path, v in values.items() if not math.isfinite(v)]
        if not values:
            get_root_logger().warning(f"{name} has no GT images: no {metric}")
        elif odd:
            more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            mean = f"the mean is that of the other {len(finite)}" if finite else "there is no mean"
            get_root_logger().warning(
                f"{name}: {metric} is not finite for {', '.join(odd[:3])}{more}; {mean}"
            )
        if finite:
            value = model.metric_results[metric] = statistics.fmean(finite)
            better, best = opt.get("better", "higher"), best_results.get(metric)
            if best is None or is_better(value, best["val"], better):
                best_results[metric] = {"better": better, "val": value, "iter": current_iter}
    if model.metric_results:
        model._log_validation_metric_values(current_iter, name, tb_logger)


def is_better(value: float, other: float, better: str) -> bool:
    """Whether a value is better than another, by "higher" or "lower"; an equal one is not."""
    return value > other if better == "higher" else value < other
