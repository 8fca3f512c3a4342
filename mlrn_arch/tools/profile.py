"""Compare networks: parameters, mult-adds, activations, convolutions, memory and runtime.

A network is an option file (its network_g) or a name that BasicSR knows, with arguments if it
needs some. Counting runs on torch's meta device, which computes nothing.

mult-adds    multiplications of convolutions (grouped, transposed and deformable ones as well),
             linear layers, matrix products and attention, each with its addition; biases, other
             products and additions, activations, pooling and interpolation are not counted
FLOPs        as the NTIRE challenge counts: mult-adds, plus 1 for every output element of ReLU,
             LeakyReLU, PReLU, ELU and ReLU6, plus 2 for those of BatchNorm2d (1 if not affine);
             where its counter errs, in transposed convolutions and in linear layers on more than
             two dimensions, this one does not
acts         output elements of all convolutions
conv         calls of a convolution
peak MiB     weights, input and the most that one forward pass holds beside them. CUDA: as torch's
             allocator measures it. CPU, and with --no-runtime: the tensors alive at once, by
             following the pass on the meta device; what a kernel needs inside is not in it
ms           one forward pass, eager, batch 1: median over the rounds, with the fastest and the
             slowest; the networks take turns
ratio        to the first network: median of the ratios within a round

With --backend each network is timed in PyTorch as it is and by every back end, all in turns;
"to eager" is the ratio to the former, and "ratio" that to the first network by the same back end.
A back end without --precision chooses it: bf16 on a CPU that computes in it, fp16 on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary
from tqdm import tqdm

from mlrn_arch import backends, options
from mlrn_arch.errors import UserError, first_line
from mlrn_arch.models.fast_sr_model import DTYPES
from mlrn_arch.tools import ntire2023
from mlrn_arch.tools.benchmark import cpu_name

MIB = 2**20
RELU_LIKE = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.ReLU6)
DEFORMABLE = torch.ops.torchvision.deform_conv2d
CONVOLUTIONS = (torch.ops.aten.convolution.default, DEFORMABLE.default)
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
    add("networks", nargs="+", metavar="NETWORK", help="FILE.yml, NAME or NAME:ARG=VALUE,ARG=VALUE")
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
    add("--upscale", type=_positive, default=4, help="of networks by name (default: %(default)s)")
    add("--frames", type=_positive, help="for video networks: LR frames in one input")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--precision", choices=DTYPES, help="of weights and input (default: fp32)")
    add("--backend", nargs="+", choices=backends.NAMES, help="time these back ends as well")
    add("--rounds", type=_positive, default=5, help="turns of each network (default: %(default)s)")
    add("--no-runtime", action="store_true", help="count only")
    add("--leaderboard", action="store_true", help="place them among the entries of NTIRE 2023")
    add("--time", type=_amount, metavar="MS", help="average time on the challenge's hardware")
    add("--memory", type=_amount, metavar="MIB", help="peak memory on the challenge's hardware")
    add("--json", type=Path, metavar="FILE", help="write all figures, unrounded")
    add("--csv", type=Path, metavar="FILE", help="the same as a table")
    parser.epilog = """example, the first network is the reference:
  mlrn profile MLRN RLFN:num_feat=48 EDSR:num_in_ch=3,num_out_ch=3 options/test_MLRN_x4.yml
  mlrn profile options/ntire/test_MLRN_NTIRE_x4.yml --leaderboard --no-runtime"""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive integer")
    return int(text)


def _amount(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = math.nan
    if not 0 < amount < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return amount


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
    if args.leaderboard:
        args.input_size = args.input_size or (None if args.output_size else (256, 256))
        if args.input_size != (256, 256) or args.frames:
            raise UserError("--leaderboard compares at the challenge's --input-size 256x256 only")
    elif args.time is not None or args.memory is not None:
        raise UserError("--time and --memory belong to --leaderboard")
    if (args.time is not None or args.memory is not None) and len(args.networks) > 1:
        raise UserError("--time and --memory are those of one network; give just that one")
    if args.backend and args.no_runtime:
        raise UserError("--backend measures, --no-runtime forbids it; give one of them")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; use --device cpu")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = DTYPES[args.precision or "fp32"]

    faults: list[str] = []
    subjects: list[Subject] = []
    for name in args.networks:
        try:
            subject = _subject(name, args)
            subject.row |= {"network": name, "upscale": subject.upscale}
            subject.row |= {"input": "x".join(map(str, (subject.shape[-1], subject.shape[-2])))}
            subject.row |= count(subject.network, subject.shape, subject.upscale, dtype)
        except UserError as error:
            told = _is_file(name) and name in str(error)
            faults.append(str(error) if told else f"{name}: {error}")
        else:
            subjects.append(subject)
    if args.backend:
        faults += _measure_backends(subjects, args.backend, device, args)
    elif not args.no_runtime:
        faults += _measure(subjects, device, dtype, args.rounds)

    rows = [subject.row for subject in subjects]
    if rows:
        where = cpu_name() if device.type == "cpu" else torch.cuda.get_device_name()
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        machine = f"{where}{threads}, torch {torch.__version__}, {args.precision or 'fp32'}"
        _print_table(rows, machine)
        if args.backend:
            _print_backends(rows, args.backend, machine)
        if args.leaderboard:
            faults += _print_leaderboard(rows, args)
        _write(args, rows, machine)
    for fault in faults:
        print(f"mlrn profile: {fault}", file=sys.stderr)
    return (1 if rows else 2) if faults else 0


# --- which network ------------------------------------------------------------------------------


def _is_file(name: str) -> bool:
    return name.endswith((".yml", ".yaml"))


def _subject(name: str, args: argparse.Namespace) -> Subject:
    """Build the network that a command-line argument names.

    Raises:
        UserError: No such file or network, or arguments that it does not take.
    """
    if _is_file(name):
        opt, section = options.network_section(name)
        upscale = opt.get("scale", args.upscale)
    else:
        section, upscale = options.network_by_name(name, args.upscale), args.upscale
    network, values = options.build_network(section)
    network.eval().requires_grad_(False)
    upscale = values.get("upscale", values.get("scale", upscale))
    if not isinstance(upscale, (int, float)) or upscale <= 0:
        raise UserError(f"scale must be a positive number, not {upscale!r}")
    names = ("num_in_ch", "in_chans", "in_channels", "input_channels")
    channels = next((values[key] for key in names if key in values), 3)
    if args.input_size:
        width, height = args.input_size
    else:
        width, height = (max(1, round(n / upscale)) for n in args.output_size or (1280, 720))
    frames = (args.frames,) if args.frames else ()
    return Subject(name, network, upscale, (1, *frames, channels, height, width))


# --- counts -------------------------------------------------------------------------------------


class _Tally(TorchDispatchMode):
    """Sees every operator of a forward pass: counts convolutions, follows the bytes alive."""

    def __init__(self, kept: Sequence[Tensor]) -> None:
        super().__init__()
        self.activations = self.convolutions = self.alive = self.peak = 0
        self._storages = WeakIdKeyDictionary()
        for tensor in kept:
            self._keep(tensor)

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()  # views and in-place results share one
        if storage not in self._storages:
            self._storages[storage] = True
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, size: int) -> None:
        self.alive -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._keep(tensor)
        if func in CONVOLUTIONS:
            self.activations += result.numel()
            self.convolutions += 1
        return result


def _deformable(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape=None, **__: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def count(
    network: nn.Module,
    shape: Sequence[int],
    upscale: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Count what one forward pass costs; nothing is computed unless the network insists.

    Args:
        network: In evaluation mode; is left as it was.
        shape: The input, (n, c, h, w) or, for video, (n, t, c, h, w).
        upscale: Output size over input size.
        dtype: Of weights and input, for the bytes.

    Returns:
        `parameters`, `mult_adds`, `flops` (as the NTIRE challenge counts), `activations`,
        `convolutions` and `peak_bytes`, as the module's docstring explains them.

    Raises:
        UserError: The network cannot take this input, or does not return `upscale` times its size.
    """
    try:
        return _count_on("meta", network, shape, upscale, dtype)
    except UserError:
        raise
    except Exception:  # some networks look at values, which the meta device has not
        try:
            return _count_on("cpu", network, shape, upscale, dtype)
        except UserError:
            raise
        except Exception as error:  # each network fails in its own way
            taken = " x ".join(map(str, shape))
            raise UserError(f"cannot take an input of {taken}: {first_line(error)}") from None


