"""`mlrn <verb>`: finds the verb's module, lets it parse its arguments, calls one function."""

from __future__ import annotations

import argparse
import importlib
import sys

from mlrn_arch import errors
from mlrn_arch.version import __version__

# Verbs with a parser of BasicSR's own form; their `main` takes the rest of the command line.
PIPELINES = {
    "train": "train a network as an option file says",
    "test": "score a network on benchmark sets as an option file says",
}
TOOLS = {
    "upscale": "upscale image files with the shipped weights or any network",
    "prepare": "turn a folder of photographs into training data or a benchmark set",
    "compare": "score networks on test sets: the paper's Table 1 and Figure 3",
    "benchmark": "time training with stock BasicSR and with an option file's own model type",
    "profile": "compare networks: parameters, operations, activations, memory and runtime",
    "export": "write a network as ONNX, OpenVINO, safetensors, slim weights, or NTIRE submission",
    "weights": "list the shipped checkpoints, their origin and scores",
    "demo": "prepare, train and test a small MLRN on photographs at hand, and draw the result",
}


def main() -> int:
    """Entry point of the `mlrn` command; returns its exit code."""
    if len(sys.argv) > 1 and sys.argv[1] in PIPELINES:
        module = importlib.import_module(f"mlrn_arch.{sys.argv[1]}")
        return errors.run(f"mlrn {sys.argv[1]}", lambda: module.main(sys.argv[2:]))

    parser = argparse.ArgumentParser(
        prog="mlrn",
        description="MLRN and other efficient super-resolution networks through BasicSR.",
        epilog="`mlrn VERB --help` explains a verb.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, line in PIPELINES.items():
        verbs.add_parser(verb, help=line)
    for verb, line in TOOLS.items():
        module = importlib.import_module(f"mlrn_arch.tools.{verb}")
        tool = verbs.add_parser(verb, help=line, description=module.__doc__)
        tool.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(tool)
        tool.set_defaults(run=module.run)
    args = parser.parse_args()
    return errors.run(f"mlrn {args.verb}", lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
