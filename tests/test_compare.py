"""`mlrn compare`: the numbers of `mlrn test`, kept results, marks, pictures, bad input."""

from __future__ import annotations

import argparse
import csv
import json
import re
import shlex
import shutil
from operator import itemgetter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from conftest import write_yaml
from torch.utils.flop_counter import FlopCounterMode

from mlrn_arch import options
from mlrn_arch.archs.mlrn_arch import MLRN
from mlrn_arch.archs.rlfn_arch import RLFN
from mlrn_arch.errors import UserError
from mlrn_arch.tools import compare
from mlrn_arch.tools.compare import report, scoring

TINY = {"upscale": 2, "num_feat": 8, "num_block": 1, "esa_feat": 4}


def run(*arguments: str) -> int:
    """Run the verb in this process."""
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return compare.run(parser.parse_args(arguments))


def table() -> list[dict]:
    return json.loads(Path("comparison/table.json").read_text())["rows"]


@pytest.fixture
def networks(tmp_path, monkeypatch, test_options) -> Path:
    """A folder with option files and checkpoints: MLRN by FastSRModel, RLFN of the Y channel."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scoring, "OUTPUT", (128, 72))  # the full size takes seconds
    monkeypatch.setattr(scoring, "ROUNDS", 1)
    metrics = test_options["val"]["metrics"]
    metrics["ssim"] = {**metrics["psnr"], "type": "calculate_ssim"}
    dataset = test_options["datasets"]["test_1"]
    missing = {
        **dataset,
        "name": "nowhere",
        "dataroot_gt": "nowhere/gt",
        "dataroot_lq": "nowhere/lq",
    }
    for seed, (name, model, network, color) in enumerate([
        ("MLRN", "FastSRModel", {"type": "MLRN", **TINY}, None),
        ("RLFN", "SRModel", {"type": "RLFN", **TINY, "num_in_ch": 1, "num_out_ch": 1}, "y"),
    ]):  # fmt: skip
        torch.manual_seed(seed)
        torch.save({"params": build_network(network).state_dict()}, f"{name}.pth")
        own = {
            "name": f"test_{name}_x2",
            "model_type": model,
            "network_g": network,
            "datasets": {"test_1": {**dataset, "color": color}, "test_2": missing},
        }
        write_yaml(tmp_path / f"{name}.yml", {**test_options, **own})
    return tmp_path


def test_numbers_are_those_of_mlrn_test(networks, mlrn_here, capsys):
    assert run("RLFN.yml:RLFN.pth", "MLRN.yml:MLRN.pth", "--paper") == 0
    printed = capsys.readouterr()
    assert printed.err.count("Skipping nowhere") == 1  # once for all rows
    for row in csv.DictReader(Path("comparison/table.csv").read_text().splitlines()):
        name = row["method"]
        forced = ["--force_yml", f"path:pretrain_network_g={name}.pth"]
        code, out, err = mlrn_here("test", "-opt", f"{name}.yml", *forced)
        assert code == 0, err
        assert out.split()[-2:] == [row["tiny_val PSNR"], row["tiny_val SSIM"]]
    rlfn, mlrn_row = table()
    assert (rlfn["method"], mlrn_row["method"]) == ("RLFN", "MLRN")
    assert mlrn_row["parameters"] == sum(p.numel() for p in MLRN(**TINY).parameters())
    with FlopCounterMode(display=False) as counter:
        MLRN(**TINY).to("meta")(torch.empty(1, 3, 36, 64, device="meta"))
    assert mlrn_row["mult_adds"] == counter.get_total_flops() / 2
    assert 0 < mlrn_row["time_ms"]
    # The paper's x2 rows: 488K and 90.4G; it has no such test set.
    assert mlrn_row["parameters (paper)"] == 488e3 and mlrn_row["time_ms (paper)"] == 130
    assert "(488K, -48" in printed.out and "(90.4G, -90.3" in printed.out
    lines = printed.out.splitlines()
    better = max((rlfn, mlrn_row), key=lambda row: row["tiny_val PSNR"])
    for row in (rlfn, mlrn_row):
        line = next(line for line in lines if line.startswith(f"| {row['method']}"))
        text = f"{row['tiny_val PSNR']:.2f}"
        assert (f"| **{text}**" if row is better else f"| {text}") in line  # of two no second
    for name in ("tradeoffs.png", "tradeoffs.svg", "table.md"):
        assert Path("comparison", name).stat().st_size > 100


def test_scores_are_cached_by_content(networks, monkeypatch):
    """Of the option file, the checkpoint and the images; times come from one run."""
    images = []
    for network in (MLRN, RLFN):

        def forward(self, x, network=network, forward=network.forward):
            if x.shape[-2:] == (32, 32) and x.device.type != "meta":
                images.append(network)
            return forward(self, x)

        monkeypatch.setattr(network, "forward", forward)
    scores = itemgetter("tiny_val PSNR", "tiny_val SSIM")
    files = ["RLFN.yml:RLFN.pth", "MLRN.yml:MLRN.pth"]
    assert run(*files[1:]) == 0 and images == [MLRN] * 8
    images.clear()
    assert run(*files, files[1]) == 0 and images == [RLFN] * 8  # named twice: one row
    before = table()
    assert [row["method"] for row in before] == ["RLFN", "MLRN"]
    images.clear()
    assert run(*files) == 0 and not images
    assert list(map(scores, table())) == list(map(scores, before))
    assert [row["time_ms"] for row in table()] != [row["time_ms"] for row in before]

    torch.manual_seed(9)
    torch.save(MLRN(**TINY).state_dict(), "MLRN.pth")
    assert run(*files) == 0 and images == [MLRN] * 8
    after = table()
    assert scores(after[1]) != scores(before[1]) and scores(after[0]) == scores(before[0])
    assert run(*files[1:], "--force_yml", "val:metrics:psnr:crop_border=4") == 0
    assert scores(table()[0])[0] != scores(after[1])[0]
    for folder in ("gt", "lq"):
        shutil.copytree(
            options.load_yaml("MLRN.yml")["datasets"]["test_1"][f"dataroot_{folder}"], folder
        )
        Path(folder, "image7.png").unlink()
    roots = ["datasets:test_1:dataroot_gt=gt", "datasets:test_1:dataroot_lq=lq"]
    images.clear()
    assert run(*files[1:], "--force_yml", *roots) == 0 and images == [MLRN] * 7
    assert scores(table()[0]) != scores(after[1])


def test_an_interrupted_comparison_goes_on(networks, monkeypatch):
    real, calls = scoring.score_image, []

    def interrupted(model, dataset, index, **kwargs):
        calls.append(index)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return real(model, dataset, index, **kwargs)

    monkeypatch.setattr(scoring, "score_image", interrupted)
    files = ["RLFN.yml:RLFN.pth", "MLRN.yml:MLRN.pth"]
    with pytest.raises(KeyboardInterrupt):
        run(*files)
    assert not Path("comparison/table.json").exists()
    assert run(*files) == 0 and len(calls) == 12 + 8  # those of the second network


def test_images_without_a_finite_score_are_left_out(networks, capsys, test_options):
    """A black image has PSNR inf, one of 14x14 no SSIM: 11x11 windows do not fit inside."""
    soft = cv2.resize(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8), (64, 64))
    pairs = {"soft": soft, "black": np.zeros_like(soft), "small": soft[:14, :14]}
    for folder, step in (("gt", 1), ("lq", 2)):
        Path(folder).mkdir()
        for name, image in pairs.items():
            cv2.imwrite(f"{folder}/{name}.png", image[::step, ::step])
    dataset = {**test_options["datasets"]["test_1"], "dataroot_gt": "gt", "dataroot_lq": "lq"}
    own = {"network_g": {"type": "Bicubic", "upscale": 2}, "name": "test_Bicubic_x2"}
    write_yaml(networks / "b.yml", {**test_options, **own, "datasets": {"test_1": dataset}})
    for _ in range(2):  # the second time from the cache
        assert run("b.yml") == 0
        out = capsys.readouterr().out
        assert "Bicubic x2, tiny_val: PSNR is a mean without black.png\n" in out
        assert "Bicubic x2, tiny_val: SSIM is a mean without small.png\n" in out
        assert "Picture" not in out  # one point shows no trade-off
    (row,) = table()
    for metric, image in (("PSNR", "black"), ("SSIM", "small")):
        for folder in ("gt", "lq"):
            shutil.copytree(folder, f"without_{image}/{folder}")
            Path(f"without_{image}/{folder}/{image}.png").unlink()
        roots = [f"datasets:test_1:dataroot_{f}=without_{image}/{f}" for f in ("gt", "lq")]
        assert run("b.yml", "--force_yml", *roots) == 0
        assert table()[0][f"tiny_val {metric}"] == row[f"tiny_val {metric}"]
    for name in ("soft", "small"):
        for folder in ("gt", "lq"):
            Path(folder, f"{name}.png").unlink()
    assert run("b.yml") == 0
    assert table()[0]["tiny_val PSNR"] is None and table()[0]["tiny_val SSIM"] == pytest.approx(1)


def test_the_examples_of_the_help(networks, mlrn_here, test_options):
    gt = cv2.resize(np.random.default_rng(0).integers(0, 256, (40, 15, 3), np.uint8), (156, 464))
    for folder, scale in (("gt", 1), ("lq", 4)):
        Path(folder).mkdir()
        cv2.imwrite(f"{folder}/ppt3.png", gt[::scale, ::scale])
    standard = {**test_options, "scale": 4, "network_g": {"type": "MLRN", "upscale": 4}}
    own = {"name": "Set14", "dataroot_gt": "gt", "dataroot_lq": "lq"}
    standard["datasets"] = {"test_1": test_options["datasets"]["test_1"] | own}
    Path("options").mkdir()
    write_yaml(networks / "options/test_MLRN_x4.yml", {**standard, "name": "test_MLRN_x4"})
    torch.save(MLRN().state_dict(), "net.pth")
    torch.save(
        build_network({"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3}).state_dict(), "EDSR_x4.pth"
    )
    text = mlrn_here("compare", "-h")[1]
    examples = re.findall(r"^  mlrn (compare .*)$", text, re.M)
    assert len(examples) == 2
    for example in examples:
        code, out, err = mlrn_here(*shlex.split(example))
        assert code == 0 and "Picture: " in out, err


EDSR = {"num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 2, "upscale": 2}
SWINIR = {"img_size": 10, "window_size": 5, "embed_dim": 4, "depths": [2], "num_heads": [2]}
SWINIR |= {"mlp_ratio": 2, "upscale": 2, "upsampler": "pixelshuffledirect"}


def test_networks_by_name(networks, test_options, mlrn_here, capsys):
    standard = {**options.load_yaml("MLRN.yml"), "path": {"pretrain_network_g": "nowhere.pth"}}
    Path("options").mkdir()
    write_yaml(networks / "options/test_MLRN_x2.yml", standard)
    edsr, swinir = (
        f"{name}:{','.join(f'{k}={v}' for k, v in arguments.items())}"
        for name, arguments in (("EDSR", EDSR), ("SwinIR", SWINIR))
    )
    wide = edsr.replace("num_feat=8", "num_feat=9")
    torch.manual_seed(0)
    for file, section in (
        ("EDSR", {"type": "EDSR", **EDSR}),
        ("SwinIR", {"type": "SwinIR", **SWINIR}),
        ("wide", {"type": "EDSR", **EDSR, "num_feat": 9}),
    ):
        torch.save(build_network(section).state_dict(), f"{file}.pth")
        path = {"pretrain_network_g": f"{file}.pth"}
        write_yaml(networks / f"{file}.yml", {**test_options, "network_g": section, "path": path})
    torch.save([1], "list.pth")
    wrong = {
        "EDSX:a.pth": "EDSX: unknown 'EDSX'; did you mean EDSR?",
        "EDSR:num_in_ch=3:a.pth": "EDSR needs num_out_ch",
        "MLRN:num_fat=3,upscale=2:MLRN.pth": "MLRN takes no 'num_fat'; did you mean num_feat?",
        "MLRN:num_feat=[:MLRN.pth": "write arguments as NAME:ARG=VALUE",
        "MLRN:num_feat=-1,upscale=2:MLRN.pth": "num_feat must be a positive integer",
        wide: f"names no checkpoint; write {wide}:CHECKPOINT",
        f"{wide}:nowhere.pth": "no such file nowhere.pth",
        f"{wide}:EDSR.pth": "EDSR.pth is not a checkpoint of this EDSR",
        f"{wide}:list.pth": "list.pth holds no state dict",
        "MLRN:upscale=8:MLRN.pth": "no option file of that name comes with the package",
    }
    right = [f"{edsr}:EDSR.pth", "Bicubic:upscale=2", f"{swinir}:SwinIR.pth", f"{wide}:wide.pth"]
    assert run(*right, *wrong) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "Skipping" not in line]
    assert len(told) == len(wrong)
    for line, message in zip(told, wrong.values(), strict=True):
        assert message in line

    rows = list(csv.DictReader(Path("comparison/table.csv").read_text().splitlines()))
    names = [row["method"] for row in rows]
    assert names == ["EDSR:num_feat=8", "Bicubic", "SwinIR", "EDSR:num_feat=9"]
    for row, file, model in (
        (rows[0], "EDSR.yml", "SRModel"),
        (rows[2], "SwinIR.yml", "SwinIRModel"),  # windows of 5 on images of 32x32
    ):
        code, out, err = mlrn_here("test", "-opt", file, "--force_yml", f"model_type={model}")
        assert code == 0, err
        assert out.split()[-2:] == [row["tiny_val PSNR"], row["tiny_val SSIM"]]


def test_two_checkpoints_of_one_network_are_told_apart(networks):
    shutil.copy("MLRN.pth", "again.pth")
    assert run("MLRN.yml:MLRN.pth", "MLRN.yml:again.pth") == 0
    assert [row["method"] for row in table()] == ["MLRN (MLRN)", "MLRN (again)"]
    assert Path("comparison/table.md").read_text().count("**") == 2  # equal: none is marked


def test_bad_input_leaves_the_rest(networks, capsys, paired_data):
    with pytest.raises(UserError, match="not a checkpoint of this MLRN"):
        run("MLRN.yml:RLFN.pth")
    with pytest.raises(UserError, match="names no checkpoint"):
        run("MLRN.yml")
    with pytest.raises(UserError, match="there is no option file nothing.yml here"):
        run("nothing.yml")
    assert not Path("comparison").exists()

    # One image too small for its partner, one unreadable, one without a partner.
    for name, file in (("small", "gt"), ("torn", "gt"), ("alone", "lq")):
        shutil.copytree(paired_data / "gt", f"{name}/gt")
        shutil.copytree(paired_data / "lq", f"{name}/lq")
        path = f"{name}/{file}/image3.png"
        if name == "small":
            cv2.imwrite(path, cv2.imread(path)[:50])
        elif name == "torn":
            Path(path).write_bytes(b"no image")
        else:
            Path(path).unlink()
    sets = [
        f"datasets:test_{index}={{name: {name}, type: PairedImageDataset, dataroot_gt: {name}/gt, "
        f"dataroot_lq: {name}/lq, io_backend: {{type: disk}}}}"
        for index, name in enumerate(("small", "torn", "alone"), 3)
    ]
    files = ["MLRN.yml:RLFN.pth", "MLRN.yml:MLRN.pth"]
    capsys.readouterr()
    assert run(*files, "--force_yml", *sets) == 1
    told = capsys.readouterr().err
    assert "datasets:test_3: small/lq/image3.png is 32x32 and its gt 64x50: that is not x2" in told
    assert "datasets:test_4: torn/gt/image3.png is no image" in told
    assert "datasets:test_5: lq and gt are no pairs" in told
    assert "not a checkpoint of this MLRN" in told and "Traceback" not in told
    (row,) = table()
    assert row["tiny_val PSNR"] > 0 and "small PSNR" not in row and "torn PSNR" not in row


def test_visual(networks, capsys, paired_data):
    files = ["RLFN.yml:RLFN.pth", "MLRN.yml:MLRN.pth"]
    image = ["--visual", "tiny_val/image3", "--crop"]
    assert run(*image, "8", "16", "24", "16", *files) == 0
    (picture,) = Path("comparison").iterdir()
    assert picture.name == "visual_image3_tiny_val_x2_8_16_24_16.png"
    drawn = cv2.imread(str(picture))
    assert drawn.shape[1] > 1000 and drawn.std() > 10
    assert re.search(r"MLRN +\d+\.\d\d / 0\.\d{4}", capsys.readouterr().out)
    assert run(*image, "8", "16", "24", "16", "MLRN.yml:RLFN.pth", *files) == 1
    with pytest.raises(UserError, match="reaches out of the image, which is 64x64"):
        run(*image, "50", "0", "24", "16", *files)
    with pytest.raises(UserError, match="no such image in tiny_val"):
        run("--visual", "image9", "--crop", "0", "0", "8", "8", *files)
    with pytest.raises(UserError, match="belong together"):
        run("--visual", "image3", *files)


def test_table_1_and_its_picture(tmp_path):
    printed = report.paper()
    assert len(printed) == 28
    assert printed["MLRN", 4]["Set5 PSNR"] == "32.30" and printed["MLRN", 2]["mult_adds"] == "90.4G"
    assert report.number(printed["CARN", 3]["parameters"]) == 1592e3
    points = [
        (name, scale, {column: report.number(text) for column, text in row.items()})
        for (name, scale), row in printed.items()
        if scale == 4
    ]
    png, svg = report.draw_tradeoffs(points, "Set5 PSNR", "a machine", tmp_path)
    assert cv2.imread(str(png)).std() > 10 and svg.stat().st_size > 10000
