"""Checks option files against options/schema.json, which declares every option once.

Type, bounds, default and meaning stand there as JSON Schema, which editors read too. Two keywords
are our own: `model`, the model type that reads an option (without it all do), and `errorMessage`,
what a value must be.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Collection, Iterator
from functools import cache
from itertools import takewhile
from typing import Any

from mlrn_arch.shipped import options_folder

Options = dict[str, Any]
Place = tuple[str, ...]  # the keys that lead to an option; `*` is a name of the user's own

# Keys of public option files that these models do not read.
LEFTOVERS = {"cache_data", "center_frame_only", "crop_border", "flip_seq", "flip_sequence"}
LEFTOVERS |= {"interval_list", "num_frame", "param_key", "random_reverse", "save_img", "suffix"}
LEFTOVERS |= {"test_mode", "use_shuffle", "val_partition"}
TRAINING: list[Place] = [("train",), ("logger",), ("datasets", "train"), ("val", "val_freq")]


@cache
def json_schema() -> Options:
    """The JSON Schema of all option files."""
    return json.loads((options_folder() / "schema.json").read_text(encoding="utf-8"))


@cache
def declared() -> dict[Place, Options]:
    """Every option, by its place: `("train", "optim_g", "lr")`, `("datasets", "*", "gt_size")`."""
    found: dict[Place, Options] = {}
    definitions = json_schema()["definitions"]

    def walk(place: Place, option: Options) -> None:
        while "$ref" in option:
            name = option["$ref"].rpartition("/")[2]
            option = definitions[name] | {k: v for k, v in option.items() if k != "$ref"}
        found[place] = found.get(place, {}) | option
        for key, inner in option.get("properties", {}).items():
            walk((*place, key), inner)
        if isinstance(option.get("additionalProperties"), dict):
            walk((*place, "*"), option["additionalProperties"])
        if "then" in option:  # the keys of known models and datasets
            walk(place, option["then"])

    walk((), json_schema())
    return found


def defaults(*place: str) -> Options:
    """The options of a section that have a default, with it."""
    options = {keys[-1:]: option for keys, option in declared().items() if keys[:-1] == place}
    return {key: option["default"] for (key,), option in options.items() if "default" in option}


def complete(
    opt: Options, bases: Callable[[Any], Collection[str]], training: bool
) -> tuple[list[str], list[str], list[str]]:
    """Check options; fill in their defaults and take out keys without a value, in place.

    A model or dataset class that the schema does not name may read any key. `bases` gives the names
    of a model's class and of its base classes. Returns sentences: faults, which hinder any other
    check; keys that nothing reads; and such keys that are no mistake.
    """
    if odd := list(_odd_keys(opt)):
        return odd, [], []
    models = json_schema()["if"]["properties"]["model_type"]["enum"]
    model_type = opt.get("model_type")
    known, readers = model_type in models, bases(model_type) or models
    unread = _tidy(opt, readers, known)
    faults: dict[Place, str] = {}
    notes: dict[Place, str] = {}
    for place in TRAINING if training else ():
        section = _get(opt, place[:-1])
        if isinstance(section, dict) and place[-1] not in section:
            faults[place] = f"is missing ({_declaration(place)['description']})"

    # Other models read what the first known one they derive from does, and more.
    model = next((base for base in readers if base in models), "SRModel")
    view = {**opt, "model_type": model} if isinstance(model_type, str) else opt
    for error in _validator().iter_errors(view):
        place = tuple(takewhile(lambda key: isinstance(key, str), error.absolute_path))
        option, value = _declaration(place), _get(opt, place)
        if error.validator == "required":
            for key in error.validator_value:
                if key not in value:
                    about = _declaration((*place, key))["description"]
                    faults[(*place, key)] = f"is missing ({about})"
        elif error.validator != "additionalProperties":
            if option.get("model") in (None, *readers):
                wanted = option.get("errorMessage", "must be a section of `key: value` lines")
                quoted = isinstance(value, str) and "string" not in option.get("type", "string")
                faults[place] = f"{wanted}, not {'the text ' * quoted}{value!r}"
        elif known or place[:1] == ("datasets",):
            for key in value:
                if key in option["properties"] or key.startswith("x_") or value[key] is None:
                    continue
                kind = notes if key in LEFTOVERS else unread
                kind[(*place, key)] = f"nothing reads it{_hint(place, key)}"
    for place, section, option in _options(opt):
        if "default" in option and option.get("model") in (None, *readers):
            section.setdefault(place[-1], option["default"])

    def sentences(found: dict[Place, str]) -> list[str]:
        return [f"{':'.join(place)}: {text}" for place, text in found.items()]

    return sentences(faults), sentences(unread), sentences(notes)


def _tidy(opt: Options, readers: Collection[str], known: bool) -> dict[Place, str]:
    """Take out keys without a value, and those that a known model type does not read."""
    unread = {}
    for place, section, option in _options(opt):
        key, value = place[-1], section.get(place[-1])
        whole = isinstance(value, float) and value.is_integer()
        if value is None:
            section.pop(key, None)
        elif known and option.get("model") not in (None, *readers):
            section.pop(key)
            unread[place] = f"needs model_type: {option['model']}; set that, or take it out"
        elif whole and "integer" in option.get("type", ""):
            section[key] = int(value)  # BasicSR's files write !!float 5e3
    return unread


def _options(section: Any, above: Place = ()) -> Iterator[tuple[Place, Options, Options]]:
    """The place, the section and the declaration of every option that `section` has or may have."""
    classes = json_schema()["definitions"]["dataset"]["if"]["properties"]["type"]["enum"]
    is_dataset = len(above) == 2 and above[0] == "datasets"
    if not isinstance(section, dict) or (is_dataset and section.get("type") not in classes):
        return
    for keys, option in declared().items():
        if keys and _fits(keys[:-1], above):
            for key in list(section) if keys[-1] == "*" else keys[-1:]:
                yield (*above, key), section, option
                yield from _options(section.get(key), (*above, key))


@cache
def _validator() -> Any:
    from jsonschema import Draft7Validator, validators  # takes 0.2 s

    def is_number(checker: Any, value: Any) -> bool:
        finite = isinstance(value, (int, float)) and abs(value) < math.inf
        return finite and not isinstance(value, bool)

    checker = Draft7Validator.TYPE_CHECKER.redefine("number", is_number)
    return validators.extend(Draft7Validator, type_checker=checker)(json_schema())


def _odd_keys(section: Any, place: str = "") -> Iterator[str]:
    for key, value in section.items() if isinstance(section, dict) else ():
        if isinstance(key, str):
            yield from _odd_keys(value, f"{place}{key}:")
        else:
            yield f"{place}{key}: a key must be text; put it in quotes"


def _get(value: Any, place: Place) -> Any:
    for key in place:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _fits(pattern: Place, place: Place) -> bool:
    pairs = zip(pattern, place, strict=False)
    return len(pattern) == len(place) and all(part in ("*", key) for part, key in pairs)


def _declaration(place: Place) -> Options:
    return next((option for keys, option in declared().items() if _fits(keys, place)), {})


def _hint(place: Place, key: str) -> str:
    """Where a key is read: at another place, or here with another spelling."""
    near = [":".join(p).replace("*", "NAME") for p in declared() if p[-1:] == (key,)]
    if not 0 < len(near) < 4:
        near = difflib.get_close_matches(key, _declaration(place).get("properties", {}))
    return f"; did you mean {' or '.join(near)}?" if near else "; your own notes begin with x_"
