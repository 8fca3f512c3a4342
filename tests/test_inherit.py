"""MLRN from RLFN's weights, and training with a teacher."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SHARED, start_training, write_yaml
from torch import nn

from mlrn_arch import checkpoints, create_model, options
from mlrn_arch.archs.mlrn_arch import MLRN
from mlrn_arch.archs.rlfn_arch import RLFN
from mlrn_arch.errors import UserError
from mlrn_arch.inherit import inherit

# isort: split
from basicsr.models import build_model

FORMS = {
    "x2": ({"upscale": 2}, {"upscale": 2}, "rlfn_x2.pth"),
    "x4": ({"upscale": 4}, {"upscale": 4}, "rlfn_x4.pth"),
    "NTIRE": (
        {"upscale": 4, "num_feat": 46, "mid_feat": 48, "num_block": 4},
        {"upscale": 4, "num_feat": 50, "num_block": 4},
        "rlfn_ntire_x4.pth",
    ),
}


def with_third_convolution(network: MLRN, teacher: RLFN) -> MLRN:
    """MLRN with RLFN's third convolution and activation in place of each mixer."""
    for block, theirs in zip(network.body, list(teacher.children())[1:], strict=False):
        width = block.conv2.out_channels
        third = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(third.weight)
        nn.init.zeros_(third.bias)
        rows, columns = theirs.c3_r.weight.shape[:2]
        with torch.no_grad():
            third.weight[:rows, :columns] = theirs.c3_r.weight
            third.bias[:rows] = theirs.c3_r.bias
        block.mixer = nn.Sequential(third, nn.LeakyReLU(0.05))
    return network


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("img_range", "mixer"), [(1, "convmix"), (255, "pointwise")])
def test_with_rlfns_third_convolution_mlrn_is_rlfn(form, img_range, mixer):
    rlfn, mlrn, file = FORMS[form]
    teacher = RLFN(**rlfn).eval()
    if (SHARED / "teachers" / file).exists():  # else as it is initialised
        published = torch.load(SHARED / "teachers" / file, map_location="cpu", weights_only=True)
        teacher.load_state_dict(published)
    network = MLRN(**mlrn, img_range=img_range, mixer=mixer, act="lrelu").eval()
    inherit(network, teacher.state_dict(), 255)
    with_third_convolution(network, teacher)
    images = torch.rand(2, 3, 33, 41)
    with torch.inference_mode():
        difference = network(images) - teacher(images)
    border = 2 * rlfn["upscale"]
    assert difference[..., border:-border, border:-border].abs().max() < 1e-5


def test_inheriting_from_mlrn_folds_the_image_range():
    torch.manual_seed(0)
    before = MLRN(num_feat=8, num_block=2, upscale=3, img_range=255).eval()
    after = MLRN(num_feat=8, num_block=2, upscale=3, img_range=1).eval()
    inherit(after, before.state_dict(), 255)
    images = torch.rand(1, 3, 20, 20)
    with torch.inference_mode():
        torch.testing.assert_close(after(images), before(images), rtol=1e-4, atol=1e-6)


def test_an_upsampler_of_another_scale_draws_the_same_picture():
    """An upsampler that repeats pixels does so at any scale; its other filters lie between."""
    torch.manual_seed(0)
    before = MLRN(num_feat=4, num_block=1, upscale=4, bilinear=False)
    weight = torch.randn(3, 1, 4, 3, 3).expand(-1, 16, -1, -1, -1)
    with torch.no_grad():
        before.upsampler[0].weight.copy_(weight.flatten(0, 1))
        before.upsampler[0].bias.zero_()
    after = MLRN(num_feat=4, num_block=1, upscale=3, bilinear=False)
    inherit(after, before.state_dict(), 1)
    images = torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(after(images)[..., ::3, ::3], before(images)[..., ::4, ::4])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_block": 5}, "RLFN has 6 blocks, 52 features .* MLRN needs the same blocks"),
        ({"num_feat": 52}, "and 55 features"),
        ({"mixer": "none"}, "mixer: none"),
        ({"esa_feat": 8}, "larger than this MLRN's"),
    ],
)
def test_what_cannot_inherit_is_told(change, said):
    with pytest.raises(ValueError, match=said):
        inherit(MLRN(**change), RLFN().state_dict(), 255)