def _count_on(
    device: str, network: nn.Module, shape: Sequence[int], upscale: int, dtype: torch.dtype
) -> dict[str, Any]:
    network = copy.deepcopy(network).to(device, dtype)
    extra = 0

    def add_extra(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal extra
        twice = isinstance(module, nn.BatchNorm2d) and module.affine
        extra += output.numel() * (2 if twice else 1)

    for module in network.modules():
        if isinstance(module, (*RELU_LIKE, nn.BatchNorm2d)):
            module.register_forward_hook(add_extra)
    x = torch.zeros(shape, device=device, dtype=dtype)
    tally = _Tally([*network.parameters(), *network.buffers(), x])
    flops = FlopCounterMode(display=False, custom_mapping={DEFORMABLE: _deformable})
    # Not inference_mode: under it composite operators reach the tally in one piece.
    with torch.no_grad(), flops, tally:
        y = network(x)
    size = tuple(getattr(y, "shape", ()))
    wanted = (shape[-2] * upscale, shape[-1] * upscale)
    if size[-2:] != wanted:
        given = f"{size[-1]}x{size[-2]}" if len(size) > 2 else "no image"
        raise UserError(
            f"returns {given} where x{upscale} of {shape[-1]}x{shape[-2]} would be "
            f"{wanted[1]}x{wanted[0]}; if it has another scale, give it with --upscale"
        )
    mult_adds = flops.get_total_flops() // 2
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "mult_adds": mult_adds,
        "flops": mult_adds + extra,
        "activations": tally.activations,
        "convolutions": tally.convolutions,
        "peak_bytes": tally.peak,
    }


