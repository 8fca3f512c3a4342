"""`mlrn profile`: the paper's figures, counts by hand, Table 3's own ranks, mistakes."""

from __future__ import annotations

import functools
import json
import math
import re
import shlex

import pytest
import torch
import torchvision
from conftest import REPOSITORY, write_yaml
from torch import nn
from torch.nn import functional as F

from mlrn_arch import machine
from mlrn_arch.archs.mlrn_arch import MLRN
from mlrn_arch.archs.rlfn_arch import RLFN
from mlrn_arch.errors import UserError
from mlrn_arch.inference import backends
from mlrn_arch.inference.counting import count

NTIRE_YML = str(REPOSITORY / "options/ntire/test_MLRN_NTIRE_x4.yml")


@pytest.fixture
def profile(mlrn_here):
    """Run `mlrn profile ARGUMENTS`; returns exit code, stdout and stderr."""
    return functools.partial(mlrn_here, "profile")


# --- the paper's figures ------------------------------------------------------------------------


def test_ntire_variant(profile, tmp_path):
    """0.275 M, 16.85 G, 97.87 M and 43 convolutions are Table 3's."""
    to_file = ["--no-runtime", "--json", str(tmp_path / "out.json")]
    code, out, _ = profile(NTIRE_YML, "--input-size", "256x256", *to_file)
    assert code == 0
    assert out.splitlines()[1].split()[:-1] == [
        NTIRE_YML, "x4", "256x256", "0.275", "16.85", "16.85", "97.87", "43"
    ]  # fmt: skip
    (written,) = json.loads((tmp_path / "out.json").read_text())["networks"]
    exact = {"parameters": 274_710, "mult_adds": 16_854_452_224, "activations": 97_870_976}
    assert exact.items() <= written.items()


def test_rlfn_by_the_counter_of_the_challenge():
    """19.70 G is RLFN's own report in 2022: with the outputs of its LeakyReLUs."""
    counts = count(RLFN(num_feat=46, mid_feat=48, num_block=4), (1, 3, 256, 256), 4)
    leaky_relu_outputs = 4 * (48 + 48 + 46) * 256 * 256
    assert counts["flops"] - counts["mult_adds"] == leaky_relu_outputs
    assert round(counts["flops"] / 1e9, 2) == 19.70
    assert (counts["activations"], counts["convolutions"]) == (80_045_184, 39)


def test_mult_adds_at_1280x720(profile):
    networks = [f"MLRN:upscale={upscale}" for upscale in (2, 3, 4)]
    code, out, _ = profile(*networks, "--no-runtime")
    rows = [line.split() for line in out.splitlines()[1:]]
    assert code == 0
    assert [row[2] for row in rows] == ["640x360", "427x240", "320x180"]
    assert [row[4] for row in rows] == ["106.30", "48.08", "27.65"]


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        ("EDSR:num_in_ch=3,num_out_ch=3", 1_517_571),
        ("MSRResNet", 1_517_571),
        ("SRVGGNetCompact", 621_424),
        ("RRDBNet:num_in_ch=3,num_out_ch=3,num_block=1", None),
        ("SwinIR:window_size=8,depths=[2,2],num_heads=[6,6],upsampler=pixelshuffledirect", None),
        ("ECBSR:num_in_ch=3,num_out_ch=3,num_block=4,num_channel=16,with_idt=false,act_type=relu",
         None),
    ],
)  # fmt: skip
def test_networks_of_basicsr(profile, tmp_path, network, parameters):
    arguments = ["--input-size", "16x24", "--no-runtime", "--json", str(tmp_path / "out.json")]
    code, _, err = profile(network, *arguments)
    assert code == 0, err
    (row,) = json.loads((tmp_path / "out.json").read_text())["networks"]
    assert row["parameters"] == (parameters or row["parameters"])
    assert row["mult_adds"] > row["parameters"]


def test_the_examples_of_the_help(profile, mlrn_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"^  mlrn (profile .*)$", profile("-h")[1], re.M)
    assert len(examples) == 2
    for example in [*examples, "profile mlrn://ntire/test_MLRN_NTIRE_x4"]:
        words = [*shlex.split(example), "--no-runtime"]
        code, _, err = mlrn_here(*words)
        assert (code, err) == (0, "")


# --- by hand ------------------------------------------------------------------------------------


class Deformable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6, 2, 3, 3))

    def forward(self, x):
        offset = torch.zeros(1, 18, *x.shape[2:], device=x.device)
        return torchvision.ops.deform_conv2d(x, offset, self.weight, padding=1)


