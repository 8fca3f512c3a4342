"""What a user may name as a network: a shipped name, an option file, a class or a checkpoint."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from basicsr.utils.registry import ARCH_REGISTRY

from mlrn_arch import checkpoints
from mlrn_arch.errors import UserError, first_line
from mlrn_arch.machine import need
from mlrn_arch.networks import Options, build, check_call, registered
from mlrn_arch.option_files import is_number, load_yaml
from mlrn_arch.shipped import PREFIX, info, names

FORMS = """NETWORK is one of
  x4, MLRN_x4, mlrn://x4, NTIRE_x4   a shipped network (`mlrn weights` lists them)
  FILE.yml                           the network_g of an option file, with its pretrain_network_g
  NAME, NAME:ARG=VALUE,ARG=VALUE     what BasicSR knows: EDSR:num_in_ch=3,num_out_ch=3, or in quotes
                                     'SwinIR:depths=[6,6],num_heads=[6,6]'; its scale is 4 unless
                                     the argument upscale (or scale) says otherwise
  FILE.pth, FILE.safetensors         the MLRN of which this checkpoint is
A checkpoint behind any of the first three, as in FILE.yml:net.pth, replaces the network's own: one
of BasicSR, of which EMA weights are taken unless path:param_key_g of FILE.yml says otherwise; a
bare state dict; or mlrn://NAME."""


@dataclass
class Source:
    """A network that a user named.

    Attributes:
        name: As it was named, without the checkpoint.
        network_g: Its section of an option file.
        checkpoint: The file of its weights, or None.
        file: The option file it came from, or None.
        scale: Output size over input size, as far as it is known.
        param_key, strict: How the option file loads its checkpoint.
        loaded: What the checkpoint holds, if it was read already.
    """

    name: str
    network_g: Options
    checkpoint: str | None = None
    file: str | None = None
    scale: int | None = None
    param_key: str | None = None
    strict: bool = True
    loaded: Options | None = None


def split(text: str) -> tuple[str, str | None]:
    """`NETWORK[:CHECKPOINT]` -> the network, and the checkpoint or None."""
    match = re.fullmatch(
        rf"({PREFIX}\w+|.+?\.ya?ml|\w+(?::\w+=[^:]*)?)(?::(.+))?", text, re.IGNORECASE
    )
    return match.groups() if match else (text, None)


def find(source: str | None, weights: str | None = None, upscale: int = 4) -> Source:
    """Find out which network the user means, without building it.

    Args:
        source: In one of `FORMS`; None for the MLRN of which `weights` are.
        weights: A checkpoint in place of the network's own. With a shipped network's name it may
            be of any MLRN of that scale.
        upscale: The scale of a network by its name that takes one but is given none.

    Raises:
        UserError: There is no such network, or it cannot be found in the file.
    """
    name, checkpoint = split(source) if source is not None else (None, None)
    checkpoint = weights or checkpoint
    if name is None or (name.endswith(checkpoints.SUFFIXES) and not checkpoint):
        return _of_checkpoint(name or weights, checkpoint or name)
    if name.lower().endswith((".yml", ".yaml")):
        opt = load_yaml(name)
        if not isinstance(opt.get("network_g"), dict):
            raise UserError(f"{name} has no section network_g, so there is no network in it")
        path, network_g = opt.get("path") or {}, opt["network_g"]
        how = path.get("param_key_g"), path.get("strict_load_g", True)
        checkpoint = checkpoint or path.get("pretrain_network_g")
        return Source(name, network_g, checkpoint, name, opt.get("scale"), *how)
    if name.startswith(PREFIX) or f"MLRN_{name.removeprefix('MLRN_')}" in names() or (
        re.fullmatch(r"x\d+", name)
    ):  # fmt: skip
        try:
            known = info(name)
        except ValueError as error:
            raise UserError(str(error)) from None
        network_g, scale = known["network_g"], known["network_g"]["upscale"]
        if not checkpoint:
            return Source(name, network_g, known["file"], scale=scale)
        found = _of_checkpoint(name, checkpoint)
        if found.scale != scale:
            raise UserError(f"{checkpoint} is of an x{found.scale} network, not x{scale}")
        return found
    network_g = _by_name(name, upscale)
    scale = network_g.get("upscale", network_g.get("scale", upscale))
    return Source(name, network_g, checkpoint, scale=scale)


