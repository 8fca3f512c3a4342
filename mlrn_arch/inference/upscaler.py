"""Super-resolution of images in memory: tiles, grey, transparency, self-ensemble."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from basicsr.utils.color_util import rgb2ycbcr_pt
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mlrn_arch import sources
from mlrn_arch.archs.bicubic_arch import upsample_bicubic
from mlrn_arch.archs.esa import ESA
from mlrn_arch.archs.tile import OnTile
from mlrn_arch.errors import UserError, first_line
from mlrn_arch.inference import backends, tiles
from mlrn_arch.inference.counting import count

OUT_OF_MEMORY = "out of memory|allocate memory"  # what torch says of a GPU, and of the CPU
MIN_SIZE = 24  # what MLRN's ESA needs in every back end, with room
Place = tuple[tuple[int, int], tuple[int, int]]  # start and side of the image, by rows and columns


class Upscaler:
    """Super-resolve images of any size in memory; `UserError` if a model cannot be used.

    Args:
        model: A network as `mlrn_arch.sources.FORMS` lists them, such as `x4`; or an `nn.Module`,
            (n, 3, h, w), or Y alone, (n, 1, h, w), in [0, 1] -> `scale` times that size. Without
            it: the shipped network of `scale`, or the MLRN that `weights` belong to.
        scale: Output size over input size (default: the model's, or 4).
        weights: A checkpoint that replaces the model's own.
        backend: One of `mlrn_arch.inference.backends.NAMES` (default: the fastest installed).
        device: `cpu`, `cuda` or `mps` (default: an NVIDIA GPU if there is one).
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        tile: Longest side of a tile in input pixels, at least 192 (default: by the free memory).
        self_ensemble: Average over the 8 flips and rotations, in about 8 times the time.
    """

    def __init__(
        self,
        model: str | os.PathLike | nn.Module | None = None,
        *,
        scale: int | None = None,
        weights: str | os.PathLike | None = None,
        backend: str | None = None,
        device: str | torch.device | None = None,
        precision: str = "auto",
        tile: int | None = None,
        self_ensemble: bool = False,
    ) -> None:
        if tile is not None and tile < tiles.SMALLEST:
            raise UserError(f"a tile must be at least {tiles.SMALLEST} pixels, not {tile}")
        self._device = backends.device_of(backend, device)
        if isinstance(model, nn.Module):
            self.network = copy.deepcopy(model).eval().requires_grad_(False)
        else:
            if model is None and (scale or weights is None):
                model = f"x{scale or 4}"
            names = (None if name is None else os.fspath(name) for name in (model, weights))
            self.network, _ = sources.load(*names)
        self.channels, self.scale = _probe(self.network)
        if scale not in (None, self.scale):
            raise UserError(f"scale must be {self.scale}, as of this network, not {scale!r}")
        self.tile, self.self_ensemble = tile, self_ensemble
        # Called after every tile with the share of the image that is done.
        self.progress: Callable[..., object] = lambda share: None
        # Bytes an input pixel: what one pass holds, and as much again for a back end's own needs.
        shape = (1, self.channels, tiles.SMALLEST, tiles.SMALLEST)
        self._bytes = 2 * count(self.network, shape, self.scale)["peak_bytes"] / tiles.SMALLEST**2
        self._load = lambda network: backends.load(network, backend, self._device, precision)
        self._runs: dict[bool, Any] = {}  # for whole images, and for tiles

    @property
    def backend(self) -> str | None:
        """The back end that ran; None before the first image."""
        return next((run.backend for run in self._runs.values()), None)

    def __call__(self, image: Any) -> Any:
        """Upscale an image, or a batch of images, to `scale` times the size; the kind stays.

        `image` is a PIL image (L, LA, RGB, RGBA); an array, (h, w) or (h, w, c) with c = 1 (grey),
        2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha), uint8, uint16 or floating-point in [0, 1]; or a
        floating-point tensor, (n, c, h, w) in [0, 1]. `ValueError` for anything else.
        Floating-point values that come out are not clamped.
        """
        if isinstance(image, Tensor):
            if image.ndim != 4 or not image.is_floating_point() or not image.numel():
                raise ValueError("a tensor must be floating-point and (n, c, h, w), n at least 1")
            outputs = [torch.cat(list(self.bands(one.movedim(0, -1)))) for one in image]
            return torch.stack(outputs).movedim(-1, 1).to(image)
        if isinstance(image, Image.Image):
            if image.mode not in ("L", "LA", "RGB", "RGBA"):
                how = "np.array(image)" if image.mode[0] == "I" else "image.convert('RGB')"
                raise ValueError(f"a PIL image of mode {image.mode}; use {how}")
            return Image.fromarray(self(np.array(image)))
        array = np.require(image, requirements=["C", "W"])  # torch warns of a read-only array
        whole = torch.from_numpy(array[..., None] if array.ndim == 2 else array)
        bands, (height, width, channels) = self.bands(whole), whole.shape
        output, y = np.empty((height * self.scale, width * self.scale, channels), array.dtype), 0
        for band in bands:
            output[y : y + len(band)] = quantise(band, array.dtype)
            y += len(band)
        return output.reshape(*output.shape[:2], *array.shape[2:])

    def bands(self, image: Tensor) -> Iterator[Tensor]:
        """Upscale an image, (h, w, c) as `__call__` takes it, so that no output is held in float.

        Returns the rows of the output from top to bottom, (rows, w * scale, c), float32.
        """
        floating = image.is_floating_point()
        known = floating or image.dtype in (torch.uint8, torch.uint16)
        if not known or image.ndim != 3 or not 1 <= image.shape[2] <= 4 or not image.numel():
            must = "(h, w) or (h, w, c) with c from 1 to 4, uint8, uint16 or floating-point"
            hint = ", so transpose it: image.transpose(1, 2, 0)" * (image.shape[:1] == (3,))
            raise ValueError(f"{must}, not {tuple(image.shape)} {image.dtype}{hint}")
        low, high = image.aminmax() if floating else (0, 1)
        if not (low >= -0.5 and high <= 1.5):
            raise ValueError(f"floats must be in [0, 1], not from {low:g} to {high:g}")
        size = image.shape[:2]
        for dim, side in enumerate(size):
            if side < MIN_SIZE:  # continue it as in mirrors, the edge repeated
                i = torch.arange(MIN_SIZE, device=image.device) % (2 * side)
                image = image.index_select(dim, torch.minimum(i, 2 * side - 1 - i))
        # Here, not in the generator: before its caller allocates the output.
        tile = self.tile or tiles.choose(image, self.scale, self._bytes, self._device)
        return self._bands(image, size, tile)

    @torch.no_grad()
    def _bands(self, image: Tensor, size: tuple, tile: int) -> Iterator[Tensor]:
        height, width = (side * self.scale for side in size)  # without the mirrors
        yielded = 0
        while True:
            rows = 0
            try:
                for band in self._strips(image, tile):
                    band = band[: height - rows, :width]
                    rows += len(band)
                    if rows > yielded:
                        yield band[yielded - rows :]
                        yielded = rows
                return
            except RuntimeError as error:
                tile = min(tile, max(image.shape[:2]))
                if tile <= tiles.SMALLEST or not re.search(OUT_OF_MEMORY, str(error)):
                    raise
            tile = max(tiles.SMALLEST, tile // 2)  # from the top again, without the rows yielded

    def _strips(self, image: Tensor, tile: int) -> Iterator[Tensor]:
        s, (rows, columns, channels) = self.scale, image.shape
        (ys, height), (xs, width) = tiles.cut(rows, tile), tiles.cut(columns, tile)
        down = tiles.weights(ys, height, s, self._device)
        across = tiles.weights(xs, width, s, self._device)
        has_esa = any(isinstance(module, ESA) for module in self.network.modules())
        by_place = has_esa and self.channels == 3 and len(ys) * len(xs) > 1
        below = torch.empty(0, columns * s, channels, device=self._device)
        for i, y in enumerate(ys):
            strip = F.pad(below, (0, 0, 0, 0, 0, height * s - len(below)))
            for j, x in enumerate(xs):
                place = ((y, rows), (x, columns)) if by_place else None
                output = self._tile(image[y : y + height, x : x + width], place)
                shares = down[i][:, None, None] * across[j][:, None]
                strip[:, x * s : (x + width) * s].addcmul_(output, shares)
                self.progress((i * len(xs) + j + 1) / (len(ys) * len(xs)))
            done = ([*ys, rows][i + 1] - y) * s
            below = strip[done:].clone()  # not the strip itself
            yield strip[:done]

    def _tile(self, tile: Tensor, place: Place | None) -> Tensor:
        """(h, w, c) of any kind -> (h * scale, w * scale, c), float32, where the network runs."""
        x = tile.movedim(-1, 0)[None].to(torch.float32).to(self._device)
        if not tile.is_floating_point():
            x = x / torch.iinfo(tile.dtype).max
        colours = x.shape[1] - (x.shape[1] in (2, 4))
        x, alpha = x[:, :colours], x[:, colours:]
        if not alpha.numel():
            return self._colours(x, place)[0].movedim(0, -1)
        size = (tile.shape[0] * self.scale, tile.shape[1] * self.scale)
        if alpha.min() == alpha.max():  # most tiles; and a network would not keep it exactly even
            y = self._colours(x, place) if alpha.any() else x.new_zeros(1, colours, *size)
            y_alpha = alpha.flatten()[0].expand(1, 1, *size)
        else:
            y = self._colours(_beyond_edges(x, alpha), place)
            y_alpha = self._colours(alpha, place)
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
        gain = y - upsample_bicubic(luma, self.scale)
        return upsample_bicubic(x, self.scale) + gain * (255 / 219)

    def _ensemble(self, x: Tensor, place: Place | None) -> Tensor:
        if not self.self_ensemble:
            return self._forward(x, place)
        total = x.new_zeros(())
        for flips in ([], [-2], [-1], [-2, -1]):
            view = None
            if place:
                (top, height), (left, width) = place
                top = height - top - x.shape[-2] if -2 in flips else top
                left = width - left - x.shape[-1] if -1 in flips else left
                view = (top, height), (left, width)
            flipped = x.flip(flips)
            total = total + self._forward(flipped, view).flip(flips)
            total += self._forward(flipped.mT, view and view[::-1]).mT.flip(flips)
        return total / 8

    def _forward(self, x: Tensor, place: Place | None) -> Tensor:
        on_tile = place is not None
        if on_tile not in self._runs:  # it takes seconds, and most images need one of the two
            self._runs[on_tile] = self._load(OnTile(self.network) if on_tile else self.network)
        if place is not None:
            (top, height), (left, width) = place
            down = OnTile.shifts(top, x.shape[-2], height)
            across = OnTile.shifts(left, x.shape[-1], width)
            planes = torch.stack(torch.meshgrid(down, across, indexing="ij"))[None]
            x = torch.cat([x, planes.to(x.device)], dim=1)
        return self._runs[on_tile](x.contiguous())


def _beyond_edges(x: Tensor, alpha: Tensor) -> Tensor:
    """Continue visible colours into what is transparent, lest the network sharpens that edge."""
    known = (alpha * 16).clamp(max=1)
    x = x * known
    for radius in (1, 2, 4, 8):
        near, share = (F.avg_pool2d(t, 2 * radius + 1, 1, radius) for t in (x, known))
        missing = (1 - known) * (share > 0)
        x = x + missing * near / share.clamp(min=1e-6)
        known = known + missing
    return x


def quantise(band: Tensor, dtype: np.dtype) -> np.ndarray:
    """Values in [0, 1], which are overwritten, as `dtype`; rounded and clamped for integers."""
    if np.issubdtype(dtype, np.integer):
        top = np.iinfo(dtype).max
        band = band.mul_(top).round_().clamp_(0, top)
        band = band.to(torch.uint8 if top == 255 else torch.int32)  # before it leaves a GPU
    return band.cpu().numpy().astype(dtype)


def _probe(network: nn.Module) -> tuple[int, int]:
    """The channels that a network takes, 3 or 1, and its scale, by trying."""
    device, faults = next((p.device for p in network.parameters()), torch.device("cpu")), []
    for shape in ((1, 3, MIN_SIZE, MIN_SIZE), (1, 1, MIN_SIZE, MIN_SIZE)):
        try:
            with torch.inference_mode():
                output = tuple(network(torch.zeros(shape, device=device)).shape)
            scale = output[-1] // MIN_SIZE
            if scale and output == (*shape[:2], scale * MIN_SIZE, scale * MIN_SIZE):
                return shape[1], scale
            faults.append(f"it returns {output} for {shape}")
        except Exception as error:  # each network refuses in its own way
            faults.append(first_line(error))
    raise UserError(f"{type(network).__name__} does not upscale RGB or Y images: {faults[0]}")
