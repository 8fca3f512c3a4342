"""Compare networks: parameters, mult-adds, activations, convolutions, memory and runtime.

The input has the output's size over the scale, 320x180 for x4.

{counts}

On a GPU "peak MiB" is what torch's allocator measures.

Times are of one forward pass, batch 1. Networks and back ends take turns.
ms           median over the rounds, with the fastest and the slowest
to eager     ratio to plain PyTorch (eager): median of the ratios within a round
ratio        the same, to the first network by the same back end
Without --precision a back end chooses: fp16 on a GPU, bf16 on a CPU that computes in it, else fp32.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlrn_arch import machine, networks, sources
from mlrn_arch.errors import UserError, first_line
from mlrn_arch.inference import backends, counting
from mlrn_arch.machine import DTYPES

__doc__ = __doc__.format(counts=counting.__doc__.partition("\n\n")[2].strip())

COLUMNS = {  # key, unit, digits
    "params M": ("parameters", 1e6, 3),
    "mult-adds G": ("mult_adds", 1e9, 2),
    "FLOPs G": ("flops", 1e9, 2),
    "acts M": ("activations", 1e6, 2),
    "conv": ("convolutions", 1, 0),
    "peak MiB": ("peak_bytes", 2**20, 1),
}
Row = dict[str, Any]  # a network's figures, by the keys of --json
Subject = tuple[nn.Module, tuple[int, ...], Row]  # a network, its input's shape, its figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mlrn profile` on `parser`."""
    add = parser.add_argument
    add("networks", nargs="+", metavar="NETWORK", help="the first is the reference; see below")
    size = parser.add_mutually_exclusive_group().add_argument
    size("--output-size", type=_size, default=(1280, 720), metavar="WxH", help="default: 1280x720")
    size("--input-size", type=_size, metavar="WxH", help="instead; the NTIRE challenge's: 256x256")
    add("--upscale", type=int, default=4, help="where NETWORK names none (default: 4)")
    add("--device", choices=machine.DEVICES, help="default: cuda if there is one")
    add("--precision", choices=DTYPES, help="of weights and input (default: fp32)")
    add("--backend", nargs="+", choices=backends.NAMES, help="time these back ends as well")
    add("--rounds", type=int, default=5, help="turns of each network (default: %(default)s)")
    add("--no-runtime", action="store_true", help="count only")
    add("--json", type=Path, metavar="FILE", help="write all figures, unrounded")
    parser.epilog = f"""examples:
  mlrn profile MLRN RLFN:num_feat=48 EDSR:num_in_ch=3,num_out_ch=3 mlrn://test_MLRN_x2
  mlrn profile NTIRE_x4 --input-size 256x256 --no-runtime

{sources.FORMS}
A checkpoint only says which network it is: weights change no figure, so none need be given."""


def _size(text: str) -> tuple[int, int]:
    """`1280x720` -> (width, height) in pixels."""
    sides = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.lower())
    if not sides:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write WIDTHxHEIGHT as in 1280x720")
    return int(sides[1]), int(sides[2])


def run(args: argparse.Namespace) -> int:
    """Profile the networks and print the tables; returns 0, 1 if some failed, 2 if all did."""
    if args.backend and args.no_runtime:
        raise UserError("--backend measures times, --no-runtime forbids it; give one of them")
    if args.rounds < 1:
        raise UserError("--rounds must be at least 1")
    device, dtype = machine.choose_device(args.device), DTYPES[args.precision or "fp32"]
    faults: list[str] = []
    subjects: list[Subject] = []
    for name in args.networks:
        try:
            subjects.append(_subject(name, args, dtype))
        except UserError as error:
            faults.append(f"{name}: {error}")
    if not args.no_runtime:
        faults += _measure(subjects, device, dtype, args)

    rows = [row for *_, row in subjects]
    if rows:
        _print_counts(rows)
        where = f"{machine.name_of(device)}, torch {torch.__version__}"
        if any("eager_ms" in row for row in rows):
            print(f"\n{where}")
            _print_times(rows, ("eager", *(args.backend or ())))
        if args.json:
            text = json.dumps({"machine": where, "networks": rows}, indent=2)
            args.json.write_text(text + "\n")
    for fault in faults:
        print(f"mlrn profile: {fault}", file=sys.stderr)
    return (1 if rows else 2) if faults else 0


