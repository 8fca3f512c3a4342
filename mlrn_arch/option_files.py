"""Reading option files: YAML, without running code."""

from __future__ import annotations

import re
from typing import Any

import yaml

from mlrn_arch import plugins
from mlrn_arch.errors import UserError
from mlrn_arch.networks import Options
from mlrn_arch.shipped import option_file


class _Loader(yaml.SafeLoader):
    """Reads plain values only, and numbers such as 5e-4, which are text to YAML 1.1."""


# A date is text: a training state with another type could not be loaded.
_Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("+-.0123456789"))


def parse(text: str) -> Any:
    """The value of a YAML text; raises `yaml.YAMLError`, and `ValueError` for 0b_."""
    return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)


def load_yaml(path: str) -> Options:
    """Read an option file, and import what its key `import` names; nothing else in it is run."""
    try:
        opt = parse(option_file(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"there is no option file {path} here; `mlrn options` lists those that come with the "
            "package, which -opt takes as mlrn://NAME"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read the option file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not an option file: it is not text ({error.reason})") from None
    except (yaml.YAMLError, ValueError) as error:
        mark, reason = getattr(error, "problem_mark", None), getattr(error, "problem", error)
        line = f", line {mark.line + 1}" if mark else ""
        if isinstance(error, yaml.constructor.ConstructorError):
            reason = f"{reason}; write the plain value, for a Python tag could run code"
        raise UserError(f"{path}{line}: not valid YAML: {reason}") from None
    if not isinstance(opt, dict):
        raise UserError(f"{path} is not an option file: it has no `key: value` lines")
    plugins.register(opt.get("import") or [])
    return opt
