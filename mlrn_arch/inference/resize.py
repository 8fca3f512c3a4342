"""MATLAB's bicubic downsampling, which made the LR images of every benchmark, to the pixel."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

_BLOCK = 8  # output rows made by one matrix product
_TILE = 512  # columns at a time: small enough for the cache, and for BLAS to stay on one thread


def imresize(img: np.ndarray, scale: int) -> np.ndarray:
    """Shrink an image as MATLAB's `imresize(img, 1 / scale)` does: bicubic, antialiased.

    The kernel is Keys' cubic (1981, a = -0.5) widened by the factor. As in MATLAB, rows come first
    and their result is rounded to 8 bits before the columns; the image is mirrored at its border
    (the edge pixel repeated).

    The published LR images of Set5 and Set14 are reproduced exactly, but for the outermost 2 LR
    pixels: they were made before the HR images were cropped to a multiple of the factor, and so saw
    pixels that no longer exist.

    Args:
        img: uint8, H x W or H x W x C with C <= 4, any channel order, values 0 to 255.
        scale: The factor, an integer >= 2.

    Returns:
        uint8, ceil(H / scale) x ceil(W / scale), with the channel axis the input has.

    Raises:
        ValueError: if `img` is not such an array or `scale` not such a number.
    """
    if img.dtype != np.uint8 or img.ndim not in (2, 3) or img.size == 0 or img.shape[2:] > (4,):
        raise ValueError(f"expected uint8, H x W (x C <= 4), got {img.dtype} {img.shape}")
    if scale != int(scale) or scale < 2:
        raise ValueError(f"scale must be an integer of at least 2, got {scale}")
    rows = cv2.transpose(_shrink_rows(img, int(scale)))
    out = cv2.transpose(_shrink_rows(rows, int(scale)))
    return out.reshape(out.shape[:2] + img.shape[2:])  # OpenCV drops a channel axis of length 1


def _shrink_rows(img: np.ndarray, scale: int) -> np.ndarray:
    # For an integer factor every output row has the same taps, centred on its `scale` input rows.
    # Multiplied by `unit` they are whole numbers: sums of whole numbers are exact in floating point
    # in any order, so BLAS may add them up, and only the division below rounds.
    first = -(3 * scale // 2)  # the taps that are not zero: input rows first to last, about its own
    x = np.abs(np.arange(first, scale - first) - (scale - 1) / 2) / scale
    unit = (2 if scale % 2 else 16) * scale**4
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    taps = np.rint(unit / scale * np.where(x < 1, near, far))
    dtype = np.float32 if unit * 512 < 2**24 else np.float64  # whole numbers it holds exactly
    span = len(taps) + (_BLOCK - 1) * scale  # input rows that _BLOCK output rows see
    band = np.zeros((_BLOCK, span), dtype)
    for i in range(_BLOCK):
        band[i, i * scale : i * scale + len(taps)] = taps

    height = img.shape[0]
    blocks = -(-height // (scale * _BLOCK))
    below = (blocks - 1) * _BLOCK * scale + span + first - height
    padded = np.pad(img.reshape(height, -1), [(-first, below), (0, 0)], mode="symmetric")
    out = np.empty((blocks * _BLOCK, padded.shape[1]), np.uint8)
    for col in range(0, padded.shape[1], _TILE):
        tile = padded[:, col : col + _TILE].astype(dtype)
        windows = sliding_window_view(tile, span, axis=0)[:: _BLOCK * scale].swapaxes(1, 2)
        # floor(sum / unit + 0.5), as MATLAB rounds; the cast to uint8 is the floor
        sums = band @ windows
        sums += unit // 2
        sums /= unit
        out[:, col : col + _TILE] = sums.clip(0, 255, out=sums).reshape(len(out), -1)
    return out[: -(-height // scale)].reshape(-1, *img.shape[1:])
