"""Upscale image files: x2, x3 or x4, by MLRN with the shipped weights or by any other network.

PNG, JPEG, WebP, BMP and TIFF. 16 bits stay 16, grey stays grey, transparency is upscaled too,
colour profile and EXIF are kept and the orientation is applied. Inputs are never changed and
existing files are kept.

Large images are cut into overlapping tiles, whose size follows the memory that is free.
"""

from __future__ import annotations

import argparse
import copy
import functools
import glob
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from basicsr.utils.color_util import rgb2ycbcr_pt
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from mlrn_arch import backends, options
from mlrn_arch.archs.bicubic_arch import upsample_bicubic
from mlrn_arch.archs.esa import ESA
from mlrn_arch.archs.tile import STRIDE, OnTile
from mlrn_arch.errors import UserError, first_line
from mlrn_arch.memory import free_memory
from mlrn_arch.models.fast_sr_model import DTYPES
from mlrn_arch.tools import image_files
from mlrn_arch.tools.image_files import BadImage
from mlrn_arch.tools.profile import count

OVERLAP = 64  # input pixels that neighbouring tiles share; figures in README
TILE = 1024  # pixels a side
FEW_PIXELS = 500_000  # which PyTorch has upscaled before another back end is ready
MIN_TILE = 192
MIN_SIZE = 24  # what MLRN's ESA needs in every back end, with room
Place = tuple[tuple[int, int], tuple[int, int]]  # start and side of the image, by rows and columns
FORMATS = ("png", "jpg", "webp", "bmp", "tiff")


