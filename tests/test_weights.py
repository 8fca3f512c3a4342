"""Shipped checkpoints: they load by name, and score what stands beside them."""

import json
import re

import pytest
import torch
from conftest import REPOSITORY, SHARED, write_yaml

from mlrn_arch import create_model, shipped, sources


def test_names_are_the_papers_networks():
    # Parameters as Table 1 and Table 3 print them.
    counts = {"MLRN_x2": 488, "MLRN_x3": 496, "MLRN_x4": 507, "MLRN_NTIRE_x4": 275}
    assert set(shipped.names()) == set(counts)
    for name, thousands in counts.items():
        network = create_model(name)
        assert round(sum(p.numel() for p in network.parameters()) / 1e3) == thousands
        assert not network.training


@pytest.mark.parametrize("name", shipped.names())
def test_loads_by_name(name):
    network = create_model(name, pretrained=True)
    size = 24
    smooth = torch.linspace(0.2, 0.8, size).expand(1, 3, size, size)
    with torch.inference_mode():
        output = network(smooth)
    wanted = torch.nn.functional.interpolate(
        smooth, scale_factor=network.upscale, mode="bilinear", align_corners=False
    )
    assert (output - wanted).abs().mean() < 0.02  # a trained network keeps a ramp a ramp
    known = shipped.info(name)
    assert known["iterations"] == sum(stage["iterations"] for stage in known["recipe"])
    assert known["recipe"][-1]["scale"] == network.upscale
    assert known["data"] and known["licence"]


def test_unknown_name_tells_the_known_ones():
    with pytest.raises(ValueError, match="MLRN_x5.*MLRN_x2, MLRN_x3, MLRN_x4"):
        create_model("MLRN_x5")


def test_unknown_name_in_option_file(tmp_path, test_options, mlrn_here):
    test_options["path"]["pretrain_network_g"] = "mlrn://x5"
    code, _, err = mlrn_here("test", "-opt", write_yaml(tmp_path / "t.yml", test_options))
    assert code == 2
    assert "path:pretrain_network_g: no network is named 'x5'; there are" in err


def test_another_image_range_is_converted(capsys):
    """Tensors fit all the same, and unconverted Set5 would score 26 dB instead of 32."""
    x = torch.rand(1, 3, 32, 32)
    for name, img_range in (("NTIRE_x4", 1), ("x4", 255)):
        network = create_model(name, pretrained=True, img_range=img_range)
        shape = "num_feat=50,num_block=4," if "NTIRE" in name else ""
        other, _ = sources.load(f"MLRN:{shape}upscale=4,img_range={img_range}:mlrn://{name}")
        with torch.inference_mode():
            wanted = sources.load(name)[0](x)
            torch.testing.assert_close(network(x), wanted, rtol=0, atol=1e-5)
            torch.testing.assert_close(other(x), wanted, rtol=0, atol=1e-5)
        assert re.search(f"converted from img_range .* to {img_range}\n", capsys.readouterr().err)


def test_list_tells_every_network(mlrn_here):
    listed = json.loads(mlrn_here("weights", "--json")[1])
    assert [entry["name"] for entry in listed] == shipped.names()
    plain = mlrn_here("weights")[1]
    assert all(name.replace("MLRN_", "mlrn://", 1) in plain for name in shipped.names())


@pytest.mark.skipif(not SHARED.exists(), reason="needs Set5 and Set14 in ../shared")
@pytest.mark.parametrize("name", shipped.names())
def test_scores_are_those_of_mlrn_test(name, tmp_path, mlrn_here, monkeypatch, log):
    monkeypatch.chdir(tmp_path)
    known = shipped.info(name)
    scale = known["network_g"]["upscale"]
    (tmp_path / "datasets").symlink_to(SHARED / "data/benchmark")
    file = REPOSITORY / f"options/test_MLRN_x{scale}.yml"
    forced = [f"path:pretrain_network_g={shipped.PREFIX}{name}", "val:save_img=false"]
    forced += [f"network_g={json.dumps(known['network_g'])}", "datasets:test_2=none"]
    code, _, err = mlrn_here("test", "-opt", file, "--force_yml", *forced)
    assert code == 0, err
    for metric, digits in (("PSNR", 2), ("SSIM", 4)):
        printed = re.search(rf"# {metric.lower()}: ([\d.]+)", log.text)[1]
        assert float(printed) == pytest.approx(
            known["scores"]["Set5"][metric], abs=0.6 / 10**digits
        )