class Functional(nn.Module):
    def forward(self, x):
        return F.conv2d(x, torch.ones(4, 4, 1, 1, device=x.device))


class LooksAtValues(nn.Module):
    def forward(self, x):
        return Functional()(x) if x.sum().item() == 0 else x


@pytest.mark.parametrize(
    ("network", "channels", "upscale", "mult_adds", "activations", "convolutions"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), 4, 1, 6 * 9 * 4 * 96, 6 * 96, 1),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), 4, 1, 6 * 9 * 2 * 96, 6 * 96, 1),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), 4, 1, 4 * 9 * 96, 4 * 96, 1),
        (nn.Conv2d(4, 6, 3, padding=1, stride=2), 4, 0.5, 6 * 9 * 4 * 24, 6 * 24, 1),
        (nn.Conv2d(4, 6, 3, padding=2, dilation=2), 4, 1, 6 * 9 * 4 * 96, 6 * 96, 1),
        # Every input pixel meets the whole kernel once.
        (nn.ConvTranspose2d(4, 6, 4, 2, 1), 4, 2, 4 * 16 * 6 * 96, 6 * 4 * 96, 1),
        (nn.ConvTranspose2d(4, 6, 4, 2, 1, groups=2), 4, 2, 4 * 16 * 3 * 96, 6 * 4 * 96, 1),
        (nn.Linear(12, 12), 4, 1, 4 * 8 * 12 * 12, 0, 0),
        (Deformable(), 2, 1, 6 * 9 * 2 * 96, 6 * 96, 1),
        (Functional(), 4, 1, 16 * 96, 4 * 96, 1),
        (LooksAtValues(), 4, 1, 16 * 96, 4 * 96, 1),
        (nn.Sequential(nn.GELU(), nn.AvgPool2d(2), nn.Upsample(scale_factor=2)), 4, 1, 0, 0, 0),
    ],
)
def test_counts_by_hand(network, channels, upscale, mult_adds, activations, convolutions):
    counts = count(network.eval(), (1, channels, 8, 12), upscale)
    assert counts["mult_adds"] == counts["flops"] == mult_adds
    assert (counts["activations"], counts["convolutions"]) == (activations, convolutions)


def test_what_the_challenge_adds_to_mult_adds():
    relus = [nn.ReLU(), nn.LeakyReLU(0.1, inplace=True), nn.PReLU(), nn.ELU(), nn.ReLU6()]
    norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)]
    network = nn.Sequential(*relus, *norms, nn.GELU(), nn.SiLU()).eval()
    counts = count(network, (1, 4, 8, 12), 1)
    assert (counts["mult_adds"], counts["flops"]) == (0, (5 + 2 + 1) * 4 * 96)


def test_peak_bytes_by_hand():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 1, 1)
    )
    pixels, weights = 8 * 12, (3 * 8 + 8) + (8 * 16 + 16) + (16 + 1)
    # The input, which the caller holds, beside input and output of the widest convolution.
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        counts = count(network, (1, 3, 8, 12), 1, dtype)
        assert counts["peak_bytes"] == size * (weights + (3 + 8 + 16) * pixels)
    assert network[0].weight.dtype == torch.float32


def test_counting_leaves_the_network_as_it_was():
    network = MLRN(num_feat=8, num_block=1, esa_feat=4).eval()
    first = count(network, (1, 3, 24, 24), 4)
    assert first == count(network, (1, 3, 24, 24), 4)
    assert not any(module._forward_hooks for module in network.modules())
    assert network(torch.rand(1, 3, 24, 24)).shape == (1, 3, 96, 96)


def test_an_output_of_another_size_is_refused():
    with pytest.raises(UserError, match="returns 12x8 where x4 of 12x8 would be 48x32"):
        count(nn.Identity(), (1, 3, 8, 12), 4)


# --- runtime ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_runtime_has_a_figure_for_every_network(profile, tmp_path, precision):
    tiny = ["MLRN:num_feat=8,num_block=1,esa_feat=4", "RLFN:num_feat=8,num_block=1,esa_feat=4"]
    tiny.append(tiny[0])  # named twice
    arguments = ["--input-size", "24x16", "--rounds", "2", "--device", "cpu"]
    to_file = ["--precision", precision, "--json", str(tmp_path / "out.json")]
    code, out, err = profile(*tiny, *arguments, *to_file)
    assert code == 0, err
    assert [line.split()[:3] for line in out.splitlines()[-3:]] == [
        [network, "eager", precision] for network in tiny
    ]
    rows = json.loads((tmp_path / "out.json").read_text())["networks"]
    assert rows[0]["eager_ratio"] == 1
    for row in rows:
        assert 0 < row["eager_ms_min"] <= row["eager_ms"] <= row["eager_ms_max"] < math.inf


