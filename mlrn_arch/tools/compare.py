"""Score networks on test sets and print the paper's Table 1; or draw its Figure 3.

A NETWORK is an option file that `mlrn test` takes, and `:CHECKPOINT` behind it replaces its
pretrain_network_g. Or it is a name that BasicSR knows, with arguments if it needs some, as in
EDSR:num_in_ch=3,num_out_ch=3:EDSR_x4.pth or 'SwinIR:depths=[6,6],num_heads=[6,6]:swinir.pth'. Its
scale is 4 unless the argument upscale (or scale) says otherwise, its test options/test_MLRN_x4.yml
(x2, x3) of the current directory with another network_g. A network with a window_size runs as
BasicSR's SwinIRModel, which pads images to it. Networks of the Y channel need an option file.

PSNR and SSIM come out of the same BasicSR run as those of `mlrn test`. What is finished is kept
below the output folder: interrupted, or with further networks, the same command goes on. Networks
of several scales may stand in one table.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import inspect
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from mlrn_arch import options
from mlrn_arch.errors import UserError

# How a column is printed: its unit, the format of a number of units, what follows it.
FORMATS = {
    "parameters": (1e3, ".0f", "K"),
    "mult_adds": (1e9, ".2f", "G"),
    "time_ms": (1, ".1f", ""),
    "PSNR": (1, ".2f", ""),
    "SSIM": (1, ".4f", ""),
}
HEADS = {"parameters": "#Params", "mult_adds": "#Mult-Adds", "time_ms": "Time (ms)"}
OUTPUT = 1280, 720  # at which mult-adds are counted and time is measured
METRICS = {"PSNR": "calculate_psnr", "SSIM": "calculate_ssim"}

Values = dict[str, "float | None"]


@dataclass
class Row:
    """One network at one scale: its options, and its figures as far as they are known."""

    argument: str
    opt: options.Options
    parameters: int
    weights: str | None  # SHA-256 of the checkpoint
    label: str = ""
    values: Values = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The option file's `name` without what every test file has in it (`test_`, `_x4`)."""
        return self.opt["name"].removeprefix("test_").removesuffix(f"_x{self.opt['scale']}")

    @property
    def sets(self) -> dict[str, options.Options]:
        """The data sets by name, in the order of `mlrn test`."""
        return {opt["name"]: opt for _, opt in sorted(self.opt["datasets"].items())}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mlrn compare` on `parser`."""
    add = parser.add_argument
    add(
        "networks",
        nargs="+",
        metavar="NETWORK[:CHECKPOINT]",
        help="FILE.yml, NAME or NAME:ARG=VALUE,ARG=VALUE",
    )
    add("--output", type=Path, default=Path("comparison"), help="folder (default: %(default)s)")
    add("--paper", action="store_true", help="show Table 1's figures and the differences from them")
    add("--set", metavar="NAME", help="test set of the picture (default: the first)")
    add("--visual", metavar="IMAGE", help="draw the crops of this test image, such as Set14/ppt3")
    add("--crop", type=int, nargs=4, metavar=("X", "Y", "W", "H"), help="crop in the HR image")
    add(
        "--force_yml",
        nargs="+",
        default=[],
        metavar="KEY:KEY=VALUE",
        help="as for `mlrn test`, for all networks; path:param_key_g=params_ema scores EMA weights",
    )
    parser.epilog = """example:
  mlrn compare options/test_MLRN_x4.yml:net.pth EDSR:num_in_ch=3,num_out_ch=3:EDSR_x4.pth Bicubic
  mlrn compare --visual Set14/ppt3 --crop 60 400 96 64 options/test_MLRN_x4.yml:net.pth"""


def run(args: argparse.Namespace) -> int:
    """Make the table and its picture, or the crops; returns 0, or 1 if a part is missing.

    Raises:
        UserError: Nothing could be made; all that was wrong is in the message.
    """
    if (args.visual is None) != (args.crop is None):
        raise UserError("--visual IMAGE and --crop X Y W H belong together")
    torch.backends.cudnn.benchmark = True  # as the pipeline
    problems: list[str] = []
    rows = [row for text in args.networks if (row := _read(text, args.force_yml, problems))]
    _set_labels(rows)
    made = rows and (_visual if args.visual else _table)(rows, args, problems)
    if not made:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise UserError(f"nothing could be compared:{listed}")
    for problem in problems:
        print(f"mlrn compare: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _read(argument: str, forced: list[str], problems: list[str]) -> Row | None:
    """Read a network's options as `mlrn test` does; a faulty data set is told and left out."""
    from basicsr.archs import build_network

    match = re.fullmatch(r"(.+?\.ya?ml|\w+(?::\w+=[^:]*)?)(?::(.+))?", argument)
    network, checkpoint = match.groups() if match else (argument, None)
    file, forced = network, list(forced)
    if not file.endswith((".yml", ".yaml")):
        try:
            section = options.network_by_name(network)
        except UserError as error:
            problems.append(f"{network}: {error}")
            return None
        scale = section.get("upscale", section.get("scale", 4))
        file = f"options/test_MLRN_x{scale}.yml"
        if not Path(file).is_file():
            problems.append(f"{network}: is tested by {file}, which is not in this directory")
            return None
        own = [f"name=test_{network.partition(':')[0]}_x{scale}", "path:pretrain_network_g=none"]
        own += [f"network_g={yaml.safe_dump(section, default_flow_style=True)}"]
        own += ["model_type=SwinIRModel"] * ("window_size" in section)
        forced = own + forced
    if checkpoint:
        forced.append(f"path:pretrain_network_g={json.dumps(checkpoint)}")
    for attempt in range(2):
        try:
            opt, _, notes = options.read("test", ["-opt", file, *_flag(forced)])
            break
        except UserError as error:
            faults = [line[4:] for line in str(error).splitlines() if line.startswith("  - ")]
            sets = {m[1] for fault in faults if (m := re.match(r"datasets:([^: ]+)", fault))}
            if attempt == 0:
                problems.extend(f"{network}: {fault}" for fault in faults or [str(error)])
            if not sets or not all(fault.startswith("datasets:") for fault in faults):
                return None
            forced += [f"datasets:{key}=none" for key in sets]
    else:
        return None
    for note in notes:
        if note.startswith("Skipping"):
            print(f"mlrn compare: {network}: {note}", file=sys.stderr)
    opt["val"]["pbar"] = False
    parameters = sum(p.numel() for p in build_network(opt["network_g"]).parameters())
    path = opt["path"].get("pretrain_network_g")
    if parameters and not path:
        problems.append(f"{network}: names no checkpoint; write {network}:CHECKPOINT")
        return None
    weights = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None
    return Row(argument, opt, parameters, weights)


def _flag(forced: list[str]) -> list[str]:
    return ["--force_yml", *forced] if forced else []


def _set_labels(rows: list[Row]) -> None:
    """Name the rows; those that would be named alike by what tells them apart too."""
    for row in rows:
        key, own = (row.name, row.opt["scale"]), row.opt["network_g"]
        alike = [r for r in rows if (r.name, r.opt["scale"]) == key]
        others = [r.opt["network_g"] for r in alike]
        arguments = [f"{k}={v}" for k, v in own.items() if any(o.get(k) != v for o in others)]
        row.label = f"{row.name}:{','.join(arguments)}".removesuffix(":")
        twins = [r for r in alike if r.opt["network_g"] == own]
        stems = [Path(r.opt["path"].get("pretrain_network_g") or "-").stem for r in twins]
        stem = Path(row.opt["path"].get("pretrain_network_g") or "-").stem
        if len(twins) > 1:
            row.label += f" ({stem if stems.count(stem) == 1 else row.argument})"


# ---- the figures of a row, each kept in a file of its own ----


def _identity(row: Row) -> dict[str, Any]:
    """What a network's figures depend on beside its weights and the images."""
    from basicsr.utils.registry import ARCH_REGISTRY

    opt = row.opt
    network = ARCH_REGISTRY.get(opt["network_g"]["type"])
    package = network.__module__.split(".")[0]
    parts = [network, *vars(inspect.getmodule(network)).values()]
    sources = {
        inspect.getfile(part)
        for part in parts
        if inspect.isclass(part) or inspect.isfunction(part)
        if part.__module__.startswith(package)
    }
    return {
        **{key: opt[key] for key in ("model_type", "scale", "network_g")},
        "precision": opt["val"].get("precision"),
        "source": [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in sorted(sources)],
        "torch": torch.__version__,
        "gpu": opt["num_gpu"] > 0,
    }


def _stamp(dataset: options.Options, known: dict[tuple, str]) -> str:
    """SHA-256 over names and contents of a set's files."""
    roots = dataset.get("dataroot_gt"), dataset.get("dataroot_lq"), dataset.get("meta_info_file")
    if roots not in known:
        digest = hashlib.sha256()
        for root in filter(None, roots):
            folder = Path(root)
            for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
                if path.is_file() and path.name != "lock.mdb":
                    digest.update(f"{path.relative_to(folder)}\0".encode())
                    digest.update(hashlib.sha256(path.read_bytes()).digest())
        known[roots] = digest.hexdigest()
    return known[roots]


def _cell(folder: Path, identity: dict[str, Any]) -> Path:
    text = json.dumps(identity, sort_keys=True, default=str)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _load(cell: Path) -> Values | None:
    try:
        return json.loads(cell.read_text())
    except (OSError, ValueError):
        return None


def _save(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


class _Watched:
    """A loader that moves a progress bar on and knows at which image it is."""

    def __init__(self, loader: Any, bar: tqdm) -> None:
        self.loader, self.bar, self.dataset = loader, bar, loader.dataset
        self.left, self.image = len(loader), ""

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        for paths in self.dataset.paths:
            self.image = Path(paths["lq_path"] if isinstance(paths, dict) else paths).name
            try:
                batch = next(batches)
            except Exception as error:  # a broken file can fail in any way
                raise UserError(f"it or its partner cannot be read ({_line(error)})") from None
            yield batch
            self.bar.update()
            self.left -= 1


def _table(rows: list[Row], args: argparse.Namespace, problems: list[str]) -> bool:
    """Compute what is not known yet, print the table and write it; False if there is nothing."""
    from basicsr.data import build_dataloader, build_dataset
    from basicsr.models import build_model

    names = dict.fromkeys(name for row in rows for name in row.sets)
    if args.set not in (None, *names):
        raise UserError(f"--set {args.set}: no such test set; known are {', '.join(names)}")
    machine = _machine(rows[0].opt["num_gpu"] > 0)
    contents: dict[tuple[int, str], str] = {}
    stamps: dict[tuple, str] = {}
    work: list[tuple[Row, str, Path, Any]] = []  # a loader, or None to measure time
    for row in rows:
        identity = _identity(row)
        timing = _cell(args.output / "cells", {**identity, "machine": machine, "what": "time"})
        work.append((row, "time", timing, None))
        for name, opt in row.sets.items():
            scores = {
                **identity,
                "weights": row.weights,
                "load": [row.opt["path"].get(key) for key in ("param_key_g", "strict_load_g")],
                "metrics": row.opt["val"].get("metrics"),
                "dataset": {k: v for k, v in opt.items() if not k.startswith("dataroot")},
                "images": _stamp(opt, stamps),
            }
            if contents.setdefault((opt["scale"], name), scores["images"]) != scores["images"]:
                problems.append(f"{row.argument}: its {name} has other images than the rows above")
            loader = build_dataloader(build_dataset(opt), opt)
            work.append((row, name, _cell(args.output / "cells", scores), loader))

    todo = [part for part in work if _load(part[2]) is None]
    total = sum(len(loader) if loader else 1 for *_, loader in todo)
    model, built = None, None
    with tqdm(total=total, unit="image", disable=None if todo else True) as bar:
        for row, what, cell, loader in todo:
            bar.set_description(f"{row.label} x{row.opt['scale']}, {what}")
            watched = _Watched(loader, bar) if loader else None
            try:
                if built is not row:
                    model, built = build_model(row.opt), row
                found = _score(model, row.opt, watched) if watched else _measure(model, row)
                _save(cell, json.dumps(found))
            except Exception as error:  # a network may fail on an image in any way
                image = f", {watched.image}" if watched else ""
                problems.append(f"{row.label} x{row.opt['scale']}, {what}{image}: {_line(error)}")
            bar.update(watched.left if watched else 1)
    for row, what, cell, _ in work:
        found = _load(cell) or {}
        if what == "time":
            row.values.update(dict.fromkeys(("parameters", "mult_adds", "time_ms")), **found)
            row.values["parameters"] = row.parameters or None
        else:
            row.values.update({f"{what} {metric}": found.get(metric) for metric in METRICS})
    if not any(
        " " in key and value is not None for row in rows for key, value in row.values.items()
    ):
        return False
    _write(rows, args, machine)
    return True


def _score(model: Any, opt: options.Options, loader: _Watched) -> Values:
    """PSNR and SSIM by the model's own validation, which `mlrn test` runs too."""
    model.validation(loader, current_iter=opt["name"], tb_logger=None, save_img=False)
    metrics = opt["val"].get("metrics") or {}
    return {
        column: next(
            (float(model.metric_results[n]) for n, m in metrics.items() if m["type"] == t), None
        )
        for column, t in METRICS.items()
    }


def _measure(model: Any, row: Row) -> Values:
    """Multiply-adds and median time of one output of 1280x720 (x3: 1281x720)."""
    from torch.utils.flop_counter import FlopCounterMode

    scale = row.opt["scale"]
    channels = 1 if any(opt.get("color") == "y" for opt in row.sets.values()) else 3
    width, height = (math.ceil(side / scale) for side in OUTPUT)
    lq = torch.rand(1, channels, height, width)
    model.feed_data({"lq": lq, "lq_path": [""]})
    with FlopCounterMode(display=False) as counter:  # the first run warms up as well
        model.test()
    seconds: list[float] = []
    while len(seconds) < 5 or (sum(seconds) < 1 and len(seconds) < 100):
        start = time.perf_counter()
        model.test()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    del model.lq, model.output
    # What learns nothing (bicubic) has no counts, as in the paper.
    mult_adds = counter.get_total_flops() // 2 if row.parameters else None
    return {"mult_adds": mult_adds, "time_ms": statistics.median(seconds) * 1e3}


def _machine(on_gpu: bool) -> str:
    from mlrn_arch.tools.benchmark import cpu_name

    if on_gpu:
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


# ---- the table ----


def paper() -> dict[tuple[str, int], dict[str, str]]:
    """Table 1 as the paper prints it: by method and scale the columns that are filled.

    Units are written alike; CARN's "1.592K" stands for 1592K.
    """
    with open(Path(__file__).with_name("table1.csv"), encoding="utf-8") as lines:
        table = {(r.pop("network"), int(r.pop("scale"))): r for r in csv.DictReader(lines)}
    return {key: {k: v for k, v in row.items() if v} for key, row in table.items()}


def _number(text: str) -> float:
    return float(text.rstrip("KG")) * {"K": 1e3, "G": 1e9}.get(text[-1], 1)


def _text(column: str, value: float, sign: str = "") -> str:
    unit, form, suffix = FORMATS[column.split(" ")[-1]]
    number = round(value / unit, int(form[1])) + 0.0  # no -0
    return f"{number:{sign}{form}}{suffix}"


def _cell_text(rows: list[Row], row: Row, column: str, printed: dict[str, str]) -> str:
    """A value as Markdown: best bold, second underlined, beside it the paper's and the difference.

    As in the paper, values that are printed alike share their rank.
    """
    value = row.values.get(column)
    text = "-" if value is None else _text(column, value)
    if value is not None and " " in column:
        values = [r.values.get(column) for r in rows if r.opt["scale"] == row.opt["scale"]]
        texts = {_text(column, v) for v in values if v is not None}
        ranks = sorted(texts, key=float, reverse=True)
        if len(ranks) > 1 and text == ranks[0]:
            text = f"**{text}**"
        elif len(ranks) > 1 and text == ranks[1]:
            text = f"<u>{text}</u>"
    if column in printed:
        text += f" ({printed[column]}"
        if value is not None:
            text += f", {_text(column, value - _number(printed[column]), '+')}"
        text += ")"
    return text


def _write(rows: list[Row], args: argparse.Namespace, machine: str) -> None:
    """Print the table and write table.md, .csv and .json and the picture."""
    from mlrn_arch.tools import figures

    rows = sorted(rows, key=lambda row: row.opt["scale"])  # stable: else as on the command line
    columns = list(dict.fromkeys(column for row in rows for column in row.values))
    printed = paper() if args.paper else {}
    of_paper = [printed.get((row.name, row.opt["scale"]), {}) for row in rows]
    lines = [["Method", "Scale", *(HEADS.get(column, column) for column in columns)]]
    for row, old in zip(rows, of_paper, strict=True):
        cells = [_cell_text(rows, row, column, old) for column in columns]
        lines.append([row.label, f"x{row.opt['scale']}", *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    text = "".join(
        f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |\n"
        for line in lines
    )
    notes = [
        f"Mult-Adds and time of one output of 1280x720; time on {machine}, torch "
        f"{torch.__version__}, median of at least 5 runs.",
        "Best **bold**, second <u>underlined</u>, per scale.",
    ]
    if args.paper:
        notes.append("In brackets: Table 1 of the paper, and the difference from it.")
    for scale in sorted({row.opt["scale"] for row in rows}):
        ways = {str(row.opt["val"].get("metrics")) for row in rows if row.opt["scale"] == scale}
        if len(ways) > 1:
            notes.append(f"Not comparable at x{scale}: the option files differ in val:metrics.")
    text += "\n" + "\n".join(notes) + "\n"
    print(text)

    _save(args.output / "table.md", text)
    records = []
    for row, old in zip(rows, of_paper, strict=True):
        record = {
            "method": row.label,
            "scale": row.opt["scale"],
            "argument": row.argument,
            "checkpoint": row.opt["path"].get("pretrain_network_g"),
            **{column: row.values.get(column) for column in columns},
        }
        record.update(
            {f"{k} (paper)": _number(old[k]) if k in old else None for k in columns if args.paper}
        )
        records.append(record)
    about = {"machine": machine, "torch": torch.__version__, "output": "1280x720"}
    _save(args.output / "table.json", json.dumps({**about, "rows": records}, indent=1) + "\n")
    with open(args.output / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(records[0])
        for record in records:
            writer.writerow(f"{v:.4f}" if isinstance(v, float) else v for v in record.values())

    metric = f"{args.set or columns[len(HEADS)][: -len(' PSNR')]} PSNR"
    points = [(row.label, row.opt["scale"], row.values) for row in rows]
    print("Picture:", *figures.draw_tradeoffs(points, metric, machine, args.output))


# ---- the crops ----


def _visual(rows: list[Row], args: argparse.Namespace, problems: list[str]) -> bool:
    """Draw one crop by every network, with the scores of the whole image; False if by none."""
    import cv2
    import numpy as np
    from basicsr.data import build_dataset
    from basicsr.metrics import calculate_metric
    from basicsr.models import build_model
    from basicsr.utils import bgr2ycbcr, tensor2img
    from basicsr.utils.color_util import ycbcr2bgr
    from torch.utils.data import default_collate

    from mlrn_arch.tools import figures

    x, y, width, height = args.crop
    scale, original, crops, title = rows[0].opt["scale"], None, [], ""
    for row in rows:
        try:
            if row.opt["scale"] != scale:
                raise UserError(f"is x{row.opt['scale']}, the first network x{scale}")
            opt, index = _find(row, args.visual)
            lq, gt = (
                tensor2img(build_dataset({**opt, "color": None})[index][key])
                for key in ("lq", "gt")
            )
            if (
                min(x, y) < 0
                or min(width, height) < 1
                or x + width > gt.shape[1]
                or y + height > gt.shape[0]
            ):
                raise UserError(
                    f"the crop {x} {y} {width} {height} reaches out of the image, which is "
                    f"{gt.shape[1]}x{gt.shape[0]}"
                )
            model = build_model(row.opt)
            model.feed_data(default_collate([build_dataset(opt)[index]]))
            model.test()
            visuals = model.get_current_visuals()
            images = {"img": tensor2img(visuals["result"]), "img2": tensor2img(visuals["gt"])}
            metrics = (row.opt["val"].get("metrics") or {}).values()
            scores = {m["type"]: calculate_metric(images, m) for m in metrics}
            image = images["img"]
            if image.ndim == 2:  # a network of the Y channel: the colours are the input's
                chroma = cv2.resize(bgr2ycbcr(lq), image.shape[::-1], interpolation=cv2.INTER_CUBIC)
                image = ycbcr2bgr(np.dstack([image, chroma[..., 1:]]))
        except Exception as error:  # a network may fail on an image in any way
            problems.append(f"{row.label} x{row.opt['scale']}, {args.visual}: {_line(error)}")
            continue
        values = [_text(c, scores[t]) for c, t in METRICS.items() if t in scores]
        crops.append((row.label, " / ".join(values), image[y : y + height, x : x + width]))
        original = gt
        title = Path(build_dataset(opt).paths[index]["gt_path"]).stem
        title = f"{title} ({opt['name']}), x{scale}"
    if not crops:
        return False
    crops.append(("HR", "PSNR / SSIM", original[y : y + height, x : x + width]))
    stem = re.sub(r"\W+", "_", title).strip("_")
    path = args.output / f"visual_{stem}_{x}_{y}_{width}_{height}.png"
    figures.draw_crops(original, title, (x, y, width, height), crops, path)
    for label, score, _ in crops[:-1]:
        print(f"{label:28}{score}")
    print("Picture:", path)
    return True


def _find(row: Row, image: str) -> tuple[options.Options, int]:
    """Find a test image by its name, SET/name or path; returns its set and its index there."""
    from basicsr.data import build_dataset

    for name, opt in row.sets.items():
        for index, paths in enumerate(build_dataset(opt).paths):
            path = Path(paths["gt_path"])
            if image in (path.stem, path.name, f"{name}/{path.stem}") or path == Path(image):
                return opt, index
    raise UserError(f"no such image in {', '.join(row.sets)}")
