"""Whether datasets are there, and their images are pairs."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import cv2
import lmdb
import numpy as np
from basicsr.data.data_util import (
    paired_paths_from_folder,
    paired_paths_from_lmdb,
    paired_paths_from_meta_info_file,
)
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


def check_root(where: str, key: str, dataset: Options) -> Iterator[str]:
    """Find what is wrong with a data root, the option `key` of a dataset."""
    if fault := _root_fault(dataset[key], dataset["io_backend"]["type"]):
        yield f"{where}:{key}: {fault}"


def check_paired(where: str, dataset: Options) -> Iterator[str]:
    """Find what is wrong with a `PairedImageDataset`: folders or LMDBs, pairs, patch size."""
    training, backend = dataset["phase"] == "train", dataset["io_backend"]["type"]
    scale = dataset.get("scale")
    if scale is None:
        yield f"scale: is missing; {where} needs it"
    if training and scale and dataset["gt_size"] % scale:
        yield f"{where}:gt_size: {dataset['gt_size']} is not a multiple of the scale {scale}"
    faults = [*check_root(where, "dataroot_gt", dataset)]
    faults += check_root(where, "dataroot_lq", dataset)
    yield from faults
    if faults:
        return
    roots, keys = [dataset["dataroot_lq"], dataset["dataroot_gt"]], ["lq", "gt"]
    template, meta_info = dataset["filename_tmpl"], dataset.get("meta_info_file")
    try:
        if backend == "lmdb":
            pairs = paired_paths_from_lmdb(roots, keys)
        elif meta_info:
            if not all(line.strip() for line in Path(meta_info).read_text().splitlines()):
                yield f"{where}:meta_info_file: {meta_info} has an empty line; take it out"
                return
            pairs = paired_paths_from_meta_info_file(roots, keys, meta_info, template)
        else:
            pairs = paired_paths_from_folder(roots, keys, template)
    except (AssertionError, ValueError, OSError) as error:
        hint = f"; filename_tmpl says how lq is named after gt, here {template}"
        yield f"{where}: lq and gt are no pairs: {error}{hint * (backend == 'disk')}"
        return
    if not pairs:
        yield f"{where}: no images in {roots[1]} itself; sub-folders are not read"
    elif not training and backend == "disk" and scale:
        found = (_pair_fault(pair["lq_path"], pair["gt_path"], scale) for pair in pairs)
        faults = [fault for fault in found if fault]
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        yield from (f"{where}: {fault}{more}" for fault in faults[:3])
    elif training:
        batch, least = dataset["batch_size_per_gpu"], math.inf
        if len(pairs) * dataset["dataset_enlarge_ratio"] < batch:
            yield (
                f"{where}: {len(pairs)} images are less than one batch of {batch}; "
                "raise dataset_enlarge_ratio"
            )
        if backend == "lmdb":
            sizes = Path(roots[1], "meta_info.txt").read_text()
            sides = [int(n) for n in re.findall(r"(?<=[(,])\d+(?=,)", sizes)]
            least = min(sides, default=math.inf)
        if least < dataset["gt_size"]:
            yield (
                f"{where}:gt_size: {dataset['gt_size']} is larger than the smallest image ({least})"
            )


def _pair_fault(lq: str, gt: str, scale: int) -> str | None:
    """Why an image pair on disk cannot be scored, or None."""
    sizes, turned = [], False
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
        pixels = cv2.imread(path) if orientation != 1 else None
        if pixels is not None:  # BasicSR reads by OpenCV, which turns by EXIF
            size, turned = pixels.shape[1::-1], True
        sizes.append(size)
    if not all(low * scale <= high < (low + 1) * scale for low, high in zip(*sizes, strict=True)):
        low, high = (f"{width}x{height}" for width, height in sizes)
        note = ", as turned by their EXIF orientation" * turned
        return f"{lq} is {low} and its gt {high}{note}: that is not x{scale}"
    if turned and _fits_better_unturned(lq, gt):
        return f"{lq} and its gt are turned differently by their EXIF orientation"
    return None


def _fits_better_unturned(lq: str, gt: str) -> bool:
    """Whether a pair fits better when EXIF turns only one of its images."""
    images: list[np.ndarray] = []
    for path in (lq, gt):
        for flags in (cv2.IMREAD_COLOR, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION):
            if (image := cv2.imread(path, flags)) is None:
                return False
            images.append(image)
    low, low_as_stored, high, high_as_stored = images

    def distance(low: np.ndarray, high: np.ndarray) -> float:
        shrunk = cv2.resize(high, low.shape[1::-1], interpolation=cv2.INTER_AREA)
        return float(cv2.absdiff(shrunk, low).mean())

    others = distance(low_as_stored, high), distance(low, high_as_stored)
    return min(others) < distance(low, high)


def lmdb_fault(folder: Path) -> str | None:
    """What is wrong with the file of an LMDB, or None; reading a truncated one kills a process."""
    file = folder / "data.mdb"
    try:
        with lmdb.open(str(folder), readonly=True, lock=False) as environment:
            stat = environment.stat()
    except lmdb.Error as error:
        if "already open" in str(error):  # by this process, so it can be read
            return None
        return f"{file} is broken; copy it again, or prepare it again with --overwrite"
    pages = 2 + sum(stat[kind] for kind in ("branch_pages", "leaf_pages", "overflow_pages"))
    needed, size = pages * stat["psize"], file.stat().st_size
    if size < needed:
        return (
            f"{file} is truncated: {size:,} of {needed:,} bytes; "
            "copy it again, or prepare it again with --overwrite"
        )
    return None


def _root_fault(root: str, backend: str) -> str | None:
    """What is wrong with a data root, or None."""
    path = Path(root)
    if not path.is_dir():
        if re.search(r"(_sub\.lmdb|(GTmod|LRbicx)\d)$", root):
            return f"no such folder {root}; `mlrn prepare` makes it (see datasets/README.md)"
        parent = next(str(folder) for folder in path.absolute().parents if folder.is_dir())
        return f"no such folder {root}; the nearest one is {parent}"
    is_lmdb = (path / "data.mdb").exists()
    if not any(path.iterdir()):
        return f"{root} is empty"
    if backend == "disk" and is_lmdb:
        return f"{root} is an LMDB; set io_backend:type to lmdb"
    if backend != "lmdb":
        return None
    if not is_lmdb:
        return f"{root} is a plain folder, no LMDB; set io_backend:type to disk"
    if path.suffix != ".lmdb":
        return f"{root} must have a name that ends in .lmdb for BasicSR"
    if not (path / "meta_info.txt").exists():
        return f"{root} has no meta_info.txt; prepare it again, it was not finished"
    return lmdb_fault(path)
