"""Reads, checks and adapts an option file before anything is created on disk.

BasicSR's `parse_options` lets an option file run code, lets `--force_yml` execute its keys and
leaves every mistake to a traceback somewhere in the run. Here the file is read safely, all its
faults are found first and told at once, and what this machine lacks is adapted.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from basicsr.data.data_util import (
    paired_paths_from_folder,
    paired_paths_from_lmdb,
    paired_paths_from_meta_info_file,
)
from basicsr.data.paired_image_dataset import PairedImageDataset
from basicsr.utils import set_random_seed
from basicsr.utils.dist_util import get_dist_info, init_dist
from basicsr.utils.registry import (
    ARCH_REGISTRY,
    DATASET_REGISTRY,
    LOSS_REGISTRY,
    METRIC_REGISTRY,
    MODEL_REGISTRY,
    Registry,
)

from mlrn_arch import weights
from mlrn_arch.compat import newest_states
from mlrn_arch.errors import UserError, first_line
from mlrn_arch.models.distill_model import misfit
from mlrn_arch.models.fast_sr_model import DTYPES, FastSRModel, inherit_weights

Options = dict[str, Any]

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
OPTIMIZERS = (("Adam",), ("Adam", "Muon"))  # of BasicSR's models, of FastSRModel
SCHEDULERS = ("MultiStepLR", "MultiStepRestartLR", "CosineAnnealingRestartLR")


def parse_args(phase: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags of BasicSR's train.py and test.py.

    Args:
        phase: `train` or `test`.
        argv: The command line after the verb; None takes `sys.argv`.
    """
    parser = argparse.ArgumentParser(
        prog=f"mlrn {phase}",
        description="Run BasicSR's own pipeline on an option file. The file is checked first; "
        "outputs go below the current directory: "
        + ("experiments/ and tb_logger/." if phase == "train" else "results/."),
    )
    parser.add_argument("-opt", required=True, metavar="FILE", help="option file (YAML)")
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm"],
        default="none",
        help="how several processes were started: `pytorch` for torchrun (default: none)",
    )
    parser.add_argument(
        "--auto_resume",
        action="store_true",
        help="go on from the newest whole state of this experiment; start anew if it has none",
    )
    if phase == "train":
        parser.add_argument(
            "--time_limit",
            type=float,
            metavar="MINUTES",
            help="after so long finish the step, save, and end with the exit code 75, which says "
            "that the run is not finished (FastSRModel and its kinds)",
        )
    parser.add_argument(
        "--debug", action="store_true", help="log every step, validate and save every 8"
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=0, help="set by torch's launchers"
    )
    parser.add_argument(
        "--force_yml",
        nargs="+",
        default=[],
        metavar="KEY:KEY=VALUE",
        help="change options of the file, e.g. train:total_iter=300 network_g:num_block=4",
    )
    return parser.parse_args(argv)


def read(phase: str, argv: Sequence[str] | None = None) -> tuple[Options, argparse.Namespace, list]:
    """Read the command line and its option file, check it, and complete it for this machine.

    Args:
        phase: `train` or `test`.
        argv: The command line after the verb; None takes `sys.argv`.

    Returns:
        The options as BasicSR's `parse_options` would return them, the parsed command line, and
        a line for everything that was adapted to this machine.

    Raises:
        UserError: The file cannot be read, or has faults; all of them are in the message.
    """
    args = parse_args(phase, argv)
    is_train = phase == "train"
    opt = load_yaml(args.opt)
    faults = _force(opt, args.force_yml) or [
        f"{key}: is missing" for key in _missing(opt, REQUIRED + REQUIRED_TRAIN * is_train)
    ]
    if faults:  # without these the rest cannot be looked at
        raise _refusal(args.opt, faults)

    opt["root_path"] = os.getcwd()
    opt["is_train"] = is_train
    opt["auto_resume"] = args.auto_resume
    if args.debug and not opt["name"].startswith("debug"):
        opt["name"] = "debug_" + opt["name"]
    notes = _set_defaults_and_paths(opt)
    faults = list(check(opt))
    if faults:
        raise _refusal(args.opt, faults)

    notes += _adapt(opt)
    _init_distributed(opt, args.launcher)
    if opt.get("manual_seed") is None:
        opt["manual_seed"] = random.randint(1, 10000)
    set_random_seed(opt["manual_seed"] + opt["rank"])
    return opt, args, notes


