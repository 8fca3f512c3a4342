"""Image files as arrays and back: bits, transparency, orientation, colour profile, EXIF."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from PIL import Image, ImageCms, ImageFile

from mlrn_arch.errors import first_line
from mlrn_arch.files import atomic_write
from mlrn_arch.machine import free_memory

FORMATS = {".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
FORMATS |= {".jpg": "JPEG", ".jpeg": "JPEG"}
# What the readers say of broken files, BadImage says in one line.
logging.getLogger("PIL").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module="PIL")
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
# Those and more are read, but not EPS, for which Pillow starts Ghostscript.
READ = (*set(FORMATS.values()), "GIF", "AVIF", "JPEG2000", "PPM", "ICO", "PSD")
LONGEST = {"JPEG": 65500, "WEBP": 16383}  # pixels a side that a format and its library allow
_ORIENTATION, _EXIF_IFD, _GPS_IFD = 0x0112, 0x8769, 0x8825
_BITS, _PHOTOMETRIC, _PLANES, _EXTRA_SAMPLES = 258, 262, 284, 338  # of a TIFF
# Tags up to 700 that describe the photograph, not the layout of a TIFF; and what is not EXIF:
# IPTC, Photoshop's resources, the profile, Photoshop's layers.
_DESCRIPTIVE = {269, 270, 271, 272, 285, 305, 306, 315, 316}
_PAYLOADS = {33723, 34377, 34675, 37724}
_SRGB = (0.45455, 0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # as in gAMA and cHRM


class BadImage(Exception):
    """An image that cannot be read or written; the text is the reason."""


@dataclass
class Picture:
    """What an image file holds."""

    array: np.ndarray  # uint8 or uint16, (h, w, c), upright; c is 1 to 4 as in `Upscaler`
    icc: bytes | None
    exif: Image.Exif  # without orientation, size and resolution
    notes: list[str]  # what of the file is not in here
    lossless: bool  # a lossless WebP


def size(path: Path) -> int:
    """The pixels of an image by its header; 0 if that cannot be read."""
    with contextlib.suppress(Exception), Image.open(path, formats=READ) as image:
        return image.width * image.height
    return 0  # `read` names the reason


def read(path: Path) -> Picture:
    """Read an image file of 8 or 16 bits a channel; `BadImage` if that fails."""
    if (need := 4 * size(path)) > free_memory():
        raise BadImage(f"it takes {need / 1e9:.1f} GB of memory, which is more than is free")
    try:
        with Image.open(path, formats=READ) as image:
            return _read(path, image)
    except BadImage:
        raise
    except Exception as error:  # a broken file makes the readers raise anything
        reason = f"broken, or of a kind that is not read here ({first_line(error)})"
        raise BadImage(getattr(error, "strerror", None) or reason) from error


def _read(path: Path, image: ImageFile.ImageFile) -> Picture:
    layout, tags = str(image.tile), getattr(image, "tag_v2", {})  # loading empties the former
    mode, notes = image.mode.split(";")[0], []
    grey = mode in ("1", "L", "LA", "La", "I") or "LA;16" in layout
    if mode == "F":
        raise BadImage("floating-point pixels, whose range is not known")
    if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
        notes.append(f"only the first of its {frames} frames or pages")
    if 0 in tags.get(_EXTRA_SAMPLES, ()):
        notes.append("without an extra channel that the file does not call transparency")
    deep = mode == "I" or ";16" in layout or 16 in tags.get(_BITS, ())
    if deep and mode != "CMYK":
        array = _read_deep(path, image, grey)
    else:
        if deep:
            notes.append("16-bit CMYK is read at 8 bits")
        wanted = ("L" if grey else "RGB") + "A" * image.has_transparency_data
        colours: Image.Image = image
        if mode == "CMYK" and "icc_profile" in image.info:  # which says nothing of RGB
            with contextlib.suppress(ImageCms.PyCMSError):
                profiles = io.BytesIO(image.info["icc_profile"]), ImageCms.createProfile("sRGB")
                colours = ImageCms.profileToProfile(image, *profiles, outputMode="RGB") or image
        # convert() copies, which a large image need not
        array = np.array(colours if colours.mode == wanted else colours.convert(wanted))
    array = np.atleast_3d(array)
    if not array.size:
        raise BadImage("no picture in it")
    icc = None if mode == "CMYK" else image.info.get("icc_profile")
    if icc and icc[16:20] != (b"GRAY" if array.shape[2] < 3 else b"RGB "):
        notes.append(f"without its colour profile, which is for {icc[16:20]!r} pixels")
        icc = None
    data = path.read_bytes() if image.format in ("PNG", "WEBP") else b""
    found = [image.info.get("gamma", _SRGB[0]), *image.info.get("chromaticity", _SRGB[1:])]
    is_srgb = {"icc_profile", "srgb"} & image.info.keys() or np.allclose(found, _SRGB, 0.01)
    if not is_srgb or image.format == "PNG" and b"cICP" in data.partition(b"IDAT")[0]:
        notes.append("without its gAMA, cHRM or cICP chunk, so its colours may look different")
    if getattr(image, "text", None):
        notes.append("without its text")
    turn = 1
    try:
        exif = image.getexif()
        turn = 1 if image.format == "TIFF" else exif.get(_ORIENTATION, 1)  # readers turn a TIFF
        for tag in [t for t in exif if t <= 700 and t not in _DESCRIPTIVE or t in _PAYLOADS]:
            del exif[tag]
        if _EXIF_IFD in exif:  # get_ifd would make it
            for tag in (0xA002, 0xA003, 0xA005):  # size, and a pointer that Pillow does not move
                exif.get_ifd(_EXIF_IFD).pop(tag, None)
        exif.tobytes()
    except Exception:  # EXIF may be broken in as many ways as there are cameras
        exif = Image.Exif()
        notes.append("without its EXIF, which is broken")
    if turn in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        array = array[:, ::-1]
    if turn in (3, 4, 7, 8):
        array = array[::-1]
    # The first image chunk of a WebP says whether it is lossless.
    lossless = image.format == "WEBP" and re.findall(rb"VP8[L ]", data)[:1] == [b"VP8L"]
    return Picture(np.ascontiguousarray(array), icc, exif, notes, lossless)


def _read_deep(path: Path, image: Image.Image, grey: bool) -> np.ndarray:
    """16 bits a channel, which Pillow would cut to 8, by OpenCV; (h, w, c) as in `Picture`."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(_PLANES) == 2:
        raise BadImage("its 16-bit channels are stored one after the other; save it interleaved")
    if image.format == "PPM":  # whose largest value may be any, which OpenCV takes for 65535
        return np.array(image).astype(np.uint16)
    array = None
    with contextlib.suppress(cv2.error):
        array = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None or array.dtype != np.uint16:
        raise BadImage("broken, or neither of 8 nor of 16 bits a channel")
    array = np.atleast_3d(array)
    order = [0] if array.shape[2] == 1 else [0, 3] if grey else [2, 1, 0, 3]
    extra = tags.get(_EXTRA_SAMPLES, (2,))[0]  # straight alpha, if the file does not say
    array = array[..., [c for c in order if c < array.shape[2] - (extra == 0)]]
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        array = 65535 - array
    if extra == 1:  # premultiplied
        alpha = array[..., -1:].astype(np.uint32)
        straight = (array[..., :-1] * np.uint32(65535) + alpha // 2) // alpha.clip(1)
        array[..., :-1] = straight.clip(max=65535)
    if array.shape[2] == 1 and "transparency" in image.info:  # one grey is transparent
        alpha = np.where(array == image.info["transparency"], 0, 65535)
        array = np.dstack([array, alpha.astype(np.uint16)])
    return array


def write(
    path: Path, bands: Iterable[np.ndarray], shape: tuple, picture: Picture, quality: int
) -> None:
    """Write an image file, whole or not at all; `BadImage` if that fails.

    `bands` are its rows from top to bottom, (rows, w, c), of `dtype(path, picture)`; `shape` is
    (h, w, c) of the whole. `picture` has profile and EXIF, and its notes get what the format cannot
    hold. `quality`, 1 to 100, is that of JPEG and lossy WebP.
    """
    kind, y = FORMATS[path.suffix.lower()], 0
    height, width, channels = shape
    if max(height, width) > LONGEST.get(kind, 2**31 - 1):
        raise BadImage(f"{width}x{height} is more than {kind} can hold; use --format png")
    if channels in (2, 4) and kind in ("JPEG", "BMP"):
        raise BadImage(f"it has an alpha channel, which {kind} cannot hold; use --format png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            if dtype(path, picture) == np.uint16:
                array = np.empty(shape, np.uint16)
                for band in bands:
                    array[y : y + len(band)] = band
                    y += len(band)
                _write_deep(part, kind, array, picture)
            else:
                mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
                # Filled band by band: an array of the whole output would double the memory.
                image = Image.new(mode, (width, height))
                for band in bands:
                    image.paste(Image.fromarray(band.squeeze(-1) if mode == "L" else band), (0, y))
                    y += len(band)
                image.save(part, kind, **_options(kind, math.prod(shape) > 4e9, picture, quality))
    except (OSError, ValueError) as error:
        raise BadImage(f"cannot write {path}: {getattr(error, 'strerror', 0) or error}") from None


def dtype(path: Path, picture: Picture) -> np.dtype:
    """The type of a picture's output: 8 bits in formats that hold no more."""
    deep = FORMATS[path.suffix.lower()] in ("PNG", "TIFF")
    return picture.array.dtype if deep else np.dtype(np.uint8)


def _options(kind: str, large: bool, picture: Picture, quality: int) -> dict[str, Any]:
    """What Pillow saves an image of 8 bits a channel with."""
    options: dict[str, Any] = {"icc_profile": picture.icc, "exif": picture.exif or b""}
    if kind == "JPEG":
        options.update(quality=quality, subsampling=0)
        if len(picture.exif.tobytes()) > 65533:
            options["exif"] = b""
            picture.notes.append("without its EXIF, which is more than a JPEG holds")
    elif kind == "WEBP":
        options.update(quality=quality, lossless=picture.lossless)
    elif kind == "BMP":
        options = {"dpi": (0, 0)}  # Pillow would claim 96
        if picture.icc or picture.exif:
            picture.notes.append("without colour profile and EXIF, which BMP cannot hold")
    elif kind == "TIFF":  # Pillow can write neither a large one nor these parts compressed
        plain = large or {_EXIF_IFD, _GPS_IFD} & picture.exif.keys()
        options |= {"big_tiff": large} if plain else {"compression": "tiff_adobe_deflate"}
    return options


def _write_deep(path: Path, kind: str, array: np.ndarray, picture: Picture) -> None:
    channels, icc = array.shape[2], picture.icc
    if channels == 2:  # OpenCV knows no grey with alpha, and RGB may have no profile for grey
        array, icc = np.ascontiguousarray(array[..., [0, 0, 0, 1]]), None
        if picture.icc:
            picture.notes.append("RGB without its colour profile, which is for grey")
    elif channels > 2 and kind == "PNG":
        to_bgr = cv2.COLOR_RGB2BGR if channels == 3 else cv2.COLOR_RGBA2BGRA
        cv2.cvtColor(array, to_bgr, dst=array)
    if kind == "TIFF":
        tifffile.imwrite(
            path,
            array.squeeze(-1) if channels == 1 else array,
            photometric="minisblack" if channels == 1 else "rgb",
            planarconfig="contig" if channels > 1 else None,
            extrasamples=["unassalpha"] if channels in (2, 4) else None,
            compression="zlib",
            bigtiff=array.nbytes > 4e9,
            iccprofile=icc,
            metadata=None,
        )
        if picture.exif.keys() - {270, 305}:  # more than a description and the software
            picture.notes.append("without its EXIF, which is not written into 16-bit TIFF")
        return
    exif = picture.exif.tobytes().removeprefix(b"Exif\0\0") if picture.exif else None
    blobs = {cv2.IMAGE_METADATA_ICCP: icc, cv2.IMAGE_METADATA_EXIF: exif}
    chunks = {kind: np.frombuffer(blob, np.uint8) for kind, blob in blobs.items() if blob}
    _, data = cv2.imencodeWithMetadata(".png", array, list(chunks), list(chunks.values()))
    path.write_bytes(data.data)  # OpenCV's own writing does not notice a full disk