# --- runtime ------------------------------------------------------------------------------------


def _measure(
    subjects: Sequence[Subject], device: torch.device, dtype: torch.dtype, rounds: int
) -> list[str]:
    """Fill in the times (and on a GPU the memory) of all networks; returns the faults."""
    faults, ready = [], []
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
                calls = max(1, min(1000, int(TURN_SECONDS / _seconds(network, x, 1))))
                if device.type == "cuda":
                    own = [*network.parameters(), *network.buffers(), x]
                    peak = torch.cuda.max_memory_allocated() - before
                    subject.row["peak_bytes"] = peak + sum(tensor.nbytes for tensor in own)
                ready.append((subject, network, x, calls, []))
            except Exception as error:  # out of memory, or no kernel for this precision
                subject.network.to("cpu")
                faults.append(f"{subject.name}: cannot run on {device}: {first_line(error)}")
        for _ in tqdm(range(rounds), desc="rounds", disable=None):
            for _, network, x, calls, turns in ready:
                turns.append(_seconds(network, x, calls) / calls)
    for subject, *_, turns in ready:
        times = [1e3 * seconds for seconds in turns]
        ratios = [own / first for own, first in zip(turns, ready[0][-1], strict=True)]
        subject.row |= {
            "time_ms": statistics.median(times),
            "time_ms_min": min(times),
            "time_ms_max": max(times),
            "time_ratio": statistics.median(ratios),
        }
    return faults


