"""What BasicSR 1.4.2 needs on today's stack. The only file that replaces anything in BasicSR.

Each repair stands beside its reason. Importing this module applies those that every user of
BasicSR needs; `run_pipeline` adds those that belong to one run of its train or test pipeline.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import traceback
import types
import warnings
from typing import Any

import torch
import torchvision.transforms.functional as tv_functional

# torchvision dropped this module in 0.17; BasicSR's degradations.py takes one function from it.
_NAME = "torchvision.transforms.functional_tensor"
if _NAME not in sys.modules and importlib.util.find_spec(_NAME) is None:
    _shim = types.ModuleType(_NAME)
    _shim.__spec__ = importlib.machinery.ModuleSpec(_NAME, None)  # others' find_spec looks for it
    _shim.rgb_to_grayscale = tv_functional.rgb_to_grayscale
    sys.modules[_NAME] = _shim

try:
    with warnings.catch_warnings():
        # niqe.py imports from scipy.ndimage.filters, which SciPy 1 still offers with a warning.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*scipy.ndimage")
        import basicsr  # noqa: F401
except ModuleNotFoundError as _error:
    if _error.name != "basicsr.version":
        raise
    _clone = importlib.util.find_spec("basicsr").submodule_search_locations[0]
    raise ImportError(
        f"the clone of BasicSR around {_clone} was never installed, so that a "
        "file is missing; run `pip install --no-build-isolation -e .` there or take it off the path"
    ) from None

from basicsr.data import prefetch_dataloader  # noqa: E402
from basicsr.data.prefetch_dataloader import CPUPrefetcher  # noqa: E402
from basicsr.models.base_model import BaseModel  # noqa: E402
from basicsr.utils import (  # noqa: E402
    MessageLogger,
    check_resume,
    color_util,
    get_root_logger,
    matlab_functions,
)
from basicsr.utils.registry import Registry  # noqa: E402

from mlrn_arch import checkpoints  # noqa: E402
from mlrn_arch.errors import UserError, first_line  # noqa: E402

# HAT and other plugins of BasicSR 1.3 take these from where they were until 1.4.
for _name in ("bgr2ycbcr", "rgb2ycbcr", "ycbcr2bgr", "ycbcr2rgb"):
    setattr(matlab_functions, _name, getattr(color_util, _name))

_model_to_device = BaseModel.model_to_device
_do_register = Registry._do_register


def _register(self: Registry, name: str, obj: Any, suffix: str | None = None) -> None:
    """Register; of two by one name, another's goes before this package's. BasicSR refuses both."""
    full = f"{name}_{suffix}" if isinstance(suffix, str) else name
    known = self._obj_map.get(full)
    own = [getattr(o, "__module__", "").partition(".")[0] == "mlrn_arch" for o in (known, obj)]
    if known is not None and own[0] != own[1]:
        other = obj if own[0] else known
        print(f"{full} is {other.__module__}'s, not mlrn_arch's", file=sys.stderr)
        self._obj_map[full] = other
    else:
        _do_register(self, name, obj, suffix)


def _load_network(
    self: BaseModel,
    net: torch.nn.Module,
    load_path: str,
    strict: bool = True,
    param_key: str | None = "params",
) -> None:
    """Load a checkpoint of any form that `checkpoints` knows.

    BasicSR needs `param_key_g: ~` for a plain state dict (RLFN, IMDN, ... publish these), still
    ends in a KeyError with `ema_decay`, and reads no safetensors.
    """
    net = self.get_bare_model(net)
    get_root_logger().info(f"Loading {type(net).__name__} model from {load_path}.")
    state = checkpoints.state_dict(checkpoints.read(load_path), param_key)
    self._print_different_keys_loading(net, state, strict)
    net.load_state_dict(state, strict=strict)


def _model_to_device_cpu(self: BaseModel, net: torch.nn.Module) -> torch.nn.Module:
    """Wrap for distributed training on CPUs too; BasicSR asks for a current CUDA device."""
    if self.opt["dist"] and self.device.type == "cpu":
        return torch.nn.parallel.DistributedDataParallel(
            net, find_unused_parameters=self.opt.get("find_unused_parameters", False)
        )
    return _model_to_device(self, net)


Registry._do_register = _register
BaseModel.load_network = _load_network
BaseModel.model_to_device = _model_to_device_cpu
if not torch.cuda.is_available():  # in BasicSR's own pipeline, which does not adapt options
    for _module in (prefetch_dataloader, importlib.import_module("basicsr.train")):
        _module.CUDAPrefetcher = lambda loader, opt: CPUPrefetcher(loader)


def load_state(path: str) -> dict[str, Any]:
    """Load a training state onto the CPU, without running code from it."""
    from collections import Counter

    # BasicSR's MultiStepRestartLR keeps its milestones in a Counter.
    with torch.serialization.safe_globals([Counter]):
        return torch.load(path, map_location="cpu", weights_only=True)


def newest_states(folder: str) -> list[str]:
    """Paths of the training states (`{iter}.state`) in a folder, newest first."""
    if not os.path.isdir(folder):
        return []
    names = [name for name in os.listdir(folder) if name.endswith(".state")]
    iterations = sorted((int(n[:-6]) for n in names if n[:-6].isdigit()), reverse=True)
    return [os.path.join(folder, f"{iteration}.state") for iteration in iterations]


def _load_resume_state(opt: dict[str, Any]) -> dict[str, Any] | None:
    """Find and load the state to resume from, or None to start anew.

    BasicSR's own looks below the current directory whatever the root path, asks for a CUDA
    device, and takes the newest file even if a kill in the middle of its writing tore it.
    """
    wanted = opt["path"].get("resume_state")
    candidates = newest_states(opt["path"]["training_states"]) if opt["auto_resume"] else []
    for path in candidates or ([wanted] if wanted else []):
        network = os.path.join(
            opt["path"]["models"], f"net_g_{os.path.basename(path)[: -len('.state')]}.pth"
        )
        try:
            torch.load(network, map_location="cpu", weights_only=True)
            state = load_state(path)
            if not {"iter", "epoch", "optimizers", "schedulers"} <= state.keys():
                raise ValueError("it is no training state")
        except Exception as error:  # a torn file can fail in as many ways as there are bytes
            print(f"Passing over {path}: {first_line(error)}", flush=True)
            continue
        opt["path"]["resume_state"] = path
        check_resume(opt, state["iter"])
        return state
    if candidates or wanted:
        raise UserError(
            f"no whole training state to resume from: {', '.join(candidates or [wanted])} cannot "
            f"be read together with their networks in {opt['path']['models']}; restore one, or "
            "move the experiment away to start anew"
        )
    return None


class _MessageLogger(MessageLogger):
    """BasicSR's, with the learning rate in TensorBoard, and no time to go before the last step."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.max_iters += 1

    def __call__(self, log_vars: dict[str, Any]) -> None:
        if self.tb_logger:
            self.tb_logger.add_scalar("lr", log_vars["lrs"][0], log_vars["iter"])
        super().__call__(log_vars)