def _refusal(path: str, faults: list[str]) -> UserError:
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    listed = "".join(f"\n  - {fault}" for fault in faults)
    return UserError(f"{path} has {count}, nothing was started:{listed}")


def load_yaml(path: str) -> Options:
    """Read an option file without running anything in it.

    Raises:
        UserError: No such file, not YAML, not a mapping, or it holds a Python tag.
    """
    try:
        opt = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the option file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not an option file: it is not text ({error.reason})") from None
    except yaml.constructor.ConstructorError as error:
        raise UserError(
            f"{path}, line {error.problem_mark.line + 1}: {error.problem}; an option file holds "
            "plain values only (a Python tag could run code), write the value itself"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", error)
        raise UserError(f"{path}{line}: not valid YAML: {problem}") from None
    if not isinstance(opt, dict):
        raise UserError(f"{path} is not an option file: it has no `key: value` lines")
    return opt


def network_by_name(text: str, upscale: int = 4) -> Options:
    """Read `NAME` or `NAME:ARG=VALUE,ARG=VALUE` as the section network_g of an option file.

    Args:
        text: A network that BasicSR knows; values are YAML's, so a list is `[6,6]`.
        upscale: The scale of a network that takes one but is given none.

    Returns:
        `type`, the given arguments, the scale, and the window size, which `SwinIRModel` reads.

    Raises:
        UserError: No such network, or arguments that cannot be parsed or are not its own.
    """
    kind, _, arguments = text.partition(":")
    try:
        given = yaml.safe_load("{" + arguments.replace("=", ": ") + "}")
    except (yaml.YAMLError, ValueError):  # ValueError: 2023-13-01
        raise UserError("write arguments as NAME:ARG=VALUE,ARG=VALUE") from None
    given = {k: float(v) if isinstance(v, str) and _is_number(v) else v for k, v in given.items()}
    kind = _registered(kind, ARCH_REGISTRY)
    section = {**given, "type": kind}
    if kind in ARCH_REGISTRY:
        parameters = inspect.signature(ARCH_REGISTRY.get(kind)).parameters
        for key in ("upscale", "scale"):
            if key in parameters:
                section.setdefault(key, upscale)
        window = parameters.get("window_size")
        if window and window.default is not window.empty:
            section.setdefault("window_size", window.default)
    if faults := list(check_call("", ARCH_REGISTRY, section)):
        raise UserError("; ".join(fault.removeprefix(":type").lstrip(": ") for fault in faults))
    return section


def _force(opt: Options, entries: Sequence[str]) -> list[str]:
    """Apply `--force_yml` entries in place; return the faults among them."""
    faults = []
    for section in ("path", "logger"):  # a file may leave these out
        if opt.get(section) is None:
            opt[section] = {}
    for entry in entries:
        where, equals, text = entry.partition("=")
        *sections, key = (part.strip() for part in where.split(":"))
        try:
            value = None if text.strip().lower() == "none" else yaml.safe_load(text)
        except yaml.YAMLError as error:
            faults.append(f"--force_yml {entry}: not a plain value: {error.problem}")
            continue
        if isinstance(value, str) and _is_number(value):
            value = float(value)  # 5e-4 is text to YAML, but here it cannot be meant so
        section: Any = opt
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if not equals or not key:
            faults.append(f"--force_yml {entry}: write it as KEY:KEY=VALUE")
        elif not isinstance(section, dict):
            faults.append(f"--force_yml {entry}: the file has no section {':'.join(sections)}")
        elif key not in section and difflib.get_close_matches(key, section, cutoff=0.85):
            near = difflib.get_close_matches(key, section, cutoff=0.85)
            faults.append(f"--force_yml {entry}: no such key; did you mean {' or '.join(near)}?")
        else:
            section[key] = value
    return faults


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text) is not None


