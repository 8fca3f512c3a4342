"""`mlrn VERB`: finds the verb's module, lets it parse its arguments, calls one function.

Outside of the package, whose import takes seconds: for torch and BasicSR, which `mlrn --help`, a
mistyped verb and the like do not need.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys

if "--multiprocessing-fork" in sys.orig_argv:  # a process that another one spawned
    import mlrn_arch  # noqa: F401 (before what it unpickles imports BasicSR)

VERBS = {
    "train": "train a network as an option file says",
    "test": "score a network on benchmark sets as an option file says",
    "upscale": "upscale image files with the shipped weights or any network",
    "prepare": "turn a folder of photographs into training data or a benchmark set",
    "compare": "score networks on test sets: the paper's Table 1 and Figure 3",
    "profile": "compare networks: parameters, operations, activations, memory and runtime",
    "export": "write a network as ONNX, OpenVINO, safetensors, slim weights, or NTIRE submission",
    "options": "list the option files that come with the package, or print one",
    "weights": "list the shipped checkpoints, their origin and scores",
    "demo": "prepare, train and test a small MLRN on photographs at hand, and draw the result",
}
HELP = """usage: mlrn VERB ...

MLRN and other efficient super-resolution networks through BasicSR.

{verbs}

`mlrn VERB --help` explains a verb; `mlrn --version` tells the version."""


def main() -> int:
    """Entry point of the `mlrn` command; returns its exit code."""
    verb, *rest = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help"):
        print(HELP.format(verbs="\n".join(f"  {name:10} {line}" for name, line in VERBS.items())))
        return 0
    if verb == "--version":
        print(f"mlrn {importlib.metadata.version('mlrn_arch')}")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(VERBS)}"
        print(f"mlrn: no verb {verb!r}; {hint}", file=sys.stderr)
        return 2

    from mlrn_arch import errors, plugins

    if verb in ("train", "test"):  # whose parsers are BasicSR's
        module = importlib.import_module(f"mlrn_arch.{verb}")
        return errors.run(f"mlrn {verb}", lambda: module.main(rest))
    module = importlib.import_module(f"mlrn_arch.tools.{verb}")
    parser = plugins.parser(f"mlrn {verb}", module.__doc__)
    module.add_arguments(parser)
    args = parser.parse_args(rest)

    def run() -> int | None:
        plugins.register(args.imports)
        return module.run(args)

    return errors.run(f"mlrn {verb}", run)


if __name__ == "__main__":
    sys.exit(main())
