"""Ways to run a network quickly: OpenVINO, ONNX Runtime and PyTorch."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

from mlrn_arch.archs.esa import ESA
from mlrn_arch.errors import UserError, first_line
from mlrn_arch.machine import DTYPES, choose_device, computes_in_bf16, missing, need
from mlrn_arch.networks import input_channels

if TYPE_CHECKING:
    import onnx

# Quickest first, as measured on CPUs.
PACKAGES = {
    "openvino": ["openvino"],
    "onnxruntime": ["onnxruntime", "onnx", "onnxscript"],  # the last two export to it
    "torch": ["torch"],
}
NAMES = tuple(PACKAGES)
# Smaller images run in PyTorch: it takes no time there, and ESA has a branch for them.
MIN_SIZE = 32
# Of a back end's output in fp32 to PyTorch's, over the larger of 1 and its peak.
TOLERANCE = 1e-5
OPSET = 20  # the first with Gelu; written out it is five operators


def available() -> list[str]:
    """The back ends that are installed here, the quickest on CPUs first."""
    return [name for name in NAMES if not missing(*PACKAGES[name])]


# OpenVINO reports imports and conversions to its maker without asking, but not where CI is set.
_UNREPORTED = mock.patch.dict(os.environ, CI="true")


def import_openvino() -> ModuleType:
    """Import OpenVINO without its telling anyone."""
    with _UNREPORTED:
        import openvino
    return openvino


def device_of(backend: str | None, device: str | torch.device | None) -> torch.device:
    """Where a back end computes: on `device`, or if that is None on the GPU if it can.

    Raises:
        UserError: There is no such device, or the back end cannot use it.
    """
    only_cpu = backend not in (None, "torch")
    device = choose_device("cpu" if device is None and only_cpu else device)
    if only_cpu and device.type != "cpu":
        raise UserError(f"{backend} runs on the CPU here; take the back end torch for {device}")
    return device


def load(
    network: nn.Module,
    backend: str | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
) -> Callable[[Tensor], Tensor]:
    """Prepare a network for running; `network` itself is left as it is.

    All but PyTorch run on the CPU here, and take seconds to prepare: a single small image is
    done sooner with `torch`.

    Args:
        network: A super-resolution network: (n, c, h, w) in [0, 1] -> (n, c, h * s, w * s).
        backend: One of `NAMES`; None takes the quickest at hand: on a GPU PyTorch, on the CPU
            the first of `available()` that can run this network.
        device: As `device_of` takes it.
        precision: `fp32`, `bf16`, `fp16`, or `auto`: fp16 on an NVIDIA GPU, on the CPU bf16 if it
            computes in it, else fp32. ONNX Runtime has fp32 alone. In place of fp16 comes bf16 or
            fp32, with a note, if the network computes in values above 1, or once its output is
            not finite.

    Returns:
        A function: (n, c, h, w) in [0, 1] on any device -> (n, c, h * s, w * s), float32 on the
        same device, not clamped; of any size and batch, under inference mode. Its attributes
        `backend` and `precision` say what runs it; fp16 may give way while it runs.

    Raises:
        UserError: No such back end, or it is not installed, or cannot run this network, on this
            device, in this precision.
    """
    if backend not in (None, *NAMES):
        raise UserError(f"no back end is named {backend!r}; there are {', '.join(NAMES)}")
    if precision not in ("auto", *DTYPES):
        raise UserError(f"no precision is named {precision!r}; there are auto, {', '.join(DTYPES)}")
    if backend is not None:
        need(f"the back end {backend}", *PACKAGES[backend])
    device = device_of(backend, device)
    lower = precision not in ("auto", "fp32")
    if backend == "onnxruntime" and lower:
        raise UserError(f"{backend} computes in fp32; {precision} needs openvino or torch")

    network = copy.deepcopy(network).to(device, torch.float32).eval().requires_grad_(False)
    if precision == "auto" and device.type == "cuda":
        precision = "fp16"
    img_range = max(getattr(module, "img_range", 1) for module in network.modules())
    if precision == "fp16" and img_range > 1:  # attention hides an overflow from the output
        precision = _instead_of_fp16(f"the network computes in a range of {img_range:g}", device)
    fallback = backend is None and device.type == "cpu"
    for name in available() if fallback else [backend or "torch"]:
        if name == "torch" or (name != "openvino" and lower):
            continue
        try:
            if name == "openvino":
                run = _openvino(network, precision)
            else:
                run = run_onnx(to_onnx(network).SerializeToString())
                check("ONNX Runtime", run, network)
        except Exception as error:  # an exporter may fail in any way
            reason = f"{name} cannot run {type(network).__name__}: {first_line(error)}"
            if not fallback:
                raise UserError(f"{reason}; take the back end torch") from None
            print(f"note: {reason}", file=sys.stderr)
            continue

        def guarded(x: Tensor, run: Callable[[Tensor], Tensor] = run) -> Tensor:
            with torch.inference_mode():
                image = x.to("cpu", torch.float32).contiguous()
                y = (network if min(x.shape[-2:]) < MIN_SIZE else run)(image)
            return y.to(x.device)

        guarded.backend = name
        guarded.precision = getattr(run, "precision", "fp32")
        return guarded
    return _torch(network, device, precision)


def _instead_of_fp16(reason: str, device: torch.device) -> str:
    precision = "bf16" if computes_in_bf16(device.type) else "fp32"
    print(f"note: {precision} in place of fp16: {reason}", file=sys.stderr)
    return precision


def _torch(network: nn.Module, device: torch.device, precision: str) -> Callable[[Tensor], Tensor]:
    # No torch.compile: on two CPU cores compiling takes 20 s, and OpenVINO is quicker after it.
    if precision == "auto":
        precision = "bf16" if device.type == "cpu" and computes_in_bf16() else "fp32"
    network = network.to(memory_format=torch.channels_last)

    def run(x: Tensor) -> Tensor:
        nonlocal precision
        # Autocast, for it leaves the bilinear branch and the sum with it in fp32: in bf16 they
        # would round the output to 8 bits.
        cast = torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")
        with torch.inference_mode(), cast:
            y = network(x.to(device, torch.float32, memory_format=torch.channels_last))
        if precision == "fp16" and not y.isfinite().all():
            precision = _instead_of_fp16("the network's output is not finite", device)
            run.precision = precision
            return run(x)
        return y.to(x.device, torch.float32)

    run.backend, run.precision = "torch", precision
    return run


def _openvino(network: nn.Module, precision: str) -> Callable[[Tensor], Tensor]:
    openvino = import_openvino()
    with quiet(), torch.no_grad(), _UNREPORTED:
        # Traced, not exported: a third of the time. `check` finds a size that the trace fixed.
        model = openvino.convert_model(
            network,
            example_input=torch.zeros(1, (input_channels(network) or 3), MIN_SIZE, 2 * MIN_SIZE),
            input=[-1, (input_channels(network) or 3), -1, -1],
        )

    check("OpenVINO", run_openvino(model, "f32"), network)
    return run_openvino(model, {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}.get(precision))


def run_openvino(model: Any, hint: str | None) -> Callable[[Tensor], Tensor]:
    """A model of OpenVINO's, or its file, as a function; without a hint it chooses precision."""
    config = {"INFERENCE_PRECISION_HINT": hint} if hint else {}
    compiled = import_openvino().compile_model(model, "CPU", config)

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(compiled(x.numpy())[0])

    chosen = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    run.precision = {"f32": "fp32", "f16": "fp16"}.get(chosen, chosen)
    return run


