"""Every form of a network and of a checkpoint, by every way that takes one."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from basicsr.models import base_model
from basicsr.models.base_model import BaseModel
from conftest import write_yaml

from mlrn_arch import Upscaler, checkpoints, networks, option_files, options, shipped, sources
from mlrn_arch.archs.mlrn_arch import MLRN
from mlrn_arch.archs.rlfn_arch import RLFN
from mlrn_arch.errors import UserError

TINY = {"upscale": 2, "num_feat": 8, "num_block": 1, "esa_feat": 4}
FORMS_TEXT = re.sub(r",\n +", ",", sources.FORMS)
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
    "compiled": lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
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

    opt, _, _ = options.read("test", [f"net.yml:{file}"])
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
    with pytest.raises(UserError, match=r"rlfn.pth: it is no MLRN .*; name its option file"):
        sources.load("rlfn.pth")
    torch.save(RLFN(upscale=3).state_dict(), "rlfn.pth")
    with pytest.raises(UserError) as caught:
        sources.load(None, "rlfn.pth")
    way = str(caught.value).rpartition(" give ")[2]
    assert way == "mlrn://baselines/test_RLFN_x3:rlfn.pth" and sources.load(way)


def test_a_checkpoint_notes_its_network_and_stays_readable_for_others(network, tmp_path):
    """What its tensors do not tell; stock BasicSR, spandrel and plain torch load the file."""
    network_g = {"type": "MLRN", **TINY, "img_range": 255, "act": "lrelu", "bilinear": False}
    trained = networks.build(network_g)[0].eval()
    state = checkpoints.note(trained.state_dict(), network_g)
    torch.save({"params": state, "params_ema": state}, "noted.pth")
    assert same(sources.load("noted.pth")[0], trained)
    with pytest.raises(UserError, match="act: lrelu, bilinear: False, and .* act: gelu, bilinear"):
        sources.load("net.yml:noted.pth")

    target = networks.build(network_g)[0].eval()
    target.load_state_dict(torch.load("noted.pth", weights_only=True)["params"])
    assert same(target, trained)
    target = networks.build(network_g)[0].eval()
    spec = importlib.util.spec_from_file_location("stock", base_model.__file__)  # not patched
    stock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stock)
    loader = stock.BaseModel({"num_gpu": 0, "is_train": False, "dist": False})
    loader.load_network(target, "noted.pth", True, "params_ema")
    assert same(target, trained)
    spandrel = pytest.importorskip("spandrel", reason="spandrel is not installed")
    from mlrn_arch.spandrel import install

    install()
    loaded = spandrel.ModelLoader("cpu").load_from_file("noted.pth")
    assert same(loaded.model.eval(), trained) and not loaded.supports_half


def test_a_noted_list_is_as_good_as_a_tuple(network, mlrn_here):
    srcnn = {"type": "SRCNN", "num_feat": [8, 4], "upscale": 2}
    torch.save(checkpoints.note(networks.build(srcnn)[0].state_dict(), srcnn), "srcnn.pth")
    assert sources.load("SRCNN:num_feat=[8,4],upscale=2:srcnn.pth")
    assert sources.load("srcnn.pth")[1] == srcnn


def test_what_is_not_loaded_is_told(network, tmp_path, capsys):
    opt = option_files.load_yaml("net.yml")
    opt["path"]["strict_load_g"] = False
    write_yaml(tmp_path / "loose.yml", opt)
    state = network.state_dict()
    torch.save({k: v for k, v in state.items() if k != "conv_first.bias"}, "part.pth")
    sources.load("loose.yml:part.pth")
    assert "part.pth does not fit whole (strict_load is false): it lacks conv_first.bias" in (
        capsys.readouterr().err
    )
    torch.save({f"net.{k}": v for k, v in state.items()}, "none.pth")
    with pytest.raises(UserError, match="none.pth is not a checkpoint of this MLRN: it lacks"):
        sources.load("loose.yml:none.pth")


def test_weights_that_are_not_finite_are_refused(network, mlrn_here):
    state = network.state_dict()
    state["body.0.conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save({"params": state}, "nan.pth")
    for verb in (
        "export net.yml:nan.pth out.pth",
        "export nan.pth out.pth",
        "test net.yml:nan.pth",
    ):
        code, _, err = mlrn_here(*verb.split())
        assert code == 2 and "nan.pth: body.0.conv1.weight holds NaN or infinity" in err
    assert not Path("out.pth").exists()


def test_the_examples_of_the_forms_run():
    named = re.findall(r"mlrn://[\w/]+|'.+?'|\bx4\b|\w+:\w+=\d[^ ,]*,\S*\d", FORMS_TEXT)
    assert len(named) >= 4
    for text in named:
        found = sources.find(text.strip("'"))
        network = networks.build(found.network_g)[0].eval()
        with torch.inference_mode():
            assert network(torch.rand(1, 3, 32, 32)).shape == (1, 3, 128, 128), text
    with pytest.raises(UserError, match="nothing that comes with the package is named 'mlrn://x5'"):
        sources.find("mlrn://x5")


def test_a_changed_checkpoint_is_read_again(network):
    sources.load("net.pth")
    torch.save({"params": make(1).state_dict()}, "net.pth")
    assert same(sources.load("net.pth")[0], make(1))
