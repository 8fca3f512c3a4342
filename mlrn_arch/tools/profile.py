"""Compare networks: parameters, mult-adds, activations, convolutions, memory and runtime.

{counts}

Of the other columns, on CUDA "peak MiB" is what torch's allocator measures;
ms           one forward pass, eager, batch 1: median over the rounds, with the fastest and the
             slowest; the networks take turns
ratio        to the first network: median of the ratios within a round

With --backend each network is timed in PyTorch as it is and by every back end, all in turns;
"to eager" is the ratio to the former, and "ratio" that to the first network by the same back end.
A back end without --precision chooses it: bf16 on a CPU that computes in it, fp16 on a GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mlrn_arch import machine, networks, sources
from mlrn_arch.errors import UserError, first_line
from mlrn_arch.inference import backends, counting
from mlrn_arch.machine import DTYPES

__doc__ = __doc__.format(counts=counting.__doc__.strip())

MIB = 2**20
TURN_SECONDS = 0.1  # a turn repeats a network that is faster than this


@dataclass
class Subject:
    """A network to profile: how the user called it, the module, its scale and its input."""

    name: str
    network: nn.Module
    upscale: int
    shape: tuple[int, ...]
    row: dict[str, Any] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mlrn profile` on `parser`."""
    add = parser.add_argument
    add("networks", nargs="+", metavar="NETWORK", help="the first is the reference; see below")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--output-size",
        type=_size,
        metavar="WxH",
        help="size of the output, the input being that over the scale, rounded "
        "(default: 1280x720, as Table 1)",
    )
    size.add_argument(
        "--input-size", type=_size, metavar="WxH", help="size of the input; NTIRE's is 256x256"
    )
    add("--upscale", type=_positive, default=4, help="where NETWORK says none (default: 4)")
    add("--frames", type=_positive, help="for video networks: LR frames in one input")
    add("--device", choices=machine.DEVICES, help="default: cuda if there is one")
    add("--precision", choices=DTYPES, help="of weights and input (default: fp32)")
    add("--backend", nargs="+", choices=backends.NAMES, help="time these back ends as well")
    add("--rounds", type=_positive, default=5, help="turns of each network (default: %(default)s)")
    add("--no-runtime", action="store_true", help="count only")
    add("--json", type=Path, metavar="FILE", help="write all figures, unrounded")
    add("--csv", type=Path, metavar="FILE", help="the same as a table")
    parser.epilog = f"""examples:
  mlrn profile MLRN RLFN:num_feat=48 EDSR:num_in_ch=3,num_out_ch=3 options/test_MLRN_x4.yml
  mlrn profile NTIRE_x4 --input-size 256x256 --no-runtime

{sources.FORMS}
Of a checkpoint the form counts; without one the network is profiled untrained."""


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
        raise UserError("--backend measures, --no-runtime forbids it; give one of them")
    device = machine.choose_device(args.device)

    faults: list[str] = []
    subjects: list[Subject] = []
    for name in args.networks:
        try:
            subject = _subject(name, args)
            subject.row |= {"network": name, "upscale": subject.upscale}
            subject.row |= {"input": "x".join(map(str, (subject.shape[-1], subject.shape[-2])))}
            subject.row |= counting.count(
                subject.network, subject.shape, subject.upscale, DTYPES[args.precision or "fp32"]
            )
        except UserError as error:
            told = sources.split(name)[0] in str(error) and ".y" in name
            faults.append(str(error) if told else f"{name}: {error}")
        else:
            subjects.append(subject)
    if not args.no_runtime:
        faults += _measure(subjects, device, args)

    rows = [subject.row for subject in subjects]
    if rows:
        precision = args.precision or "fp32"
        where = f"{machine.name_of(device)}, torch {torch.__version__}, {precision}"
        _print_table(rows, where)
        if args.backend:
            _print_backends(rows, args.backend, where)
        _write(args, rows, where)
    for fault in faults:
        print(f"mlrn profile: {fault}", file=sys.stderr)
    return (1 if rows else 2) if faults else 0


def _subject(name: str, args: argparse.Namespace) -> Subject:
    """Build the network that a command-line argument names.

    Raises:
        UserError: No such file or network, or arguments that it does not take.
    """
    found = sources.find(name, upscale=args.upscale)
    network, values = networks.build(found.network_g)
    network.eval().requires_grad_(False)
    upscale = values.get("upscale", values.get("scale", found.scale or args.upscale))
    if not isinstance(upscale, (int, float)) or upscale <= 0:
        raise UserError(f"scale must be a positive number, not {upscale!r}")
    channels = networks.input_channels(network, values) or 3
    if args.input_size:
        width, height = args.input_size
    else:
        width, height = (max(1, round(n / upscale)) for n in args.output_size or (1280, 720))
    frames = (args.frames,) if args.frames else ()
    return Subject(name, network, upscale, (1, *frames, channels, height, width))


# --- runtime ------------------------------------------------------------------------------------


