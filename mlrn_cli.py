"""`mlrn VERB`: finds the verb's module, lets it parse its arguments, calls one function.

Outside the package, because importing the package imports torch and BasicSR, which takes seconds.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import sys
from difflib import get_close_matches

if "--multiprocessing-fork" in sys.orig_argv:  # a process that another one spawned
    import mlrn_arch  # noqa: F401 (before what it unpickles imports BasicSR)

VERBS = {
    "train": "train a network as an option file says",
    "test": "score a network on benchmark sets as an option file says",
    "upscale": "upscale image files with the shipped weights or any network",
    "prepare": "turn a folder of photographs into training data or a benchmark set",
    "compare": "score networks on test sets: the paper's Table 1 and Figure 3",
    "profile": "compare networks: parameters, operations, activations, memory and runtime",
    "export": "write a network as ONNX, safetensors, slim weights or NTIRE submission",
    "options": "list the option files that come with the package, or print one",
    "weights": "list the shipped checkpoints, their origin and scores",
    "demo": "prepare, train and test a small MLRN on photographs at hand, and draw the result",
}
WITHOUT_TORCH = ("options", "weights")
HELP = """usage: mlrn VERB ...

MLRN and other efficient super-resolution networks through BasicSR.

{verbs}

`mlrn VERB --help` explains a verb; `mlrn --version` prints the version."""


def main() -> int:
    """Entry point of the `mlrn` command; returns its exit code."""
    verb, *rest = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help"):
        print(HELP.format(verbs="\n".join(f"  {name:10} {line}" for name, line in VERBS.items())))
        return 0
    if verb == "--version":
        from importlib.metadata import version

        print(f"mlrn {version('mlrn_arch')}")
        return 0
    if verb not in VERBS:
        near = get_close_matches(verb, VERBS)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(VERBS)}"
        print(f"mlrn: no verb {verb!r}; {hint}", file=sys.stderr)
        return 2

    # An import that Ctrl-C interrupts may swallow it, or fail in another way.
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)
    spec = importlib.util.find_spec("mlrn_arch")
    if verb in WITHOUT_TORCH and spec and "--import" not in rest:
        # The package without running its __init__, which imports torch.
        sys.modules.setdefault("mlrn_arch", importlib.util.module_from_spec(spec))
    from mlrn_arch import errors, plugins

    own_parser = verb in ("train", "test")
    module = importlib.import_module(f"mlrn_arch.{'' if own_parser else 'tools.'}{verb}")
    signal.signal(signal.SIGINT, handler)
    if own_parser:
        return errors.run(f"mlrn {verb}", lambda: module.main(rest))
    parser = plugins.parser(f"mlrn {verb}", module.__doc__)
    module.add_arguments(parser)
    args = parser.parse_args(rest)

    def run() -> int | None:
        plugins.register(args.imports)
        return module.run(args)

    return errors.run(f"mlrn {verb}", run)


def _exit(*_: object) -> None:
    print("mlrn: interrupted", file=sys.stderr)
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
