"""The one exception for a user's mistake, its texts, and how an entry point ends on it."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A mistake of the user: its text says what is wrong, where, and what to do about it."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; the name of its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def unknown(name: object, known: Iterable[object]) -> str:
    """`unknown X; did you mean Y?`, or the whole list when nothing is near."""
    folded = {str(k).lower(): str(k) for k in known}
    wanted = str(name).lower()
    near = difflib.get_close_matches(wanted, folded) or [k for k in folded if wanted in k]
    hint = f"known are {', '.join(sorted(folded.values()))}"
    if near:
        hint = f"did you mean {' or '.join(folded[k] for k in near)}?"
    return f"unknown {name!r}; {hint}"


def run(name: str, main: Callable[[], int | None]) -> int:
    """Run an entry point, such as `mlrn train`; exit code 2 for a fault, 130 for Ctrl-C."""
    try:
        return main() or 0
    except UserError as error:
        # All processes find the same fault in an option file: only the first reports it. Once
        # they have joined, each reports its own.
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        torch = sys.modules.get("torch")
        if rank == "0" or (torch and torch.distributed.is_initialized()):
            print(f"{name}{'' if rank == '0' else f' (rank {rank})'}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `mlrn ... | head`; Python would complain once more on its way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if not error.strerror:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"{name}: {where}{error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