def _missing(opt: Options, keys: Sequence[str]) -> Iterator[str]:
    """The keys (`section:key`) that options do not have or have empty."""
    for key in keys:
        value: Any = opt
        for name in key.split(":"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is None:
            yield key


def _set_defaults_and_paths(opt: Options) -> list[str]:
    """Complete options as BasicSR does, so that short files stay valid; returns notes."""
    notes = []
    if not opt["is_train"] and opt.get("val") is None:
        opt["val"] = {}
    opt["logger"].setdefault("use_tb_logger", False)
    if opt.get("val") is not None:
        opt["val"].setdefault("save_img", False)
        opt["val"].setdefault("suffix", None)
    if opt["num_gpu"] == "auto":
        opt["num_gpu"] = torch.cuda.device_count()

    for key, dataset in list(opt["datasets"].items()):
        if dataset is None:  # `--force_yml datasets:val=none` drops a set
            del opt["datasets"][key]
            continue
        if not isinstance(dataset, dict):
            continue  # check() tells
        dataset["phase"] = key.split("_")[0]
        if "scale" in opt:
            dataset["scale"] = opt["scale"]
        roots = [name for name in ("dataroot_gt", "dataroot_lq") if dataset.get(name)]
        for name in roots:
            dataset[name] = os.path.expanduser(dataset[name])
        # A benchmark set that was never prepared is no fault of the option file.
        if not opt["is_train"] and roots and not any(os.path.exists(dataset[n]) for n in roots):
            notes.append(f"Skipping {dataset.get('name', key)}: no {dataset[roots[0]]}")
            if len(opt["datasets"]) > 1:
                del opt["datasets"][key]

    for key, value in opt["path"].items():
        if value is not None and ("resume_state" in key or "pretrain_network" in key):
            if value.startswith(weights.PREFIX):
                with contextlib.suppress(ValueError):  # check() tells
                    value = weights.path(value)
            opt["path"][key] = os.path.expanduser(value)
    kind = "experiments" if opt["is_train"] else "results"
    root = os.path.join(opt["root_path"], kind, str(opt["name"]))
    opt["path"]["experiments_root" if opt["is_train"] else "results_root"] = root
    opt["path"]["log"] = root
    opt["path"]["visualization"] = os.path.join(root, "visualization")
    if "network_t" in opt:  # a teacher is not saved with a run
        opt["path"].setdefault("ignore_resume_networks", ["network_t"])
    if opt["is_train"]:
        opt["path"]["models"] = os.path.join(root, "models")
        opt["path"]["training_states"] = os.path.join(root, "training_states")
        if "debug" in opt["name"]:
            opt["logger"].update(print_freq=1, save_checkpoint_freq=8)
            if opt.get("val") is not None:
                opt["val"]["val_freq"] = 8
    return notes


def _adapt(opt: Options) -> list[str]:
    """Take back what this machine cannot do; returns a line for each such thing."""
    notes = []
    found = torch.cuda.device_count()
    if opt["num_gpu"] > found:
        notes.append(f"num_gpu: {opt['num_gpu']} -> {found}: this machine has {found} GPU(s)")
        opt["num_gpu"] = found
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for key, dataset in opt["datasets"].items():
        if opt["num_gpu"] == 0:
            off = [k for k, v in {"prefetch_mode": "cuda", "pin_memory": True}.items()
                   if dataset.get(k) == v]  # fmt: skip
            if off:
                notes.append(f"datasets:{key}: {' and '.join(off)} off: they need a GPU")
                dataset.update(dict.fromkeys(off))
        workers = dataset.get("num_worker_per_gpu") or 0
        if workers > cores:
            notes.append(f"datasets:{key}:num_worker_per_gpu: {workers} -> {cores}: all cores")
            dataset["num_worker_per_gpu"] = cores
    slow = opt["num_gpu"] == 0 and not cpu_computes_in_bf16()
    for section in ("train", "val"):
        if slow and (opt.get(section) or {}).get("precision", "fp32") != "fp32":
            notes.append(f"{section}:precision: fp32: this CPU only emulates a lower one, slowly")
            opt[section]["precision"] = "fp32"
    if opt["num_gpu"] == 0:
        notes.append(f"Running on the CPU with {torch.get_num_threads()} threads")
    return notes


def cpu_computes_in_bf16() -> bool:
    """Whether bf16 is more than an emulation on this CPU."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.11 or so
    return capabilities.get("avx512_bf16", True) or capabilities.get("amx_bf16", True)


def _init_distributed(opt: Options, launcher: str) -> None:
    """Join the other processes: BasicSR's way on GPUs, over gloo on CPUs."""
    opt["dist"] = launcher != "none"
    if opt["dist"] and torch.cuda.is_available():
        # The others wait while rank 0 validates: longer than torch's ten minutes.
        params = {"timeout": timedelta(hours=2)} if launcher == "pytorch" else {}
        init_dist(launcher, **params, **opt.get("dist_params", {}) if launcher == "slurm" else {})
    elif launcher == "slurm":
        raise UserError("--launcher slurm is BasicSR's and needs GPUs; on CPUs use torchrun")
    elif opt["dist"]:
        torch.distributed.init_process_group("gloo", timeout=timedelta(hours=2))
    opt["rank"], opt["world_size"] = get_dist_info()


def check(opt: Options) -> Iterator[str]:
    """Find the faults of complete options; yields a sentence for each: where, what, what to do."""
    for key in _numbers_as_text(opt):
        yield key
    if opt["model_type"] not in MODEL_REGISTRY:
        yield f"model_type: {_unknown(opt['model_type'], MODEL_REGISTRY.keys())}"
    resuming = opt["is_train"] and (
        opt["path"].get("resume_state")
        or (opt["auto_resume"] and newest_states(opt["path"]["training_states"]))
    )
    for key in [key for key in opt if key.startswith("network_")]:
        own = key != "network_t"  # a teacher is loaded anew when a run is resumed
        yield from check_network(opt, key, ignore_checkpoint=bool(resuming and own))
    if opt["is_train"]:
        yield from _check_inherited(opt)
        if opt["model_type"] == "DistillModel":
            yield from _check_teacher(opt)

    if not opt["datasets"]:
        yield "datasets: is empty"
    for key, dataset in opt["datasets"].items():
        where = f"datasets:{key}"
        if not isinstance(dataset, dict):
            yield f"{where}: is no section of `key: value` lines"
        elif dataset["phase"] not in (("train", "val") if opt["is_train"] else ("val", "test")):
            yield f"{where}: BasicSR knows datasets by the names train, val and test (test_1, ...)"
        elif (kind := dataset.get("type")) not in DATASET_REGISTRY:
            yield f"{where}:type: {_unknown(kind, DATASET_REGISTRY.keys())}"
        elif issubclass(DATASET_REGISTRY.get(kind), PairedImageDataset):
            yield from _check_paired(where, dataset)

    val = opt.get("val")
    if val is not None:
        if opt["is_train"] and val.get("val_freq") is None:
            yield "val:val_freq: is missing (iterations between validations)"
        for name, metric in (val.get("metrics") or {}).items():
            known = {"img": None, "img2": None, "better": None}
            yield from check_call(f"val:metrics:{name}", METRIC_REGISTRY, metric, known)
    if opt["is_train"]:
        yield from _check_train(opt["train"], opt["model_type"])
        if (
            opt["model_type"] == "SRModel"
            and opt["datasets"]["train"].get("type") == "FastPairedImageDataset"
        ):
            yield (
                "datasets:train:type: FastPairedImageDataset gives bytes, which SRModel cannot "
                "take; set it to PairedImageDataset, or model_type to FastSRModel"
            )
    if opt["model_type"] in ("FastSRModel", "DistillModel"):
        for section in ("train", "val"):
            precision = (opt.get(section) or {}).get("precision", "fp32")
            if precision not in DTYPES:
                yield f"{section}:precision: {_unknown(precision, DTYPES)}"
        metrics, best = (val or {}).get("metrics") or {}, (val or {}).get("save_best")
        if best is not None and best not in metrics:
            yield f"val:save_best: {_unknown(best, metrics)}; it must be one of val:metrics"


def _check_train(train: Options, model_type: str) -> Iterator[str]:
    optimizers = OPTIMIZERS[model_type in ("FastSRModel", "DistillModel")]
    if train["optim_g"]["type"] not in optimizers:
        yield f"train:optim_g:type: {_unknown(train['optim_g']['type'], optimizers)}"
    if train["scheduler"]["type"] not in SCHEDULERS:
        yield f"train:scheduler:type: {_unknown(train['scheduler']['type'], SCHEDULERS)}"
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
        if not faults and loss["type"] != "PerceptualLoss":  # which fetches the weights of VGG
            try:
                _build(f"train:{key}", LOSS_REGISTRY, loss)
            except UserError as error:
                yield str(error)


def _unknown(name: Any, known: Any) -> str:
    """`unknown X; did you mean Y?`, or the whole list when nothing is near."""
    folded = {str(k).lower(): k for k in known}
    wanted = str(name).lower()
    near = difflib.get_close_matches(wanted, folded) or [k for k in folded if wanted in k]
    near = [folded[k] for k in near]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(known))}"
    return f"unknown {name!r}; {hint}"


