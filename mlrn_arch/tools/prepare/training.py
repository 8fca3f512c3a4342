"""Training data of a folder of photographs: LMDBs of aligned sub-images."""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import shutil
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import cv2
import lmdb
import numpy as np

from mlrn_arch import plugins, shipped, sources
from mlrn_arch.errors import UserError
from mlrn_arch.inference.image_files import BadImage
from mlrn_arch.inference.resize import imresize
from mlrn_arch.inference.upscaler import Upscaler
from mlrn_arch.tools.prepare import stream

MULTIPLE = 12  # divisible by every scale: HR is cropped to it, so scales made apart still agree
_COMMIT_BYTES, _COMMIT_SECONDS = 2**26, 2.0  # what waits in memory, what a kill can lose
_ANEW = "--overwrite with every scale makes all of it anew"


def make(args: argparse.Namespace, images: dict[str, Path]) -> int:
    """Make the LMDBs of `images` as the arguments of `mlrn prepare` say; returns its exit code.

    Raises:
        UserError: What is there already forbids it, or no image can be used.
    """
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
        publish(unfinished)
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
        hr_counts = counts_of(lmdbs[1])
        for key in [key for key in images if key not in hr_counts]:
            print(f"left out: {images.pop(key)}: not in {lmdbs[1]}; {_ANEW}", file=sys.stderr)
            tally[stream.LEFT_OUT] += 1

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
    done = counts_of(last) if last.exists() else {}
    if done:
        print(f"continuing: {len(done)} of {len(images)} images are done")
    _build(args, folders, {k: images[k] for k in images if k not in done}, tally)
    counts = {key: count for key, count in counts_of(last).items() if key in images}
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
    publish(unfinished)

    for s in wanted:
        side, size = args.crop_size // s, (lmdbs[s] / "data.mdb").stat().st_size / 1e6
        kept = "" if s in todo else ", kept as it was"
        number = sum(counts.values())
        print(f"{lmdbs[s]}: {number} sub-images of {side}x{side}, {size:,.0f} MB{kept}")
    code = stream.report(tally, total, start)
    s = args.scale[-1]
    patch = 256 if s == 4 else 192  # of the option files
    force = [f"datasets:train:dataroot_gt={lmdbs[1]}", f"datasets:train:dataroot_lq={lmdbs[s]}"]
    force += [f"datasets:train:gt_size={args.crop_size}"] if args.crop_size < patch else []
    file = shipped.usual_file(f"train_MLRN_x{s}")
    print(f"to train on it:\n  mlrn train -opt {file} --force_yml {shlex.join(force)}")
    return code


def counts_of(folder: Path) -> Counter:
    """How many sub-images of each image an LMDB has."""
    with lmdb.open(str(folder), readonly=True, lock=False) as environment:
        with environment.begin() as transaction:
            keys = transaction.cursor().iternext(values=False)
            return Counter(bytes(key).decode().rpartition("_s")[0] for key in keys)


def _cut(key: str, path: Path, args: argparse.Namespace, scales: list[int]) -> tuple:
    """What of an image is not in its sub-images, and these, encoded, row by row for each scale.

    With a teacher, those of the image shrunk by each of --shrink one after the other.
    """
    img, notes = stream.decode(path)
    if img.ndim == 2:
        img = cv2.cvtColor(img, cv2.COLOR_GRAY2BGR)
        notes[-1] += " (stored with 3 equal channels)"
    height, width = (side // MULTIPLE * MULTIPLE for side in img.shape[:2])
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
            teacher = load_teacher(args.teacher, args.scale[0], tuple(args.imports))
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
def load_teacher(spec: str, scale: int, imports: tuple[str, ...]) -> Upscaler:
    """Load a teacher.

    Raises:
        UserError: There is no such network or checkpoint, or it has another scale.
    """
    plugins.register(imports)  # in a worker, too
    # On the CPU, for the workers are many; one back end, for all images to be taught alike.
    teacher = Upscaler(sources.load_teacher(spec, scale), device="cpu", backend="torch")
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

        for key, records in stream.results(work, images, args.workers, tally):
            batch[key] = records
            size += sum(record.nbytes for scale in records for record in scale)
            if size > _COMMIT_BYTES or time.monotonic() - last > _COMMIT_SECONDS:
                commit()
                size, last = 0, time.monotonic()
        commit()


def publish(unfinished: Path) -> None:
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
