"""Checkpoints of any form: read without running code in them, chosen from, loaded, recognised."""

from __future__ import annotations

import functools
import inspect
import io
import json
import math
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from mlrn_arch.errors import UserError, first_line
from mlrn_arch.machine import need
from mlrn_arch.shipped import PREFIX, info

SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors")
StateDict = dict[str, torch.Tensor]
EMA = "params_ema"  # these weights are validated, so they are the default everywhere
WRAPPERS = r"^(module\.|_orig_mod\.)+|_orig_mod\."


def resolve(path: str) -> str:
    """The file of a checkpoint: `mlrn://NAME` is a shipped one, `~` the home folder."""
    if not path.startswith(PREFIX):
        return os.path.expanduser(path)
    try:
        return info(path)["file"]
    except ValueError as error:
        raise UserError(str(error)) from None


def read(path: str) -> dict[str, Any]:
    """Load a checkpoint onto the CPU as it is: a `torch.save` or safetensors file, or mlrn://NAME.

    Raises `UserError` if there is no such file, or it is no checkpoint.
    """
    file, kind = resolve(path), "PyTorch checkpoint"
    if file.endswith(".safetensors"):
        kind = "safetensors file"
        need(f"reading {path}", "safetensors")
    try:
        status = os.stat(file)
        checkpoint = _read(file, status.st_mtime_ns, status.st_size)
    except FileNotFoundError:
        raise UserError(f"no such file {path}") from None
    except Exception as error:  # torn, foreign or unsafe: torch reports these in many ways
        # What unpickling found comes after advice to load the file unsafely.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip() or first_line(error)
        reason = reason.splitlines()[0].split(". ")[0]
        raise UserError(f"{path} is no whole {kind} ({reason})") from None
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds no state dict; give a checkpoint of the network")
    return checkpoint


@functools.lru_cache(maxsize=2)  # a training's own checkpoint and its teacher's
def _read(file: str, modified: int, size: int) -> Any:
    if not file.endswith(".safetensors"):
        return torch.load(file, "cpu", weights_only=True)
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        noted = (opened.metadata() or {}).get("network_g")
    return note(state, json.loads(noted)) if noted else state


def state_dict(
    checkpoint: dict[str, Any],
    key: str | None = None,
    path: str = "the checkpoint",
    notes: list[str] | None = None,
) -> StateDict:
    """The weights in a checkpoint: those under `key`, else the EMA weights. All verbs go by this.

    A checkpoint is `{"params": ..., "params_ema": ...}` as BasicSR saves it, a bare state dict, or
    one under any other key. As in BasicSR, one without `key` gives its `params`. `module.`
    (DataParallel) and `_orig_mod.` (torch.compile) are taken off the names. `path` is for messages;
    `notes` gets a line for each choice.

    Raises `UserError` for no state dict, several under unknown keys, NaN or infinity.
    """
    notes = [] if notes is None else notes
    kinds = [name for name, value in checkpoint.items() if _is_state(value)]
    listed = ", ".join(map(str, kinds))
    taken = next((k for k in (key or EMA, "params", EMA) if k in checkpoint), None)
    if taken is None and not _is_state(checkpoint):
        if len(kinds) > 1:
            raise UserError(f"{path} holds the weights {listed}; choose by path:param_key_g")
        taken = next(iter(kinds), None)
    elif len(kinds) > 1:
        notes.append(f"{path}: took {taken}; path:param_key_g chooses among {listed}")
    state = checkpoint if taken is None else checkpoint[taken]
    if not _is_state(state):
        raise UserError(f"{path} holds no state dict; give a checkpoint of the network")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinity; take an earlier checkpoint")
    bare = OrderedDict((re.sub(WRAPPERS, "", name), tensor) for name, tensor in state.items())
    if bare.keys() == state.keys():
        return state
    notes.append(f"{path}: took module. or _orig_mod. off the names of the tensors")
    vars(bare)["_metadata"] = getattr(state, "_metadata", {})
    return bare


