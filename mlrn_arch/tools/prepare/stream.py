"""The images of a folder: found, decoded and worked on by several processes, in order."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import signal
import sys
import threading
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mlrn_arch.errors import UserError
from mlrn_arch.inference import image_files
from mlrn_arch.inference.image_files import BadImage


def find(source: Path, output: Path) -> dict[str, Path]:
    """Return the images below `source`, but not below `output`, by their key, sorted by path."""
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; INPUT is a folder of HR images")
    paths, seen = [], {output.resolve()}
    for folder, names, files in os.walk(source, followlinks=True):
        if (real := Path(folder).resolve()) in seen:  # following a link back up would never end
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(n for n in names if not n.startswith(".") and not n.endswith(".lmdb"))
        paths += [Path(folder, file) for file in files if not file.startswith(".")]
    images: dict[str, Path] = {}
    for path in sorted(path for path in paths if path.suffix.lower() in image_files.FORMATS):
        name = "_".join(path.relative_to(source).with_suffix("").parts)
        name = unicodedata.normalize("NFC", name)
        # BasicSR ends a key at its first dot and encodes it as ASCII
        key = re.sub("[^A-Za-z0-9_-]", lambda c: f"-{ord(c[0]):x}-", name)
        if key in images:
            raise UserError(f"{images[key]} and {path} would both be {key}; rename or move one")
        if len(key) > 200:
            raise UserError(f"the name of {path} is too long to be a key; rename it")
        images[key] = path
    if not images:
        raise UserError(f"no images ({', '.join(image_files.FORMATS)}) in {source} outside OUTPUT")
    return images


@dataclass
class Report:
    """What became of the images: why some are left out, and how many a note is about."""

    images: dict[str, Path]
    left_out: dict[str, str] = field(default_factory=dict)
    notes: Counter = field(default_factory=Counter)

    def close(self) -> int:
        """Print it; returns the exit code, or raises UserError if all are left out."""
        for key, reason in self.left_out.items():
            print(f"left out: {self.images[key]}: {reason}", file=sys.stderr)
        total, used = len(self.images), len(self.images) - len(self.left_out)
        if not used:
            raise UserError("no image can be used")
        notes = [f"{number} {note}" for note, number in sorted(self.notes.items())]
        print("; ".join([f"{used} of {total} images", *notes]))
        return 1 if self.left_out else 0


def results(
    work: Callable, images: dict[str, Path], workers: int, report: Report
) -> Iterator[tuple[str, Any]]:
    """Yield the key and result of each image, in order, working a few images ahead.

    `work(key, path)` runs in another process. It returns notes and a result, or raises BadImage.
    """
    waiting, submitted = iter(images.items()), deque[Future]()
    workers = max(1, min(workers, len(images)))
    # Processes, not threads: an image that crashes a decoder ends a worker only.
    pool = ProcessPoolExecutor(workers, initializer=_start_worker)
    try:
        for key, path in tqdm(images.items(), unit=" images", disable=None, dynamic_ncols=True):
            try:
                for image in itertools.islice(waiting, 2 * workers - len(submitted)):
                    submitted.append(pool.submit(work, *image))
                notes, result = submitted.popleft().result()
            except BadImage as error:
                report.left_out[key] = str(error)
                continue
            except BrokenProcessPool:
                raise UserError(
                    f"a worker process died at {path} or soon after: memory ran out, or an image "
                    "crashes its decoder; --workers 1 continues and names that image"
                ) from None
            report.notes.update(notes)
            yield key, result
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker without a traceback

    def follow_parent() -> None:  # else a worker that hands over much would wait for ever
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def decode(path: Path) -> tuple[np.ndarray, list[str]]:
    """Return an image as 8-bit BGR (H x W x 3) or grey (H x W), and notes on what was changed."""
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
