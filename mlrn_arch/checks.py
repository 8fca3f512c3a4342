"""Whether complete options fit the networks, checkpoints, datasets and losses that they name."""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from basicsr.archs.vgg_arch import VGG_PRETRAIN_PATH
from basicsr.models import lr_scheduler
from basicsr.models.base_model import BaseModel
from basicsr.utils.registry import DATASET_REGISTRY, LOSS_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY

from mlrn_arch import checkpoints, networks
from mlrn_arch.compat import newest_states
from mlrn_arch.dataset_checks import absent_sets, check_paired, check_root
from mlrn_arch.errors import UserError, unknown
from mlrn_arch.inherit import check_rate, inherit_weights
from mlrn_arch.machine import missing
from mlrn_arch.models.distill_model import check_blocks, load_teacher
from mlrn_arch.models.fast_sr_model import FastSRModel
from mlrn_arch.models.muon import Muon
from mlrn_arch.networks import Options, check_call, registered

SCHEDULERS = dict.fromkeys(["MultiStepLR", "MultiStepRestartLR"], lr_scheduler.MultiStepRestartLR)
SCHEDULERS["CosineAnnealingRestartLR"] = lr_scheduler.CosineAnnealingRestartLR
# Models that override this make an optimizer that cannot be checked.
OPTIMIZERS_OF = (BaseModel.get_optimizer, FastSRModel.get_optimizer)


def bases(name: Any) -> list[str]:
    """The names of the model class of that name, and of its base classes."""
    kind = registered(name, MODEL_REGISTRY) if isinstance(name, str) else None
    return [b.__name__ for b in MODEL_REGISTRY.get(kind).__mro__] if kind in MODEL_REGISTRY else []


def check(opt: Options) -> Iterator[str]:
    """Find the faults of complete options; yields a sentence for each: where, what, what to do."""
    name = registered(opt["model_type"], MODEL_REGISTRY)
    model = MODEL_REGISTRY.get(name) if name in MODEL_REGISTRY else None
    if model is None:
        yield f"model_type: {unknown(opt['model_type'], MODEL_REGISTRY.keys())}"
    fast = model is not None and issubclass(model, FastSRModel)
    state = opt["path"].get("resume_state") if opt["is_train"] else None
    if state and not os.path.isfile(state):
        yield f"path:resume_state: no such file {state}"
    if opt["is_train"] and opt["auto_resume"]:
        state = next(iter(newest_states(opt["path"]["training_states"])), state)
    if opt["is_train"] and not state:
        named = {f"path:{k}": v for k, v in opt["path"].items() if k.startswith("pretrain_network")}
        named["train:inherit_network_g"] = opt["train"].get("inherit_network_g")
        for where, file in named.items():
            if file and Path(opt["path"]["experiments_root"]) in Path(file).absolute().parents:
                yield f"{where}: a new run {opt['name']} would move this file; change the name"
    channels = None
    for key in [key for key in opt if key.startswith("network_") and key != "network_t"]:
        try:
            network, arguments = networks.build(opt[key], key)
        except UserError as error:
            yield str(error)
            continue
        upscale = arguments.get("upscale")
        if upscale is not None and "scale" in opt and upscale != opt["scale"]:
            yield f"{key}:upscale: is {upscale} but scale is {opt['scale']}; make them equal"
        yield from _check_checkpoint(opt, key, network, arguments, state)
        if key == "network_g":
            channels = networks.input_channels(network, arguments)
            if opt["is_train"] and fast and not state:
                yield from _check_inherited(opt, network)
            if opt["is_train"] and opt["model_type"] == "DistillModel":
                yield from _check_teacher(opt, network)

    if not opt["datasets"]:
        yield "datasets: is empty"
    datasets, absent = opt["datasets"], absent_sets(opt["datasets"])
    if not opt["is_train"] and 1 < len(absent) == len(datasets):
        yield (
            f"datasets: none of these exists: {', '.join(absent.values())}; one is enough, and "
            "`mlrn prepare` makes it (see datasets/README.md)"
        )
        datasets = {}
    names = [dataset["name"] for dataset in datasets.values() if dataset["phase"] != "train"]
    for name in {name for name in names if names.count(name) > 1}:
        yield f"datasets: {names.count(name)} of them have the name {name}; each needs its own"
    for key, dataset in datasets.items():
        where, kind = f"datasets:{key}", registered(dataset["type"], DATASET_REGISTRY)
        phases = ["val", *["train"] * (key == "train")] if opt["is_train"] else ["val", "test"]
        if dataset["phase"] not in phases:
            yield f"{where}: BasicSR knows datasets by the names train, val and test (test_1, ...)"
            continue
        if kind not in DATASET_REGISTRY:
            yield f"{where}:type: {unknown(kind, DATASET_REGISTRY.keys())}"
            continue
        if kind == "SingleImageDataset":
            yield from check_root(where, "dataroot_lq", dataset)
        elif dataset["type"] in ("PairedImageDataset", "FastPairedImageDataset"):
            yield from check_paired(where, dataset)
        else:
            continue
        provided = 1 if dataset.get("color") == "y" else 3
        if channels in (1, 3) and channels != provided:
            way = "leave color out" if provided == 1 else "set color: y (Y of YCbCr)"
            yield f"{where}: gives {provided} channel(s), network_g takes {channels}; {way}"

    metrics = opt.get("val", {}).get("metrics", {})
    for name, metric in metrics.items():
        others = {"img": None, "img2": None, "better": None}
        yield from check_call(f"val:metrics:{name}", METRIC_REGISTRY, metric, others)
    best = opt.get("val", {}).get("save_best")
    if best is not None and best not in metrics:
        yield f"val:save_best: {unknown(best, metrics)}; it must be one of val:metrics"
    if opt["is_train"]:
        yield from _check_logger(opt["logger"], "debug" in opt["name"])
        yield from _check_train(opt["train"], model, fast)
        dataset = opt["datasets"]["train"]
        if not fast and model and dataset["type"] == "FastPairedImageDataset":
            yield (
                "datasets:train:type: FastPairedImageDataset gives bytes, which FastSRModel alone "
                "takes; use PairedImageDataset, or model_type: FastSRModel"
            )