def _is_state(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else ()
    return len(values) > 0 and all(isinstance(v, torch.Tensor) for v in values)


def load(
    network: torch.nn.Module,
    path: str,
    key: str | None = None,
    strict: bool = True,
    arguments: dict[str, Any] | None = None,
    convert: bool = True,
) -> list[str]:
    """Load a checkpoint into a network, in place; all weights go through here.

    Args:
        strict: Whether all tensors must be there. Those that are must fit in any case.
        arguments: The network's, to compare with what the checkpoint notes; see `networks.build`.
        convert: Whether MLRN's weights of another image range are converted, or refused.

    Returns a line for each choice, conversion and tensor left out. Raises `UserError` if there is
    no such checkpoint, or it is of another network.
    """
    notes: list[str] = []
    state, own = state_dict(read(path), key, path, notes), network.state_dict()
    kind = type(network).__name__

    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    shapes = [
        f"{k} ({tuple(state[k].shape)} in the file, {tuple(own[k].shape)} in the network)"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    problems = {"it lacks ": missing, "the network has no ": extra, "other shapes: ": shapes}
    misfit = "; ".join(
        what + ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4)
        for what, names in problems.items()
        if names
    )
    if shapes or (misfit and strict) or (own and len(missing) == len(own)):
        raise UserError(f"{path} is not a checkpoint of this {kind}: {misfit}")
    if misfit:
        notes.append(f"{path} does not fit whole (strict_load is false): {misfit}")

    ours = arguments or {"img_range": getattr(network, "img_range", None)}
    parameters = inspect.signature(type(network)).parameters.values()
    theirs = {p.name: p.default for p in parameters if p.default is not p.empty} | noted(state)
    differing = [k for k in ours if _plain(ours[k]) != _plain(theirs.get(k, ours[k]))]
    if theirs.get("type") != kind:  # nothing is noted
        differing = []
    convert = convert and kind == "MLRN" and "img_range" in differing
    if convert:
        differing.remove("img_range")
    if differing and strict:  # though the tensors fit: the output would be nonsense
        its, has = (", ".join(f"{k}: {of[k]}" for k in differing) for of in (theirs, ours))
        raise UserError(f"{path} is of a network with {its}, and this one has {has}")
    network.load_state_dict(state, strict=strict)
    if convert:
        convert_range(network, theirs["img_range"])
        ranges = f"{theirs['img_range']:g} to {ours['img_range']:g}"
        notes.append(f"{path}: converted from img_range {ranges}")
    return notes


def _plain(value: Any) -> Any:
    """A value with lists for tuples, which YAML and JSON do not know."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


@torch.no_grad()
def convert_range(network: torch.nn.Module, img_range: Any) -> None:
    """Make MLRN's weights, which belong to `img_range`, the same function in its own range."""
    ratio = img_range / network.img_range
    for name, parameter in network.named_parameters():
        if name == "conv_first.weight":
            parameter.mul_(ratio)
        elif name.startswith("upsampler."):
            parameter.div_(ratio)


def note(state: StateDict, network_g: dict[str, Any]) -> OrderedDict:
    """A copy of a state dict that notes its network in `_metadata`.

    PyTorch saves and loads this attribute, and strict loading ignores what it does not know there.
    """
    copy, before = OrderedDict(state), getattr(state, "_metadata", {})
    root = {"version": 1, **before.get("", {}), "network_g": dict(network_g)}
    vars(copy)["_metadata"] = {**before, "": root}
    return copy


def save(content: dict[str, Any], path: Path) -> None:
    """`torch.save`, but a full disk is an `OSError`; torch tells it in other errors."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getbuffer())


def noted(state: StateDict) -> dict[str, Any]:
    """The section `network_g` that `note` left in a state dict; empty where there is none."""
    return dict(getattr(state, "_metadata", {}).get("", {}).get("network_g") or {})


def deduce(checkpoint: dict[str, Any], path: str = "the checkpoint") -> dict[str, Any]:
    """The section `network_g` of the network that a checkpoint is of.

    Checkpoints of `mlrn train` and `mlrn export` note it. Any other must be MLRN's, or `ValueError`
    is raised: its shapes tell most arguments. `act` and `bilinear` are the defaults then, and
    `img_range` is 255 for the challenge's form (50 features, 4 blocks) and 1 for all others.
    """
    state = state_dict(checkpoint, path=path)
    if network_g := noted(state):
        return network_g
    try:
        num_feat, num_in_ch = state["conv_first.weight"].shape[:2]
        esa_feat = len(state["body.0.esa.conv_f.weight"])
        out = len(state["upsampler.0.weight"])
    except KeyError as error:
        raise ValueError(f"it is no MLRN (no {error.args[0]})") from None
    num_block = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("body."))
    # The output has num_out_ch * upscale**2 channels; as many colours as come in, if that fits.
    num_out_ch = next((c for c in (num_in_ch, 3, 1) if math.isqrt(out // c) ** 2 * c == out), out)
    kinds = {"depthwise": "convmix", "pointwise": "pointwise"}
    mixer = next((kinds[k] for k in kinds if f"body.0.mixer.{k}.weight" in state), "none")
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