def _subject(name: str, args: argparse.Namespace, dtype: torch.dtype) -> Subject:
    """Build the network that a command-line argument names, and count what it costs."""
    found = sources.find(name, upscale=args.upscale)
    network, values = networks.build(found.network_g)
    network.eval().requires_grad_(False)
    upscale = values.get("upscale", values.get("scale", found.scale or args.upscale))
    if not isinstance(upscale, (int, float)) or upscale <= 0:
        raise UserError(f"scale must be a positive number, not {upscale!r}")
    width, height = args.input_size or (max(1, round(n / upscale)) for n in args.output_size)
    shape = 1, networks.input_channels(network, values) or 3, height, width
    row = {"network": name, "upscale": upscale, "input": f"{width}x{height}"}
    return network, shape, row | counting.count(network, shape, upscale, dtype)


def _measure(
    subjects: Sequence[Subject], device: torch.device, dtype: torch.dtype, args: argparse.Namespace
) -> list[str]:
    """Add times (`eager_ms`, `torch_ms`, ...) and on a GPU memory to all rows; returns faults."""
    faults: list[str] = []
    runs: dict[tuple[int, str], Callable[[], Any]] = {}  # by index of the network, and back end
    torch.backends.cudnn.benchmark = True  # as BasicSR
    with torch.inference_mode(), machine.exact_fp32():
        for index, (network, shape, row) in enumerate(subjects):
            try:
                x = torch.rand(shape, device=device, dtype=dtype)
                network.to(device, dtype)(x)  # cuDNN chooses its algorithms, caches fill
                if device.type == "cuda":
                    row["peak_bytes"] = _peak_bytes(network, x)
            except Exception as error:  # out of memory, or no kernel for this precision
                network.to("cpu")
                faults.append(f"{row['network']}: cannot run on {device}: {first_line(error)}")
                continue
            row["eager_precision"] = args.precision or "fp32"
            runs[index, "eager"] = functools.partial(network, x)
            for name in args.backend or ():
                where = device if name == "torch" else None
                try:
                    backend = backends.load(network, name, where, args.precision or "auto")
                    backend(x)
                except UserError as error:
                    faults.append(f"{row['network']}: {error}")
                    continue
                row[f"{name}_precision"] = backend.precision
                runs[index, name] = functools.partial(backend, x)
        times = counting.times_in_turns(list(runs.values()), args.rounds)
    turns = dict(zip(runs, times, strict=True))
    for (index, way), ms in turns.items():
        row = subjects[index][-1]
        row[f"{way}_ms"] = statistics.median(ms)
        row[f"{way}_ms_min"], row[f"{way}_ms_max"] = min(ms), max(ms)
        for key, other in (("to_eager", (index, "eager")), ("ratio", (next(iter(turns))[0], way))):
            if other in turns:
                pairs = zip(ms, turns[other], strict=True)
                row[f"{way}_{key}"] = statistics.median(a / b for a, b in pairs)
    return faults


def _peak_bytes(network: nn.Module, x: torch.Tensor) -> int:
    """The most that a pass holds on the GPU, without what other networks left there."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    network(x)
    own = [*network.parameters(), *network.buffers(), x]
    return torch.cuda.max_memory_allocated() - before + sum(tensor.nbytes for tensor in own)


def _print_counts(rows: Sequence[Row]) -> None:
    lines = [["network", "scale", "input", *COLUMNS]]
    for row in rows:
        cells = [f"{row[key] / unit:.{digits}f}" for key, unit, digits in COLUMNS.values()]
        lines.append([row["network"], f"x{row['upscale']}", row["input"], *cells])
    _print_columns(lines)


def _print_times(rows: Sequence[Row], ways: Sequence[str]) -> None:
    lines = [["network", "back end", "precision", "ms", "(min - max)", "to eager", "ratio"]]
    keys = "ms", "ms_min", "ms_max", "to_eager", "ratio"
    for way, row in itertools.product(ways, rows):
        if f"{way}_ms" in row:
            ms, least, most, *ratios = (f"{row.get(f'{way}_{key}', math.nan):.2f}" for key in keys)
            cells = way, row[f"{way}_precision"], ms, f"({least} - {most})", *ratios
            lines.append([row["network"], *cells])
    _print_columns(lines)


def _print_columns(lines: Sequence[Sequence[str]]) -> None:
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    form = f"{{:{first}}}" + "".join(f"  {{:>{width}}}" for width in others)
    for line in lines:
        print(form.format(*line))