def _numbers_as_text(opt: Any, where: str = "") -> Iterator[str]:
    """YAML 1.1 takes `5e-4` for text; the optimizer would find out in a traceback."""
    if isinstance(opt, dict):
        for key, value in opt.items():
            yield from _numbers_as_text(value, f"{where}:{key}" if where else str(key))
    elif isinstance(opt, list):
        for value in opt:
            yield from _numbers_as_text(value, where)
    elif isinstance(opt, str) and _is_number(opt) and not where.endswith("name"):
        yield f"{where}: {opt} is text to YAML; write {float(opt)!r} or !!float {opt}"


def _registered(kind: Any, registry: Registry) -> Any:
    """The name under which BasicSR finds `kind`: its own for what Real-ESRGAN registers too."""
    own = f"{kind}_basicsr"
    return own if own in registry and kind not in registry else kind


def check_call(
    where: str, registry: Registry, opt: Any, others: Options | None = None
) -> Iterator[str]:
    """Check `type` against a registry and the other keys against what that type takes."""
    kind = _registered(opt.get("type"), registry) if isinstance(opt, dict) else None
    if kind not in registry:
        yield f"{where}:type: {_unknown(kind, registry.keys())}"
        return
    parameters = inspect.signature(registry.get(kind)).parameters
    given = {**(others or {}), **{k: v for k, v in opt.items() if k != "type"}}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in given.keys() - parameters.keys() - (others or {}).keys():
        if not takes_any:
            yield f"{where}: {kind} takes no {_unknown(key, parameters)}".replace(" unknown", "")
    for key, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if required and key not in given:
            yield f"{where}: {kind} needs {key}"


