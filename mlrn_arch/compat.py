"""Repairs of BasicSR 1.4.2 for today's Python, PyTorch and torchvision, each with its reason.

No other file replaces anything in BasicSR. Importing this module applies the repairs that every
user of BasicSR needs; `run_pipeline` adds those of one run of the train or test pipeline.
`.build_basicsr/` repairs the building of BasicSR on Python 3.13.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import importlib.util
import logging
import sys
import traceback
import types
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torchvision.transforms.functional as tv_functional
from PIL import Image, PngImagePlugin
from torch import nn

# Large photographs, and profiles and prompts of some MB, are no attack here.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28

# torchvision 0.17 removed this module; BasicSR's degradations.py imports one function from it.
_NAME = "torchvision.transforms.functional_tensor"
if _NAME not in sys.modules and importlib.util.find_spec(_NAME) is None:
    _shim = types.ModuleType(_NAME)
    _shim.__spec__ = importlib.machinery.ModuleSpec(_NAME, None)  # for find_spec by others
    vars(_shim)["rgb_to_grayscale"] = tv_functional.rgb_to_grayscale
    sys.modules[_NAME] = _shim

try:
    with warnings.catch_warnings():
        # niqe.py imports from scipy.ndimage.filters, which SciPy 1 keeps but warns about.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*scipy.ndimage")
        import basicsr  # noqa: F401
except ModuleNotFoundError as _error:
    if _error.name != "basicsr.version":
        raise
    _file = getattr(importlib.util.find_spec("basicsr"), "origin", None)
    raise ImportError(
        f"{_file} belongs to a clone of BasicSR that was never installed, so its version.py is "
        "missing; run `pip install --no-build-isolation -e .` in the clone, or remove the clone "
        "from the import path"
    ) from None

from basicsr import utils  # noqa: E402
from basicsr.data import prefetch_dataloader  # noqa: E402
from basicsr.models.base_model import BaseModel  # noqa: E402
from basicsr.utils.dist_util import master_only  # noqa: E402
from basicsr.utils.registry import Registry  # noqa: E402

from mlrn_arch import checkpoints  # noqa: E402
from mlrn_arch.errors import UserError, first_line  # noqa: E402

# BasicSR 1.4 moved these; HAT and other plugins of 1.3 still import them from the old place.
for _name in ("bgr2ycbcr", "rgb2ycbcr", "ycbcr2bgr", "ycbcr2rgb"):
    setattr(utils.matlab_functions, _name, getattr(utils.color_util, _name))

_model_to_device = BaseModel.model_to_device
_do_register = Registry._do_register


def _register(self: Registry, name: str, obj: Any, suffix: str | None = None) -> None:
    """Register; another package's class replaces ours of the same name. BasicSR refuses both."""
    full = f"{name}_{suffix}" if isinstance(suffix, str) else name
    known = self._obj_map.get(full)
    own = [getattr(o, "__module__", "").partition(".")[0] == "mlrn_arch" for o in (known, obj)]
    if known is not None and own[0] != own[1]:
        other = obj if own[0] else known
        print(f"{full}: using {other.__module__}, not mlrn_arch", file=sys.stderr)
        self._obj_map[full] = other
    else:
        _do_register(self, name, obj, suffix)


def _load_network(
    self: BaseModel, net: nn.Module, load_path: str, strict: bool = True, param_key: Any = "params"
) -> None:
    """Load a checkpoint of any form that `checkpoints` reads."""
    # BasicSR needs `param_key_g: ~` for a plain state dict (as RLFN and IMDN publish), raises a
    # KeyError with `ema_decay` even then, and does not read safetensors.
    net = self.get_bare_model(net)
    utils.get_root_logger().info(f"Loading {type(net).__name__} model from {load_path}.")
    for note in checkpoints.load(net, load_path, param_key, strict):
        utils.get_root_logger().info(note)


def _model_to_device_cpu(self: BaseModel, net: nn.Module) -> nn.Module:
    """Wrap for distributed training on CPUs too; BasicSR needs a CUDA device."""
    if self.opt["dist"] and self.device.type == "cpu":
        unused = self.opt.get("find_unused_parameters", False)
        return nn.parallel.DistributedDataParallel(net, find_unused_parameters=unused)
    return _model_to_device(self, net)


Registry._do_register = _register
BaseModel.load_network = _load_network
BaseModel.model_to_device = _model_to_device_cpu
if not torch.cuda.is_available():  # BasicSR's own pipeline does not adapt options
    for _module in (prefetch_dataloader, importlib.import_module("basicsr.train")):
        vars(_module)["CUDAPrefetcher"] = lambda data, _: prefetch_dataloader.CPUPrefetcher(data)


def load_state(path: str) -> dict[str, Any]:
    """Load a training state onto the CPU, without running code from it."""
    # BasicSR's MultiStepRestartLR keeps its milestones in a Counter.
    with torch.serialization.safe_globals([Counter]):
        return torch.load(path, map_location="cpu", weights_only=True)


