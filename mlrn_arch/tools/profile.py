"""Compare networks: parameters, mult-adds, activations, convolutions, memory and runtime.

{counts}

On a GPU "peak MiB" is what torch's allocator measures.
ms           one forward pass, batch 1: median over the rounds, with the fastest and the slowest;
             the networks take turns
ratio        to the first network: median of the ratios within a round

With --backend each network runs in plain PyTorch (eager) and by every back end, all in turns. "to
eager" is the ratio to plain PyTorch; "ratio" compares with the first network by the same back end.
Without --precision a back end chooses: fp16 on a GPU, bf16 on a CPU that computes in it, else fp32.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlrn_arch import machine, networks, sources
from mlrn_arch.errors import UserError, first_line
from mlrn_arch.inference import backends, counting
from mlrn_arch.machine import DTYPES

__doc__ = __doc__.format(counts=counting.__doc__.partition("\n\n")[2].strip())

MIB = 2**20
HEADS = "network  scale  input  params M  mult-adds G  FLOPs G  acts M  conv  peak MiB"


@dataclass
class Subject:
    """A network to profile: how the user called it, the module, its input and its figures."""

    name: str
    network: nn.Module
    shape: tuple[int, int, int, int]
    row: dict[str, Any] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mlrn profile` on `parser`."""
    add = parser.add_argument
    add("networks", nargs="+", metavar="NETWORK", help="the first is the reference; see below")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--output-size",
        type=_size,
        default=(1280, 720),
        metavar="WxH",
        help="size of the output; the input is this over the scale, rounded "
        "(default: 1280x720, as in Table 1)",
    )
    size.add_argument(
        "--input-size", type=_size, metavar="WxH", help="size of the input; NTIRE's is 256x256"
    )
    add("--upscale", type=_positive, default=4, help="where NETWORK names none (default: 4)")
    add("--device", choices=machine.DEVICES, help="default: cuda if there is one")
    add("--precision", choices=DTYPES, help="of weights and input (default: fp32)")
    add("--backend", nargs="+", choices=backends.NAMES, help="time these back ends as well")
    add("--rounds", type=_positive, default=5, help="turns of each network (default: %(default)s)")
    add("--no-runtime", action="store_true", help="count only")
    add("--json", type=Path, metavar="FILE", help="write all figures, unrounded")
    parser.epilog = f"""examples:
  mlrn profile MLRN RLFN:num_feat=48 EDSR:num_in_ch=3,num_out_ch=3 mlrn://test_MLRN_x2
  mlrn profile NTIRE_x4 --input-size 256x256 --no-runtime

{sources.FORMS}
A checkpoint only says which network it is: weights change no figure, so none need be given."""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    """`1280x720` -> (width, height) in pixels."""
    sides = text.lower().split("x")
    if len(sides) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write WIDTHxHEIGHT as in 1280x720")
    return _positive(sides[0]), _positive(sides[1])


def run(args: argparse.Namespace) -> int:
    """Profile the networks and print the table; returns 0, 1 if some failed, 2 if all did.

    Raises:
        UserError: Arguments contradict each other, there is no GPU, a file cannot be written.
    """
    if args.backend and args.no_runtime:
        raise UserError("--backend measures times, --no-runtime forbids it; give one of them")
    device, dtype = machine.choose_device(args.device), DTYPES[args.precision or "fp32"]
    faults: list[str] = []
    subjects: list[Subject] = []
    for name in args.networks:
        try:
            subjects.append(_subject(name, args, dtype))
        except UserError as error:
            named = sources.split(name)[0] in str(error) and ".y" in name
            faults.append(str(error) if named else f"{name}: {error}")
    if not args.no_runtime:
        faults += _measure(subjects, device, dtype, args)

    rows = [subject.row for subject in subjects]
    if rows:
        where = f"{machine.name_of(device)}, torch {torch.__version__}"
        if any("time_ms" in row for row in rows):
            print(f"{where}, {args.precision or 'fp32'}")
        _print_table(rows)
        if args.backend:
            print(f"\n{where}")
            _print_backends(rows, args.backend)
        if args.json:
            try:
                text = json.dumps({"machine": where, "networks": rows}, indent=2)
                args.json.write_text(text + "\n")
            except OSError as error:
                raise UserError(f"cannot write {args.json}: {error.strerror}") from None
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
    return Subject(name, network, shape, {**row, **counting.count(network, shape, upscale, dtype)})


