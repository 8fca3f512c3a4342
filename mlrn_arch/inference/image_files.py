"""Image files as arrays and back, with what belongs to them: bits, transparency, profile, EXIF."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
Image.MAX_IMAGE_PIXELS = None  # large photographs are no attack here
LONGEST = {"JPEG": 65500, "WEBP": 16383}  # pixels a side that a format and its library allow
_ORIENTATION, _EXIF_IFD, _GPS_IFD = 0x0112, 0x8769, 0x8825
# Of the tags below 700 these describe the photograph; the others the layout of a TIFF file, which
# is not that of our output.
_DESCRIPTIVE = {269, 270, 271, 272, _ORIENTATION, 282, 283, 285, 296, 305, 306, 315, 316}
_TURN = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


class BadImage(Exception):
    """An image that cannot be read or written; the text is the reason."""


@dataclass
class Picture:
    """What an image file holds.

    Attributes:
        array: uint8 or uint16, (h, w, c), upright; c is 1 (grey), 2 (and alpha), 3 (RGB) or 4.
        icc: Its colour profile, or None.
        exif: Its EXIF without the orientation and the size, or empty.
        note: What of the file is not in here, or empty.
    """

    array: np.ndarray
    icc: bytes | None
    exif: bytes
    note: str


def size(path: Path) -> int:
    """The pixels of an image by its header; 0 if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.width * image.height
    except Exception:  # `read` tells
        return 0


def read(path: Path) -> Picture:
    """Read an image file.

    Raises:
        BadImage: It cannot be read, or has neither 8 nor 16 bits a channel.
    """
    try:
        with Image.open(path) as image:
            return _read(path, image)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image, broken, or of a kind that is not read here") from None
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from None
    except Exception as error:  # Pillow's plugins raise whatever a broken file leads them to
        raise BadImage(str(error) or type(error).__name__) from error


def _read(path: Path, image: Image.Image) -> Picture:
    layout = str(image.tile)  # before loading empties it
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    mode, icc, kept, note = image.mode.split(";")[0], image.info.get("icc_profile"), b"", ""
    has_alpha = mode[-1] in "Aa" or "transparency" in image.info
    grey = mode in ("1", "L", "LA", "La", "I") or "LA;16" in layout
    if tags.get(284) == 2 and max(tags.get(258, [8])) > 8:
        # Pillow and OpenCV both read it, wrongly.
        raise BadImage("16 bits with each channel stored apart; save it interleaved")
    if mode == "F":
        raise BadImage("floating-point pixels, whose range is not known")
    if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
        note = f"only the first of its {frames} frames or pages"
    if mode == "I" or ";16" in layout:
        # Pillow would cut 16-bit colour to its upper 8 bits.
        array = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        if array is None or array.dtype != np.uint16:
            raise BadImage("broken, or neither of 8 nor of 16 bits a channel")
        if array.ndim == 3:
            order = [0, 3] if grey else [2, 1, 0, 3]
            array = array[..., [c for c in order if c < array.shape[2]]]
        elif has_alpha:  # of the one grey of a PNG that is transparent
            alpha = np.where(array == image.info["transparency"], 0, 65535)
            array = np.dstack([array, alpha.astype(np.uint16)])
        if tags.get(262) == 0:  # white is zero, which OpenCV passes over
            array = 65535 - array
    else:
        colours = image
        if mode == "CMYK" and icc:
            # A CMYK profile says nothing of RGB: convert by it, and leave it behind.
            with contextlib.suppress(ImageCms.PyCMSError):
                source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
                target = ImageCms.createProfile("sRGB")
                colours = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
        if not grey and mode not in ("P", "PA") and not mode.startswith("RGB"):
            icc = None
        wanted = ("L" if grey else "RGB") + "A" * has_alpha
        # convert() copies, which a large image need not
        array = np.array(colours if colours.mode == wanted else colours.convert(wanted))
    exif = image.getexif()  # after loading, for that goes by it
    # Both readers turn a TIFF, and only that, themselves.
    turn = _TURN.get(exif.get(_ORIENTATION) if image.format != "TIFF" else 1, np.asarray)
    try:
        kept = _kept(exif)
    except Exception:  # EXIF may be broken in as many ways as there are cameras
        note = "without its EXIF, which is broken"
    array = array.reshape(*array.shape[:2], -1)
    return Picture(np.ascontiguousarray(turn(array)), icc, kept, note)


