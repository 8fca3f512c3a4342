"""The kernels for training on a CPU against PyTorch's."""

import copy
import subprocess

import pytest
import torch
from torch import nn

from mlrn_arch.archs.mlrn_arch import MLRN
from mlrn_arch.archs.rlfn_arch import RLFN
from mlrn_arch.models import cpu_kernels


@pytest.fixture
def lanes():
    """How many channels a convolution needs at least."""
    try:
        return cpu_kernels._library().lanes()
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"the kernels cannot be compiled here: {error}")


def gradients(network, x):
    """Output and all gradients of a network, for a fixed gradient of the output."""
    x = x.clone().requires_grad_()
    y = network(x)
    gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *network.parameters()], gy)]


def largest_error(found, expected):
    return max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 4, 8), (2, 13, 22), (1, 48, 47)])
@pytest.mark.parametrize(("c", "o"), [(16, 16), (58, 48), (50, 58)])
def test_convolution(lanes, c, o, size, threads):
    """Of tiles that are whole and cut, and channels that do not fill the last vector."""
    torch.manual_seed(0)
    n, h, w = size
    layer = nn.Conv2d(c, o, 3, padding=1)
    ours = copy.deepcopy(layer)
    cpu_kernels.use_in(ours)
    x = torch.randn(n, c, h, w)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, again = gradients(ours, x), gradients(ours, x)
    finally:
        torch.set_num_threads(before)
    assert type(ours) is not type(layer)
    assert largest_error(found, gradients(layer.double(), x.double())) < 3e-5
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_gelu(lanes):
    ours = nn.Sequential(nn.GELU())
    cpu_kernels.use_in(ours)
    x = torch.linspace(-12, 12, 40_001).view(1, 1, 1, -1)
    found, expected = gradients(ours, x), gradients(nn.GELU(), x.double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.GELU(), (2, 9, 16)), (nn.Conv2d(16, 16, 3, padding=1), (16, 8, 8))],
)
def test_what_is_no_batch_of_images_is_left_to_pytorch(lanes, layer, shape):
    """The tokens of a transformer, and an image without a batch."""
    ours = nn.Sequential(copy.deepcopy(layer))
    cpu_kernels.use_in(ours)
    x = torch.randn(shape)
    for a, b in zip(gradients(ours, x), gradients(layer, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [MLRN, RLFN])
def test_networks(lanes, kind):
    torch.manual_seed(0)
    network = kind(upscale=2)
    ours = copy.deepcopy(network)
    cpu_kernels.use_in(ours)
    assert sum(type(m).__module__ == cpu_kernels.__name__ for m in ours.modules()) > 20
    assert list(ours.state_dict()) == list(network.state_dict())
    x = torch.rand(2, 3, 24, 20)
    assert largest_error(gradients(ours, x), gradients(network, x)) < 3e-5
    with torch.no_grad():
        assert torch.equal(ours(x), network(x))


def test_other_layers_are_left_alone(lanes):
    layers = [
        nn.Conv2d(32, 32, 3),
        nn.Conv2d(32, 32, 3, padding=1, stride=2),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2),
        nn.Conv2d(32, 32, 5, padding=2),
        nn.Conv2d(3, 32, 3, padding=1),
        nn.Conv2d(32, 32, 1, stride=2),
        nn.Conv2d(32, 32, (1, 3), padding=(0, 1)),
        nn.GELU(approximate="tanh"),
    ]
    kinds = [type(layer) for layer in layers]
    cpu_kernels.use_in(nn.ModuleList(layers))
    assert [type(layer) for layer in layers] == kinds


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_library", cpu_kernels._library.__wrapped__)
    monkeypatch.setenv("PATH", "")
    layer = nn.Conv2d(32, 32, 3, padding=1)
    with pytest.raises(OSError, match=r"there is no C\+\+ compiler"):
        cpu_kernels.use_in(layer)
    assert type(layer) is nn.Conv2d
