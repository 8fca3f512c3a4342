"""What a comparison shows: its table beside the paper's Table 1, trade-offs, and crops."""

from __future__ import annotations

import csv
import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlrn_arch.tools.compare.scoring import ROUNDS, Row

# How a column is printed: its unit, the format of a number of units, what follows it.
FORMATS = {
    "parameters": (1e3, ".0f", "K"),
    "mult_adds": (1e9, ".2f", "G"),
    "time_ms": (1, ".1f", ""),
    "PSNR": (1, ".2f", ""),
    "SSIM": (1, ".4f", ""),
}
HEADS = {"parameters": "#Params", "mult_adds": "#Mult-Adds", "time_ms": "Time (ms)"}
Crop = tuple[str, str, np.ndarray]  # name of a method, the text beneath it, its crop


def paper() -> dict[tuple[str, int], dict[str, str]]:
    """Table 1 as the paper prints it, by method and scale; CARN's "1.592K" is written 1592K."""
    with open(Path(__file__).with_name("table1.csv"), encoding="utf-8") as lines:
        table = {(r.pop("network"), int(r.pop("scale"))): r for r in csv.DictReader(lines)}
    return {key: {k: v for k, v in row.items() if v} for key, row in table.items()}


def number(text: str) -> float:
    return float(text.rstrip("KG")) * {"K": 1e3, "G": 1e9}.get(text[-1], 1)


def text_of(column: str, value: float, sign: str = "") -> str:
    unit, form, suffix = FORMATS[column.split(" ")[-1]]
    number = round(value / unit, int(form[1])) + 0.0  # no -0
    return f"{number:{sign}{form}}{suffix}"


def _cell_text(rows: list[Row], row: Row, column: str, printed: dict[str, str]) -> str:
    """A value as Markdown, with rank and the paper's figure; values printed alike share a rank."""
    value = row.values.get(column)
    text = "-" if value is None else text_of(column, value)
    if value is not None and " " in column:
        values = [r.values.get(column) for r in rows if r.opt["scale"] == row.opt["scale"]]
        texts = {text_of(column, v) for v in values if v is not None}
        ranks = sorted(texts, key=float, reverse=True)
        if len(ranks) > 1 and text == ranks[0]:
            text = f"**{text}**"
        elif len(ranks) > 2 and text == ranks[1]:
            text = f"<u>{text}</u>"
    if column in printed:
        text += f" ({printed[column]}"
        if value is not None and column != "time_ms":  # which is another machine's
            text += f", {text_of(column, value - number(printed[column]), '+')}"
        text += ")"
    return text


