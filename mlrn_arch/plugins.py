"""Other people's networks, models and losses: files and modules that register them with BasicSR."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from mlrn_arch.errors import UserError, first_line


def parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of a verb, with the option that all of them have."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE.py|MODULE",
        help="import this first: it registers networks, models or losses with BasicSR",
    )
    return parser


def register(sources: str | Sequence[str]) -> None:
    """Import files (`*.py`) and modules that register something with BasicSR, each once.

    Raises:
        UserError: There is none of that name, or importing it fails.
    """
    for source in [sources] if isinstance(sources, str) else sources:
        if not isinstance(source, str):
            raise UserError(f"import: {source!r} is neither a file nor a module")
        name = source
        try:
            if source.endswith(".py"):
                path = Path(source).expanduser().resolve()
                name = f"mlrn_import_{path.stem}"
                if getattr(sys.modules.get(name), "__file__", None) == str(path):
                    continue
                spec = importlib.util.spec_from_file_location(name, path)
                sys.modules[name] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(sys.modules[name])
            else:
                importlib.import_module(source)
        except Exception as error:  # it may fail in any way
            if name != source:
                sys.modules.pop(name, None)
            raise UserError(
                f"import {source}: {type(error).__name__}: {first_line(error)}"
            ) from None
