"""Write a network in another form; the ending of OUTPUT says which.

.onnx          ONNX of any height, width and batch, checked in ONNX Runtime against PyTorch
.xml           OpenVINO's form, with a .bin beside it, checked likewise
.safetensors   the weights, with the network's arguments as JSON under `network_g` in its header
.pth           the weights alone as BasicSR loads them, `{"params": ...}`, and the arguments with
               them: what one ships
no ending      with --ntire: a folder for the NTIRE challenge on efficient super-resolution

Of a checkpoint that holds EMA weights these are taken. Input and output of .onnx and .xml are
called `input` and `output`: (n, 3, h, w) float RGB in [0, 1] -> (n, 3, h * scale, w * scale), not
clamped. With --uint8 they are 8-bit RGB as decoders give it, (n, h, w, 3) in 0 .. 255, and scaling,
clamping and rounding are inside.
"""

from __future__ import annotations

import argparse
import inspect
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mlrn_arch import checkpoints, networks, sources
from mlrn_arch.archs.mlrn_arch import MLRN
from mlrn_arch.errors import UserError
from mlrn_arch.inference import backends
from mlrn_arch.inherit import inherit
from mlrn_arch.machine import need
from mlrn_arch.version import __version__

FORMS = {  # and the packages that each needs
    ".onnx": ["onnx", "onnxscript", "onnxruntime"],
    ".xml": ["openvino", "onnx", "onnxscript"],
    ".safetensors": ["safetensors"],
    ".pth": [],
}
# Odd, low, and below what a plain export of ESA takes; then what every network takes.
SHAPES = ((1, 23, 37), (3, 31, 22), (2, 16, 49), (1, 9, 14), (1, 48, 64), (2, 64, 32))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `mlrn export` on `parser`."""
    add = parser.add_argument
    add("network", metavar="NETWORK", help="such as x4 or an option file; see below")
    add("output", type=Path, metavar="OUTPUT", help=f"a file ({', '.join(FORMS)}), or a folder")
    add("--weights", metavar="FILE", help="a checkpoint in place of the network's own")
    add("--uint8", action="store_true", help="8-bit images in and out (.onnx and .xml)")
    add("--opset", type=int, metavar="N", help="of ONNX (default: 20, the first that has GELU)")
    add("--ntire", type=int, metavar="TEAM", help="the challenge's number of your team")
    add(
        "--img-range",
        type=float,
        metavar="RANGE",
        help="the same function by an MLRN that computes in this image range: 1 after training in "
        "RLFN's 255",
    )
    add("--overwrite", action="store_true", help="replace a file OUTPUT that exists")
    parser.epilog = f"""examples:
  mlrn export x4 mlrn_x4.onnx
  mlrn export options/baselines/test_RLFN_x4.yml:rlfn_x4.pth rlfn.onnx
  mlrn export NTIRE_x4 submission --ntire 12

