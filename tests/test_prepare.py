"""`mlrn prepare`: what it writes, read back by BasicSR's own code; what it refuses; kills."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils import img2tensor, tensor2img
from conftest import REPOSITORY
from PIL import Image

from mlrn_arch import machine, options, plugins
from mlrn_arch.errors import UserError
from mlrn_arch.inference.resize import imresize
from mlrn_arch.tools import prepare
from mlrn_arch.tools.prepare import stream, training


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def run(*arguments) -> int:
    parser = plugins.parser("mlrn prepare", None)
    prepare.add_arguments(parser)
    return prepare.run(parser.parse_args([str(a) for a in arguments]))


def records(folder: Path) -> dict[str, bytes]:
    with lmdb.open(str(folder), readonly=True, lock=False) as env, env.begin() as transaction:
        return {bytes(k).decode("ascii"): bytes(v) for k, v in transaction.cursor()}


def decoded(record: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(record, np.uint8), cv2.IMREAD_UNCHANGED)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file() and p.name != "lock.mdb"
    }


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    cv2.imwrite(str(folder / "0001.png"), photo(110, 157, 1))
    cv2.imwrite(str(folder / "0002.bmp"), photo(72, 72, 2))
    cv2.imwrite(str(folder / "sub" / "0001.png"), photo(121, 96, 3))
    return folder


SMALL = ("--crop-size", "72", "--step", "36")


@pytest.mark.parametrize("file_format", ["png", "bmp"])
def test_stock_dataset_reads_aligned_pairs(photos, tmp_path, file_format):
    from basicsr.data.paired_image_dataset import PairedImageDataset

    out = tmp_path / "D"
    assert run(photos, out, *SMALL, "--format", file_format) == 0
    hr = records(out / "D_train_HR_sub.lmdb")
    # 110x157 is cut to 108x156: rows 0, 36; columns 0, 36, 72, and 84 flush with the edge
    assert sorted(hr) == [f"0001_s00{i}" for i in range(1, 9)] + ["0002_s001"] + [
        f"sub_0001_s00{i}" for i in range(1, 7)
    ]
    whole = photo(110, 157, 1)[:108, :156]
    corners = [(y, x) for y in (0, 36) for x in (0, 36, 72, 84)]
    for scale in (2, 3, 4):
        folder = out / f"D_train_LR_bicubic_X{scale}_sub.lmdb"
        lr = records(folder)
        assert lr.keys() == hr.keys()
        small = imresize(whole, scale)
        for i, (y, x) in enumerate(corners, 1):
            np.testing.assert_array_equal(
                decoded(hr[f"0001_s00{i}"]), whole[y : y + 72, x : x + 72]
            )
            y, x, size = y // scale, x // scale, 72 // scale
            np.testing.assert_array_equal(
                decoded(lr[f"0001_s00{i}"]), small[y : y + size, x : x + size]
            )
        level = 1 if file_format == "png" else 0
        first = (folder / "meta_info.txt").read_text().splitlines()[0]
        assert first == f"0001_s001.{file_format} ({size},{size},3) {level}"

        options = {
            "dataroot_gt": str(out / "D_train_HR_sub.lmdb"),
            "dataroot_lq": str(folder),
            "io_backend": {"type": "lmdb"},
            "scale": scale,
            "phase": "val",
        }
        dataset = PairedImageDataset(options)
        assert len(dataset) == len(hr)
        pair = dataset[0]
        gt = np.rint(pair["gt"].numpy()[::-1] * 255).transpose(1, 2, 0)
        np.testing.assert_array_equal(gt, whole[:72, :72])
        assert pair["lq"].shape == (3, size, size)
        dataset.opt.update(phase="train", gt_size=48, use_hflip=True, use_rot=True)
        assert dataset[3]["gt"].shape == (3, 48, 48)


def test_every_kind_of_image_and_what_is_said_of_it(tmp_path, capsys):
    source = tmp_path / "in"
    source.mkdir()
    rgb = photo(96, 84)[..., ::-1]
    image = Image.fromarray(rgb)
    alpha = np.dstack([rgb, np.arange(96 * 84, dtype=np.uint8).reshape(96, 84)])
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.rot90(rgb)  # shown as `rgb` after the quarter turn that tag 6 asks for
    deep = (rgb.astype(np.uint16) * 257 + np.arange(-128, 124, dtype=np.int16).reshape(84, 3)).clip(
        0, 65535
    )
    deep = np.where(rgb == 0, 100, np.where(rgb == 255, 65500, deep)).astype(np.uint16)
    palette = image.quantize(64)

    expected = {}

    def save(name, value, **kwargs):
        expected[name.replace(".", "_")] = kwargs.pop("expect", rgb)
        if isinstance(value, np.ndarray):
            value = Image.fromarray(value)
        name = "_".join(name.rsplit(".", 1)) + "." + name.rsplit(".", 1)[1]
        value.save(source / name, **kwargs)

    save("rgb.png", image)
    save("rgb.tiff", image)
    save("rgb.bmp", image)
    save("rgb.webp", image, lossless=True)
    grey = np.repeat(np.asarray(image.convert("L"))[..., None], 3, 2)
    save("grey.png", image.convert("L"), expect=grey)
    save("grey16.png", grey[..., 0].astype(np.uint16) * 257, expect=grey)
    save("palette.png", palette, expect=np.asarray(palette.convert("RGB")))
    save("alpha.png", alpha)
    save("alpha.tiff", alpha)
    save("alpha.webp", alpha, lossless=True, exact=True)
    save("turned.png", np.ascontiguousarray(turned), exif=exif)
    save("turned.tiff", np.ascontiguousarray(turned), exif=exif)
    for name in ("deep.png", "deep.tif"):
        expected[name.replace(".", "_")] = rgb
        cv2.imwrite(str(source / (name.replace(".", "_") + Path(name).suffix)), deep[..., ::-1])
    Image.fromarray(np.ascontiguousarray(turned)).save(
        source / "turned_jpg.JPG", exif=exif, quality=95
    )
    (source / ".hidden.png").write_bytes(b"")
    (source / "notes.txt").write_text("")

    out = tmp_path / "out"
    assert run(source, out, "--scale", 2, "--crop-size", 84, "--step", 12, "--name", "x") == 0
    hr = records(out / "x_train_HR_sub.lmdb")
    for key, wanted in expected.items():
        got = decoded(hr[f"{key}_s001"])
        np.testing.assert_array_equal(got[..., ::-1], wanted[:84, :84], err_msg=key)
    jpeg = decoded(hr["turned_jpg_s001"])[..., ::-1].astype(int)
    assert np.abs(jpeg - rgb[:84]).mean() < 3
    said = capsys.readouterr().out
    assert "2 grey (stored with 3 equal channels); 3 of 16 bits" in said
    assert "3 with transparency" in said and f"{len(expected) + 1} of {len(expected) + 1}" in said


def test_keys_are_safe_unique_and_steady(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for name in ("a.b", "münchen 1", "夜"):
        (source / f"{name}.png").write_bytes(cv2.imencode(".png", photo(24, 24))[1].tobytes())
    assert run(source, tmp_path / "D_train", "--crop-size", 24, "--step", 24) == 0
    keys = records(tmp_path / "D_train" / "D_train_HR_sub.lmdb")
    assert set(keys) == {"-591c-_s001", "a-2e-b_s001", "m-fc-nchen-20-1_s001"}


def test_colliding_names_are_both_named_before_anything_is_written(photos, tmp_path):
    shutil.copy(photos / "0002.bmp", photos / "0001.jpg")
    with pytest.raises(UserError, match=r"0001\.jpg and .*0001\.png"):
        run(photos, tmp_path / "D", *SMALL)
    assert not (tmp_path / "D").exists()


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("--crop-size", 100), "multiple of 12"),
        (("--step", 0), "multiple of 12"),
        (("--name", "a/b"), "name"),
    ],
)
def test_refused_settings(photos, tmp_path, arguments, text):
    with pytest.raises(UserError, match=text):
        run(photos, tmp_path / "D", *arguments)
    assert not (tmp_path / "D").exists()


def test_nothing_to_do_it_with(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        run(tmp_path / "nowhere", tmp_path / "D")
    source = tmp_path / "in"
    source.mkdir()
    with pytest.raises(UserError, match="no images"):
        run(source, tmp_path / "D")
    (source / "broken.png").write_bytes(b"\x89PNG")
    for benchmark in ((), ("--benchmark",)):
        with pytest.raises(UserError, match="no image can be used"):
            run(source, tmp_path / "new" / "D", *benchmark)
        assert not list((tmp_path / "new").rglob("*.*"))
    with pytest.raises(UserError, match="no images .* outside OUTPUT"):
        run(source, source)


def test_bad_images_are_named_and_the_rest_is_made(photos, tmp_path, mlrn_here):
    whole = cv2.imencode(".png", photo(200, 200))[1].tobytes()
    (photos / "torn.png").write_bytes(whole[: len(whole) // 2])
    (photos / "text.jpg").write_text("no image")
    (photos / "link.png").symlink_to("nowhere")
    cv2.imwrite(str(photos / "tiny.png"), photo(71, 300))
    for _ in range(2):  # the second run only repeats what the first left out
        code, said, left_out = mlrn_here("prepare", photos, tmp_path / "D", *SMALL, "--scale", 2)
        assert code == 1 and "3 of 7 images" in said
        for name in ("torn.png", "text.jpg", "link.png"):
            assert re.search(rf"left out: .*{name}: .+", left_out)
        assert "tiny.png: 300x60 pixels are less than --crop-size 72" in left_out
    assert len(records(tmp_path / "D/D_train_HR_sub.lmdb")) == 15


def test_a_file_that_kills_its_worker_is_one_sentence(photos, tmp_path, monkeypatch):
    decode = stream.decode

    def deadly(path):
        if path.name == "0002.bmp":
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(path)

    monkeypatch.setattr(stream, "decode", deadly)
    for benchmark in ((), ("--benchmark",)):
        with pytest.raises(UserError, match="a worker process died.*--workers 1 continues"):
            run(photos, tmp_path / "D", *SMALL, *benchmark, "--workers", 1)


def test_own_output_and_links_that_lead_back_are_not_read(photos):
    (photos / "sub" / "loop").symlink_to(photos)
    assert run(photos, photos / "sub" / "out", *SMALL, "--scale", 2) == 0
    assert run(photos, photos / "sub" / "out", "--benchmark") == 0
    assert len(list((photos / "sub/out/GTmod2").iterdir())) == 3
    assert run(photos, photos / "sub" / "out", *SMALL, "--scale", 2, "--overwrite") == 0
    hr = records(photos / "sub" / "out" / "out_train_HR_sub.lmdb")
    assert {key[:-5] for key in hr} == {"0001", "0002", "sub_0001"}


def test_linked_folders_are_read(photos, tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    for name in ("A", "B"):
        (both / name).symlink_to(photos)
    assert run(both, tmp_path / "D", *SMALL, "--scale", 2) == 0
    # the second link leads to the same folder: the same images, read once
    assert len(records(tmp_path / "D/D_train_HR_sub.lmdb")) == 15


def test_what_is_there_is_kept_or_made_again_as_a_whole(photos, tmp_path, mlrn_here):
    out = tmp_path / "D"
    assert run(photos, out, *SMALL, "--scale", 3) == 0
    before = snapshot(out)
    code, said, _ = mlrn_here("prepare", photos, out, *SMALL, "--scale", 3)
    assert code == 0 and "everything is there already" in said and snapshot(out) == before
    assert "to fine-tune on it:" in said
    with pytest.raises(UserError, match="step is 36, not 72.*--overwrite"):
        run(photos, out, "--crop-size", 72, "--step", 72)
    assert snapshot(out) == before

    # A scale more: the existing ones are made again with it, to the same records.
    old = {folder.name: records(folder) for folder in out.iterdir()}
    assert run(photos, out, *SMALL, "--scale", 4) == 0
    assert old.items() <= {folder.name: records(folder) for folder in out.iterdir()}.items()
    assert len(records(out / "D_train_LR_bicubic_X4_sub.lmdb")) == 15
    assert run(photos, out, "--crop-size", 72, "--step", 72, "--scale", 4, "--overwrite") == 0
    names = ["D_train_HR_sub.lmdb", *(f"D_train_LR_bicubic_X{s}_sub.lmdb" for s in (3, 4))]
    assert sorted(p.name for p in out.iterdir()) == names
    assert {len(records(folder)) for folder in out.iterdir()} == {6 + 1 + 4}


@pytest.mark.parametrize("change", ["new", "gone", "changed"])
def test_an_lmdb_that_is_not_what_input_holds(photos, tmp_path, mlrn_here, change):
    out, settings = tmp_path / "D", (*SMALL, "--scale", 2)
    assert run(photos, out, *settings) == 0
    if change == "new":
        cv2.imwrite(str(photos / "0003.png"), photo(72, 72))
    elif change == "gone":
        (photos / "0002.bmp").unlink()
    else:
        cv2.imwrite(str(photos / "0002.bmp"), photo(72, 72, 5))  # as many bytes
    before = snapshot(out)
    code, _, said = mlrn_here("prepare", photos, out, *settings)
    assert code == 2 and snapshot(out) == before
    assert "1 images are new, gone or changed, such as 000" in said and "--overwrite" in said
    assert run(photos, out, *settings, "--overwrite") == 0
    assert run(photos, out, *settings) == 0


@pytest.mark.parametrize("damage", ["foreign", "truncated"])
def test_lmdbs_that_are_not_ours_or_broken(photos, tmp_path, damage):
    out = tmp_path / "D"
    assert run(photos, out, *SMALL) == 0
    if damage == "foreign":
        (out / "D_train_HR_sub.lmdb/prepare.json").unlink()
    else:
        os.truncate(out / "D_train_HR_sub.lmdb/data.mdb", 10000)
    said = {"foreign": "another program made it", "truncated": "is truncated or broken"}[damage]
    with pytest.raises(UserError, match=f"{said}.*--overwrite"):
        run(photos, out, *SMALL)


def test_the_commands_to_train(photos, tmp_path, mlrn_here, monkeypatch):
    """Training accepts them; they are short where the option files expect the data."""
    (tmp_path / "options").symlink_to(REPOSITORY / "options")
    monkeypatch.chdir(tmp_path)
    cv2.imwrite(str(photos / "0003.png"), photo(480, 480))

    def commands(name: str) -> list[list[str]]:
        code, said, _ = mlrn_here("prepare", photos, f"datasets/{name}", "--scale", 4)
        assert code == 1  # the small ones are left out
        return [shlex.split(line)[3:] for line in said.splitlines() if "  mlrn train" in line]

    finetune, scratch = "options/finetune_MLRN_x4.yml", "options/train_MLRN_x4.yml"
    lmdbs = (
        "datasets:train:dataroot_gt=datasets/DIV2K/DIV2K_train_HR_sub.lmdb",
        "datasets:train:dataroot_lq=datasets/DIV2K/DIV2K_train_LR_bicubic_X4_sub.lmdb",
    )
    no_test_set = "datasets:val=none", "val=none"
    given = commands("photos") + commands("DIV2K")
    assert given == [
        [finetune, "--force_yml", *no_test_set],
        [finetune, "--force_yml", *lmdbs, *no_test_set],
        [scratch, "--force_yml", *no_test_set],
    ]
    for arguments in given:
        options.read("train", ["-opt", *arguments])
    Path("datasets/Set5/GTmod4").mkdir(parents=True)
    assert commands("photos") == [[finetune]]


@pytest.mark.slow
def test_killed_runs_continue_to_the_same_records(tmp_path):
    many, whole = tmp_path / "many", tmp_path / "whole" / "D"
    many.mkdir()
    for i in range(13):
        cv2.imwrite(str(many / f"{i:04d}.bmp"), photo(120, 180, i))
    settings = ("--crop-size", "120", "--step", "60", "--workers", "1")
    assert run(many, whole, *settings) == 0

    out = tmp_path / "D"
    # commits after each image, so that a short run has something to lose and something to keep, and
    # waits after a few, so that it does not end before it is killed
    script = """