def test_inheriting_from_a_stranger_is_told():
    with pytest.raises(ValueError, match="neither RLFN's weights nor MLRN's"):
        inherit(MLRN(), nn.Conv2d(3, 3, 3).state_dict(), 255)
    tiny = {"num_feat": 8, "num_block": 1}
    state = checkpoints.note(MLRN(**tiny, act="lrelu").state_dict(), {**tiny, "act": "lrelu"})
    with pytest.raises(ValueError, match="act: lrelu"):
        inherit(MLRN(**tiny), state, 1)
    with pytest.raises(ValueError, match="other features, blocks or mixer"):
        inherit(MLRN(**tiny, mixer="pointwise"), state, 1)


@pytest.mark.parametrize("key", ["path:pretrain_network_g", "train:inherit_network_g"])
def test_a_rate_that_would_destroy_the_weights_is_refused(fast_options, tmp_path, log, key):
    """In range 1 the last weights of the shipped networks are smaller than a step of Adam."""
    fast_options["network_g"] = {"type": "MLRN", "upscale": 2}
    path = write_yaml(tmp_path / "t.yml", fast_options)
    force = ["-opt", path, "--force_yml", f"{key}=mlrn://x2", "train:optim_g:lr=5e-5"]
    with pytest.raises(UserError, match=f"{key}: the last layer's .*options/finetune_MLRN_x2.yml"):
        options.read("train", force)
    opt, _, _ = options.read("train", [*force, "network_g:img_range=255"])
    with pytest.raises(UserError, match=f"{key}: the last layer's .* lower train:optim_g:lr to"):
        options.read("train", [*force, "network_g:img_range=255", "train:optim_g:lr=0.05"])
    if key == "path:pretrain_network_g":  # and it starts as what it was
        model = build_model(opt)
        x = torch.rand(1, 3, 32, 32)
        with torch.inference_mode():
            wanted = create_model("MLRN_x2", pretrained=True)(x)
            for network in (model.net_g, model.net_g_ema):
                torch.testing.assert_close(network(x), wanted, rtol=0, atol=1e-5)
        assert "MLRN_x2.pth: converted from img_range 1 to 255" in log.text


@pytest.fixture
def teacher(tmp_path) -> str:
    """A checkpoint of `RLFN(num_feat=4, num_block=2, esa_feat=4, upscale=2)`."""
    torch.manual_seed(1)
    rlfn = RLFN(num_feat=4, num_block=2, esa_feat=4, upscale=2)
    torch.save(rlfn.state_dict(), tmp_path / "rlfn.pth")
    return str(tmp_path / "rlfn.pth")


@pytest.fixture
def distill_options(fast_options, teacher) -> dict:
    """A run of `fast_options` that inherits from RLFN and has it as a teacher."""
    tiny = {"num_block": 2, "esa_feat": 4, "upscale": 2}
    fast_options["model_type"] = "DistillModel"
    fast_options["network_g"] = {"type": "MLRN", "num_feat": 8, "img_range": 255, **tiny}
    fast_options["network_t"] = {"type": "RLFN", "num_feat": 4, **tiny}
    fast_options["path"] = {"pretrain_network_t": teacher}
    fast_options["train"] |= {"distill_opt": {"stage": "blocks"}, "inherit_network_g": teacher}
    fast_options["train"]["optim_g"]["lr"] = 0.001
    return fast_options


