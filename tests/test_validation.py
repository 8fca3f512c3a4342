"""Validations and tests against BasicSR's own, and the images that have no score."""

from __future__ import annotations

import re
import shutil
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataset
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import METRIC_REGISTRY
from conftest import make_fast, write_yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_fast_model import batches, train

from mlrn_arch import data
from mlrn_arch.models import validation

SSIM = {"type": "calculate_ssim", "crop_border": 4, "test_y_channel": True}


def loader_of(model):
    opt = model.opt["datasets"]["val"]
    return data.build_dataloader(build_dataset(deepcopy(opt)), opt)


@pytest.fixture
def odd_images(tmp_path, paired_data) -> Path:
    """The eight images, one of which is black, and one of 16x16; halves in `lq`."""
    for name in ("gt", "lq"):
        shutil.copytree(paired_data / name, tmp_path / name)
    for name, size in (("gt", 1), ("lq", 2)):
        cv2.imwrite(str(tmp_path / f"{name}/black.png"), np.zeros((64 // size, 64 // size, 3)))
        tiny = cv2.imread(str(tmp_path / f"{name}/image3.png"))[: 16 // size, : 16 // size]
        cv2.imwrite(str(tmp_path / f"{name}/tiny.png"), tiny)
    return tmp_path


@pytest.mark.parametrize("kind", ["SRModel", "FastSRModel"])
def test_scores_are_basicsrs(build, train_options, kind):
    train_options["model_type"] = kind
    train_options["val"]["metrics"]["ssim"] = SSIM
    model = build(train_options)
    train(model, batches(2)) if kind == "FastSRModel" else None
    SRModel.nondist_validation(model, loader_of(model), 2, None, False)
    expected = dict(model.metric_results)
    del model.best_metric_results
    validation.validate(model, loader_of(model), 2, None, False)
    assert model.metric_results == pytest.approx(expected, rel=1e-12)
    best = model.best_metric_results["tiny_val"]["ssim"]
    assert best == {"better": "higher", "val": model.metric_results["ssim"], "iter": 2}


@pytest.mark.parametrize("kind", ["SRModel", "FastSRModel"])
def test_a_set_is_scored_without_the_images_that_have_no_score(
    odd_images, test_options, mlrn_here, monkeypatch, log, kind
):
    """Bicubic of a black image is black, so that its PSNR is infinite."""
    monkeypatch.chdir(odd_images)
    test_options["model_type"] = kind
    test_options["network_g"] = {"type": "Bicubic", "upscale": 2}
    test_options["datasets"]["test_1"] |= {"dataroot_gt": "gt", "dataroot_lq": "lq"}
    test_options["val"] |= {"metrics": {"psnr": test_options["val"]["metrics"]["psnr"],
                                        "ssim": SSIM}, "save_img": True}  # fmt: skip
    code, out, err = mlrn_here("test", "-opt", write_yaml(odd_images / "tiny.yml", test_options))
    assert code == 0, err
    psnr, ssim = [], []
    for path in sorted((odd_images / "gt").iterdir()):
        sr = cv2.imread(
            str(odd_images / f"results/tiny/visualization/tiny_val/{path.stem}_tiny.png")
        )
        pair = sr, cv2.imread(str(path))
        if path.stem != "black":
            psnr.append(calculate_psnr(*pair, crop_border=2, test_y_channel=True))
        if path.stem != "tiny":
            ssim.append(calculate_ssim(*pair, crop_border=4, test_y_channel=True))
    assert out.splitlines()[1].split() == [
        "tiny_val", "10", f"{np.mean(psnr):.4f}", f"{np.mean(ssim):.4f}"
    ]  # fmt: skip
    text = log.text
    assert f"# psnr: {np.mean(psnr):.4f}" in text and f"# ssim: {np.mean(ssim):.4f}" in text
    assert "psnr is not finite for lq/black.png (inf); the mean is that of the other 9" in text
    assert "ssim is not finite for lq/tiny.png (nan); the mean is that of the other 9" in text


def test_the_best_is_found_where_an_image_has_no_score(odd_images, build, fast_options):
    fast_options["datasets"]["val"].update(
        dataroot_gt=str(odd_images / "gt"), dataroot_lq=str(odd_images / "lq")
    )
    fast_options["val"].update(metrics={"ssim": SSIM}, save_best="ssim")
    model = build(fast_options)
    train(model, batches(1))
    model.validation(loader_of(model), 1, None)
    best = torch.load(f"{model.opt['path']['models']}/net_g_best.pth", weights_only=True)["best"]
    assert best["val"] == model.metric_results["ssim"] and 0 < best["val"] < 1


def test_nothing_finite_is_no_score(build, fast_options, log):
    model = build(fast_options)
    validation._summarize(model, "black", {"a.png": {"psnr": float("inf")}}, 1, None)
    assert model.metric_results == {}
    assert "black: psnr is not finite for a.png (inf); there is no mean" in log.text


@pytest.mark.parametrize("kind", ["SRModel", "FastSRModel"])
def test_images_without_gt_are_made_and_not_scored(
    tmp_path, test_options, paired_data, mlrn_here, monkeypatch, log, kind
):
    """But for metrics that need no GT."""

    def brightness(img, **kwargs):
        return img.mean()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(METRIC_REGISTRY._obj_map, "brightness", brightness)
    test_options["model_type"] = kind
    test_options["network_g"] = {"type": "Bicubic", "upscale": 2}
    test_options["datasets"]["test_1"] = {
        "name": "photos",
        "type": "SingleImageDataset",
        "dataroot_lq": str(paired_data / "lq"),
        "io_backend": {"type": "disk"},
    }
    test_options["val"]["save_img"] = True
    test_options["val"]["metrics"]["brightness"] = {"type": "brightness"}
    code, _, err = mlrn_here("test", "-opt", write_yaml(tmp_path / "tiny.yml", test_options))
    assert code == 0, err
    made = sorted((tmp_path / "results/tiny/visualization/photos").iterdir())
    assert len(made) == 8
    assert "photos has no GT images: no psnr" in log.text and "# psnr" not in log.text
    mean = np.mean([cv2.imread(str(path)).mean() for path in made])
    assert f"# brightness: {mean:.4f}" in log.text


@pytest.mark.parametrize("kind", ["SRModel", "FastSRModel"])
def test_sets_with_equal_file_names_have_folders_of_their_own(
    tmp_path, train_options, mlrn_here, monkeypatch, restore_stop, log, kind
):
    monkeypatch.chdir(tmp_path)
    fast_options = train_options | {"model_type": kind}
    fast_options["datasets"]["val_2"] = {**fast_options["datasets"]["val"], "name": "other"}
    fast_options["train"]["total_iter"] = 2
    fast_options["val"].update(val_freq=2, save_img=True)
    assert mlrn_here("train", "-opt", write_yaml(tmp_path / "tiny.yml", fast_options))[0] == 0
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("image*_2.png")}
    folder = "experiments/tiny/visualization"
    names = [f"image{i}" for i in range(8)]
    assert made == {f"{folder}/{s}/{n}/{n}_2.png" for s in ("tiny_val", "other") for n in names}
    assert "*only* supported" not in log.text
    # BasicSR validates the last iteration twice.
    times = 1 if kind == "FastSRModel" else 2
    assert [log.text.count(f"Validation {name}\n") for name in ("tiny_val", "other")] == [times] * 2
    shown = EventAccumulator(str(tmp_path / "tb_logger/tiny")).Reload()
    kinds = {f"{name}/{kind}" for name in ("tiny_val", "other") for kind in ("lq", "result", "gt")}
    assert set(shown.Tags()["images"]) == kinds


def test_a_failed_validation_leaves_the_network_in_training(build, fast_options, monkeypatch):
    fast_options["train"]["ema_decay"] = 0
    model = build(fast_options)
    train(model, batches(1))
    monkeypatch.setattr(model.net_g, "forward", lambda lq: lq.no_such_thing)
    model.validation(loader_of(model), 1, None)
    assert model.failed and model.net_g.training


def test_an_image_that_only_decoding_shows_to_be_broken(
    tmp_path, test_options, train_options, paired_data, mlrn_here, monkeypatch, restore_stop, log
):
    """A test names it; a validation too, but training goes on, and ends with another code."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(paired_data / "gt", tmp_path / "gt")
    broken = tmp_path / "gt/image3.png"
    broken.write_bytes(broken.read_bytes()[:60])  # the header and no more
    from conftest import make_train_options

    fast_options = make_fast(make_train_options(paired_data))
    fast_options["datasets"]["val"]["dataroot_gt"] = str(tmp_path / "gt")
    fast_options["train"]["total_iter"] = 4
    fast_options["val"]["val_freq"] = 2
    assert mlrn_here("train", "-opt", write_yaml(tmp_path / "tiny.yml", fast_options))[0] == 1
    assert re.search("Validation of tiny_val failed: .*image3.*; training goes on", log.text)
    assert (tmp_path / "experiments/tiny/models/net_g_latest.pth").exists()

    test_options["datasets"]["test_1"]["dataroot_gt"] = str(tmp_path / "gt")
    test_options["network_g"] = {"type": "Bicubic", "upscale": 2}
    path = write_yaml(tmp_path / "test.yml", test_options)
    code, _, err = mlrn_here("test", "-opt", path)
    assert code == 2 and "Traceback" not in err
    assert re.search("mlrn test: image .*image3.*cannot be used", err)