import signal, sys, time
import mlrn_cli
from mlrn_arch.tools.prepare import stream, training

# which shells make what they run in the background ignore, and that its children
signal.signal(signal.SIGINT, signal.default_int_handler)

def waiting(*arguments, results=stream.results):
    for number, result in enumerate(results(*arguments)):
        if number == 5:
            print("waiting", flush=True)
            time.sleep(100)
        yield result

training._COMMIT_BYTES, stream.results = 0, waiting
sys.exit(mlrn_cli.main())
"""
    command = [sys.executable, "-c", script, "prepare", str(many), str(out), *settings]
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        with subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            while "waiting" not in (line := process.stdout.readline()):
                assert line, process.stderr.read()
            process.send_signal(number)
            error = process.communicate()[1]
        assert process.returncode == code, error
        assert "Traceback" not in error and error.count("\n") <= 1
        (unfinished,) = out.iterdir()  # nothing that looks finished
        assert re.fullmatch(r"\.D\.[0-9a-f]+\.partial", unfinished.name)
        assert not list(out.rglob("meta_info.txt"))
    # of an image that is not done, as after a kill between two commits
    (unfinished,) = out.iterdir()
    with lmdb.open(str(unfinished / "D_train_HR_sub.lmdb")) as env:
        with env.begin(write=True) as transaction:
            transaction.put(b"0012_s001", b"torn")
    keys = records(unfinished / "D_train_LR_bicubic_X4_sub.lmdb")
    assert len({key.partition("_")[0] for key in keys}) == 10
    assert run(many, out, *settings) == 0
    for folder in whole.iterdir():
        assert records(out / folder.name) == records(folder)
        assert (out / folder.name / "meta_info.txt").read_text() == (
            folder / "meta_info.txt"
        ).read_text()
    assert len(list(out.iterdir())) == 4


@pytest.mark.parametrize("steps", range(5))
def test_a_kill_while_results_are_put_into_place(photos, tmp_path, monkeypatch, steps):
    out = tmp_path / "D"
    assert run(photos, out, "--crop-size", 72, "--step", 72, "--scale", 2) == 0

    class Killed(BaseException):
        pass

    def rename(path, target, original=Path.rename):
        nonlocal steps
        steps -= 1
        if steps < 0:
            raise Killed
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    killed = steps < 4
    try:
        run(photos, out, *SMALL, "--scale", 2, "--overwrite")
    except Killed:
        pass
    monkeypatch.undo()
    assert killed == (steps < 0)
    # HR is never beside LR of another run, and the same command ends what was begun.
    found = {json.loads((folder / "prepare.json").read_text())["step"] for folder in out.glob("D*")}
    assert len(found) <= 1 or not (out / "D_train_HR_sub.lmdb").exists()
    assert run(photos, out, *SMALL, "--scale", 2, "--overwrite") == 0
    assert len(list(out.iterdir())) == 2
    for folder in out.iterdir():
        assert json.loads((folder / "prepare.json").read_text())["step"] == 36
        assert len(records(folder)) == 15


def test_an_interrupted_run_goes_on_with_other_images(photos, tmp_path, monkeypatch):
    """What was done of images that are gone or changed since is not kept; settings may differ."""
    out, results = tmp_path / "D", stream.results
    monkeypatch.setattr(training, "_COMMIT_BYTES", 0)

    def interrupted(*arguments):
        yield from itertools.islice(results(*arguments), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "results", interrupted)
    for settings in (SMALL, ("--crop-size", 72, "--step", 72)):
        with pytest.raises(KeyboardInterrupt):
            run(photos, out, *settings)
    worked_on = []

    def watched(work, images, *arguments):
        worked_on.extend(images)
        return results(work, images, *arguments)

    monkeypatch.setattr(stream, "results", watched)
    (photos / "0001.png").unlink()
    cv2.imwrite(str(photos / "0002.bmp"), photo(80, 75, 6))
    cv2.imwrite(str(photos / "0003.png"), photo(80, 72, 7))
    assert run(photos, out, *SMALL) == 0
    assert worked_on == ["0002", "0003", "sub_0001"]
    monkeypatch.undo()
    whole = tmp_path / "whole/D"
    assert run(photos, whole, *SMALL) == 0
    assert len(list(out.iterdir())) == 4
    for folder in out.iterdir():  # records of what is gone are left, and not listed
        wanted, meta_info = records(whole / folder.name), (folder / "meta_info.txt").read_text()
        assert meta_info == (whole / folder.name / "meta_info.txt").read_text()
        found = records(folder)
        assert {key: found[key] for key in wanted} == wanted


def test_the_map_grows(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_MAP_STEP", 2**16)
    settings = (*SMALL, "--scale", 2, "--format", "bmp")
    assert run(photos, tmp_path / "D", *settings) == 0
    hr = tmp_path / "D/D_train_HR_sub.lmdb"
    assert len(records(hr)) == 15 and (hr / "data.mdb").stat().st_size > 2**17


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def failing_lmdb(*_):
    raise lmdb.Error("mdb_txn_commit: Input/output error")


@pytest.mark.parametrize(
    "module, function, failing, arguments",
    [
        (prepare, "_pair", full_disk, ("--benchmark",)),
        (training, "_write", failing_lmdb, SMALL),
    ],
)
def test_full_disk_is_one_sentence(
    photos, tmp_path, monkeypatch, module, function, failing, arguments
):
    monkeypatch.setattr(module, function, failing)
    with pytest.raises(UserError, match="cannot write to .*; if its disk is full, free some space"):
        run(photos, tmp_path / "D", *arguments)


def test_benchmark_folders(photos, tmp_path, capsys):
    from basicsr.data.paired_image_dataset import PairedImageDataset

    out = tmp_path / "Set3"
    grey = photo(50, 61)[..., 0]
    cv2.imwrite(str(photos / "grey.png"), grey)
    assert run(photos, out, "--benchmark") == 0
    assert "; 1 grey\n" in capsys.readouterr().out
    for scale in (2, 3, 4):
        gt = cv2.imread(str(out / f"GTmod{scale}/0001.png"), cv2.IMREAD_UNCHANGED)
        lq = cv2.imread(str(out / f"LRbicx{scale}/0001.png"), cv2.IMREAD_UNCHANGED)
        height, width = 110 // scale * scale, 157 // scale * scale
        np.testing.assert_array_equal(gt, photo(110, 157, 1)[:height, :width])
        np.testing.assert_array_equal(lq, imresize(gt, scale))
        assert cv2.imread(str(out / f"GTmod{scale}/grey.png"), cv2.IMREAD_UNCHANGED).ndim == 2
        dataset = PairedImageDataset(
            {
                "dataroot_gt": str(out / f"GTmod{scale}"),
                "dataroot_lq": str(out / f"LRbicx{scale}"),
                "io_backend": {"type": "disk"},
                "scale": scale,
                "phase": "val",
            }
        )
        assert len(dataset) == 4
        for pair in dataset:
            assert pair["gt"].shape[1] == pair["lq"].shape[1] * scale

    (out / "LRbicx3" / "0001.png").unlink()
    before = snapshot(out)
    assert run(photos, out, "--benchmark") == 0
    after = snapshot(out)
    assert before.items() <= after.items() and set(after) - set(before) == {"LRbicx3/0001.png"}
    assert run(photos, out, "--benchmark", "--overwrite") == 0
    assert {k: v[0] for k, v in snapshot(out).items()} == {k: v[0] for k, v in after.items()}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, monkeypatch):
    source = tmp_path / "in"
    source.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (240, 240, 3), dtype=np.uint8)
    data = cv2.imencode(".bmp", noise)[1].tobytes()
    for i in range(1500):
        (source / f"{i:04d}.bmp").write_bytes(data)
    results, used = stream.results, []

    def watched(*arguments):
        for result in results(*arguments):
            status = Path("/proc/self/status").read_text()
            used.append(int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024)
            yield result

    monkeypatch.setattr(stream, "results", watched)
    monkeypatch.setattr(training, "_COMMIT_BYTES", 2**22)
    settings = ("--crop-size", 240, "--step", 240, "--scale", 2, "--format", "bmp")
    assert run(source, tmp_path / "D", *settings) == 0
    assert len(used) == 1500
    assert max(used[300:]) < max(used[:300]) + 30  # MB, of 325 that pass through


@pytest.fixture
def compact(tmp_path) -> tuple[str, str]:
    """An SRVGGNetCompact x2 for BasicSR, and its checkpoint, which spandrel knows, too."""
    torch.manual_seed(0)
    arguments = {"num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_conv": 1, "upscale": 2}
    network = build_network({"type": "SRVGGNetCompact", **arguments})
    torch.save({"params": network.state_dict()}, tmp_path / "compact.pth")
    written = ",".join(f"{key}={value}" for key, value in arguments.items())
    return f"SRVGGNetCompact:{written}:{tmp_path / 'compact.pth'}", str(tmp_path / "compact.pth")


@pytest.mark.parametrize("known_by", ["BasicSR", "spandrel"])
def test_a_teachers_output_in_place_of_hr(photos, tmp_path, compact, known_by, monkeypatch):
    if known_by == "spandrel":
        pytest.importorskip("spandrel")
    monkeypatch.setattr(machine, "computes_in_bf16", lambda *_: False)
    teacher = compact[known_by == "spandrel"]
    sizes = ["--crop-size", 24, "--step", 24, "--shrink", 3, 4]
    assert run(photos, tmp_path / "D", "--scale", 2, "--teacher", teacher, *sizes) == 0
    hr, lq = (
        records(tmp_path / "D" / f"D_train_{kind}_sub.lmdb") for kind in ("HR", "LR_bicubic_X2")
    )
    assert hr.keys() == lq.keys()

    network = build_network({"type": "SRVGGNetCompact", "num_feat": 4, "num_conv": 1, "upscale": 2})
    network.load_state_dict(torch.load(compact[1], weights_only=True)["params"])
    shrunk = [imresize(photo(72, 72, 2), factor) for factor in (3, 4)]
    for first, image in zip((1, 5), shrunk, strict=True):
        with torch.inference_mode():
            taught = tensor2img(network(img2tensor(image / np.float32(255))[None]))
        name = f"0002_s{first:03d}"
        np.testing.assert_array_equal(decoded(lq[name]), image[:12, :12])
        np.testing.assert_array_equal(decoded(hr[name]), taught[:24, :24])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--teacher", "RLFM:rlfn.pth"], "unknown .RLFM.; did you mean RLFN"),
        (["--scale", 4, "--teacher", "COMPACT"], "enlarges by 2, not by --scale 4"),
        (["--scale", 2, 4, "--teacher", "COMPACT"], "of one scale"),
        (["--shrink", 2], "is for --teacher"),
        (["--teacher", "COMPACT", "--import", "gone.py"], "gone.py: no such file"),
    ],
)
def test_a_teacher_that_cannot_teach_is_told(photos, tmp_path, compact, arguments, said):
    arguments = [compact[1] if a == "COMPACT" else a for a in arguments]
    scale = [] if "--scale" in arguments else ["--scale", 2]
    with pytest.raises(UserError, match=said):
        run(photos, tmp_path / "D", *scale, *arguments)
    assert not (tmp_path / "D").exists()
