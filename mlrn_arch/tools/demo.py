"""Show the whole chain on photographs that scikit-image carries: no download, a few minutes.

Prepares training data from seven photographs, trains a small MLRN x2 on them, scores it beside
bicubic interpolation on two other photographs, and draws a crop of one. Each step is a command that
works on your data too; the demo prints it first.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import shutil
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

from mlrn_arch import shipped
from mlrn_arch.errors import UserError

PHOTOS = {
    "photos_train": ("astronaut.png", "brick.png", "camera.png", "grass.png", "gravel.png",
                     "motorcycle_left.png", "rocket.jpg"),
    "photos_test": ("chelsea.png", "coffee.png"),
}  # fmt: skip
SKIMAGE = Path(str(importlib.resources.files("skimage"))) / "data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mlrn demo`."""
    add = parser.add_argument
    add("--output", type=Path, default="mlrn_demo", help="working folder (default: %(default)s)")
    add("--iterations", type=int, default=900, help="training steps (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns 0, or 1 if MLRN did not beat bicubic."""
    folder = Path(args.output)
    for name, photos in PHOTOS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for photo in photos:
            shutil.copy2(SKIMAGE / photo, folder / name)
    for name in ("train_demo", "test_demo", "test_bicubic"):
        shutil.copy(shipped.option_files()[f"demo/{name}"], folder)

    _step(folder, "prepare photos_train data --scale 2 --crop-size 240 --step 120", "sub-images")
    _step(folder, "prepare photos_test data/test --scale 2 --benchmark", " images")
    n = args.iterations
    length = f" --force_yml train:total_iter={n} train:scheduler:periods=[{n}]" if n != 900 else ""
    _step(folder, f"train -opt train_demo.yml{length}", "[demo..]")
    compare = "compare test_bicubic.yml test_demo.yml"
    _step(folder, compare, "| ")
    _step(folder, f"{compare} --visual unseen/chelsea --crop 112 84 96 72", "/ 0.")
    (picture,) = (folder / "comparison").glob("visual_*.png")
    print(
        f"\nThe results:\n  {folder}/comparison/table.md\n  {picture}\n"
        f"  {folder}/experiments/demo/models/net_g_latest.pth\n"
        "Next, enlarge a photograph of yours four times:\n  mlrn upscale photo.jpg"
    )
    rows = json.loads((folder / "comparison/table.json").read_text())["rows"]
    bicubic, ours = (row["unseen PSNR"] for row in rows)
    if ours > bicubic:
        return 0
    print("MLRN did not beat bicubic: give it more --iterations", file=sys.stderr)
    return 1


def _step(folder: Path, command: str, show: str) -> None:
    """Run `mlrn COMMAND` in the folder, and print the lines of its output that contain `show`."""
    print(f"\n{folder}$ mlrn {command}", flush=True)
    words = [sys.executable, "-m", "mlrn_arch", *command.split()]
    process = Popen(words, cwd=folder, stdout=PIPE, stderr=STDOUT, text=True)
    output = []
    for line in process.stdout or ():
        output.append(line)
        if show in line:
            print(line.rstrip().rpartition("INFO: ")[2], flush=True)
    if process.wait() != 0:
        raise UserError(f"`mlrn {command}` failed in {folder}:\n{''.join(output[-20:])}")
