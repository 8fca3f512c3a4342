"""The one exception for a user's mistake, and how an entry point ends on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake of the user: its text says what is wrong, where, and what to do about it."""


def run(name: str, main: Callable[[], int | None]) -> int:
    """Run an entry point and return its exit code: 2 for a `UserError`, 130 for Ctrl-C.

    Args:
        name: What the message starts with, such as `mlrn train`.
        main: The work; what it returns is the exit code (None is 0).
    """
    try:
        return main() or 0
    except UserError as error:
        # With several processes each of them finds the same mistake: one tells it.
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