# --- runtime ------------------------------------------------------------------------------------


def _measure(
    subjects: Sequence[Subject], device: torch.device, dtype: torch.dtype, args: argparse.Namespace
) -> list[str]:
    """Add the times (and on a GPU the memory) to all rows; returns the faults.

    They are `time_ms` of the network as it is, or with back ends `eager_ms`, `openvino_ms`, ...
    """
    faults: list[str] = []
    plain = "eager" if args.backend else "time"
    runs: list[tuple[int, str, Callable[[], Any]]] = []  # subject, way to run it, one pass
    torch.backends.cudnn.benchmark = True  # as BasicSR
    with torch.inference_mode():
        for index, subject in enumerate(subjects):
            try:
                network = subject.network.to(device, dtype)
                x = torch.rand(subject.shape, device=device, dtype=dtype)
                network(x)  # cuDNN chooses its algorithms, caches fill
                if device.type == "cuda":
                    subject.row["peak_bytes"] = _peak_bytes(network, x)
            except Exception as error:  # out of memory, or no kernel for this precision
                subject.network.to("cpu")
                faults.append(f"{subject.name}: cannot run on {device}: {first_line(error)}")
                continue
            subject.row[f"{plain}_precision"] = args.precision or "fp32"
            runs.append((index, plain, functools.partial(network, x)))
            for name in args.backend or ():
                where = device if name == "torch" else None
                try:
                    way = backends.load(network, name, where, args.precision or "auto")
                    way(x)
                    subject.row[f"{name}_precision"] = way.precision
                    runs.append((index, name, functools.partial(way, x)))
                except UserError as error:
                    faults.append(f"{subject.name}: {error}")
        times = counting.times_in_turns([run for *_, run in runs], args.rounds)
    turns = {(index, way): own for (index, way, _), own in zip(runs, times, strict=True)}
    for (index, way), own in turns.items():
        row = subjects[index].row
        row[f"{way}_ms"] = statistics.median(own)
        row[f"{way}_ms_min"], row[f"{way}_ms_max"] = min(own), max(own)
        for key, other in (("to_eager", (index, "eager")), ("ratio", (runs[0][0], way))):
            if other in turns:
                pairs = zip(own, turns[other], strict=True)
                row[f"{way}_{key}"] = statistics.median(a / b for a, b in pairs)
    return faults


def _peak_bytes(network: nn.Module, x: torch.Tensor) -> int:
    """The most that a pass holds on the GPU, without what other networks left there."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    network(x)
    own = [*network.parameters(), *network.buffers(), x]
    return torch.cuda.max_memory_allocated() - before + sum(tensor.nbytes for tensor in own)


# --- what the user sees -------------------------------------------------------------------------


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    timed = any("time_ms" in row for row in rows)
    lines = [HEADS.split("  ")]
    lines[0] += ["ms", "(min - max)", "ratio"] * timed
    for row in rows:
        line = [row["network"], f"x{row['upscale']}", row["input"]]
        line += [f"{row['parameters'] / 1e6:.3f}", f"{row['mult_adds'] / 1e9:.2f}"]
        line += [f"{row['flops'] / 1e9:.2f}", f"{row['activations'] / 1e6:.2f}"]
        line += [str(row["convolutions"]), f"{row['peak_bytes'] / MIB:.1f}"]
        lines.append(line + _times(row, "time", "ratio") * timed)
    _print_columns(lines)


def _print_backends(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    lines = [["network", "back end", "precision", "ms", "(min - max)", "to eager", "ratio"]]
    for way in ("eager", *names):
        for row in rows:
            if f"{way}_ms" in row:
                line = [row["network"], way, row[f"{way}_precision"]]
                lines.append(line + _times(row, way, "to_eager", "ratio"))
    _print_columns(lines)


def _times(row: dict[str, Any], way: str, *ratios: str) -> list[str]:
    """The cells of one way to run a network: median, spread, and ratios."""
    keys = "ms", "ms_min", "ms_max", *ratios
    ms, low, high, *others = (
        f"{row[f'{way}_{key}']:.2f}" if f"{way}_{key}" in row else "n/a" for key in keys
    )
    return [ms, f"({low} - {high})", *others]


def _print_columns(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join(cells))
