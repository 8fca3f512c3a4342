"""Show the whole chain on photographs that scikit-image carries: no download, a few minutes.

Prepares training data from seven photographs, trains a small MLRN x2 on them through BasicSR,
tests it on two photographs that it has not seen, prints PSNR and SSIM beside those of bicubic
interpolation, and draws a picture. Every step is a command that works on your data too; the demo
prints it before it runs it.
"""

from __future__ import annotations

import argparse
import importlib.resources
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from mlrn_arch.errors import UserError

SCALE = 2
TRAIN = ("astronaut.png", "brick.png", "camera.png", "grass.png", "gravel.png",
         "motorcycle_left.png", "rocket.jpg")  # fmt: skip
# Each with the crop (x, y, width, height) that the picture enlarges.
TEST = {"chelsea.png": (112, 84, 96, 72), "coffee.png": (332, 268, 96, 72)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mlrn demo`."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("mlrn_demo"),
        help="working folder (default: %(default)s)",
    )
    parser.add_argument(
        "--iterations", type=int, default=900, help="training steps (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns 0, or 1 if MLRN did not beat bicubic.

    Raises:
        UserError: A step of the chain failed.
    """
    folder = args.output
    photos = importlib.resources.files("skimage") / "data"
    for split, names in (("photos_train", TRAIN), ("photos_test", TEST)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for name in names:
            with importlib.resources.as_file(photos / name) as source:
                shutil.copy(source, folder / split / name)
    for phase, options in (("train", _train_options(args.iterations)), ("test", _test_options())):
        text = yaml.safe_dump(options, sort_keys=False)
        (folder / f"{phase}_demo.yml").write_text(f"# written by `mlrn demo`\n{text}")

    data = f"--scale {SCALE}"
    _step(folder, f"prepare photos_train data {data} --crop-size 240 --step 120 --format bmp")
    _step(folder, f"prepare photos_test data/test {data} --benchmark")
    _step(folder, "train -opt train_demo.yml", show="[demo..]")
    _step(folder, "test -opt test_demo.yml", show="# ")
    return _compare(folder)


def _train_options(iterations: int) -> dict:
    return {
        "name": "demo",
        "model_type": "FastSRModel",
        "scale": SCALE,
        "num_gpu": "auto",
        "manual_seed": 0,
        "datasets": {
            "train": {
                "name": "photos",
                "type": "PairedImageDataset",
                "dataroot_gt": "data/data_train_HR_sub.lmdb",
                "dataroot_lq": f"data/data_train_LR_bicubic_X{SCALE}_sub.lmdb",
                "io_backend": {"type": "lmdb"},
                "gt_size": 64,
                "use_hflip": True,
                "use_rot": True,
                "num_worker_per_gpu": 1,
                "batch_size_per_gpu": 16,
                "dataset_enlarge_ratio": 1000,
            }
        },
        "network_g": {"type": "MLRN", "upscale": SCALE, "num_feat": 24, "num_block": 3},
        "train": {
            "optim_g": {"type": "Muon", "lr": 0.001, "betas": [0.9, 0.99]},
            "scheduler": {
                "type": "CosineAnnealingRestartLR",
                "periods": [iterations],
                "restart_weights": [1],
                "eta_min": 0.000001,
            },
            "total_iter": iterations,
            "pixel_opt": {"type": "L1Loss"},
        },
        "logger": {"print_freq": 100, "save_checkpoint_freq": iterations},
    }


def _test_options() -> dict:
    metric = {"crop_border": SCALE, "test_y_channel": True}
    train = _train_options(1)
    return {
        "name": "demo",
        "model_type": "SRModel",
        "scale": SCALE,
        "num_gpu": "auto",
        "datasets": {
            "test_1": {
                "name": "unseen",
                "type": "PairedImageDataset",
                "dataroot_gt": f"data/test/GTmod{SCALE}",
                "dataroot_lq": f"data/test/LRbicx{SCALE}",
                "io_backend": {"type": "disk"},
            }
        },
        "network_g": train["network_g"],
        "path": {"pretrain_network_g": "experiments/demo/models/net_g_latest.pth"},
        "val": {
            "save_img": True,
            "suffix": "MLRN",
            "metrics": {
                "psnr": {"type": "calculate_psnr", **metric},
                "ssim": {"type": "calculate_ssim", **metric},
            },
        },
    }


def _step(folder: Path, command: str, show: str | None = None) -> None:
    """Run `mlrn COMMAND` in the folder; of its output show all, or the lines that have `show`."""
    print(f"\n{folder}$ mlrn {command}", flush=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "mlrn_arch.cli", *command.split()],
        cwd=folder,
        stdout=subprocess.PIPE if show else None,
        stderr=subprocess.STDOUT if show else None,
        text=True,
    )
    output = []
    for line in process.stdout or ():
        output.append(line)
        if show in line:
            print(line.rstrip().partition("INFO: ")[2] or line.rstrip(), flush=True)
    if process.wait() != 0:
        raise UserError(f"`mlrn {command}` failed in {folder}:\n{''.join(output[-20:])}")


def _compare(folder: Path) -> int:
    """Score bicubic and MLRN alike, print the table, draw the picture."""
    import cv2
    from basicsr.metrics import calculate_psnr, calculate_ssim
    from basicsr.utils.matlab_functions import imresize

    print(f"\nPhotographs not seen in training, x{SCALE}: PSNR (dB) / SSIM on Y")
    print(f"{'':14}{'bicubic':>17}{'MLRN':>17}")
    rows, better = [], True
    for name, crop in TEST.items():
        stem = Path(name).stem
        gt = cv2.imread(str(folder / f"data/test/GTmod{SCALE}/{stem}.png"))
        lq = cv2.imread(str(folder / f"data/test/LRbicx{SCALE}/{stem}.png"))
        bicubic = (imresize(lq / 255.0, SCALE) * 255).round().clip(0, 255).astype("uint8")
        results = folder / "results/demo/visualization/unseen"
        images = {"bicubic": bicubic, "MLRN": cv2.imread(str(results / f"{stem}_MLRN.png"))}
        scores = {
            method: (
                calculate_psnr(image, gt, crop_border=SCALE, test_y_channel=True),
                calculate_ssim(image, gt, crop_border=SCALE, test_y_channel=True),
            )
            for method, image in images.items()
        }
        print(f"{stem:14}" + "".join(f"{p:8.2f} / {s:.4f}" for p, s in scores.values()))
        better &= scores["MLRN"][0] > scores["bicubic"][0]
        rows.append((stem, crop, {**images, "original": gt}, scores))
    picture = folder / "demo.png"
    _draw(rows, picture)
    print(f"\nPicture: {picture}")
    if not better:
        print("MLRN did not beat bicubic: give it more --iterations", file=sys.stderr)
    return 0 if better else 1


def _draw(rows: list[tuple], path: Path) -> None:
    """Draw per photograph: the original with the crop framed, then each method's crop, enlarged."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    figure, axes = plt.subplots(len(rows), 4, figsize=(14, 3.2 * len(rows)), layout="constrained")
    for row, (stem, (x, y, w, h), images, scores) in zip(axes, rows, strict=True):
        row[0].imshow(images["original"][..., ::-1])
        row[0].add_patch(Rectangle((x, y), w, h, fill=False, edgecolor="red", linewidth=1.5))
        row[0].set_title(f"{stem} (scikit-image), x{SCALE}")
        for axis, (method, image) in zip(row[1:], images.items(), strict=True):
            axis.imshow(image[y : y + h, x : x + w, ::-1], interpolation="nearest")
            score = scores.get(method)
            axis.set_title(f"{method}\n{score[0]:.2f} dB / {score[1]:.4f}" if score else method)
        for axis in row:
            axis.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)
