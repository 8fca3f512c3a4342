"""Upscale image files: x2, x3 or x4, with MLRN's shipped weights or any other network.

PNG, JPEG, WebP, BMP and TIFF keep their format; other images become PNG. 16 bits stay 16, grey
stays grey, transparency is upscaled, the orientation is applied, colour profile and EXIF are kept.
Inputs are never changed, and existing outputs are kept.
"""

from __future__ import annotations

import argparse
import glob
import mimetypes
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mlrn_arch import sources
from mlrn_arch.errors import UserError, first_line
from mlrn_arch.inference import backends, image_files
from mlrn_arch.inference.image_files import BadImage
from mlrn_arch.inference.upscaler import Upscaler, quantise
from mlrn_arch.machine import DEVICES, DTYPES, free_memory

FEW_PIXELS = 500_000  # which PyTorch has upscaled before another back end is ready
FORMATS = ("png", "jpg", "webp", "bmp", "tiff")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mlrn upscale` on `parser`."""
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="image, folder of images or quoted pattern")
    add("-i", "--input", dest="more", action="append", default=[], metavar="INPUT", help="the same")
    add("-r", "--recursive", action="store_true", help="sub-folders too, which -o then has as well")
    default = Path("upscaled")
    add("-o", "--output", type=Path, default=default, help="folder, or for one input a file")
    add("--scale", type=int, choices=(2, 3, 4), help="default: 4, or that of --weights")
    add("--network", "--opt", metavar="NETWORK", help="default: the shipped MLRN; see below")
    add("--weights", metavar="FILE", help="a checkpoint in place of the network's own")
    add("--format", choices=FORMATS, help="of the outputs (default: that of the input)")
    add("--quality", type=int, default=95, help="of JPEG and WebP, 1-100 (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace existing outputs")
    add("--self-ensemble", action="store_true", help="average 8 flips and rotations: 8x the time")
    add("--tile", type=int, help="longest side of a tile in input pixels, 192 or more")
    add("--backend", choices=backends.NAMES, help="default: the fastest that is installed")
    add("--device", choices=DEVICES, help="default: cuda if there is one")
    add("--precision", choices=["auto", *DTYPES], default="auto", help="default: auto")
    parser.epilog = f"""examples:
  mlrn upscale photos/*.jpg -o upscaled
  mlrn upscale scan.tif --scale 2 -o scan_large.tif
  mlrn upscale photos --network options/baselines/test_RLFN_x4.yml:rlfn_x4.pth -o by_rlfn

{sources.FORMS}

A folder stands for the images in it, with -r for those in its sub-folders too, without outputs
of this scale and -o. They are named upscaled/NAME_x4.EXT, or OUTPUT/NAME_x4.EXT with -o OUTPUT, and
existing ones count as done. Names carry no network: another network needs another -o.
16-bit images are rounded to 8 bits for JPEG, WebP and BMP, and so are 16-bit colours of JPEG 2000
and PPM. Lossless WebP stays lossless.
Animations: only the first frame is used.
Exit code: 0 all done, 1 some failed, 2 nothing done."""


def run(args: argparse.Namespace) -> int:
    """Upscale files; returns 0 if all are done, 1 if some failed, 2 if nothing is done."""
    if not 1 <= args.quality <= 100:
        raise UserError(f"--quality must be from 1 to 100, not {args.quality}")
    if args.network and args.scale:
        raise UserError("--scale is for the shipped networks; leave it out with --network")
    names = args.inputs + args.more
    if not names or "" in names:
        raise UserError("name an image, a folder or a quoted pattern to upscale")
    inputs, faults = _find(names, args.recursive, args.output.resolve())
    if not inputs:
        raise UserError("; ".join(faults))
    since = time.monotonic()
    pixels = {path: image_files.size(path) for path in inputs}
    few = sum(pixels.values()) * (8 if args.self_ensemble else 1) < FEW_PIXELS
    backend = args.backend or ("torch" if few else None)
    own = ("scale", "weights", "device", "precision", "tile", "self_ensemble")
    upscaler = Upscaler(args.network, backend=backend, **{n: getattr(args, n) for n in own})
    jobs, clashes = _outputs(inputs, args, upscaler.scale)
    for fault in faults + clashes:
        print(f"mlrn upscale: {fault}", file=sys.stderr)
    failed, done, existing = len(faults + clashes), 0, 0
    total = sum(pixels[path] for path in jobs)
    with tqdm(total=total, unit="pixel", unit_scale=True, disable=None, dynamic_ncols=True) as bar:
        for path, output in jobs.items():
            bar.set_description(path.name)
            upscaler.progress = lambda share, start=bar.n, n=pixels[path]: bar.update(
                start + n * share - bar.n
            )
            notes: list[str] = []
            try:
                if output.exists() and not args.overwrite:
                    existing += 1
                else:
                    notes = _upscale(upscaler, path, output, args.quality)
                    done += 1
            except (BadImage, MemoryError, RuntimeError) as error:  # torch's lack of memory is one
                notes = [first_line(error)]
                failed += 1
            if notes:
                bar.write(f"mlrn upscale: {path}: {'; '.join(notes)}", file=sys.stderr)
            upscaler.progress(1)
    kept = f", {existing} already there (--overwrite replaces them, another -o keeps them)"
    by = args.weights or args.network or f"mlrn://x{upscaler.scale}"
    by += f" on {upscaler.backend}" if upscaler.backend else ""
    print(
        f"{done} upscaled{kept * (existing > 0)}{f', {failed} not' * (failed > 0)}: "
        f"{args.output}, x{upscaler.scale} by {by}, {time.monotonic() - since:.1f} s"
    )
    return 2 if not done + existing else 1 if failed else 0


def _find(
    names: list[str], recursive: bool, output: Path
) -> tuple[dict[Path, Path | None], list[str]]:
    """Image files, each with its folder below the one named, or None; and what was not found."""
    files: dict[Path, tuple[Path, Path | None]] = {}
    faults = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            # Earlier outputs are no inputs, unless their folder is named itself.
            skipped = output if path.resolve() in output.parents else None
            found = [
                file
                for file in (path.rglob("*") if recursive else path.iterdir())
                if file.is_file() and skipped not in file.resolve().parents
                if not any(part.startswith(".") for part in file.relative_to(path).parts)
                if file.suffix.lower() in image_files.FORMATS or image_files.size(file)
            ]
        else:
            matches = [name] if path.exists() else glob.glob(name, recursive=True)
            found = [file for file in map(Path, matches) if file.is_file()]
        if not found:
            faults.append(f"{name}: {'no images in it' if path.is_dir() else 'no such file'}")
        for file in sorted(found):
            folder = file.parent.relative_to(path) if path.is_dir() else None
            files.setdefault(file.resolve(), (file, folder))
    return dict(files.values()), faults


def _outputs(
    inputs: dict[Path, Path | None], args: argparse.Namespace, scale: int
) -> tuple[dict[Path, Path], list[str]]:
    """The output of each input, and the reasons why inputs have none."""
    ending, kinds = args.output.suffix.lower(), image_files.FORMATS
    is_file = ending in kinds and not args.output.is_dir()
    if not is_file and not args.output.is_dir():
        if (mimetypes.guess_type(args.output)[0] or "").startswith("image/"):
            raise UserError(f"-o {args.output}: {ending} is not written; use {', '.join(FORMATS)}")
    if is_file and len(inputs) > 1:
        raise UserError(f"{args.output} is one file for {len(inputs)} inputs; name a folder")
    if is_file and args.format and kinds[f".{args.format}"] != kinds[ending]:
        raise UserError(f"--format {args.format} and -o {args.output} contradict each other")
    outputs = {}
    for path, folder in inputs.items():
        suffix = path.suffix if path.suffix.lower() in kinds else ".png"
        suffix = f".{args.format}" if args.format else suffix
        output = args.output / (folder or "") / f"{path.stem}_x{scale}{suffix}"
        outputs[path] = args.output if is_file else output
    made = Counter(output.resolve() for output in outputs.values())
    for path, folder in inputs.items():
        here = path.resolve()
        if folder is not None and here in made and here != outputs[path].resolve():
            made[outputs.pop(path).resolve()] -= 1  # an earlier output, beside its input
    originals, faults = {path.resolve() for path in outputs}, []
    for path, output in list(outputs.items()):
        if output.resolve() in originals or made[output.resolve()] > 1:
            what = "an input as well; use another -o"
            if output.resolve() not in originals:
                what = "the output of another input as well; rename one, or upscale it alone"
            faults.append(f"{path}: {output} would be {what}")
            del outputs[path]
    return outputs, faults


def _upscale(upscaler: Upscaler, path: Path, output: Path, quality: int) -> list[str]:
    """Upscale one file; returns what of it is not in the output."""
    picture = image_files.read(path)
    height, width, channels = picture.array.shape
    shape = (height * upscaler.scale, width * upscaler.scale, channels)
    dtype = image_files.dtype(output, picture)
    held = 4 if dtype == np.uint8 and channels > 1 else channels * dtype.itemsize
    if (need := shape[0] * shape[1] * held) > free_memory():
        size = f"{shape[1]}x{shape[0]}, {need / 1e9:.1f} GB of memory"
        raise BadImage(f"its output takes more than is free ({size}); cut it into parts")
    image = torch.from_numpy(np.require(picture.array, requirements="W"))
    bands = (quantise(band, dtype) for band in upscaler.bands(image))
    image_files.write(output, bands, shape, picture, quality)
    return picture.notes