def _check_logger(logger: Options, debug: bool) -> Iterator[str]:
    """What BasicSR finds out when the earlier experiment is already moved away."""
    wandb = (logger.get("wandb") or {}).get("project") is not None and not debug
    if wandb and not logger["use_tb_logger"]:
        yield "logger:wandb: BasicSR gives it what TensorBoard gets; set use_tb_logger: true"
    for package in missing(*["tensorboard"] * logger["use_tb_logger"], *["wandb"] * wandb):
        yield f"logger: needs {package}; pip install {package}, or take it out"


def _check_checkpoint(
    opt: Options, key: str, network: torch.nn.Module, arguments: Options, state: str | None
) -> Iterator[str]:
    """Check the checkpoint that a network starts from; in a resume that of the state."""
    paths, which, where = opt["path"], key.partition("_")[2], f"path:pretrain_{key}"
    path = paths.get(f"pretrain_{key}")
    how = paths.get(f"param_key_{which}", "params"), paths.get(f"strict_load_{which}", True)
    resumed = state and key not in (paths.get("ignore_resume_networks") or ())
    if state and resumed:
        path = os.path.join(paths["models"], f"net_{which}_{Path(state).stem}.pth")
        where, how = f"{key}: the run to resume does not fit", ("params", True)
        try:
            checkpoints.read(path)
        except UserError:  # an older state is resumed instead
            return
    if path is None:
        trained = opt["is_train"] or next(network.parameters(), None) is None
        if key == "network_g" and not trained:
            yield f"{where}: is missing; the scores would be those of random weights"
        return
    try:
        checkpoints.load(network, path, *how, arguments, convert=not resumed)
        if opt["is_train"] and key == "network_g" and not resumed:
            check_rate(network, opt["train"]["optim_g"]["lr"])
    except UserError as error:
        yield f"{where}: {error}"


def _check_inherited(opt: Options, network: torch.nn.Module) -> Iterator[str]:
    path = opt["train"].get("inherit_network_g")
    if path and opt["path"].get("pretrain_network_g"):
        yield "train:inherit_network_g: path:pretrain_network_g is set too; use one of the two"
    elif path:
        try:
            inherit_weights(network, path)
            check_rate(network, opt["train"]["optim_g"]["lr"])
        except UserError as error:
            yield f"train:inherit_network_g: {error}"


def _check_teacher(opt: Options, student: torch.nn.Module) -> Iterator[str]:
    distill = opt["train"].get("distill_opt")
    if not opt["path"].get("pretrain_network_t"):
        yield "path:pretrain_network_t: is missing; an untrained teacher teaches nothing"
    elif distill is None:
        yield "train:distill_opt: is missing; write distill_opt: {stage: blocks}"
    else:
        where, by_blocks = "path:pretrain_network_t", distill["stage"] != "output"
        try:
            teacher = load_teacher(opt)
            where = "train:distill_opt:stage"
            if by_blocks:
                check_blocks(student, teacher)
        except UserError as error:
            yield f"{where}: {error}"
        if opt["train"]["compile"] and by_blocks:
            yield "train:compile: needs stage: output; a compiled network hides its blocks"


def _check_train(train: Options, model: type[BaseModel] | None, fast: bool) -> Iterator[str]:
    optim_g, weight = train["optim_g"], torch.nn.Parameter(torch.zeros(1, 1))
    optimizers = {"Adam": torch.optim.Adam} | ({"Muon": Muon} if fast else {})
    arguments = {"params": [weight]} | ({"fused": True} if fast else {})  # as the model gives them
    if optim_g["type"] == "Muon":
        arguments = {"inner": [], "rest": [weight]}
    optimizer = None
    if fast and "fused" in optim_g:
        yield "train:optim_g:fused: FastSRModel sets it; leave it out"
    elif getattr(model, "get_optimizer", None) in OPTIMIZERS_OF:
        optimizer = yield from _make("train:optim_g", optimizers, optim_g, arguments)
    optimizer = optimizer or torch.optim.Adam([weight])
    yield from _make("train:scheduler", SCHEDULERS, train["scheduler"], {"optimizer": optimizer})
    end = sum(train["scheduler"].get("periods", [math.inf]))
    if end < train["total_iter"]:
        yield f"train:scheduler:periods: end at {end}, before total_iter ({train['total_iter']})"
    losses = {key for key in train if key.endswith("_opt")} - {"distill_opt"}
    if not losses:
        yield "train: has no loss; give it one, such as pixel_opt: {type: L1Loss}"
    for key in sorted(losses):
        yield from _make(f"train:{key}", LOSS_REGISTRY, train[key])


def _make(
    where: str, registry: Any, opt: Options, others: Options | None = None
) -> Generator[str, None, Any]:
    """Make what a section names and return it, or yield why that fails."""
    try:
        return networks.make(where, registry, opt, others)
    except UserError as error:
        fault = str(error)
        if "urlopen error" in fault:  # PerceptualLoss downloads VGG19 if it is not there
            fault = (
                f"{where}: the weights of VGG19 cannot be downloaded; put "
                f"https://download.pytorch.org/models/vgg19-dcbb9e9d.pth at {VGG_PRETRAIN_PATH}"
            )
        yield fault
    return None
