"""A checkpoint of any form as a state dict, and of which network it is; no code in it is run."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from mlrn_arch.errors import UserError, first_line
from mlrn_arch.machine import need
from mlrn_arch.shipped import FOLDER, PREFIX

SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors")
StateDict = dict[str, torch.Tensor]


def resolve(path: str) -> str:
    """The file of a checkpoint: `mlrn://NAME` is a shipped one, `~` the home folder.

    Raises:
        UserError: Nothing of that name is shipped.
    """
    if not path.startswith(PREFIX):
        return os.path.expanduser(path)
    file = FOLDER / f"MLRN_{path.removeprefix(PREFIX).removeprefix('MLRN_')}.pth"
    if not file.is_file():
        known = ", ".join(sorted(f"{PREFIX}{f.stem[5:]}" for f in FOLDER.glob("*.pth")))
        raise UserError(f"no shipped checkpoint is named {path}; there are {known}")
    return str(file)


def read(path: str) -> dict[str, Any]:
    """Load a checkpoint onto the CPU as it is.

    Args:
        path: A file that `torch.save` wrote, one of safetensors by its ending, or mlrn://NAME.

    Raises:
        UserError: No such file, or it is no checkpoint.
    """
    file = resolve(path)
    safe = file.endswith(".safetensors")
    if safe:
        need(f"reading {path}", "safetensors")
    try:
        checkpoint = _read_safetensors(file) if safe else torch.load(file, "cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such file {path}") from None
    except Exception as error:  # torn, foreign or unsafe: torch tells them in many ways
        # What unpickling found comes after advice to load the file unsafely.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip()
        reason = (reason or first_line(error)).splitlines()[0].split(". ")[0]
        kind = "safetensors file" if safe else "PyTorch checkpoint"
        raise UserError(f"{path} is no whole {kind} ({reason})") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds no state dict; give a checkpoint of the network")
    return checkpoint


def _read_safetensors(file: str) -> StateDict:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        noted = (opened.metadata() or {}).get("network_g")
    return note(state, json.loads(noted)) if noted else state


def state_dict(checkpoint: dict[str, Any], key: str | None = None) -> StateDict:
    """The weights in a checkpoint: EMA weights if it has them, `module.` off.

    Args:
        checkpoint: `{"params": ..., "params_ema": ...}` as BasicSR saves it, a bare state dict, or
            a state dict under any one key (`state_dict`, `model`, ...).
        key: Which of them is wanted; another is taken where that is not there, as in BasicSR.

    Raises:
        UserError: It holds no state dict, or several and none of these names.
    """
    kinds = [key or "params_ema", "params", "params_ema"]
    found = [checkpoint[kind] for kind in kinds if kind in checkpoint][:1]
    if not found and _is_state(checkpoint):
        found = [checkpoint]
    if not found:
        inner = {name: state for name, state in checkpoint.items() if _is_state(state)}
        if len(inner) > 1:
            raise UserError(
                f"it holds the weights {', '.join(map(str, inner))}; choose by path:param_key_g"
            )
        found = list(inner.values())
    if not found or not _is_state(found[0]):
        raise UserError("it holds no state dict; give a checkpoint of the network")
    state = found[0]
    if not any(name.startswith("module.") for name in state):
        return state
    bare = OrderedDict((name.removeprefix("module."), value) for name, value in state.items())
    bare._metadata = getattr(state, "_metadata", {})
    return bare


def _is_state(value: Any) -> bool:
    tensors = isinstance(value, dict) and [isinstance(v, torch.Tensor) for v in value.values()]
    return bool(tensors) and all(tensors)


def fitting(
    path: str,
    checkpoint: dict[str, Any],
    network: torch.nn.Module,
    arguments: dict[str, Any],
    key: str | None = None,
    strict: bool = True,
    where: str = "network_g",
) -> tuple[StateDict, str]:
    """The weights in a checkpoint, and a sentence that says why they do not fit, or nothing.

    Args:
        path: Of the checkpoint, for the sentence.
        arguments: The network's, as `networks.build` returns them.
        key: As `state_dict` takes it.
        strict: Whether all tensors must be there; those that are must fit in any case.
        where: The section of the network, for the sentence.
    """
    try:
        state = state_dict(checkpoint, key)
    except UserError as error:
        return {}, f"{path} {str(error).removeprefix('it ')}"
    own = network.state_dict()

    def some(names: Sequence[str]) -> str:
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    parts = []
    if strict and (missing := [k for k in own if k not in state]):
        parts.append(f"it lacks {some(missing)}")
    if strict and (extra := [k for k in state if k not in own]):
        parts.append(f"the network has no {some(extra)}")
    if other := [
        f"{k} ({tuple(state[k].shape)} in the file, {tuple(own[k].shape)} in the network)"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]:
        parts.append(f"other shapes: {some(other)}")
    name = type(network).__name__
    if parts:
        return state, f"{path} is not a checkpoint of this {name}: {'; '.join(parts)}"
    # Tensors of the same shapes do not tell an img_range, and scores would be nonsense in silence.
    its_own = noted(state)
    parameters = inspect.signature(type(network)).parameters.values()
    its_own = its_own and {**{p.name: p.default for p in parameters}, **its_own}
    wrong = [k for k in its_own if k in arguments and arguments[k] != its_own[k]]
    if not (wrong and strict and its_own.get("type") == name):
        return state, ""
    its, given = (", ".join(f"{k}: {of[k]}" for k in wrong) for of in (its_own, arguments))
    return state, f"{path} is of a network with {its}, and {where} has {given}; make them equal"


def note(state: StateDict, network_g: dict[str, Any]) -> OrderedDict:
    """Note in a state dict which network it is of, where every loader passes it on.

    PyTorch keeps the versions of modules in a state dict's `_metadata`; what is beside them there
    is saved and loaded with it and concerns no strict loading.
    """
    copy = OrderedDict(state)
    copy._metadata = {"": {"version": 1, "network_g": dict(network_g)}}
    return copy


def noted(state: StateDict) -> dict[str, Any]:
    """The section `network_g` that `note` left in a state dict; empty where there is none."""
    return dict(getattr(state, "_metadata", {}).get("", {}).get("network_g") or {})


def deduce(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Find out which network a checkpoint is of.

    One that `mlrn export` wrote says it. Any other must be MLRN's: what its shapes tell is taken
    from them. Of what they do not tell, `act` and `bilinear` are the defaults, and `img_range` is
    255 for the challenge's form (50 features, 4 blocks) and 1 for all others.

    Args:
        checkpoint: As `state_dict` takes it.

    Returns:
        A section `network_g`: `type`, and the arguments of the network.

    Raises:
        ValueError: It says nothing and is not MLRN's.
    """
    state = state_dict(checkpoint)
    if network_g := noted(state):
        return network_g
    try:
        num_feat, num_in_ch = state["conv_first.weight"].shape[:2]
        esa_feat = len(state["body.0.esa.conv_f.weight"])
        out = len(state["upsampler.0.weight"])
    except KeyError as error:
        raise ValueError(f"these are no weights of MLRN: {error}") from None
    num_block = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("body."))
    # The output has num_out_ch * upscale**2 channels; as many colours as come in, if that fits.
    num_out_ch = next((c for c in (num_in_ch, 3, 1) if math.isqrt(out // c) ** 2 * c == out), out)
    mixer = "convmix" if "body.0.mixer.depthwise.weight" in state else "pointwise"
    if "body.0.mixer.pointwise.weight" not in state:
        mixer = "none"
    return {
        "type": "MLRN",
        "num_in_ch": num_in_ch,
        "num_out_ch": num_out_ch,
        "num_feat": num_feat,
        "num_block": num_block,
        "upscale": math.isqrt(out // num_out_ch),
        "esa_feat": esa_feat,
        "img_range": 255.0 if (num_feat, num_block) == (50, 4) else 1.0,
        "mixer": mixer,
        "bilinear": num_in_ch == num_out_ch,
    }
