"""What every network asks of its arguments."""

from __future__ import annotations


def check_sizes(**sizes: int) -> None:
    """Raise `ValueError` for the first of `sizes` that is not a positive integer."""
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{name} must be a positive integer, not {size!r}.")


def check_img_range(img_range: float) -> None:
    """Raise `ValueError` if `img_range` is not a positive number."""
    if not isinstance(img_range, (int, float)) or not img_range > 0:
        raise ValueError(f"img_range must be a positive number, not {img_range!r}.")
