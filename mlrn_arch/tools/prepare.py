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
import shlex
import shutil
import sys
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from mlrn_arch import machine, networks, plugins
from mlrn_arch.errors import UserError
from mlrn_arch.inference import image_files
from mlrn_arch.inference.image_files import BadImage
from mlrn_arch.inference.resize import imresize
from mlrn_arch.inference.upscaler import Upscaler

_MULTIPLE = 12  # divisible by every scale: HR is cropped to it, so scales made apart still agree
_COMMIT_BYTES, _COMMIT_SECONDS = 2**26, 2.0  # what waits in memory, what a kill can lose
_LEFT_OUT = "left out"
_ANEW = "--overwrite with every scale makes all of it anew"


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
        if value < 1 or value % _MULTIPLE:
            raise UserError(f"{option} must be a multiple of {_MULTIPLE}, got {value}")
    args.scale = sorted(set(args.scale))
    if args.teacher:
        if args.benchmark or len(args.scale) != 1:
            raise UserError("--teacher makes training data of one scale: add --scale 4, say")
        args.shrink = sorted(set(args.shrink or args.scale))
        _teacher(args.teacher, args.scale[0], tuple(args.imports))  # faults are told here
    elif args.shrink:
        raise UserError("--shrink is for --teacher; name one")
    images = _find_images(args.input, args.output)
    pairs = [args.output / f"{kind}{s}" for s in args.scale for kind in ("GTmod", "LRbicx")]
    if args.benchmark and args.input.resolve() in (folder.resolve() for folder in pairs):
        raise UserError(f"INPUT {args.input} would be written to; give another OUTPUT")
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
    except RuntimeError as error:  # of the handler of a signal, which may come at any time
        raise _killed(error, "") from None
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


def _find_images(source: Path, output: Path) -> dict[str, Path]:
    """All images below `source` by the key that they get, in the order of their paths."""
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; INPUT is a folder of HR images")
    if source.resolve() == output.resolve():
        raise UserError("INPUT and OUTPUT are the same folder; give OUTPUT one of its own")
    paths, seen = [], {output.resolve()}  # our own output is no input
    for folder, names, files in os.walk(source, followlinks=True):
        real = Path(folder).resolve()
        names[:] = sorted(n for n in names if not n.startswith(".") and not n.endswith(".lmdb"))
        if real in seen:  # a link back up would never end
            names.clear()
            continue
        seen.add(real)
        paths += [Path(folder, file) for file in files if not file.startswith(".")]
    images: dict[str, Path] = {}
    for path in sorted(path for path in paths if path.suffix.lower() in image_files.FORMATS):
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
    if not images:
        raise UserError(f"no images ({', '.join(image_files.FORMATS)}) in {source}")
    return images


def _stream(
    work: Callable, images: dict[str, Path], workers: int, tally: Counter
) -> Iterator[tuple[str, Any]]:
    """Yield key and result of `work(key, path)` in order, working a few images ahead.

    Images that cannot be used are named; `tally` counts them, and the notes that come first in
    every result.
    """
    if not images:
        return
    # Processes, not threads: a file that crashes a decoder ends a worker, and the run names it.
    results = DataLoader(
        list(images.items()),
        batch_size=None,
        num_workers=min(workers, len(images)),
        collate_fn=functools.partial(_attempt, work),
        worker_init_fn=_end_with_parent,
    )
    path = "the start"
    try:
        bar = tqdm(results, unit=" images", disable=None, dynamic_ncols=True)
        for (key, path), result in zip(images.items(), bar, strict=True):
            if isinstance(result, OSError):
                raise result
            if isinstance(result, BadImage):
                bar.write(f"left out: {path}: {result}", file=sys.stderr)
                tally[_LEFT_OUT] += 1
                continue
            tally.update(result[0])
            yield key, result[1]
    except RuntimeError as error:
        raise _killed(error, f" soon after {path}") from None


def _killed(error: RuntimeError, where: str) -> Exception:
    if "DataLoader worker" not in str(error):
        return error
    return UserError(
        f"a worker process was killed{where}, for want of memory perhaps; the same command with "
        "--workers 1 continues, and stops at the image if it is one"
    )


def _end_with_parent(_: int) -> None:
    def follow() -> None:  # a worker with much to hand over would wait for ever
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _attempt(work: Callable, image: tuple[str, Path]) -> Any:
    try:
        return work(*image)
    except (BadImage, OSError) as error:  # raised here, DataLoader would put its traceback into it
        return error


def _decode(path: Path) -> tuple[np.ndarray, list[str]]:
    """An image as 8-bit BGR (H x W x 3) or grey (H x W), and what of it is not in there."""
    array, notes = image_files.read(path).array, []
    if array.dtype == np.uint16:
        notes.append("of 16 bits (rounded to 8)")
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # rounded x / 257
    if array.shape[2] in (2, 4):
        notes.append("with transparency (dropped)")
    if array.shape[2] < 3:
        notes.append("grey")
        return array[..., 0], notes
    return np.ascontiguousarray(array[..., 2::-1]), notes