def test_blocks_are_fed_and_compared_with_the_teachers(build, distill_options):
    """With RLFN's own mixers in the student, every block computes what its teacher computes."""
    distill_options["network_g"]["act"] = "lrelu"
    distill_options["train"]["distill_opt"]["block_weight"] = 0.5
    distill_options["path"]["ignore_resume_networks"] = "network_d"
    model = build(distill_options)
    # A resume would look for the teacher in the run.
    assert model.opt["path"]["ignore_resume_networks"] == ["network_d", "network_t"]
    network = model.get_bare_model(model.net_g)
    with_third_convolution(network, model.net_t)
    batch = {"lq": torch.rand(2, 3, 24, 24), "gt": torch.rand(2, 3, 48, 48), "lq_path": ["a", "b"]}
    model.feed_data(batch)
    none = 2 * torch.tensor(1e-4).log()  # of two blocks without an error
    torch.testing.assert_close(model.losses()["l_blocks"], 0.5 * none, rtol=1e-3, atol=0)

    # A fault in the first block is seen in its own error alone, for the second is fed the teacher's
    # features; in a chain both have it.
    with torch.no_grad():
        network.body[0].conv3.bias[:4] += 1.0
    first = model.losses()["l_blocks"] / 0.5 - none / 2
    assert first > none / 2 + 1
    model.stage = "chain"
    assert model.losses()["l_blocks"] / 0.5 - none / 2 > first + 1


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_output_learns_from_teacher_and_gt(build, distill_options, share):
    distill_options["train"]["distill_opt"] = {"stage": "output", "gt_weight": share}
    model = build(distill_options)
    gt = torch.rand(2, 3, 48, 48)
    model.feed_data({"lq": torch.rand(2, 3, 24, 24), "gt": gt, "lq_path": ["a", "b"]})
    losses = model.losses()
    assert list(losses) == ["l_pix"]
    taught = model.net_t(model.lq)
    to_gt, to_teacher = ((model.output - target).abs().mean() for target in (gt, taught))
    torch.testing.assert_close(losses["l_pix"], share * to_gt + (1 - share) * to_teacher)


def test_a_student_learns_its_teachers_blocks(build, distill_options):
    model = build(distill_options)
    torch.manual_seed(2)
    errors = []
    for step in range(1, 41):
        lq = torch.rand(4, 3, 24, 24)
        model.update_learning_rate(step)
        model.feed_data({"lq": lq, "gt": torch.rand(4, 3, 48, 48), "lq_path": list("abcd")})
        model.optimize_parameters(step)
        errors.append(model.get_current_log()["l_blocks"])
    assert sum(errors[-5:]) < sum(errors[:5]) - 5
    assert not any(parameter.requires_grad for parameter in model.net_t.parameters())


def test_resume_with_a_teacher_is_bit_identical(tmp_path, distill_options, mlrn_here, monkeypatch):
    distill_options["train"]["total_iter"] = 12
    distill_options["logger"]["save_checkpoint_freq"] = 6
    path = write_yaml(tmp_path / "tiny.yml", distill_options)
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    assert mlrn_here("train", "-opt", path)[0] == 0
    monkeypatch.chdir(tmp_path / "parts")
    assert mlrn_here("train", "-opt", path)[0] == 0
    experiment = tmp_path / "parts" / "experiments" / "tiny"
    (experiment / "training_states" / "12.state").unlink()
    (experiment / "models" / "net_g_latest.pth").unlink()
    assert mlrn_here("train", "-opt", path, "--auto_resume")[0] == 0
    latest = "experiments/tiny/models/net_g_latest.pth"
    one, other = (torch.load(tmp_path / f / latest, weights_only=True) for f in ("whole", "parts"))
    for key in one:
        assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the processes would want a GPU each")
def test_two_processes_learn_as_one_with_twice_the_batch(
    tmp_path, distill_options, mlrn_here, monkeypatch, log
):
    monkeypatch.chdir(tmp_path)
    distill_options["train"]["total_iter"] = 6
    path = write_yaml(tmp_path / "tiny.yml", distill_options)
    force = ["--force_yml", "name=one", "datasets:train:batch_size_per_gpu=8"]
    assert mlrn_here("train", "-opt", path, *force)[0] == 0
    process = start_training(path, tmp_path, processes=2)
    two, _ = process.communicate(timeout=300)
    assert process.returncode == 0, two
    l_pix = [[float(x) for x in re.findall(r"l_pix: (\S+)", text)] for text in (log.text, two)]
    assert l_pix[1] == pytest.approx(l_pix[0], rel=1e-2) and len(l_pix[1]) == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("network_g:num_block=3", "the student has 3 blocks of 8 features, the teacher 2 of 4"),
        ("network_t:type=SRCNN", "SRCNN takes no"),
        ("model_type=DistilModel", "did you mean DistillModel"),
        ("network_t=none", "nor does spandrel know it"),
        ("path:pretrain_network_t=none", "an untrained teacher teaches nothing"),
        ("path:pretrain_network_t=gone.pth", "no such file gone.pth"),
        ("train:distill_opt:stage=block", "must be blocks, chain or output, not 'block'"),
        ("train:distill_opt:gt_weight=2", "must be a number from 0 to 1, not 2"),
        ("train:distill_opt:gt_wieght=0.5", "did you mean gt_weight?"),
        ("train:inherit_network_g=gone.pth", "gone.pth"),
        ("train:compile=true", "needs stage: output"),
        ("network_g:num_feat=6", "and 7 features"),
    ],
)
def test_what_does_not_fit_is_told_first(
    tmp_path, distill_options, mlrn_here, monkeypatch, change, said
):
    monkeypatch.chdir(tmp_path)
    distill_options["train"]["distill_opt"]["gt_weight"] = 0
    path = write_yaml(tmp_path / "tiny.yml", distill_options)
    code, _, err = mlrn_here("train", "-opt", path, "--force_yml", change)
    assert code == 2 and said in err and not (tmp_path / "experiments").exists()


