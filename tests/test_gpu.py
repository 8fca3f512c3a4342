"""What may go another way on a GPU: `pytest -m gpu` runs these and the tests marked so elsewhere.

What no other test checks on a CPU runs there as well. What is printed is for the eye: a machine's
figures are no test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, write_yaml
from test_fast_model import batches, go_on, losses, train
from torch.nn import functional as F

from mlrn_arch import create_model
from mlrn_arch.inference import backends
from mlrn_arch.inference.upscaler import Upscaler

pytestmark = pytest.mark.gpu
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
CUDA = pytest.param("cuda", marks=NO_GPU)


@pytest.fixture
def options(fast_options, device) -> dict:
    fast_options["num_gpu"] = int(device == "cuda")
    return fast_options


@pytest.fixture
def photo() -> np.ndarray:
    """Soft shapes and fine noise, (260, 300, 3)."""
    generator = np.random.default_rng(0)
    coarse = np.kron(generator.integers(40, 216, (13, 15, 3)), np.ones((20, 20, 1)))
    return (coarse + generator.normal(0, 4, coarse.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("optimizer", ["Adam", "Muon"])
def test_a_resume_is_as_near_as_the_same_run_again(build, options, optimizer):
    """Bit by bit where the machine repeats itself bit by bit, else within rounding."""
    options["train"]["optim_g"]["type"] = optimizer
    data, ends = batches(6), []
    for _ in range(2):
        torch.manual_seed(0)
        model = build(deepcopy(options))
        train(model, data[:4])
        resumed = go_on(build, deepcopy(options), model, 4)
        for running in (model, resumed):
            for step in (5, 6):
                running.update_learning_rate(step)
                running.feed_data(data[step - 1])
                running.optimize_parameters(step)
        ends += [running.net_g.state_dict() for running in (model, resumed)]
    whole, resumed, again, _ = ends
    exact = all(torch.equal(whole[name], again[name]) for name in whole)
    for name in whole:
        rounding = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(resumed[name], whole[name], **rounding)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_memory_formats_train_alike(build, options):
    found = []
    for channels_last in (True, False):
        options["train"]["channels_last"] = channels_last
        torch.manual_seed(0)
        found.append(train(build(deepcopy(options)), batches(8)))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("device", [CUDA])
def test_compiled_training_is_the_same(build, options):
    found = []
    for compiled in (True, False):
        options["train"]["compile"] = compiled
        torch.manual_seed(0)
        found.append(train(build(deepcopy(options)), batches(8)))
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("device", [CUDA])
def test_fp16_skips_a_step_and_halves_its_scale(build, options):
    options["train"]["precision"] = "fp16"
    model = build(options)
    data = batches(4)
    train(model, data)
    before, scale = deepcopy(model.net_g.state_dict()), model.scaler.get_scale()
    hook = model.net_g.conv_first.weight.register_hook(lambda grad: grad * float("inf"))
    train(model, data[:1])
    hook.remove()
    assert model.scaler.get_scale() == scale / 2
    assert all(torch.equal(before[name], p) for name, p in model.net_g.state_dict().items())


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_the_prefetcher_changes_nothing(
    tmp_path, options, mlrn_here, monkeypatch, restore_stop, log
):
    """No batch is overwritten by the next one's copy, which another stream makes."""
    monkeypatch.chdir(tmp_path)
    found = []
    for mode in ("cuda", None):
        options["datasets"]["train"]["prefetch_mode"] = mode
        options["name"] = f"prefetch_{mode}"
        log.clear()
        assert mlrn_here("train", "-opt", write_yaml(tmp_path / "tiny.yml", options))[0] == 0
        found.append({step: float(loss) for step, loss in losses(log.text).items()})
    assert found[0] == pytest.approx(found[1], rel=1e-3) and len(found[0]) == 40


@pytest.mark.parametrize("device", [CUDA])
def test_one_process_of_torchrun(tmp_path, options, device):
    """Over NCCL; without a warning of how gradients lie."""
    options["train"]["total_iter"] = 4
    options["val"]["val_freq"] = 4
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    path = write_yaml(tmp_path / "tiny.yml", options)
    done = subprocess.run(
        [*command, "-m", "mlrn_arch.train", "-opt", path, "--launcher", "pytorch"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and sorted(losses(done.stdout)) == [1, 2, 3, 4], done.stdout
    assert "# psnr: " in done.stdout and "strides" not in done.stdout, done.stdout


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_first_and_last_layer_run_in_fp32(device, precision):
    """Not in TF32, whose 11 bits would be off by about 1e-4 of the largest output."""
    network, seen = create_model("MLRN_x4", pretrained=True), []
    for layer in (network.conv_first, network.upsampler[0]):
        layer.register_forward_hook(lambda *call: seen.append(call))
    backends.load(network, "torch", device, precision)(torch.rand(1, 3, 64, 64))
    for layer, (x,), y in seen:
        exact = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
        assert (y - exact).abs().max() < 2e-6 * exact.abs().max()
    assert len(seen) == 2


@pytest.mark.parametrize("device", [CUDA])
def test_tiles_and_fp16_leave_no_trace(photo, device):
    """Seams and rounding stay below what 8 bits show, or nearly so."""
    settings = {"backend": "torch", "device": device}
    whole = Upscaler("x2", **settings, precision="fp32", tile=1024)(photo).astype(int)
    assert whole.shape == (520, 600, 3)
    for other in ({"precision": "fp32", "tile": 192}, {"precision": "fp16", "tile": 1024}):
        difference = np.abs(Upscaler("x2", **settings, **other)(photo) - whole)
        assert difference.max() <= 2 and difference.mean() < 0.1, other


@pytest.mark.parametrize("device", [CUDA])
def test_figures_of_this_gpu(tmp_path, options, mlrn_here, capsys):
    """Training with depthwise convolutions in either memory format, and running."""
    options["network_g"].update(num_feat=48, num_block=6, esa_feat=16)
    options["datasets"]["train"].update(batch_size_per_gpu=32, num_worker_per_gpu=4)
    options["train"]["precision"] = "bf16"
    for channels_last in (True, False):
        options["train"]["channels_last"] = channels_last
        path = write_yaml(tmp_path / "tiny.yml", options)
        done = subprocess.run(
            [sys.executable, REPOSITORY / "tests/benchmark.py", "-opt", path],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        with capsys.disabled():
            print(f"\nchannels_last: {channels_last}\n{done.stdout}")
    code, out, err = mlrn_here("profile", "MLRN", "--device", "cuda", "--backend", "torch")
    assert code == 0, err
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}\n{out}")
