"""List the option files that come with the package, or print one.

    mlrn options train_MLRN_x4 > my.yml

`mlrn train -opt mlrn://train_MLRN_x4` uses one as it is, `-opt mlrn://ablation/NAME` one in a
folder. options/README.md describes them. The first line of a printed file names the schema with
which an editor completes and checks it.
"""

from __future__ import annotations

import argparse
import re

from mlrn_arch import shipped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mlrn options` on `parser`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one")
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of them all")


def run(args: argparse.Namespace) -> None:
    """Print the list or the file; `UserError` if there is no such file."""
    schema = shipped.options_folder() / "schema.json"
    if args.schema:
        print(schema.read_text(encoding="utf-8"), end="")
    elif args.name:
        file = shipped.option_file(shipped.PREFIX + args.name.removeprefix(shipped.PREFIX))
        text = file.read_text(encoding="utf-8")
        print(re.sub(r"(?<=\$schema=)[./]*schema\.json", schema.as_posix(), text, count=1), end="")
    else:
        for name, path in shipped.option_files().items():
            _, title, *_ = path.read_text(encoding="utf-8").splitlines()  # behind the schema's line
            print(f"{name:44} {title.removeprefix('# ')}")
