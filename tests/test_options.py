"""Every refusal of the option check, its message, and that nothing is created by it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import urllib.error
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, mlrn, write_yaml
from PIL import Image

from mlrn_arch import checks, options
from mlrn_arch.errors import UserError


def read(folder: Path, opt: dict, phase: str = "train", *arguments: str) -> tuple:
    return options.read(phase, ["-opt", write_yaml(folder / "options.yml", opt), *arguments])


def change(opt: dict, where: str, value: object) -> None:
    *sections, key = where.split(":")
    for section in sections:
        opt = opt[section]
    opt[key] = value


REFUSED = [
    ("network_g:type", "MLRM", "network_g:type: unknown 'MLRM'; did you mean MLRN"),
    ("network_g:num_feats", 8, "network_g: MLRN takes no 'num_feats'; did you mean num_feat"),
    ("network_g:mixer", "attention", "network_g: MLRN refuses these arguments: mixer must be"),
    ("network_g:upscale", 4, "network_g:upscale: is 4 but scale is 2"),
    ("scale", 4, "lq's least side is 32, that of gt 64: that is not x4"),
    ("model_type", "SRmodel", "model_type: unknown 'SRmodel'; did you mean SRModel"),
    ("datasets:train:type", "PairedImagesDataset", "did you mean PairedImageDataset"),
    ("datasets:train:dataroot_gt", "/no/gt.lmdb", "datasets:train:dataroot_gt: no such folder"),
    ("datasets:val:dataroot_lq", "/no/lq", "datasets:val:dataroot_lq: no such folder"),
    ("datasets:val:dataroot_lq", None, "datasets:val:dataroot_lq: is missing"),
    ("datasets:train:io_backend:type", "disk", "gt.lmdb is an LMDB; set io_backend:type to lmdb"),
    ("datasets:val:io_backend:type", "lmdb", "is a plain folder, no LMDB; set io_backend:type"),
    ("datasets:val:io_backend:type", "lmbd", "must be disk, lmdb or memcached, not 'lmbd'"),
    ("datasets:train:gt_size", 31, "datasets:train:gt_size: 31 is not a multiple of the scale 2"),
    ("datasets:train:gt_size", 128, "gt_size: 128 is larger than the smallest image (64)"),
    ("datasets:train:batch_size_per_gpu", 900, "8 images are less than one batch of 900"),
    ("train:pixel_opt:type", "L1", "train:pixel_opt:type: unknown 'L1'; did you mean L1Loss"),
    ("train:pixel_opt", None, "train: has no loss"),
    ("train:pixel_opt:reduction", "median", "L1Loss refuses these arguments: Unsupported reduc"),
    ("train:pixel_opt", "L1Loss", "train:pixel_opt: must be a section of `key: value` lines"),
    ("train:optim_g:type", "adam", "train:optim_g:type: unknown 'adam'; did you mean Adam"),
    ("train:scheduler:type", "Step", "train:scheduler:type: unknown 'Step'"),
    ("train:total_iter", None, "train:total_iter: is missing"),
    ("val:metrics:psnr:type", "psnr", "unknown 'psnr'; did you mean calculate_psnr"),
    ("val:metrics:psnr", {"type": "calculate_psnr"}, "calculate_psnr needs crop_border"),
    ("val:val_freq", None, "val:val_freq: is missing"),
    ("datasets:train:type", "FastPairedImageDataset", "gives bytes, which FastSRModel alone takes"),
    ("path:pretrain_network_g", "/no/net.pth", "no such file /no/net.pth"),
    ("path:pretrain_network_g", "experiments/tiny/net.pth", "a new run tiny would move this file"),
    ("train:precison", "bf16", "train:precison: nothing reads it; did you mean precision?"),
    ("datasets:train:gt_sise", 64, "nothing reads it; did you mean gt_size?"),
    ("notes", "mine", "notes: nothing reads it; your own notes begin with x_"),
    ("train:scheduler:gama", 0.5, "train:scheduler: MultiStepLR takes no 'gama'; did you mean"),
    ("train:optim_g:wieght_decay", 0, "train:optim_g: Adam takes no 'wieght_decay'; did you"),
    ("name", 20240101, "name: must be the name of a folder, without / and in quotes if it"),
    ("name", "a/b", "name: must be the name of a folder"),
    ("scale", "x4", "scale: must be a whole number, 1 or more, not the text 'x4'"),
    ("datasets:train:batch_size_per_gpu", 0, "batch_size_per_gpu: must be a whole number, 1"),
    ("datasets:train:num_worker_per_gpu", -1, "num_worker_per_gpu: must be a whole number, 0"),
    ("datasets:train:prefetch_mode", "gpu", "prefetch_mode: must be cuda or cpu, not 'gpu'"),
    ("datasets:val:filename_tmpl", "x4", "filename_tmpl: must be text with one {}, not 'x4'"),
    ("logger:print_freq", 0, "logger:print_freq: must be a whole number, 1 or more, not 0"),
    ("path:resume_state", "/no/5.state", "path:resume_state: no such file /no/5.state"),
    ("val:metrics:psnr:crop_border", "2px", "crop_border: must be a whole number, 0 or more"),
]


@pytest.mark.parametrize(("where", "value", "message"), REFUSED)
def test_refusal(tmp_path, monkeypatch, train_options, where, value, message):
    monkeypatch.chdir(tmp_path)
    change(train_options, where, value)
    with pytest.raises(UserError) as error:
        read(tmp_path, train_options)
    assert message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["options.yml"]


def test_refusals_of_fast_options(tmp_path, fast_options):
    fast_options["val"].update(save_best="ssim")
    fast_options["train"]["optim_g"]["foreach"] = True
    with pytest.raises(UserError, match="`fused` and `foreach` cannot be `True` together"):
        read(tmp_path, fast_options)
    fast_options["train"]["optim_g"]["fused"] = False
    with pytest.raises(UserError) as error:
        read(tmp_path, fast_options)
    for message in (
        "train:optim_g:fused: FastSRModel sets it; leave it out",
        "val:save_best: unknown 'ssim'; known are psnr; it must be one of val:metrics",
    ):
        assert message in str(error.value)


def test_sets_have_places_and_names(tmp_path, train_options, monkeypatch):
    sets = train_options["datasets"]
    sets |= {"val_2": deepcopy(sets["val"]), "train_2": deepcopy(sets["train"])}
    roots = {name: sets["val"][name] for name in ("dataroot_gt", "dataroot_lq")}
    sets["train"] |= {"io_backend": {"type": "disk"}, "dataset_enlarge_ratio": 1}
    sets["train"] |= {"dataroot_gt": roots["dataroot_lq"], "dataroot_lq": roots["dataroot_gt"]}
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError) as error:
        read(tmp_path, train_options)
    for message in (
        "datasets: 2 of them have the name tiny_val; each needs its own",
        "datasets:train_2: BasicSR knows datasets by the names train, val",
        "is 64x64 and its gt 32x32: that is not x2 (and 5 more)",
        "8 images are less than one batch of 12",
    ):
        assert message in str(error.value)


def test_a_file_where_a_folder_belongs(tmp_path, train_options, mlrn_here, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").touch()
    code, _, err = mlrn_here("train", "-opt", write_yaml(tmp_path / "tiny.yml", train_options))
    assert code == 2 and re.search("mlrn train: .*experiments.*: Not a directory\n", err)
    assert "Traceback" not in err
    (tmp_path / "experiments").unlink()
    (tmp_path / "experiments/tiny").mkdir(parents=True)  # which a new run would move
    with pytest.raises(UserError, match="is in the folder of its run; copy it"):
        read(tmp_path / "experiments/tiny", train_options)


def test_what_the_headers_of_test_images_tell(tmp_path, test_options, paired_data):
    """Nothing is started; stock ends in a traceback, in the middle."""
    dataset = test_options["datasets"]["test_1"]
    for name in ("gt", "lq"):
        shutil.copytree(paired_data / name, tmp_path / name)
        dataset[f"dataroot_{name}"] = str(tmp_path / name)
    (tmp_path / "lq/image1.png").write_bytes(b"")
    (tmp_path / "lq/image2.png").write_bytes(b"no image")
    cv2.imwrite(str(tmp_path / "lq/image3.png"), np.zeros((16, 16, 3), np.uint8))
    dataset["color"] = "y"
    with pytest.raises(UserError) as error:
        read(tmp_path, test_options, "test")
    for message in (
        "lq/image1.png is no image, or a broken one",
        "lq/image2.png is no image, or a broken one",
        "lq/image3.png is 16x16 and its gt 64x64: that is not x2",
        "gives 1 channel(s), network_g takes 3; leave color out",
    ):
        assert message in str(error.value)
    for name in ("gt", "lq"):
        (tmp_path / name / "deep").mkdir()
        for path in (tmp_path / name).glob("*.png"):
            path.rename(path.parent / "deep" / path.name)
    with pytest.raises(UserError, match="gt itself; sub-folders are not read"):
        read(tmp_path, test_options, "test")


def test_pairs_are_compared_as_opencv_turns_them(tmp_path, test_options):
    """BasicSR reads by OpenCV, which turns images by their EXIF orientation."""
    picture = cv2.resize(
        np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8), (64, 96)
    )  # upright, 64 wide
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(picture)))  # as a camera stores it
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to view
    dataset = test_options["datasets"]["test_1"]
    for name in ("gt", "lq"):
        (tmp_path / name).mkdir()
        dataset[f"dataroot_{name}"] = str(tmp_path / name)

    def check(gt: Image.Image, lq: Image.Image) -> str:
        gt.save(tmp_path / "gt/a.jpg", exif=exif, quality=95)
        lq.save(tmp_path / "lq/a.jpg", quality=95)
        with pytest.raises(UserError) as error:
            read(tmp_path, test_options, "test")
        return str(error.value)

    upright = Image.fromarray(picture)
    assert "test_1" not in check(turned, upright.resize((32, 48)))
    assert cv2.imread(str(tmp_path / "gt/a.jpg")).shape == (96, 64, 3)
    assert "is 48x32 and its gt 64x96, as OpenCV turns" in check(turned, turned.resize((48, 32)))
    square = turned.crop((0, 0, 64, 64))
    right = square.transpose(Image.Transpose.ROTATE_270)
    assert "test_1" not in check(square, right.resize((32, 32)))
    assert "are turned differently by their EXIF orientation" in check(
        square, square.resize((32, 32))
    )


def test_a_meta_file_in_the_home_folder_with_an_empty_line(
    tmp_path, test_options, paired_data, monkeypatch
):
    test_options["network_g"] = {"type": "Bicubic", "upscale": 2}
    monkeypatch.setenv("HOME", str(tmp_path))
    test_options["datasets"]["test_1"]["meta_info_file"] = "~/meta.txt"
    names = [f"image{i}.png (64,64,3)\n" for i in range(8)]
    (tmp_path / "meta.txt").write_text("".join(names))
    read(tmp_path, test_options, "test")
    (tmp_path / "meta.txt").write_text("".join([*names, "\n"]))
    with pytest.raises(UserError, match="meta.txt has an empty line; take it out"):
        read(tmp_path, test_options, "test")


def test_a_network_of_one_channel_takes_no_colour(tmp_path, train_options):
    train_options["network_g"].update(num_in_ch=1, num_out_ch=1)
    with pytest.raises(UserError) as error:
        read(tmp_path, train_options)
    for dataset in ("train", "val"):
        message = f"datasets:{dataset}: gives 3 channel(s), network_g takes 1; set color: y"
        assert message in str(error.value)


def test_wandb_is_looked_for_before_anything_is_moved(tmp_path, train_options, monkeypatch):
    train_options["logger"].update(use_tb_logger=False, wandb={"project": "mlrn"})
    monkeypatch.setattr(checks, "missing", lambda *names: [n for n in names if n == "wandb"])
    with pytest.raises(UserError) as error:
        read(tmp_path, train_options)
    assert "set use_tb_logger: true" in str(error.value)
    assert "pip install wandb" in str(error.value)


def test_a_key_without_a_value_is_not_there(build, fast_options):
    """BasicSR's own `get(key, default)` gives None then, which fails in the middle of a run."""
    for where in ("train:ema_decay", "train:precision", "train:warmup_iter", "val:precision"):
        change(fast_options, where, None)
    for key in ("dataset_enlarge_ratio", "filename_tmpl"):
        fast_options["datasets"]["train"][key] = None
    model = build(fast_options)
    assert model.precision == model.val_precision == "fp32" and model.ema_decay == 0
    assert model.opt["train"]["warmup_iter"] == -1
    assert model.opt["datasets"]["train"]["filename_tmpl"] == "{}"


