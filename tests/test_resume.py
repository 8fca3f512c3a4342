"""A run that goes on: exact resumes, the option file of today, saves that nothing tears."""

from __future__ import annotations

import errno
import math
import os
import random
import re
import shutil
import signal
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from basicsr.archs import build_network
from basicsr.data import build_dataset
from basicsr.models import lr_scheduler
from basicsr.utils.registry import ARCH_REGISTRY
from conftest import start_training, write_yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_fast_model import ON_CPU, batches, equal, go_on, losses, train, weights

from mlrn_arch import compat, data
from mlrn_arch.archs.mlrn_arch import MLRN
from mlrn_arch.errors import UserError
from mlrn_arch.models import resumable_model

LATEST = "experiments/tiny/models/net_g_latest.pth"


@pytest.fixture
def run(mlrn_here, monkeypatch, restore_stop, log):
    """Run `mlrn train` on options in a folder, as `--force_yml` changes them; returns its log."""

    def train_in(folder: Path, options: dict, *arguments: str) -> str:
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        log.clear()
        path = write_yaml(folder / "tiny.yml", options)
        code, out, err = mlrn_here("train", "-opt", path, *arguments)
        assert code == 0, err
        return out + log.text

    return train_in


def forget(folder: Path, iteration: int) -> Path:
    """Undo what a run saved after an iteration, as if it had been killed; returns its folder."""
    experiment = folder / "experiments/tiny"
    for path in [*experiment.glob("training_states/*"), *experiment.glob("models/*")]:
        number = re.sub(r"\D", "", path.name)
        if not number or int(number) > iteration:
            path.unlink()
    return experiment


# What a resume repeats


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("saved_by", "optimizer"),
    [("SRModel", "Adam"), ("FastSRModel", "Adam"), ("FastSRModel", "Muon")],
)
def test_any_state_goes_on_as_if_nothing_had_stopped(build, train_options, saved_by, optimizer):
    """That of stock, and that of a model of another memory format."""
    first = {**deepcopy(train_options), "model_type": saved_by}
    first["train"]["optim_g"]["type"] = optimizer
    first["train"]["ema_decay"] = 0
    other = deepcopy(first) | {"model_type": "FastSRModel"}
    other["train"]["channels_last"] = False
    samples = batches(4)
    model = build(first)
    train(model, samples[:3])
    later = go_on(build, other, model, 3)
    for running in (model, later):
        running.update_learning_rate(4)
        running.feed_data(samples[3])
        running.optimize_parameters(4)
    expected, found = (m.net_g.state_dict() for m in (model, later))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_dropout_draws_what_it_would_have_drawn(build, fast_options, monkeypatch):
    """Also after a validation, which draws random numbers of its own."""

    class Dropping(torch.nn.Sequential):
        def __init__(self) -> None:
            conv = torch.nn.Conv2d(3, 12, 3, padding=1)
            super().__init__(conv, torch.nn.Dropout(0.5), torch.nn.PixelShuffle(2))

    monkeypatch.setitem(ARCH_REGISTRY._obj_map, "Dropping", Dropping)
    fast_options["network_g"] = {"type": "Dropping"}
    model = build(deepcopy(fast_options))
    samples = batches(6)
    train(model, samples[:3])
    later = go_on(build, fast_options, model, 3)
    torch.rand(7)
    found = []
    for running in (model, later):
        for step in (4, 5, 6):
            running.update_learning_rate(step)
            running.feed_data(samples[step - 1])
            running.optimize_parameters(step)
        found.append(running.net_g.state_dict())
    assert equal(*found)


