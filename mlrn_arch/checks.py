"""What may stand in an option file, and what is wrong with one."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import lmdb
import torch
from basicsr.archs.vgg_arch import VGG_PRETRAIN_PATH
from basicsr.data.data_util import (
    paired_paths_from_folder,
    paired_paths_from_lmdb,
    paired_paths_from_meta_info_file,
)
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.models import lr_scheduler
from basicsr.utils.registry import (
    DATASET_REGISTRY,
    LOSS_REGISTRY,
    METRIC_REGISTRY,
    MODEL_REGISTRY,
)
from PIL import Image

from mlrn_arch import checkpoints, networks
from mlrn_arch.compat import newest_states
from mlrn_arch.errors import UserError, first_line, unknown
from mlrn_arch.inherit import inherit_weights, too_fast
from mlrn_arch.machine import missing
from mlrn_arch.models.distill_model import load_teacher, misfit
from mlrn_arch.models.fast_sr_model import FastSRModel
from mlrn_arch.models.muon import Muon
from mlrn_arch.networks import Options, check_call, registered

REQUIRED = ("name", "model_type", "num_gpu", "datasets", "network_g")
REQUIRED_TRAIN = (
    "datasets:train",
    "logger:print_freq",
    "logger:save_checkpoint_freq",
    "train:total_iter",
    "train:optim_g:type",
    "train:optim_g:lr",
    "train:scheduler:type",
)
REQUIRED_PAIRED = ("name", "dataroot_gt", "dataroot_lq", "io_backend:type")
REQUIRED_PAIRED_TRAIN = (
    "gt_size",
    "use_hflip",
    "use_rot",
    "num_worker_per_gpu",
    "batch_size_per_gpu",
)
BACKENDS = ("disk", "lmdb", "memcached")
SCHEDULERS = {
    "MultiStepLR": lr_scheduler.MultiStepRestartLR,
    "MultiStepRestartLR": lr_scheduler.MultiStepRestartLR,
    "CosineAnnealingRestartLR": lr_scheduler.CosineAnnealingRestartLR,
}


def missing_keys(opt: Options, keys: Sequence[str]) -> Iterator[str]:
    """The keys (`section:key`) that options do not have or have empty."""
    for key in keys:
        value: Any = opt
        for name in key.split(":"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is None:
            yield key


def check(opt: Options) -> Iterator[str]:
    """Find the faults of complete options; yields a sentence for each: where, what, what to do."""
    model_type = registered(opt["model_type"], MODEL_REGISTRY)
    known = model_type in MODEL_REGISTRY
    fast = known and issubclass(MODEL_REGISTRY.get(model_type), FastSRModel)
    if not known:
        yield f"model_type: {unknown(opt['model_type'], MODEL_REGISTRY.keys())}"
    state = opt["path"].get("resume_state")
    if state and not os.path.isfile(state):
        yield f"path:resume_state: no such file {state}"
    if opt["auto_resume"]:
        state = next(iter(newest_states(opt["path"].get("training_states", ""))), state)
    for key in [key for key in opt if key.startswith("network_")]:
        if key != "network_t":
            yield from _check_network(opt, key, state)
    if opt["is_train"]:
        if not state:
            yield from _check_inherited(opt, fast or not known)
        if opt["model_type"] == "DistillModel":
            yield from _check_teacher(opt)

    if not opt["datasets"]:
        yield "datasets: is empty"
    yield from _check_logger(opt["logger"], "debug" in opt["name"])
    channels = _input_channels(opt["network_g"])
    datasets, absent = opt["datasets"], absent_sets(opt["datasets"])
    if not opt["is_train"] and 1 < len(absent) == len(datasets):
        yield (
            f"datasets: none of these exists: {', '.join(absent.values())}; one is enough, and "
            "`mlrn prepare` makes it (see datasets/README.md)"
        )
        datasets = {}
    for key, dataset in datasets.items():
        where = f"datasets:{key}"
        if dataset["phase"] not in (("train", "val") if opt["is_train"] else ("val", "test")):
            yield f"{where}: BasicSR knows datasets by the names train, val and test (test_1, ...)"
        elif (kind := registered(dataset.get("type"), DATASET_REGISTRY)) not in DATASET_REGISTRY:
            yield f"{where}:type: {unknown(kind, DATASET_REGISTRY.keys())}"
        elif issubclass(DATASET_REGISTRY.get(kind), PairedImageDataset):
            yield from _check_paired(where, dataset)
            given = 1 if dataset.get("color") == "y" else 3
            if channels in (1, 3) and channels != given:
                yield (
                    f"{where}: gives {given} channel(s), network_g takes {channels}; "
                    + ("leave color out" if given == 1 else "set color: y (Y of YCbCr)")
                )

    val = opt.get("val")
    if val is not None:
        if opt["is_train"] and val.get("val_freq") is None:
            yield "val:val_freq: is missing (iterations between validations)"
        for name, metric in (val.get("metrics") or {}).items():
            given = {"img": None, "img2": None, "better": None}
            yield from check_call(f"val:metrics:{name}", METRIC_REGISTRY, metric, given)
    if opt["is_train"]:
        yield from _check_train(opt["train"], fast)
        if (
            opt["model_type"] == "SRModel"
            and opt["datasets"]["train"].get("type") == "FastPairedImageDataset"
        ):
            yield (
                "datasets:train:type: FastPairedImageDataset gives bytes, which SRModel cannot "
                "take; set it to PairedImageDataset, or model_type to FastSRModel"
            )
    if fast:
        metrics, best = (val or {}).get("metrics") or {}, (val or {}).get("save_best")
        if best is not None and best not in metrics:
            yield f"val:save_best: {unknown(best, metrics)}; it must be one of val:metrics"


def absent_sets(datasets: Options) -> dict[str, str]:
    """The data sets of which no folder exists, each with its first folder."""
    roots = {
        key: [dataset[name] for name in ("dataroot_gt", "dataroot_lq") if dataset.get(name)]
        for key, dataset in datasets.items()
    }
    return {k: r[0] for k, r in roots.items() if r and not any(os.path.exists(p) for p in r)}


def _check_logger(logger: Options, debug: bool) -> Iterator[str]:
    """What BasicSR finds out when the experiment before is already moved away."""
    wandb = (logger.get("wandb") or {}).get("project") is not None and not debug
    if wandb and not logger["use_tb_logger"]:
        yield "logger:wandb: BasicSR gives it what TensorBoard gets; set use_tb_logger: true"
    needed = ["tensorboard"] * bool(logger["use_tb_logger"]) + ["wandb"] * wandb
    for package in missing(*needed):
        yield f"logger: needs {package}; pip install {package}, or take it out"


def _input_channels(network_g: Options) -> int | None:
    with contextlib.suppress(UserError):  # told of the network itself
        network, values = networks.build(network_g)
        return networks.input_channels(network, values)
    return None


def _check_inherited(opt: Options, fast: bool) -> Iterator[str]:
    path = opt["train"].get("inherit_network_g")
    if path is None:
        return
    where = "train:inherit_network_g"
    if opt["path"].get("pretrain_network_g"):
        yield f"{where}: and pretrain_network_g both say where the network starts; give one"
    if not fast:
        yield f"{where}: is FastSRModel's; set model_type to it"
    with contextlib.suppress(UserError):  # told of the network itself
        network, _ = networks.build(opt["network_g"])
        try:
            inherit_weights(network, path)
            if fault := too_fast(network, opt["train"]["optim_g"]["lr"]):
                yield f"{where}: {fault}"
        except UserError as error:
            yield f"{where}: {error}"


def _check_teacher(opt: Options) -> Iterator[str]:
    distill = opt["train"].get("distill_opt")
    if not opt["path"].get("pretrain_network_t"):
        yield "path:pretrain_network_t: is missing; an untrained teacher teaches nothing"
    elif "stage" not in (distill or {}):
        yield "train:distill_opt: is missing; write distill_opt: {stage: blocks}"
    else:
        try:
            teacher = load_teacher(opt)
        except UserError as error:
            yield f"path:pretrain_network_t: {error}"
            return
        with contextlib.suppress(UserError):  # told of the network itself
            student, _ = networks.build(opt["network_g"])
            if fault := misfit(student, teacher, distill):
                yield f"train:distill_opt:{fault}"
        if opt["train"].get("compile") and distill.get("stage") != "output":
            yield "train:compile: only with stage: output; blocks are watched as they run"


def _check_train(train: Options, fast: bool) -> Iterator[str]:
    optimizers = {"Adam": torch.optim.Adam} | ({"Muon": Muon} if fast else {})
    weight = torch.nn.Parameter(torch.zeros(1, 1))
    given = {"params": [weight]} if train["optim_g"]["type"] == "Adam" else (
        {"inner": [], "rest": [weight]}
    )  # fmt: skip
    faults = list(check_call("train:optim_g", optimizers, train["optim_g"], given))
    if not faults and fast and "fused" in train["optim_g"]:
        faults = ["train:optim_g:fused: is FastSRModel's own affair; leave it out"]
    faults += check_call("train:scheduler", SCHEDULERS, train["scheduler"], {"optimizer": None})
    periods = train["scheduler"].get("periods", [math.inf])
    if sum(periods) < train["total_iter"]:
        faults.append(f"train:scheduler:periods: end at {sum(periods)}, before total_iter")
    yield from faults
    if not faults:
        try:
            optimizer = networks.make("train:optim_g", optimizers, {**train["optim_g"], **given})
            scheduler = {**train["scheduler"], "optimizer": optimizer}
            networks.make("train:scheduler", SCHEDULERS, scheduler)
        except UserError as error:
            yield str(error)
    losses = {
        k: v
        for k, v in train.items()
        if k.endswith("_opt") and k != "distill_opt" and v is not None
    }
    if not losses:
        yield "train: has no loss; give it one, such as pixel_opt: {type: L1Loss}"
    for key, loss in losses.items():
        faults = list(check_call(f"train:{key}", LOSS_REGISTRY, loss))
        yield from faults
        if not faults:
            try:
                networks.make(f"train:{key}", LOSS_REGISTRY, loss)
            except UserError as error:
                fault = str(error)
                if "urlopen error" in fault:  # PerceptualLoss downloads VGG if it is not there
                    fault = (
                        f"train:{key}: the weights of VGG19 cannot be downloaded; put "
                        "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth at "
                        f"{VGG_PRETRAIN_PATH}"
                    )
                yield fault


def _check_network(opt: Options, key: str, state: str | None) -> Iterator[str]:
    """Check a network and the checkpoint that it starts from: that of `state` in a resume."""
    try:
        network, values = networks.build(opt[key], key)
    except UserError as error:
        yield str(error)
        return
    upscale = values.get("upscale")
    if upscale is not None and "scale" in opt and upscale != opt["scale"]:
        yield f"{key}:upscale: is {upscale} but scale is {opt['scale']}; make them equal"

    path, paths = opt["path"].get(f"pretrain_{key}"), opt["path"]
    untrained = path is None and next(network.parameters(), None) is not None
    if untrained and key == "network_g" and not opt["is_train"]:
        yield f"path:pretrain_{key}: is missing; the scores would be those of random weights"
    where, which = f"path:pretrain_{key}", key.split("_", 1)[1]
    how = paths.get(f"param_key_{which}", "params"), paths.get(f"strict_load_{which}", True)
    resumed = state and key not in (paths.get("ignore_resume_networks") or ())
    if resumed:
        path = os.path.join(paths["models"], f"net_{which}_{Path(state).stem}.pth")
        where, how = f"{key}: the run to resume has another", ("params", True)
        try:
            checkpoints.read(path)
        except UserError:  # an older state is resumed instead
            return
    if path is None:
        return
    try:
        checkpoints.load(network, path, *how, values, convert=not resumed)
    except UserError as error:
        yield f"{where}: {error}"
        return
    if opt["is_train"] and key == "network_g" and not resumed:
        if fault := too_fast(network, opt["train"]["optim_g"]["lr"]):
            yield f"{where}: {fault}"


def _check_paired(where: str, dataset: Options) -> Iterator[str]:
    """Check a `PairedImageDataset` or a kind of it: keys, folders or LMDBs, patch size."""
    training = dataset["phase"] == "train"
    missing = list(missing_keys(dataset, REQUIRED_PAIRED + REQUIRED_PAIRED_TRAIN * training))
    if "scale" not in dataset:
        yield f"scale: is missing, {where} needs it"
    if missing:
        yield from (f"{where}:{key}: is missing" for key in missing)
        return
    backend = dataset["io_backend"]["type"]
    if backend not in BACKENDS:
        yield f"{where}:io_backend:type: {unknown(backend, BACKENDS)}"
        return
    faults = [
        f"{where}:{key}: {fault}"
        for key in ("dataroot_gt", "dataroot_lq")
        if (fault := _root_fault(dataset[key], backend))
    ]
    yield from faults
    scale, gt_size = dataset.get("scale"), dataset.get("gt_size")
    if training and scale and gt_size % scale:
        yield f"{where}:gt_size: {gt_size} is not a multiple of the scale {scale}"
    if faults:
        return

    roots, keys = [dataset["dataroot_lq"], dataset["dataroot_gt"]], ["lq", "gt"]
    template, meta_info = dataset.get("filename_tmpl") or "{}", dataset.get("meta_info_file")
    try:
        if backend == "lmdb":
            pairs = paired_paths_from_lmdb(roots, keys)
        elif meta_info:
            if not all(line.strip() for line in Path(meta_info).read_text().splitlines()):
                yield f"{where}:meta_info_file: {meta_info} has an empty line; take it out"
                return
            pairs = paired_paths_from_meta_info_file(roots, keys, meta_info, template)
        else:
            pairs = paired_paths_from_folder(roots, keys, template)
    except (AssertionError, ValueError, OSError) as error:
        hint = f"; filename_tmpl says how lq is named after gt, here {template}"
        yield f"{where}: lq and gt are no pairs: {error}{hint * (backend == 'disk')}"
        return
    if not pairs:
        yield f"{where}: no images in {roots[1]} itself; sub-folders are not looked into"
        return
    if not training:
        if backend == "disk" and scale:
            faults = [fault for pair in pairs if (fault := _pair_fault(pair, scale))]
            more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
            yield from (f"{where}: {fault}{more}" for fault in faults[:3])
        return
    samples = len(pairs) * dataset.get("dataset_enlarge_ratio", 1)
    if samples < dataset["batch_size_per_gpu"]:
        yield (
            f"{where}: {len(pairs)} images are less than one batch of "
            f"{dataset['batch_size_per_gpu']}; raise dataset_enlarge_ratio"
        )
    if backend == "lmdb":
        meta_info = Path(dataset["dataroot_gt"], "meta_info.txt").read_text()
        sizes = [min(int(h), int(w)) for h, w in re.findall(r"\((\d+),(\d+),\d+\)", meta_info)]
        if sizes and min(sizes) < gt_size:
            yield f"{where}:gt_size: {gt_size} is larger than the smallest image ({min(sizes)})"


def _pair_fault(pair: dict[str, str], scale: int) -> str | None:
    """What the headers of an image pair on disk tell of a fault, or None."""
    sizes = []
    for path in (pair["lq_path"], pair["gt_path"]):
        try:
            with Image.open(path) as image:
                sizes.append(image.size)
        except OSError as error:
            if not os.path.isfile(path):
                return f"no such file {path}"
            if not cv2.haveImageReader(path):  # which knows some formats that Pillow does not
                return f"{path} is no image, or a broken one ({first_line(error)})"
            return None
    if all(low * scale <= high < (low + 1) * scale for low, high in zip(*sizes, strict=True)):
        return None
    low, high = (f"{width}x{height}" for width, height in sizes)
    return f"{pair['lq_path']} is {low} and its gt {high}: that is not x{scale}"


def lmdb_fault(folder: Path) -> str | None:
    """What is wrong with the file of an LMDB, or None; reading a truncated one kills a process."""
    file = folder / "data.mdb"
    try:
        with lmdb.open(str(folder), readonly=True, lock=False) as environment:
            stat = environment.stat()
    except lmdb.Error as error:
        if "already open" in str(error):  # by this process, so it can be read
            return None
        return f"{file} is broken; copy it again, or prepare it again with --overwrite"
    pages = 2 + sum(stat[kind] for kind in ("branch_pages", "leaf_pages", "overflow_pages"))
    needed, size = pages * stat["psize"], file.stat().st_size
    if size < needed:
        return (
            f"{file} is truncated: {size:,} of {needed:,} bytes; "
            "copy it again, or prepare it again with --overwrite"
        )
    return None


def _root_fault(root: str, backend: str) -> str | None:
    """What is wrong with a data root, or None."""
    path = Path(root)
    if not path.is_dir():
        if re.search(r"(_sub\.lmdb|(GTmod|LRbicx)\d)$", root):
            return f"no such folder {root}; `mlrn prepare` makes it (see datasets/README.md)"
        there = next(str(folder) for folder in path.absolute().parents if folder.is_dir())
        return f"no such folder {root}; of its path there is {there}"
    is_lmdb = (path / "data.mdb").exists()
    if backend == "disk" and is_lmdb:
        return f"{root} is an LMDB; set io_backend:type to lmdb"
    if backend == "lmdb" and not is_lmdb:
        if any(path.iterdir()):
            return f"{root} is a plain folder, no LMDB; set io_backend:type to disk"
        return f"{root} is empty"
    if backend == "lmdb" and path.suffix != ".lmdb":
        return f"{root} must have a name that ends in .lmdb for BasicSR"
    if backend == "lmdb" and not (path / "meta_info.txt").exists():
        return f"{root} has no meta_info.txt; prepare it again, it was not finished"
    if backend == "lmdb" and (fault := lmdb_fault(path)):
        return fault
    if backend == "disk" and not any(path.iterdir()):
        return f"{root} is empty"
    return None
