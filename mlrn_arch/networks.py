"""A network from a name, an option file or a checkpoint; and the checkpoints that are shipped.

A shipped network is `weights/NAME.pth`, its EMA weights, with `NAME.json`, its origin and scores.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from basicsr.utils.registry import ARCH_REGISTRY, Registry

from mlrn_arch import archs, checkpoints, plugins  # noqa: F401 (archs registers the networks)
from mlrn_arch.checkpoints import FOLDER, PREFIX
from mlrn_arch.errors import UserError, first_line
from mlrn_arch.machine import free_memory, need

Options = dict[str, Any]

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


# --- shipped networks ---------------------------------------------------------------------------


def names() -> list[str]:
    """The networks that have a name of their own: `MLRN_x2`, ..., the challenge's one last."""
    return sorted((file.stem for file in FOLDER.glob("*.json")), key=lambda n: ("NTIRE" in n, n))


def info(name: str) -> Options:
    """What is known of a shipped network and its checkpoint.

    Args:
        name: One of `names()`; `mlrn://` and `MLRN_` in front may be there or not.

    Returns:
        `name`; `network_g`, its section of an option file; `recipe`, the stages of its training,
        and `iterations`, of all of them; `inherited`, whose weights it began with, if any; `data`
        and `licence`;
        `scores`, `{set: {PSNR [dB], SSIM}}` on Y by `mlrn test`, and `paper`, the same as the
        paper prints it; `file`, the checkpoint.

    Raises:
        ValueError: No such network.
    """
    name = name.removeprefix(PREFIX)
    full = f"MLRN_{name.removeprefix('MLRN_')}"
    if full not in names():
        raise ValueError(f"no network is named {name!r}; there are {', '.join(names())}")
    known = json.loads((FOLDER / f"{full}.json").read_text(encoding="utf-8"))
    return {"name": full, **known, "file": str(FOLDER / f"{full}.pth")}


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
    known = info(name)
    options = {**known["network_g"], **arguments}
    network = ARCH_REGISTRY.get(options.pop("type"))(**options)
    if pretrained:
        network.load_state_dict(checkpoints.state_dict(checkpoints.read(known["file"])))
    return network.eval()


# --- what the user names ------------------------------------------------------------------------


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


def option_files() -> dict[str, Path]:
    """The option files that come with the package, by name."""
    inside = FOLDER.parent / "option_files"  # of a wheel; a clone has them beside the package
    folder = inside if inside.is_dir() else FOLDER.parents[1] / "options"
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.yml"), key=lambda path: (len(path.parts), path))
    }


def option_file(path: str) -> Path:
    """The option file that is meant: `mlrn://NAME` is one that comes with the package.

    Raises:
        UserError: There is none of that name.
    """
    if not path.startswith(PREFIX):
        return Path(path)
    name, known = path.removeprefix(PREFIX).removesuffix(".yml"), option_files()
    if name not in known:
        raise UserError(
            f"no option file of that name comes with the package: {unknown(name, known)}"
        )
    return known[name]


def usual_file(name: str) -> str:
    """The option file of that name in options/ of the current directory, or the package's."""
    file = f"options/{name}.yml"
    return file if Path(file).is_file() else PREFIX + name


def load_yaml(path: str) -> Options:
    """Read an option file, and import what its key `import` names; nothing else in it is run.

    Raises:
        UserError: No such file, not YAML, not a mapping, or it holds a Python tag.
    """
    try:
        opt = yaml.safe_load(option_file(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"there is no option file {path} here; `mlrn options` lists those that come with the "
            "package, which -opt takes as mlrn://NAME"
        ) from None
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
    plugins.register(opt.get("import") or [])
    return opt


def is_number(text: str) -> bool:
    """Whether a text is a number that YAML 1.1 does not take for one, such as 5e-4."""
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text) is not None


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


# --- building -----------------------------------------------------------------------------------


def build(network_g: Options, where: str = "network_g") -> tuple[torch.nn.Module, Options]:
    """Build the network of a section; returns it and all its arguments, the defaults included.

    Raises:
        UserError: There is no such network, or it refuses its arguments.
    """
    if faults := list(check_call(where, ARCH_REGISTRY, network_g)):
        raise UserError("; ".join(faults))
    network = make(where, ARCH_REGISTRY, network_g)
    arguments = {key: value for key, value in network_g.items() if key != "type"}
    bound = inspect.signature(type(network)).bind(**arguments)
    bound.apply_defaults()
    return network, bound.arguments


def make(where: str, registry: Registry, opt: Options) -> torch.nn.Module:
    """Make what a section with a `type` names; `UserError` if that refuses its arguments."""
    arguments = dict(opt)
    kind = registered(arguments.pop("type"), registry)
    room, size = free_memory() // 2, 0

    def weigh(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        nonlocal size  # told before the memory is written to: the system would kill the process
        size += 0 if parameter is None else parameter.nbytes + 3000  # what Python keeps of each
        if size > room:
            raise MemoryError(f"its weights take more than half of the free memory, {room:,} bytes")

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(weigh)
    try:
        return registry.get(kind)(**arguments)
    except Exception as error:  # a class may refuse its arguments in any way
        raise UserError(f"{where}: {kind} refuses these arguments: {first_line(error)}") from None
    finally:
        hook.remove()


def registered(kind: Any, registry: Registry) -> Any:
    """The name under which BasicSR finds `kind`: its own for what Real-ESRGAN registers too."""
    own = f"{kind}_basicsr"
    return own if own in registry and kind not in registry else kind


def unknown(name: Any, known: Any) -> str:
    """`unknown X; did you mean Y?`, or the whole list when nothing is near."""
    folded = {str(k).lower(): k for k in known}
    wanted = str(name).lower()
    near = difflib.get_close_matches(wanted, folded) or [k for k in folded if wanted in k]
    near = [folded[k] for k in near]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(known))}"
    return f"unknown {name!r}; {hint}"


def check_call(
    where: str, registry: Registry, opt: Any, others: Options | None = None
) -> Iterator[str]:
    """Check `type` against a registry and the other keys against what that type takes."""
    kind = registered(opt.get("type"), registry) if isinstance(opt, dict) else None
    if kind not in registry:
        yield f"{where}:type: {unknown(kind, registry.keys())}"
        return
    parameters = inspect.signature(registry.get(kind)).parameters.values()
    given = {**(others or {}), **{k: v for k, v in opt.items() if k != "type"}}
    names = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in given.keys() - set(names) - (others or {}).keys():
            yield f"{where}: {kind} takes no {unknown(key, names)}".replace(" unknown", "")
    for parameter in parameters:
        if parameter.name in names and parameter.default is parameter.empty:
            if parameter.name not in given:
                yield f"{where}: {kind} needs {parameter.name}"


# --- checkpoints --------------------------------------------------------------------------------


def _of_checkpoint(name: str, path: str) -> Source:
    loaded = checkpoints.read(path)
    try:
        network_g = checkpoints.deduce(loaded)
    except (ValueError, UserError) as error:
        raise UserError(f"{path}: {error}; or name an option file") from None
    return Source(name, network_g, path, scale=network_g.get("upscale"), loaded=loaded)