@pytest.mark.slow
def test_the_recipes_run_one_after_the_other(tmp_path, mlrn_here, monkeypatch):
    """In the order of train_all.sh, each from what the one before saved; teachers untrained."""
    monkeypatch.chdir(tmp_path)
    for _, (rlfn, _, file) in FORMS.items():
        torch.save(RLFN(**rlfn).state_dict(), file)
    shutil.copytree(REPOSITORY / "options", "options")
    generator = np.random.default_rng(0)
    os.mkdir("photos")
    cv2.imwrite("photos/a.png", generator.integers(0, 256, (144, 144, 3), dtype=np.uint8))
    arguments = "photos", "datasets/photos", "--crop-size", 144, "--step", 144
    assert mlrn_here("prepare", *arguments)[0] == 0
    for scale in (2, 3, 4):
        os.symlink("photos", f"datasets/photos_x{scale}")
    script = Path("options/weights/train_all.sh").read_text()
    stages = re.search("for stage in (.+);", script)[1].split()
    recipes = {f"train_MLRN_{stage}.yml" for stage in stages}
    assert recipes == {path.name for path in Path("options/weights").glob("*.yml")}
    short = "train:total_iter=2", "datasets:train:gt_size=48", "datasets:train:batch_size_per_gpu=2"
    for stage in stages:
        path = f"options/weights/train_MLRN_{stage}.yml"
        code, out, err = mlrn_here("train", "-opt", path, "--auto_resume", "--force_yml", *short)
        assert code == 0, out + err
        assert (tmp_path / f"experiments/MLRN_{stage}/models/net_g_latest.pth").exists()


def test_a_time_limit_saves_and_says_not_finished(
    tmp_path, fast_options, mlrn_here, monkeypatch, restore_stop
):
    monkeypatch.chdir(tmp_path)
    fast_options["train"]["total_iter"] = 100000
    path = write_yaml(tmp_path / "tiny.yml", fast_options)
    assert mlrn_here("train", "-opt", path, "--time_limit", "0.05")[0] == 75
    states = list((tmp_path / "experiments" / "tiny" / "training_states").iterdir())
    assert states


def test_export_in_another_image_range(tmp_path, mlrn_here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = MLRN(num_feat=8, num_block=1, upscale=2, img_range=255).eval()
    torch.save({"params": trained.state_dict()}, "net.pth")
    network_g = {"type": "MLRN", "num_feat": 8, "num_block": 1, "upscale": 2, "img_range": 255}
    write_yaml(tmp_path / "net.yml", {"network_g": network_g})
    arguments = ["net.yml", "out.pth", "--weights", "net.pth", "--img-range", 1]
    assert mlrn_here("export", *arguments)[0] == 0
    exported = MLRN(num_feat=8, num_block=1, upscale=2, img_range=1).eval()
    exported.load_state_dict(torch.load("out.pth", weights_only=True)["params"])
    images = torch.rand(1, 3, 20, 20)
    with torch.inference_mode():
        torch.testing.assert_close(exported(images), trained(images), rtol=1e-4, atol=1e-6)