def load(
    source: str | Source | None, weights: str | None = None
) -> tuple[torch.nn.Module, Options]:
    """Build a network with its weights, EMA weights if the checkpoint has them.

    Args:
        source, weights: As `find` takes them, or what it returned.

    Returns:
        The network, in evaluation mode on the CPU, and its section `network_g`.

    Raises:
        UserError: There is no such network, or its weights are missing or another's.
    """
    found = source if isinstance(source, Source) else find(source, weights)
    network, arguments = build(found.network_g, f"{found.name}: network_g")
    network.eval().requires_grad_(False)
    if found.checkpoint is None:
        if any(True for _ in network.parameters()):
            raise UserError(f"{found.name} names no checkpoint; write {found.name}:CHECKPOINT")
        return network, found.network_g
    loaded = found.loaded or checkpoints.read(found.checkpoint)
    state, fault = checkpoints.fitting(
        found.checkpoint, loaded, network, arguments, found.param_key, found.strict
    )
    if fault:
        raise UserError(fault)
    network.load_state_dict(state, strict=found.strict)
    return network, found.network_g


def load_teacher(source: str, upscale: int) -> torch.nn.Module:
    """Load a network of any kind: one of `FORMS`, or a checkpoint that spandrel knows.

    Args:
        source, upscale: As `find` takes them.

    Returns:
        The network, in evaluation mode on the CPU: (n, 3, h, w) in [0, 1] -> as it enlarges.

    Raises:
        UserError: There is no such network, or neither BasicSR nor spandrel can load it.
    """
    try:
        return load(find(source, upscale=upscale))[0]
    except UserError as error:
        if not source.endswith(checkpoints.SUFFIXES) or split(source)[1]:
            raise
        reason = str(error)
    need(f"{reason}; any other network", "spandrel")
    from spandrel import ImageModelDescriptor, ModelLoader

    try:
        found = ModelLoader("cpu").load_from_file(source)
    except Exception as error:  # spandrel tells what it cannot load in many ways
        raise UserError(f"{reason}; nor does spandrel know it ({first_line(error)})") from None
    if not isinstance(found, ImageModelDescriptor) or found.input_channels != 3:
        raise UserError(f"{source} is a network that does not enlarge RGB images")
    return _Described(found).eval().requires_grad_(False)


class _Described(torch.nn.Module):
    """A network of spandrel's, which it pads images for, and clamps the output of."""

    def __init__(self, descriptor: Any) -> None:
        super().__init__()
        self.network = descriptor.model
        self.descriptor = descriptor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.descriptor(x).clone()  # of what inference mode made no loss has a gradient


def _by_name(text: str, upscale: int) -> Options:
    """`NAME` or `NAME:ARG=VALUE,ARG=VALUE` as a section network_g, with its scale, and with the
    window size, which `SwinIRModel` reads."""
    kind, _, arguments = text.partition(":")
    try:
        given = yaml.safe_load("{" + arguments.replace("=", ": ") + "}")
    except (yaml.YAMLError, ValueError):  # ValueError: 2023-13-01
        raise UserError("write arguments as NAME:ARG=VALUE,ARG=VALUE") from None
    given = {k: float(v) if isinstance(v, str) and is_number(v) else v for k, v in given.items()}
    section = {**given, "type": registered(kind, ARCH_REGISTRY)}
    if section["type"] in ARCH_REGISTRY:
        parameters = inspect.signature(ARCH_REGISTRY.get(section["type"])).parameters
        for key in ("upscale", "scale"):
            if key in parameters:
                section.setdefault(key, upscale)
        window = parameters.get("window_size")
        if window and window.default is not window.empty:
            section.setdefault("window_size", window.default)
    if faults := list(check_call("", ARCH_REGISTRY, section)):
        raise UserError("; ".join(fault.removeprefix(":type").lstrip(": ") for fault in faults))
    return section


def _of_checkpoint(name: str, path: str) -> Source:
    loaded = checkpoints.read(path)
    try:
        network_g = checkpoints.deduce(loaded)
    except (ValueError, UserError) as error:
        raise UserError(f"{path}: {error}; or name an option file") from None
    return Source(name, network_g, path, scale=network_g.get("upscale"), loaded=loaded)
