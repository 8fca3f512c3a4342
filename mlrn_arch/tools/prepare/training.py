"""Training data of a folder of photographs: LMDBs of aligned sub-images."""

from __future__ import annotations

import functools
import glob
import json
import shlex
import shutil
import tempfile
import time
import zlib
from argparse import Namespace
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np

from mlrn_arch import option_files, plugins, shipped, sources
from mlrn_arch.dataset_checks import lmdb_fault
from mlrn_arch.errors import UserError
from mlrn_arch.inference.image_files import BadImage
from mlrn_arch.inference.resize import imresize
from mlrn_arch.inference.upscaler import Upscaler
from mlrn_arch.tools.prepare import stream

Plan = dict[str, Any]  # what LMDBs are made of: the settings, the images
Batches = dict[int, dict[bytes, bytes]]  # records by scale and key; 0: what is done
MULTIPLE = 12  # divisible by every scale: HR is cropped to it
_COMMIT_BYTES, _COMMIT_SECONDS = 2**26, 2.0  # what waits in memory, what a kill can lose
_MAP_STEP = 2**28  # bytes: an LMDB's map starts small, for batch systems limit address space


def make(args: Namespace, report: stream.Report) -> int:
    """Make the LMDBs of the report's images as `args` say; returns the exit code."""
    name = (args.name or args.output.resolve().name).removesuffix("_train")
    if not name or name.startswith(".") or Path(name).name != name:
        raise UserError(f"{name!r} cannot be the name of a data set; choose one with --name")
    lmdbs = {s: args.output / f"{name}_train_LR_bicubic_X{s}_sub.lmdb" for s in (2, 3, 4)}
    lmdbs[1] = args.output / f"{name}_train_HR_sub.lmdb"  # HR is scale 1
    existing = {s for s, folder in lmdbs.items() if folder.exists()}
    # Existing scales are made again together with HR, which they must match.
    lmdbs = {s: lmdbs[s] for s in sorted({1, *args.scale, *existing})}
    if args.teacher and len(lmdbs) > 2:
        raise UserError(f"--teacher makes one scale, but {args.output} has others; give another")
    plan = _plan(args, report.images)
    for s in () if args.overwrite else existing:
        _check_existing(lmdbs[s], plan)
    if lmdbs.keys() == existing and not args.overwrite:
        print(f"{args.output}: everything is there already, made of these images")
        report.left_out = _read_json(lmdbs[1] / "prepare.json")["left_out"]
        code = report.close()
    else:
        # Interrupted runs with other settings are kept until one of them is finished.
        checksum = zlib.crc32(json.dumps([{**plan, "images": {}}, *lmdbs]).encode())
        unfinished = args.output / f".{name}.{checksum:08x}.partial"
        _fill(unfinished, lmdbs, plan, args, report)
        if len(report.left_out) == len(report.images):
            shutil.rmtree(unfinished)
        code = report.close()
        _move_into_place(unfinished, lmdbs.values())
        for other in args.output.glob(f".{glob.escape(name)}.*.partial"):
            shutil.rmtree(other)

    number = (lmdbs[1] / "meta_info.txt").read_bytes().count(b"\n")
    for s, folder in lmdbs.items():
        side, size = args.crop_size // s, (folder / "data.mdb").stat().st_size / 1e6
        print(f"{folder}: {number} sub-images of {side}x{side}, {size:,.0f} MB")
    _print_commands(lmdbs, args)
    return code


def _plan(args: Namespace, images: dict[str, Path]) -> Plan:
    """What the LMDBs are made of: the settings, and the size and time of each image."""
    plan: Plan = {key: vars(args)[key] for key in ("crop_size", "step", "format")}
    if args.teacher:
        teacher = load_teacher(args.teacher, args.scale[0], tuple(args.imports))
        weights = (tensor.cpu().numpy() for tensor in teacher.network.state_dict().values())
        checksum = functools.reduce(lambda crc, array: zlib.crc32(array, crc), weights, 0)
        plan |= {"teacher": f"{args.teacher} ({checksum:08x})", "shrink": args.shrink}
    # A link may lead nowhere.
    stats = {key: path.stat() if path.exists() else path.lstat() for key, path in images.items()}
    return plan | {"images": {key: [s.st_size, s.st_mtime_ns] for key, s in stats.items()}}