def _measure_backends(
    subjects: Sequence[Subject], names: Sequence[str], device: torch.device, args: Any
) -> list[str]:
    """Fill in `eager_ms`, `openvino_ms`, ... of all networks; returns the faults."""
    faults, ready = [], []
    for subject in subjects:
        network = subject.network.to(device, DTYPES[args.precision or "fp32"])
        x = torch.rand(subject.shape, device=device)
        ways = {"eager": lambda x, network=network: network(x.to(next(network.parameters()).dtype))}
        for name in names:
            cpu_only = name != "torch"
            try:
                ways[name] = backends.load(
                    network, name, None if cpu_only else device, args.precision or "auto"
                )
            except UserError as error:
                faults.append(f"{subject.name}: {error}")
        with torch.inference_mode():
            for name, way in ways.items():
                _seconds(way, x, 1)
                calls = max(1, min(1000, int(TURN_SECONDS / _seconds(way, x, 1))))
                ready.append((subject.row, name, way, x, calls, []))
    with torch.inference_mode():
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
    if x.device.type == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            network(x)
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


def _print_table(rows: Sequence[dict[str, Any]], machine: str) -> None:
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
        print(machine)
    _print_columns(lines)


def _print_backends(rows: Sequence[dict[str, Any]], names: Sequence[str], machine: str) -> None:
    lines = [["network", "back end", "ms", "(min - max)", "to eager", "ratio"]]
    for name in ("eager", *names):
        for row in rows:
            if f"{name}_ms" in row:
                spread = f"({row[f'{name}_ms_min']:.2f} - {row[f'{name}_ms_max']:.2f})"
                ratios = (row.get(f"{name}_{key}", math.nan) for key in ("to_eager", "ratio"))
                line = [row["network"], name, f"{row[f'{name}_ms']:.2f}", spread]
                lines.append([*line, *(f"{ratio:.2f}" for ratio in ratios)])
    print(f"\n{machine}")
    _print_columns(lines)


def _print_columns(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join(cells))


def _print_leaderboard(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    """Print the places in Table 3 and keep them in the rows; returns the faults."""
    faults = []
    lines = [["NTIRE 2023, value (place)", "time ms", "params M", "FLOPs G", "acts M", "memory MiB",
              "model comp.", "overall"]]  # fmt: skip
    for row in rows:
        if row["upscale"] != 4:
            faults.append(f"{row['network']}: is x{row['upscale']}, the challenge's networks x4")
            continue
        measured = {"time_ms": args.time, "memory_mib": args.memory}
        values = {column: value for column, value in measured.items() if value is not None}
        values["params_m"] = row["parameters"] / 1e6
        values["flops_g"] = row["flops"] / 1e9
        values["acts_m"] = row["activations"] / 1e6
        row["leaderboard"] = places = ntire2023.places(values)
        line = [row["network"]]
        for column, (rank, decimals) in ntire2023.RANKED.items():
            known = column in values
            line += [f"{values[column]:.{decimals}f} ({places[rank]})" if known else "-"]
        for column in ("complexity", "overall"):
            known = column in places
            line += [f"{places[column]} ({places[column + '_rank']})" if known else "-"]
        lines.append(line)
    if len(lines) > 1:
        print()
        _print_columns(lines)
        if args.time is None or args.memory is None:
            print("- : not comparable; give --time and --memory of the challenge's hardware")
    return faults


def _write(args: argparse.Namespace, rows: Sequence[dict[str, Any]], machine: str) -> None:
    """Write --json and --csv.

    Raises:
        UserError: A file cannot be written.
    """
    try:
        if args.json:
            args.json.write_text(
                json.dumps({"machine": machine, "networks": rows}, indent=2) + "\n"
            )
        if args.csv:
            flat = [{**row, **row.get("leaderboard", {})} for row in rows]
            keys = [
                key for key in dict.fromkeys(k for r in flat for k in r) if key != "leaderboard"
            ]
            with args.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, keys, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(flat)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from None
