"""The front door: `mlrn`, its verbs, option files by name, and other people's networks."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
import yaml
from basicsr.utils.registry import ARCH_REGISTRY
from conftest import REPOSITORY, write_yaml

import mlrn_arch
import mlrn_cli
from mlrn_arch import networks, plugins
from mlrn_arch.errors import UserError

OWN = """
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn


@ARCH_REGISTRY.register()
class {name}(nn.Sequential):
    def __init__(self, upscale=2, num_feat=4):
        super().__init__(nn.Conv2d(3, 3 * upscale**2, 3, padding=1), nn.PixelShuffle(upscale))
"""


def test_alone_it_tells_its_verbs(mlrn_here):
    code, out, _ = mlrn_here()
    assert code == 0 and all(f"  {verb} " in out for verb in mlrn_cli.VERBS)
    assert mlrn_here("--version")[1].startswith("mlrn 0.")
    code, _, err = mlrn_here("upscael")
    assert code == 2 and err == "mlrn: no verb 'upscael'; did you mean upscale?\n"


def test_help_imports_no_torch():
    script = "import sys, mlrn_cli; sys.argv[1:] = ['-h']; mlrn_cli.main(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert "mlrn_cli" in done.stdout and "torch" not in done.stdout.split()


def test_option_files_by_name(mlrn_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no options/ here
    code, out, _ = mlrn_here("options")
    files = sorted((REPOSITORY / "options").rglob("*.yml"))
    assert code == 0 and len(out.splitlines()) == len(files)
    code, out, _ = mlrn_here("options", "ablation/train_MLRN_x2_wo_ConvMix")
    assert code == 0 and yaml.safe_load(out)["network_g"]["mixer"] == "none"
    code, _, err = mlrn_here("options", "train_MLNR_x4")
    assert code == 2 and "did you mean train_MLRN_x4" in err
    code, _, err = mlrn_here("train", "-opt", "mlrn://train_MLRN_x4")
    assert code == 2 and err.count("no such folder") >= 2
    code, _, err = mlrn_here("train", "-opt", "train_MLRN_x4.yml")
    assert code == 2 and "there is no option file train_MLRN_x4.yml here; `mlrn options`" in err


@pytest.mark.parametrize("page", ["README.md", "options/README.md", "mlrn_arch/tools/README.md"])
def test_commands_of_the_pages_are_understood(page):
    text = (REPOSITORY / page).read_text().replace("\\\n", " ")
    commands = re.findall(r"^(?:\$ )?mlrn (?!train|test)(\w+) ?(.*)$", text, re.M)
    assert len(commands) > 1
    for verb, arguments in commands:
        module = importlib.import_module(f"mlrn_arch.tools.{verb}")
        parser = plugins.parser(f"mlrn {verb}", None)
        module.add_arguments(parser)
        parser.parse_args(shlex.split(arguments.split(" > ")[0], comments=True))


def test_a_network_from_a_file_takes_part_everywhere(tmp_path, mlrn_here, monkeypatch):
    """By --import and by the option file's own key; as a module, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("PluginA", "PluginB"):
        (tmp_path / f"{name.lower()}.py").write_text(OWN.format(name=name))
    code, out, err = mlrn_here(
        "profile", "PluginA:upscale=2", "--import", "plugina.py", "--no-runtime"
    )
    assert code == 0 and "PluginA" in out, err
    plugins.register(["plugina.py"])  # once is enough
    write_yaml(tmp_path / "b.yml", {"import": "pluginb", "network_g": {"type": "PluginB"}})
    network, _ = networks.build(networks.find("b.yml").network_g)
    assert network(torch.rand(1, 3, 4, 4)).shape == (1, 3, 8, 8)
    with pytest.raises(UserError, match="import gone.py: FileNotFoundError"):
        plugins.register(["gone.py"])
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(UserError, match="import broken.py: ZeroDivisionError"):
        plugins.register("broken.py")


def test_anothers_class_goes_before_ours(tmp_path, monkeypatch, capsys):
    """Whichever is imported first; two of other people are BasicSR's own affair."""
    ours = ARCH_REGISTRY.get("SRCNN")
    monkeypatch.setattr(ARCH_REGISTRY, "_obj_map", dict(ARCH_REGISTRY._obj_map))
    (tmp_path / "own.py").write_text(OWN.format(name="SRCNN"))
    plugins.register([str(tmp_path / "own.py")])
    theirs = ARCH_REGISTRY.get("SRCNN")
    assert theirs is not ours and "SRCNN is mlrn_import_own's" in capsys.readouterr().err
    ARCH_REGISTRY.register(ours)
    assert ARCH_REGISTRY.get("SRCNN") is theirs
    with pytest.raises(AssertionError, match="already registered"):
        ARCH_REGISTRY.register(type("SRCNN", (), {"__module__": "third"}))


def test_the_repair_of_torchvision_has_a_spec():
    assert importlib.util.find_spec("torchvision.transforms.functional_tensor")


@pytest.mark.slow
def test_beside_another_plugins_stub():
    """One without a spec, on which find_spec fails."""
    script = """
import sys, types
name = "torchvision.transforms.functional_tensor"
sys.modules[name] = types.ModuleType(name)
sys.modules[name].rgb_to_grayscale = None
import mlrn_arch
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 0


@pytest.mark.slow
def test_basicsrs_own_pipelines_take_our_files(tmp_path, paired_data):
    """Unmodified, as their own train.py and test.py run them once `mlrn_arch` is imported."""
    data = [f"datasets:{key}={paired_data}" for key in ("train:dataroot_gt", "train:dataroot_lq")]
    data = [f"{entry}/{entry.split('_')[1][:2]}.lmdb" for entry in data]
    data += [f"datasets:val:dataroot_{key}={paired_data}/{key}" for key in ("gt", "lq")]
    short = ["train:gt_size=32", "train:batch_size_per_gpu=2"]
    short = [*(f"datasets:{entry}" for entry in short), "train:total_iter=2", "val:val_freq=2"]
    sets = {"name": "S", "type": "PairedImageDataset", "io_backend": {"type": "disk"}}
    sets |= {f"dataroot_{key}": f"{paired_data}/{key}" for key in ("gt", "lq")}
    shipped = yaml.safe_load((REPOSITORY / "options/test_MLRN_x2.yml").read_text())
    test_file = write_yaml(tmp_path / "test.yml", {**shipped, "datasets": {"test_1": sets}})
    for phase, arguments in (
        (
            "train",
            ["-opt", f"{REPOSITORY}/options/train_MLRN_x2.yml", "--force_yml", *data, *short],
        ),
        ("test", ["-opt", test_file]),
    ):
        script = f"import mlrn_arch, basicsr.{phase} as b; b.{phase}_pipeline({str(tmp_path)!r})"
        done = subprocess.run(
            [sys.executable, "-c", script, "-opt", *arguments],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0 and "# psnr: " in done.stdout, done.stdout


@pytest.mark.slow
def test_scripts_run_as_hats_do(tmp_path):
    done = subprocess.run(
        [sys.executable, REPOSITORY / "mlrn_arch/train.py", "-opt", "gone.yml"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 2 and "there is no option file gone.yml here" in done.stderr


def test_names_of_the_shipped_networks():
    assert mlrn_arch.list_models() == ["MLRN_x2", "MLRN_x3", "MLRN_x4", "MLRN_NTIRE_x4"]
