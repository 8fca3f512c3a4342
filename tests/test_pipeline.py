"""BasicSR's own pipelines on a CPU: train, kill, resume, test."""

from __future__ import annotations

import re

import torch
from conftest import mlrn, write_yaml


def losses(output: str) -> dict[int, float]:
    found = re.findall(r"iter: +([\d,]+).*l_pix: (\S+)", output)
    return {int(step.replace(",", "")): float(loss) for step, loss in found}


def test_training_lowers_the_loss_and_resumes(tmp_path, train_options, mlrn_here, monkeypatch, log):
    """Stock `SRModel`: what compat repairs in BasicSR's own training."""
    monkeypatch.chdir(tmp_path)
    command = ["train", "-opt", write_yaml(tmp_path / "tiny.yml", train_options), "--auto_resume"]
    code, _, err = mlrn_here(*command)
    assert code == 0, err
    loss = losses(log.text)
    assert sorted(loss) == list(range(1, 41))
    assert sum(loss[i] for i in range(31, 41)) < 0.7 * sum(loss[i] for i in range(1, 11))
    assert "Validation tiny_val" in log.text
    assert log.text.count("they need a GPU") == (0 if torch.cuda.is_available() else 1)
    experiment = tmp_path / "experiments/tiny"
    assert (experiment / "models/net_g_latest.pth").exists()
    assert list((tmp_path / "tb_logger/tiny").iterdir())
    assert {p.name for p in tmp_path.iterdir()} == {"tiny.yml", "experiments", "tb_logger"}

    # A kill in the middle of the last save tore its state, the one before is not ours.
    state = experiment / "training_states/40.state"
    state.write_bytes(state.read_bytes()[:1000])
    (experiment / "models/net_g_30.pth").rename(experiment / "models/net_g_35.pth")
    torch.save({"a": torch.zeros(1)}, experiment / "training_states/35.state")
    log.clear()
    code, out, err = mlrn_here(*command)
    assert code == 0, err
    for name in ("40", "35", "30"):  # 30 has lost its network
        assert re.search(rf"Skipping .*{name}.state", out)
    assert "Resuming training from epoch: 0, iter: 20." in log.text
    assert sorted(losses(log.text)) == list(range(21, 41))
    assert not list(tmp_path.glob("experiments/*archived*"))

    # No whole state: the experiment is neither renamed away nor trained anew.
    for path in (experiment / "training_states").iterdir():
        path.write_bytes(b"")
    code, _, err = mlrn_here(*command)
    assert code == 2 and "no complete training state" in err and "Traceback" not in err
    assert len(list(tmp_path.glob("experiments/*"))) == 1


def test_test_pipeline_loads_a_published_plain_state_dict(tmp_path, test_options, paired_data):
    """RLFN's authors publish a bare state dict with official names and image range 255."""
    import cv2
    from basicsr.metrics import calculate_psnr
    from basicsr.utils import img2tensor, tensor2img

    from mlrn_arch.archs.rlfn_arch import RLFN

    arguments = {"upscale": 2, "num_feat": 8, "num_block": 2, "esa_feat": 4}
    network = RLFN(**arguments).eval()
    torch.save(network.state_dict(), tmp_path / "rlfn.pth")
    test_options["network_g"] = {"type": "RLFN", **arguments}
    test_options["path"] = {"pretrain_network_g": str(tmp_path / "rlfn.pth")}
    result = mlrn("test", "-opt", write_yaml(tmp_path / "rlfn.yml", test_options), cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    scores = []
    for path in sorted((paired_data / "lq").iterdir()):
        lq = img2tensor(cv2.imread(str(path)) / 255.0).unsqueeze(0)
        with torch.no_grad():
            sr = tensor2img(network(lq))
        gt = cv2.imread(str(paired_data / "gt" / path.name))
        scores.append(calculate_psnr(sr, gt, crop_border=2, test_y_channel=True))
    table = [line.split() for line in result.stdout.splitlines()[-2:]]
    mean = f"{sum(scores) / len(scores):.4f}"
    assert table == [["set", "images", "psnr"], ["tiny_val", "8", mean]]
    (log,) = (tmp_path / "results/tiny").glob("*.log")
    assert "network_g:[" in log.read_text() and "network_g:[" not in result.stdout
    assert (tmp_path / "results/tiny").is_dir()