def run_onnx(model: bytes | str) -> Callable[[Tensor], Tensor]:
    """A model of ONNX, or its file, as a function, by ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["output"], {"input": x.numpy()})[0])


def check(
    where: str,
    run: Callable[[Tensor], Tensor],
    network: nn.Module,
    shapes: Sequence[tuple[int, int, int]] = ((1, 3 * MIN_SIZE, MIN_SIZE),),
) -> str:
    """Compare an exported network with PyTorch in fp32; returns a line that says how far it is.

    Args:
        where: What runs it, for the texts.
        run: The exported network.
        network: The original, in evaluation mode, on the CPU; a `Uint8` may differ by 1 of 255.
        shapes: Batch, height and width of random images; those that PyTorch refuses are left out.

    Raises:
        UserError: They differ, or it does not run.
    """
    generator = torch.Generator().manual_seed(0)
    exact, differences = not isinstance(network, Uint8), []
    for batch, height, width in shapes:
        x = torch.rand(batch, (input_channels(network) or 3), height, width, generator=generator)
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
            raise UserError(f"{where} does not run the network: {first_line(error)}") from None
        # Not `>`, which is false of NaN.
        if not differences[-1] <= (TOLERANCE * max(1, y.abs().max()) if exact else 1):
            raise UserError(
                f"in {where} the network gives something else than in PyTorch: a difference of "
                f"{differences[-1]:.2g} for {batch} image(s) of {width}x{height}"
            )
    if not differences:
        raise UserError(f"PyTorch itself runs this network at none of the sizes {shapes}")
    unit = "of an output in [0, 1]" if exact else "of 255"
    return f"{where} and PyTorch differ by at most {max(differences):.2g} {unit}"


class Uint8(nn.Module):
    """A network on 8-bit images, with the scaling, clamping and rounding inside.

    Args:
        network: (n, c, h, w) in [0, 1] -> (n, c, h * s, w * s).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Map images as decoders give them, (n, h, w, c) uint8, to (n, h * s, w * s, c) uint8."""
        y = self.network(x.permute(0, 3, 1, 2).float() / 255)
        return (y.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def to_onnx(network: nn.Module, opset: int = OPSET) -> onnx.ModelProto:
    """Export a network to ONNX with batch, height and width left open.

    Args:
        network: In evaluation mode, on the CPU; is left as it is. It takes (n, c, h, w), and a
            `Uint8` (n, h, w, c).
        opset: The version of ONNX's operators.

    Returns:
        The model, its input called `input` and its output `output`. MLRN and the other networks
        whose attention is ESA are right at every size.

    Raises:
        UserError: onnx or onnxscript is not installed, or the network cannot be exported.
    """
    need("exporting to ONNX", "onnx", "onnxscript")
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, ESA):
            module.always_pad = True
    x = torch.zeros(2, (input_channels(network) or 3), 40, 48)
    # At least 21: up to 20 ESA's pooled map is one pixel wide, which torch.export specialises on.
    sizes = {0: torch.export.Dim("batch")}
    sizes[2], sizes[3] = (torch.export.Dim(side, min=21) for side in ("height", "width"))
    if isinstance(network, Uint8):
        x = x.permute(0, 2, 3, 1).to(torch.uint8)
        sizes = {0: sizes[0], 1: sizes[2], 2: sizes[3]}
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
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
        raise UserError(
            f"{name} cannot be exported with height and width left open: {first_line(error)}"
        ) from None
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
    """Keep to itself what tracers and exporters say to their developers."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
