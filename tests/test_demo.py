"""README's first command, cut short: all of its steps, and what they leave."""

import json

import cv2
import pytest
from conftest import mlrn


@pytest.mark.slow
def test_demo(tmp_path):
    done = mlrn("demo", "--iterations", "20", cwd=tmp_path)
    folder = tmp_path / "mlrn_demo/comparison"
    rows = json.loads((folder / "table.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["Bicubic", "MLRN"], done.stdout
    bicubic, ours = (row["unseen PSNR"] for row in rows)
    assert f"{bicubic:.2f}" in done.stdout and f"{ours:.2f}" in done.stdout
    results = done.stdout.partition("The results:")[2].split()[:3]
    assert all((tmp_path / file).is_file() for file in results)
    assert "mlrn upscale photo.jpg" in done.stdout
    # So short a training may or may not beat bicubic, which the exit code tells.
    assert done.returncode == (0 if ours > bicubic else 1)
    (picture,) = folder.glob("visual_chelsea_*.png")
    assert cv2.imread(str(picture)).shape[1] > 1000
