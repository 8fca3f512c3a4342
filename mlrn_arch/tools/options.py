"""List the option files that come with the package, or print one.

    mlrn options train_MLRN_x4 > my.yml

`-opt mlrn://train_MLRN_x4` runs one as it stands. Those in folders are named as
ablation/train_MLRN_x2_wo_ConvMix. What each is for is in options/README.md.
"""

from __future__ import annotations

import argparse

from mlrn_arch import checkpoints, option_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mlrn options` on `parser`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one")


def run(args: argparse.Namespace) -> None:
    """Print the list or the file; `UserError` if there is no such file."""
    if args.name:
        print(
            option_files.option_file(checkpoints.PREFIX + args.name).read_text(encoding="utf-8"),
            end="",
        )
        return
    for name, path in option_files.option_files().items():
        comments = (line for line in path.read_text(encoding="utf-8").splitlines())
        print(f"{name:44} {next(line for line in comments if line[:1] == '#')[1:].strip()}")
