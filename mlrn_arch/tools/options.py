"""List the option files that come with the package, or print one.

    mlrn options train_MLRN_x4 > my.yml

`-opt mlrn://train_MLRN_x4` runs one as it stands. Those in folders are named as
ablation/train_MLRN_x2_wo_ConvMix. What each is for is in options/README.md.
"""

from __future__ import annotations

import argparse

from mlrn_arch import shipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mlrn options` on `parser`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one")


def run(args: argparse.Namespace) -> None:
    """Print the list or the file; `UserError` if there is no such file."""
    if args.name:
        print(shipped.option_file(shipped.PREFIX + args.name).read_text(encoding="utf-8"), end="")
        return
    for name, path in shipped.option_files().items():
        lines = path.read_text(encoding="utf-8").splitlines()
        comments = (line[1:].strip() for line in lines if line.startswith("#"))
        title = next(text for text in comments if not text.startswith("yaml-language-server"))
        print(f"{name:44} {title}")
