"""Back ends that run a network: OpenVINO, ONNX Runtime and PyTorch."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlrn_arch import machine
from mlrn_arch.archs.esa import ESA
from mlrn_arch.errors import UserError, first_line, unknown
from mlrn_arch.machine import DTYPES, missing, need
from mlrn_arch.networks import input_channels

# Fastest first, as measured on CPUs.
PACKAGES = {
    "openvino": ["openvino"],
    "onnxruntime": ["onnxruntime", "onnx", "onnxscript"],  # the last two export to it
    "torch": ["torch"],
}
NAMES = tuple(PACKAGES)
MIN_SIZE = 32  # smaller images run in PyTorch, where ESA has a branch for them
# Allowed difference to PyTorch in fp32, over the larger of 1 and the output's peak: 0.02 of a grey
# level. Rounding takes a quarter of it at most, measured against float64.
TOLERANCE = 0.02 / 255
OPSET = 20  # the first with Gelu, which else becomes five operators


@dataclass
class Runner:
    """A network that is ready to run: (n, c, h, w) in [0, 1] -> (n, c, h * s, w * s).

    Takes any size and batch on any device, and returns float32 on the same device, not clamped.
    `backend` is one of `NAMES`, `precision` one of `DTYPES`; fp16 may change while it runs.
    """

    backend: str
    precision: str
    run: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.run(x).to(x.device, torch.float32)


def available() -> list[str]:
    """The back ends that are installed here, the fastest on CPUs first."""
    return [name for name in NAMES if not missing(*PACKAGES[name])]


def device_of(backend: str | None, device: str | torch.device | None) -> torch.device:
    """The device of a back end: `device`, or if that is None the GPU if the back end can use it."""
    only_cpu = backend not in (None, "torch")
    found = machine.choose_device("cpu" if device is None and only_cpu else device)
    if only_cpu and found.type != "cpu":
        raise UserError(f"{backend} runs on the CPU; use the back end torch for {found}")
    return found


def load(
    network: nn.Module,
    backend: str | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
) -> Runner:
    """Prepare a copy of a network, (n, c, h, w) in [0, 1] -> (n, c, h * s, w * s), for running.

    Args:
        backend: One of `NAMES`. None means PyTorch on a GPU, and on the CPU the first of
            `available()` that can run this network. The others take seconds to prepare.
        device: As `device_of` takes it.
        precision: `fp32`, `bf16`, `fp16`, or `auto`: fp16 on an NVIDIA GPU, bf16 on a CPU that
            computes in it, else fp32. ONNX Runtime has fp32 only. A network that may overflow
            fp16, or whose output is not finite, runs in bf16 or fp32 instead, with a note.

    Raises:
        UserError: The back end is not installed, or cannot run this network so.
    """
    if backend not in (None, *NAMES):
        raise UserError(f"back end: {unknown(backend, NAMES)}")
    if precision not in ("auto", *DTYPES):
        raise UserError(f"precision: {unknown(precision, ('auto', *DTYPES))}")
    if backend is not None:
        need(f"the back end {backend}", *PACKAGES[backend])
    target = device_of(backend, device)
    network = copy.deepcopy(network).to(target, torch.float32).eval().requires_grad_(False)
    if precision == "auto" and target.type == "cuda":
        precision = "fp16"
    if precision == "fp16" and not machine.fits_fp16(network):
        precision = _instead_of_fp16("the network's image range is above 1", target)
    candidates = available() if backend is None and target.type == "cpu" else [backend or "torch"]
    for name in candidates[:-1]:
        try:
            return _prepare(name, network, target, precision)
        except UserError as error:
            print(f"note: {error}", file=sys.stderr)
    return _prepare(candidates[-1], network, target, precision)


def _prepare(name: str, network: nn.Module, device: torch.device, precision: str) -> Runner:
    if name == "torch":
        return _torch(network, device, precision)
    if name == "onnxruntime" and precision not in ("auto", "fp32"):
        raise UserError(f"onnxruntime computes in fp32; {precision} needs openvino or torch")
    try:
        if name == "openvino":
            exported = _openvino(network, precision)
        else:
            exported = run_onnx(to_onnx(network).SerializeToString())
            check("ONNX Runtime", exported, network)
    except Exception as error:  # an exporter may fail in any way
        what = f"{name} cannot run {type(network).__name__}"
        raise UserError(f"{what}: {first_line(error)}; the back end torch can") from None

    def run(x: Tensor) -> Tensor:
        image = x.to("cpu", torch.float32).contiguous()
        return (network if min(x.shape[-2:]) < MIN_SIZE else exported)(image)

    return Runner(name, exported.precision, run)


def _instead_of_fp16(reason: str, device: torch.device) -> str:
    precision = "bf16" if machine.computes_in_bf16(device.type) else "fp32"
    print(f"note: {precision} instead of fp16: {reason}", file=sys.stderr)
    return precision


def _torch(network: nn.Module, device: torch.device, precision: str) -> Runner:
    # No torch.compile: on two CPU cores it takes 20 s, and OpenVINO is faster even then.
    if precision == "auto":
        precision = "bf16" if device.type == "cpu" and machine.computes_in_bf16() else "fp32"
    network = network.to(memory_format=torch.channels_last)

    def run(x: Tensor) -> Tensor:
        # Autocast, not .to(bf16): the bilinear branch and its sum must stay in fp32.
        dtype = DTYPES[runner.precision]
        cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        with machine.exact_fp32(), cast:
            y = network(x.to(device, torch.float32, memory_format=torch.channels_last))
        if runner.precision == "fp16" and not y.isfinite().all():
            runner.precision = _instead_of_fp16("the network's output is not finite", device)
            return run(x)
        return y

    runner = Runner("torch", precision, run)
    return runner


def _openvino(network: nn.Module, precision: str) -> Runner:
    channels = input_channels(network) or 3
    with quiet(), torch.no_grad():
        import openvino

        # Traced, not exported: three times as fast. `check` finds a size that the trace fixed.
        model = openvino.convert_model(
            network,
            example_input=torch.zeros(1, channels, MIN_SIZE, 2 * MIN_SIZE),
            input=[-1, channels, -1, -1],
        )

    def compiled(hint: str | None) -> Runner:
        config = {"INFERENCE_PRECISION_HINT": hint} if hint else {}  # else OpenVINO chooses
        run = openvino.compile_model(model, "CPU", config)
        chosen = run.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        name = {"f32": "fp32", "f16": "fp16"}.get(chosen, chosen)
        return Runner("openvino", name, lambda x: torch.from_numpy(run(x.numpy())[0]))

    check("OpenVINO", compiled("f32"), network)
    return compiled({"fp32": "f32", "bf16": "bf16", "fp16": "f16"}.get(precision))


def run_onnx(model: bytes | str) -> Runner:
    """Load an ONNX model or file into ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["output"], {"input": x.numpy()})[0])

    return Runner("onnxruntime", "fp32", run)


