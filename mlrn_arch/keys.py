"""Which keys an option file may have, and what kind of value each takes."""

from __future__ import annotations

import difflib
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from basicsr.utils.registry import DATASET_REGISTRY, MODEL_REGISTRY

from mlrn_arch.machine import DTYPES
from mlrn_arch.networks import registered
from mlrn_arch.option_files import is_number

Kind = tuple[str, Callable[[Any], bool]]  # in words, and as a test


def _number(least: float = -math.inf, most: float = math.inf) -> Callable[[Any], bool]:
    return lambda v: (
        isinstance(v, (int, float))
        and not isinstance(v, bool)
        and math.isfinite(v)
        and least <= v <= most
    )


def _whole(least: float = -math.inf, most: float = 2**53) -> Callable[[Any], bool]:
    return lambda v: _number(least, most)(v) and v == int(v)


def _one_of(*values: str) -> Kind:
    return " or ".join(values), lambda v: isinstance(v, str) and v in values


def _list_of(kind: Kind) -> Kind:
    return f"a list, each {kind[0]}", lambda v: isinstance(v, list) and all(map(kind[1], v))


FLAG: Kind = "true or false", lambda v: isinstance(v, bool)
TEXT: Kind = "text", lambda v: isinstance(v, str) and v.strip() != ""
SECTION: Kind = "a section of `key: value` lines", lambda v: isinstance(v, dict)
COUNT: Kind = "a whole number, 1 or more", _whole(1)
NATURAL: Kind = "a whole number, 0 or more", _whole(0)
POSITIVE: Kind = "a number above 0", lambda v: _number()(v) and v > 0
NOT_NEGATIVE: Kind = "a number, 0 or more", _number(0)
SHARE: Kind = "a number from 0 to 1", _number(0, 1)
NUMBERS = _list_of(("a number", _number()))
NAME: Kind = (
    "the name of a folder, without / and in quotes if it is a number",
    lambda v: isinstance(v, str) and v.strip(" .") != "" and not re.search(r"[/\\\0]", v),
)
TEMPLATE: Kind = "text with one {}", lambda v: isinstance(v, str) and v.count("{}") == 1 and (
    re.search("[{}]", v.replace("{}", "")) is None
)  # fmt: skip
GPUS: Kind = "auto or a whole number, 0 or more", lambda v: v == "auto" or _whole(0)(v)
PRECISION = _one_of(*DTYPES)

# The sections of which every key is known, `*` for any name.
KEYS: dict[str, dict[str, Kind]] = {
    "": {
        "name": NAME, "model_type": TEXT, "scale": COUNT, "num_gpu": GPUS,
        "manual_seed": ("a whole number from 0 to 4294967295", _whole(0, 2**32 - 1)),
        "find_unused_parameters": FLAG, "dist_params": SECTION, "datasets": SECTION,
        "import": ("a file or module to import, or several", lambda v: (
            TEXT[1](v) or _list_of(TEXT)[1](v)
        )),
        "network_*": SECTION, "path": SECTION, "train": SECTION, "val": SECTION, "logger": SECTION,
    },
    "datasets": {"*": SECTION},
    "datasets:*": {
        "name": NAME, "type": TEXT, "dataroot_gt": TEXT, "dataroot_lq": TEXT,
        "meta_info_file": TEXT, "filename_tmpl": TEMPLATE, "io_backend": SECTION,
        "gt_size": COUNT, "use_hflip": FLAG, "use_rot": FLAG, "color": _one_of("y"),
        "mean": NUMBERS, "std": NUMBERS, "num_worker_per_gpu": NATURAL,
        "batch_size_per_gpu": COUNT, "dataset_enlarge_ratio": COUNT, "pin_memory": FLAG,
        "prefetch_mode": _one_of("cuda", "cpu"), "num_prefetch_queue": COUNT,
        "use_shuffle": FLAG,
    },
    "path": {
        "pretrain_network_*": TEXT, "param_key_*": TEXT, "strict_load_*": FLAG,
        "resume_state": TEXT,
        "ignore_resume_networks": ("a network's key, or several", lambda v: (
            TEXT[1](v) or _list_of(TEXT)[1](v)
        )),
    },
    "train": {
        "ema_decay": SHARE, "optim_g": SECTION, "scheduler": SECTION, "total_iter": COUNT,
        "warmup_iter": ("a whole number, -1 for none", _whole(-1)), "pixel_opt": SECTION,
        "perceptual_opt": SECTION, "distill_opt": SECTION, "precision": PRECISION,
        "channels_last": FLAG, "compile": FLAG, "inherit_network_g": TEXT, "grad_clip": POSITIVE,
    },
    "train:distill_opt": {
        "stage": _one_of("blocks", "chain", "output"), "block_weight": NOT_NEGATIVE,
        "gt_weight": SHARE,
    },
    "val": {
        "val_freq": COUNT, "save_img": FLAG, "suffix": TEXT, "pbar": FLAG, "metrics": SECTION,
        "precision": PRECISION, "save_best": TEXT,
    },
    "val:metrics": {"*": SECTION},
    "logger": {
        "print_freq": COUNT, "save_checkpoint_freq": COUNT, "use_tb_logger": FLAG,
        "wandb": SECTION, "keep_last": COUNT,
    },
    "logger:wandb": {"project": TEXT, "resume_id": TEXT},
    "dist_params": {"backend": TEXT, "port": COUNT},
}  # fmt: skip

