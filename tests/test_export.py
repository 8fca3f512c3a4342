"""`mlrn export`, the back ends and spandrel: what comes out computes what PyTorch computes."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.models.base_model import BaseModel
from conftest import REPOSITORY, write_yaml
from torch import nn

from mlrn_arch import checkpoints, create_model, machine
from mlrn_arch.archs.mlrn_arch import MLRN
from mlrn_arch.archs.rlfn_arch import RLFN
from mlrn_arch.errors import UserError
from mlrn_arch.inference import backends

TINY = {"num_feat": 8, "num_block": 1, "esa_feat": 4, "upscale": 2}
SIZES = [(1, 9, 14), (3, 15, 33), (2, 20, 21), (1, 47, 38), (1, 200, 16)]


def make(network: type[nn.Module] = MLRN, seed: int = 0, **arguments) -> nn.Module:
    torch.manual_seed(seed)
    return network(**{**TINY, **arguments}).eval().requires_grad_(False)


@pytest.fixture
def export(mlrn_here, monkeypatch, tmp_path):
    """Run `mlrn export ARGUMENTS` in `tmp_path`; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(mlrn_here, "export")


@pytest.fixture
def trained(tmp_path) -> nn.Module:
    """The EMA network of the checkpoint `net.pth`, which belongs to `net.yml`."""
    network = make(seed=1, img_range=255.0, act="lrelu")
    state = {"params": make(seed=2).state_dict(), "params_ema": network.state_dict()}
    torch.save(state, tmp_path / "net.pth")
    section = {"type": "MLRN", **TINY, "img_range": 255.0, "act": "lrelu"}
    path = {"pretrain_network_g": str(tmp_path / "net.pth")}
    write_yaml(tmp_path / "net.yml", {"network_g": section, "path": path})
    return network


# --- forms --------------------------------------------------------------------------------------


def test_onnx_is_right_at_every_size_and_batch(export, trained, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    code, out, err = export("net.yml", "net.onnx", "--opset", "18")
    assert code == 0, err
    assert "ONNX Runtime and PyTorch differ by at most" in out and "wrote net.onnx" in out
    session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    for batch, height, width in SIZES:
        x = torch.rand(batch, 3, height, width)
        (y,) = session.run(["output"], {"input": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), trained(x), rtol=0, atol=5e-5)
    (opset,) = pytest.importorskip("onnx").load("net.onnx").opset_import
    assert opset.version == 18
    file = (tmp_path / "net.onnx").read_bytes()
    assert str(REPOSITORY).encode() not in file and b"site-packages" not in file
    network_g = session.get_modelmeta().custom_metadata_map["network_g"]
    assert build_network(json.loads(network_g)).img_range == 255


def test_the_page_typed_in_order(export, trained, tmp_path):
    """With `net.yml` for x4, which takes too long; what it makes is right in both runtimes."""
    needed = "openvino", "onnxruntime", "onnxscript", "safetensors", "spandrel"
    if lacking := machine.missing(*needed):
        pytest.skip(f"not installed: {lacking}")
    (tmp_path / "options").symlink_to(REPOSITORY / "options")
    torch.save(RLFN(upscale=4).state_dict(), "rlfn_x4.pth")
    cv2.imwrite("photo.png", np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8))
    page = (REPOSITORY / "mlrn_arch/tools/README.md").read_text().partition("## Export")[2]
    names: dict[str, Any] = {}
    for block in re.findall(r"```(.*?)```", page, re.S):
        if block.startswith("python"):
            exec(block.removeprefix("python"), names)
        for line in re.findall(r"^mlrn export (.*)", block, re.M):
            code, _, err = export(*shlex.split(line.replace("x4 mlrn_x4", "net.yml mlrn_x4")))
            assert code == 0, err
    assert cv2.imread("large.png").shape == (60, 40, 3) and names["model"].scale == 4
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    with backends.quiet():
        import openvino
    compiled = openvino.compile_model("mlrn_x4.onnx", "CPU", hint)
    session = names["network"]
    for batch, height, width in SIZES:
        image = np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), np.uint8)
        y = trained(torch.from_numpy(image.transpose(0, 3, 1, 2) / 255).float()).double().numpy()
        exact = (y.clip(0, 1) * 255).transpose(0, 2, 3, 1)
        for given in (compiled(image)["output"], *session.run(None, {"input": image})):
            assert given.dtype == np.uint8
            # Beside a value that lies on the half both neighbours are right.
            assert np.abs(given - exact).max() <= 0.5 + 1e-3


