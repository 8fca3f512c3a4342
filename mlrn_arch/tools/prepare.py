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
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
import threading
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import torch
from basicsr.utils import img2tensor, tensor2img
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from mlrn_arch import networks
from mlrn_arch.errors import UserError
from mlrn_arch.inference.image_files import BadImage, is_deep, white_is_zero
from mlrn_arch.inference.resize import imresize
from mlrn_arch.machine import computes_in_bf16

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
_MULTIPLE = 12  # divisible by every scale: HR is cropped to it, so scales made apart still agree
_COMMIT_BYTES, _COMMIT_SECONDS = 2**26, 2.0  # what waits in memory, what a kill can lose
_ANEW = "--overwrite with every scale makes all of it anew"
_NOTES = {
    "kept": "already there, kept",
    "kept grey": "grey (kept grey)",
    "grey": "grey (stored with 3 equal channels)",
    "palette": "with a palette (expanded)",
    "alpha": "with transparency (dropped)",
    "deep": "of 16 bits (rounded to 8)",
    "turned": "turned as their EXIF says",
    "colour": "in another colour space (converted to RGB)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mlrn prepare` on `parser`."""
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help="folder of HR images, read with its sub-folders")
    add("output", type=Path, metavar="OUTPUT", help="folder to write to, such as datasets/DIV2K")
    add(
        "--scale",
        type=int,
        nargs="+",
        choices=(2, 3, 4),
        default=[2, 3, 4],
        help="LR scales to make (default: 2 3 4); more can be added later, HR is then kept",
    )
    add("--name", help="NAME in the LMDBs' names (default: the last part of OUTPUT)")
    add(
        "--crop-size",
        type=int,
        default=480,
        help="side of an HR sub-image in pixels, a multiple of 12, not below the option file's "
        "gt_size (default: %(default)s)",
    )
    add(
        "--step",
        type=int,
        default=240,
        help="distance between sub-images in pixels, a multiple of 12 (default: %(default)s: they "
        "overlap by half and every pixel is stored about four times; --step 480 is a quarter)",
    )
    add(
        "--format",
        choices=("png", "bmp"),
        default="png",
        help="png is small; bmp is decoded tens of times faster and takes two to five times the "
        "disk, least for detailed photographs (default: %(default)s)",
    )
    add(
        "--teacher",
        metavar="NETWORK[:CHECKPOINT]",
        help="store this network's output in place of HR, for the one scale that --scale names: a "
        "NETWORK as `mlrn compare` takes it, or the checkpoint of any network that spandrel (`pip "
        "install spandrel`) knows",
    )
    add(
        "--shrink",
        type=int,
        nargs="+",
        choices=(1, 2, 3, 4),
        help="with --teacher: LR images are the photographs shrunk by each of these (default: the "
        "scale); smaller factors give more of them",
    )
    add(
        "--import",
        dest="imports",
        nargs="+",
        default=[],
        metavar="FILE",
        help="Python files that register networks with BasicSR, such as the teacher's",
    )
    add("--benchmark", action="store_true", help="write GTmod*/LRbicx* folders of PNGs, no LMDBs")
    add("--workers", type=int, help="images worked on at a time (default: one a CPU core)")
    add("--overwrite", action="store_true", help="make anew what is already there")
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
    if args.workers is None:
        affinity = getattr(os, "sched_getaffinity", None)
        args.workers = len(affinity(0)) if affinity else os.cpu_count() or 1
    if args.workers < 1:
        raise UserError("--workers must be at least 1")
    for option, value in (("--crop-size", args.crop_size), ("--step", args.step)):
        if value < 1 or value % _MULTIPLE:
            raise UserError(f"{option} must be a multiple of {_MULTIPLE}, got {value}")
    args.scale = sorted(set(args.scale))
    if args.teacher:
        if args.benchmark or len(args.scale) != 1:
            raise UserError("--teacher makes training data of one scale: add --scale 4, say")
        args.shrink = sorted(set(args.shrink or args.scale))
        _teacher(args.teacher, args.scale[0], tuple(args.imports))  # faults are told here
    elif args.shrink or args.imports:
        raise UserError("--shrink and --import are for --teacher; name one")
    images = _find_images(args.input, args.output)
    pairs = [args.output / f"{kind}{s}" for s in (2, 3, 4) for kind in ("GTmod", "LRbicx")]
    made = [folder for folder in (*pairs, args.output, *args.output.parents) if not folder.exists()]
    # Every core has an image of its own. Said before the workers fork: OpenCV's own threads do not
    # survive that, and a worker that tells them hangs.
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        return (_benchmark if args.benchmark else _training)(args, images)
    except KeyboardInterrupt:
        print("mlrn prepare: interrupted; the same command continues", file=sys.stderr)
        return 130
    except (OSError, lmdb.Error) as error:
        # LMDB calls a full disk an input/output error
        if re.search("No space left|quota|Input/output", str(error)):
            raise UserError(
                f"{error}: the disk of {args.output} is full, or fails; free some space and give "
                "the same command again, it continues"
            ) from None
        if isinstance(error, OSError):
            raise UserError(f"cannot write to {args.output}: {error}") from None
        raise
    finally:
        cv2.setNumThreads(threads)
        for folder in made:  # what stayed empty was not there before
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