def test_vgg_is_there_before_a_training_starts(tmp_path, train_options, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    monkeypatch.chdir(tmp_path)
    weights = {"conv5_4": 1}
    train_options["train"]["perceptual_opt"] = {"type": "PerceptualLoss", "layer_weights": weights}
    with pytest.raises(UserError, match="VGG19 cannot be downloaded; put https://.* at exp.*pth"):
        read(tmp_path, train_options)


def test_periods_must_last(tmp_path, train_options):
    """BasicSR's schedule ends in a TypeError at the first step after its last period."""
    scheduler = {"type": "CosineAnnealingRestartLR", "periods": [30], "restart_weights": [1]}
    train_options["train"]["scheduler"] = scheduler
    with pytest.raises(UserError, match="train:scheduler:periods: end at 30, before total_iter"):
        read(tmp_path, train_options)


def test_a_right_file_is_not_refused(tmp_path, train_options):
    train_options["x_mine"] = train_options["train"]["x_why"] = "a note"
    train_options["val"]["val_freq"] = 2e1  # BasicSR's files have !!float 5e3
    train_options["datasets"]["train"]["dataroot_gt"] += "/"
    opt, _, _ = read(tmp_path, train_options)
    assert isinstance(opt["val"]["val_freq"], int)
    assert opt["datasets"]["train"]["dataroot_gt"].endswith("gt.lmdb")
    assert opt["path"]["models"].endswith("experiments/tiny/models")


def test_all_faults_are_listed_at_once(tmp_path, train_options):
    for where in ("network_g:type", "model_type", "train:pixel_opt:type"):
        change(train_options, where, "nothing")
    with pytest.raises(UserError, match="has 3 faults"):
        read(tmp_path, train_options)


def test_lmdb_without_meta_info_and_with_other_keys(tmp_path, train_options, paired_data):
    for name in ("gt", "lq"):
        shutil.copytree(paired_data / f"{name}.lmdb", tmp_path / f"{name}.lmdb")
        train_options["datasets"]["train"][f"dataroot_{name}"] = str(tmp_path / f"{name}.lmdb")
    meta_info = tmp_path / "gt.lmdb/meta_info.txt"
    lines = meta_info.read_text().splitlines(keepends=True)
    meta_info.write_text("".join(lines[1:]))
    with pytest.raises(UserError, match="lq and gt are no pairs: Keys in"):
        read(tmp_path, train_options)
    meta_info.unlink()
    with pytest.raises(UserError, match="has no meta_info.txt"):
        read(tmp_path, train_options)


@pytest.mark.parametrize("size", [0.5, 0])
def test_a_damaged_lmdb(tmp_path, train_options, paired_data, size):
    shutil.copytree(paired_data / "gt.lmdb", tmp_path / "gt.lmdb")
    train_options["datasets"]["train"]["dataroot_gt"] = str(tmp_path / "gt.lmdb")
    file = tmp_path / "gt.lmdb/data.mdb"
    os.truncate(file, int(file.stat().st_size * size))
    with pytest.raises(UserError, match="data.mdb is truncated or broken; copy it again"):
        read(tmp_path, train_options)


def test_folder_pair_without_partner(tmp_path, train_options, paired_data):
    shutil.copytree(paired_data / "lq", tmp_path / "lq")
    (tmp_path / "lq/image0.png").rename(tmp_path / "lq/other.png")
    train_options["datasets"]["val"]["dataroot_lq"] = str(tmp_path / "lq")
    with pytest.raises(UserError, match="no pairs: image0.png is not in lq_paths"):
        read(tmp_path, train_options)
    for path in (tmp_path / "lq").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="lq is empty"):
        read(tmp_path, train_options)


