"""The pictures of a comparison: trade-offs, and crops as in the paper's Figure 3."""

from __future__ import annotations

import itertools
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

AXES = {
    "parameters": ("Parameters (K)", 1e3),
    "mult_adds": ("Mult-Adds at 1280x720 output (G)", 1e9),
    "time_ms": ("Time at 1280x720 output (ms)", 1),
}


def draw_tradeoffs(
    points: list[tuple[str, int, dict[str, float | None]]], metric: str, machine: str, folder: Path
) -> list[Path]:
    """Draw a metric against parameters, mult-adds and time: a row of panels for each scale.

    Args:
        points: Name, scale and values of each network; one without a value on an axis (bicubic
            has no parameters) becomes a dashed line.
        metric: The key of the vertical axis in the values, such as `Set5 PSNR`.
        machine: Where time was measured.
        folder: Where `tradeoffs.png` and `tradeoffs.svg` go.
    """
    plt = _pyplot()
    scales = sorted({scale for _, scale, _ in points})
    names = dict.fromkeys(name for name, _, _ in points)
    colors = {name: f"C{index % 10}" for index, name in enumerate(names)}
    figure, axes = plt.subplots(
        len(scales), 3, figsize=(13, 3.9 * len(scales)), squeeze=False, layout="constrained"
    )
    for line, scale in zip(axes, scales, strict=True):
        here = [(n, v) for n, s, v in points if s == scale and v.get(metric) is not None]
        for axis, (key, (title, unit)) in zip(line, AXES.items(), strict=True):
            placed = [(n, v[key] / unit, v[metric]) for n, v in here if v.get(key)]
            flat = [(n, v[metric]) for n, v in here if not v.get(key)]
            xs = [x for _, x, _ in placed]
            if xs and max(xs) > 8 * min(xs):
                axis.set_xscale("log")
            for name, x, y in placed:
                own = name.startswith("MLRN")
                axis.plot(x, y, "*" if own else "o", ms=13 if own else 7, color=colors[name])
            for _, y in flat:
                axis.axhline(y, color="grey", linestyle="--", linewidth=1)
            axis.margins(0.2)
            axis.set_xlabel(title)
            axis.set_ylabel(f"{metric} (dB), x{scale}")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.grid(alpha=0.3, which="both")
    figure.suptitle(f"Time on {machine}", fontsize=9, color="grey")
    figure.canvas.draw()  # fixes the panels, so that labels can be placed in pixels
    for line, scale in zip(axes, scales, strict=True):
        here = [(n, v) for n, s, v in points if s == scale and v.get(metric) is not None]
        for axis, (key, (_, unit)) in zip(line, AXES.items(), strict=True):
            places = [(n, v[key] / unit if v.get(key) else None, v[metric]) for n, v in here]
            _label(axis, places, colors)
    paths = [folder / "tradeoffs.png", folder / "tradeoffs.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths


def _label(axis: Any, points: list[tuple[str, float | None, float]], colors: dict) -> None:
    """Write each name at the nearest place where it covers no point and no other name."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    renderer = axis.figure.canvas.get_renderer()
    taken = []
    for _, x, y in points:
        if x is not None:
            left, bottom = axis.transData.transform((x, y))
            taken.append(Bbox.from_bounds(left - 7, bottom - 7, 14, 14))
    for name, x, y in points:
        lines = textwrap.fill(name, 32)
        anchor = (axis.get_xlim()[0], y) if x is None else (x, y)
        for distance, (right, up) in itertools.product(
            (9, 18, 30, 44, 60),
            ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)),
        ):
            if x is None and (right, up) not in ((1, 1), (1, -1)):
                continue
            text = axis.annotate(
                lines,
                anchor,
                xytext=(right * distance, up * distance * (0.5 if x is None else 1)),
                textcoords="offset points",
                fontsize=9,
                color="grey" if x is None else colors[name],
                ha=("right", "center", "left")[right + 1],
                va="center",
                arrowprops={"arrowstyle": "-", "color": "grey", "lw": 0.6, "shrinkB": 0}
                if distance > 9
                else None,
            )
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without its line
            inside = axis.bbox.x0 < box.x0 and box.x1 < axis.bbox.x1
            inside &= axis.bbox.y0 < box.y0 and box.y1 < axis.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            text = axis.annotate(lines, anchor, fontsize=9, in_layout=False)
            box = text.get_window_extent(renderer)
        taken.append(box)


def draw_crops(
    original: np.ndarray,
    title: str,
    crop: tuple[int, int, int, int],
    crops: list[tuple[str, str, np.ndarray]],
    path: Path,
) -> None:
    """Draw an image with a crop framed, and beside it that crop by each method (Figure 3).

    Args:
        original: The HR image, (h, w, 3), uint8, BGR.
        title: Stands beneath the HR image.
        crop: x, y, width and height in the HR image.
        crops: Of each method the name, what stands beneath it, and its crop.
        path: The PNG that is written.
    """
    from matplotlib.patches import Rectangle

    plt = _pyplot()
    x, y, width, height = crop
    lines = 1 if len(crops) < 4 else 2
    columns = -(-len(crops) // lines)
    tall = 2.6 if lines == 2 else 3.4  # inches of a crop with its two lines of text
    wide = (tall - 0.55) * width / height
    left = (tall * lines - 0.55) * original.shape[1] / original.shape[0]
    figure = plt.figure(figsize=(left + columns * (wide + 0.1), tall * lines), layout="constrained")
    grid = figure.add_gridspec(lines, columns + 1, width_ratios=[left, *[wide] * columns])
    axis = figure.add_subplot(grid[:, 0])
    axis.imshow(original[..., ::-1])
    axis.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor="red", linewidth=2))
    axis.set_xlabel(f"{title}\nPSNR / SSIM of the whole image", fontsize=11)
    panels = [figure.add_subplot(grid[i // columns, i % columns + 1]) for i in range(len(crops))]
    for panel, (name, score, image) in zip(panels, crops, strict=True):
        panel.imshow(image[..., ::-1], interpolation="nearest")
        name = textwrap.fill(name, max(int(wide * 9), 8))
        panel.set_xlabel(f"{name}\n{score}", fontsize=11)
    for panel in (axis, *panels):
        panel.set_xticks([])
        panel.set_yticks([])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
