"""README's first command, cut short: all of its steps, and what they leave."""

import re

import cv2
from conftest import mlrn


def test_demo(tmp_path):
    done = mlrn("demo", "--iterations", "20", cwd=tmp_path)
    # So short a training may or may not beat bicubic, which the exit code tells.
    rows = re.findall(r"^(chelsea|coffee) +([\d.]+) / [\d.]+ +([\d.]+) /", done.stdout, re.M)
    assert [name for name, *_ in rows] == ["chelsea", "coffee"], done.stdout
    better = all(float(ours) > float(bicubic) for _, bicubic, ours in rows)
    assert done.returncode == (0 if better else 1)
    assert cv2.imread(str(tmp_path / "mlrn_demo/demo.png")).shape[1] > 1000
