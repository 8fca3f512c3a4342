"""The checkpoints (EMA weights) and option files of the package, by name. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlrn_arch.errors import UserError, unknown

FOLDER = Path(__file__).parent / "weights"
PREFIX = "mlrn://"  # may stand before a shipped network's name, and must in an option file


def names() -> list[str]:
    """The shipped networks: `MLRN_x2`, ..., the challenge's last."""
    return sorted((file.stem for file in FOLDER.glob("*.json")), key=lambda n: ("NTIRE" in n, n))


def info(name: str) -> dict[str, Any]:
    """What is known of a shipped network; `ValueError` if `name` is none of `names()`.

    The keys: `name`; `network_g`, its section of an option file; `file`, the checkpoint; `recipe`,
    the stages of its training, `settings`, what they share, and `iterations`, of all of them;
    `inherited`, whose weights it began with, if any; `data`; `licence`; `scores`, `{set: {PSNR
    [dB], SSIM}}` on Y by `mlrn test`; `paper`, the same as the paper prints it. `mlrn://` and
    `MLRN_` may be left out of the name.
    """
    name = name.removeprefix(PREFIX)
    full = f"MLRN_{name.removeprefix('MLRN_')}"
    if full not in names():
        raise ValueError(f"no network is named {name!r}; there are {', '.join(names())}")
    known = json.loads((FOLDER / f"{full}.json").read_text(encoding="utf-8"))
    return {"name": full, **known, "file": str(FOLDER / f"{full}.pth")}


def options_folder() -> Path:
    """The folder of the option files that come with the package."""
    inside = FOLDER.parent / "option_files"  # of a wheel; a clone has them beside the package
    return inside if inside.is_dir() else FOLDER.parents[1] / "options"


def option_files() -> dict[str, Path]:
    """The option files that come with the package, by name."""
    folder = options_folder()
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.yml"), key=lambda path: (len(path.parts), path))
    }


def option_file(path: str) -> Path:
    """The option file that is meant: `mlrn://NAME` is one that comes with the package."""
    if not path.startswith(PREFIX):
        return Path(path)
    name, known = path.removeprefix(PREFIX).removesuffix(".yml"), option_files()
    if name not in known:
        raise UserError(
            f"no option file of that name comes with the package: {unknown(name, known)}"
        )
    return known[name]


def usual_file(name: str) -> str:
    """The option file of that name in options/ of the current directory, or the package's."""
    file = f"options/{name}.yml"
    return file if Path(file).is_file() else PREFIX + name
