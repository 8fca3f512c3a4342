"""Upscale image files: x2, x3 or x4, by MLRN with the shipped weights or by any other network.

PNG, JPEG, WebP, BMP and TIFF. 16 bits stay 16, grey stays grey, transparency is upscaled too,
colour profile and EXIF are kept and the orientation is applied. Inputs are never changed and
existing files are kept.

Large images are cut into overlapping tiles, whose size follows the memory that is free.
"""

from __future__ import annotations

import argparse
import glob
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mlrn_arch import sources
from mlrn_arch.errors import UserError, first_line
from mlrn_arch.inference import backends, image_files
from mlrn_arch.inference.image_files import BadImage
from mlrn_arch.inference.upscaler import MIN_SIZE, Upscaler, quantise
from mlrn_arch.machine import DEVICES, DTYPES, free_memory

FEW_PIXELS = 500_000  # which PyTorch has upscaled before another back end is ready
FORMATS = ("png", "jpg", "webp", "bmp", "tiff")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mlrn upscale` on `parser`."""
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="image, folder (its images) or quoted pattern")
    add("-i", "--input", action="append", default=[], metavar="INPUT", help="the same")
    add("-r", "--recursive", action="store_true", help="folders with those below, kept apart in -o")
    add(
        "-o",
        "--output",
        type=Path,
        default=Path("upscaled"),
        help="folder for NAME_x4.EXT, or with one input the file itself (default: %(default)s)",
    )
    add("--scale", type=int, choices=(2, 3, 4), help="default: 4, or that of --weights")
    add("--network", "--opt", metavar="NETWORK", help="another than the shipped MLRN; see below")
    add("--weights", metavar="FILE", help="a checkpoint in place of the network's own")
    add("--format", choices=FORMATS, help="of the outputs (default: that of the input)")
    add("--quality", type=int, default=95, help="of JPEG and WebP, 1-100 (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace outputs that are already there")
    add("--self-ensemble", action="store_true", help="average 8 flips and rotations: 8x the time")
    add("--tile", type=int, help="longest side of a tile in input pixels (default: by free memory)")
    add("--backend", choices=backends.NAMES, help="default: the quickest that is installed")
    add("--device", choices=DEVICES, help="default: cuda if there is one")
    add("--precision", choices=["auto", *DTYPES], default="auto", help="default: auto")
    parser.epilog = f"""examples:
  mlrn upscale photos/*.jpg -o upscaled
  mlrn upscale scan.tif --scale 2 -o scan_large.tif
  mlrn upscale photos --network options/baselines/test_RLFN_x4.yml:rlfn_x4.pth

{sources.FORMS}

A folder stands for the images directly in it, with -r for those below as well. Outputs that are
there already are kept, and count as done.
JPEG, WebP and BMP hold 8 bits: 16-bit images are rounded for them. Of animations the first frame is
taken. Images below {MIN_SIZE} pixels a side are continued by their mirror image and cropped again.
Exit code: 0 all done, 1 some not, 2 none."""


def run(args: argparse.Namespace) -> int:
    """Upscale files; returns 0 if all are done, 1 if some are not, 2 if none is.

    Raises:
        UserError: Nothing can be started.
    """
    if not 1 <= args.quality <= 100:
        raise UserError(f"--quality must be from 1 to 100, not {args.quality}")
    if args.network and args.scale:
        raise UserError("--scale is that of a shipped network; with --network leave it out")
    if not args.inputs + args.input:
        raise UserError("name an image, a folder or a quoted pattern to upscale")
    inputs, missing = _find(args.inputs + args.input, args.recursive)
    for line in missing:
        print(f"mlrn upscale: {line}", file=sys.stderr)
    if not inputs:
        return 2
    since = time.monotonic()
    pixels = {path: image_files.size(path) for path in inputs}
    few = sum(pixels.values()) * (8 if args.self_ensemble else 1) < FEW_PIXELS
    upscaler = Upscaler(
        args.network,
        scale=args.scale,
        weights=args.weights,
        backend=args.backend or ("torch" if few else None),
        device=args.device,
        precision=args.precision,
        tile=args.tile,
        self_ensemble=args.self_ensemble,
    )
    jobs = _outputs(inputs, args, upscaler.scale)

    done = there = 0
    with tqdm(
        total=sum(pixels.values()), unit="pixel", unit_scale=True, disable=None, dynamic_ncols=True
    ) as bar:
        for path, output in jobs.items():
            bar.set_description(path.name)
            end, note = bar.n + pixels[path], ""
            try:
                if output.exists() and not args.overwrite:
                    there += 1
                else:
                    note = _upscale(upscaler, path, output, args.quality, bar.update)
                    done += 1
            except BadImage as reason:
                note = str(reason)
            except (MemoryError, RuntimeError) as error:  # torch's out of memory is the latter
                note = first_line(error) if str(error) else "out of memory"
            if note:
                bar.write(f"mlrn upscale: {path}: {note}", file=sys.stderr)
            bar.update(end - bar.n)
    kept = f", {there} already there (--overwrite replaces them)" * (there > 0)
    failed = len(jobs) + len(missing) - done - there
    by = args.weights or args.network or f"mlrn://x{upscaler.scale}"
    by += f" on {upscaler.backend}" if upscaler.backend else ""
    print(
        f"{done} upscaled{kept}{f', {failed} not' * (failed > 0)}: {args.output}, "
        f"x{upscaler.scale} by {by}, {time.monotonic() - since:.1f} s"
    )
    return 2 if not done + there else 1 if failed else 0


def _find(names: list[str], recursive: bool) -> tuple[dict[Path, Path], list[str]]:
    """The image files that the arguments stand for, each once, and what is wrong with the rest.

    With each the folder of it below the argument.
    """
    files: dict[Path, tuple[Path, Path]] = {}
    missing = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            below = path.rglob("*") if recursive else path.iterdir()
            found = [p for p in below if p.suffix.lower() in image_files.FORMATS and p.is_file()]
            found = [p for p in found if not p.name.startswith(".")]
        elif path.exists():
            found = [path]
        else:
            found = [Path(p) for p in glob.glob(name, recursive=True) if Path(p).is_file()]
        if not found:
            what = "no images in it" if path.is_dir() else "no such file"
            missing.append(f"{name}: {what}")
        for file in sorted(found):
            folder = file.parent.relative_to(path) if path.is_dir() else Path()
            files[file.resolve()] = file, folder
    return dict(files.values()), missing


def _outputs(inputs: dict[Path, Path], args: argparse.Namespace, scale: int) -> dict[Path, Path]:
    """The output of each input, below its folder.

    Raises:
        UserError: Two would be the same file, or one an input, or there is no folder for them.
    """
    single = args.output.suffix.lower() in image_files.FORMATS and not args.output.is_dir()
    if single and len(inputs) > 1:
        raise UserError(f"{args.output} is one file for {len(inputs)} inputs; name a folder")
    kinds = {image_files.FORMATS[f".{args.format}"]} if args.format else set()
    if single and kinds - {image_files.FORMATS[args.output.suffix.lower()]}:
        raise UserError(f"--format {args.format} and -o {args.output} contradict each other")
    jobs, sources = {}, {}
    for path, folder in inputs.items():
        suffix = path.suffix
        if args.format or suffix.lower() not in image_files.FORMATS:
            suffix = f".{args.format or 'png'}"
        output = args.output / folder / f"{path.stem}_x{scale}{suffix}"
        output = args.output if single else output
        if output.resolve() in sources:
            raise UserError(
                f"{sources[output.resolve()]} and {path} would both become {output}; upscale them "
                "into different folders"
            )
        sources[output.resolve()] = path
        jobs[path] = output
    originals = {path.resolve(): path for path in inputs}
    if clash := originals.keys() & sources.keys():
        path = originals[min(clash)]
        raise UserError(f"{path} is an input and would be an output as well; choose another -o")
    for folder in {output.parent for output in jobs.values()}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
    return jobs


def _upscale(
    upscaler: Upscaler, path: Path, output: Path, quality: int, progress: Callable[[int], None]
) -> str:
    """Upscale one file; returns what of it is not in the output, if anything.

    Raises:
        BadImage: It cannot be read, held in memory or written.
    """
    picture = image_files.read(path)
    height, width, channels = picture.array.shape
    shape = (height * upscaler.scale, width * upscaler.scale, channels)
    image_files.check(output, shape)
    kind = image_files.FORMATS[output.suffix.lower()]
    dtype = picture.array.dtype if kind in ("PNG", "TIFF") else np.dtype(np.uint8)
    held = 4 if dtype == np.uint8 and channels > 1 else channels * dtype.itemsize
    need, free = shape[0] * shape[1] * held, free_memory()
    if need > free:
        raise BadImage(
            f"its output of {shape[1]}x{shape[0]} takes {need / 1e9:.1f} GB of memory, "
            f"{free / 1e9:.1f} GB are free; cut it into parts"
        )
    image = torch.from_numpy(np.require(picture.array, requirements="W"))
    bands = (quantise(band, dtype) for band in upscaler.bands(image, progress))
    image_files.write(output, bands, shape, dtype, picture, quality)
    return picture.note
