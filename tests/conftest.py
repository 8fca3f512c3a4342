"""Small paired data that every test can make: no photographs, no download."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

import mlrn_cli
from mlrn_arch import options  # makes `import basicsr` work, too

# isort: split
from basicsr.models import build_model

from mlrn_arch.models.fast_sr_model import FastSRModel

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"


def mlrn(*arguments: str, cwd: Path, **kwargs) -> subprocess.CompletedProcess:
    """Run `mlrn ARGUMENTS` as a user would; stdout and stderr come back as one text."""
    return subprocess.run(
        [sys.executable, "-m", "mlrn_arch", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,  # a busy machine takes several times as long
        **kwargs,
    )


@pytest.fixture
def mlrn_here(monkeypatch, capsys):
    """Run `mlrn ARGUMENTS` in this process; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["mlrn", *map(str, arguments)])
        for handler in logging.getLogger("basicsr").handlers:
            if type(handler) is logging.StreamHandler:  # has the stderr of an earlier test
                handler.stream = sys.stderr
        try:
            code = mlrn_cli.main()
        except SystemExit as end:  # argparse
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def log(caplog, monkeypatch):
    """`caplog` of BasicSR's logger, which propagates nothing."""
    logger = logging.getLogger("basicsr")
    caplog.set_level(logging.INFO, "basicsr")
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, caplog.handler])
    return caplog


def start_training(
    path: str, cwd: Path, *arguments: str, processes: int = 1, **kwargs
) -> subprocess.Popen:
    """Start `mlrn train --auto_resume` in the background, several processes through torchrun."""
    command = [sys.executable, "-u", "-m"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        environment["OMP_NUM_THREADS"] = "1"
    command += ["mlrn_arch.train", "-opt", path, "--auto_resume", *arguments]
    if processes > 1:
        command += ["--launcher", "pytorch"]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


@pytest.fixture(scope="session")
def paired_data(tmp_path_factory) -> Path:
    """Eight 64x64 images and their halves, as folders and as LMDBs made by BasicSR's own tool."""
    return make_paired_data(tmp_path_factory.mktemp("data"))


def make_paired_data(root: Path) -> Path:
    """Fill `root` with the data of the fixture `paired_data`."""
    from basicsr.utils.lmdb_util import make_lmdb_from_imgs

    generator = np.random.default_rng(0)
    for name in ("gt", "lq"):
        (root / name).mkdir()
    for index in range(8):
        coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        gt = cv2.resize(coarse, (64, 64), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(root / f"gt/image{index}.png"), gt)
        lq = cv2.resize(gt, (32, 32), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(root / f"lq/image{index}.png"), lq)
    for name in ("gt", "lq"):
        files = sorted(path.name for path in (root / name).iterdir())
        keys = [file[:-4] for file in files]
        make_lmdb_from_imgs(str(root / name), str(root / f"{name}.lmdb"), files, keys)
    return root


@pytest.fixture
def train_options(paired_data) -> dict:
    """Options of a run that takes seconds on a CPU: a tiny MLRN x2, saved every 10 iterations."""
    return make_train_options(paired_data)


def make_train_options(paired_data: Path) -> dict:
    """The options of the fixture `train_options`."""
    return {
        "name": "tiny",
        "model_type": "SRModel",
        "scale": 2,
        "num_gpu": "auto",
        "manual_seed": 0,
        "datasets": {
            "train": {
                "name": "tiny",
                "type": "PairedImageDataset",
                "dataroot_gt": str(paired_data / "gt.lmdb"),
                "dataroot_lq": str(paired_data / "lq.lmdb"),
                "io_backend": {"type": "lmdb"},
                "gt_size": 32,
                "use_hflip": True,
                "use_rot": True,
                "num_worker_per_gpu": 1,
                "batch_size_per_gpu": 4,
                "dataset_enlarge_ratio": 100,
                "prefetch_mode": "cuda",
                "pin_memory": True,
            },
            "val": {
                "name": "tiny_val",
                "type": "PairedImageDataset",
                "dataroot_gt": str(paired_data / "gt"),
                "dataroot_lq": str(paired_data / "lq"),
                "io_backend": {"type": "disk"},
            },
        },
        "network_g": {"type": "MLRN", "upscale": 2, "num_feat": 8, "num_block": 1, "esa_feat": 4},
        "path": {"pretrain_network_g": None},
        "train": {
            "ema_decay": 0.9,
            "optim_g": {"type": "Adam", "lr": 0.005, "betas": [0.9, 0.99]},
            "scheduler": {"type": "MultiStepLR", "milestones": [30], "gamma": 0.5},
            "total_iter": 40,
            "pixel_opt": {"type": "L1Loss"},
        },
        "val": {
            "val_freq": 20,
            "metrics": {
                "psnr": {"type": "calculate_psnr", "crop_border": 2, "test_y_channel": True}
            },
        },
        "logger": {"print_freq": 1, "save_checkpoint_freq": 10, "use_tb_logger": True},
    }


@pytest.fixture
def fast_options(train_options) -> dict:
    """The same run by `FastSRModel` and `FastPairedImageDataset`."""
    return make_fast(train_options)


def make_fast(options: dict) -> dict:
    """Change options to `FastSRModel` and `FastPairedImageDataset`, in place."""
    options["model_type"] = "FastSRModel"
    options["datasets"]["train"]["type"] = "FastPairedImageDataset"
    return options


@pytest.fixture
def test_options(train_options) -> dict:
    """The test run that belongs to `train_options`."""
    train_options["datasets"] = {"test_1": train_options["datasets"]["val"]}
    train_options["val"].pop("val_freq")
    for section in ("train", "logger"):
        train_options.pop(section)
    return train_options


def write_yaml(path: Path, options: dict) -> str:
    """Write an option file; returns its path as text."""
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    return str(path)


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Build a model from options in this process; a resumed one gets its checkpoint."""
    monkeypatch.chdir(tmp_path)

    def make(opt: dict, resumed: str | None = None):
        path = write_yaml(tmp_path / "options.yml", opt)
        opt, _, _ = options.read("train", ["-opt", path])
        if resumed:  # as BasicSR's check_resume
            opt["path"] |= {"pretrain_network_g": resumed, "param_key_g": "params"}
        for folder in ("models", "training_states"):
            os.makedirs(opt["path"][folder], exist_ok=True)
        return build_model(opt)

    return make


@pytest.fixture
def restore_stop(monkeypatch):
    """A stop of this process's training is forgotten, and signals are handled as before."""
    monkeypatch.setattr(FastSRModel, "stop_signal", 0)
    monkeypatch.setattr(FastSRModel, "signalled_at", -float("inf"))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
