"""What a user may name as a network: a shipped name, an option file, a class or a checkpoint."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass
from typing import Any

import yaml
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from mlrn_arch import checkpoints
from mlrn_arch.errors import UserError, first_line
from mlrn_arch.machine import need
from mlrn_arch.networks import Options, build, check_call, registered
from mlrn_arch.option_files import load_yaml, parse
from mlrn_arch.shipped import PREFIX, info, names, option_files

FORMS = """NETWORK is one of
  x4, MLRN_x4, mlrn://x4, NTIRE_x4   a shipped network (`mlrn weights` lists them)
  FILE.yml                           the network_g of an option file, with its pretrain_network_g;
                                     mlrn://baselines/test_RLFN_x4 is one that comes with the
                                     package (`mlrn options` lists them)
  NAME, NAME:ARG=VALUE,ARG=VALUE     a network that BasicSR knows: EDSR:num_in_ch=3,num_out_ch=3, or
                                     in quotes 'SwinIR:depths=[6,6],num_heads=[6,6],embed_dim=60,
                                     window_size=8,upsampler=pixelshuffledirect'; its scale is 4
                                     unless the argument upscale (or scale) says otherwise
  FILE.pth, FILE.safetensors         a checkpoint of `mlrn train` or `mlrn export`, or of any MLRN
The first three may be followed by a checkpoint, as in FILE.yml:net.pth or x4:net.pth, which
replaces the network's own. EMA weights are used where a checkpoint has them, unless
path:param_key_g of FILE.yml says otherwise."""


@dataclass
class Source:
    """A network that a user named, and how its option file loads the checkpoint."""

    name: str  # as it was named, without the checkpoint
    network_g: Options
    checkpoint: str | None = None
    file: str | None = None  # the option file it came from
    scale: int | None = None  # output size over input size, as far as it is known
    param_key: str | None = None
    strict: bool = True


def split(text: str) -> tuple[str, str | None]:
    """`NETWORK[:CHECKPOINT]` -> the network, and the checkpoint or None."""
    match = re.fullmatch(
        rf"(?i)({PREFIX}[\w/]+(?:\.ya?ml)?|.+?\.ya?ml|\w+(?::\w+=[^:]*)?)(?::(.+))?", text
    )
    return (match[1], match[2]) if match else (text, None)


def find(source: str | None, weights: str | None = None, upscale: int = 4) -> Source:
    """Find out which network the user means, without building it; else raise `UserError`.

    Args:
        source: In one of `FORMS`; None for the network that `weights` are of.
        weights: A checkpoint in place of the network's own. With a shipped network's name it may
            be of any MLRN of that scale.
        upscale: The scale of a network by its name that takes one but is given none.
    """
    name, checkpoint = split(source) if source is not None else (None, None)
    checkpoint = weights or checkpoint
    if name is None or (name.endswith(checkpoints.SUFFIXES) and not checkpoint):
        file = checkpoint or name or ""
        return _of_checkpoint(name or file, file)
    if f"MLRN_{name.removeprefix(PREFIX).removeprefix('MLRN_')}" in names():
        shipped = info(name)
        network_g, scale = shipped["network_g"], shipped["network_g"]["upscale"]
        if not checkpoint:
            return Source(name, network_g, shipped["file"], scale=scale)
        found = _of_checkpoint(name, checkpoint)
        if found.scale != scale:
            raise UserError(f"{checkpoint} is of an x{found.scale} network, not x{scale}")
        return found
    shipped_file = name.startswith(PREFIX) and name.removeprefix(PREFIX) in option_files()
    if shipped_file or name.lower().endswith((".yml", ".yaml")):
        opt = load_yaml(name)
        if not isinstance(opt.get("network_g"), dict):
            raise UserError(f"{name} has no section network_g, so there is no network in it")
        path, network_g = opt.get("path") or {}, opt["network_g"]
        how = path.get("param_key_g"), path.get("strict_load_g", True)
        checkpoint = checkpoint or path.get("pretrain_network_g")
        return Source(name, network_g, checkpoint, name, opt.get("scale"), *how)
    if name.startswith(PREFIX) or re.fullmatch(r"x\d+", name):
        raise UserError(
            f"nothing that comes with the package is named {name!r}; there are the networks "
            f"{', '.join(names())} and the option files of `mlrn options`"
        )
    network_g = _by_name(name, upscale)
    scale = network_g.get("upscale", network_g.get("scale", upscale))
    return Source(name, network_g, checkpoint, scale=scale)


def load(source: str | Source | None, weights: str | None = None) -> tuple[nn.Module, Options]:
    """Build a network, in evaluation mode on the CPU, with its weights; and its `network_g`.

    Takes what `find` takes, or what it returned. Prints choices and conversions on stderr. Raises
    `UserError` if there is no such network, or its weights are missing or do not fit.
    """
    found = source if isinstance(source, Source) else find(source, weights)
    network, arguments = build(found.network_g, f"{found.name}: network_g")
    network.eval().requires_grad_(False)
    if found.checkpoint is not None:
        how = found.param_key, found.strict, arguments
        for note in checkpoints.load(network, found.checkpoint, *how):
            print(f"note: {note}", file=sys.stderr)
    elif any(True for _ in network.parameters()):
        raise UserError(f"{found.name} names no checkpoint; write {found.name}:CHECKPOINT")
    return network, found.network_g


def load_teacher(source: str, upscale: int) -> nn.Module:
    """Load a network for RGB in [0, 1]: one of `FORMS`, or a checkpoint that spandrel knows."""
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
    except Exception as error:  # spandrel refuses in many ways
        raise UserError(f"{reason}; nor does spandrel know it ({first_line(error)})") from None
    if not isinstance(found, ImageModelDescriptor) or found.input_channels != 3:
        raise UserError(f"{source} is a network that does not enlarge RGB images")
    return _Described(found).eval().requires_grad_(False)


class _Described(nn.Module):
    """A network of spandrel's, which pads images for it and clamps its output."""

    def __init__(self, descriptor: Any) -> None:
        super().__init__()
        self.network, self.descriptor = descriptor.model, descriptor

    def forward(self, x: Tensor) -> Tensor:
        return self.descriptor(x).clone()  # made in inference mode, which no loss can use


def _by_name(text: str, upscale: int) -> Options:
    """`NAME:ARG=VALUE` as a section network_g with its scale, and the window for `SwinIRModel`."""
    kind, _, arguments = text.partition(":")
    try:
        section = {**parse("{" + arguments.replace("=", ": ") + "}")}
    except (yaml.YAMLError, ValueError):
        raise UserError("write arguments as NAME:ARG=VALUE,ARG=VALUE") from None
    section["type"] = registered(kind, ARCH_REGISTRY)
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
    """The network that a checkpoint notes, or the MLRN that its tensors have the shapes of."""
    checkpoint = checkpoints.read(path)
    try:
        network_g = checkpoints.deduce(checkpoint, path)
    except ValueError as error:
        file = _file_for(checkpoints.state_dict(checkpoint))
        way = f"as NETWORK give {file}:{path}" if file else "name its option file as well"
        raise UserError(f"{path}: {error}; {way}") from None
    return Source(name, network_g, path, scale=network_g.get("upscale"))


def _file_for(state: checkpoints.StateDict) -> str | None:
    """The option file of the package whose network has the tensors of a foreign checkpoint."""
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for name in option_files():
        if name.startswith("baselines/test_"):
            network, _ = build(load_yaml(PREFIX + name)["network_g"])
            if {k: v.shape for k, v in network.state_dict().items()} == shapes:
                return PREFIX + name
    return None
