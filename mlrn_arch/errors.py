"""The one exception for a user's mistake, and how an entry point ends on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch


class UserError(Exception):
    """A mistake of the user: its text says what is wrong, where, and what to do about it."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; the name of its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run(name: str, main: Callable[[], int | None]) -> int:
    """Run an entry point and return its exit code: 2 for a `UserError`, 130 for Ctrl-C.

    Args:
        name: What the message starts with, such as `mlrn train`.
        main: The work; what it returns is the exit code (None is 0).
    """
    try:
        return main() or 0
    except UserError as error:
        # Each of several processes finds the same fault in an option file, and one tells it. Once
        # they have joined, what goes wrong is a process's own.
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        if rank == "0" or torch.distributed.is_initialized():
            print(f"{name}{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `mlrn ... | head`; Python would complain once more on its way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
