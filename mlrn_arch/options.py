"""Reads an option file, checks it, completes it and adapts it to the machine."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from basicsr.utils import set_random_seed
from basicsr.utils.dist_util import get_dist_info, init_dist
from basicsr.utils.registry import MODEL_REGISTRY

from mlrn_arch import checkpoints, checks, machine, networks, plugins, schema, shipped, sources
from mlrn_arch.errors import UserError
from mlrn_arch.machine import DTYPES
from mlrn_arch.models.fast_sr_model import FastSRModel
from mlrn_arch.networks import Options
from mlrn_arch.option_files import load_yaml, parse

BY_NAME = """A network without an option file is tested like MLRN, by options/test_MLRN_x*.yml.
If it has a window_size, BasicSR's SwinIRModel pads the images to it."""

FORCE_YML: dict[str, Any] = {"action": "extend", "nargs": "+", "default": []}
FORCE_YML["metavar"] = "KEY:KEY=VALUE"


def parse_args(phase: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags of BasicSR's train.py and test.py; `phase` is `train` or `test`."""
    is_train = phase == "train"
    outputs = "experiments/ and tb_logger/" if is_train else "results/"
    parser = plugins.parser(
        f"mlrn {phase}",
        "Run BasicSR's own pipeline on an option file. The file is checked first.\n"
        f"Outputs go to {outputs} in the current directory.",
    )
    add = parser.add_argument
    add("-opt", required=is_train, metavar="FILE", help="option file, or mlrn://NAME")
    if not is_train:
        add("network", nargs="?", metavar="NETWORK", help="test this instead of an option file")
        parser.epilog = f"{sources.FORMS}\n\n{BY_NAME}"
    launchers = ["none", "pytorch", "slurm"]
    text = "what started several processes; torchrun (`pytorch`) is found without this"
    add("--launcher", choices=launchers, default="none", help=text)
    hidden = None if is_train else argparse.SUPPRESS  # BasicSR's test.py has them, to no effect
    text = hidden or "continue from the newest complete state of this run, if there is one"
    add("--auto_resume", action="store_true", help=text)
    add("--debug", action="store_true", help=hidden or "log each step; validate and save every 8")
    if is_train:
        text = "save after this time, exit with code 75: not finished (FastSRModel, DistillModel)"
        add("--time_limit", type=float, metavar="MINUTES", help=text)
    add("--local_rank", "--local-rank", type=int, default=0, help="set by torch's launchers")
    text = "change options of the file, e.g. train:total_iter=300 network_g:num_block=4"
    add("--force_yml", **FORCE_YML, help=text)
    args = parser.parse_args(argv)
    if not is_train and (args.network is None) == (args.opt is None):
        parser.error("give a NETWORK, or an option file by -opt")
    return args


def read(phase: str, argv: Sequence[str] | None = None) -> tuple[Options, argparse.Namespace, list]:
    """Read the command line and its option file, check it, and complete it for this machine.

    Returns the options as BasicSR's `parse_options` would, the parsed command line, and a line for
    everything that was adapted to this machine. Raises `UserError` with all faults of the file.
    """
    args = parse_args(phase, argv)
    if args.launcher == "none" and int(os.environ.get("WORLD_SIZE", 1)) > 1:  # torchrun's
        args.launcher = "pytorch"
    if args.launcher == "pytorch" and "RANK" not in os.environ:
        raise UserError(
            "--launcher pytorch: torchrun starts the processes, e.g. "
            f"torchrun --nproc_per_node=2 -m mlrn_arch.{phase} -opt {args.opt}"
        )
    is_train = phase == "train"
    plugins.register(args.imports)
    if not is_train and args.network:
        args.opt, forced = _test_of(args.network)
        args.force_yml = [*forced, *args.force_yml]
    args.opt = str(shipped.option_file(args.opt))
    opt = load_yaml(args.opt)
    _add_sections(opt, is_train)
    _refuse(args.opt, _force(opt, args.force_yml))
    _add_sections(opt, is_train)  # `--force_yml path=none` removes one
    faults, unread, notes = schema.complete(opt, checks.bases, is_train)
    _refuse(args.opt, faults and faults + unread)

    opt |= {"root_path": os.getcwd(), "is_train": is_train, "auto_resume": args.auto_resume}
    if args.debug and not opt["name"].startswith("debug"):
        opt["name"] = "debug_" + opt["name"]
    notes += _set_paths(opt)
    if is_train and Path(opt["path"]["experiments_root"]) in Path(args.opt).absolute().parents:
        raise UserError(f"{args.opt} is in the folder of its run; copy it to another folder")
    _refuse(args.opt, [*unread, *checks.check(opt)])
    notes += _adapt(opt, args.launcher)
    _init_distributed(opt, args.launcher)
    if opt.get("manual_seed") is None:  # a resume takes the seed of its training state instead
        seeds = [random.randint(1, 10000)]
        if opt["dist"]:
            torch.distributed.broadcast_object_list(seeds)
        opt["manual_seed"], opt["seed_drawn"] = seeds[0], True
    set_random_seed(opt["manual_seed"] + opt["rank"])
    return opt, args, notes


def _test_of(text: str) -> tuple[str, list[str]]:
    """The option file that tests a network, and the `--force_yml` entries for it."""
    found, forced = sources.find(text), []
    if found.checkpoint:
        forced = [f"path:pretrain_network_g={json.dumps(found.checkpoint)}"]
    elif any(True for _ in networks.build(found.network_g)[0].parameters()):
        raise UserError(f"names no checkpoint; write {text}:CHECKPOINT")
    if found.file:
        return found.file, forced
    file = shipped.usual_file(f"test_MLRN_x{found.scale}")
    name = os.path.splitext(os.path.basename(found.name.removeprefix(shipped.PREFIX)))[0]
    name = f"{name.partition(':')[0].removesuffix(f'x{found.scale}').rstrip('_') or 'MLRN'}"
    own = [f"name=test_{name}_x{found.scale}", "path:pretrain_network_g=none"]
    own += [f"network_g={yaml.safe_dump(found.network_g, default_flow_style=True)}"]
    own += ["model_type=SwinIRModel"] * ("window_size" in found.network_g)
    return file, own + forced


def _refuse(path: str, faults: list[str]) -> None:
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        listed = "".join(f"\n  - {fault}" for fault in faults)
        raise UserError(f"{path} has {count}, nothing was started:{listed}")


def _add_sections(opt: Options, is_train: bool) -> None:
    """Add the sections that a file may leave out."""
    for key in ["path"] if is_train else ["path", "val"]:
        if opt.get(key) is None:
            opt[key] = {}


def _force(opt: Options, entries: Sequence[str]) -> list[str]:
    """Apply `--force_yml` entries in place; return the faults among them."""
    faults = []
    for entry in entries:
        where, equals, text = entry.partition("=")
        *sections, key = (part.strip() for part in where.split(":"))
        try:
            value = None if text.strip().lower() == "none" else parse(text)
        except (yaml.YAMLError, ValueError):
            value = text  # such as {}x4, the names of DIV2K's LR images
        section: Any = opt
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if not equals or not key:
            faults.append(f"--force_yml {entry}: write it as KEY:KEY=VALUE")
        elif isinstance(section, dict):
            section[key] = value
        elif value is not None:
            faults.append(f"--force_yml {entry}: the file has no section {':'.join(sections)}")
    return faults


def _set_paths(opt: Options) -> list[str]:
    """Set what BasicSR's `parse_options` sets; returns notes on datasets that are skipped."""
    notes = []
    if opt["num_gpu"] == "auto":
        opt["num_gpu"] = torch.cuda.device_count()
    if "val" in opt:
        opt["val"].setdefault("suffix", None)
    for key, dataset in opt["datasets"].items():
        dataset["phase"] = key.split("_")[0]
        if "scale" in opt:
            dataset["scale"] = opt["scale"]
        for name in ("dataroot_gt", "dataroot_lq", "meta_info_file"):
            if isinstance(dataset.get(name), str):  # a shell's completion appends a slash
                dataset[name] = os.path.normpath(os.path.expanduser(dataset[name]))
    if not opt["is_train"]:  # a benchmark set that was never prepared is no fault
        absent = checks.absent_sets(opt["datasets"])
        if len(absent) < len(opt["datasets"]):
            for key, root in absent.items():
                notes.append(f"Skipping {opt['datasets'].pop(key).get('name', key)}: no {root}")

    path = {key: value for key, value in opt["path"].items() if not key.startswith("x_")}
    for key, value in path.items():
        if isinstance(value, str) and ("resume_state" in key or "pretrain_network" in key):
            with contextlib.suppress(UserError):  # checks.check reports it
                path[key] = checkpoints.resolve(value)
    root = os.path.join("experiments" if opt["is_train"] else "results", opt["name"])
    root = os.path.join(opt["root_path"], root)
    path |= {"log": root, "visualization": os.path.join(root, "visualization")}
    path["experiments_root" if opt["is_train"] else "results_root"] = root
    ignored = path.get("ignore_resume_networks") or []
    path["ignore_resume_networks"] = [ignored] if isinstance(ignored, str) else ignored
    if "network_t" in opt:  # a teacher is not saved with a run
        path["ignore_resume_networks"] = [*path["ignore_resume_networks"], "network_t"]
    if opt["is_train"]:
        path |= {key: os.path.join(root, key) for key in ("models", "training_states")}
        if "debug" in opt["name"]:
            opt["logger"].update(print_freq=1, save_checkpoint_freq=8)
            if "val" in opt:
                opt["val"]["val_freq"] = 8
    opt["path"] = path
    return notes


def _adapt(opt: Options, launcher: str) -> list[str]:
    """Change what this machine cannot do; returns a line for each change."""
    notes = []
    found = torch.cuda.device_count()
    if opt["num_gpu"] > found:
        notes.append(f"num_gpu: {opt['num_gpu']} -> {found}: this machine has {found} GPU(s)")
        opt["num_gpu"] = found
    fast = issubclass(MODEL_REGISTRY.get(opt["model_type"]), FastSRModel)
    if launcher == "none" and fast and opt["num_gpu"] > 1:
        # BasicSR would take DataParallel, whose replicas know nothing of the precision.
        notes.append(f"num_gpu: {opt['num_gpu']} -> 1: torchrun trains on several GPUs")
        opt["num_gpu"] = 1
    cores = machine.cores()
    for key, dataset in opt["datasets"].items():
        if opt["num_gpu"] == 0:
            off = [k for k in ("prefetch_mode", "pin_memory") if dataset.get(k) in ("cuda", True)]
            if off:
                notes.append(f"datasets:{key}: {' and '.join(off)} off: they need a GPU")
                dataset.update(dict.fromkeys(off))
        if fast and dataset.get("prefetch_mode") == "cpu":  # whose thread outlives the run
            notes.append(f"datasets:{key}: prefetch_mode cpu off: the workers prefetch")
            dataset["prefetch_mode"] = None
        workers = dataset.get("num_worker_per_gpu") or 0
        if workers > cores:
            notes.append(f"datasets:{key}:num_worker_per_gpu: {workers} -> {cores}: all cores")
            dataset["num_worker_per_gpu"] = cores
    # GPUs before Ampere have fp16, with loss scaling; CPUs without bf16 have nothing below fp32.
    kind, lower, train = ("GPU", ["bf16"], "fp16") if opt["num_gpu"] else ("CPU", DTYPES, "fp32")
    emulated = not machine.computes_in_bf16("cuda" if opt["num_gpu"] else "cpu")
    for section, able in (("train", train), ("val", "fp32")):
        asked = opt.get(section, {}).get("precision")
        if emulated and asked in lower and asked != able:
            notes.append(f"{section}:precision: {able}: this {kind} only emulates {asked}, slowly")
            opt[section]["precision"] = able
    if opt["num_gpu"] == 0:
        notes.append(f"Running on the CPU with {torch.get_num_threads()} threads")
    return notes


def _init_distributed(opt: Options, launcher: str) -> None:
    """Join the other processes: BasicSR's way on GPUs, over gloo on CPUs."""
    opt["dist"] = launcher != "none"
    if opt["dist"] and opt["num_gpu"]:
        init_dist(launcher, **opt.get("dist_params", {}) if launcher == "slurm" else {})
    elif launcher == "slurm":
        raise UserError("--launcher slurm is BasicSR's and needs GPUs; on CPUs use torchrun")
    elif opt["dist"]:
        torch.distributed.init_process_group("gloo")
    opt["rank"], opt["world_size"] = get_dist_info()