def test_a_resume_draws_the_seed_and_forgets_what_was_lost(
    tmp_path, fast_options, run, monkeypatch
):
    """Without manual_seed, and without the file that the run inherited from.

    TensorBoard shows every step once.
    """
    torch.save(MLRN(num_feat=8, num_block=1, esa_feat=4).state_dict(), tmp_path / "start.pth")
    del fast_options["manual_seed"]
    fast_options["network_g"]["img_range"] = 255
    fast_options["train"].update(total_iter=8, inherit_network_g=str(tmp_path / "start.pth"))
    fast_options["logger"]["save_checkpoint_freq"] = 4
    run(tmp_path / "whole", fast_options)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    forget(tmp_path / "parts", 4)
    (tmp_path / "start.pth").unlink()
    output = run(tmp_path / "parts", fast_options, "--auto_resume")
    assert sorted(losses(output)) == [5, 6, 7, 8] and "another" not in output
    assert equal(weights(tmp_path / "whole" / LATEST), weights(tmp_path / "parts" / LATEST))
    shown = EventAccumulator(str(tmp_path / "parts/tb_logger/tiny")).Reload()
    assert [event.step for event in shown.Scalars("losses/l_pix")] == list(range(1, 9))


# What the option file says now


def stepped(optimizer: torch.optim.Optimizer, kind: str, steps: int, warmup: int, options: dict):
    """The learning rate of step `steps`, made step by step as BasicSR's `BaseModel` does."""
    scheduler = getattr(lr_scheduler, kind)(optimizer, **options)
    group = optimizer.param_groups[0]
    for step in range(1, steps + 1):
        optimizer.step()
        if step > 1:
            scheduler.step()
        if step < warmup:
            group["lr"] = group["initial_lr"] / warmup * step
    return group["lr"]


def test_a_schedule_is_set_to_where_its_steps_lead(build, fast_options):
    """For any schedule, warm-up and iteration."""
    generator = random.Random(0)
    model = build(fast_options)
    for _ in range(60):
        done, warmup = generator.randint(1, 30), generator.choice([-1, 0, 1, 2, 9, 40])
        kind, options = (
            "CosineAnnealingRestartLR",
            {
                "periods": [7, 9, 20],
                "restart_weights": [1, 0.5, 0.3],
                "eta_min": 1e-5,
            },
        )
        if generator.random() < 0.6:
            milestones = [generator.randint(0, 32) for _ in range(4)]
            restarts = sorted(generator.sample(range(32), 2))
            kind = "MultiStepRestartLR"
            options = {"milestones": milestones, "gamma": 0.3}
            if generator.random() < 0.5:
                options |= {"restarts": restarts, "restart_weights": [1, 0.7]}

        def optimizer() -> torch.optim.Optimizer:
            return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.013)

        expected = stepped(optimizer(), kind, done + 1, warmup, options)
        model.optimizers = [optimizer()]
        model.schedulers = [getattr(lr_scheduler, kind)(model.optimizers[0], **options)]
        model.opt["train"]["warmup_iter"] = warmup
        model._set_schedule(done)
        super(resumable_model.ResumableModel, model).update_learning_rate(done + 1, warmup)
        assert model.get_current_learning_rate() == [expected], (kind, options, warmup, done)


COSINE = {"type": "CosineAnnealingRestartLR", "restart_weights": [1], "eta_min": 0}


@pytest.mark.parametrize(
    ("first", "now", "rate"),
    [
        ({}, {"optim_g": {"type": "Adam", "lr": 1e-4}}, 1e-4),
        ({}, {"scheduler": {"type": "MultiStepLR", "milestones": [3], "gamma": 0.1}}, 5e-4),
        ({}, {"scheduler": COSINE | {"periods": [8]}}, 5e-3 * (1 + math.cos(math.pi / 2)) / 2),
        ({"scheduler": COSINE | {"periods": [8]}}, {"scheduler": COSINE | {"periods": [16]}},
         5e-3 * (1 + math.cos(math.pi / 4)) / 2),
        ({"scheduler": COSINE | {"periods": [8]}},
         {"scheduler": COSINE | {"periods": [8, 8], "restart_weights": [1, 1]}},
         5e-3 * (1 + math.cos(math.pi / 2)) / 2),
        ({"scheduler": COSINE | {"periods": [8]}}, {"warmup_iter": 10}, 2.5e-3),
    ],
    ids=["lr", "milestones", "cosine", "periods", "more periods", "warm-up"],
)  # fmt: skip
def test_the_learning_rate_is_the_option_files(tmp_path, fast_options, run, first, now, rate):
    """At iteration 5 after a resume from 4; the log says what changed."""
    del fast_options["val"], fast_options["datasets"]["val"]
    fast_options["logger"].update(save_checkpoint_freq=4, use_tb_logger=False)
    fast_options["train"] |= {"total_iter": 4, **first}
    run(tmp_path, fast_options)
    fast_options["train"] |= {"total_iter": 6, **now}
    output = run(tmp_path, fast_options, "--auto_resume")
    shown = re.findall(r"iter: +(\d+), lr:\((\S+),\)", output)
    assert shown[0] == ("5", f"{rate:.3e}")
    assert "Resuming with another train:total_iter: 4 -> 6" in output
    (key,) = now
    assert f"Resuming with another train:{key}" in output


