"""Option files: finding them, and reading YAML without running code."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from mlrn_arch import plugins
from mlrn_arch.checkpoints import FOLDER, PREFIX
from mlrn_arch.errors import UserError
from mlrn_arch.networks import Options, unknown


def option_files() -> dict[str, Path]:
    """The option files that come with the package, by name."""
    inside = FOLDER.parent / "option_files"  # of a wheel; a clone has them beside the package
    folder = inside if inside.is_dir() else FOLDER.parents[1] / "options"
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.yml"), key=lambda path: (len(path.parts), path))
    }


def option_file(path: str) -> Path:
    """The option file that is meant: `mlrn://NAME` is one that comes with the package.

    Raises:
        UserError: There is none of that name.
    """
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


def load_yaml(path: str) -> Options:
    """Read an option file, and import what its key `import` names; nothing else in it is run.

    Raises:
        UserError: No such file, not YAML, not a mapping, or it holds a Python tag.
    """
    try:
        opt = yaml.safe_load(option_file(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"there is no option file {path} here; `mlrn options` lists those that come with the "
            "package, which -opt takes as mlrn://NAME"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read the option file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not an option file: it is not text ({error.reason})") from None
    except yaml.constructor.ConstructorError as error:
        raise UserError(
            f"{path}, line {error.problem_mark.line + 1}: {error.problem}; an option file holds "
            "plain values only (a Python tag could run code), write the value itself"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", error)
        raise UserError(f"{path}{line}: not valid YAML: {problem}") from None
    if not isinstance(opt, dict):
        raise UserError(f"{path} is not an option file: it has no `key: value` lines")
    plugins.register(opt.get("import") or [])
    return opt


def is_number(text: str) -> bool:
    """Whether a text is a number that YAML 1.1 does not take for one, such as 5e-4."""
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text) is not None
