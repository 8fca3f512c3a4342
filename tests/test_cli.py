"""The front door: `mlrn`, its verbs, option files by name, and other people's networks."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from basicsr.utils.registry import ARCH_REGISTRY
from conftest import REPOSITORY, write_yaml
from PIL import Image

import mlrn_arch
import mlrn_cli
from mlrn_arch import networks, options, plugins, sources
from mlrn_arch.errors import UserError
from mlrn_arch.files import atomic_write

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
    page = (REPOSITORY / "mlrn_arch/tools/README.md").read_text()
    assert f'complete -o default -W "{" ".join(mlrn_cli.VERBS)}" mlrn' in page
    assert mlrn_here("--version")[1].startswith("mlrn 0.")
    code, _, err = mlrn_here("upscael")
    assert code == 2 and err == "mlrn: no verb 'upscael'; did you mean upscale?\n"


def test_help_and_lists_import_no_torch():
    script = """
import sys, mlrn_cli

for arguments in ("-h", "options test_MLRN_x4", "weights"):
    sys.argv[1:] = arguments.split()
    assert mlrn_cli.main() == 0
print(*sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert "name: test_MLRN_x4\n" in done.stdout and "mlrn://NTIRE_x4" in done.stdout
    assert not {"torch", "numpy", "basicsr"} & set(done.stdout.splitlines()[-1].split())


def test_ctrl_c_while_torch_is_imported():
    script = """
import os, signal, sys, mlrn_cli

class Interrupt:
    def find_spec(name, *_):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt)
sys.argv[1:] = ["profile", "MLRN"]
mlrn_cli.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr) == (130, "mlrn: interrupted\n")


@pytest.mark.parametrize("verb", mlrn_cli.VERBS)
def test_examples_of_the_help_are_understood(verb, tmp_path, mlrn_here, monkeypatch):
    """All are parsed; those of export and profile are run but for what takes long."""
    code, text, _ = mlrn_here(verb, "--help")
    examples = re.search(r"^examples:\n((?:  .+\n)+)", text, re.M)
    assert code == 0 and (examples or verb in ("train", "test", "options", "weights", "demo"))
    lines = examples[1].replace("\\\n", " ").splitlines() if examples else []
    commands = [shlex.split(line) for line in lines]
    assert all(command[:2] == ["mlrn", verb] for command in commands)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "options").symlink_to(REPOSITORY / "options")
    torch.save(ARCH_REGISTRY.get("RLFN")(upscale=4).state_dict(), tmp_path / "rlfn_x4.pth")
    for _, _, *arguments in commands:
        parse(verb, arguments)
        if verb == "profile" or "--ntire" in arguments:
            extra = ["--no-runtime"] * (verb == "profile" and "--no-runtime" not in arguments)
            code, _, err = mlrn_here(verb, *arguments, *extra)
            assert code == 0, err


def parse(verb: str, arguments: list[str]) -> None:
    module = importlib.import_module(f"mlrn_arch.tools.{verb}")
    parser = plugins.parser(f"mlrn {verb}", None)
    module.add_arguments(parser)
    parser.parse_args(arguments)


@pytest.mark.slow
def test_a_process_that_the_command_spawns_can_import_basicsr(tmp_path):
    """As workers of a loader do on macOS."""
    script = tmp_path / "mlrn"  # as pip writes it
    script.write_text(
        "import multiprocessing\nimport mlrn_cli\nif __name__ == '__main__':\n"
        "    import mlrn_arch\n    from basicsr.utils import set_random_seed\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    process = context.Process(target=set_random_seed, args=(0,))\n"
        "    process.start()\n    process.join()\n    raise SystemExit(process.exitcode)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_option_files_by_name(mlrn_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no options/ here
    code, out, _ = mlrn_here("options")
    files = sorted((REPOSITORY / "options").rglob("*.yml"))
    assert code == 0 and len(out.splitlines()) == len(files)
    code, out, _ = mlrn_here("options", "ablation/train_MLRN_x2_wo_ConvMix")
    assert code == 0 and yaml.safe_load(out)["network_g"]["mixer"] == "none"
    schema = Path(out.splitlines()[0].partition("$schema=")[2])  # found from any folder
    assert schema.is_absolute()
    code, out, _ = mlrn_here("options", "--schema")
    assert code == 0 and out == schema.read_text() and "properties" in json.loads(out)
    code, _, err = mlrn_here("options", "train_MLNR_x4")
    assert code == 2 and "did you mean train_MLRN_x4" in err
    code, _, err = mlrn_here("train", "-opt", "mlrn://train_MLRN_x4")
    assert code == 2 and err.count("no such folder") >= 2
    code, _, err = mlrn_here("train", "-opt", "train_MLRN_x4.yml")
    assert code == 2 and "there is no option file train_MLRN_x4.yml here; `mlrn options`" in err


@pytest.mark.parametrize("page", ["README.md", "options/README.md", "mlrn_arch/tools/README.md"])
def test_commands_of_the_pages_are_understood(page):
    text = (REPOSITORY / page).read_text().replace("\\\n", " ")
    commands = re.findall(r"^(?:\$ )?mlrn (\w+)\b(?!:)(.*)$", text, re.M)
    assert len(commands) > 1
    for verb, arguments in commands:
        words = shlex.split(arguments.split(" > ")[0], comments=True)
        if verb in ("train", "test"):
            options.parse_args(verb, words)
            continue
        parse(verb, words)


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
    network, _ = networks.build(sources.find("b.yml").network_g)
    assert network(torch.rand(1, 3, 4, 4)).shape == (1, 3, 8, 8)
    with pytest.raises(UserError, match="import gone.py: no such file"):
        plugins.register(["gone.py"])
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(UserError, match="import broken.py: ZeroDivisionError"):
        plugins.register("broken.py")
    (tmp_path / "broken.py").rename(tmp_path / "torch.py")
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match="import plain: a folder needs an __init__.py"):
        plugins.register("plain")
    with pytest.raises(UserError, match="import torch.py: .* has the same name"):
        plugins.register("torch.py")


def test_anothers_class_goes_before_ours(tmp_path, monkeypatch, capsys):
    """Whichever is imported first; two of other people are BasicSR's own affair."""
    ours = ARCH_REGISTRY.get("SRCNN")
    monkeypatch.setattr(ARCH_REGISTRY, "_obj_map", dict(ARCH_REGISTRY._obj_map))
    (tmp_path / "own.py").write_text(OWN.format(name="SRCNN"))
    plugins.register([str(tmp_path / "own.py")])
    theirs = ARCH_REGISTRY.get("SRCNN")
    assert theirs is not ours and "SRCNN: using own, not mlrn_arch" in capsys.readouterr().err
    ARCH_REGISTRY.register(ours)
    assert ARCH_REGISTRY.get("SRCNN") is theirs
    with pytest.raises(AssertionError, match="already registered"):
        ARCH_REGISTRY.register(type("SRCNN", (), {"__module__": "third"}))


def test_what_other_plugins_look_for_is_there():
    assert importlib.util.find_spec("torchvision.transforms.functional_tensor")
    from basicsr.utils.matlab_functions import rgb2ycbcr  # HAT's import, of BasicSR 1.3

    assert rgb2ycbcr(np.float32([[[1, 1, 1]]]), y_only=True).item() == pytest.approx(235 / 255)


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
    torch.save(ARCH_REGISTRY.get("RLFN")(upscale=2).state_dict(), tmp_path / "rlfn_x2.pth")
    data = [f"datasets:train:dataroot_{key}={paired_data}/{key}.lmdb" for key in ("gt", "lq")]
    short = ["gt_size=32", "batch_size_per_gpu=2", "num_worker_per_gpu=1"]
    short = [*data, *(f"datasets:train:{entry}" for entry in short), "train:total_iter=2"]
    sets = {"name": "S", "type": "PairedImageDataset", "io_backend": {"type": "disk"}}
    sets |= {f"dataroot_{key}": f"{paired_data}/{key}" for key in ("gt", "lq")}
    val = [f"datasets:val:dataroot_{key}={paired_data}/{key}" for key in ("gt", "lq")]
    runs = []
    for name, more in (("train_MLRN_x2", val), ("weights/train_MLRN_x2_blocks", [])):
        file = f"{REPOSITORY}/options/{name}.yml"
        runs.append(("train", ["-opt", file, "--force_yml", *short, *more]))
    for name in ("test_MLRN_x2", "baselines/test_Bicubic_x2"):
        shipped = yaml.safe_load((REPOSITORY / f"options/{name}.yml").read_text())
        file = tmp_path / f"{shipped['name']}.yml"
        runs.append(("test", ["-opt", write_yaml(file, {**shipped, "datasets": {"test_1": sets}})]))
    script = """
import json, os, sys
import mlrn_arch
from basicsr import test, train

for phase, sys.argv[1:] in json.loads(sys.argv[1]):
    getattr(globals()[phase], f"{phase}_pipeline")(os.getcwd())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(runs)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("End of training") == 2 and done.stdout.count("# psnr: ") == 3


@pytest.mark.slow
def test_every_command_of_the_readme(tmp_path):
    """All `mlrn ...` lines of its blocks but the demo's, in turn, on tiny data."""
    (tmp_path / "options").symlink_to(REPOSITORY / "options")
    sizes = {"HR/a.png": (480, 480), "small/b.png": (48, 48), "ppt3/ppt3.png": (160, 480)}
    sizes |= {"photos/c.jpg": (40, 30), "photo.jpg": (40, 30), "scan.png": (30, 40)}
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        noise = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.BICUBIC).save(tmp_path / name)
    for name, file in (("RLFN", "rlfn_x4"), ("MLRN", "net"), ("MLRN", "net_g_latest")):
        torch.save(ARCH_REGISTRY.get(name)(upscale=4).state_dict(), tmp_path / f"{file}.pth")

    text = (REPOSITORY / "README.md").read_text().replace("\\\n", " ")
    for ours, theirs in (("/path/to/DIV2K_train_HR", "HR"), ("/path/to/Set5", "small")):
        text = text.replace(ours, theirs)
    lines = [line for block in text.split("```")[1::2] for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("mlrn ")]
    commands = [[word.replace("~/photos", "HR") for word in command] for command in commands]
    assert {command[0] for command in commands} >= {"prepare", "train", "test", "compare", "export"}
    for command in commands:
        if command[0] == "train":
            command += ["--force_yml"] * ("--force_yml" not in command)
            command += ["train:total_iter=2", "val:val_freq=2", "datasets:train:gt_size=32"]
            command += ["datasets:train:batch_size_per_gpu=2"]
        command += ["--no-runtime"] * (command[0] == "profile")
    script = """
import json, sys
import mlrn_cli

for command in json.loads(sys.argv[1]):
    sys.argv[1:] = command
    if code := mlrn_cli.main():
        sys.exit(f"{code}: {command}")
"""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            script,
            json.dumps([["prepare", "ppt3", "datasets/Set14", "--benchmark"], *commands]),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert sorted(os.listdir(tmp_path / "upscaled")) == ["c_x4.jpg", "photo_x4.jpg"]
    made = ["comparison/table.md", "mlrn_x4.onnx", "MLRN_x4.pth", "scan_large.png"]
    assert all((tmp_path / name).exists() for name in made)


@pytest.mark.slow
def test_scripts_run_as_hats_do(tmp_path):
    done = subprocess.run(
        [sys.executable, REPOSITORY / "mlrn_arch/train.py", "-opt", "gone.yml"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 2 and "there is no option file gone.yml here" in done.stderr


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "net.pth"
    file.write_text("before")
    with pytest.raises(KeyboardInterrupt), atomic_write(file) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(ValueError), atomic_write(tmp_path / "folder") as part:
        part.mkdir()
        (part / "half").write_text("half")
        raise ValueError
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]
    assert file.read_text() == "before"
    with atomic_write(file) as part:
        assert part.suffix == ".pth" and part.name.startswith(".")
        part.write_text("after")
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]
    assert file.read_text() == "after"


def test_names_of_the_shipped_networks():
    assert mlrn_arch.list_models() == ["MLRN_x2", "MLRN_x3", "MLRN_x4", "MLRN_NTIRE_x4"]