def network_section(path: str) -> tuple[Options, Options]:
    """Read an option file for its network alone; returns the options and their network_g.

    Raises:
        UserError: It is no option file, or has no network in it.
    """
    opt = load_yaml(path)
    if not isinstance(opt.get("network_g"), dict):
        raise UserError(f"{path} has no section network_g, so there is no network in it")
    return opt, opt["network_g"]


def build_network(network_g: Options, where: str = "network_g") -> tuple[torch.nn.Module, Options]:
    """Build the network of a section; returns it and all its arguments, the defaults included.

    Raises:
        UserError: There is no such network, or it refuses its arguments.
    """
    if faults := list(check_call(where, ARCH_REGISTRY, network_g)):
        raise UserError("; ".join(faults))
    network = _build(where, ARCH_REGISTRY, network_g)
    arguments = {key: value for key, value in network_g.items() if key != "type"}
    bound = inspect.signature(type(network)).bind(**arguments)
    bound.apply_defaults()
    return network, bound.arguments


def _build(where: str, registry: Registry, opt: Options) -> torch.nn.Module:
    arguments = dict(opt)
    kind = _registered(arguments.pop("type"), registry)
    try:
        return registry.get(kind)(**arguments)
    except Exception as error:  # a class may refuse its arguments in any way
        raise UserError(f"{where}: {kind} refuses these arguments: {first_line(error)}") from None