def _find_images(source: Path, output: Path) -> dict[str, Path]:
    """All images below `source` by the key that they get, in the order of their paths."""
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; INPUT is a folder of HR images")
    if source.resolve() == output.resolve():
        raise UserError("INPUT and OUTPUT are the same folder; give OUTPUT one of its own")
    paths, others, seen = [], 0, {output.resolve()}  # our own output is no input
    for folder, names, files in os.walk(source, followlinks=True):
        seen.add(Path(folder).resolve())  # a link back up would never end
        visit = []
        for name in sorted(names):
            target = Path(folder, name).resolve()
            if not name.startswith(".") and not name.endswith(".lmdb") and target not in seen:
                seen.add(target)
                visit.append(name)
        names[:] = visit
        wanted = [f for f in files if not f.startswith(".") and Path(f).suffix.lower() in _SUFFIXES]
        paths += [Path(folder, name) for name in wanted]
        others += len(files) - len(wanted)
    if others:
        print(f"{others} other or hidden files in {source} ignored")
    if not paths:
        raise UserError(f"no images ({', '.join(sorted(_SUFFIXES))}) in {source}")

    images: dict[str, Path] = {}
    for path in sorted(paths):
        name = "_".join(path.relative_to(source).with_suffix("").parts)
        # BasicSR ends a key at its first dot and encodes it as ASCII
        key = re.sub(
            "[^A-Za-z0-9_-]", lambda c: f"-{ord(c[0]):x}-", unicodedata.normalize("NFC", name)
        )
        if key in images:
            raise UserError(
                f"{images[key]} and {path} would both be stored as {key}; rename or move one"
            )
        if len(key) > 200:
            raise UserError(f"the name of {path} is too long to be a key; rename it")
        images[key] = path
    return images


