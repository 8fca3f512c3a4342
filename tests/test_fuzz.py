"""Whatever an option file or an image holds, reading it succeeds or ends in a sentence."""

from __future__ import annotations

import copy
import io
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import yaml
from basicsr.utils.lmdb_util import make_lmdb_from_imgs
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from mlrn_arch import option_files, options, schema
from mlrn_arch.errors import UserError
from mlrn_arch.inference import image_files

FILES = sorted((REPOSITORY / "options").rglob("*.yml"))
WRONG = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1, 2.5, 1e30, float("nan"), float("inf"), "", " "]),
    st.sampled_from(["4", "5e-4", "x4", "a/b", "..", "~", "{}", "{}{", "none", "\0", [], {}, [[]]]),
    st.sampled_from([[None], [0, "a"], {"type": None}, {"type": "MLRN"}, {"a": {"b": 1}}]),
    st.integers(),
    st.text(max_size=4),
)


KEYS = st.one_of(
    st.sampled_from(sorted({place[-1] for place in schema.declared() if place})),
    st.sampled_from([5, 1.5, None, True, "x_note", "network_d"]),
    st.text(max_size=3),
)
TYPES = ["SRModel", "FastSRModel", "DistillModel", "SwinIRModel", "SRGANModel", "RealESRNetModel"]
TYPES += ["PairedImageDataset", "FastPairedImageDataset", "SingleImageDataset", "REDSDataset"]
TYPES += ["Adam", "Muon", "MultiStepLR", "CosineAnnealingRestartLR", "L1Loss", "PSNRLoss", "MLRN"]
TREES = st.one_of(
    WRONG,
    st.sampled_from(TYPES),
    st.recursive(
        WRONG,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3),
        max_leaves=5,
    ),
)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A network of millions of blocks ends in a sentence once the memory is full."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Four pairs of images for every scale, as the LMDBs that the files name."""
    root = tmp_path_factory.mktemp("fuzz")
    for kind in ("gt", "x2", "x3", "x4"):
        (root / kind).mkdir()
        side = 288 // int(kind[1]) if kind != "gt" else 288
        for i in range(4):
            cv2.imwrite(str(root / kind / f"{i}.png"), np.zeros((side, side, 3), np.uint8))
        files, keys = [f"{i}.png" for i in range(4)], [str(i) for i in range(4)]
        make_lmdb_from_imgs(
            str(root / kind), str(root / f"{kind}.lmdb"), files, keys, map_size=2**24
        )
    return root


def places(section: dict, where: tuple = ()) -> Iterator[tuple]:
    for key, value in section.items():
        yield (*where, key)
        if isinstance(value, dict):
            yield from places(value, (*where, key))


def try_one(folder: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(FILES))
    opt = option_files.parse(file.read_text())
    for dataset in opt["datasets"].values():
        suffix = ".lmdb" if dataset["io_backend"]["type"] == "lmdb" else ""
        dataset["dataroot_gt"] = f"{folder}/gt{suffix}"
        dataset["dataroot_lq"] = f"{folder}/x{opt['scale']}{suffix}"
    for _ in range(data.draw(st.sampled_from([1, 1, 2, 3]))):
        *sections, key = data.draw(st.sampled_from(sorted(places(opt), key=str)))
        section = opt
        for name in sections:
            section = section[name]
        way = data.draw(st.sampled_from(["replace", "replace", "add", "delete"]))
        if way == "delete":
            del section[key]
        else:
            # A copy: the next change must not reach the strategy's own lists and sections.
            section[data.draw(KEYS) if way == "add" else key] = copy.deepcopy(data.draw(TREES))
    phase = "test" if file.name.startswith("test") else "train"
    try:
        path = folder / "case.yml"
        path.write_text(yaml.safe_dump(opt, allow_unicode=True))
    except (yaml.YAMLError, UnicodeEncodeError):
        return
    before, cwd = sorted(os.listdir(folder)), os.getcwd()
    os.chdir(folder)
    try:
        options.read(phase, ["-opt", "case.yml"])
    except UserError:
        pass
    finally:
        os.chdir(cwd)
    assert sorted(os.listdir(folder)) == before


# The same examples in every run: a test that fails by chance stops the wrong change.
FUZZ = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=250, **FUZZ)
@given(st.data())
def test_any_change_of_an_option_file(folder, little_memory, data):
    try_one(folder, data)


@pytest.mark.slow
@settings(max_examples=300, **FUZZ)
@given(st.data())
def test_any_change_of_an_option_file_for_longer(folder, little_memory, data):
    try_one(folder, data)


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    """A small file of most kinds that are read."""
    deep = np.random.default_rng(0).integers(0, 65536, (9, 11, 4), np.uint16)
    image, files = Image.fromarray((deep[..., :3] >> 8).astype(np.uint8)), []
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "A maker", 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"):
        files.append(io.BytesIO())
        how = {} if kind in ("BMP", "GIF", "PPM") else {"exif": exif, "icc_profile": profile}
        image.save(files[-1], kind, **how)
    for kind, channels in (("assocalpha", 4), ("unspecified", 4), (None, 3)):
        files.append(io.BytesIO())
        extra = [kind] if kind else None
        tifffile.imwrite(files[-1], deep[..., :channels], photometric="rgb", extrasamples=extra)
    encoded = [cv2.imencode(suffix, deep)[1].tobytes() for suffix in (".png", ".tif")]
    return [file.getvalue() for file in files] + encoded


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=12, **FUZZ)
@given(st.data())
def test_any_image_file(folder, pictures, mlrn_here, data):
    names = []
    for content in map(bytearray, pictures):
        end = data.draw(st.sampled_from([len(content)] * 3 + [len(content) // 2]))
        places = st.integers(0, 100) | st.integers(0, end - 1)
        changes = data.draw(st.dictionaries(places, st.integers(0, 255), max_size=5))
        for place, value in changes.items():
            content[min(place, end - 1)] = value
        file = folder / f"image{len(names)}"
        file.write_bytes(content[:end])
        if image_files.size(file) < 10**6:  # not a mere header, which takes minutes
            names.append(file)
    arguments = ["-o", folder / "out", "--overwrite", "--network", "Bicubic:upscale=2"]
    arguments += ["--backend", "torch"]  # another one notes that it cannot run bicubic
    code, out, err = mlrn_here("upscale", *names, *arguments, "--device", "cpu")
    lines = err.splitlines()
    assert code in (0, 1, 2) and len(out.splitlines()) == 1 and len(lines) <= len(names)
    assert all(line.startswith(f"mlrn upscale: {folder}/image") for line in lines)
