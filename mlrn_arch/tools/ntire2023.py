"""The 32 entries of the NTIRE 2023 challenge on efficient super-resolution, and places among them.

`ntire2023.csv` is Table 3 of the paper as printed, ranks included. Times are milliseconds on the
challenge's GPU (`time_ms` is the mean of the two data sets), memory is MiB, PSNR is dB on RGB.
"""

from __future__ import annotations

import csv
import importlib.resources
from collections.abc import Mapping

Entry = dict[str, str]

# A column of values, the column of its ranks, and the decimals that the table prints.
RANKED = {
    "time_ms": ("time_rank", 2),
    "params_m": ("params_rank", 3),
    "flops_g": ("flops_rank", 2),
    "acts_m": ("acts_rank", 2),
    "memory_mib": ("memory_rank", 2),
}


def entries() -> list[Entry]:
    """The rows of Table 3 in its order, which is that of the average time."""
    path = importlib.resources.files("mlrn_arch.tools") / "ntire2023.csv"
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def places(values: Mapping[str, float]) -> dict[str, int]:
    """Place a network among the 32 entries, whose own ranks stay as printed.

    A place is one more than the number of entries that are better, at the decimals of the table;
    a tie takes the better place, where the table gave it by decimals that it does not print.

    Args:
        values: Some or all of `time_ms` [ms], `params_m` [M], `flops_g` [G], `acts_m` [M] and
            `memory_mib` [MiB].

    Returns:
        The place in every given column, named as the table's rank; with parameters and FLOPs also
        `complexity`, the sum of their two places, and with all five `overall`, the sum of all,
        each with its own place (`complexity_rank`, `overall_rank`).
    """
    table = entries()

    def place(column: str, value: float) -> int:
        return 1 + sum(float(entry[column]) < value for entry in table)

    result = {
        rank: place(column, round(values[column], decimals))
        for column, (rank, decimals) in RANKED.items()
        if column in values
    }
    sums = {
        "complexity": ["params_rank", "flops_rank"],
        "overall": [rank for rank, _ in RANKED.values()],
    }
    for column, ranks in sums.items():
        if all(rank in result for rank in ranks):
            result[column] = sum(result[rank] for rank in ranks)
            result[f"{column}_rank"] = place(column, result[column])
    return result
