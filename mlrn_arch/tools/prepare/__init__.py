"""Turn a folder of photographs into training data, or into a benchmark set.

Training data are LMDBs of aligned sub-images in BasicSR's layout:

    OUTPUT/NAME_train_HR_sub.lmdb        OUTPUT/NAME_train_LR_bicubic_X4_sub.lmdb

A benchmark set (--benchmark) is pairs of folders: OUTPUT/GTmod4 and OUTPUT/LRbicx4.
Each image is shrunk as a whole, as MATLAB's imresize does it, before it is cut.

--teacher stores what another network makes of the LR images in place of HR. A network trained on
them learns from that teacher without running it.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import cv2
import lmdb
import numpy as np

from mlrn_arch import machine
from mlrn_arch.errors import UserError
from mlrn_arch.files import atomic_write
from mlrn_arch.inference.image_files import BadImage
from mlrn_arch.inference.resize import imresize
from mlrn_arch.tools.prepare import stream, training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mlrn prepare` on `parser`."""
    add = parser.add_argument
    # fmt: off
    add("input", type=Path, metavar="INPUT", help="folder of HR images, read with its sub-folders")
    add("output", type=Path, metavar="OUTPUT", help="folder to write to, such as datasets/DIV2K")
    add("--scale", type=int, nargs="+", choices=(2, 3, 4), default=[2, 3, 4],
        help="LR scales to make (default: 2 3 4)")
    add("--name", help="NAME in the LMDBs' names (default: the last part of OUTPUT)")
    add("--crop-size", type=int, default=480,
        help="side of HR sub-images, a multiple of 12, at least gt_size (default: %(default)s)")
    add("--step", type=int, default=240,
        help="their distance, a multiple of 12 (default: 240; 480 takes a quarter of the disk)")
    add("--format", choices=("png", "bmp"), default="png",
        help="png is small; bmp needs no decoding and takes more disk (default: %(default)s)")
    add("--teacher", metavar="NETWORK[:CHECKPOINT]",
        help="store this network's output in place of HR, for one --scale: a NETWORK as for `mlrn "
        "compare`, or any checkpoint that spandrel (`pip install spandrel`) can load")
    add("--shrink", type=int, nargs="+", choices=(1, 2, 3, 4),
        help="with --teacher: shrink the photographs by each of these (default: the scale)")
    add("--benchmark", action="store_true", help="write GTmod*/LRbicx* folders of PNGs, no LMDBs")
    add("--workers", type=int, default=machine.cores(),
        help="images worked on at a time (default: %(default)s, one a CPU core)")
    add("--overwrite", action="store_true", help="make existing data again")
    # fmt: on
    parser.epilog = """examples:
  mlrn prepare DIV2K_train_HR datasets/DIV2K
  mlrn prepare photos datasets/photos
  mlrn prepare Set5 datasets/Set5 --benchmark

After an interruption the same command continues. Only --overwrite replaces existing data.
Images that cannot be used are listed with the reason, and the exit code is 1."""


def run(args: argparse.Namespace) -> int:
    """Run `mlrn prepare`; returns 0, or 1 if an image was left out."""
    for option, value in (("--crop-size", args.crop_size), ("--step", args.step)):
        if value < 1 or value % training.MULTIPLE:
            raise UserError(f"{option} must be a multiple of {training.MULTIPLE}, got {value}")
    args.scale = sorted(set(args.scale))
    if args.teacher:
        if args.benchmark or len(args.scale) > 1:
            raise UserError("--teacher makes training data of one scale: add --scale 4, say")
        args.shrink = sorted(set(args.shrink or args.scale))
    elif args.shrink:
        raise UserError("--shrink is for --teacher; name one")
    report = stream.Report(stream.find(args.input, args.output))
    cv2.setNumThreads(1)  # each process takes one core, and OpenCV's threads survive no fork
    try:
        return (_benchmark if args.benchmark else training.make)(args, report)
    except BrokenPipeError:  # of `mlrn prepare ... | head`
        raise
    except (OSError, lmdb.Error) as error:
        raise UserError(
            f"cannot write to {args.output}: {error}; if its disk is full, free some space, then "
            "the same command continues"
        ) from None


def _benchmark(args: argparse.Namespace, report: stream.Report) -> int:
    folders = [args.output / f"{kind}{s}" for s in args.scale for kind in ("GTmod", "LRbicx")]
    if args.input.resolve() in (folder.resolve() for folder in folders):
        raise UserError(f"INPUT {args.input} would be written to; give another OUTPUT")
    pair = functools.partial(_pair, args=args)
    for _ in stream.results(pair, report.images, args.workers, report):
        pass
    code = report.close()
    print(f"{args.output}: " + ", ".join(folder.name for folder in folders))
    files = [file for folder in folders for file in sorted(folder.glob("[!.]*"))]
    if others := [str(file) for file in files if file.stem not in report.images]:
        print(f"not in INPUT, and scored too unless deleted: {', '.join(others)}", file=sys.stderr)
        return 1
    return code


def _pair(key: str, path: Path, args: argparse.Namespace) -> tuple[list[str], None]:
    """Write the files of a benchmark image that are missing; returns notes on it."""
    img, notes = stream.decode(path)
    if min(img.shape[:2]) < max(args.scale):
        raise BadImage(f"{img.shape[1]}x{img.shape[0]} is less than one LR pixel")
    for s in args.scale:
        gt = img[: img.shape[0] // s * s, : img.shape[1] // s * s]
        for kind in ("GTmod", "LRbicx"):
            file = args.output / f"{kind}{s}" / f"{key}.png"
            if args.overwrite or not file.exists():
                image = gt if kind == "GTmod" else imresize(gt, s)
                file.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(file) as part:  # imwrite would not notice a full disk
                    part.write_bytes(cv2.imencode(".png", image)[1].tobytes())
            elif kind == "GTmod":
                found = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
                if found is None or not np.array_equal(found, gt):
                    raise BadImage(f"{file} is another image; --overwrite replaces it")
    return notes, None