def _report(tally: Counter, total: int, start: float) -> int:
    left_out = tally.pop(_LEFT_OUT, 0)
    if tally:
        print("images: " + "; ".join(f"{number} {note}" for note, number in sorted(tally.items())))
    print(f"{total - left_out} of {total} images in {time.monotonic() - start:.1f} s")
    if left_out:
        print(f"{left_out} left out, each named above with the reason")
    return 1 if left_out else 0


# --- a benchmark set ----------------------------------------------------------------------------


def _benchmark(args: argparse.Namespace, images: dict[str, Path]) -> int:
    start, tally = time.monotonic(), Counter()
    for scale in args.scale:
        for kind in ("GTmod", "LRbicx"):
            (args.output / f"{kind}{scale}").mkdir(parents=True, exist_ok=True)
    if not list(_stream(functools.partial(_pair, args=args), images, args.workers, tally)):
        raise UserError(f"no image in {args.input} can be used")
    print(f"{args.output}: " + ", ".join(f"GTmod{s} and LRbicx{s}" for s in args.scale))
    return _report(tally, len(images), start)


def _pair(key: str, path: Path, args: argparse.Namespace) -> tuple[list[str], None]:
    """Write the files of a benchmark image that are not there; returns what is not in them."""
    kinds = [(kind, scale) for scale in args.scale for kind in ("GTmod", "LRbicx")]
    files = {(kind, s): args.output / f"{kind}{s}" / f"{key}.png" for kind, s in kinds}
    todo = [kind for kind in kinds if args.overwrite or not files[kind].exists()]
    if not todo:
        return ["already there, kept"], None
    img, notes = _decode(path)
    if min(img.shape[:2]) < max(scale for _, scale in todo):
        raise BadImage(f"{img.shape[1]}x{img.shape[0]} is less than one LR pixel")
    for kind, s in todo:
        gt = img[: img.shape[0] // s * s, : img.shape[1] // s * s]
        file = files[kind, s]
        part = file.with_name(
            f".{file.name}"
        )  # until it is whole; BasicSR passes over hidden files
        part.write_bytes(cv2.imencode(".png", gt if kind == "GTmod" else imresize(gt, s))[1])
        os.replace(part, file)
    return notes, None


# --- training data ------------------------------------------------------------------------------


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

    if plan := _read_json(unfinished / "finished.json"):  # killed while it was put into place
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

    tally, total, hr_counts = Counter(), len(images), None
    if 1 not in todo:  # LR is added to a finished HR: of the same images, cut the same way
        hr_counts = _counts(lmdbs[1])
        for key in [key for key in images if key not in hr_counts]:
            print(f"left out: {images.pop(key)}: not in {lmdbs[1]}; {_ANEW}", file=sys.stderr)
            tally[_LEFT_OUT] += 1

    folders = {s: unfinished / lmdbs[s].name for s in todo}
    plan, last = {**settings, "scales": todo}, folders[todo[-1]]  # what the last one has, all have
    found = _read_json(unfinished / "plan.json")
    if found is None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        (unfinished / "plan.json").write_text(json.dumps(plan))
    elif found != plan:
        raise UserError(
            f"{unfinished} is an unfinished run with {_say(found)}, not with {_say(plan)}; "
            "give the same settings to continue it, or delete it to start over"
        )
    done = _counts(last) if last.exists() else {}
    if done:
        print(f"continuing: {len(done)} of {len(images)} images are done")
    _build(args, folders, {k: images[k] for k in images if k not in done}, tally)
    counts = {key: count for key, count in _counts(last).items() if key in images}
    other = [key for key in hr_counts or () if counts.get(key) != hr_counts[key]]
    if other or not counts:
        shutil.rmtree(unfinished)
        text = f"no image in {args.input} can be used"
        if other:
            text = f"{args.input} no longer gives the sub-images of {other[0]} that {lmdbs[1]} has"
        raise UserError(f"{text}; {_ANEW}" if other else text)
    level = 1 if args.format == "png" else 0
    for s, folder in folders.items():
        side = args.crop_size // s
        (folder / "prepare.json").write_text(json.dumps(settings))
        with open(folder / "meta_info.txt", "w") as meta:
            for key, count in sorted(counts.items()):
                for i in range(1, count + 1):
                    meta.write(f"{key}_s{i:03d}.{args.format} ({side},{side},3) {level}\n")
    os.replace(unfinished / "plan.json", unfinished / "finished.json")
    _publish(unfinished)

    for s in wanted:
        side, size = args.crop_size // s, (lmdbs[s] / "data.mdb").stat().st_size / 1e6
        kept = "" if s in todo else ", kept as it was"
        number = sum(counts.values())
        print(f"{lmdbs[s]}: {number} sub-images of {side}x{side}, {size:,.0f} MB{kept}")
    code = _report(tally, total, start)
    s = args.scale[-1]
    patch = 256 if s == 4 else 192  # of the option files
    force = [f"datasets:train:dataroot_gt={lmdbs[1]}", f"datasets:train:dataroot_lq={lmdbs[s]}"]
    force += [f"datasets:train:gt_size={args.crop_size}"] if args.crop_size < patch else []
    file = networks.usual_file(f"train_MLRN_x{s}")
    print(f"to train on it:\n  mlrn train -opt {file} --force_yml {shlex.join(force)}")
    return code


def _counts(folder: Path) -> Counter:
    """How many sub-images of each image an LMDB has."""
    with lmdb.open(str(folder), readonly=True, lock=False) as environment:
        with environment.begin() as transaction:
            keys = transaction.cursor().iternext(values=False)
            return Counter(bytes(key).decode().rpartition("_s")[0] for key in keys)


def _cut(key: str, path: Path, args: argparse.Namespace, scales: list[int]) -> tuple:
    """What of an image is not in its sub-images, and these, encoded, row by row for each scale.

    With a teacher, those of the image shrunk by each of --shrink one after the other.
    """
    img, notes = _decode(path)
    if img.ndim == 2:
        img = cv2.cvtColor(img, cv2.COLOR_GRAY2BGR)
        notes[-1] += " (stored with 3 equal channels)"
    height, width = (side // _MULTIPLE * _MULTIPLE for side in img.shape[:2])
    if min(height, width) < args.crop_size:
        size = f"{img.shape[1]}x{img.shape[0]}"
        raise BadImage(f"{size} pixels, smaller than --crop-size {args.crop_size}")
    img, records = img[:height, :width], [[] for _ in scales]
    level = [cv2.IMWRITE_PNG_COMPRESSION, 1] if args.format == "png" else []
    for factor in args.shrink or [1]:
        if args.teacher:
            lq = img if factor == 1 else imresize(img, factor)
            if min(lq.shape[:2]) * args.scale[0] < args.crop_size:
                continue
            teacher = _teacher(args.teacher, args.scale[0], tuple(args.imports))
            parts = {1: teacher(lq[..., ::-1])[..., ::-1], args.scale[0]: lq}
        else:
            parts = {s: img if s == 1 else imresize(img, s) for s in scales}
        for s, encoded in zip(scales, records, strict=True):
            part, crop = parts[s], args.crop_size // s
            top, left = (  # the last one flush with the edge
                sorted({*range(0, side - crop, args.step // s), side - crop})
                for side in part.shape[:2]
            )
            crops = [part[y : y + crop, x : x + crop] for y in top for x in left]
            encoded += [cv2.imencode(f".{args.format}", p, level)[1] for p in crops]
    if not records[0]:
        raise BadImage(f"{img.shape[1]}x{img.shape[0]} pixels, shrunk smaller than an LR sub-image")
    return notes, records


@functools.cache  # once a process
def _teacher(spec: str, scale: int, imports: tuple[str, ...]) -> Upscaler:
    """Load a teacher.

    Raises:
        UserError: There is no such network or checkpoint, or it has another scale.
    """
    plugins.register(imports)  # in a worker, too
    # On the CPU, for the workers are many; one back end, for all images to be taught alike.
    teacher = Upscaler(networks.load_teacher(spec, scale), device="cpu", backend="torch")
    if teacher.scale != scale:
        raise UserError(f"--teacher: {spec} enlarges by {teacher.scale}, not by --scale {scale}")
    return teacher


def _build(
    args: argparse.Namespace, folders: dict[int, Path], images: dict[str, Path], tally: Counter
) -> None:
    """Fill the LMDBs (by scale) with the sub-images of `images`."""
    work = functools.partial(_cut, args=args, scales=list(folders))
    size, last = 0, time.monotonic()
    batch: dict[str, list[list[np.ndarray]]] = {}
    with ExitStack() as stack:
        opened = [lmdb.open(str(folder), map_size=2**40) for folder in folders.values()]
        for environment in opened:
            stack.callback(environment.close)

        def commit() -> None:
            for i, environment in enumerate(opened):
                with environment.begin(write=True) as transaction:
                    for key, records in batch.items():
                        for n, record in enumerate(records[i], 1):
                            transaction.put(f"{key}_s{n:03d}".encode(), record)
            batch.clear()

        for key, records in _stream(work, images, args.workers, tally):
            batch[key] = records
            size += sum(record.nbytes for scale in records for record in scale)
            if size > _COMMIT_BYTES or time.monotonic() - last > _COMMIT_SECONDS:
                commit()
                size, last = 0, time.monotonic()
        commit()


def _publish(unfinished: Path) -> None:
    """Move what `unfinished` holds, all of it finished, to where it belongs; may be repeated."""
    for folder in sorted(unfinished.glob("*.lmdb"), reverse=True):  # HR last
        target = unfinished.parent / folder.name
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    shutil.rmtree(unfinished)


def _read_json(file: Path) -> dict | None:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _say(settings: dict | None) -> str:
    if settings is None:
        return "unknown settings"
    return ", ".join(f"{key} {value}" for key, value in settings.items())