def _kept(exif: Image.Exif) -> bytes:
    """EXIF for another file: upright, without the old size and the layout of a TIFF file."""
    for tag in [t for t in exif if t < 700 and t not in _DESCRIPTIVE or t == 34675]:
        del exif[tag]
    if _ORIENTATION in exif:
        exif[_ORIENTATION] = 1
    if _EXIF_IFD in exif:  # get_ifd would make it
        for tag in (0xA002, 0xA003, 0xA005):  # the size, and a pointer that Pillow leaves as it was
            exif.get_ifd(_EXIF_IFD).pop(tag, None)
    return exif.tobytes() if len(exif) else b""


def check(path: Path, shape: tuple[int, int, int]) -> None:
    """Refuse an image, (h, w, c), that the format of `path` cannot hold.

    Raises:
        BadImage: It is too large, or has transparency.
    """
    kind = FORMATS[path.suffix.lower()]
    height, width, channels = shape
    if max(height, width) > LONGEST.get(kind, 2**31 - 1):
        raise BadImage(
            f"{width}x{height} is more than {kind} can hold ({LONGEST[kind]} pixels a side); "
            "use --format png"
        )
    if channels in (2, 4) and kind in ("JPEG", "BMP"):
        raise BadImage(f"it has transparency, which {kind} cannot hold; use --format png")


def write(
    path: Path,
    bands: Iterable[np.ndarray],
    shape: tuple[int, int, int],
    dtype: np.dtype,
    picture: Picture,
    quality: int,
) -> None:
    """Write an image file, whole or not at all.

    Args:
        path: Where to; the suffix says the format.
        bands: The rows from top to bottom, (rows, w, c) each, of `dtype`.
        shape: (h, w, c) of them all; `check` has nothing against it.
        dtype: uint8, or uint16 for PNG and TIFF.
        picture: Where profile and EXIF come from; its note says if the format cannot hold them.
        quality: Of JPEG and WebP, 1 to 100.

    Raises:
        BadImage: The file cannot be written.
    """
    kind = FORMATS[path.suffix.lower()]
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        if dtype == np.uint16:
            array, y = np.empty(shape, dtype), 0
            for band in bands:
                array[y : y + len(band)] = band
                y += len(band)
            _write_deep(part, kind, array, picture)
        else:
            mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[shape[2]]
            # Filled band by band: an array of the whole output would double the memory.
            image, y = Image.new(mode, shape[1::-1]), 0
            for band in bands:
                image.paste(Image.fromarray(band.squeeze(-1) if mode == "L" else band), (0, y))
                y += len(band)
            options = {
                "JPEG": {"quality": quality, "subsampling": 0},
                "WEBP": {"quality": quality},
            }.get(kind, {})
            if kind == "JPEG" and len(picture.exif) > 65533:
                picture.note = "without its EXIF, which is more than a JPEG holds"
            elif picture.exif:
                options["exif"] = picture.exif
            if kind == "TIFF":
                exif, large = Image.Exif(), math.prod(shape) > 4e9
                exif.load(picture.exif)
                if large or {_EXIF_IFD, _GPS_IFD} & exif.keys():
                    options["big_tiff"] = large  # neither of them can Pillow write compressed
                else:
                    options["compression"] = "tiff_adobe_deflate"
            image.save(part, kind, icc_profile=picture.icc, **options)
        os.replace(part, path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadImage(f"cannot write {path}: {reason}") from None
    finally:
        part.unlink(missing_ok=True)


def _write_deep(path: Path, kind: str, array: np.ndarray, picture: Picture) -> None:
    channels = array.shape[2]
    if kind == "TIFF":
        import tifffile

        tifffile.imwrite(
            path,
            array.squeeze(-1) if channels == 1 else array,
            photometric="minisblack" if channels < 3 else "rgb",
            planarconfig="contig" if channels > 1 else None,
            extrasamples=["unassalpha"] if channels in (2, 4) else None,
            compression="zlib",
            bigtiff=array.nbytes > 4e9,
            iccprofile=picture.icc,
            metadata=None,
        )
        return
    if channels == 2:  # OpenCV writes no grey with alpha
        array = array[..., [0, 0, 0, 1]]
    elif channels > 2:
        to_bgr = cv2.COLOR_RGB2BGR if channels == 3 else cv2.COLOR_RGBA2BGRA
        cv2.cvtColor(array, to_bgr, dst=array)
    kinds, values = [], []
    if picture.icc:
        kinds.append(cv2.IMAGE_METADATA_ICCP)
        values.append(np.frombuffer(picture.icc, np.uint8))
    if picture.exif:
        kinds.append(cv2.IMAGE_METADATA_EXIF)
        values.append(np.frombuffer(picture.exif.removeprefix(b"Exif\0\0"), np.uint8))
    if not cv2.imwriteWithMetadata(str(path), array, kinds, values):
        raise OSError(f"OpenCV could not write {path}")