# Those whose other keys are what a callable takes; `checks` compares them with its signature.
CALLS: dict[str, dict[str, Kind]] = {
    "network_*": {"type": TEXT, "upscale": COUNT},
    "datasets:*:io_backend": {"type": _one_of("disk", "lmdb", "memcached")},
    "train:optim_g": {
        "type": TEXT, "lr": POSITIVE, "weight_decay": NOT_NEGATIVE, "eps": POSITIVE,
        "betas": ("two numbers from 0 to below 1", lambda v: (
            isinstance(v, list) and len(v) == 2 and all(_number(0)(b) and b < 1 for b in v)
        )),
        "amsgrad": FLAG, "momentum": SHARE, "bias_lr": POSITIVE,
    },
    "train:scheduler": {
        "type": TEXT, "milestones": _list_of(COUNT), "gamma": POSITIVE, "periods": _list_of(COUNT),
        "restarts": _list_of(NATURAL), "restart_weights": _list_of(NOT_NEGATIVE),
        "eta_min": NOT_NEGATIVE,
    },
    "train:*_opt": {"type": TEXT, "loss_weight": NOT_NEGATIVE, "reduction": TEXT},
    "val:metrics:*": {
        "type": TEXT, "crop_border": NATURAL, "input_order": _one_of("HWC", "CHW"),
        "test_y_channel": FLAG, "better": _one_of("higher", "lower"),
    },
}  # fmt: skip


def check(opt: dict[str, Any]) -> Iterator[str]:
    """Find keys that nothing reads and values of the wrong kind, in options as they were read.

    Keys that begin with `x_` are the user's own notes. Whole numbers that YAML reads as floats,
    such as `!!float 5e3`, become integers in place.
    """
    yield from _numbers_as_text(opt)
    foreign = _read_by_others(opt)  # None: nobody knows
    for table in (KEYS, CALLS):
        for pattern, kinds in table.items():
            for where, section in list(_sections(opt, pattern)):
                for key, value in section.items():
                    full = f"{where}:{key}" if where else str(key)
                    kind = kinds.get(key) or next(
                        (kind for name, kind in kinds.items() if fnmatchcase(str(key), name)), None
                    )
                    if kind is None:
                        own = foreign is None or key in foreign or str(key).startswith("x_")
                        if table is KEYS and not own:
                            yield f"{full}: nothing reads it{_hint(key, kinds)}"
                    elif value is not None and not kind[1](value):
                        if isinstance(value, str) and is_number(value) and kind is not NAME:
                            continue  # told above
                        yield f"{full}: must be {kind[0]}, not {value!r}"
                    elif isinstance(value, float) and kind[1] in (COUNT[1], NATURAL[1]):
                        section[key] = int(value)


def _hint(key: Any, kinds: dict[str, Kind]) -> str:
    near = difflib.get_close_matches(str(key), [name for name in kinds if "*" not in name])
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return "; begin the name of a note of your own with x_"


def _sections(opt: dict[str, Any], pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The sections, with their keys joined by colons, that a pattern of `KEYS` means."""
    found = [("", opt)]
    for name in filter(None, pattern.split(":")):
        found = [
            (f"{where}:{key}" if where else str(key), value)
            for where, section in found
            for key, value in section.items()
            if isinstance(value, dict) and fnmatchcase(str(key), name)
        ]
    yield from found


def _read_by_others(opt: dict[str, Any]) -> set[str] | None:
    """Every word in quotes in the source of models and data sets that are not `SRModel`'s kind.

    They say nowhere what they read, so that a key which they do not even mention is all that can
    be told; nor is there one that is told of an unknown type, None.
    """
    types = [(MODEL_REGISTRY, opt.get("model_type"))]
    for _, dataset in _sections(opt, "datasets:*"):
        types.append((DATASET_REGISTRY, dataset.get("type")))
    words: set[str] = set()
    for registry, name in types:
        if not isinstance(name, str) or registered(name, registry) not in registry:
            return None
        for kind in registry.get(registered(name, registry)).__mro__:
            own = kind.__name__ in ("SRModel", "BaseModel", "PairedImageDataset")
            if own or kind.__module__.split(".")[0] in ("mlrn_arch", "torch", "typing", "builtins"):
                continue
            source = inspect.getsource(sys.modules[kind.__module__])
            words.update(re.findall(r"""['"](\w+)['"]""", source))
    return words


def _numbers_as_text(opt: Any, where: str = "") -> Iterator[str]:
    """YAML 1.1 takes `5e-4` for text; the optimizer would find out in a traceback."""
    if isinstance(opt, dict):
        for key, value in opt.items():
            yield from _numbers_as_text(value, f"{where}:{key}" if where else str(key))
    elif isinstance(opt, list):
        for value in opt:
            yield from _numbers_as_text(value, where)
    elif isinstance(opt, str) and is_number(opt) and not where.endswith("name"):
        yield f"{where}: {opt} is text to YAML; write {float(opt)!r} or !!float {opt}"
