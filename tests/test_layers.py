"""The rooms of the package: which imports which, read from the source. No arrow runs back up."""

import ast
from pathlib import Path

import mlrn_arch

PACKAGE = Path(mlrn_arch.__file__).parent
# Each may import those before it. A front door is nobody's room: `mlrn_arch` itself is last.
ORDER = [
    "version",
    "errors",
    "files",
    "shipped",
    "schema",
    "machine",
    "checkpoints",
    "compat",
    "archs",
    "plugins",
    "networks",
    "option_files",
    "sources",
    "inherit",
    "data",
    "models",
    "dataset_checks",
    "checks",
    "options",
    "train",
    "test",
    "inference",
    "tools",
    "__main__",
    "spandrel",
    "mlrn_arch",
]


def rooms(node: ast.AST, room: str) -> set[str]:
    """The rooms that an import statement of a room names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:  # no import, or one within the room
        return set()
    paths = [name.split(".")[1:] for name in names if name.split(".")[0] == "mlrn_arch"]
    return {path[0] if path and path[0] in ORDER else "mlrn_arch" for path in paths} - {room}


def arrows() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        path = file.relative_to(PACKAGE).with_suffix("").parts
        room = "mlrn_arch" if path[0] == "__init__" else path[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            found.setdefault(room, set()).update(rooms(node, room))
    return found


def test_no_arrow_runs_back_up():
    found = arrows()
    for room in sorted(found, key=ORDER.index):
        named = sorted(found[room], key=ORDER.index)
        print(f"{room:12} -> {', '.join(named) or '-'}")
        assert all(ORDER.index(name) < ORDER.index(room) for name in named), room


def test_weights_hold_nothing_that_runs():
    assert {file.suffix for file in (PACKAGE / "weights").glob("*.*")} == {".pth", ".json", ".md"}
