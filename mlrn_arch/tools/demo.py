"""Show the whole chain on photographs that scikit-image carries: no download, a few minutes.

Prepares training data from seven photographs, trains a small MLRN x2 on them through BasicSR,
scores it on two photographs that it has not seen beside bicubic interpolation, and draws crops of
one of them. Every step is a command that works on your data too; the demo prints it before it runs
it.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import shutil
import subprocess
import sys
from pathlib import Path

from mlrn_arch.errors import UserError

SCALE = 2
TRAIN = ("astronaut.png", "brick.png", "camera.png", "grass.png", "gravel.png",
         "motorcycle_left.png", "rocket.jpg")  # fmt: skip
TEST = ("chelsea.png", "coffee.png")

TRAIN_YML = f"""\
# written by `mlrn demo`
name: demo
model_type: FastSRModel
scale: {SCALE}
num_gpu: auto
manual_seed: 0
datasets:
  train:
    name: photos
    type: PairedImageDataset
    dataroot_gt: data/data_train_HR_sub.lmdb
    dataroot_lq: data/data_train_LR_bicubic_X{SCALE}_sub.lmdb
    io_backend: {{type: lmdb}}
    gt_size: 64
    use_hflip: true
    use_rot: true
    num_worker_per_gpu: 1
    batch_size_per_gpu: 16
    dataset_enlarge_ratio: 1000
network_g: {{type: MLRN, upscale: {SCALE}, num_feat: 24, num_block: 3}}
train:
  optim_g: {{type: Muon, lr: 0.001, betas: [0.9, 0.99]}}
  scheduler:
    {{type: CosineAnnealingRestartLR, periods: [STEPS], restart_weights: [1], eta_min: 0.000001}}
  total_iter: STEPS
  pixel_opt: {{type: L1Loss}}
logger: {{print_freq: 100, save_checkpoint_freq: STEPS}}
"""
TEST_YML = f"""\
# written by `mlrn demo`
name: test_NAME_x{SCALE}
model_type: SRModel
scale: {SCALE}
num_gpu: auto
datasets:
  test_1:
    name: unseen
    type: PairedImageDataset
    dataroot_gt: data/test/GTmod{SCALE}
    dataroot_lq: data/test/LRbicx{SCALE}
    io_backend: {{type: disk}}
network_g: NETWORK
path: {{pretrain_network_g: CHECKPOINT}}
val:
  metrics:
    psnr: {{type: calculate_psnr, crop_border: {SCALE}, test_y_channel: true}}
    ssim: {{type: calculate_ssim, crop_border: {SCALE}, test_y_channel: true}}
"""


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
    train = TRAIN_YML.replace("STEPS", str(args.iterations))
    (folder / "train_demo.yml").write_text(train)
    network = train.partition("network_g: ")[2].partition("\n")[0]
    for name, section, checkpoint in (
        ("MLRN", network, "experiments/demo/models/net_g_latest.pth"),
        ("Bicubic", f"{{type: Bicubic, upscale: {SCALE}}}", "~"),
    ):
        text = TEST_YML.replace("NAME", name).replace("NETWORK", section)
        (folder / f"test_{name}.yml").write_text(text.replace("CHECKPOINT", checkpoint))

    data = f"--scale {SCALE}"
    _step(folder, f"prepare photos_train data {data} --crop-size 240 --step 120 --format bmp")
    _step(folder, f"prepare photos_test data/test {data} --benchmark")
    _step(folder, "train -opt train_demo.yml", show="[demo..]")
    compare = "compare test_Bicubic.yml test_MLRN.yml"
    _step(folder, compare, show="| ")
    _step(folder, f"{compare} --visual unseen/chelsea --crop 112 84 96 72", show="Picture")
    rows = json.loads((folder / "comparison/table.json").read_text())["rows"]
    bicubic, ours = (row["unseen PSNR"] for row in rows)
    if ours > bicubic:
        return 0
    print("MLRN did not beat bicubic: give it more --iterations", file=sys.stderr)
    return 1


def _step(folder: Path, command: str, show: str | None = None) -> None:
    """Run `mlrn COMMAND` in the folder; of its output show all, or the lines that have `show`."""
    print(f"\n{folder}$ mlrn {command}", flush=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "mlrn_arch", *command.split()],
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