def check_network(opt: Options, key: str, ignore_checkpoint: bool) -> Iterator[str]:
    try:
        network, values = build_network(opt[key], key)
    except UserError as error:
        yield str(error)
        return
    upscale = values.get("upscale")
    if upscale is not None and "scale" in opt and upscale != opt["scale"]:
        yield f"{key}:upscale: is {upscale} but scale is {opt['scale']}; make them equal"

    where = f"path:pretrain_{key}"
    path = opt["path"].get(f"pretrain_{key}")
    if path is None or ignore_checkpoint:
        return
    suffix = key.split("_", 1)[1]
    try:
        checkpoint = _load_checkpoint(path)
    except UserError as error:
        yield f"{where}: {error}"
        return
    state = weights.state_dict(checkpoint, opt["path"].get(f"param_key_{suffix}", "params"))
    if not isinstance(state, dict):
        yield f"{where}: {path} holds no state dict; give a checkpoint of the network"
    elif opt["path"].get(f"strict_load_{suffix}", True):
        yield from _misfits(where, path, network, state)


def _check_inherited(opt: Options) -> Iterator[str]:
    path = opt["train"].get("inherit_network_g")
    if path is None:
        return
    where = "train:inherit_network_g"
    if opt["path"].get("pretrain_network_g"):
        yield f"{where}: and pretrain_network_g both say where the network starts; give one"
    if not issubclass(MODEL_REGISTRY.get(opt["model_type"]), FastSRModel):
        yield f"{where}: is FastSRModel's; set model_type to it"
    try:
        network, _ = build_network(opt["network_g"])
        _load_checkpoint(path)
        inherit_weights(network, path)
    except (UserError, ValueError) as error:
        yield f"{where}: {path}: {error}"


def _check_teacher(opt: Options) -> Iterator[str]:
    distill = opt["train"].get("distill_opt")
    if not isinstance(opt.get("network_t"), dict):
        yield "network_t: is missing; DistillModel needs a teacher"
    elif not isinstance(distill, dict):
        yield "train:distill_opt: is missing; write distill_opt: {stage: blocks}"
    else:
        with contextlib.suppress(UserError):  # told of the networks themselves
            student, teacher = (build_network(opt[f"network_{k}"])[0] for k in "gt")
            if fault := misfit(student, teacher, distill):
                yield f"train:distill_opt:{fault}"
        if not opt["path"].get("pretrain_network_t"):
            yield "path:pretrain_network_t: is missing; an untrained teacher teaches nothing"
        if opt["train"].get("compile") and distill.get("stage") != "output":
            yield "train:compile: only with stage: output; blocks are watched as they run"


def _load_checkpoint(path: str) -> Options:
    """Load a checkpoint, `mlrn://` names included, without running code from it.

    Raises:
        UserError: No such file or name, or it is no checkpoint.
    """
    try:
        file = weights.path(path) if path.startswith(weights.PREFIX) else os.path.expanduser(path)
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such file {path}") from None
    except Exception as error:  # torn, foreign or unsafe: torch tells them in many ways
        if path.startswith(weights.PREFIX):
            raise UserError(str(error)) from None
        # What unpickling found comes after advice to load the file unsafely.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip()
        reason = (reason or first_line(error)).splitlines()[0].split(". ")[0]
        raise UserError(f"{path} is no whole PyTorch checkpoint ({reason})") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds no state dict; give a checkpoint of the network")
    return checkpoint


def load_network(
    source: str | None, checkpoint: str | None = None
) -> tuple[torch.nn.Module, Options]:
    """Build a network with its weights, EMA weights if the checkpoint has them.

    Args:
        source: A shipped network, such as `x4`; an option file; or None, for the network of which
            `checkpoint` is.
        checkpoint: Replaces the weights of `source`. With a shipped network's name it may be of
            any MLRN of that scale.

    Returns:
        The network, in evaluation mode on the CPU, and its section `network_g`.

    Raises:
        UserError: There is no such network, or its weights are missing or another's.
    """
    path: Options = {}
    given, loaded = checkpoint, None
    if source is not None and source.endswith((".yml", ".yaml")):
        opt, network_g = network_section(source)
        path = opt.get("path") or {}
        checkpoint = given or path.get("pretrain_network_g")
        if checkpoint:
            loaded = _load_checkpoint(checkpoint)
    else:
        try:
            named = weights.info(source.removeprefix(weights.PREFIX)) if source else None
            checkpoint = given or weights.path(source)
            loaded = _load_checkpoint(checkpoint)
            network_g = weights.deduce(loaded) if given else named["network_g"]
        except ValueError as error:
            where = f"{given}: " if given else ""
            raise UserError(f"{where}{error}; or name an option file") from None
        if named and network_g.get("upscale") != named["network_g"]["upscale"]:
            raise UserError(
                f"{checkpoint} is of an x{network_g.get('upscale')} network, not x"
                f"{named['network_g']['upscale']}"
            )
    network, _ = build_network(network_g, f"{source or checkpoint}: network_g")
    network.eval().requires_grad_(False)
    if loaded is None:
        if any(True for _ in network.parameters()):
            raise UserError(f"{source} names no pretrain_network_g; give the weights by --weights")
        return network, network_g
    state = weights.state_dict(loaded, path.get("param_key_g"))
    strict = path.get("strict_load_g", True)
    if strict and (faults := list(_misfits("", checkpoint, network, state))):
        raise UserError(faults[0].removeprefix(": "))
    network.load_state_dict(state, strict=strict)
    return network, network_g


