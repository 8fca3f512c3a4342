"""`FastSRModel` and its data against stock BasicSR, and what must not be lost."""

from __future__ import annotations

import functools
import os
import random
import re
import shutil
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.data import build_dataset
from basicsr.losses import build_loss
from basicsr.metrics import calculate_psnr
from conftest import make_fast, write_yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlrn_arch import compat, machine, options
from mlrn_arch.errors import UserError
from mlrn_arch.models.muon import Muon, inner_weights

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="checks what holds on the CPU")


def losses(output: str) -> dict[int, str]:
    found = re.findall(r"iter: +([\d,]+).*l_pix: (\S+)", output)
    return {int(step.replace(",", "")): loss for step, loss in found}


def weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(path, weights_only=True)
    return {f"{key}.{k}": v for key, net in checkpoint.items() for k, v in net.items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def batches(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    names = [f"image{i}" for i in range(4)]
    return [
        {
            "lq": torch.rand(4, 3, 16, 16, generator=generator),
            "gt": torch.rand(4, 3, 32, 32, generator=generator),
            "lq_path": names,
            "gt_path": names,
        }
        for _ in range(count)
    ]


def train(model, data: list[dict], first: int = 1) -> list[float]:
    found = []
    for step, batch in enumerate(data, first):
        model.update_learning_rate(step)
        model.feed_data(batch)
        model.optimize_parameters(step)
        found.append(model.get_current_log()["l_pix"])
    return found


@pytest.mark.gpu
def test_fp32_gives_stock_losses_step_by_step(build, train_options):
    stock = build(train_options)
    fast = build(make_fast(train_options))
    data = batches(40)
    expected, found = train(stock, data), train(fast, data)
    assert found == pytest.approx(expected, rel=1e-4)
    for name, tensor in stock.net_g_ema.state_dict().items():
        torch.testing.assert_close(fast.net_g_ema.state_dict()[name], tensor, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("y_weight", [0, 0.8, 1])
def test_psnr_loss_is_what_the_validators_score(y_weight):
    loss = build_loss({"type": "PSNRLoss", "loss_weight": 0.5, "y_weight": y_weight})
    generator = torch.Generator().manual_seed(0)
    gt = torch.randint(256, (3, 3, 64, 48), generator=generator) / 255
    noise = torch.randn(gt.shape, generator=generator)
    pred = gt + noise * torch.tensor([0.1, 0.02, 0.004]).view(3, 1, 1, 1)

    def as_8_bits(images):  # BGR, as the validators have them
        return (images * 255).round().permute(0, 2, 3, 1).flip(-1).numpy()

    pairs = list(zip(as_8_bits(pred), as_8_bits(gt), strict=True))
    on_rgb = [calculate_psnr(*pair, crop_border=0) for pair in pairs]
    on_y = [calculate_psnr(*pair, crop_border=0, test_y_channel=True) for pair in pairs]
    assert min(on_rgb) < 21 and 47 < max(on_rgb)
    expected = y_weight * np.mean(on_y) + (1 - y_weight) * np.mean(on_rgb)
    assert loss(pred, gt).item() == pytest.approx(-0.5 * expected, abs=0.02)
    # One channel is Y already, whatever its share.
    expected = np.mean([calculate_psnr(a[..., 2:], b[..., 2:], crop_border=0) for a, b in pairs])
    assert loss(pred[:, :1], gt[:, :1]).item() == pytest.approx(-0.5 * expected, abs=0.02)
    pred.requires_grad_()
    loss(pred, pred.detach()).backward()  # nothing to gain, and no infinity
    assert not pred.grad.any()


def test_psnr_loss_refuses_a_share_above_one():
    with pytest.raises(ValueError, match="y_weight must be from 0 to 1, not 80"):
        build_loss({"type": "PSNRLoss", "y_weight": 80})


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare")
def test_muon_steps_as_torchs_does():
    """torch's takes matrices only, and turns them in bf16."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(16, 8, 3, 3), (24, 16, 1, 1)] * 2]
    theirs = [torch.nn.Parameter(param.detach().flatten(1).clone()) for param in ours]
    before = [param.detach().clone() for param in theirs]
    muon = Muon(ours, [], lr=0.01)
    reference = torch.optim.Muon(  # which takes a fifth of it, to be near AdamW's usual step
        theirs, lr=0.05, weight_decay=0, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        for own, other in zip(ours, theirs, strict=True):
            other.grad = torch.randn_like(other)
            own.grad = other.grad.view(own.shape)
        muon.step()
        reference.step()
    for own, other, start in zip(ours, theirs, before, strict=True):
        moved, expected = own.detach().flatten(1) - start, other.detach() - start
        assert (moved - expected).norm() < 0.03 * expected.norm()


def test_muon_leaves_to_adam_what_it_is_not_made_for(build, fast_options):
    fast_options["train"]["optim_g"]["type"] = "Muon"
    model = build(fast_options)
    names = {id(param): name for name, param in model.net_g.named_parameters()}
    adam, biases, muon = (
        {names[id(param)] for param in group["params"]} for group in model.optimizer_g.param_groups
    )
    assert all(name.endswith(".bias") for name in biases)
    adam |= biases
    assert not adam & muon and adam | muon == set(names.values())
    # By its authors' advice no biases, depthwise convolutions, first or last layer.
    assert {"conv_first.weight", "upsampler.0.weight", "body.0.mixer.depthwise.weight"} <= adam
    assert {"body.0.conv1.weight", "body.0.conv3.weight", "conv_after_body.weight"} <= muon
    assert all(name.endswith(".weight") for name in muon)


def test_biases_that_step_with_the_image_range_learn_the_same_in_any():
    """In [0, 255] all that a homogeneous network computes is 255 times as large."""
    torch.manual_seed(0)
    conv, act = torch.nn.Conv2d, torch.nn.LeakyReLU(0.05)
    net = torch.nn.Sequential(conv(3, 8, 3), act, conv(8, 8, 3), act, conv(8, 3, 3))
    wide = deepcopy(net)
    for layer in wide[::2]:
        layer.bias.data *= 255
    x, gt = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 10, 10)
    outputs = [net(x)]
    for network, scale in ((net, 1), (wide, 255)):
        layers = network[::2]
        muon = Muon(
            [layers[1].weight],
            [layers[0].weight, layers[2].weight],
            lr=0.01,
            biases=[layer.bias for layer in layers],
            bias_lr=0.01 * scale,
            eps=1e-12,
        )
        for _ in range(5):
            muon.zero_grad()
            (network(x * scale) / scale - gt).square().mean().backward()
            muon.step()
        outputs.append(network(x * scale) / scale)
    before, after, in_255 = outputs
    assert (after - in_255).abs().max() < 1e-3 * (after - before).abs().max()


def test_biases_have_a_learning_rate_of_their_own(build, fast_options):
    fast_options["train"]["optim_g"].update(type="Muon", lr=1e-3, bias_lr=0.03)
    model = build(fast_options)
    names = {id(param): name for name, param in model.net_g.named_parameters()}
    rates = {
        names[id(param)]: group["lr"]
        for group in model.optimizer_g.param_groups
        for param in group["params"]
    }
    assert rates == {name: 0.03 if name.endswith("bias") else 1e-3 for name in names.values()}


@pytest.mark.parametrize(
    ("network", "channels", "inner", "others"),
    [
        ({"type": "SRCNN"}, 1, {"conv2"}, {"conv1", "conv3"}),
        ({"type": "CARN", "upscale": 2}, 3, {"b1.b1.body.0"}, {"entry", "exit"}),
    ],
)
def test_muon_goes_by_the_order_in_which_layers_run(network, channels, inner, others):
    """Not by that of their registration; parts that do not run at this scale are Adam's."""
    net = build_network(network)
    chosen = {id(weight) for weight in inner_weights(net, torch.zeros(1, channels, 16, 16))}
    names = {name[:-7] for name, p in net.named_parameters() if id(p) in chosen}
    assert inner <= names and not others & names


@pytest.fixture
def reduced_precision(monkeypatch):
    """Any device computes as asked, even where that is slow."""
    monkeypatch.setattr(machine, "computes_in_bf16", lambda *_: True)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["Adam", "Muon"])
def test_reduced_precision_stays_near_fp32(
    build, fast_options, precision, optimizer, reduced_precision
):
    fast_options["train"]["optim_g"]["type"] = optimizer
    fast_options["train"]["grad_clip"] = 1.0
    data = batches(4) * 8
    expected = train(build(deepcopy(fast_options)), data)
    fast_options["train"]["precision"] = precision
    fast_options["val"]["precision"] = precision
    model = build(fast_options)
    assert model.precision == precision
    found = train(model, data)
    assert found[-1] < found[0] and found != expected
    assert found == pytest.approx(expected, rel=0.05)
    model.test()
    assert model.output.dtype == torch.float32


@pytest.mark.parametrize("encoding", ["png", "bmp"])
def test_fast_dataset_gives_stock_samples(tmp_path, train_options, encoding):
    """From PNG and BMP values, of a width whose BMP rows need padding."""
    from basicsr.utils.lmdb_util import LmdbMaker

    generator = np.random.default_rng(0)
    for name, side in (("gt", 50), ("lq", 25)):
        maker = LmdbMaker(str(tmp_path / f"{name}.lmdb"), map_size=2**24)
        for key in "ab":
            image = generator.integers(0, 256, (side // 25 * 26, side, 3), dtype=np.uint8)
            maker.put(cv2.imencode(f".{encoding}", image)[1].tobytes(), key, image.shape)
        maker.close()
    opt = train_options["datasets"]["train"] | {"phase": "train", "scale": 2}
    opt |= {f"dataroot_{name}": str(tmp_path / f"{name}.lmdb") for name in ("gt", "lq")}
    stock, fast = (
        build_dataset({**opt, "type": kind})
        for kind in ("PairedImageDataset", "FastPairedImageDataset")
    )
    for seed in range(20):
        random.seed(seed)
        expected = stock[seed % 2]
        fast.file_client = stock.file_client  # LMDB opens a file once a process
        random.seed(seed)
        found = fast[seed % 2]
        for name in ("lq", "gt"):
            assert found[name].dtype == torch.uint8
            assert torch.equal(found[name].float() / 255, expected[name])
        assert found["lq_path"] == expected["lq_path"]


def test_parts_of_a_network_may_be_of_no_use_at_a_scale(build, fast_options):
    fast_options["network_g"] = {"type": "CARN", "upscale": 2, "num_feat": 8}
    model = build(fast_options)
    train(model, batches(1))
    assert any(param.grad is None for param in model.params)


@pytest.mark.gpu
def test_one_bad_gradient_stops_muon_and_adam_alike(build, fast_options, reduced_precision):
    """While fp16 is scaled, clipping turns one infinite gradient into NaN everywhere."""
    fast_options["train"].update(precision="fp16", grad_clip=1.0)
    fast_options["train"]["optim_g"]["type"] = "Muon"
    model = build(fast_options)
    train(model, batches(1))
    before = {k: v.clone() for k, v in model.net_g.state_dict().items()}
    model.net_g.body[0].conv1.weight.register_hook(lambda grad: grad * float("nan"))
    model.feed_data(batches(1)[0])
    model.optimize_parameters(2)
    assert equal(before, model.net_g.state_dict())


def go_on(build, fast_options: dict, model, step: int):
    """A `FastSRModel` of other options that continues what `model` saves now."""
    model.save(0, step)
    state = compat.load_state(f"{model.opt['path']['training_states']}/{step}.state")
    later = build(fast_options, f"{model.opt['path']['models']}/net_g_{step}.pth")
    later.resume_training(state)
    return later


def read(tmp_path, fast_options: dict, *arguments: str):
    path = write_yaml(tmp_path / "tiny.yml", fast_options)
    opt, _, notes = options.read("train", ["-opt", path, *arguments])
    return opt, "\n".join(notes)


def test_without_a_launcher_one_gpu_is_used(tmp_path, fast_options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    opt, notes = read(tmp_path, fast_options)
    assert opt["num_gpu"] == 1 and "torchrun" in notes
    fast_options["model_type"] = "SRModel"  # stock's DataParallel is right in fp32
    fast_options["datasets"]["train"]["type"] = "PairedImageDataset"
    assert read(tmp_path, fast_options)[0]["num_gpu"] == 2


def test_a_gpu_that_emulates_bf16_trains_in_fp16(tmp_path, fast_options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    fast_options["train"]["precision"] = fast_options["val"]["precision"] = "bf16"
    opt, notes = read(tmp_path, fast_options)
    assert (opt["train"]["precision"], opt["val"]["precision"]) == ("fp16", "fp32")
    assert "train:precision: fp16: this GPU only emulates bf16" in notes


def test_a_cpu_of_which_torch_cannot_tell_computes_in_fp32(tmp_path, fast_options, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not machine.computes_in_bf16()
    fast_options["train"]["precision"] = "fp16"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert read(tmp_path, fast_options)[0]["train"]["precision"] == "fp32"


def test_a_launcher_that_did_not_launch_is_told(tmp_path, fast_options, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="torchrun --nproc_per_node=2 -m mlrn_arch.train -opt"):
        read(tmp_path, fast_options, "--launcher", "pytorch")


def test_compiled_training_is_the_same(build, fast_options, monkeypatch):
    """Names of weights stay, and validations run what is not compiled."""
    compiled = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    found, names = [], []
    for compile_it in (True, False):
        fast_options["train"]["compile"] = compile_it
        torch.manual_seed(0)
        model = build(deepcopy(fast_options))
        found.append(train(model, batches(3)))
        names.append(list(model.net_g.state_dict()))
    assert found[0] == pytest.approx(found[1], rel=1e-5) and names[0] == names[1]


def test_the_end_of_a_short_run(tmp_path, fast_options, mlrn_here, monkeypatch, restore_stop, log):
    """It ends with prefetch_mode cpu too, at the step it ended at, and no time before it began."""
    monkeypatch.chdir(tmp_path)
    fast_options["train"]["total_iter"] = 8
    fast_options["datasets"]["train"]["prefetch_mode"] = "cpu"
    path = write_yaml(tmp_path / "tiny.yml", fast_options)
    assert mlrn_here("train", "-opt", path)[0] == 0
    assert "prefetch_mode cpu off" in log.text and "@ 8 iter" in log.text
    assert re.findall(r"eta: (.+?), time", log.text)[-1] == "0:00:00"
    shown = EventAccumulator(str(tmp_path / "tb_logger/tiny")).Reload()
    assert [event.step for event in shown.Scalars("lr")] == list(range(1, 9))
    assert set(shown.Tags()["images"]) == {f"tiny_val/{kind}" for kind in ("lq", "result", "gt")}


@pytest.mark.parametrize("optimizer", ["Adam", "Muon"])
def test_a_loss_that_is_not_finite_stops_before_the_weights(build, fast_options, optimizer):
    fast_options["train"]["optim_g"]["type"] = optimizer
    model = build(fast_options)
    good, bad = batches(2)
    train(model, [good])
    before = {k: v.clone() for k, v in model.net_g.state_dict().items()}
    bad["gt"][2, 0, 0, 0] = float("nan")
    model.feed_data({**bad, "lq_path": ["a", "b", "c", "d"]})
    with pytest.raises(UserError, match="not finite at iter 2.*The batch: a, b, c, d"):
        model.optimize_parameters(2)
        model.save(0, 2)  # where the check waits for the next fetch, a save is one
    assert equal(before, model.net_g.state_dict())
    assert not os.listdir(model.opt["path"]["models"])


def test_a_broken_training_image_is_named(
    tmp_path, fast_options, paired_data, mlrn_here, monkeypatch, restore_stop
):
    import lmdb

    shutil.copytree(paired_data / "gt.lmdb", tmp_path / "gt.lmdb")
    with lmdb.open(str(tmp_path / "gt.lmdb")) as env, env.begin(write=True) as transaction:
        transaction.put(b"image3", b"no image")
    fast_options["datasets"]["train"]["dataroot_gt"] = str(tmp_path / "gt.lmdb")
    monkeypatch.chdir(tmp_path)
    path = write_yaml(tmp_path / "tiny.yml", fast_options)
    code, _, err = mlrn_here("train", "-opt", path)
    assert code == 2
    assert re.search("mlrn train: image image3 of .*gt.lmdb cannot be used: it is no image", err)
    assert "Traceback" not in err