def test_checkpoints_that_do_not_fit(tmp_path, train_options):
    from mlrn_arch.archs.mlrn_arch import MLRN

    path = tmp_path / "net.pth"
    train_options["path"]["pretrain_network_g"] = str(path)
    other = {"upscale": 3, "num_feat": 8, "num_block": 1, "esa_feat": 4}
    torch.save({"params": MLRN(**other).state_dict()}, path)
    with pytest.raises(UserError, match=r"other shapes: upsampler.0.weight \(\(27, 8, 3, 3\)"):
        read(tmp_path, train_options)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"lacks conv_first.weight.* and \d+ more; the network has"):
        read(tmp_path, train_options)
    for torn in (path.read_bytes()[:100], b""):
        path.write_bytes(torn)
        with pytest.raises(UserError, match="is no whole PyTorch checkpoint"):
            read(tmp_path, train_options)
    torch.save({"params": np.random.default_rng(0)}, path)
    with pytest.raises(UserError, match=r"no whole .*\(Unsupported global: [^\n]*numpy[^\n]*\)"):
        read(tmp_path, train_options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: !!python/object/apply:os.system ['touch pwned']", r"line 2: .*python/object"),
        ("name: [1", "not valid YAML"),
        ("only text", "has no `key: value` lines"),
    ],
)
def test_unsafe_or_broken_files(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "options.yml"
    path.write_text(f"# comment\n{text}\n")
    with pytest.raises(UserError, match=f"options.yml.*{message}"):
        options.read("train", ["-opt", str(path)])
    assert not (tmp_path / "pwned").exists()
    with pytest.raises(UserError, match="there is no option file"):
        options.read("train", ["-opt", str(tmp_path / "none.yml")])


def test_force_yml(tmp_path, train_options):
    del train_options["path"]  # as short files do
    forced = ["train:optim_g:lr=5e-4", "datasets:val=none", "val=none", "path:param_key_g=a=b"]
    opt, _, _ = read(tmp_path, train_options, "train", "--force_yml", *forced)
    assert opt["train"]["optim_g"]["lr"] == 5e-4
    assert list(opt["datasets"]) == ["train"] and "val" not in opt
    assert opt["path"]["param_key_g"] == "a=b"
    for entry, message in {
        "train:total_iters=3": "did you mean total_iter",
        "training:total_iter=3": "no section training",
        "name": "KEY:KEY=VALUE",
        "name=!!python/name:os.system": "name: must be the name of a folder",
    }.items():
        with pytest.raises(UserError, match=message):
            read(tmp_path, train_options, "train", "--force_yml", entry)


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what is adapted without a GPU")
def test_what_needs_a_gpu_is_adapted_and_said(tmp_path, train_options):
    train_options["num_gpu"] = 2
    train_options["datasets"]["train"]["num_worker_per_gpu"] = 1000
    opt, _, notes = read(tmp_path, train_options)
    train = opt["datasets"]["train"]
    assert opt["num_gpu"] == 0 and not train["pin_memory"] and train["prefetch_mode"] is None
    assert train["num_worker_per_gpu"] < 1000
    assert "datasets:train: prefetch_mode and pin_memory off: they need a GPU" in notes
    assert any(note.startswith("num_gpu: 2 -> 0") for note in notes)


def test_a_test_set_that_is_not_on_disk_is_skipped(tmp_path, test_options):
    test_options["network_g"] = {"type": "Bicubic", "upscale": 2}
    sets = test_options["datasets"]
    sets["test_2"] = {**sets["test_1"], "name": "B100", "dataroot_gt": "no", "dataroot_lq": "no"}
    opt, _, notes = read(tmp_path, test_options, "test")
    assert list(opt["datasets"]) == ["test_1"] and "Skipping B100: no no" in notes
    del sets["test_1"]
    with pytest.raises(UserError, match="datasets:test_2:dataroot_gt: no such folder"):
        read(tmp_path, test_options, "test")
    sets["test_3"] = {**sets["test_2"], "name": "Urban100", "dataroot_gt": "nor"}
    with pytest.raises(UserError, match="has 1 fault.*\n.*none of these exists: no, nor; one"):
        read(tmp_path, test_options, "test")


def test_random_weights_are_not_scored(tmp_path, test_options):
    test_options["path"]["pretrain_network_g"] = None
    with pytest.raises(UserError, match="path:pretrain_network_g: is missing; .* random weights"):
        read(tmp_path, test_options, "test")
    test_options["network_g"] = {"type": "Bicubic", "upscale": 2}
    read(tmp_path, test_options, "test")


def test_the_command_ends_without_traceback(tmp_path, train_options):
    change(train_options, "network_g:type", "MLRM")
    path = write_yaml(tmp_path / "options.yml", train_options)
    result = mlrn("train", "-opt", path, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout.startswith(f"mlrn train: {path} has 1 fault, nothing was started:")
    assert "Traceback" not in result.stdout


NOT_HERE = re.compile("no such folder|no such file|none of these exists")
OPTION_FILES = sorted((REPOSITORY / "options").rglob("*.yml"))


@pytest.mark.parametrize("path", OPTION_FILES, ids=lambda path: path.stem)
def test_shipped_option_files(path, tmp_path, monkeypatch):
    """Their only faults are data and checkpoints that are not on this disk."""
    monkeypatch.chdir(tmp_path)
    phase = "test" if path.stem.startswith("test") else "train"
    with pytest.raises(UserError) as error:
        options.read(phase, ["-opt", str(path)])
    faults = str(error.value).split("\n  - ")[1:]
    assert faults and all(NOT_HERE.search(fault) for fault in faults)


@pytest.mark.parametrize("page", ["README.md", "options/README.md"])
def test_commands_of_the_pages(page, tmp_path, monkeypatch):
    """`mlrn train` and `mlrn test` as they are printed there: nothing but data is missing."""
    text = (REPOSITORY / page).read_text().replace("\\\n", " ")
    commands = re.findall(r"^mlrn (train|test) (.+)$", text, re.M)
    assert len(commands) > 3
    (tmp_path / "options").symlink_to(REPOSITORY / "options")
    monkeypatch.chdir(tmp_path)
    for phase, arguments in commands:
        with pytest.raises(UserError) as error:
            options.read(phase, shlex.split(arguments))
        faults = str(error.value).split("\n  - ")[1:]
        assert faults and all(NOT_HERE.search(fault) for fault in faults)


def test_recipe_is_the_papers():
    """Section 4.2 (an epoch is 1000 iterations) and section 4.6 of the paper."""
    patch = {2: 192, 3: 192, 4: 256}
    for path in OPTION_FILES:
        opt = yaml.safe_load(path.read_text())
        if not path.name.startswith("train") or path.parent.name in ("weights", "demo"):
            continue
        train, data = opt["train"], opt["datasets"]["train"]
        total = 800_000 if "stage1" in path.name else 1_000_000
        assert train["total_iter"] == total
        assert train["scheduler"]["milestones"] == list(range(200_000, total, 200_000))
        assert train["scheduler"]["gamma"] == 0.5
        assert train["optim_g"] == {"type": "Adam", "lr": 5e-4, "betas": [0.9, 0.99]}
        assert train["pixel_opt"] == {"type": "L1Loss"} and "grad_clip" not in train
        assert data["batch_size_per_gpu"] == 64
        assert data["gt_size"] == patch[opt["scale"]]
        assert data["use_hflip"] and data["use_rot"]
