"""Turn a folder of photographs into training data, or into a benchmark set.

Training data are LMDBs of aligned sub-images in BasicSR's layout, one of HR and one of LR a scale:

    OUTPUT/NAME_train_HR_sub.lmdb        OUTPUT/NAME_train_LR_bicubic_X4_sub.lmdb

A benchmark set (--benchmark) is pairs of folders: OUTPUT/GTmod4 and OUTPUT/LRbicx4.
LR is made as MATLAB's imresize makes it, from the whole image, before anything is cut.

With --teacher, what another network makes of the LR images takes the place of HR: a network trained
on it learns from that teacher, at no cost in training. LR images so need no HR, and photographs
shrunk by less than the scale are more of them.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections import Counter
from pathlib import Path

import cv2
import lmdb

from mlrn_arch import machine
from mlrn_arch.errors import UserError
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
        help="LR scales to make (default: 2 3 4); more can be added later, HR is then kept")
    add("--name", help="NAME in the LMDBs' names (default: the last part of OUTPUT)")
    add("--crop-size", type=int, default=480,
        help="side of an HR sub-image in pixels, a multiple of 12, not below the option file's "
        "gt_size (default: %(default)s)")
    add("--step", type=int, default=240,
        help="distance between sub-images in pixels, a multiple of 12 (default: %(default)s: they "
        "overlap by half and every pixel is stored about four times; --step 480 is a quarter)")
    add("--format", choices=("png", "bmp"), default="png",
        help="png is small; bmp is decoded tens of times faster and takes two to five times the "
        "disk, least for detailed photographs (default: %(default)s)")
    add("--teacher", metavar="NETWORK[:CHECKPOINT]",
        help="store this network's output in place of HR, for the one scale that --scale names: a "
        "NETWORK as `mlrn compare` takes it, or the checkpoint of any network that spandrel (`pip "
        "install spandrel`) knows")
    add("--shrink", type=int, nargs="+", choices=(1, 2, 3, 4),
        help="with --teacher: LR images are the photographs shrunk by each of these (default: the "
        "scale); smaller factors give more of them")
    add("--benchmark", action="store_true", help="write GTmod*/LRbicx* folders of PNGs, no LMDBs")
    add("--workers", type=int, default=machine.cores(),
        help="images worked on at a time (default: %(default)s, one a CPU core)")
    add("--overwrite", action="store_true", help="make anew what is already there")
    # fmt: on
    parser.epilog = """examples:
  mlrn prepare DIV2K_train_HR datasets/DIV2K
  mlrn prepare photos datasets/photos --scale 4 --format bmp
  mlrn prepare Set5 datasets/Set5 --benchmark

Interrupted, the same command continues. Nothing finished is overwritten unless --overwrite says so.
Images that cannot be used are named, the others are prepared, and the exit code is 1."""


def run(args: argparse.Namespace) -> int:
    """Prepare a folder of images as the arguments of `add_arguments` say.

    Returns:
        0; 1 if any image had to be left out; 130 after Ctrl-C.

    Raises:
        UserError: if nothing can be done, or what is already there forbids it.
    """
    if args.workers < 1:
        raise UserError("--workers must be at least 1")
    for option, value in (("--crop-size", args.crop_size), ("--step", args.step)):
        if value < 1 or value % training.MULTIPLE:
            raise UserError(f"{option} must be a multiple of {training.MULTIPLE}, got {value}")
    args.scale = sorted(set(args.scale))
    if args.teacher:
        if args.benchmark or len(args.scale) != 1:
            raise UserError("--teacher makes training data of one scale: add --scale 4, say")
        args.shrink = sorted(set(args.shrink or args.scale))
        # Its faults are told here.
        training.load_teacher(args.teacher, args.scale[0], tuple(args.imports))
    elif args.shrink:
        raise UserError("--shrink is for --teacher; name one")
    images = stream.find(args.input, args.output)
    pairs = [args.output / f"{kind}{s}" for s in args.scale for kind in ("GTmod", "LRbicx")]
    if args.benchmark and args.input.resolve() in (folder.resolve() for folder in pairs):
        raise UserError(f"INPUT {args.input} would be written to; give another OUTPUT")
    made = [folder for folder in (*pairs, args.output, *args.output.parents) if not folder.exists()]
    # Every core has an image of its own. Said before the workers fork: OpenCV's own threads do not
    # survive that, and a worker that tells them hangs.
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        return (_benchmark if args.benchmark else training.make)(args, images)
    except KeyboardInterrupt:
        print("mlrn prepare: interrupted; the same command continues", file=sys.stderr)
        return 130
    except RuntimeError as error:  # of the handler of a signal, which may come at any time
        raise stream.killed(error, "") from None
    except (OSError, lmdb.Error) as error:
        raise UserError(
            f"cannot write to {args.output}: {error}; if its disk is full, free some space: the "
            "same command continues"
        ) from None
    finally:
        cv2.setNumThreads(threads)
        for folder in made:  # what stayed empty was not there before
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


def _benchmark(args: argparse.Namespace, images: dict[str, Path]) -> int:
    start, tally = time.monotonic(), Counter()
    for scale in args.scale:
        for kind in ("GTmod", "LRbicx"):
            (args.output / f"{kind}{scale}").mkdir(parents=True, exist_ok=True)
    if not list(stream.results(functools.partial(_pair, args=args), images, args.workers, tally)):
        raise UserError(f"no image in {args.input} can be used")
    print(f"{args.output}: " + ", ".join(f"GTmod{s} and LRbicx{s}" for s in args.scale))
    return stream.report(tally, len(images), start)


def _pair(key: str, path: Path, args: argparse.Namespace) -> tuple[list[str], None]:
    """Write the files of a benchmark image that are not there; returns what is not in them."""
    kinds = [(kind, scale) for scale in args.scale for kind in ("GTmod", "LRbicx")]
    files = {(kind, s): args.output / f"{kind}{s}" / f"{key}.png" for kind, s in kinds}
    todo = [kind for kind in kinds if args.overwrite or not files[kind].exists()]
    if not todo:
        return ["already there, kept"], None
    img, notes = stream.decode(path)
    if min(img.shape[:2]) < max(scale for _, scale in todo):
        raise BadImage(f"{img.shape[1]}x{img.shape[0]} is less than one LR pixel")
    for kind, s in todo:
        gt = img[: img.shape[0] // s * s, : img.shape[1] // s * s]
        file = files[kind, s]
        part = file.with_name(f".{file.name}")  # BasicSR passes over hidden files
        part.write_bytes(cv2.imencode(".png", gt if kind == "GTmod" else imresize(gt, s))[1])
        os.replace(part, file)
    return notes, None
