"""Score networks on test sets and print the paper's Table 1; or draw its Figure 3.

PSNR and SSIM are those of `mlrn test`. Scores are cached below the output folder, so an interrupted
command goes on; times are measured anew, all networks in turns. Several scales may stand in one
table. Networks of the Y channel need an option file.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from basicsr.data import build_dataset
from basicsr.utils import bgr2ycbcr, tensor2img
from basicsr.utils.color_util import ycbcr2bgr

from mlrn_arch import machine, options, sources
from mlrn_arch.errors import UserError, first_line
from mlrn_arch.models.validation import build_model
from mlrn_arch.tools.compare import report, scoring


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mlrn compare` on `parser`."""
    add = parser.add_argument
    add("networks", nargs="+", metavar="NETWORK", help="with weights; see below")
    add("--output", type=Path, default=Path("comparison"), help="folder (default: %(default)s)")
    add("--paper", action="store_true", help="show Table 1's figures and the differences from them")
    add("--visual", metavar="IMAGE", help="draw the crops of this test image, such as Set14/ppt3")
    add("--crop", type=int, nargs=4, metavar=("X", "Y", "W", "H"), help="crop in the HR image")
    add("--force_yml", **options.FORCE_YML, help="as for `mlrn test`, for all networks")
    parser.epilog = f"""examples:
  mlrn compare x4 options/test_MLRN_x4.yml:net.pth EDSR:num_in_ch=3,num_out_ch=3:EDSR_x4.pth Bicubic
  mlrn compare --visual Set14/ppt3 --crop 60 400 96 64 x4 Bicubic

{sources.FORMS}

{options.BY_NAME}"""


def run(args: argparse.Namespace) -> int:
    """Make the table and its picture, or the crops; returns 0, or 1 if a part is missing."""
    if (args.visual is None) != (args.crop is None):
        raise UserError("--visual IMAGE and --crop X Y W H belong together")
    torch.backends.cudnn.benchmark = True  # as the pipeline
    problems: list[str] = []
    named = dict.fromkeys(args.networks)
    rows = [row for text in named if (row := _read(text, args.force_yml, problems))]
    _set_labels(rows)
    for note in dict.fromkeys(note for row in rows for note in row.notes):
        if note.startswith("Skipping"):
            print(f"mlrn compare: {note}", file=sys.stderr)
    with machine.exact_fp32():
        made = rows and (_visual if args.visual else _table)(rows, args, problems)
    if not made:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise UserError(f"nothing could be compared:{listed}")
    for problem in problems:
        print(f"mlrn compare: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _read(text: str, forced: list[str], problems: list[str]) -> scoring.Row | None:
    """Read a network's options as `mlrn test` does; faulty test sets are reported and left out."""
    try:
        opt, _, notes = options.read("test", [text, *(["--force_yml", *forced] * bool(forced))])
    except UserError as error:
        faults = [line[4:] for line in str(error).splitlines() if line.startswith("  - ")]
        problems.extend(f"{sources.split(text)[0]}: {fault}" for fault in faults or [str(error)])
        sets = {m[1] for fault in faults if (m := re.match(r"datasets:([^: ]+)", fault))}
        if not sets or not all(fault.startswith("datasets:") for fault in faults):
            return None
        return _read(text, [*forced, *(f"datasets:{key}=none" for key in sets)], problems)
    opt["val"]["pbar"] = False
    return scoring.Row(text, opt, notes)


def _set_labels(rows: list[scoring.Row]) -> None:
    """Name the rows; rows of one name also by the arguments or the checkpoint that differ."""
    for row in rows:
        alike = [r for r in rows if (r.name, r.opt["scale"]) == (row.name, row.opt["scale"])]
        own, others = row.opt["network_g"], [r.opt["network_g"] for r in alike]
        arguments = [f"{k}={v}" for k, v in own.items() if any(o.get(k) != v for o in others)]
        row.label = f"{row.name}:{','.join(arguments)}".removesuffix(":")
        stems = [r.checkpoint.stem for r in alike if r.opt["network_g"] == own]
        if len(stems) > 1:
            unique = stems.count(row.checkpoint.stem) == 1
            row.label += f" ({row.checkpoint.stem if unique else row.argument})"
        row.title = f"{row.label} x{row.opt['scale']}"


def _table(rows: list[scoring.Row], args: argparse.Namespace, problems: list[str]) -> bool:
    """Score the networks, print and write the table and its picture; False without any score."""
    if not scoring.fill(rows, args.output / "cells", problems):
        return False
    where = machine.name_of(torch.device("cuda" if rows[0].opt["num_gpu"] > 0 else "cpu"))
    columns = report.write(rows, args.output, where, args.paper)
    points = [(row.label, row.opt["scale"], row.values) for row in rows]
    metric = columns[len(report.HEADS)]  # PSNR of the first set
    if paths := report.draw_tradeoffs(points, metric, where, args.output):
        print("Picture:", *paths)
    return True


def _visual(rows: list[scoring.Row], args: argparse.Namespace, problems: list[str]) -> bool:
    """Draw one crop by every network, with the scores of the whole image; False if by none."""
    x, y, width, height = args.crop
    scale, crops, title = rows[0].opt["scale"], [], ""
    for row in rows:
        try:
            if row.opt["scale"] != scale:
                raise UserError(f"is x{row.opt['scale']}, the first network x{scale}")
            dataset, index = _find(row, args.visual)
            pair = build_dataset({**dataset.opt, "color": None})[index]
            lq, gt = tensor2img(pair["lq"]), tensor2img(pair["gt"])
            right, bottom = x + width, y + height
            if not (0 <= x < right <= gt.shape[1] and 0 <= y < bottom <= gt.shape[0]):
                size = f"{gt.shape[1]}x{gt.shape[0]}"
                raise UserError(f"the crop reaches out of the image, which is {size}")
            model = build_model(row.opt)
            scores = scoring.score_image(model, dataset, index)
            image = tensor2img(model.get_current_visuals()["result"])
            if image.ndim == 2:  # a network of the Y channel: the colours are the input's
                chroma = cv2.resize(bgr2ycbcr(lq), image.shape[::-1], interpolation=cv2.INTER_CUBIC)
                image = ycbcr2bgr(np.dstack([image, chroma[..., 1:]]))
        except Exception as error:  # a network may fail on an image in any way
            problems.append(f"{row.title}, {args.visual}: {first_line(error)}")
            continue
        values = " / ".join(report.text_of(metric, value) for metric, value in scores.items())
        crops.append((row.label, values, image[y:bottom, x:right]))
        title = f"{scoring.path_of(dataset, index).stem} ({dataset.opt['name']}), x{scale}"
    if not crops:
        return False
    crops.append(("HR", "PSNR / SSIM", gt[y:bottom, x:right]))
    stem = re.sub(r"\W+", "_", title).strip("_")
    path = args.output / f"visual_{stem}_{x}_{y}_{width}_{height}.png"
    report.draw_crops(gt, title, args.crop, crops, path)
    for label, values, _ in crops[:-1]:
        print(f"{label:28}{values}")
    print("Picture:", path)
    return True


def _find(row: scoring.Row, image: str) -> tuple[Any, int]:
    """Find a test image by its name, SET/name or path; returns its dataset and its index there."""
    for name, opt in row.sets.items():
        dataset = build_dataset(opt)
        for index in range(len(dataset)):
            path = scoring.path_of(dataset, index)
            if image in (path.stem, path.name, f"{name}/{path.stem}") or path == Path(image):
                return dataset, index
    raise UserError(f"no such image in {', '.join(row.sets)}")