def _check_existing(folder: Path, plan: Plan) -> None:
    """Refuse an existing LMDB that this plan would make differently."""
    record = _read_json(folder / "prepare.json")
    before, now = record.get("images", {}), plan["images"]
    images = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    faults = [
        f"{key} is {record.get(key)}, not {plan.get(key)}"
        for key in sorted({*record, *plan} - {"images", "left_out"})
        if record.get(key) != plan.get(key)
    ]
    if images:
        faults.append(f"{len(images)} images are new, gone or changed, such as {images[0]}")
    fault = lmdb_fault(folder) if record else "another program made it"
    if fault or faults:
        raise UserError(
            f"{folder} is not what this command would make: {fault or ', '.join(faults)}; "
            "--overwrite makes it again, another OUTPUT or --name keeps it"
        )


def _fill(
    unfinished: Path, lmdbs: dict[int, Path], plan: Plan, args: Namespace, report: stream.Report
) -> None:
    """Make the LMDBs in the folder `unfinished`, without the images that are done there."""
    unfinished.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        environments = {
            s: stack.enter_context(lmdb.open(str(unfinished / folder.name), map_size=_MAP_STEP))
            for s, folder in {**lmdbs, 0: Path("done")}.items()
        }
        with environments[0].begin() as transaction:
            before = {bytes(k).decode(): json.loads(bytes(v)) for k, v in transaction.cursor()}
        # The size and time of each image that is done, and its number of sub-images.
        done = {key: found for key, found in before.items() if found[0] == plan["images"].get(key)}
        if done:
            print(f"continuing: {len(done)} of {len(report.images)} images are done")
        images = {key: path for key, path in report.images.items() if key not in done}
        batches: Batches = {s: {} for s in environments}
        work = functools.partial(_cut, args=args, scales=list(lmdbs))
        size, last = 0, time.monotonic()
        for key, records in stream.results(work, images, args.workers, report):
            for s, encoded in records.items():
                batches[s] |= {f"{key}_s{n:03d}".encode(): r for n, r in enumerate(encoded, 1)}
                size += sum(map(len, encoded))
            done[key] = plan["images"][key], len(records[1])
            batches[0][key.encode()] = json.dumps(done[key]).encode()
            if size > _COMMIT_BYTES or time.monotonic() - last > _COMMIT_SECONDS:
                _write(environments, batches)
                size, last = 0, time.monotonic()
        _write(environments, batches)
    shutil.rmtree(unfinished / "done")  # from here on LMDBs leave this folder
    names = sorted(f"{key}_s{n + 1:03d}" for key, (_, count) in done.items() for n in range(count))
    level = 1 if args.format == "png" else 0
    for s, folder in lmdbs.items():
        side = args.crop_size // s
        meta = "".join(f"{name}.{args.format} ({side},{side},3) {level}\n" for name in names)
        (unfinished / folder.name / "meta_info.txt").write_text(meta)
        record = {**plan, "left_out": report.left_out}
        (unfinished / folder.name / "prepare.json").write_text(json.dumps(record))


def _write(environments: dict[int, lmdb.Environment], batches: Batches) -> None:
    """Store each batch as a whole, what is done last; the maps grow until they suffice."""
    for s, environment in environments.items():
        while batches[s]:
            try:
                with environment.begin(write=True) as transaction:
                    transaction.cursor().putmulti(batches[s].items())
                batches[s].clear()
            except lmdb.MapFullError:
                environment.set_mapsize(environment.info()["map_size"] + _MAP_STEP)


