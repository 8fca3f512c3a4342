"""MATLAB's bicubic downsampling, which made the LR images of every benchmark, to the pixel."""

from __future__ import annotations

import cv2
import numpy as np


def imresize(img: np.ndarray, scale: int) -> np.ndarray:
    """Shrink an image as MATLAB's `imresize(img, 1 / scale)` does: bicubic, antialiased.

    The kernel is Keys' cubic (1981, a = -0.5) widened by `scale`, an integer >= 2. `img` is uint8,
    H x W or H x W x C with C <= 4; each side of the result is the input's over `scale`, rounded up.
    As in MATLAB, rows come first and their result is rounded to 8 bits before the columns; the
    image is mirrored at its border. The published LR images of Set5 and Set14 are reproduced
    exactly, except for the outermost 2 pixels: they were made before the HR images were cropped.
    """
    if img.dtype != np.uint8 or img.ndim not in (2, 3) or img.size == 0 or img.shape[2:] > (4,):
        raise ValueError(f"expected uint8, H x W (x C <= 4), got {img.dtype} {img.shape}")
    if scale != int(scale) or scale < 2:
        raise ValueError(f"scale must be an integer of at least 2, got {scale}")
    rows = cv2.transpose(_shrink_rows(img, int(scale)))
    out = cv2.transpose(_shrink_rows(rows, int(scale)))
    return out.reshape(out.shape[:2] + img.shape[2:])  # OpenCV drops a channel axis of length 1


def _shrink_rows(img: np.ndarray, scale: int) -> np.ndarray:
    # Every output row has the same taps, centred on its `scale` input rows. Multiplied by `unit`
    # they are whole numbers, whose sums are exact in floating point; only the division rounds.
    first = -(3 * scale // 2)  # the taps that are not zero: input rows first to last, about its own
    x = np.abs(np.arange(first, scale - first) - (scale - 1) / 2) / scale
    unit = (2 if scale % 2 else 16) * scale**4
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    taps = np.rint(unit / scale * np.where(x < 1, near, far))
    depth = cv2.CV_32F if unit * 512 < 2**24 else cv2.CV_64F  # whole numbers it holds exactly
    # BORDER_REFLECT repeats the edge.
    sums = cv2.sepFilter2D(
        img, depth, np.ones(1), taps, anchor=(0, -first), borderType=cv2.BORDER_REFLECT
    )[::scale]
    # As MATLAB rounds: the cast to uint8 is the floor.
    return ((sums + unit // 2) / unit).clip(0, 255).astype(np.uint8)
