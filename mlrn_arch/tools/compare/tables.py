"""The table of a comparison, with Table 1 of the paper beside it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch

from mlrn_arch.tools.compare.scoring import ROUNDS, Row, save

# How a column is printed: its unit, the format of a number of units, what follows it.
FORMATS = {
    "parameters": (1e3, ".0f", "K"),
    "mult_adds": (1e9, ".2f", "G"),
    "time_ms": (1, ".1f", ""),
    "PSNR": (1, ".2f", ""),
    "SSIM": (1, ".4f", ""),
}
HEADS = {"parameters": "#Params", "mult_adds": "#Mult-Adds", "time_ms": "Time (ms)"}


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
    text = "".join(
        f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |\n"
        for line in lines
    )
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

    save(folder / "table.md", text)
    records: list[dict[str, Any]] = []
    for row, old in zip(rows, of_paper, strict=True):
        records.append({"method": row.label, "scale": row.opt["scale"], "argument": row.argument})
        records[-1]["checkpoint"] = row.opt["path"].get("pretrain_network_g")
        records[-1] |= {column: row.values.get(column) for column in columns}
        for column in columns if with_paper else ():
            records[-1][f"{column} (paper)"] = number(old[column]) if column in old else None
    about = {"machine": where, "torch": torch.__version__, "output": "1280x720"}
    text = json.dumps({**about, "left_out": left_out, "rows": records}, indent=1, allow_nan=False)
    save(folder / "table.json", text + "\n")
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(records[0])
        for record in records:
            writer.writerow(f"{v:.4f}" if isinstance(v, float) else v for v in record.values())
    return columns
