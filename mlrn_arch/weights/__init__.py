"""The shipped checkpoints: `NAME.pth` with the EMA weights, `NAME.json` with origin and scores.

A checkpoint is `{"params": state dict}`, as BasicSR saves and loads it. Where the file is missing,
the network is known but no weights of it are shipped yet.
"""

from __future__ import annotations

import json
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
        `name`; `network_g`, its section of an option file; `iterations` and `recipe`, how it was
        trained; `data` and `licence`; `scores`, `{set: {PSNR [dB], SSIM}}` on Y by `mlrn test`,
        and `paper`, the same as the paper prints it; `file`, the checkpoint, or None.

    Raises:
        ValueError: No such network.
    """
    full = name if name.startswith("MLRN_") else f"MLRN_{name}"
    if full not in names():
        raise ValueError(f"no network is named {name!r}; there are {', '.join(names())}")
    known = json.loads((FOLDER / f"{full}.json").read_text(encoding="utf-8"))
    file = FOLDER / f"{full}.pth"
    return {"name": full, **known, "file": str(file) if file.exists() else None}


def path(name: str) -> str:
    """The file of a shipped checkpoint; a name as `info` takes it, `mlrn://` in front or not.

    Raises:
        ValueError: No such network, or no weights of it are shipped.
    """
    known = info(name.removeprefix(PREFIX))
    if known["file"] is None:
        raise ValueError(f"no weights of {known['name']} are shipped; `mlrn weights` lists them")
    return known["file"]


def create_model(name: str, pretrained: bool = False, **arguments: Any) -> torch.nn.Module:
    """Build one of the paper's networks by name, in evaluation mode.

    Args:
        name: `MLRN_x2`, `MLRN_x3`, `MLRN_x4` or `MLRN_NTIRE_x4`.
        pretrained: Whether to load the shipped weights.
        arguments: Arguments of `MLRN` that differ from the named network's.

    Returns:
        The network: (n, 3, h, w) in [0, 1] -> (n, 3, h * upscale, w * upscale), on the CPU.

    Raises:
        ValueError: No such network, or no weights of it are shipped.
        RuntimeError: `arguments` make another network than the one the weights are of.
    """
    options = {**info(name)["network_g"], **arguments}
    network = ARCH_REGISTRY.get(options.pop("type"))(**options)
    if pretrained:
        network.load_state_dict(torch.load(path(name), weights_only=True)["params"])
    return network.eval()
