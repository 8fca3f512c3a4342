"""The pictures of a comparison: trade-offs, and crops as in the paper's Figure 3."""

from __future__ import annotations

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
    """Draw a metric, such as `Set5 PSNR`, against parameters, mult-adds and time on `machine`.

    `points` are name, scale and values of each network; each scale gets a row of panels. A network
    without a value on an axis (bicubic has no parameters) becomes a dashed line. Returns the files
    in `folder`: none without two networks with parameters at one scale.
    """
    from matplotlib.figure import Figure

    paths = [folder / "tradeoffs.png", folder / "tradeoffs.svg"]
    scored = [(name, scale, y, v) for name, scale, v in points if (y := v.get(metric)) is not None]
    learned = [scale for _, scale, _, values in scored if values.get("parameters")]
    scales = sorted(scale for scale in set(learned) if learned.count(scale) > 1)
    if not scales:
        return []
    names = list(dict.fromkeys(name for name, *_ in scored))
    figure = Figure(figsize=(13, 3.9 * len(scales)), layout="constrained")
    marks: dict[str, Any] = {}
    for panels, scale in zip(figure.subplots(len(scales), 3, squeeze=False), scales, strict=True):
        for axis, (key, (title, unit)) in zip(panels, AXES.items(), strict=True):
            xs = []
            for name, _, y, values in (point for point in scored if point[1] == scale):
                index, own = names.index(name), name.startswith("MLRN")
                if x := values.get(key):
                    xs.append(x / unit)
                    marker = "*" if own else "osD^v"[index // 10 % 5]
                    style = {"color": f"C{index % 10}", "marker": marker, "ms": 13 if own else 7}
                    (mark,) = axis.plot(x / unit, y, linestyle="", **style)
                else:
                    mark = axis.axhline(y, color=f"C{index % 10}", linestyle="--", linewidth=1)
                marks.setdefault(name, mark)
            if xs and max(xs) > 8 * min(xs):
                axis.set_xscale("log")
            axis.margins(0.2)
            axis.set_xlabel(title)
            axis.set_ylabel(f"{metric} (dB), x{scale}")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.grid(alpha=0.3, which="both")
    labels = [textwrap.fill(name, 32) for name in marks]
    figure.legend(marks.values(), labels, loc="outside right center", frameon=False)
    figure.suptitle(f"Time on {machine}", fontsize=9, color="grey")
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def draw_crops(
    original: np.ndarray,
    title: str,
    crop: tuple[int, int, int, int],
    crops: list[tuple[str, str, np.ndarray]],
    path: Path,
) -> None:
    """Draw an HR image with a crop framed, and beside it that crop by each method (Figure 3).

    Images are uint8 BGR; `crop` is x, y, width and height; `crops` are the name of each method, the
    text beneath it, and its crop.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    x, y, width, height = crop
    lines = 1 if len(crops) < 4 else 2
    columns = -(-len(crops) // lines)
    tall = 2.6 if lines == 2 else 3.4  # inches of a crop with its two lines of text
    wide = (tall - 0.55) * width / height
    left = (tall * lines - 0.55) * original.shape[1] / original.shape[0]
    figure = Figure(figsize=(left + columns * (wide + 0.1), tall * lines), layout="constrained")
    grid = figure.add_gridspec(lines, columns + 1, width_ratios=[left, *[wide] * columns])
    panel = figure.add_subplot(grid[:, 0], xticks=[], yticks=[])
    panel.imshow(original[..., ::-1])
    panel.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor="red", linewidth=2))
    panel.set_xlabel(f"{title}\nPSNR / SSIM of the whole image", fontsize=11)
    for i, (name, score, image) in enumerate(crops):
        place = grid[i // columns, i % columns + 1]
        panel = figure.add_subplot(place, xticks=[], yticks=[])
        panel.imshow(image[..., ::-1], interpolation="nearest")
        panel.set_xlabel(f"{textwrap.fill(name, max(int(wide * 9), 8))}\n{score}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