def newest_states(folder: str) -> list[str]:
    """Paths of the training states (`{iter}.state`) in a folder, newest first."""
    states = {int(p.stem): str(p) for p in Path(folder).glob("*.state") if p.stem.isdigit()}
    return [states[iteration] for iteration in sorted(states, reverse=True)]


def _load_resume_state(opt: dict[str, Any]) -> dict[str, Any] | None:
    """Find and load the training state to resume from; None starts a new run.

    BasicSR looks below the current directory whatever the root path, needs a CUDA device, and
    takes the newest file even if a kill left it incomplete.
    """
    wanted = opt["path"].get("resume_state")
    candidates = newest_states(opt["path"]["training_states"]) if opt["auto_resume"] else []
    for path in candidates or ([wanted] if wanted else []):
        network = Path(opt["path"]["models"], f"net_g_{Path(path).stem}.pth")
        try:
            torch.load(network, map_location="cpu", weights_only=True)
            state = load_state(path)
            if not {"iter", "epoch", "optimizers", "schedulers"} <= state.keys():
                raise ValueError("not a training state")
        except Exception as error:  # an incomplete file can fail in any way
            print(f"Skipping {path}: {first_line(error)}", flush=True)
            continue
        opt["path"]["resume_state"] = path
        teachers = {f"param_key_{n[8:]}" for n in opt["path"].get("ignore_resume_networks") or []}
        keys = {key: opt["path"][key] for key in teachers if key in opt["path"]}
        utils.check_resume(opt, state["iter"])
        opt["path"].update(keys)  # which it changes for networks that do not come from this run
        if opt.get("seed_drawn"):
            started_with = state.get("started_with", {})
            opt["manual_seed"] = started_with.get("manual_seed", opt["manual_seed"])
        return state
    if candidates or wanted:
        raise UserError(
            f"no complete training state to resume from: {', '.join(candidates or [wanted])} or "
            f"its network in {opt['path']['models']} cannot be read; restore one, or move the "
            "experiment away to start a new run"
        )
    return None


class _MessageLogger(utils.MessageLogger):
    """BasicSR's logger, with lr in TensorBoard and no negative time left at the last step."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.max_iters += 1

    def __call__(self, log_vars: dict[str, Any]) -> None:
        if self.tb_logger:
            self.tb_logger.add_scalar("lr", log_vars["lrs"][0], log_vars["iter"])
        super().__call__(log_vars)


@master_only
def _tb_logger(log_dir: str, purge_step: int) -> Any:
    """BasicSR's `init_tb_logger`; what a killed run logged from `purge_step` on is forgotten."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(log_dir, purge_step=purge_step)


def run_pipeline(
    phase: str, opt: dict[str, Any], args: argparse.Namespace, notes: list[str], **replaced: Any
) -> None:
    """Run BasicSR's own `train_pipeline` or `test_pipeline` on options already read.

    BasicSR copies the file `args.opt` into the experiment, and the log begins with `notes`.
    `replaced` are attributes of the pipeline's module, which at the end is as it was before.
    """
    pipeline: Any = importlib.import_module(f"basicsr.{phase}")
    patched = patch.dict(vars(pipeline), replaced)
    patched.start()
    # BasicSR's parse_options uses PyYAML's unsafe loader and executes `--force_yml` keys.
    pipeline.parse_options = lambda root_path, is_train: (opt, args)

    def begin_log() -> str:  # the log file is open from here on
        logger = utils.get_root_logger()
        for handler in logger.handlers:
            if phase == "test" and type(handler) is logging.StreamHandler:
                # Options and layers, which have many lines, go to the log file only.
                handler.addFilter(lambda r: r.levelno > logging.INFO or "\n" not in r.getMessage())
        for note in notes:
            logger.info(note)
        return utils.get_env_info()

    pipeline.get_env_info = begin_log
    if phase == "train":
        # With several validation sets it warns that "only" SRModel takes them; SRModel's kinds do.
        logging.getLogger("basicsr").addFilter(lambda r: "*only* supported" not in r.getMessage())

        def load_resume_state(opt: dict[str, Any]) -> dict[str, Any] | None:
            state = _load_resume_state(opt)
            if state:
                pipeline.init_tb_logger = partial(_tb_logger, purge_step=state["iter"] + 1)
            return state

        pipeline.load_resume_state = load_resume_state
        pipeline.MessageLogger = _MessageLogger
        # After a resume BasicSR steps the schedule before the first optimizer step.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    try:
        getattr(pipeline, f"{phase}_pipeline")(opt["root_path"])
    except BaseException as error:
        # Ends the loader's workers, for which Python would wait at exit.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, UserError):  # a worker's comes wrapped in a traceback
            raise UserError(str(error).rpartition("UserError: ")[2]) from None
        raise
    finally:
        patched.stop()
    if opt["dist"]:
        torch.distributed.destroy_process_group()
