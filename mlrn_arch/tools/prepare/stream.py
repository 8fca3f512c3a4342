"""The images of a folder, worked on by processes and given in order."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import sys
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from mlrn_arch.errors import UserError
from mlrn_arch.inference import image_files
from mlrn_arch.inference.image_files import BadImage

LEFT_OUT = "left out"


def find(source: Path, output: Path) -> dict[str, Path]:
    """All images below `source` by the key that they get, in the order of their paths.

    Raises:
        UserError: There is none, `source` is no folder, or two would get the same key.
    """
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


def results(
    work: Callable, images: dict[str, Path], workers: int, tally: Counter
) -> Iterator[tuple[str, Any]]:
    """Yield key and result of `work(key, path)` in order, working a few images ahead.

    Images that cannot be used are named; `tally` counts them, and the notes that come first in
    every result.
    """
    if not images:
        return
    # Processes, not threads: a file that crashes a decoder ends a worker, and the run names it.
    loader = DataLoader(
        list(images.items()),
        batch_size=None,
        num_workers=min(workers, len(images)),
        collate_fn=functools.partial(_attempt, work),
        worker_init_fn=_end_with_parent,
    )
    path = "the start"
    try:
        bar = tqdm(loader, unit=" images", disable=None, dynamic_ncols=True)
        for (key, path), result in zip(images.items(), bar, strict=True):
            if isinstance(result, OSError):
                raise result
            if isinstance(result, BadImage):
                bar.write(f"left out: {path}: {result}", file=sys.stderr)
                tally[LEFT_OUT] += 1
                continue
            tally.update(result[0])
            yield key, result[1]
    except RuntimeError as error:
        raise killed(error, f" soon after {path}") from None


def killed(error: RuntimeError, where: str) -> Exception:
    """The error, or what it means to the user if it tells of a worker's death."""
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


def decode(path: Path) -> tuple[np.ndarray, list[str]]:
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


def report(tally: Counter, total: int, start: float) -> int:
    """Print what became of `total` images since `start`; returns the exit code."""
    left_out = tally.pop(LEFT_OUT, 0)
    if tally:
        print("images: " + "; ".join(f"{number} {note}" for note, number in sorted(tally.items())))
    print(f"{total - left_out} of {total} images in {time.monotonic() - start:.1f} s")
    if left_out:
        print(f"{left_out} left out, each named above with the reason")
    return 1 if left_out else 0
