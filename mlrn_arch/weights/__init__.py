"""The shipped checkpoints: `NAME.pth` with the EMA weights, `NAME.json` with origin and scores.

A checkpoint is `{"params": state dict}`, as BasicSR saves and loads it.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY

FOLDER = Path(__file__).parent
PREFIX = "mlrn://"  # what option files and command lines put before a name


def names() -> list[str]:
    """The networks that have a name of their own: `MLRN_x2`, ..., the challenge's one last."""
    return sorted((file.stem for file in FOLDER.glob("*.json")), key=lambda n: ("NTIRE" in n, n))


def info(name: str) -> dict[str, Any]:
    """What is known of a network and its checkpoint.

    Args:
        name: One of `names()`; `MLRN_` in front may be left out.

    Returns:
        `name`; `network_g`, its section of an option file; `iterations`, of all the option files
        in `recipe`, with which it was trained one after the other; `data` and `licence`;
        `scores`, `{set: {PSNR [dB], SSIM}}` on Y by `mlrn test`, and `paper`, the same as the
        paper prints it; `file`, the checkpoint.

    Raises:
        ValueError: No such network.
    """
    full = name if name.startswith("MLRN_") else f"MLRN_{name}"
    if full not in names():
        raise ValueError(f"no network is named {name!r}; there are {', '.join(names())}")
    known = json.loads((FOLDER / f"{full}.json").read_text(encoding="utf-8"))
    return {"name": full, **known, "file": str(FOLDER / f"{full}.pth")}


def path(name: str) -> str:
    """The file of a shipped checkpoint; a name as `info` takes it, `mlrn://` in front or not.

    Raises:
        ValueError: No such network.
    """
    return info(name.removeprefix(PREFIX))["file"]


def create_model(name: str, pretrained: bool = False, **arguments: Any) -> torch.nn.Module:
    """Build one of the paper's networks by name, in evaluation mode.

    Args:
        name: `MLRN_x2`, `MLRN_x3`, `MLRN_x4` or `MLRN_NTIRE_x4`.
        pretrained: Whether to load the shipped weights.
        arguments: Arguments of `MLRN` that differ from the named network's.

    Returns:
        The network: (n, 3, h, w) in [0, 1] -> (n, 3, h * upscale, w * upscale), on the CPU.

    Raises:
        ValueError: No such network.
        RuntimeError: `arguments` make another network than the one the weights are of.
    """
    options = {**info(name)["network_g"], **arguments}
    network = ARCH_REGISTRY.get(options.pop("type"))(**options)
    if pretrained:
        network.load_state_dict(torch.load(path(name), weights_only=True)["params"])
    return network.eval()


def state_dict(checkpoint: dict[str, Any], key: str | None = None) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint as torch loads it: EMA weights if it has them, `module.` off.

    Args:
        checkpoint: `{"params": ..., "params_ema": ...}` as BasicSR saves it, or a bare state dict.
        key: Which of them instead; `params`, as in BasicSR, where that is not there.
    """
    keys = [key or "params_ema", "params"]
    state = next((checkpoint[k] for k in keys if k in checkpoint), checkpoint)
    if not isinstance(state, dict) or not any(key.startswith("module.") for key in state):
        return state
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def with_arguments(state: dict[str, torch.Tensor], network_g: dict[str, Any]) -> OrderedDict:
    """Note in a state dict which network it is of, where every loader passes it on.

    PyTorch keeps the versions of modules in a state dict's `_metadata`; what is beside them there
    is saved and loaded with it and concerns no strict loading.
    """
    noted = OrderedDict(state)
    noted._metadata = {"": {"version": 1, "network_g": dict(network_g)}}
    return noted


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
    if noted := getattr(state, "_metadata", {}).get("", {}).get("network_g"):
        return dict(noted)
    try:
        num_feat, num_in_ch = state["conv_first.weight"].shape[:2]
        esa_feat = len(state["body.0.esa.conv_f.weight"])
        out = len(state["upsampler.0.weight"])
    except (KeyError, AttributeError) as error:
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
