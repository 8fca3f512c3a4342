"""The figures of every network in a comparison; each is kept in a file of its own."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from basicsr.data import build_dataloader, build_dataset
from basicsr.models import build_model
from basicsr.utils.registry import ARCH_REGISTRY
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from mlrn_arch.errors import UserError, first_line
from mlrn_arch.options import Options

OUTPUT = 1280, 720  # at which mult-adds are counted and time is measured
METRICS = {"PSNR": "calculate_psnr", "SSIM": "calculate_ssim"}

Values = dict[str, "float | None"]


@dataclass
class Row:
    """One network at one scale: its options, and its figures as far as they are known."""

    argument: str
    opt: Options
    parameters: int
    weights: str | None  # SHA-256 of the checkpoint
    notes: list[str]  # of its option file
    label: str = ""
    values: Values = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The option file's `name` without what every test file has in it (`test_`, `_x4`)."""
        return self.opt["name"].removeprefix("test_").removesuffix(f"_x{self.opt['scale']}")

    @property
    def sets(self) -> dict[str, Options]:
        """The data sets by name, in the order of `mlrn test`."""
        return {opt["name"]: opt for _, opt in sorted(self.opt["datasets"].items())}


def fill(rows: list[Row], folder: Path, where: str, problems: list[str]) -> bool:
    """Fill in the figures of all rows, those that are not known yet by running the networks.

    Args:
        rows: Their `values` are set.
        folder: Keeps every figure in a file of its own.
        where: The machine on which time is measured.
        problems: Takes a line for everything that failed.

    Returns:
        Whether there is a score at all.
    """
    contents: dict[tuple[int, str], str] = {}
    stamps: dict[tuple, str] = {}
    work: list[tuple[Row, str, Path, Any]] = []  # a loader, or None to measure time
    for row in rows:
        identity = _identity(row)
        timing = _cell(folder, {**identity, "machine": where, "what": "time"})
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
            work.append((row, name, _cell(folder, scores), loader))

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
                save(cell, json.dumps(found))
            except Exception as error:  # a network may fail on an image in any way
                image = f", {watched.image}" if watched else ""
                problems.append(
                    f"{row.label} x{row.opt['scale']}, {what}{image}: {first_line(error)}"
                )
            bar.update(watched.left if watched else 1)
    for row, what, cell, _ in work:
        found = _load(cell) or {}
        if what == "time":
            row.values.update(dict.fromkeys(("parameters", "mult_adds", "time_ms")), **found)
            row.values["parameters"] = row.parameters or None
        else:
            row.values.update({f"{what} {metric}": found.get(metric) for metric in METRICS})
    return any(
        " " in key and value is not None for row in rows for key, value in row.values.items()
    )


def _score(model: Any, opt: Options, loader: _Watched) -> Values:
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


def _identity(row: Row) -> dict[str, Any]:
    """What a network's figures depend on beside its weights and the images."""
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


def _stamp(dataset: Options, known: dict[tuple, str]) -> str:
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


def save(path: Path, text: str) -> None:
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
                raise UserError(f"it or its partner cannot be read ({first_line(error)})") from None
            yield batch
            self.bar.update()
            self.left -= 1
