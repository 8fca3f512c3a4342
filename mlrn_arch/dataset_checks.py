"""Whether datasets are there, and their images are pairs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import lmdb
from basicsr.data import data_util
from PIL import ExifTags, Image

from mlrn_arch.errors import first_line
from mlrn_arch.networks import Options


def absent_sets(datasets: Options) -> dict[str, str]:
    """The datasets of which no folder exists, each with its first folder."""
    roots = {
        key: [dataset[k] for k in ("dataroot_gt", "dataroot_lq") if isinstance(dataset.get(k), str)]
        for key, dataset in datasets.items()
    }
    return {k: r[0] for k, r in roots.items() if r and not any(os.path.exists(p) for p in r)}


def check_root(where: str, key: str, dataset: Options) -> list[str]:
    """The fault of a data root, the option `key` of a dataset, if it has one."""
    path, backend = Path(dataset[key]), dataset["io_backend"]["type"]
    is_lmdb = (path / "data.mdb").exists()
    fault: str | None
    if not path.is_dir():
        fault = f"no such folder {path}; `mlrn prepare` makes datasets (see datasets/README.md)"
    elif not any(path.iterdir()):
        fault = f"{path} is empty"
    elif backend == "disk" and is_lmdb:
        fault = f"{path} is an LMDB; set io_backend:type to lmdb"
    elif backend != "lmdb":
        return []
    elif not is_lmdb:
        fault = f"{path} is a plain folder, no LMDB; set io_backend:type to disk"
    elif path.suffix != ".lmdb":
        fault = f"{path} must have a name that ends in .lmdb for BasicSR"
    elif not (path / "meta_info.txt").exists():
        fault = f"{path} has no meta_info.txt; prepare it again, it was not finished"
    else:
        fault = lmdb_fault(path)
    return [f"{where}:{key}: {fault}"] if fault else []


def check_paired(where: str, dataset: Options) -> Iterator[str]:
    """Find what is wrong with a `PairedImageDataset`: folders or LMDBs, pairs, patch size."""
    training, backend = dataset["phase"] == "train", dataset["io_backend"]["type"]
    scale = dataset.get("scale")
    if scale is None:
        yield f"scale: is missing; {where} needs it"
    if training and scale and dataset["gt_size"] % scale:
        yield f"{where}:gt_size: {dataset['gt_size']} is not a multiple of the scale {scale}"
    faults = [f for key in ("dataroot_gt", "dataroot_lq") for f in check_root(where, key, dataset)]
    yield from faults
    if faults:
        return
    roots, keys = [dataset["dataroot_lq"], dataset["dataroot_gt"]], ["lq", "gt"]
    template, meta_info = dataset["filename_tmpl"], dataset.get("meta_info_file")
    try:
        if backend == "lmdb":
            pairs = data_util.paired_paths_from_lmdb(roots, keys)
        elif meta_info:
            if not all(line.strip() for line in Path(meta_info).read_text().splitlines()):
                yield f"{where}:meta_info_file: {meta_info} has an empty line; take it out"
                return
            pairs = data_util.paired_paths_from_meta_info_file(roots, keys, meta_info, template)
        else:
            pairs = data_util.paired_paths_from_folder(roots, keys, template)
    except (AssertionError, ValueError, OSError) as error:
        hint = f"; filename_tmpl says how lq is named after gt, here {template}"
        yield f"{where}: lq and gt are no pairs: {error}{hint * (backend == 'disk')}"
        return
    if not pairs:
        yield f"{where}: no images in {roots[1]} itself; sub-folders are not read"
    if backend == "disk" and scale:
        some = pairs[:: len(pairs) // 1000 + 1]  # not minutes at each start
        found = (_pair_fault(pair["lq_path"], pair["gt_path"], scale) for pair in some)
        faults = [fault for fault in found if fault]
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        yield from (f"{where}: {fault}{more}" for fault in faults[:3])
    if training and pairs:
        batch, size = dataset["batch_size_per_gpu"], dataset["gt_size"]
        batch *= int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
        if len(pairs) * dataset["dataset_enlarge_ratio"] < batch:
            few = f"{len(pairs)} images are less than one batch of {batch}"
            yield f"{where}: {few}; raise dataset_enlarge_ratio"
        if backend == "lmdb":
            meta_infos = [Path(root, "meta_info.txt").read_text() for root in roots]
            sides = [list(map(int, re.findall(r"(?<=[(,])\d+(?=,)", m))) for m in meta_infos]
            low, high = (min(side, default=size) for side in sides)
            if high < size:
                yield f"{where}:gt_size: {size} is larger than the smallest image ({high})"
            if sides[0] and scale and not low * scale <= high < (low + 1) * scale:
                yield f"{where}: lq's least side is {low}, that of gt {high}: that is not x{scale}"


def _pair_fault(lq: str, gt: str, scale: int) -> str | None:
    """Why an image pair on disk cannot be scored, or None."""
    sizes, note = [], ""
    for path in (lq, gt):
        try:
            with Image.open(path) as image:
                size, orientation = image.size, image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception as error:  # Pillow fails in many ways
            if not os.path.isfile(path):
                return f"no such file {path}"
            if not cv2.haveImageReader(path):  # which knows some formats that Pillow does not
                return f"{path} is no image, or a broken one ({first_line(error)})"
            return None
        if orientation != 1 and (pixels := cv2.imread(path)) is not None:
            size, note = pixels.shape[1::-1], ", as OpenCV turns them by their EXIF orientation"
        sizes.append(size)
    if not all(low * scale <= high < (low + 1) * scale for low, high in zip(*sizes, strict=True)):
        low, high = (f"{width}x{height}" for width, height in sizes)
        return f"{lq} is {low} and its gt {high}{note}: that is not x{scale}"
    if note:  # a square image has the same size if EXIF turned only one of the two
        stored = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        images: Any = [cv2.imread(p, f) for p in (lq, gt) for f in (cv2.IMREAD_COLOR, stored)]
        errors = []
        for i, j in (0, 2), (1, 2), (0, 3):
            shrunk = cv2.resize(images[j], images[i].shape[1::-1], interpolation=cv2.INTER_AREA)
            errors.append(cv2.absdiff(shrunk, images[i]).mean())
        if errors[0] > min(errors):
            return f"{lq} and its gt are turned differently by their EXIF orientation"
    return None


def lmdb_fault(folder: Path) -> str | None:
    """What is wrong with the file of an LMDB, or None; reading a truncated one kills a process."""
    file = folder / "data.mdb"
    try:
        with lmdb.open(str(folder), readonly=True, lock=False) as environment:
            stat = environment.stat()
    except lmdb.Error as error:
        whole = "already open" in str(error)  # by this process, so it can be read
    else:
        pages = 2 + sum(stat[kind] for kind in ("branch_pages", "leaf_pages", "overflow_pages"))
        whole = file.stat().st_size >= pages * stat["psize"]
    if whole:
        return None
    return f"{file} is truncated or broken; copy it again, or prepare it again with --overwrite"