{sources.FORMS}"""


def run(args: argparse.Namespace) -> None:
    """Write the file or the folder, and print what it is.

    Raises:
        UserError: Arguments contradict each other, the network or its weights cannot be had, a
            package is missing, the network cannot be exported, or computes something else then.
    """
    form = args.output.suffix
    if args.ntire is None and form not in FORMS:
        raise UserError(f"{args.output} has none of the endings {', '.join(FORMS)}")
    if args.ntire is not None and (form in FORMS or not 0 < args.ntire < 100):
        raise UserError("--ntire takes a team number from 1 to 99, and OUTPUT is a folder then")
    if args.uint8 and form not in (".onnx", ".xml"):
        raise UserError("--uint8 is for .onnx and .xml, which hold the computation")
    if args.opset is not None and form != ".onnx":
        raise UserError("--opset is for .onnx")
    outputs = [args.output, args.output.with_suffix(".bin")][: 2 if form == ".xml" else 1]
    for output in outputs:
        if output.is_dir():
            raise UserError(f"{output} is a folder that exists already; give another name")
        if output.exists() and not args.overwrite:
            raise UserError(f"{output} exists; give --overwrite to replace it, or another name")
    if not args.output.absolute().parent.is_dir():
        raise UserError(f"cannot write {args.output}: no such folder {args.output.parent}")
    need(f"writing {form}", *FORMS.get(form, []))

    network, network_g = sources.load(args.network, args.weights)
    if args.img_range is not None:
        if not isinstance(network, MLRN):
            raise UserError(f"--img-range is for MLRN, not for {type(network).__name__}")
        network_g = {**network_g, "img_range": args.img_range}
        trained, (network, _) = network, networks.build(network_g)
        inherit(network.eval().requires_grad_(False), trained.state_dict(), trained.img_range)
    try:  # beside the output, to become it only when all of it is there
        with tempfile.TemporaryDirectory(
            dir=args.output.absolute().parent, prefix=".export_"
        ) as folder:
            _write(args, network, network_g, Path(folder, args.output.name))
            for made in sorted(Path(folder).iterdir()):
                os.replace(made, args.output.with_name(made.name))
    except OSError as error:
        raise UserError(f"cannot write {args.output}: {error.strerror or error}") from None
    for output in outputs:
        if output.is_file():
            print(f"wrote {output}, {output.stat().st_size / 1e6:.2f} MB")
    if args.ntire is not None:
        print(f"wrote {args.output}; {args.output / 'select_model.txt'} goes into test_demo.py")


def _write(
    args: argparse.Namespace, network: nn.Module, network_g: dict[str, Any], file: Path
) -> None:
    if args.ntire is not None:
        _ntire(network, network_g, args.ntire, file)
    elif file.suffix in (".onnx", ".xml"):
        network = backends.Uint8(network) if args.uint8 else network
        model = backends.to_onnx(network, args.opset or backends.OPSET)
        print((_onnx if file.suffix == ".onnx" else _openvino)(model, network, network_g, file))
    elif file.suffix == ".safetensors":
        from safetensors.torch import save

        header = {"format": "pt", "network_g": json.dumps(network_g)}
        state = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
        file.write_bytes(save(state, header))
    else:
        torch.save({"params": checkpoints.note(network.state_dict(), network_g)}, file)


def _onnx(model: Any, network: nn.Module, network_g: dict[str, Any], file: Path) -> str:
    import onnx

    model.producer_name, model.producer_version = "mlrn_arch", __version__
    onnx.helper.set_model_props(model, {"network_g": json.dumps(network_g)})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)
    return backends.check("ONNX Runtime", backends.run_onnx(str(file)), network, SHAPES)


def _openvino(model: Any, network: nn.Module, network_g: dict[str, Any], file: Path) -> str:
    openvino = backends.import_openvino()
    # Not convert_model, which would report its use to its maker without asking.
    converted = openvino.Core().read_model(io.BytesIO(model.SerializeToString()))
    converted.set_rt_info(json.dumps(network_g), ["network_g"])
    openvino.save_model(converted, file, compress_to_fp16=False)
    return backends.check("OpenVINO", backends.run_openvino(str(file), "f32"), network, SHAPES)


def _ntire(network: nn.Module, network_g: dict[str, Any], team: int, folder: Path) -> None:
    """Write the files in the naming of the challenge's repository, whose test_demo.py loads them.

    Source: github.com/ofsoundof/NTIRE2023_ESR.
    """
    name = type(network).__name__
    stem = f"team{team:02}_{name}"
    arguments = ", ".join(f"{k}={v!r}" for k, v in network_g.items() if k != "type")
    for subfolder in ("models", "model_zoo"):
        (folder / subfolder).mkdir(parents=True)
    (folder / f"models/{stem}.py").write_text(standalone(type(network)), encoding="utf-8")
    torch.save(network.state_dict(), folder / f"model_zoo/{stem}.pth")
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
    """The source of a network of this package as one module that imports torch alone.

    Raises:
        UserError: The network is not of this package.
    """
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