def _measure(
    subjects: Sequence[Subject], device: torch.device, args: argparse.Namespace
) -> list[str]:
    """Fill in the times (and on a GPU the memory) of all networks; returns the faults.

    They are `time_ms` of the network as it is, or with back ends `eager_ms`, `openvino_ms`, ...
    """
    faults, ready = [], []
    plain = "eager" if args.backend else "time"
    dtype = DTYPES[args.precision or "fp32"]
    torch.backends.cudnn.benchmark = True  # as BasicSR
    with torch.inference_mode():
        for subject in subjects:
            try:
                network = subject.network.to(device, dtype)
                x = torch.rand(subject.shape, device=device, dtype=dtype)
                _seconds(network, x, 2)  # cuDNN chooses its algorithms, caches fill
                if device.type == "cuda":
                    # The others' weights and cuBLAS's workspaces are there already, and stay.
                    before = torch.cuda.memory_allocated()
                    torch.cuda.reset_peak_memory_stats()
                    _seconds(network, x, 1)
                    own = [*network.parameters(), *network.buffers(), x]
                    peak = torch.cuda.max_memory_allocated() - before
                    subject.row["peak_bytes"] = peak + sum(tensor.nbytes for tensor in own)
            except Exception as error:  # out of memory, or no kernel for this precision
                subject.network.to("cpu")
                faults.append(f"{subject.name}: cannot run on {device}: {first_line(error)}")
                continue
            ways: dict[str, Callable] = {plain: network}
            for name in args.backend or ():
                where = device if name == "torch" else None
                try:
                    ways[name] = backends.load(network, name, where, args.precision or "auto")
                    _seconds(ways[name], x, 1)
                except UserError as error:
                    faults.append(f"{subject.name}: {error}")
            for name, way in ways.items():
                calls = max(1, min(1000, int(TURN_SECONDS / _seconds(way, x, 1))))
                ready.append((subject.row, name, way, x, calls, []))
        for _ in tqdm(range(args.rounds), desc="rounds", disable=None):
            for *_, way, x, calls, turns in ready:
                turns.append(_seconds(way, x, calls) / calls)
    turns_of = {(row["network"], name): turns for row, name, *_, turns in ready}
    for row, name, *_, turns in ready:
        times = [1e3 * seconds for seconds in turns]
        row[f"{name}_ms"] = statistics.median(times)
        row[f"{name}_ms_min"], row[f"{name}_ms_max"] = min(times), max(times)
        first = ready[0][0]["network"]
        for key, reference in (("to_eager", (row["network"], "eager")), ("ratio", (first, name))):
            if reference in turns_of:
                pairs = zip(turns, turns_of[reference], strict=True)
                row[f"{name}_{key}"] = statistics.median(own / other for own, other in pairs)
    return faults


def _seconds(network: Callable[[Tensor], Any], x: Tensor, calls: int) -> float:
    if x.device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            network(x)
        if x.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        network(x)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


# --- what the user sees -------------------------------------------------------------------------


def _print_table(rows: Sequence[dict[str, Any]], where: str) -> None:
    lines = [["network", "scale", "input", "params M", "mult-adds G", "FLOPs G", "acts M", "conv",
              "peak MiB"]]  # fmt: skip
    timed = any("time_ms" in row for row in rows)
    if timed:
        lines[0] += ["ms", "(min - max)", "ratio"]
    for row in rows:
        line = [row["network"], f"x{row['upscale']}", row["input"]]
        line += [f"{row['parameters'] / 1e6:.3f}", f"{row['mult_adds'] / 1e9:.2f}"]
        line += [f"{row['flops'] / 1e9:.2f}", f"{row['activations'] / 1e6:.2f}"]
        line += [str(row["convolutions"]), f"{row['peak_bytes'] / MIB:.1f}"]
        if "time_ms" in row:
            line += [f"{row['time_ms']:.2f}", f"({row['time_ms_min']:.2f} - "]
            line[-1] += f"{row['time_ms_max']:.2f})"
            line += [f"{row['time_ratio']:.2f}"]
        elif timed:
            line += ["n/a"] * 3
        lines.append(line)
    if timed:
        print(where)
    _print_columns(lines)


def _print_backends(rows: Sequence[dict[str, Any]], names: Sequence[str], where: str) -> None:
    lines = [["network", "back end", "ms", "(min - max)", "to eager", "ratio"]]
    for name in ("eager", *names):
        for row in rows:
            if f"{name}_ms" in row:
                spread = f"({row[f'{name}_ms_min']:.2f} - {row[f'{name}_ms_max']:.2f})"
                ratios = (row.get(f"{name}_{key}", math.nan) for key in ("to_eager", "ratio"))
                line = [row["network"], name, f"{row[f'{name}_ms']:.2f}", spread]
                lines.append([*line, *(f"{ratio:.2f}" for ratio in ratios)])
    print(f"\n{where}")
    _print_columns(lines)


def _print_columns(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join(cells))


def _write(args: argparse.Namespace, rows: Sequence[dict[str, Any]], where: str) -> None:
    """Write --json and --csv.

    Raises:
        UserError: A file cannot be written.
    """
    try:
        if args.json:
            args.json.write_text(json.dumps({"machine": where, "networks": rows}, indent=2) + "\n")
        if args.csv:
            keys = list(dict.fromkeys(key for row in rows for key in row))
            with args.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, keys)
                writer.writeheader()
                writer.writerows(rows)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from None
