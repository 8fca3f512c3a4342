"""Every form of a network and of a checkpoint, by every way that takes one."""

from __future__ import annotations

import json
import re

import pytest
import torch
from basicsr.models.base_model import BaseModel
from conftest import write_yaml

from mlrn_arch import Upscaler, networks, option_files, options, shipped, sources
from mlrn_arch.archs.mlrn_arch import MLRN
from mlrn_arch.archs.rlfn_arch import RLFN
from mlrn_arch.errors import UserError

TINY = {"upscale": 2, "num_feat": 8, "num_block": 1, "esa_feat": 4}
NAMED = "MLRN:" + ",".join(f"{key}={value}" for key, value in TINY.items())


def make(seed: int) -> MLRN:
    torch.manual_seed(seed)
    return MLRN(**TINY).eval()


@pytest.fixture
def network(tmp_path, monkeypatch, test_options) -> MLRN:
    """The network of `net.pth`, of `net.yml` and, by its scale, of options/test_MLRN_x2.yml."""
    monkeypatch.chdir(tmp_path)
    network = make(0)
    torch.save({"params": network.state_dict()}, "net.pth")
    write_yaml(tmp_path / "net.yml", {**test_options, "path": {"pretrain_network_g": "net.pth"}})
    (tmp_path / "options").mkdir()
    other = {**test_options, "network_g": {"type": "Bicubic", "upscale": 2}}
    write_yaml(tmp_path / "options/test_MLRN_x2.yml", other)
    return network


def same(network: torch.nn.Module, other: torch.nn.Module) -> bool:
    x = torch.rand(1, 3, 21, 17)
    with torch.no_grad():
        return torch.equal(network(x), other(x))


CHECKPOINTS = {
    "bare": lambda state: state,
    "params": lambda state: {"params": state},
    "params_ema": lambda state: {"params_ema": state},
    "both": lambda state: {"params": make(1).state_dict(), "params_ema": state},
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {}}},
    "model": lambda state: {"model": state},
    "module": lambda state: {"params": {f"module.{k}": v for k, v in state.items()}},
    "safetensors": None,
}


@pytest.mark.parametrize("form", CHECKPOINTS)
def test_every_form_of_a_checkpoint_loads_everywhere(network, tmp_path, mlrn_here, form):
    if form == "safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
        file = "form.safetensors"
        assert mlrn_here("export", "net.yml", file)[0] == 0
    else:
        file = "form.pth"
        torch.save(CHECKPOINTS[form](network.state_dict()), file)
    assert same(sources.load(file)[0], network)
    assert same(sources.load("net.yml", file)[0], network)
    assert same(Upscaler(None, weights=file).network, network)

    key = "params_ema" if form == "both" else "params"
    opt, _, _ = options.read("test", [f"net.yml:{file}", "--force_yml", f"path:param_key_g={key}"])
    target, path = make(2), opt["path"]
    loader = BaseModel({"num_gpu": 0, "is_train": False, "dist": False})
    loader.load_network(target, path["pretrain_network_g"], True, path["param_key_g"])
    assert same(target, network)


def test_several_weights_in_one_checkpoint_are_named(network):
    torch.save({"net_a": network.state_dict(), "net_b": network.state_dict()}, "two.pth")
    with pytest.raises(UserError, match="holds the weights net_a, net_b; choose by path:param_key"):
        sources.load("net.yml:two.pth")


@pytest.mark.parametrize("text", ["net.yml", "net.pth", f"{NAMED}:net.pth", "net.yml:net.pth"])
def test_every_form_of_a_network_is_taken_by_every_verb(network, tmp_path, mlrn_here, text):
    opt, _, _ = options.read("test", [text])
    assert len(networks.build(opt["network_g"])[0].body) == 1
    assert opt["path"]["pretrain_network_g"] == "net.pth" and opt["scale"] == 2
    assert same(Upscaler(text).network, network)
    assert mlrn_here("export", text, "out.pth")[0] == 0
    assert same(sources.load("out.pth")[0], network)
    flags = ["--input-size", "24x16", "--no-runtime", "--json", "out.json"]
    assert mlrn_here("profile", text, *flags)[0] == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["networks"]
    assert row["parameters"] == sum(p.numel() for p in network.parameters())
    assert row["upscale"] == 2


@pytest.mark.parametrize("text", ["x4", "MLRN_x4", "mlrn://x4", "NTIRE_x4", "mlrn://MLRN_NTIRE_x4"])
def test_shipped_names(text):
    network, network_g = sources.load(text)
    wanted = "MLRN_NTIRE_x4" if "NTIRE" in text else "MLRN_x4"
    assert network_g == shipped.info(wanted)["network_g"]
    assert same(network, networks.create_model(wanted, pretrained=True))


def test_test_takes_a_shipped_network(network, tmp_path, test_options):
    write_yaml(tmp_path / "options/test_MLRN_x2.yml", test_options)
    opt, args, _ = options.read("test", ["x2", "--force_yml", "val:save_img=true"])
    assert opt["name"] == "test_MLRN_x2" and opt["network_g"] == {"type": "MLRN", "upscale": 2}
    assert opt["path"]["pretrain_network_g"] == shipped.info("x2")["file"]
    assert opt["val"]["save_img"] and args.opt == "options/test_MLRN_x2.yml"
    for text, told in {
        "x3": re.escape(str(shipped.option_files()["test_MLRN_x3"]))
        + r" has [\s\S]* none of these exists",
        NAMED: f"names no checkpoint; write {NAMED}:CHECKPOINT",
        "RLFN:upscale=2:net.pth": "net.pth is not a checkpoint of this RLFN",
    }.items():
        with pytest.raises(UserError, match=told):
            options.read("test", [text])


def test_loosely_loaded_weights_must_still_fit_in_shape(network, tmp_path):
    opt = option_files.load_yaml("net.yml")
    opt["network_g"] = {**opt["network_g"], "num_block": 2}
    opt["path"]["strict_load_g"] = False
    write_yaml(tmp_path / "loose.yml", opt)
    assert len(sources.load("loose.yml")[0].body) == 2
    opt["network_g"]["upscale"] = 3
    write_yaml(tmp_path / "loose.yml", opt)
    with pytest.raises(UserError, match=r"other shapes: upsampler.0.weight \(\(12, 8, 3, 3\)"):
        sources.load("loose.yml")


@pytest.mark.parametrize("verb", ["test", "compare", "profile", "export", "upscale"])
def test_the_forms_are_told_by_every_verb(mlrn_here, verb):
    code, out, _ = mlrn_here(verb, "--help")
    assert code == 0 and sources.FORMS in out


def test_a_checkpoint_of_another_network_is_told(network):
    torch.save(RLFN(**TINY).state_dict(), "rlfn.pth")
    with pytest.raises(UserError, match="rlfn.pth: these are no weights of MLRN"):
        sources.load("rlfn.pth")
