"""Scores, counts and times of the networks in a comparison; scores are cached in files."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from basicsr.data import build_dataset
from torch.utils.data import DataLoader
from tqdm import tqdm

from mlrn_arch.errors import first_line
from mlrn_arch.files import atomic_write
from mlrn_arch.inference import counting
from mlrn_arch.inference.backends import quiet
from mlrn_arch.models.validation import build_model
from mlrn_arch.networks import input_channels
from mlrn_arch.options import Options

OUTPUT = 1280, 720  # at which mult-adds are counted and time is measured
ROUNDS = 5
METRICS = {"PSNR": "calculate_psnr", "SSIM": "calculate_ssim"}
PLACES = "path", "datasets", "root_path", "manual_seed"  # options that change no score


@dataclass
class Row:
    """One network at one scale: its options, and its figures as far as they are known."""

    argument: str
    opt: Options
    notes: list[str]  # of its option file
    label: str = ""
    title: str = ""  # with the scale, for messages
    model: Any = None
    values: dict[str, float | None] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # images without a finite score

    @property
    def name(self) -> str:
        """The option file's `name` without what every test file has in it (`test_`, `_x4`)."""
        return self.opt["name"].removeprefix("test_").removesuffix(f"_x{self.opt['scale']}")

    @property
    def checkpoint(self) -> Path:
        """The file of the weights; its name is empty if there is none."""
        return Path(self.opt["path"].get("pretrain_network_g") or "")

    @property
    def sets(self) -> dict[str, Options]:
        """The test sets by name, in the order of `mlrn test`."""
        return {opt["name"]: opt for _, opt in sorted(self.opt["datasets"].items())}


def fill(rows: list[Row], folder: Path, problems: list[str]) -> bool:
    """Set `values` of all rows; returns whether there is at least one score.

    `folder` caches the scores of each network on each set; `problems` gets a line for each failure.
    """
    with tqdm(unit="image", disable=None) as bar:
        for row in rows:
            row.values = dict.fromkeys(("parameters", "mult_adds", "time_ms"))
            try:
                row.model = build_model(row.opt)
            except Exception as error:  # a model may refuse its options in any way
                problems.append(f"{row.title}: {first_line(error)}")
                continue
            for name, opt in row.sets.items():
                bar.set_description(f"{row.title}, {name}")
                cell = _cell(folder, row, opt)
                try:
                    found = json.loads(cell.read_text())
                except (OSError, ValueError):
                    found = _score_set(row, build_dataset(opt), bar, problems)
                    if found:
                        folder.mkdir(parents=True, exist_ok=True)
                        with atomic_write(cell) as part:
                            part.write_text(json.dumps(found))
                row.values.update({f"{name} {metric}": found.get(metric) for metric in METRICS})
                for metric, images in found.get("left out", {}).items():
                    row.left_out.append(f"{row.title}, {name}: {metric} is a mean without {images}")
    if scored := any(v is not None for row in rows for k, v in row.values.items() if " " in k):
        _measure([row for row in rows if row.model], problems)
    return scored


def score_image(model: Any, dataset: Any, index: int) -> dict[str, float]:
    """PSNR and SSIM of one image, by the validation of `mlrn test`; NaN where that finds none."""
    loader = DataLoader(dataset, sampler=[index])
    with quiet():  # it warns of images without a score
        model.validation(loader, model.opt["name"], tb_logger=None, save_img=False)
    names = {m["type"]: name for name, m in (model.opt["val"].get("metrics") or {}).items()}
    found = {kind: float(model.metric_results.get(n, math.nan)) for kind, n in names.items()}
    return {column: found[kind] for column, kind in METRICS.items() if kind in found}


def path_of(dataset: Any, index: int) -> Path:
    """The HR file of a test image."""
    paths = dataset.paths[index]
    return Path(paths["gt_path"] if isinstance(paths, dict) else paths)


def _score_set(row: Row, dataset: Any, bar: tqdm, problems: list[str]) -> dict[str, Any]:
    """The means over a set, with the images that are not in them; empty if an image failed."""
    scores: dict[Path, dict[str, float]] = {}
    for index in range(len(dataset)):
        image = path_of(dataset, index)
        try:
            scores[image] = score_image(row.model, dataset, index)
        except Exception as error:  # a network may fail on an image in any way
            where = f"{row.title}, {dataset.opt['name']}, {image.name}"
            problems.append(f"{where}: {first_line(error)}")
            return {}
        bar.update()
    found: dict[str, Any] = {"left out": {}}
    for metric in next(iter(scores.values())):
        finite = [s[metric] for s in scores.values() if math.isfinite(s[metric])]
        found[metric] = statistics.fmean(finite) if finite else None
        if without := [image.name for image, s in scores.items() if not math.isfinite(s[metric])]:
            found["left out"][metric] = ", ".join(without)
    return found


def _measure(rows: list[Row], problems: list[str]) -> None:
    """Count and time one output of 1280x720 (x3: 1281x720); the networks take turns."""
    timed: list[Row] = []
    for row in rows:
        window = row.opt["network_g"].get("window_size", 1)  # SwinIRModel pads to it
        width, height = (-(-side // (row.opt["scale"] * window)) * window for side in OUTPUT)
        network = row.model.get_bare_model(row.model.net_g)
        shape = 1, input_channels(network) or 3, height, width
        parameters = sum(parameter.numel() for parameter in network.parameters())
        try:
            if parameters:  # bicubic has no counts, as in the paper
                row.values["parameters"] = parameters
                counts = counting.count(network, shape, row.opt["scale"])
                row.values["mult_adds"] = counts["mult_adds"]
            row.model.feed_data({"lq": torch.rand(shape), "lq_path": [""]})
            row.model.test()  # warms up
        except Exception as error:  # a network may fail on a size in any way
            problems.append(f"{row.title}, time: {first_line(error)}")
        else:
            timed.append(row)
    times = counting.times_in_turns([row.model.test for row in timed], ROUNDS)
    for row, turns in zip(timed, times, strict=True):
        row.values["time_ms"] = statistics.median(turns)


def _cell(folder: Path, row: Row, dataset: Options) -> Path:
    """The file that caches scores, named by a hash of options, checkpoint and images."""
    weights = row.checkpoint.read_bytes() if row.checkpoint.name else b""
    identity: dict[str, Any] = {
        "options": {key: value for key, value in row.opt.items() if key not in PLACES},
        "load": [row.opt["path"].get(key) for key in ("param_key_g", "strict_load_g")],
        "dataset": dataset,
        "weights": hashlib.sha256(weights).hexdigest(),
        "images": [],
    }
    roots = [dataset.get(key) for key in ("dataroot_gt", "dataroot_lq", "meta_info_file")]
    for root in map(Path, filter(None, roots)):
        for file in sorted(root.rglob("*")) or [root]:
            if file.name != "lock.mdb":  # which every reader writes
                stat = file.stat()
                identity["images"].append([str(file), stat.st_size, stat.st_mtime_ns])
    text = json.dumps(identity, sort_keys=True, default=str)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