class Upscaler:
    """Super-resolve images of any size in memory.

    Args:
        model: `x2`, `x3` or `x4`, MLRN with the shipped weights; an option file, whose network_g
            and checkpoint are taken; None, the MLRN of which `weights` are; or a network,
            (n, 3, h, w) or Y alone, (n, 1, h, w), in [0, 1] -> `scale` times that size.
        weights: A checkpoint that replaces the model's own.
        backend: One of `mlrn_arch.backends.NAMES`; None takes the quickest at hand.
        device: `cpu` or `cuda`; None takes a GPU if there is one.
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        tile: Longest side of a tile in input pixels; None chooses by the memory that is free.
        self_ensemble: Average over the 8 flips and rotations: about 8 times the time.

    Attributes:
        network: The network in torch.
        scale: Output size over input size, an integer.

    Raises:
        UserError: The model or a file is not what it should be.
    """

    def __init__(
        self,
        model: str | os.PathLike | nn.Module | None = "x4",
        *,
        weights: str | os.PathLike | None = None,
        backend: str | None = None,
        device: str | torch.device | None = None,
        precision: str = "auto",
        tile: int | None = None,
        self_ensemble: bool = False,
    ) -> None:
        if tile is not None and tile < MIN_TILE:
            raise UserError(f"a tile must be at least {MIN_TILE} pixels, not {tile}")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device {device}: torch finds no GPU here; use cpu")
        if isinstance(model, nn.Module):
            self.network = copy.deepcopy(model).eval().requires_grad_(False)
        else:
            checkpoint = None if weights is None else str(weights)
            self.network, _ = options.load_network(model and str(model), checkpoint)
        self.channels, self.scale = _probe(self.network)
        self.tile, self.self_ensemble = tile, self_ensemble
        self._device = torch.device(device)
        # Bytes an input pixel: what one pass holds, and as much again for a back end's own needs.
        shape = (1, self.channels, MIN_TILE, MIN_TILE)
        self._bytes = 2 * count(self.network, shape, self.scale)["peak_bytes"] / MIN_TILE**2
        self._load = lambda network: backends.load(network, backend, device, precision)

    # Either takes seconds to prepare, and many a run needs one of them.
    @functools.cached_property
    def _run(self) -> Callable[[Tensor], Tensor]:
        return self._load(self.network)

    @functools.cached_property
    def _run_tile(self) -> Callable[[Tensor], Tensor]:
        return self._load(OnTile(self.network))

    def __call__(self, image: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Upscale an image, or a batch of images.

        Args:
            image: An array, (h, w) or (h, w, c) with c = 1 (grey), 2 (grey, alpha), 3 (RGB) or
                4 (RGB, alpha), uint8, uint16 or floating-point in [0, 1]; or a floating-point
                tensor, (n, c, h, w) in [0, 1].

        Returns:
            The same kind, `scale` times as high and wide. Floating-point values are nominally in
            [0, 1], not clamped.

        Raises:
            ValueError: Another shape or type.
        """
        if isinstance(image, Tensor):
            if image.ndim != 4 or not image.is_floating_point():
                raise ValueError("a tensor must be floating-point and (n, c, h, w)")
            outputs = [
                torch.cat(list(self.bands(one.movedim(0, -1)))).movedim(-1, 0) for one in image
            ]
            return torch.stack(outputs).to(image)
        array = np.asarray(image)
        if array.ndim not in (2, 3):
            raise ValueError(f"an image must be (h, w) or (h, w, c), not {array.shape}")
        height, width = array.shape[:2]
        whole = torch.from_numpy(np.ascontiguousarray(array)).reshape(height, width, -1)
        size = (height * self.scale, width * self.scale, whole.shape[2])
        output, y = np.empty(size, array.dtype), 0
        for band in self.bands(whole):
            output[y : y + len(band)] = quantise(band, array.dtype)
            y += len(band)
        return output.reshape(*output.shape[:2], *array.shape[2:])

    def bands(self, image: Tensor, progress: Callable[[int], None] = int) -> Iterator[Tensor]:
        """Upscale an image piece by piece, so that its output need not be held in float.

        Args:
            image: (h, w, c), uint8, uint16 or floating-point in [0, 1].
            progress: Called after every tile with the number of input pixels that are done.

        Returns:
            The rows of the output from top to bottom, (rows, w * scale, c), float32, nominally in
            [0, 1].

        Raises:
            ValueError: Another shape or type.
        """
        known = image.is_floating_point() or image.dtype in (torch.uint8, torch.uint16)
        if not known or image.ndim != 3 or not 1 <= image.shape[2] <= 4 or not image.numel():
            shape = tuple(image.shape)
            raise ValueError(f"an image of {shape} and {image.dtype} is none that can be upscaled")
        # Here, not in the generator: before its caller allocates the output.
        return self._bands(image, self.tile or self._choose_tile(image), progress)

    @torch.no_grad()
    def _bands(self, image: Tensor, tile: int, progress: Callable[[int], None]) -> Iterator[Tensor]:
        s = self.scale
        ys, height = _cut(image.shape[0], tile)
        xs, width = _cut(image.shape[1], tile)
        has_esa = any(isinstance(module, ESA) for module in self.network.modules())
        knows_place = has_esa and self.channels == 3
        done, above = 0, None
        for i, y in enumerate(ys):
            strip = torch.empty(0)
            for j, x in enumerate(xs):
                place = ((y, image.shape[0]), (x, image.shape[1]))
                output = self._tile(
                    image[y : y + height, x : x + width],
                    place if knows_place and len(ys) * len(xs) > 1 else None,
                )
                start = 0
                if j == 0:
                    size = (height * s, image.shape[1] * s, image.shape[2])
                    strip = torch.empty(size, device=output.device)
                else:
                    start = (xs[j - 1] + width - x) * s
                    left = strip[:, x * s : x * s + start]
                    left.lerp_(output[:, :start], _ramp(start, output)[:, None])
                strip[:, x * s + start : (x + width) * s] = output[:, start:]
                share = image.shape[0] * image.shape[1] * (i * len(xs) + j + 1)
                progress(share // (len(ys) * len(xs)) - done)
                done = share // (len(ys) * len(xs))
            if above is not None:
                top = strip[: len(above)]
                top.copy_(above.lerp_(top, _ramp(len(above), top)[:, None, None]))
            rows = (ys[i + 1] - y if i + 1 < len(ys) else height) * s
            above = strip[rows:].clone()
            yield strip[:rows]

    def _choose_tile(self, image: Tensor) -> int:
        """The longest side of a tile that needs no more than half of what the output leaves."""
        height, width, channels = image.shape
        device = self._device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
        output = height * width * self.scale**2 * max(4, channels * image.element_size())
        if device.type == "cpu":
            free -= output
        row = 6 * width * channels * self.scale**2  # float32, and a half more to round them
        tile = TILE
        while tile > MIN_TILE and 2 * (tile * tile * self._bytes + tile * row) > free:
            tile -= 32
        return tile

    def _tile(self, tile: Tensor, place: Place | None) -> Tensor:
        """(h, w, c) of any kind -> (h * scale, w * scale, c), float32."""
        x = tile.movedim(-1, 0)[None].to(torch.float32)
        if not tile.is_floating_point():
            x = x / torch.iinfo(tile.dtype).max
        colours = x.shape[1] - (x.shape[1] in (2, 4))
        x, alpha = x[:, :colours], x[:, colours:]
        if not alpha.numel():
            return self._colours(x, place)[0].movedim(0, -1)
        size = (tile.shape[0] * self.scale, tile.shape[1] * self.scale)
        if alpha.min() == alpha.max():  # most tiles; and a network would not keep it exactly even
            y = self._colours(x, place) if alpha.any() else x.new_zeros(1, colours, *size)
            y_alpha = alpha.flatten()[0].expand(1, 1, *size).to(y.device)
        else:
            # Alpha goes through the network as well: edges of colour and of transparency stay as
            # sharp as each other. Premultiplied, for what is invisible must not bleed into view.
            y_alpha = self._colours(alpha, place).clamp(0, 1)
            y = (self._colours(x * alpha, place) / y_alpha.clamp(min=1 / 255)).clamp(0, 1)
        return torch.cat([y, y_alpha], dim=1)[0].movedim(0, -1)

    def _colours(self, x: Tensor, place: Place | None) -> Tensor:
        """Grey or RGB, (1, 1 or 3, h, w), by a network for RGB or for Y."""
        if x.shape[1] == 1:
            return self._colours(x.expand(-1, 3, -1, -1), place).mean(1, keepdim=True)
        if self.channels == 3:
            return self._ensemble(x, place)
        # What the network adds to Y is added to R, G and B alike: Cb and Cr stay bicubic.
        luma = rgb2ycbcr_pt(x, y_only=True)
        y = self._ensemble(luma, place)
        gain = y - upsample_bicubic(luma, self.scale).to(y.device)
        return upsample_bicubic(x, self.scale).to(y.device) + gain * (255 / 219)

    def _ensemble(self, x: Tensor, place: Place | None) -> Tensor:
        height, width = x.shape[-2:]
        for dim, side in ((-2, height), (-1, width)):
            if side < MIN_SIZE:  # continue it as in mirrors, the edge repeated
                i = torch.arange(MIN_SIZE, device=x.device) % (2 * side)
                x = x.index_select(dim, torch.minimum(i, 2 * side - 1 - i))
        if not self.self_ensemble:
            y = self._forward(x, place)
        else:
            y = 0
            for flips in ([], [-2], [-1], [-2, -1]):
                view = place and tuple(
                    (side - start - x.shape[dim] if dim in flips else start, side)
                    for dim, (start, side) in zip((-2, -1), place, strict=True)
                )
                flipped = x.flip(flips)
                y = y + self._forward(flipped, view).flip(flips)
                y = y + self._forward(flipped.mT, view and view[::-1]).mT.flip(flips)
            y = y / 8
        return y[..., : height * self.scale, : width * self.scale].to(torch.float32)

    def _forward(self, x: Tensor, place: Place | None) -> Tensor:
        if place is None:
            return self._run(x.contiguous())
        shifts = [
            OnTile.shifts(start, length, side)
            for (start, side), length in zip(place, x.shape[-2:], strict=True)
        ]
        planes = torch.stack(torch.meshgrid(*shifts, indexing="ij"))[None]
        return self._run_tile(torch.cat([x, planes.to(x.device)], dim=1))


def quantise(band: Tensor, dtype: np.dtype) -> np.ndarray:
    """Values in [0, 1], which are overwritten, as `dtype`; rounded and clamped for integers."""
    if np.issubdtype(dtype, np.integer):
        top = np.iinfo(dtype).max
        band = band.mul_(top).round_().clamp_(0, top)
    return band.cpu().numpy().astype(dtype)


def _cut(side: int, tile: int) -> tuple[list[int], int]:
    """Where tiles start along a side, and their length there: all alike, no longer than needed.

    The distance from either border of the image is a multiple of ESA's stride.
    """
    if side <= tile:
        return [0], side
    number, length = 1, side
    while length > tile:
        number += 1
        length = math.ceil((side + (number - 1) * OVERLAP) / number)
        length += (side - length) % STRIDE
    strides = (side - length) // STRIDE
    return [round(i * strides / (number - 1)) * STRIDE for i in range(number)], length


def _ramp(size: int, like: Tensor) -> Tensor:
    """From 0 to 1 over the middle half: a network sees least at the rim of a tile."""
    return ((torch.arange(size, device=like.device) + 0.5) / size * 2 - 0.5).clamp_(0, 1)


def _probe(network: nn.Module) -> tuple[int, int]:
    """The channels that a network takes, 3 or 1, and its scale, by trying.

    Raises:
        UserError: It is none that makes an image of an image.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    faults = []
    for channels in (3, 1):
        try:
            with torch.inference_mode():
                shape = network(torch.zeros(1, channels, MIN_SIZE, MIN_SIZE, device=device)).shape
        except Exception as error:  # each network refuses in its own way
            faults.append(first_line(error))
            continue
        scale = shape[-1] // MIN_SIZE
        if scale and tuple(shape) == (1, channels, scale * MIN_SIZE, scale * MIN_SIZE):
            return channels, scale
        faults.append(f"it returns {tuple(shape)}")
    raise UserError(
        f"{type(network).__name__} does not upscale single RGB or Y images: {faults[0]}"
    )


# --- files --------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mlrn upscale` on `parser`."""
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="image, folder (its images) or quoted pattern")
    add(
        "-o",
        "--output",
        type=Path,
        default=Path("upscaled"),
        help="folder for NAME_x4.EXT, or with one input the file itself (default: %(default)s)",
    )
    add("--scale", type=int, choices=(2, 3, 4), help="default: 4, or that of --weights")
    add("--weights", metavar="FILE", help="a checkpoint of your own, of MLRN or of --opt's network")
    add("--opt", metavar="FILE", help="take network and checkpoint of this option file instead")
    add("--format", choices=FORMATS, help="of the outputs (default: that of the input)")
    add("--quality", type=int, default=95, help="of JPEG and WebP, 1-100 (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace outputs that are already there")
    add("--self-ensemble", action="store_true", help="average 8 flips and rotations: 8x the time")
    add("--tile", type=int, help="longest side of a tile in input pixels (default: by free memory)")
    add("--backend", choices=backends.NAMES, help="default: the quickest that is installed")
    add("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    add("--precision", choices=["auto", *DTYPES], default="auto", help="default: auto")
    parser.epilog = f"""examples:
  mlrn upscale photos/*.jpg -o upscaled
  mlrn upscale scan.tif --scale 2 -o scan_large.tif
  mlrn upscale photos --opt options/baselines/test_RLFN_x4.yml --weights rlfn_x4.pth

A folder stands for the images directly in it, a quoted "photos/**/*.png" for those below as well.
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
    if args.opt and args.scale:
        raise UserError("--scale is that of a shipped network; with --opt leave it out")
    Image.MAX_IMAGE_PIXELS = None  # large photographs are no attack here
    inputs, missing = _find(args.inputs)
    for line in missing:
        print(f"mlrn upscale: {line}", file=sys.stderr)
    if not inputs:
        return 2
    pixels = {path: image_files.size(path) for path in inputs}
    few = sum(pixels.values()) * (8 if args.self_ensemble else 1) < FEW_PIXELS
    upscaler = Upscaler(
        args.opt or (None if args.weights and not args.scale else f"x{args.scale or 4}"),
        weights=args.weights,
        backend=args.backend or ("torch" if few else None),
        device=args.device,
        precision=args.precision,
        tile=args.tile,
        self_ensemble=args.self_ensemble,
    )
    jobs = _outputs(inputs, args, upscaler.scale)

    done = 0
    with tqdm(
        total=sum(pixels.values()), unit="pixel", unit_scale=True, disable=None, dynamic_ncols=True
    ) as bar:
        for path, output in jobs.items():
            end = bar.n + pixels[path]
            try:
                if output.exists() and not args.overwrite:
                    raise BadImage(f"{output} is there and is kept; --overwrite replaces it")
                note = _upscale(upscaler, path, output, args.quality, bar.update)
                done += 1
            except BadImage as reason:
                note = str(reason)
            except (MemoryError, RuntimeError) as error:  # torch's out of memory is the latter
                note = first_line(error) if str(error) else "out of memory"
            if note:
                bar.write(f"mlrn upscale: {path}: {note}", file=sys.stderr)
            bar.update(end - bar.n)
    print(f"{done} of {len(jobs) + len(missing)} upscaled")
    return 2 if not done else 1 if missing or done < len(jobs) else 0


def _find(names: list[str]) -> tuple[list[Path], list[str]]:
    """The image files that the arguments stand for, each once, and what is wrong with the rest."""
    files, missing = {}, []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = [p for p in path.iterdir() if p.suffix.lower() in image_files.FORMATS]
            found = [p for p in found if p.is_file() and not p.name.startswith(".")]
        elif path.exists():
            found = [path]
        else:
            found = [Path(p) for p in glob.glob(name, recursive=True) if Path(p).is_file()]
        if not found:
            what = "no images in it" if path.is_dir() else "no such file"
            missing.append(f"{name}: {what}")
        files.update({file.resolve(): file for file in sorted(found)})
    return list(files.values()), missing


def _outputs(inputs: list[Path], args: argparse.Namespace, scale: int) -> dict[Path, Path]:
    """The output of each input.

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
    for path in inputs:
        suffix = path.suffix
        if args.format or suffix.lower() not in image_files.FORMATS:
            suffix = f".{args.format or 'png'}"
        output = args.output if single else args.output / f"{path.stem}_x{scale}{suffix}"
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
    folder = args.output.parent if single else args.output
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
    image = torch.from_numpy(picture.array)
    bands = (quantise(band, dtype) for band in upscaler.bands(image, progress))
    image_files.write(output, bands, shape, dtype, picture, quality)
    return picture.note