def run_pipeline(
    phase: str,
    opt: dict[str, Any],
    args: argparse.Namespace,
    notes: list[str],
    **replaced: Any,
) -> None:
    """Run BasicSR's own `train_pipeline` or `test_pipeline` on options that are read already.

    Args:
        phase: `train` or `test`.
        opt: Complete options, as BasicSR's `parse_options` would return them.
        args: The command line; BasicSR copies the file `args.opt` into the experiment.
        notes: What was adapted to this machine; logged below the environment.
        replaced: Names of the pipeline's module and what takes their place.

    Raises:
        UserError: A training image cannot be read.
    """
    pipeline = importlib.import_module(f"basicsr.{phase}")
    for name, replacement in replaced.items():
        setattr(pipeline, name, replacement)
    get_env_info = pipeline.get_env_info
    # Its parse_options reads with PyYAML's unsafe loader and executes `--force_yml` keys.
    pipeline.parse_options = lambda root_path, is_train: (opt, args)
    # The first thing that goes to the log file; before it the logger must not be used.
    pipeline.get_env_info = lambda: "\n".join([get_env_info(), *notes])
    if phase == "train":
        pipeline.load_resume_state = _load_resume_state
        pipeline.MessageLogger = _MessageLogger
        # On a resume BasicSR steps the schedule once before the first optimizer step.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    try:
        getattr(pipeline, f"{phase}_pipeline")(opt["root_path"])
    except BaseException as error:
        # Lets go of the loader, which ends its workers; at exit Python would wait for them.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, UserError):  # out of a worker it comes wrapped in a traceback
            raise UserError(str(error).rpartition("UserError: ")[2]) from None
        raise
    if opt["dist"]:
        torch.distributed.destroy_process_group()