def test_all_settings_of_the_optimizer_are_the_option_files(build, fast_options):
    """Muon's `bias_lr` too, which the run may not have had before."""
    fast_options["train"]["optim_g"] = {"type": "Muon", "lr": 1e-3}
    model = build(deepcopy(fast_options))
    train(model, batches(2))
    settings = {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    fast_options["train"]["optim_g"] |= {"lr": 2e-3, "bias_lr": 0.03, "momentum": 0.7, **settings}
    fast_options["train"]["optim_g"]["betas"] = [0.8, 0.9]
    later = go_on(build, fast_options, model, 2)
    later.update_learning_rate(3)
    groups = later.optimizer_g.param_groups
    assert [group["lr"] for group in groups] == [2e-3, 0.03, 2e-3]
    found = [{key: group[key] for key in settings} for group in groups]
    assert found == [settings] * 3
    assert groups[2]["momentum"] == 0.7
    train(later, batches(1))


def test_the_teacher_of_a_resume_is_the_same(build, fast_options):
    """BasicSR changes every `param_key` to params, the teacher's too."""
    model = build(fast_options)
    model.save(0, 1)
    opt = {**model.opt, "auto_resume": True, "network_t": {"type": "RLFN"}}
    opt["path"] |= {"param_key_t": "params_ema", "param_key_g": "params_ema"}
    opt["path"]["ignore_resume_networks"] = ["network_t"]
    assert compat._load_resume_state(opt)["iter"] == 1
    assert (opt["path"]["param_key_t"], opt["path"]["param_key_g"]) == ("params_ema", "params")


def test_amsgrad_may_come_later(build, fast_options):
    model = build(deepcopy(fast_options))
    train(model, batches(1))
    fast_options["train"]["optim_g"]["amsgrad"] = True
    train(go_on(build, fast_options, model, 1), batches(2))


def test_a_state_of_another_optimizer_is_refused(build, fast_options):
    model = build(deepcopy(fast_options))
    train(model, batches(1))
    fast_options["train"]["optim_g"]["type"] = "Muon"
    with pytest.raises(UserError, match="does not fit train:optim_g"):
        go_on(build, fast_options, model, 1)


def test_a_resume_with_another_network_is_refused(tmp_path, fast_options, run, mlrn_here):
    fast_options["train"]["total_iter"] = 10
    del fast_options["val"], fast_options["datasets"]["val"]
    run(tmp_path, fast_options)
    before = sorted(tmp_path.rglob("*"))
    for change, said in (
        ("num_block=2", "net_g_10.pth is not a checkpoint of this MLRN"),
        ("act=lrelu", "net_g_10.pth is of a network with"),
    ):
        force = ["--force_yml", f"network_g:{change}", "train:total_iter=12"]
        path = tmp_path / "tiny.yml"
        code, out, err = mlrn_here("train", "-opt", path, "--auto_resume", *force)
        assert code == 2 and said in err and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


# The best network


@pytest.fixture
def best_options(fast_options) -> dict:
    fast_options["val"].update(save_best="psnr", val_freq=1)
    return fast_options


def loader_of(model):
    opt = model.opt["datasets"]["val"]
    return data.build_dataloader(build_dataset(deepcopy(opt)), opt)


def step_and_validate(model, step: int, quality: float) -> None:
    """Save and validate a network that computes its bilinear branch and noise of 1 / quality."""
    train(model, batches(1), step)
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.net_g_ema.parameters():
            param.copy_(torch.randn_like(param) / quality)
    model.save(0, step)
    model.validation(loader_of(model), step, None)


def best_of(model) -> dict:
    path = os.path.join(model.opt["path"]["models"], "net_g_best.pth")
    return torch.load(path, weights_only=True)["best"]


def resume(build, options: dict, model, step: int):
    """A model that goes on from what an earlier one saved after a step."""
    paths = model.opt["path"]
    state = compat.load_state(f"{paths['training_states']}/{step}.state")
    later = build(deepcopy(options), f"{paths['models']}/net_g_{step}.pth")
    later.opt["path"]["resume_state"] = f"{paths['training_states']}/{step}.state"
    later.resume_training(state)
    later.val_loaders = [loader_of(later)]
    return later


def test_a_resume_keeps_the_best_network(build, best_options):
    model = build(deepcopy(best_options))
    step_and_validate(model, 1, quality=20)
    assert best_of(model)["iter"] == 1
    later = resume(build, best_options, model, 1)
    assert later.best_metric_results["tiny_val"]["psnr"]["iter"] == 1
    step_and_validate(later, 2, quality=10)
    assert best_of(later)["iter"] == 1
    step_and_validate(later, 3, quality=100)
    found = best_of(later)
    assert found["iter"] == 3 and found["val"] == later.metric_results["psnr"]

    # From an older state: that of iteration 3 stays until it is beaten.
    again = resume(build, best_options, model, 1)
    step_and_validate(again, 2, quality=20)
    assert best_of(again) == found
    # The set of a new name cannot be compared.
    renamed = deepcopy(best_options)
    renamed["datasets"]["val"]["name"] = "other"
    again = resume(build, renamed, model, 1)
    step_and_validate(again, 2, quality=2)
    assert best_of(again)["dataset"] == "other" and best_of(again)["iter"] == 1


def test_a_validation_that_a_kill_cut_off_is_made_by_the_resume(build, best_options):
    model = build(deepcopy(best_options))
    train(model, batches(1))
    model.save(0, 1)
    later = resume(build, best_options, model, 1)
    later.update_learning_rate(2)
    assert best_of(later)["iter"] == 1
    state = compat.load_state(f"{later.opt['path']['training_states']}/1.state")
    assert state["validated"] == {"tiny_val": 1}
    assert state["best_metric_results"]["tiny_val"]["psnr"]["iter"] == 1
    before = os.stat(f"{later.opt['path']['models']}/net_g_best.pth").st_mtime_ns
    resume(build, best_options, model, 1).update_learning_rate(2)  # once is enough
    assert os.stat(f"{later.opt['path']['models']}/net_g_best.pth").st_mtime_ns == before


def test_a_stop_in_a_validation_saves_and_the_resume_validates(build, best_options, restore_stop):
    model = build(deepcopy(best_options))
    train(model, batches(1))
    type(model).time_is_up()
    with pytest.raises(SystemExit) as end:
        model.validation(loader_of(model), 1, None)
    assert end.value.code == resumable_model.NOT_FINISHED
    type(model).stop_signal = 0
    later = resume(build, best_options, model, 1)
    later.update_learning_rate(2)
    assert best_of(later)["iter"] == 1


def test_keep_last_and_save_best(tmp_path, fast_options, run):
    fast_options["logger"]["keep_last"] = 2
    fast_options["val"].update(save_best="psnr", val_freq=10)
    run(tmp_path, fast_options)
    experiment = tmp_path / "experiments/tiny"
    names = {path.name for path in (experiment / "models").iterdir()}
    kept = {"net_g_30.pth", "net_g_40.pth", "net_g_latest.pth", "net_g_best.pth"}
    assert names == kept
    states = {path.name for path in (experiment / "training_states").iterdir()}
    assert states == {"30.state", "40.state"}


def test_a_run_reaches_total_iter_whatever_the_batch(tmp_path, fast_options, run):
    """BasicSR counts in epochs, with the batch that the loader drops, and of this batch size."""
    fast_options["datasets"]["train"].update(batch_size_per_gpu=5, dataset_enlarge_ratio=1)
    run(tmp_path, fast_options)
    states = tmp_path / "experiments/tiny/training_states"
    assert (states / "40.state").exists()
    more = "datasets:train:batch_size_per_gpu=2", "train:total_iter=43"
    run(tmp_path, fast_options, "--auto_resume", "--force_yml", *more)
    assert (states / "43.state").exists()  # of the last step, for a run that is longer still
    log = run(tmp_path, fast_options, "--auto_resume", "--force_yml", "train:total_iter=44")
    assert "iter: 43." in log


def test_a_loader_without_a_batch_is_refused(fast_options):
    """What the option check cannot know, such as the processes of slurm; it would never end."""
    opt = fast_options["datasets"]["train"] | {"phase": "train", "scale": 2}
    opt |= {"batch_size_per_gpu": 9, "num_worker_per_gpu": 0}
    dataset = build_dataset(deepcopy(opt))
    sampler = data.ResumableSampler(dataset, 1, 0, 1)
    with pytest.raises(UserError, match="less than one batch; raise dataset_enlarge_ratio"):
        data.build_dataloader(dataset, opt, num_gpu=0, sampler=sampler, seed=0)


def test_a_run_from_an_older_state_keeps_its_own_states(tmp_path, fast_options, run):
    fast_options["logger"]["keep_last"] = 2
    run(tmp_path, fast_options)
    states = tmp_path / "experiments/tiny/training_states"
    more = f"path:resume_state={states}/30.state", "train:total_iter=33"
    run(tmp_path, fast_options, "--force_yml", *more, "logger:save_checkpoint_freq=1")
    assert {path.name for path in states.iterdir()} == {"32.state", "33.state", "40.state"}


def test_a_date_in_a_note_and_options_in_two_parts(tmp_path, fast_options, run):
    more = "--force_yml", "train:x_started=2026-11-27", "--force_yml"
    run(tmp_path, fast_options, *more, "train:total_iter=2")
    log = run(tmp_path, fast_options, "--auto_resume", *more, "train:total_iter=3")
    assert "iter: 2." in log and "Resuming with another train:total_iter: 2 -> 3" in log


# Files


def test_checkpoints_say_which_network_they_are_of_and_load_anywhere(
    tmp_path, build, fast_options, log
):
    spandrel = pytest.importorskip("spandrel")
    from mlrn_arch.checkpoints import noted, read, state_dict
    from mlrn_arch.spandrel import install

    fast_options["network_g"] |= {"img_range": 255.0, "act": "lrelu"}
    fast_options["val"]["save_best"] = "psnr"
    model = build(fast_options)
    train(model, batches(1))
    model.save(0, 1)
    model.save(-1, -1)
    model.validation(loader_of(model), 1, None)
    install()
    image = torch.rand(1, 3, 8, 8)
    expected = model.net_g_ema.eval()(image)
    for name in ("1", "latest", "best"):
        path = f"{model.opt['path']['models']}/net_g_{name}.pth"
        for key in ("params", "params_ema"):
            assert noted(state_dict(read(path), key)) == fast_options["network_g"]
            plain = MLRN(**{k: v for k, v in fast_options["network_g"].items() if k != "type"})
            plain.load_state_dict(torch.load(path, weights_only=True)[key])
        torch.testing.assert_close(plain.eval()(image), expected)
        loaded = spandrel.ModelLoader().load_from_file(path)
        torch.testing.assert_close(loaded.model.eval()(image), expected)
        stock = build_network(deepcopy(fast_options["network_g"]))
        stock_load_network(stock, path)
        torch.testing.assert_close(stock.eval()(image), expected)


def stock_load_network(network: torch.nn.Module, path: str) -> None:
    """What BasicSR 1.4.2's `load_network` does with `param_key: params_ema`."""
    loaded = torch.load(path, map_location=lambda storage, loc: storage)["params_ema"]
    for key, value in deepcopy(loaded).items():
        if key.startswith("module."):
            loaded[key[7:]] = value
            loaded.pop(key)
    network.load_state_dict(loaded, strict=True)


def test_a_full_disk_does_not_end_the_run(build, fast_options, monkeypatch):
    model = build(fast_options)
    train(model, batches(1))
    model.save(0, 1)
    folder = Path(model.opt["path"]["models"])
    saved = weights(folder / "net_g_1.pth")

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        model.save(0, 1)
        model.save(0, 2)
        assert not model.failed  # an earlier save is there
        model.save(-1, -1)
        assert model.failed
    assert [path.name for path in folder.iterdir()] == ["net_g_1.pth"]
    assert equal(saved, weights(folder / "net_g_1.pth"))
    assert os.listdir(model.opt["path"]["training_states"]) == ["1.state"]
    model.save(0, 2)
    assert (folder / "net_g_2.pth").exists()


# Signals


def test_a_repeated_signal_counts_as_a_second_one_only_later(build, fast_options, restore_stop):
    """torchrun passes on a Ctrl-C that the terminal has sent to every process already."""
    kind = type(build(fast_options))
    kind.time_is_up()
    for signum in (signal.SIGTERM, signal.SIGINT):
        kind.ask_to_stop(signum, None)
    assert kind.stop_signal == resumable_model.TIME_IS_UP
    kind.signalled_at = time.monotonic() - 10
    with pytest.raises(KeyboardInterrupt):
        kind.ask_to_stop(signal.SIGINT, None)


@ON_CPU
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path, fast_options, run):
    """They validate to its digits; Ctrl-C saves, and the resume ends where one process does."""
    fast_options["train"]["total_iter"] = 12
    fast_options["val"]["val_freq"] = 5
    fast_options["datasets"]["train"]["dataset_enlarge_ratio"] = 4  # several epochs
    one = run(tmp_path, fast_options, "--force_yml", "name=one",
              "datasets:train:batch_size_per_gpu=8")  # fmt: skip
    path = write_yaml(tmp_path / "tiny.yml", fast_options)
    process = start_training(path, tmp_path, processes=2, start_new_session=True)
    two = ""
    for line in process.stdout:
        two += line
        if "iter:       6," in line:
            os.killpg(process.pid, signal.SIGINT)
    assert process.wait() != 0 and "goes on after iter" in two, two
    process = start_training(path, tmp_path, processes=2)
    two += process.communicate(timeout=300)[0]
    assert process.returncode == 0, two
    expected = {step: float(loss) for step, loss in losses(one).items()}
    found = {step: float(loss) for step, loss in losses(two).items()}
    assert found == pytest.approx(expected, rel=1e-3) and len(found) == 12
    scores = [re.findall(r"# psnr: (\d+\.\d\d)", text) for text in (one, two)]
    assert scores[0] == scores[1] and len(scores[0]) == 3


@ON_CPU
@pytest.mark.slow
def test_resume_after_sigterm_is_bit_identical(tmp_path, fast_options, run):
    fast_options["train"]["optim_g"].update(type="Muon", bias_lr=0.01)  # Adam's states are in it
    fast_options["val"]["val_freq"] = 1
    whole = run(tmp_path / "whole", fast_options)
    path, parts = str(tmp_path / "whole/tiny.yml"), tmp_path / "parts"
    parts.mkdir()
    process = start_training(path, parts)
    first = ""
    for line in process.stdout:
        first += line
        if "iter:      13," in line:
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, first
    stopped = int(re.search(r"goes on after iter (\d+)", first)[1])
    assert 13 <= stopped < 40, first
    second = run(parts, fast_options, "--auto_resume")
    assert f"iter: {stopped}." in second
    assert {**losses(first), **losses(second)} == losses(whole)
    assert equal(weights(tmp_path / "whole" / LATEST), weights(parts / LATEST))
    metric = r"psnr: (\S+)\tBest: (\S+) @ (\d+)"
    assert re.findall(metric, first + second) == re.findall(metric, whole)


@ON_CPU
@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(tmp_path):
    from kill_and_resume import kill_and_resume

    kill_and_resume(tmp_path, kills=3)