def _cut(
    key: str, path: Path, args: Namespace, scales: list[int]
) -> tuple[list[str], dict[int, list[bytes]]]:
    """Return notes on an image, and its encoded sub-images by scale: by --shrink, row by row."""
    img, notes = stream.decode(path)
    if img.ndim == 2:
        img = cv2.cvtColor(img, cv2.COLOR_GRAY2BGR)
        notes[-1] += " (stored with 3 equal channels)"
    height, width = (side // MULTIPLE * MULTIPLE for side in img.shape[:2])
    if min(height, width) < args.crop_size:
        raise BadImage(f"{width}x{height} pixels are less than --crop-size {args.crop_size}")
    img = img[:height, :width]
    records: dict[int, list[bytes]] = {s: [] for s in scales}
    level = [cv2.IMWRITE_PNG_COMPRESSION, 1] if args.format == "png" else []
    for factor in args.shrink or [1]:
        if args.teacher:
            lq = img if factor == 1 else imresize(img, factor)
            if min(lq.shape[:2]) * args.scale[0] < args.crop_size:
                continue
            teacher = load_teacher(args.teacher, args.scale[0], tuple(args.imports))
            parts = {1: np.asarray(teacher(lq[..., ::-1]))[..., ::-1], args.scale[0]: lq}
        else:
            parts = {s: img if s == 1 else imresize(img, s) for s in scales}
        for s, encoded in records.items():
            part, crop = parts[s], args.crop_size // s
            top, left = (  # the last one flush with the edge
                sorted({*range(0, side - crop, args.step // s), side - crop})
                for side in part.shape[:2]
            )
            crops = [part[y : y + crop, x : x + crop] for y in top for x in left]
            encoded += [cv2.imencode(f".{args.format}", p, level)[1].tobytes() for p in crops]
    if not records[1]:
        raise BadImage(f"{width}x{height} pixels, shrunk smaller than an LR sub-image")
    return notes, records


@functools.cache  # once a process
def load_teacher(spec: str, scale: int, imports: tuple[str, ...]) -> Upscaler:
    """Load a teacher on the CPU, where all workers and images use the same back end."""
    plugins.register(imports)  # in a worker, too
    teacher = Upscaler(sources.load_teacher(spec, scale), device="cpu", backend="torch")
    if teacher.scale != scale:
        raise UserError(f"--teacher: {spec} enlarges by {teacher.scale}, not by --scale {scale}")
    return teacher


def _move_into_place(unfinished: Path, lmdbs: Iterable[Path]) -> None:
    """Move finished LMDBs out of `unfinished`: HR goes first and comes last, so it is never old."""
    replaced = Path(tempfile.mkdtemp(prefix="replaced_", dir=unfinished))
    for folder in lmdbs:
        if folder.exists():
            folder.rename(replaced / folder.name)
    for folder in reversed(list(lmdbs)):
        (unfinished / folder.name).rename(folder)
    shutil.rmtree(unfinished)


def _print_commands(lmdbs: dict[int, Path], args: Namespace) -> None:
    """Print how to fine-tune on the LMDBs, and from scratch if an option file names them."""
    scale = max(lmdbs)
    own = {"dataroot_gt": str(lmdbs[1]), "dataroot_lq": str(lmdbs[scale])}
    for kind, purpose in (("finetune", "fine-tune"), ("train", "train from scratch")):
        file = shipped.usual_file(f"{kind}_MLRN_x{scale}")
        datasets = option_files.load_yaml(file)["datasets"]
        own["gt_size"] = min(datasets["train"]["gt_size"], args.crop_size)
        changes = [f"datasets:train:{k}={v}" for k, v in own.items() if v != datasets["train"][k]]
        if changes and kind == "train":
            return
        if not Path(datasets["val"]["dataroot_gt"]).exists():
            changes += ["datasets:val=none", "val=none"]
        force = f" --force_yml {shlex.join(changes)}" if changes else ""
        print(f"to {purpose} on it:\n  mlrn train -opt {file}{force}")


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}