def write(rows: list[Row], folder: Path, where: str, with_paper: bool) -> list[str]:
    """Print the table and write table.md, .csv and .json; returns its columns.

    Time was measured on the machine `where`; `with_paper` adds Table 1's figures.
    """
    rows = sorted(rows, key=lambda row: row.opt["scale"])  # stable: else as on the command line
    columns = list(dict.fromkeys(column for row in rows for column in row.values))
    printed = paper() if with_paper else {}
    of_paper = [printed.get((row.name, row.opt["scale"]), {}) for row in rows]
    lines = [["Method", "Scale", *(HEADS.get(column, column) for column in columns)]]
    for row, old in zip(rows, of_paper, strict=True):
        cells = [_cell_text(rows, row, column, old) for column in columns]
        lines.append([row.label, f"x{row.opt['scale']}", *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    form = "| " + " | ".join(f"{{:{width}}}" for width in widths) + " |\n"
    text = "".join(form.format(*line) for line in lines)
    notes = [
        f"Mult-Adds and time of one output of 1280x720; time on {where}, torch "
        f"{torch.__version__}, median of {ROUNDS} rounds, the networks in turns.",
        "Best **bold**, second <u>underlined</u>, per scale.",
    ]
    if with_paper:
        notes.append("In brackets: Table 1 of the paper, and the difference from it.")
    for scale in sorted({row.opt["scale"] for row in rows}):
        ways = {str(row.opt["val"].get("metrics")) for row in rows if row.opt["scale"] == scale}
        if len(ways) > 1:
            notes.append(f"Not comparable at x{scale}: the option files differ in val:metrics.")
    left_out = [note for row in rows for note in row.left_out]
    text += "\n" + "\n".join(notes + left_out) + "\n"
    print(text)

    (folder / "table.md").write_text(text, encoding="utf-8")
    records: list[dict[str, Any]] = []
    for row, old in zip(rows, of_paper, strict=True):
        records.append({"method": row.label, "scale": row.opt["scale"], "argument": row.argument})
        records[-1]["checkpoint"] = row.opt["path"].get("pretrain_network_g")
        records[-1] |= {column: row.values.get(column) for column in columns}
        for column in columns if with_paper else ():
            records[-1][f"{column} (paper)"] = number(old[column]) if column in old else None
    about = {"machine": where, "torch": torch.__version__, "output": "1280x720"}
    text = json.dumps({**about, "left_out": left_out, "rows": records}, indent=1, allow_nan=False)
    (folder / "table.json").write_text(text + "\n", encoding="utf-8")
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(records[0])
        for record in records:
            writer.writerow(f"{v:.4f}" if isinstance(v, float) else v for v in record.values())
    return columns


def draw_tradeoffs(
    points: list[tuple[str, int, dict[str, float | None]]], metric: str, machine: str, folder: Path
) -> list[Path]:
    """Draw a metric, such as `Set5 PSNR`, against parameters, mult-adds and time; return the files.

    `points` are name, scale and values of each network. A scale with two networks that have
    parameters gets a row of panels, in which networks without a value on an axis are dashed lines.
    """
    from matplotlib.figure import Figure

    paths = [folder / "tradeoffs.png", folder / "tradeoffs.svg"]
    scored = [(name, scale, y, v) for name, scale, v in points if (y := v.get(metric)) is not None]
    learned = [scale for _, scale, _, values in scored if values.get("parameters")]
    scales = sorted(scale for scale in set(learned) if learned.count(scale) > 1)
    if not scales:
        for path in paths:  # of an earlier run
            path.unlink(missing_ok=True)
        return []
    names = list(dict.fromkeys(name for name, *_ in scored))
    figure = Figure(figsize=(13, 3.9 * len(scales)), layout="constrained")
    marks: dict[str, Any] = {}
    for panels, scale in zip(figure.subplots(len(scales), 3, squeeze=False), scales, strict=True):
        for axis, (key, head) in zip(panels, HEADS.items(), strict=True):
            unit, _, suffix = FORMATS[key]
            xs = []
            for name, _, y, values in (point for point in scored if point[1] == scale):
                index = names.index(name)
                if x := values.get(key):
                    xs.append(x / unit)
                    marker = "*" if name.startswith("MLRN") else "osD^v"[index // 10 % 5]
                    (mark,) = axis.plot(x / unit, y, marker, color=f"C{index % 10}", markersize=9)
                else:
                    mark = axis.axhline(y, color=f"C{index % 10}", linestyle="--", linewidth=1)
                marks.setdefault(name, mark)
            if xs and max(xs) > 8 * min(xs):
                axis.set_xscale("log")
            axis.margins(0.2)
            axis.set(xlabel=f"{head} {suffix}", ylabel=f"{metric} (dB), x{scale}")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.grid(alpha=0.3, which="both")
    labels = (textwrap.fill(name, 32) for name in marks)
    figure.legend(marks.values(), labels, loc="outside right center", frameon=False)
    figure.suptitle(f"An output of 1280x720; time on {machine}", fontsize=9, color="grey")
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def draw_crops(
    original: np.ndarray, title: str, crop: list[int], crops: list[Crop], path: Path
) -> None:
    """Draw an HR image with a crop framed, and beside it that crop by each method (Figure 3).

    Images are uint8 BGR; `crop` is x, y, width and height.
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