def _decode(path: Path) -> tuple[np.ndarray, list[str]]:
    """An image as 8-bit BGR (H x W x 3) or grey (H x W), and what was done to it."""
    try:
        with Image.open(path) as image:
            mode, notes = image.mode, []
            grey = mode.split(";")[0] in ("1", "L", "LA", "La", "I")
            if grey:
                notes.append("grey")
            elif mode in ("P", "PA"):
                notes.append("palette")
            elif not mode.startswith("RGB"):
                notes.append("colour")
            if mode[-1] in "Aa" or "transparency" in image.info:
                notes.append("alpha")
            deep = is_deep(image)
            if image.getexif().get(0x0112, 1) != 1:
                notes.append("turned")
            if deep:
                flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH  # which turns it, too
                img = cv2.imdecode(np.fromfile(path, np.uint8), flags)
                if img is None or img.dtype != np.uint16:
                    raise BadImage("broken, or neither of 8 nor of 16 bits a channel")
                if white_is_zero(image):
                    img = 65535 - img
                img = ((img.astype(np.uint32) + 128) // 257).astype(np.uint8)  # rounded x / 257
                return (img[..., 0] if grey else img), [*notes, "deep"]
            image = ImageOps.exif_transpose(image).convert("L" if grey else "RGB")
    except UnidentifiedImageError:
        raise BadImage("not an image, or broken") from None
    except BadImage:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a broken file leads them to
        raise BadImage(str(error) or type(error).__name__) from error
    img = np.asarray(image)
    return (img if grey else cv2.cvtColor(img, cv2.COLOR_RGB2BGR)), notes


def _stream(
    work: Callable, jobs: list[tuple[str, Path]], workers: int
) -> Iterator[tuple[str, Path, Any]]:
    """Yield key, path, `work(key, path)` (None: not usable) in order, working a few jobs ahead."""
    if not jobs:
        return
    # Processes, not threads: a file that crashes a decoder ends a worker, and the run names it.
    with (
        ProcessPoolExecutor(min(workers, len(jobs)), initializer=_start_worker) as pool,
        tqdm(total=len(jobs), unit=" images", disable=None, dynamic_ncols=True) as bar,
    ):
        ahead: deque = deque()
        queue = iter(jobs)
        try:
            while True:
                while len(ahead) < 2 * workers and (job := next(queue, None)):
                    ahead.append((*job, pool.submit(work, *job)))
                if not ahead:
                    return
                key, path, future = ahead.popleft()
                try:
                    result = future.result()
                except BadImage as reason:
                    bar.write(f"left out: {path}: {reason}", file=sys.stderr)
                    result = None
                except BrokenProcessPool:
                    raise UserError(
                        f"a worker process was killed at or near {path}, for want of memory "
                        f"perhaps; the same command with --workers {max(1, workers // 2)} continues"
                    ) from None
                bar.update()
                yield key, path, result
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)  # an image a core
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    Image.MAX_IMAGE_PIXELS = None  # large photographs are no attack here

    def follow() -> None:  # a parent that was killed cannot end its workers
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _report(notes: Counter, left_out: int, total: int, start: float) -> int:
    if notes:
        print("images: " + "; ".join(f"{notes[n]} {t}" for n, t in _NOTES.items() if notes[n]))
    print(f"{total - left_out} of {total} images in {time.monotonic() - start:.1f} s")
    if left_out:
        print(f"{left_out} left out, each named above with the reason")
    return 1 if left_out else 0


def _benchmark(args: argparse.Namespace, images: dict[str, Path]) -> int:
    start, notes, left_out = time.monotonic(), Counter(), 0
    for folder in (args.output / f"{kind}{s}" for s in args.scale for kind in ("GTmod", "LRbicx")):
        if folder.resolve() == args.input.resolve():
            raise UserError(f"INPUT {args.input} would be written to; give another OUTPUT")
        folder.mkdir(parents=True, exist_ok=True)

    work = partial(_pair, output=args.output, scales=args.scale, overwrite=args.overwrite)
    with closing(_stream(work, list(images.items()), args.workers)) as results:
        for _, _, found in results:
            left_out += found is None
            notes.update(found or ())
    if left_out == len(images):
        raise UserError(f"no image in {args.input} can be used")
    print(f"{args.output}: " + ", ".join(f"GTmod{s} and LRbicx{s}" for s in args.scale))
    return _report(notes, left_out, len(images), start)