def _misfits(where: str, path: str, network: torch.nn.Module, state: Options) -> Iterator[str]:
    """Say which tensors of a checkpoint do not fit a network, if any."""
    own = network.state_dict()

    def some(names: Sequence[str]) -> str:
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    parts = []
    if missing := [k for k in own if k not in state]:
        parts.append(f"it lacks {some(missing)}")
    if unknown := [k for k in state if k not in own]:
        parts.append(f"the network has no {some(unknown)}")
    if other := [
        f"{k} ({tuple(state[k].shape)} in the file, {tuple(own[k].shape)} in the network)"
        for k in own
        if k in state and getattr(state[k], "shape", None) != own[k].shape
    ]:
        parts.append(f"other shapes: {some(other)}")
    if parts:
        name = type(network).__name__
        yield f"{where}: {path} is not a checkpoint of this {name}: {'; '.join(parts)}"


def _check_paired(where: str, dataset: Options) -> Iterator[str]:
    """Check a `PairedImageDataset` or a kind of it: keys, folders or LMDBs, patch size."""
    training = dataset["phase"] == "train"
    missing = list(_missing(dataset, REQUIRED_PAIRED + REQUIRED_PAIRED_TRAIN * training))
    if "scale" not in dataset:
        yield f"scale: is missing, {where} needs it"
    if missing:
        yield from (f"{where}:{key}: is missing" for key in missing)
        return
    backend = dataset["io_backend"]["type"]
    if backend not in BACKENDS:
        yield f"{where}:io_backend:type: {_unknown(backend, BACKENDS)}"
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
    candidates = dataset.get("hardest_of", 1)
    if not isinstance(candidates, int) or candidates < 1:
        yield f"{where}:hardest_of: {candidates!r} is no number of crops to choose from, 1 or more"
    elif candidates > 1 and dataset["type"] != "FastPairedImageDataset":
        yield f"{where}:hardest_of: only FastPairedImageDataset chooses; set type to it"
    elif candidates > 1 and (
        dataset.get("color") == "y" or dataset.get("mean") or dataset.get("std")
    ):
        yield f"{where}:hardest_of: chooses in RGB only, without color, mean and std; leave it out"
    if faults:
        return

    roots, keys = [dataset["dataroot_lq"], dataset["dataroot_gt"]], ["lq", "gt"]
    template = dataset.get("filename_tmpl", "{}")
    find: Callable[[], list]
    if backend == "lmdb":
        find = lambda: paired_paths_from_lmdb(roots, keys)  # noqa: E731
    elif dataset.get("meta_info_file"):
        meta_info = dataset["meta_info_file"]
        find = lambda: paired_paths_from_meta_info_file(roots, keys, meta_info, template)  # noqa: E731
    else:
        find = lambda: paired_paths_from_folder(roots, keys, template)  # noqa: E731
    try:
        pairs = find()
    except (AssertionError, ValueError, OSError) as error:
        yield f"{where}: lq and gt are no pairs: {error}"
        return
    if not training:
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


def _root_fault(root: str, backend: str) -> str | None:
    """What is wrong with a data root, or None."""
    path = Path(root)
    if not path.is_dir():
        return f"no such folder {root}; `mlrn prepare` makes it (see datasets/README.md)"
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
    if backend == "disk" and not any(path.iterdir()):
        return f"{root} is empty"
    return None
