"""Other people's networks, models and losses: files and modules that register them with BasicSR."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from mlrn_arch.errors import UserError, first_line


def parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of a verb, with the option that all of them have."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "import this file, package or module first, for the networks it registers"
    parser.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="PATH_OR_MODULE", help=text
    )
    return parser


def register(sources: str | Sequence[str]) -> None:
    """Import modules, files (`*.py`) and folders (packages), which register with BasicSR."""
    for source in [sources] if isinstance(sources, str) else sources:
        if not isinstance(source, str):
            raise UserError(f"import: {source!r} is neither a file nor a module")
        name, path = source, Path(source).expanduser().resolve()
        if path.exists():  # as Python does for a script, so that it finds what lies beside it
            name = path.stem
            if str(path.parent) not in sys.path:
                sys.path.insert(0, str(path.parent))
        elif path.suffix == ".py":
            raise UserError(f"import {source}: no such file")
        try:
            imported = importlib.import_module(name).__file__
        except Exception as error:  # it may fail in any way
            raise UserError(
                f"import {source}: {type(error).__name__}: {first_line(error)}"
            ) from None
        if imported is None:
            raise UserError(f"import {source}: a folder needs an __init__.py that registers")
        if path.exists() and path not in (Path(imported), Path(imported).parent):
            raise UserError(f"import {source}: {imported} has the same name; rename one of them")
