"""Networks by name: the shipped ones, and whatever BasicSR's registry can build."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY, Registry

from mlrn_arch import archs, checkpoints  # noqa: F401 (archs registers the networks)
from mlrn_arch.archs.tile import OnTile
from mlrn_arch.errors import UserError, first_line, unknown
from mlrn_arch.shipped import info

Options = dict[str, Any]


def create_model(name: str, pretrained: bool = False, **arguments: Any) -> torch.nn.Module:
    """Build one of the paper's networks, (n, 3, h, w) in [0, 1] -> (n, 3, h * scale, w * scale).

    Args:
        name: `MLRN_x2`, `MLRN_x3`, `MLRN_x4` or `MLRN_NTIRE_x4`; else `ValueError` is raised.
        pretrained: Whether to load the shipped weights.
        arguments: Arguments of `MLRN` that differ from the named network's; `UserError` if it has
            none of that name, or the weights do not fit. `img_range` may be any.

    Returns the network on the CPU, in evaluation mode.
    """
    known = info(name)
    network, arguments = build({**known["network_g"], **arguments})
    if pretrained:
        checkpoints.load(network, known["file"], arguments=arguments)
    return network.eval()


def build(network_g: Options, where: str = "network_g") -> tuple[torch.nn.Module, Options]:
    """Build the network of a section; returns it and all its arguments, the defaults included."""
    network = make(where, ARCH_REGISTRY, network_g)
    arguments = {key: value for key, value in network_g.items() if key != "type"}
    bound = inspect.signature(type(network)).bind(**arguments)
    bound.apply_defaults()
    return network, bound.arguments


def make(where: str, registry: Registry, opt: Options, others: Options | None = None) -> Any:
    """Make what a section names by `type`, with `others` as arguments; `UserError` if it cannot."""
    if faults := list(check_call(where, registry, opt, others)):
        raise UserError("; ".join(faults))
    arguments = {**opt, **(others or {})}
    kind = registered(arguments.pop("type"), registry)
    try:
        return registry.get(kind)(**arguments)
    except Exception as error:  # a class may refuse its arguments in any way
        raise UserError(f"{where}: {kind} refuses these arguments: {first_line(error)}") from None


def input_channels(network: torch.nn.Module, arguments: Options | None = None) -> int | None:
    """Channels of the images that a network takes; None if neither it nor its arguments say."""
    arguments = arguments or {}
    # The first convolution may see more channels, behind a pixel-unshuffle.
    for key in ("num_in_ch", "in_chans", "in_channels", "input_channels"):
        if key in arguments:
            return arguments[key]
    if isinstance(network, OnTile):
        return network.channels
    convolutions = (m for m in network.modules() if isinstance(m, torch.nn.Conv2d))
    return next((m.in_channels for m in convolutions), None)


def registered(kind: Any, registry: Registry) -> Any:
    """The name under which BasicSR finds `kind`: its own for what Real-ESRGAN registers too."""
    own = f"{kind}_basicsr"
    return own if own in registry and kind not in registry else kind


def check_call(
    where: str, registry: Registry, opt: Any, others: Options | None = None
) -> Iterator[str]:
    """Check `type` against a registry and the other keys against what that type takes."""
    kind = opt.get("type") if isinstance(opt, dict) else None
    kind = registered(kind, registry) if isinstance(kind, str) else None
    if kind not in registry:
        yield f"{where}:type: {unknown(kind, registry.keys())}"
        return
    parameters = inspect.signature(registry.get(kind)).parameters.values()
    given = {**(others or {}), **{k: v for k, v in opt.items() if k != "type"}}
    ours = registry.get(kind).__module__.startswith("mlrn_arch.archs.")
    names = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in given.keys() - names - (others or {}).keys():
            yield f"{where}: {kind} takes no {unknown(key, names)}".replace(" unknown", "")
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name in names - given.keys():
            yield f"{where}: {kind} needs {parameter.name}"
        value = given.get(parameter.name, parameter.default)
        is_size = parameter.annotation in ("int", "int | None") and value is not parameter.default
        if ours and is_size and (type(value) is not int or value < 1):
            yield f"{where}: {parameter.name} must be a positive integer, not {value!r}"
