"""MLRN and RLFN: are they the published networks, and do they run wherever a user runs them?"""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlrn_arch.archs.esa import ESA
from mlrn_arch.archs.mlrn_arch import MLRN
from mlrn_arch.archs.rlfn_arch import RLFN

NETWORKS = [MLRN, RLFN]
TINY = {"num_feat": 8, "num_block": 1, "esa_feat": 4}
NTIRE_2023 = {"num_feat": 50, "num_block": 4, "img_range": 255}
NTIRE_2022 = {"num_feat": 46, "mid_feat": 48, "num_block": 4}


def make(network: type[nn.Module], **arguments) -> nn.Module:
    """Build a network with reproducible random weights, ready for inference."""
    torch.manual_seed(0)
    return network(**arguments).eval().requires_grad_(False)


def state(network: type[nn.Module], **arguments) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Build a network in float64, where a different order of summation cannot be told apart."""
    model = make(network, **arguments).double()
    return model, model.state_dict()


# --- parameters, operations ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "arguments", "parameters"),
    [
        (MLRN, {"upscale": 2}, 487_838),
        (MLRN, {"upscale": 3}, 495_683),
        (MLRN, {"upscale": 4}, 506_666),
        (MLRN, {"upscale": 2, "act": "lrelu"}, 487_838),
        (MLRN, {"upscale": 2, "bilinear": False}, 487_838),
        (MLRN, {"upscale": 2, "mixer": "pointwise"}, 484_358),
        (MLRN, {"upscale": 2, "mixer": "none"}, 463_826),
        (MLRN, NTIRE_2023, 274_710),
        (RLFN, {"upscale": 2}, 526_856),
        (RLFN, {"upscale": 3}, 533_891),
        (RLFN, {"upscale": 4}, 543_740),
        (RLFN, {"upscale": 2, "num_feat": 48}, 454_620),
        (RLFN, {"upscale": 4, "num_feat": 48}, 470_208),
        (RLFN, NTIRE_2022, 317_218),
    ],
)
def test_parameters(network, arguments, parameters):
    with torch.device("meta"):
        model = network(**arguments)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


# --- the equations, written a second time from the state dict alone -----------------------------


def conv(w: dict[str, torch.Tensor], name: str, x: torch.Tensor, **options) -> torch.Tensor:
    options.setdefault("padding", w[f"{name}.weight"].shape[-1] // 2)
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **options)


def reference_esa(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    c1 = conv(w, f"{name}.conv1", x)
    c3 = F.max_pool2d(conv(w, f"{name}.conv2", c1, stride=2, padding=0), 7, 3)
    c3 = F.interpolate(conv(w, f"{name}.conv3", c3), x.shape[2:], mode="bilinear")
    return x * torch.sigmoid(conv(w, f"{name}.conv4", c3 + conv(w, f"{name}.conv_f", c1)))


def reference_mlrn(
    w: dict[str, torch.Tensor],
    x: torch.Tensor,
    upscale: int,
    num_block: int,
    img_range: float = 1,
    mixer: str = "convmix",
    act: str = "gelu",
    bilinear: bool = True,
) -> torch.Tensor:
    """Equations 6 to 10 around 1 to 5, the image range taken literally."""
    h_act = F.gelu if act == "gelu" else lambda f: F.leaky_relu(f, 0.05)
    x = x * img_range
    f0 = f = conv(w, "conv_first", x)  # eq. 6
    for i in range(num_block):  # eq. 7
        f_in = f
        f = h_act(conv(w, f"body.{i}.conv1", f_in))  # eq. 1
        f = h_act(conv(w, f"body.{i}.conv2", f))  # eq. 2
        if mixer == "convmix":
            f = h_act(conv(w, f"body.{i}.mixer.depthwise", f, groups=f.shape[1])) + f  # eq. 3
        if mixer != "none":
            f = h_act(conv(w, f"body.{i}.mixer.pointwise", f))  # eq. 4
        f = reference_esa(w, f"body.{i}.esa", conv(w, f"body.{i}.conv3", f + f_in))  # eq. 5
    f = conv(w, "conv_after_body", f)  # eq. 8
    f = F.pixel_shuffle(conv(w, "upsampler.0", f + f0), upscale)  # eq. 9
    if bilinear:
        f = f + F.interpolate(x, scale_factor=upscale, mode="bilinear")  # eq. 10
    return f / img_range


@pytest.mark.parametrize("upscale", [1, 2, 3, 4])
@pytest.mark.parametrize("img_range", [1.0, 255.0])
def test_mlrn_is_the_paper(upscale, img_range):
    arguments = {"num_feat": 10, "num_block": 3, "esa_feat": 4}
    model, w = state(MLRN, upscale=upscale, img_range=img_range, **arguments)
    x = torch.rand(2, 3, 23, 38, dtype=torch.float64)
    y = model(x)
    assert y.shape == (2, 3, 23 * upscale, 38 * upscale)
    torch.testing.assert_close(y, reference_mlrn(w, x, upscale, 3, img_range))


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        ({"mixer": "pointwise"}, ["mixer.depthwise"]),
        ({"mixer": "none"}, ["mixer.depthwise", "mixer.pointwise"]),
        ({"act": "lrelu"}, []),
        ({"bilinear": False}, []),
        ({"mixer": "pointwise", "act": "lrelu", "bilinear": False}, ["mixer.depthwise"]),
    ],
)
def test_ablations_of_table_2(arguments, absent):
    whole, w_whole = state(MLRN, upscale=2, **TINY)
    model, w = state(MLRN, upscale=2, **TINY, **arguments)
    gone = {name for name in w_whole if any(part in name for part in absent)}
    assert w.keys() == w_whole.keys() - gone
    x = torch.rand(1, 3, 20, 17, dtype=torch.float64)
    torch.testing.assert_close(model(x), reference_mlrn(w, x, 2, 1, **arguments))
    whole.load_state_dict(w, strict=False)
    assert not torch.allclose(model(x), whole(x))


@pytest.mark.parametrize("arguments", [{"img_range": 1.0}, {"mid_feat": 12}])
def test_rlfn_is_the_official_network(arguments):
    model, w = state(RLFN, upscale=3, num_feat=10, num_block=2, esa_feat=4, **arguments)
    img_range = arguments.get("img_range", 255.0)
    x = torch.rand(2, 3, 23, 38, dtype=torch.float64)
    first = f = conv(w, "conv_1", x * img_range)
    for block in ("block_1", "block_2"):
        g = F.leaky_relu(conv(w, f"{block}.c1_r", f), 0.05)
        g = F.leaky_relu(conv(w, f"{block}.c2_r", g), 0.05)
        g = F.leaky_relu(conv(w, f"{block}.c3_r", g), 0.05)
        f = reference_esa(w, f"{block}.esa", conv(w, f"{block}.c5", g + f))
    f = F.pixel_shuffle(conv(w, "upsampler.0", conv(w, "conv_2", f) + first), 3)
    torch.testing.assert_close(model(x), f / img_range)


# --- names of the state dict --------------------------------------------------------------------


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def conv_shapes(convolutions: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    weights = {f"{name}.weight": shape for name, shape in convolutions.items()}
    return weights | {f"{name}.bias": shape[:1] for name, shape in convolutions.items()}


def test_state_dict_of_mlrn():
    expected = {"conv_first": (58, 3, 3, 3)}
    for i in range(6):
        expected |= {
            f"body.{i}.conv1": (58, 58, 3, 3),
            f"body.{i}.conv2": (58, 58, 3, 3),
            f"body.{i}.mixer.depthwise": (58, 1, 3, 3),
            f"body.{i}.mixer.pointwise": (58, 58, 1, 1),
            f"body.{i}.conv3": (58, 58, 1, 1),
            f"body.{i}.esa.conv1": (16, 58, 1, 1),
            f"body.{i}.esa.conv_f": (16, 16, 1, 1),
            f"body.{i}.esa.conv2": (16, 16, 3, 3),
            f"body.{i}.esa.conv3": (16, 16, 3, 3),
            f"body.{i}.esa.conv4": (58, 16, 1, 1),
        }
    expected |= {"conv_after_body": (58, 58, 3, 3), "upsampler.0": (48, 58, 3, 3)}
    assert shapes(MLRN()) == conv_shapes(expected)


@pytest.mark.parametrize(
    ("arguments", "n", "mid", "blocks"), [({}, 52, 52, 6), (NTIRE_2022, 46, 48, 4)]
)
def test_state_dict_of_rlfn(arguments, n, mid, blocks):
    expected = {"conv_1": (n, 3, 3, 3)}
    for i in range(1, blocks + 1):
        expected |= {
            f"block_{i}.c1_r": (mid, n, 3, 3),
            f"block_{i}.c2_r": (mid, mid, 3, 3),
            f"block_{i}.c3_r": (n, mid, 3, 3),
            f"block_{i}.c5": (n, n, 1, 1),
            f"block_{i}.esa.conv1": (16, n, 1, 1),
            f"block_{i}.esa.conv_f": (16, 16, 1, 1),
            f"block_{i}.esa.conv2": (16, 16, 3, 3),
            f"block_{i}.esa.conv3": (16, 16, 3, 3),
            f"block_{i}.esa.conv4": (n, 16, 1, 1),
        }
    expected |= {"conv_2": (n, n, 3, 3), "upsampler.0": (48, n, 3, 3)}
    published = {name: torch.zeros(shape) for name, shape in conv_shapes(expected).items()}
    model = RLFN(**arguments)
    model.load_state_dict(published, strict=True)
    assert shapes(model) == conv_shapes(expected)


def test_basicsr_builds_both():
    from basicsr.archs import build_network

    for network in NETWORKS:
        model = build_network({"type": network.__name__, "upscale": 2, **TINY})
        assert type(model) is network


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        (MLRN, {"num_feat": 0}, "num_feat must be a positive integer, not 0"),
        (MLRN, {"num_block": 2.0}, "num_block must be a positive integer, not 2.0"),
        (MLRN, {"upscale": True}, "upscale must be a positive integer, not True"),
        (MLRN, {"esa_feat": "16"}, "esa_feat must be a positive integer, not '16'"),
        (MLRN, {"img_range": 0}, "img_range must be a positive number, not 0"),
        (MLRN, {"img_range": "255"}, "img_range must be a positive number, not '255'"),
        (MLRN, {"mixer": None}, "mixer must be convmix, pointwise or none, not None"),
        (MLRN, {"act": "relu"}, "act must be gelu or lrelu, not 'relu'"),
        (MLRN, {"num_out_ch": 1}, "num_in_ch and num_out_ch must be equal, not 3 and 1"),
        (RLFN, {"img_range": float("nan")}, "img_range must be a positive number, not nan"),
    ],
)
def test_bad_arguments(network, arguments, message):
    with pytest.raises(ValueError, match=message):
        network(**arguments)


def test_channels():
    grey = make(MLRN, num_in_ch=1, num_out_ch=1, upscale=2, **TINY)
    assert grey(torch.rand(1, 1, 16, 18)).shape == (1, 1, 32, 36)
    mixed = make(MLRN, num_in_ch=4, num_out_ch=3, bilinear=False, upscale=2, **TINY)
    assert mixed(torch.rand(1, 4, 16, 18)).shape == (1, 3, 32, 36)


@pytest.mark.parametrize("network", NETWORKS)
def test_img_range_only_moves_the_scale_of_two_weights(network):
    """A network of range 255 is one of range 1 with the first weights times, the last over 255."""
    wide = make(network, upscale=2, img_range=255, **TINY).double()
    narrow = make(network, upscale=2, img_range=1, **TINY).double()
    first = {MLRN: "conv_first", RLFN: "conv_1"}[network]
    with torch.no_grad():
        narrow.get_submodule(first).weight.mul_(255)
        narrow.upsampler[0].weight.div_(255)
        narrow.upsampler[0].bias.div_(255)
    x = torch.rand(1, 3, 18, 25, dtype=torch.float64)
    torch.testing.assert_close(wide(x), narrow(x))


def test_bilinear_term_is_exact_for_every_img_range():
    model = make(MLRN, upscale=2, img_range=255, **TINY)
    nn.init.zeros_(model.upsampler[0].weight)
    nn.init.zeros_(model.upsampler[0].bias)
    x = torch.rand(1, 3, 18, 25)
    assert torch.equal(model(x), F.interpolate(x, scale_factor=2, mode="bilinear"))


# --- sizes, precisions, layouts -----------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("size", [(1, 1), (5, 40), (40, 5), (14, 14), (15, 15), (20, 21)])
def test_any_size(network, size):
    model = make(network, upscale=2, **TINY).requires_grad_(True)
    y = model(torch.rand(1, 3, *size))
    assert y.shape == (1, 3, 2 * size[0], 2 * size[1])
    y.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_esa_continues_a_small_input_by_replication_for_its_coarse_branch_only():
    esa = make(ESA, num_feat=6, esa_feat=4).double()
    w = {f"esa.{name}": tensor for name, tensor in esa.state_dict().items()}
    x = torch.rand(1, 6, 15, 15, dtype=torch.float64)
    torch.testing.assert_close(esa(x), reference_esa(w, "esa", x))
    # Rows that repeat the last one are what the replication would have made of the rest.
    repeated = torch.cat([x[:, :, :9], x[:, :, 8:9].expand(-1, -1, 6, -1)], dim=2)
    torch.testing.assert_close(esa(repeated[:, :, :9]), esa(repeated)[:, :, :9])


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.004)])
def test_half_precision(network, dtype, tolerance):
    model = make(network, upscale=2, **TINY)
    x = torch.rand(1, 3, 31, 26).to(dtype)
    y = model(x.float())
    half = model.to(dtype)
    z = half(x)
    assert z.dtype == dtype
    torch.testing.assert_close(z.float(), y, rtol=tolerance, atol=tolerance)
    assert half(x[..., :9, :1]).isfinite().all()


@pytest.mark.parametrize("network", NETWORKS)
def test_autocast(network):
    model = make(network, upscale=2, **TINY)
    x = torch.rand(1, 3, 31, 26)
    with torch.autocast("cpu", torch.bfloat16):
        z = model(x)
        assert model(x[..., :9, :1]).isfinite().all()
    torch.testing.assert_close(z.float(), model(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("arguments", [{}, {"num_feat": 8, "num_block": 1}])
def test_channels_last(network, arguments):
    model = make(network, **arguments)
    x = torch.rand(2, 3, 19, 26)
    y = model(x)
    model = model.to(memory_format=torch.channels_last)
    z = model(x.contiguous(memory_format=torch.channels_last))
    assert z.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(z, y)


# --- compilers and exporters --------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_compile_finds_one_graph(network):
    model = make(network, upscale=2, **TINY)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in [(24, 31), (33, 22)]:
        x = torch.rand(1, 3, *size)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.slow
def test_compile_with_inductor(monkeypatch):
    # Else inductor first starts processes that compile, which takes longer than a tiny network.
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        pytest.skip("torch.compile needs a C++ compiler, and this machine has none")
    model = make(MLRN, upscale=2, **TINY)
    x = torch.rand(1, 3, 24, 31)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


@pytest.mark.parametrize("network", NETWORKS)
def test_export_with_dynamic_sizes(network):
    model = make(network, upscale=2, **TINY)
    # Up to 20 pixels ESA's pooled map is one pixel wide, on which torch.export specialises.
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", min=21)}
    sizes[3] = torch.export.Dim("w", min=21)
    program = torch.export.export(model, (torch.rand(2, 3, 24, 31),), dynamic_shapes=(sizes,))
    for shape in [(1, 3, 21, 22), (3, 3, 33, 47), (1, 3, 64, 21)]:
        x = torch.rand(shape)
        torch.testing.assert_close(program.module()(x), model(x))