def test_safetensors_hold_weights_and_arguments(export, trained):
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
    from safetensors.torch import load_file

    code, _, err = export("net.yml", "net.safetensors")
    assert code == 0, err
    assert os.stat("net.safetensors").st_mode == os.stat("net.yml").st_mode  # others read it
    with safetensors.safe_open("net.safetensors", "pt") as file:
        network = build_network(json.loads(file.metadata()["network_g"])).eval()
    network.load_state_dict(load_file("net.safetensors"))
    x = torch.rand(1, 3, 21, 17)
    assert torch.equal(network(x), trained(x))


def test_slim_weights_load_strictly_in_basicsr(export, trained):
    code, _, err = export("net.yml", "slim.pth")
    assert code == 0, err
    network = make(seed=3, img_range=255.0, act="lrelu")
    loader = BaseModel({"num_gpu": 0, "is_train": False, "dist": False})
    loader.load_network(network, "slim.pth", strict=True, param_key="params")
    x = torch.rand(1, 3, 21, 17)
    assert torch.equal(network(x), trained(x))
    network_g = checkpoints.deduce(torch.load("slim.pth", weights_only=True))
    assert network_g == {"type": "MLRN", **TINY, "img_range": 255.0, "act": "lrelu"}


def test_ntire_folder_needs_torch_alone(export, trained, tmp_path):
    code, out, err = export("net.yml", "submission", "--ntire", "7")
    assert code == 0, err
    x = torch.rand(1, 3, 33, 21)
    torch.save({"x": x, "y": trained(x)}, tmp_path / "case.pth")
    # As the challenge's test_demo.py does it, in an interpreter that has none of our packages.
    program = f"""
import sys, os, textwrap
for name in ("mlrn_arch", "basicsr", "torchvision", "cv2", "yaml"):
    sys.modules[name] = None
import torch
os.chdir({str(tmp_path / "submission")!r})
sys.path.insert(0, ".")
scope = {{"torch": torch, "os": os, "model_id": 7}}
exec("if False:\\n    pass\\n" + textwrap.dedent(open("select_model.txt").read()), scope)
assert (scope["name"], scope["data_range"]) == ("07_MLRN", 1.0)
case = torch.load("../case.pth")
with torch.no_grad():
    assert torch.equal(scope["model"].eval()(case["x"]), case["y"])
assert not [name for name in sys.modules if name.startswith(("mlrn_arch.", "basicsr."))]
"""
    done = subprocess.run(
        [sys.executable, "-IB", "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    made = sorted(str(p.relative_to(tmp_path / "submission")) for p in tmp_path.rglob("*team*"))
    assert made == ["model_zoo/team07_MLRN.pth", "models/team07_MLRN.py"]


def test_an_export_that_computes_something_else_is_refused(export, trained, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    nearest = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 18]>
        nearest (float[n, 3, h, w] input) => (float[n, 3, p, q] output)
        <float[4] scales = {1, 1, 2, 2}>
        { output = Resize <mode = "nearest"> (input, , scales) }"""
    )
    monkeypatch.setattr(backends, "to_onnx", lambda *_: nearest)
    before = sorted(tmp_path.iterdir())
    code, _, err = export("net.yml", "net.onnx")
    assert code == 2
    assert re.search(r"ONNX Runtime and PyTorch differ by [\d.]+ for 1 image.s. of 37x23", err)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("factor", [1 + 1e-3, float("nan")])
def test_another_output_is_refused_and_nan_too(factor):
    network = make()
    with pytest.raises(UserError, match="Elsewhere and PyTorch differ by"):
        backends.check("Elsewhere", lambda x: network(x) * factor, network)


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x5", "out.pth"], "'x5'; there are the networks MLRN_x2"),
        (["nowhere.yml", "out.pth"], "there is no option file nowhere.yml here"),
        (["net.yml", "out.pt"], "out.pt has none of the endings .onnx, .safetensors"),
        (["net.yml", "net.pth"], "net.pth exists; choose another name, or --overwrite a file"),
        (
            ["net.yml", "sub", "--ntire", "7", "--overwrite"],
            "sub exists; choose another name, or --overwrite a file",
        ),
        (["net.yml", "nowhere/out.pth"], "no such folder nowhere"),
        (["net.yml", "out.pth", "--uint8"], "--uint8 and --opset are for .onnx"),
        (["net.yml", "out.pth", "--opset", "18"], "--uint8 and --opset are for .onnx"),
        (["net.yml", "out.pth", "--img-range", "-1"], "--img-range must be above 0, not -1"),
        (["net.yml", "out.pth", "--img-range", "inf"], "--img-range must be above 0, not inf"),
        (["net.yml", "out.onnx", "--ntire", "7"], "OUTPUT is a folder"),
        (["net.yml", "out", "--ntire", "0"], "team number from 1 to 99"),
        (["net.yml", "out.pth", "--weights", "no.pth"], "no such file no.pth"),
        (["net.yml", "out.pth", "--weights", "net.yml"], "net.yml is no whole PyTorch checkpoint"),
        (["x4", "out.pth", "--weights", "net.pth"], "net.pth is of an x2 network, not x4"),
        (["bad.yml", "out.pth"], "unknown 'MLRM'; did you mean MLRN?"),
        (["bare.yml", "out.pth"], "names no checkpoint; write bare.yml:CHECKPOINT"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(export, trained, tmp_path, arguments, message):
    (tmp_path / "sub").mkdir()
    write_yaml(tmp_path / "bad.yml", {"network_g": {"type": "MLRM"}, "path": {"pretrain_network_g": "net.pth"}})  # fmt: skip # noqa: E501
    write_yaml(tmp_path / "bare.yml", {"network_g": {"type": "MLRN"}})
    before = sorted(tmp_path.iterdir())
    code, out, err = export(*arguments)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["net_slim.pth", "net.safetensors", "folder"])
def test_a_full_disk_leaves_nothing(export, trained, tmp_path, name):
    resource = pytest.importorskip("resource")
    before, there = resource.getrlimit(resource.RLIMIT_FSIZE), sorted(tmp_path.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        code, _, err = export("net.yml", name, *["--ntire", "7"] * (name == "folder"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and err.endswith(f"mlrn export: cannot write {name}: File too large\n")
    assert sorted(tmp_path.iterdir()) == there


def test_a_missing_package_is_named_with_its_command(export, trained, monkeypatch):
    present = machine.importlib.util.find_spec
    monkeypatch.setattr(
        machine.importlib.util, "find_spec", lambda name: name != "onnxscript" and present(name)
    )
    code, _, err = export("net.yml", "out.onnx")
    assert code == 2
    assert "needs onnxscript, not installed in this Python; pip install onnxscript" in err
    assert "onnxruntime" not in backends.available()


# --- back ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["openvino", "torch"])  # test_upscale.py: ONNX Runtime
def test_a_back_end_gives_what_pytorch_gives(backend):
    if backend not in backends.available():
        pytest.skip(f"{backend} is not installed")
    network = make(RLFN, img_range=255)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    run = backends.load(network, backend, device="cpu", precision="fp32")
    for batch, height, width in SIZES + [(1, 64, 33)]:
        x = torch.rand(batch, 3, height, width)
        y = run(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, network(x), rtol=0, atol=1e-5)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


class _ByValue(nn.Module):
    """Decides by the pixels, which no exported graph can follow."""

    def forward(self, x):
        return x * 2 if x.mean() > 0.1 else x


def test_what_cannot_be_exported_runs_in_pytorch(capsys):
    run = backends.load(_ByValue(), device="cpu")
    dark, light = torch.full((1, 3, 40, 40), 0.05), torch.full((1, 3, 40, 40), 0.5)
    assert torch.equal(run(dark), dark) and torch.equal(run(light), 2 * light)
    others = [name for name in backends.available() if name != "torch"]
    assert capsys.readouterr().err.count("cannot run _ByValue") == len(others)
    if others:
        with pytest.raises(UserError, match=f"{others[0]} cannot run _ByValue.* torch can"):
            backends.load(_ByValue(), others[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "tensorrt"}, "back end: unknown 'tensorrt'; known are onnxruntime"),
        ({"precision": "int8"}, "precision: unknown 'int8'; known are auto"),
        ({"backend": "onnxruntime", "precision": "bf16"}, "onnxruntime computes in fp32"),
    ],
)
def test_no_such_back_end(arguments, message):
    with pytest.raises(UserError, match=message):
        backends.load(make(), **arguments)


def test_fp16_is_left_where_it_overflows(monkeypatch, capsys):
    """On binary noise the NTIRE weights come near the end of fp16's range, and so lose digits."""
    monkeypatch.setattr(machine, "computes_in_bf16", lambda *_: False)
    network = create_model("NTIRE_x4", pretrained=True)
    x = torch.randint(0, 2, (1, 3, 48, 48), generator=torch.Generator().manual_seed(0)).float()
    run = backends.load(network, "torch", "cpu", "fp16")
    with torch.inference_mode():
        exact = network(x)
        with torch.autocast("cpu", torch.float16):
            assert (network(x) - exact).abs().max() > 0.01  # which would not pass below
    torch.testing.assert_close(run(x), exact, rtol=0, atol=0.01)
    note = "note: fp32 instead of fp16: the network's image range is above 1\n"
    assert capsys.readouterr().err == note

    loud = nn.Conv2d(3, 3, 1).eval().requires_grad_(False)
    loud.weight *= 1e6
    run = backends.load(loud, "torch", "cpu", "fp16")
    for _ in range(2):
        torch.testing.assert_close(run(x), loud(x))
    note = "note: fp32 instead of fp16: the network's output is not finite\n"
    assert capsys.readouterr().err == note
    quiet = backends.load(make(), "torch", "cpu", "fp16")
    assert quiet(x).isfinite().all() and not torch.equal(quiet(x), make()(x))
    assert capsys.readouterr().err == ""


class _Tf32(nn.Module):
    """Notes what cuDNN may do to fp32 convolutions while it runs."""

    allowed: list[bool]

    def forward(self, x):
        self.allowed.append(torch.backends.cudnn.allow_tf32)  # which exporters read too
        return x


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_tf32_where_fp32_is_promised(precision):
    """TF32 is cuDNN's default: for fp32, and for the layers that autocast leaves in fp32."""
    _Tf32.allowed = []
    before = torch.backends.cudnn.allow_tf32
    backends.load(_Tf32(), "torch", "cpu", precision)(torch.rand(1, 3, 40, 40))
    assert _Tf32.allowed == [False] and torch.backends.cudnn.allow_tf32 == before


def test_devices_that_are_not_here():
    for device in ("cuda", "mps"):
        if not (torch.cuda.is_available() if device == "cuda" else torch.mps.is_available()):
            with pytest.raises(UserError, match=f"{device}: torch finds no GPU here; use cpu"):
                backends.load(make(), device=device)


# --- spandrel -----------------------------------------------------------------------------------

FORMS = [
    {},
    {"upscale": 3, "num_feat": 12, "num_block": 3, "esa_feat": 5},
    {"upscale": 1},
    {"mixer": "pointwise"},
    {"mixer": "none"},
    {"num_in_ch": 1, "num_out_ch": 1, "upscale": 4},
    {"num_in_ch": 1, "num_out_ch": 3, "bilinear": False},
    {"num_feat": 50, "num_block": 4, "img_range": 255},
]
# Two networks of one shape each: only a checkpoint that `mlrn export` wrote tells them apart.
NOTED = [{"act": "lrelu"}, {"bilinear": False}, {"img_range": 100.0}]


@pytest.mark.parametrize("form", FORMS + NOTED, ids=str)
def test_spandrel_knows_every_form(form, tmp_path):
    spandrel = pytest.importorskip("spandrel", reason="spandrel is not installed")
    from mlrn_arch.spandrel import install

    install()
    network = make(**form)
    state = network.state_dict()
    if form in NOTED:
        state = checkpoints.note(state, {"type": "MLRN", **TINY, **form})
    torch.save({"params": state}, tmp_path / "net.pth")
    found = spandrel.ModelLoader().load_from_file(tmp_path / "net.pth")
    assert found.architecture.id == "MLRN"
    assert (found.scale, found.input_channels) == (network.upscale, form.get("num_in_ch", 3))
    assert found.output_channels == form.get("num_out_ch", 3)
    assert found.size_requirements.minimum == 15
    assert found.supports_half == (network.img_range == 1)
    x = torch.rand(1, found.input_channels, 23, 18)
    assert torch.equal(found(x), network(x).clamp(0, 1))
    assert found(x[..., :7, :9]).shape[-2:] == (7 * network.upscale, 9 * network.upscale)


def test_deduce_takes_only_what_is_of_mlrn():
    with pytest.raises(ValueError, match="it is no MLRN"):
        checkpoints.deduce({"params": make(RLFN).state_dict()})