def test_back_ends_are_timed_beside_eager(profile, tmp_path):
    tiny = ["MLRN:num_feat=8,num_block=1,esa_feat=4", "RLFN:num_feat=8,num_block=1,esa_feat=4"]
    arguments = ["--input-size", "40x32", "--rounds", "2", "--device", "cpu", "--backend", "torch"]
    code, out, err = profile(*tiny, *arguments, "--json", str(tmp_path / "out.json"))
    assert code == 0, err
    automatic = "bf16" if machine.computes_in_bf16() else "fp32"
    assert [line.split()[:3] for line in out.splitlines()[-4:]] == [
        [network, way, precision]
        for way, precision in (("eager", "fp32"), ("torch", automatic))
        for network in tiny
    ]
    rows = json.loads((tmp_path / "out.json").read_text())["networks"]
    for row in rows:
        assert 0 < row["torch_ms_min"] <= row["torch_ms"] <= row["torch_ms_max"] < math.inf
        assert row["eager_to_eager"] == 1 and row["torch_to_eager"] > 0
    assert rows[0]["torch_ratio"] == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_back_ends_precision_is_the_one_it_computes_in(precision):
    """It shows in the output, for the last operation is a convolution."""
    network = nn.Conv2d(3, 3, 3, padding=1)
    run = backends.load(network, "torch", "cpu", precision)
    x = torch.rand(1, 3, 40, 48)
    assert run.precision == precision
    rounded = run(x).to(machine.DTYPES[precision]).float()
    assert torch.equal(rounded, run(x))
    assert torch.allclose(run(x), network(x), atol=1e-6 if precision == "fp32" else 0.02)


def test_on_a_gpu(profile, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    arguments = ["--input-size", "256x256", "--rounds", "3", "--device", "cuda"]
    code, _, err = profile(NTIRE_YML, "MLRN", *arguments, "--json", str(tmp_path / "out.json"))
    assert code == 0, err
    for row in json.loads((tmp_path / "out.json").read_text())["networks"]:
        assert row["eager_ms"] > 0
        assert row["peak_bytes"] > 256 * 256 * 50 * 4


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("MLRM", "MLRM: unknown 'MLRM'; did you mean MLRN"),
        ("MLRN:num_fat=3", "MLRN:num_fat=3: MLRN takes no 'num_fat'; did you mean num_feat"),
        ("MLRN:num_feat=-1", "MLRN:num_feat=-1: num_feat must be a positive integer, not -1"),
        ("MLRN:num_feat=[", "write arguments as NAME:ARG=VALUE"),
        ("EDSR", "EDSR needs num_in_ch; EDSR needs num_out_ch"),
        (
            "RRDBNet:num_in_ch=3,num_out_ch=3,num_block=1,scale=0",
            "scale must be a positive number, not 0",
        ),
        ("EDVR:num_feat=16", "EDVR:num_feat=16: cannot take an input of 1 x 3 x 16 x 24: "),
        ("RIDNet:in_channels=3,mid_channels=64,out_channels=3", "returns 24x16 where x4 of"),
        ("nowhere.yml", "nowhere.yml: there is no option file nowhere.yml here"),
        ("empty.yml", "empty.yml: empty.yml has no section network_g"),
        ("other.yml", "other.yml: network_g:type: unknown 'MLRM'; did you mean MLRN"),
    ],
)
def test_one_bad_network_spoils_nothing_else(profile, tmp_path, monkeypatch, network, message):
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "empty.yml", {"name": "empty"})
    write_yaml(tmp_path / "other.yml", {"scale": 4, "network_g": {"type": "MLRM"}})
    good = "MLRN:num_feat=8,num_block=1"
    arguments = ["--input-size", "24x16", "--no-runtime"]
    code, out, err = profile(network, good, *arguments)
    assert code == 1
    assert message in err and err.count("\n") == 1
    assert good in out and network not in out
    assert profile(network, *arguments)[:2] == (2, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input-size", "256"], "'256' is no size; write WIDTHxHEIGHT"),
        (["--output-size", "0x720"], "'0x720' is no size"),
        (["--backend", "torch", "--no-runtime"], "--backend measures times, --no-runtime forbids"),
        (["--no-runtime", "--json", "nowhere/out.json"], "mlrn profile: nowhere/out.json: No such"),
    ],
)
def test_contradicting_arguments(profile, arguments, message):
    code, _, err = profile("MLRN", *arguments)
    assert code == 2
    assert message in err