def _pair(key: str, path: Path, output: Path, scales: list[int], overwrite: bool) -> list[str]:
    """Write the files of a benchmark image that are not there; returns what was done to it."""

    def missing(kind: str, scale: int) -> list[Path]:
        file = output / f"{kind}{scale}" / f"{key}.png"
        return [file] if overwrite or not file.exists() else []

    scales = [s for s in scales if missing("GTmod", s) or missing("LRbicx", s)]
    if not scales:
        return ["kept"]
    img, notes = _decode(path)
    if min(img.shape[:2]) < max(scales):
        raise BadImage(f"{img.shape[1]}x{img.shape[0]} is less than one LR pixel")
    for s in scales:
        gt = img[: img.shape[0] // s * s, : img.shape[1] // s * s]
        for file in missing("GTmod", s):
            _write_png(file, gt)
        for file in missing("LRbicx", s):
            _write_png(file, imresize(gt, s))
    return ["kept grey" if n == "grey" else n for n in notes]


def _write_png(file: Path, img: np.ndarray) -> None:
    part = file.with_name(f".{file.name}")  # until it is whole; BasicSR passes over hidden files
    part.write_bytes(cv2.imencode(".png", img)[1].tobytes())
    os.replace(part, file)


def _training(args: argparse.Namespace, images: dict[str, Path]) -> int:
    start = time.monotonic()
    name = (args.name or args.output.resolve().name).removesuffix("_train")
    if not name or name.startswith(".") or Path(name).name != name:
        raise UserError(f"{name!r} cannot be the name of a data set; choose one with --name")
    lmdbs = {s: args.output / f"{name}_train_LR_bicubic_X{s}_sub.lmdb" for s in (2, 3, 4)}
    lmdbs[1] = args.output / f"{name}_train_HR_sub.lmdb"  # HR is scale 1
    wanted = [1, *args.scale]
    settings = {"crop_size": args.crop_size, "step": args.step, "format": args.format}
    if args.teacher:
        settings |= {"teacher": args.teacher, "shrink": args.shrink}
    unfinished = args.output / f".{name}.partial"

    if (unfinished / "ready").exists():  # killed while it was put into place
        plan = _read_json(unfinished / "plan.json")
        _publish(unfinished)
        print(f"{args.output}: put the finished LMDBs of an interrupted run into place")
        if plan == {**settings, "scales": wanted}:
            return 0

    there = [s for s in lmdbs if lmdbs[s].exists()]
    todo = wanted if args.overwrite else [s for s in wanted if s not in there]
    if args.overwrite and (left := set(there) - set(wanted)):
        scales = " ".join(str(s) for s in sorted({*wanted, *left} - {1}))
        raise UserError(
            f"other scales of {name} are there too and would not fit a new HR; "
            f"make them anew together: --scale {scales} --overwrite"
        )
    for s in set(wanted) - set(todo):
        if (found := _read_json(lmdbs[s] / "prepare.json")) != settings:
            raise UserError(
                f"{lmdbs[s]} is there already, made with {_say(found)}, not with {_say(settings)}; "
                "choose another OUTPUT or --name, or make it anew with --overwrite"
            )
    if not todo:
        print(f"{args.output}: everything is there already, with these settings")
        return 0
    if 1 in todo and there and not args.overwrite:
        raise UserError(f"{args.output} has LR of {name} but no HR; make all anew with --overwrite")

    left_out, hr_counts = 0, None
    if 1 not in todo:  # LR is added to a finished HR: of the same images, cut the same way
        with open(lmdbs[1] / "meta_info.txt") as lines:
            hr_counts = Counter(line.split(".")[0].rpartition("_s")[0] for line in lines)
        if gone := [key for key in hr_counts if key not in images]:
            raise UserError(f"{lmdbs[1]} has the image {gone[0]}, {args.input} has not; {_ANEW}")
        for key in [key for key in images if key not in hr_counts]:
            print(f"left out: {images.pop(key)}: not in {lmdbs[1]}; {_ANEW}", file=sys.stderr)
            left_out += 1

    done = _open_partial(unfinished, {**settings, "scales": todo}, images)
    total = len(images) + left_out
    left_out += _build(args, unfinished, {s: lmdbs[s].name for s in todo}, images, done, hr_counts)
    if not done:
        shutil.rmtree(unfinished)
        raise UserError(f"no image in {args.input} can be used")
    level = 1 if args.format == "png" else 0
    for s in todo:
        folder, side = unfinished / lmdbs[s].name, args.crop_size // s
        (folder / "prepare.json").write_text(json.dumps(settings))
        with open(folder / "meta_info.txt", "w") as meta:
            for key in sorted(done):
                for i in range(1, done[key]["count"] + 1):
                    meta.write(f"{key}_s{i:03d}.{args.format} ({side},{side},3) {level}\n")
    (unfinished / "ready").touch()
    _publish(unfinished)

    count = sum(entry["count"] for entry in done.values())
    for s in wanted:
        side, size = args.crop_size // s, (lmdbs[s] / "data.mdb").stat().st_size / 1e6
        kept = "" if s in todo else ", kept as it was"
        print(f"{lmdbs[s]}: {count} sub-images of {side}x{side}, {size:,.0f} MB{kept}")
    code = _report(Counter(n for e in done.values() for n in e["notes"]), left_out, total, start)
    s = args.scale[-1]
    patch = 256 if s == 4 else 192  # of the option files
    force = [f"datasets:train:dataroot_gt={lmdbs[1]}", f"datasets:train:dataroot_lq={lmdbs[s]}"]
    force += [f"datasets:train:gt_size={args.crop_size}"] if args.crop_size < patch else []
    print(f"to train on it:\n  mlrn train -opt options/train_MLRN_x{s}.yml --force_yml", end=" ")
    print(shlex.join(force))
    return code


def _open_partial(unfinished: Path, plan: dict, images: dict[str, Path]) -> dict[str, dict]:
    """Start an unfinished run, or continue it: the images whose sub-images are all committed."""
    done: dict[str, dict] = {}
    found = _read_json(unfinished / "plan.json")
    if found is None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        (unfinished / "journal").touch()
        (unfinished / "plan.json").write_text(json.dumps(plan))
        return done
    for line in (unfinished / "journal").read_text().splitlines():
        if line.endswith("}"):  # not torn by a kill
            entry = json.loads(line)
            done[entry["key"]] = entry
    if found != plan:
        raise UserError(
            f"{unfinished} is an unfinished run with {_say(found)}, not with {_say(plan)}; "
            "give the same settings to continue it, or delete it to start over"
        )
    for key, entry in done.items():
        if key not in images or entry["stamp"] != _stamp(images[key]):
            raise UserError(
                f"the image {key} has changed or gone since it was read by the unfinished run in "
                f"{unfinished}; delete that folder to start over"
            )
    print(f"continuing: {len(done)} of {len(images)} images are done")
    return done


def _cut(
    key: str,
    path: Path,
    scales: list[int],
    crop_size: int,
    step: int,
    file_format: str,
    shrink: list[int] | None = None,
    teach: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[dict, list[list[np.ndarray]]]:
    """The journal entry of an image, and for each scale its encoded sub-images, row by row.

    With `teach`, those of the image shrunk by each of `shrink` one after the other.
    """
    img, notes = _decode(path)
    if img.ndim == 2:
        img = cv2.cvtColor(img, cv2.COLOR_GRAY2BGR)
    height, width = (side // _MULTIPLE * _MULTIPLE for side in img.shape[:2])
    if min(height, width) < crop_size:
        size = f"{img.shape[1]}x{img.shape[0]}"
        raise BadImage(f"{size} pixels, smaller than --crop-size {crop_size}")
    img, records = img[:height, :width], [[] for _ in scales]
    level = [cv2.IMWRITE_PNG_COMPRESSION, 1] if file_format == "png" else []
    for factor in shrink or [1]:
        if teach is None:
            parts = {s: img if s == 1 else imresize(img, s) for s in scales}
        else:
            lq = img if factor == 1 else imresize(img, factor)
            if min(lq.shape[:2]) * max(scales) < crop_size:
                continue
            parts = {1: teach(lq), max(scales): lq}
        for s, encoded in zip(scales, records, strict=True):
            part, crop = parts[s], crop_size // s
            top, left = (  # the last one flush with the edge
                sorted({*range(0, side - crop, step // s), side - crop}) for side in part.shape[:2]
            )
            crops = [part[y : y + crop, x : x + crop] for y in top for x in left]
            encoded += [cv2.imencode(f".{file_format}", p, level)[1] for p in crops]
    if not records[0]:
        raise BadImage(f"{img.shape[1]}x{img.shape[0]} pixels, shrunk smaller than an LR sub-image")
    count = len(records[0])
    return {"key": key, "count": count, "notes": notes, "stamp": _stamp(path)}, records


@functools.cache
def _teacher(spec: str, scale: int, imports: tuple[str, ...]) -> torch.nn.Module:
    """Load a teacher, once a process.

    Raises:
        UserError: There is no such network or checkpoint, or it has another scale.
    """
    for file in imports:
        try:
            runpy.run_path(file)
        except OSError as error:
            raise UserError(f"--import {file}: {error.strerror}") from None
    network = networks.load_teacher(spec, scale).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        made = network(torch.rand(1, 3, 48, 48)).shape[-1]
    if made != 48 * scale:
        raise UserError(f"--teacher: {spec} enlarges by {made / 48:g}, not by --scale {scale}")
    return network


def _teach(lq: np.ndarray, spec: str, scale: int, imports: tuple[str, ...]) -> np.ndarray:
    """What a teacher makes of an LR image; both are (h, w, 3), uint8, BGR."""
    network = _teacher(spec, scale, imports)
    x = img2tensor(lq / np.float32(255))[None].to(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, computes_in_bf16()):
        return tensor2img(network(x).float())


def _build(
    args: argparse.Namespace,
    unfinished: Path,
    names: dict[int, str],
    images: dict[str, Path],
    done: dict[str, dict],
    hr_counts: Counter | None,
) -> int:
    """Fill the LMDBs `names` (by scale) and `done`; returns how many images were left out."""
    left_out = 0
    batch: list[tuple[dict, list[list[np.ndarray]]]] = []
    with ExitStack() as stack:
        environments = [
            lmdb.open(str(unfinished / name), map_size=2**40) for name in names.values()
        ]
        for environment in environments:
            stack.callback(environment.close)
        journal = stack.enter_context(open(unfinished / "journal", "a"))
        journal.write("\n")  # ends a line that a kill tore
        journal.flush()

        def commit() -> None:
            for i, environment in enumerate(environments):
                with environment.begin(write=True) as transaction:
                    for entry, records in batch:
                        for n, record in enumerate(records[i], 1):
                            transaction.put(f"{entry['key']}_s{n:03d}".encode(), record)
            # only now are these images done
            journal.writelines(json.dumps(entry) + "\n" for entry, _ in batch)
            journal.flush()
            done.update((entry["key"], entry) for entry, _ in batch)
            batch.clear()

        work = partial(
            _cut,
            scales=list(names),
            crop_size=args.crop_size,
            step=args.step,
            file_format=args.format,
        )
        if args.teacher:
            named = {"scale": args.scale[0], "imports": tuple(args.imports)}
            teach = partial(_teach, spec=args.teacher, **named)
            work = partial(work, shrink=args.shrink, teach=teach)
        jobs = [(key, path) for key, path in images.items() if key not in done]
        results = stack.enter_context(closing(_stream(work, jobs, args.workers)))
        waiting, last = 0, time.monotonic()
        for key, path, result in results:
            count = result[0]["count"] if result else 0
            if hr_counts is not None and count != hr_counts[key]:
                raise UserError(f"{path} no longer gives the sub-images that HR has; {_ANEW}")
            if not result:
                left_out += 1
                continue
            batch.append(result)
            waiting += sum(record.nbytes for records in result[1] for record in records)
            if waiting > _COMMIT_BYTES or time.monotonic() - last > _COMMIT_SECONDS:
                commit()
                waiting, last = 0, time.monotonic()
        commit()
    return left_out


def _publish(unfinished: Path) -> None:
    """Move what `unfinished` holds, all of it finished, to where it belongs; may be repeated."""
    for folder in sorted(unfinished.glob("*.lmdb"), reverse=True):  # HR last
        target = unfinished.parent / folder.name
        if target.exists():
            target.rename(unfinished / f"{folder.name}.old")
        folder.rename(target)
    for old in unfinished.glob("*.old"):
        shutil.rmtree(old)
    for file in ("journal", "plan.json", "ready"):
        (unfinished / file).unlink(missing_ok=True)
    unfinished.rmdir()


def _read_json(file: Path) -> dict | None:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _say(settings: dict | None) -> str:
    if settings is None:
        return "unknown settings"
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _stamp(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]