def check(
    where: str,
    run: Callable[[Tensor], Tensor],
    network: nn.Module,
    shapes: Sequence[tuple[int, int, int]] = ((1, 3 * MIN_SIZE, MIN_SIZE),),
) -> str:
    """Compare `run`, a network exported to `where`, with the network; returns a line about it.

    `shapes` are batch, height and width of random images. Those that PyTorch refuses are left out.
    A `Uint8` may differ by 1 of 255.
    """
    generator = torch.Generator().manual_seed(0)
    exact, differences = not isinstance(network, Uint8), []
    for batch, height, width in shapes:
        x = torch.rand(batch, input_channels(network) or 3, height, width, generator=generator)
        if not exact:
            x = (x.permute(0, 2, 3, 1) * 255).round().to(torch.uint8)
        try:
            with torch.inference_mode():
                y = network(x)
        except Exception:  # some networks refuse some sizes
            continue
        try:
            differences.append((run(x).float() - y.float()).abs().max().item())
        except Exception as error:  # each runtime refuses a graph or a size in its own way
            raise UserError(f"{where} cannot run the network: {first_line(error)}") from None
        allowed = TOLERANCE * max(1, y.abs().max().item()) if exact else 1
        if not differences[-1] <= allowed:  # not `>`, which is false for NaN
            raise UserError(
                f"{where} and PyTorch differ by {differences[-1]:.2g} for {batch} image(s) of "
                f"{width}x{height}, where {allowed:.2g} is allowed"
            )
    if not differences:
        raise UserError(f"PyTorch itself runs this network at none of the sizes {shapes}")
    unit = "of an output in [0, 1]" if exact else "of 255"
    return f"{where} and PyTorch differ by at most {max(differences):.2g} {unit}"


class Uint8(nn.Module):
    """A network on 8-bit images, with scaling, clamping and rounding inside."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Map images as decoders give them, (n, h, w, c) uint8, to (n, h * s, w * s, c) uint8."""
        y = self.network(x.permute(0, 3, 1, 2).float() / 255)
        return (y.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def to_onnx(network: nn.Module, opset: int = OPSET) -> Any:
    """Export a network or a `Uint8`, on the CPU, to a ModelProto of any batch, height and width."""
    need("exporting to ONNX", "onnx", "onnxscript")
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, ESA):
            module.always_pad = True
    x = torch.zeros(2, input_channels(network) or 3, 40, 48)
    # At least 21: up to 20 ESA's pooled map is one pixel wide, which torch.export specialises on.
    height, width = (torch.export.Dim(side, min=21) for side in ("height", "width"))
    sizes = {0: torch.export.Dim("batch"), 2: height, 3: width}
    if isinstance(network, Uint8):
        x, sizes = x.permute(0, 2, 3, 1).to(torch.uint8), {0: sizes[0], 1: height, 2: width}
    try:
        with quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                network,
                (x,),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=["input"],
                output_names=["output"],
                dynamic_shapes=(sizes,),
            )
        model = program.model_proto
    except Exception as error:  # torch tells in many ways what it cannot export
        name = type(getattr(network, "network", network)).__name__
        raise UserError(f"{name} cannot be exported for any size: {first_line(error)}") from None
    found = next(part.version for part in model.opset_import if not part.domain)
    if found != opset:
        raise UserError(f"torch exports this network to opset {found}, but not to {opset}")
    # The exporter notes where each node comes from: source lines and paths of this machine.
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        part.ClearField("metadata_props")
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what tracers and exporters say, and OpenVINO's telemetry, which is off in CI."""
    disabled = logging.root.manager.disable
    before = {"CI": os.environ["CI"]} if "CI" in os.environ else {}
    logging.disable(logging.WARNING)
    os.environ["CI"] = "true"
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        os.environ.pop("CI")
        os.environ.update(before)
