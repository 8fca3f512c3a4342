"""Write a network in another form; the ending of OUTPUT says which.

.onnx          ONNX of any height, width and batch, compared with PyTorch in ONNX Runtime
.safetensors   the weights, with the network's arguments as JSON under `network_g` in its header
.pth           the weights as BasicSR loads them, `{"params": ...}`, and the network's arguments
no ending      with --ntire: a folder for the NTIRE challenge on efficient super-resolution

EMA weights are written if the checkpoint has them. The ONNX model maps `input`, (n, 3, h, w) float
RGB in [0, 1], to `output`, (n, 3, h * scale, w * scale), not clamped. With --uint8 both are 8-bit
RGB, (n, h, w, 3), and the model scales, clamps and rounds.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from torch import nn

from mlrn_arch import checkpoints, sources
from mlrn_arch.archs.mlrn_arch import MLRN
from mlrn_arch.errors import UserError
from mlrn_arch.files import atomic_write
from mlrn_arch.inference import backends
from mlrn_arch.inherit import inherit
from mlrn_arch.machine import need
from mlrn_arch.version import __version__

# And the packages that each needs.
FORMS = {".onnx": backends.PACKAGES["onnxruntime"], ".safetensors": ["safetensors"], ".pth": []}
# Odd, below ESA's 15 pixels, long and narrow, and sizes that every network takes.
SHAPES = ((1, 23, 37), (3, 31, 22), (2, 16, 49), (1, 9, 14), (1, 300, 20), (1, 48, 64), (2, 64, 32))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mlrn export` on `parser`."""
    add = parser.add_argument
    add("network", metavar="NETWORK", help="such as x4 or an option file; see below")
    add("output", type=Path, metavar="OUTPUT", help=f"a file ({', '.join(FORMS)}), or a folder")
    add("--weights", metavar="FILE", help="a checkpoint in place of the network's own")
    add("--uint8", action="store_true", help="8-bit images in and out (.onnx)")
    add("--opset", type=int, metavar="N", help="of ONNX (default: 20, the first that has GELU)")
    add("--ntire", type=int, metavar="TEAM", help="the challenge's number of your team")
    add("--img-range", type=float, metavar="RANGE", help="convert an MLRN to this image range")
    add("--overwrite", action="store_true", help="replace a file OUTPUT that exists")
    parser.epilog = f"""examples:
  mlrn export x4 mlrn_x4.onnx
  mlrn export options/baselines/test_RLFN_x4.yml:rlfn_x4.pth rlfn.onnx
  mlrn export NTIRE_x4 submission --ntire 12

{sources.FORMS}"""


def run(args: argparse.Namespace) -> None:
    """Write the file or the folder, and print what it is."""
    output, form = args.output, args.output.suffix
    if args.ntire is None and form not in FORMS:
        raise UserError(f"{output} has none of the endings {', '.join(FORMS)}")
    if args.ntire is not None and (form in FORMS or not 0 < args.ntire < 100):
        raise UserError("--ntire takes a team number from 1 to 99, and OUTPUT is a folder then")
    if (args.uint8 or args.opset is not None) and form != ".onnx":
        raise UserError("--uint8 and --opset are for .onnx")
    if args.img_range is not None and not 0 < args.img_range < math.inf:
        raise UserError(f"--img-range must be above 0, not {args.img_range:g}")
    if output.is_dir() or output.exists() and not args.overwrite:
        raise UserError(f"{output} exists; choose another name, or --overwrite a file")
    if not output.absolute().parent.is_dir():
        raise UserError(f"cannot write {output}: no such folder {output.parent}")
    need(f"writing {form}", *FORMS.get(form, []))

    network, network_g = sources.load(args.network, args.weights)
    if args.img_range is not None:
        if not isinstance(network, MLRN):
            raise UserError(f"--img-range is for MLRN, not for {type(network).__name__}")
        trained, network_g = network, {**network_g, "img_range": args.img_range}
        network = MLRN(**{key: value for key, value in network_g.items() if key != "type"})
        inherit(network.eval().requires_grad_(False), trained.state_dict(), trained.img_range)
    try:
        with atomic_write(output) as part:
            if args.ntire is not None:
                _write_ntire(network, network_g, args.ntire, part)
            elif form == ".onnx":
                network = backends.Uint8(network) if args.uint8 else network
                print(_write_onnx(network, network_g, args.opset or backends.OPSET, part))
            elif form == ".safetensors":
                from safetensors.torch import save

                state = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
                part.write_bytes(save(state, {"format": "pt", "network_g": json.dumps(network_g)}))
            else:
                state = checkpoints.note(network.state_dict(), network_g)
                checkpoints.save({"params": state}, part)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from None
    if args.ntire is None:
        print(f"wrote {output}, {output.stat().st_size / 1e6:.2f} MB")
    else:
        print(f"wrote {output}; {output / 'select_model.txt'} goes into test_demo.py")


def _write_onnx(network: nn.Module, network_g: dict[str, Any], opset: int, file: Path) -> str:
    import onnx

    model = backends.to_onnx(network, opset)
    model.producer_name, model.producer_version = "mlrn_arch", __version__
    onnx.helper.set_model_props(model, {"network_g": json.dumps(network_g)})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)
    return backends.check("ONNX Runtime", backends.run_onnx(str(file)), network, SHAPES)


def _write_ntire(network: nn.Module, network_g: dict[str, Any], team: int, folder: Path) -> None:
    """Write the files that test_demo.py of github.com/ofsoundof/NTIRE2023_ESR loads."""
    name = type(network).__name__
    stem = f"team{team:02}_{name}"
    arguments = ", ".join(f"{k}={v!r}" for k, v in network_g.items() if k != "type")
    for subfolder in ("models", "model_zoo"):
        (folder / subfolder).mkdir(parents=True)
    (folder / f"models/{stem}.py").write_text(standalone(type(network)), encoding="utf-8")
    checkpoints.save(network.state_dict(), folder / f"model_zoo/{stem}.pth")
    (folder / "select_model.txt").write_text(
        f"""\
    elif model_id == {team}:
        # Takes and gives [0, 1] whatever range it computes in.
        from models.{stem} import {name}
        name, data_range = f"{{model_id:02}}_{name}", 1.0
        model = {name}({arguments})
        model.load_state_dict(torch.load("model_zoo/{stem}.pth"), strict=True)
"""
    )


def standalone(network_class: type[nn.Module]) -> str:
    """The source of a network of this package as one module that imports torch only."""
    if not network_class.__module__.startswith("mlrn_arch.archs."):
        raise UserError(f"{network_class.__name__} is not a network of mlrn_arch")
    sources: dict[str, str] = {}  # by module, each behind those that it imports

    def add(module: str) -> None:
        source = inspect.getsource(sys.modules[f"mlrn_arch.archs.{module}"])
        for imported in re.findall(r"^from \.(\w+) import", source, re.M):
            add(imported)
        ours = r"^from (\.|basicsr|__future__).*? import (\([^)]*\)|.*)\n|^@ARCH_REGISTRY.*\n"
        sources.setdefault(module, re.sub(ours, "", source, flags=re.M))

    add(network_class.__module__.rpartition(".")[2])
    head = f"# {network_class.__name__} in one file, by mlrn_arch {__version__}.\n"
    return "\n\n".join([f"{head}from __future__ import annotations", *sources.values()])
