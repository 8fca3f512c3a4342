"""`mlrn upscale` and `Upscaler`: against the network itself, and against other readers of files."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import skimage.data
import tifffile
import torch
from basicsr.archs import build_network
from conftest import write_yaml
from PIL import Image, ImageCms, ImageOps

from mlrn_arch import Upscaler, files, shipped, sources
from mlrn_arch.errors import UserError
from mlrn_arch.inference import backends, image_files, tiles
from mlrn_arch.machine import free_memory
from mlrn_arch.tools import upscale

TINY = {"type": "MLRN", "upscale": 2, "num_feat": 8, "num_block": 1, "esa_feat": 4}
# Not what is quickest here: on some CPUs that is bf16.
EXACT = {"device": "cpu", "backend": "torch", "precision": "fp32"}
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_network(dict(TINY)).eval()


@pytest.fixture(scope="module")
def option_file(network, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("network")
    torch.save({"params": network.state_dict()}, folder / "net.pth")
    path = {"pretrain_network_g": str(folder / "net.pth")}
    return write_yaml(folder / "net.yml", {"scale": 2, "network_g": TINY, "path": path})


@pytest.fixture
def run(mlrn_here, monkeypatch, tmp_path, option_file):
    """Run `mlrn upscale ARGUMENTS` by the tiny network; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, network=("--opt", option_file)) -> tuple[int, str, str]:
        exact = ("--backend", "torch", "--device", "cpu", "--precision", "fp32")
        return mlrn_here("upscale", *arguments, *network, *exact)

    return call


def smooth(height: int, width: int, channels: int, top: int = 255) -> np.ndarray:
    """A made image with edges and gradients, (h, w, c), uint8 or uint16."""
    generator = np.random.default_rng(0)
    coarse = generator.random((height // 6 + 2, width // 6 + 2, channels))
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    return (image.reshape(height, width, channels) * top).astype(
        np.uint8 if top == 255 else np.uint16
    )


def direct(network, image: np.ndarray) -> np.ndarray:
    """What the network makes of an RGB image in [0, 1], (h, w, 3): float64, not rounded."""
    x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()[None]
    with torch.no_grad():
        return network(x)[0].permute(1, 2, 0).double().numpy()


def rounded(values: np.ndarray, top: int) -> np.ndarray:
    return np.clip(np.floor(values * top + 0.5), 0, top)


def near(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for roundings that fall to the other side."""
    difference = np.abs(a.astype(np.int64) - b.astype(np.int64))
    return a.shape == b.shape and difference.max() <= 1 and (difference > 0).mean() < 0.01


# --- arrays and tensors -------------------------------------------------------------------------


def test_arrays_and_tensors_equal_the_network(network):
    upscaler = Upscaler(network, **EXACT)
    image = smooth(40, 56, 3)
    expected = direct(network, image / 255)
    assert upscaler.scale == 2
    assert near(upscaler(image), rounded(expected, 255))
    deep = smooth(40, 56, 3, 65535)
    output = upscaler(deep)
    assert output.dtype == np.uint16
    error = output - rounded(direct(network, deep / 65535), 65535)
    assert np.abs(error).max() <= 2
    floats = upscaler(image / 255)
    assert floats.dtype == np.float64 and np.abs(floats - expected).max() < 1e-5
    batch = torch.rand(2, 3, 30, 41)
    with torch.no_grad():
        torch.testing.assert_close(upscaler(batch), network(batch))


def test_grey_is_the_mean_of_three_equal_channels(network):
    grey = smooth(33, 47, 1)[..., 0]
    expected = direct(network, np.stack([grey] * 3, axis=-1) / 255).mean(axis=-1)
    output = Upscaler(network, **EXACT)(grey)
    assert near(output, rounded(expected, 255))


def test_self_ensemble_is_the_mean_over_eight_transforms(network):
    image = smooth(40, 56, 3) / 255
    views = []
    for turns in range(4):
        views.append(np.rot90(direct(network, np.rot90(image, turns)), -turns))
        flipped = direct(network, np.rot90(image, turns)[:, ::-1])[:, ::-1]
        views.append(np.rot90(flipped, -turns))
    output = Upscaler(network, **EXACT, self_ensemble=True)(image)
    assert np.abs(output - np.mean(views, axis=0)).max() < 1e-5
    assert np.abs(output - direct(network, image)).max() > 1e-4


def test_invisible_colours_do_not_bleed_and_opaque_stays_opaque(network):
    """Red in a circle; what lies invisibly around it must not matter."""
    rgba = np.zeros((48, 48, 4), np.uint8)
    y, x = np.mgrid[:48, :48]
    inside = (y - 24) ** 2 + (x - 24) ** 2 < 200
    rgba[inside] = (220, 20, 20, 255)
    green = rgba.copy()
    green[~inside] = (0, 255, 0, 0)
    upscaler = Upscaler(network, **EXACT)
    ours, theirs = upscaler(rgba), upscaler(green)
    np.testing.assert_array_equal(ours, theirs)
    expected = direct(network, np.stack([rgba[..., 3]] * 3, axis=-1) / 255).mean(axis=-1)
    assert near(ours[..., 3], rounded(expected, 255))

    # a trained network sharpens edges, and would leave a rim of other colours along this one
    shown = Upscaler("x2", **EXACT)(rgba)
    assert np.abs(shown[shown[..., 3] > 16, :3] - np.float32([220, 20, 20])).max() <= 4

    opaque = np.dstack([smooth(48, 48, 3), np.full((48, 48), 255, np.uint8)])
    output = upscaler(opaque)
    assert (output[..., 3] == 255).all()
    np.testing.assert_array_equal(output[..., :3], upscaler(opaque[..., :3].copy()))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 3)])
def test_tiny_images(network, size):
    image = smooth(*size, 3)
    output = Upscaler(network, **EXACT)(image)
    mirrored = np.pad(image, [(0, max(0, 24 - side)) for side in size] + [(0, 0)], "symmetric")
    expected = direct(network, mirrored / 255)[: 2 * size[0], : 2 * size[1]]
    assert near(output, rounded(expected, 255))


def test_networks_for_y_keep_the_colours_of_bicubic(tmp_path):
    torch.manual_seed(0)
    network = build_network({"type": "SRCNN", "upscale": 2})
    image = smooth(30, 40, 3) / 255
    output = Upscaler(network, **EXACT)(image)
    bicubic = direct(build_network({"type": "Bicubic", "upscale": 2}), image)
    # Full-range BT.601, by OpenCV: the chroma of both is the same, the luma is not.
    ours, theirs = (
        cv2.cvtColor(a.astype(np.float32), cv2.COLOR_RGB2YCrCb) for a in (output, bicubic)
    )
    assert np.abs(ours - theirs)[..., 1:].max() < 2e-3
    luma = np.float32([[[65.481, 128.553, 24.966]]])
    with torch.no_grad():
        y = network(torch.from_numpy(((image * luma).sum(-1) + 16) / 255).float()[None, None])
    assert np.abs(((output * luma).sum(-1) + 16) / 255 - y[0, 0].numpy()).max() < 1e-4


def test_pil_images_and_arrays_that_cannot_be_written_to(network, recwarn):
    upscaler, image = Upscaler(network, **EXACT), smooth(30, 44, 3)
    array = image.copy()
    array.flags.writeable = False
    expected = upscaler(image)
    assert np.array_equal(upscaler(array), expected)
    output = upscaler(Image.fromarray(image))
    assert output.mode == "RGB" and np.array_equal(np.asarray(output), expected)
    assert not [w for w in recwarn if "writ" in str(w.message)]
    with pytest.raises(ValueError, match=r"mode P; use image.convert\('RGB'\)"):
        upscaler(Image.fromarray(image).quantize(8))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.full((30, 44, 3), 200.0), r"must be in \[0, 1\], not from 200 to 200"),
        (np.linspace(-1, 1, 2700).reshape(30, 30, 3), r"not from -1 to 1"),
        (np.full((30, 44), np.nan), r"not from nan to nan"),
        (np.zeros((0, 0, 3), np.uint8), r"not \(0, 0, 3\)"),
        (np.zeros((3, 30, 44), np.uint8), r"transpose it: image.transpose\(1, 2, 0\)"),
        (np.zeros((30, 44, 3), np.int64), "int64"),
        (np.zeros((2, 30, 44, 3), np.uint8), "(2, 30, 44, 3)"),
        (torch.zeros(3, 30, 44), "(n, c, h, w)"),
        (torch.full((1, 3, 30, 44), 2.0), "not from 2 to 2"),
    ],
)
def test_what_is_no_image(network, image, reason):
    with pytest.raises(ValueError, match=reason):
        Upscaler(network, **EXACT)(image)


def test_values_slightly_outside_are_fine(network):
    image = smooth(30, 44, 3) / 255 * 1.2 - 0.1
    assert np.abs(Upscaler(network, **EXACT)(image) - direct(network, image)).max() < 1e-5


# --- tiles --------------------------------------------------------------------------------------


def test_tiles_of_a_local_network_leave_no_trace():
    """Bicubic looks two pixels far: tiles must give the whole image's output, to float rounding."""
    image = smooth(301, 217, 3) / 255
    network = build_network({"type": "Bicubic", "upscale": 3})
    output = Upscaler(network, **EXACT, tile=192)(image)
    assert np.abs(output - direct(network, image)).max() < 1e-5


@pytest.mark.parametrize("tiles_before", [0, 5])
def test_out_of_memory_is_answered_by_smaller_tiles(tiles_before):
    bicubic, calls = build_network({"type": "Bicubic", "upscale": 2}), []

    class Hungry(torch.nn.Module):
        def forward(self, x):
            calls.append(x.shape)
            if max(x.shape[-2:]) > 192 and sum(max(c[-2:]) > 192 for c in calls) > tiles_before:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return bicubic(x)

    image, shares = smooth(601, 330, 3) / 255, []
    upscaler = Upscaler(Hungry(), **EXACT, tile=250)
    upscaler.progress = shares.append
    output = torch.cat(list(upscaler.bands(torch.from_numpy(image)))).numpy()
    assert np.abs(output - direct(bicubic, image)).max() < 1e-5
    assert min(shares) > 0 and shares[-1] == 1

    class Starving(torch.nn.Module):
        def forward(self, x):
            if x.device.type == "cpu" and x.shape[-1] > 24:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return bicubic(x)

    with pytest.raises(torch.OutOfMemoryError):
        Upscaler(Starving(), **EXACT)(image)


def test_tiles_count_the_memory_that_torch_can_give_back(monkeypatch):
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "mem_get_info", lambda device: (2**28, 2**34))
    monkeypatch.setattr(cuda, "memory_allocated", lambda device: 2**20)
    sides = []
    for reserved in (2**20, 2**33):
        monkeypatch.setattr(cuda, "memory_reserved", lambda device, n=reserved: n)
        image = torch.empty(4000, 4000, 3, dtype=torch.uint8, device="meta")
        sides.append(tiles.choose(image, 4, 1e3, torch.device("cuda")))
    assert sides == [tiles.SMALLEST, tiles.LARGEST]


def test_images_leave_the_device_in_eight_bits(network, monkeypatch):
    upscaler, left = Upscaler(network, **EXACT), []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: left.append(self.dtype) or self)
    upscaler(smooth(40, 56, 4))
    assert left == [torch.uint8]


@pytest.mark.parametrize("side", [513, 700, 1024, 5000, 12345])
@pytest.mark.parametrize("tile", [192, 200, 512])
def test_tiles_cover_a_side_alike_and_overlap(side, tile):
    starts, length = tiles.cut(side, tile)
    assert length <= tile and starts[0] == 0 and starts[-1] + length == side
    shared = [a + length - b for a, b in zip(starts, starts[1:], strict=False)]
    assert min(shared) >= tiles.OVERLAP - 6
    assert not any(start % 6 for start in (*starts, side - length))
    assert all(a + length <= b for a, b in zip(starts, starts[2:], strict=False))


@pytest.mark.parametrize(
    ("kind", "self_ensemble", "backend"),
    [
        ("MLRN", False, "torch"),
        ("MLRN", True, "torch"),
        ("RLFN", False, "torch"),
        ("MLRN", False, "onnxruntime"),
        ("MLRN", False, "openvino"),
    ],
)
def test_tiles_of_a_network_with_esa(kind, self_ensemble, backend):
    """ESA stretches a coarse map over the whole image; tiles must show none of their borders."""
    if backend not in backends.available():
        pytest.skip(f"{backend} is not installed")
    torch.manual_seed(0)
    network = build_network({"type": kind, "upscale": 2, "num_feat": 8, "num_block": 1}).eval()
    for name, parameter in network.named_parameters():
        if "esa" in name:  # untrained, the attention hardly differs from place to place
            parameter.data *= 3
    image = smooth(230, 270, 3) / 255
    plain = {**EXACT, "self_ensemble": self_ensemble}
    whole = Upscaler(network, **plain)(image)
    tiled = {**plain, "backend": backend, "tile": 192}
    difference = np.abs(Upscaler(network, **tiled)(image) - whole) * 255
    assert difference.mean() < 0.01 and difference.max() < 1


@pytest.mark.parametrize("size", [(1100, 12, 3), (5, 640, 4), (700, 1, 3)])
def test_tiles_of_an_image_that_is_narrower_than_the_network_needs(network, size):
    image = smooth(*size) / 255
    whole, tiled = (Upscaler(network, **EXACT, tile=tile)(image) for tile in (2000, 192))
    difference = np.abs(tiled - whole) * 255
    assert difference.mean() < 0.01 and difference.max() < 1


@pytest.mark.parametrize("name", shipped.names())
def test_tiles_of_the_shipped_networks(name):
    """The figure of README: eight bits of a photograph in tiles and as a whole."""
    image = cv2.cvtColor(skimage.data.coffee()[100:250, 100:360], cv2.COLOR_RGB2BGR)
    tiled, whole = (Upscaler(name, **EXACT, tile=tile)(image).astype(int) for tile in (200, 1000))
    difference = np.abs(tiled - whole)
    print(f"{name}: mean {difference.mean():.4f}/255, max {difference.max()}/255")
    assert difference.mean() < 0.001 and difference.max() <= 1


@pytest.mark.parametrize(
    ("backend", "precision", "by_one", "by_more"),
    [("torch", "fp16", 0.01, 1e-4), ("torch", "bf16", 0.05, 1e-3)],
)
def test_less_exact_ways_of_the_shipped_network(backend, precision, by_one, by_more):
    """The figures of README: eight bits of a photograph, and what PyTorch makes of it in fp32."""
    if backend not in backends.available():
        pytest.skip(f"{backend} is not installed")
    image = skimage.data.coffee()[100:180, 100:220]
    found, full = (
        Upscaler("x4", device="cpu", backend=b, precision=p)(image).astype(int)
        for b, p in ((backend, precision), ("torch", "fp32"))
    )
    shares = [(np.abs(found - full) >= step).mean() for step in (1, 2)]
    print(f"{backend} {precision}: {shares[0]:.2%} differ, {shares[1]:.4%} by more than 1/255")
    assert shares[0] < by_one and shares[1] < by_more


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
def test_formats(run, tmp_path, network, suffix):
    file = tmp_path / f"photo{suffix}"
    kept = {} if suffix == ".bmp" else {"icc_profile": ICC}
    Image.fromarray(smooth(36, 50, 3)).save(file, **kept)
    before = file.read_bytes()
    code, out, err = run(file)
    assert (code, err) == (0, "") and "1 upscaled" in out
    with Image.open(file) as source, Image.open(tmp_path / f"upscaled/photo_x2{suffix}") as image:
        assert image.format == source.format
        assert image.info.get("icc_profile") == kept.get("icc_profile")
        expected = rounded(direct(network, np.asarray(source.convert("RGB")) / 255), 255)
        if suffix in (".jpg", ".webp"):
            encoded = io.BytesIO()
            best = Image.fromarray(expected.astype(np.uint8))
            best.save(encoded, image.format, quality=95, subsampling=0)
            with Image.open(encoded) as lossy:
                assert np.abs(np.asarray(image) - np.asarray(lossy, int)).mean() < 0.5
        else:
            assert near(np.asarray(image), expected)
    assert file.read_bytes() == before
    assert [f.name for f in (tmp_path / "upscaled").iterdir()] == [f"photo_x2{suffix}"]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits(run, tmp_path, network, suffix, channels):
    image = smooth(36, 50, channels, 65535)
    if channels == 4:
        image[..., 3] = 65535
    file = tmp_path / f"deep{suffix}"
    swapped = image[..., [2, 1, 0, 3][:channels]] if channels > 1 else image
    cv2.imwrite(str(file), swapped)
    code, _, err = run(file)
    assert (code, err) == (0, "")
    output = cv2.imread(str(tmp_path / f"upscaled/deep_x2{suffix}"), cv2.IMREAD_UNCHANGED)
    assert output.dtype == np.uint16 and output.shape[:2] == (72, 100)
    rgb = image[..., :3] if channels > 1 else np.repeat(image, 3, axis=-1)
    expected = direct(network, rgb / 65535)
    if channels == 1:
        assert np.abs(output - rounded(expected.mean(-1), 65535)).max() <= 2
    else:
        assert np.abs(output[..., 2::-1] - rounded(expected, 65535)).max() <= 2
        assert channels == 3 or (output[..., 3] == 65535).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["photo.jpg", "deep.png", "deep.tif", "flat.tif"])
def test_orientation_and_exif(run, tmp_path, network, orientation, name):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "A camera"
    if name == "photo.jpg":
        image = smooth(30, 44, 3)
        Image.fromarray(image).save(tmp_path / name, exif=exif, quality=100, subsampling=0)
    elif name == "flat.tif":
        image = smooth(30, 44, 3)
        Image.fromarray(image).save(tmp_path / name, exif=exif, icc_profile=ICC)
    elif name == "deep.png":
        image = smooth(30, 44, 3, 65535)
        tags = np.frombuffer(exif.tobytes().removeprefix(b"Exif\0\0"), np.uint8)
        profile = np.frombuffer(ICC, np.uint8)
        kinds = [cv2.IMAGE_METADATA_EXIF, cv2.IMAGE_METADATA_ICCP]
        cv2.imwriteWithMetadata(str(tmp_path / name), image[..., ::-1], kinds, [tags, profile])
    else:
        image = smooth(30, 44, 3, 65535)
        extra = [(274, "H", 1, orientation, False)]
        tifffile.imwrite(tmp_path / name, image, photometric="rgb", extratags=extra, iccprofile=ICC)
    code, _, err = run(name)
    assert (code, err) == (0, "")
    # Pillow turns an image of coordinates, ours is to match it.
    marks = Image.fromarray(np.arange(30 * 44, dtype=np.int32).reshape(30, 44))
    marks.getexif()[0x0112] = orientation
    order = np.asarray(ImageOps.exif_transpose(marks))
    upright = image.reshape(-1, 3)[order]
    top = np.iinfo(image.dtype).max
    expected = rounded(direct(network, upright / top), top)
    output = tmp_path / "upscaled" / f"{name[:-4]}_x2{name[-4:]}"
    pixels = cv2.imread(str(output), cv2.IMREAD_UNCHANGED)[..., ::-1]
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).mean() < (6 if name == "photo.jpg" else 2)
    with Image.open(output) as written:
        assert written.getexif().get(0x0112, 1) == 1
        if name != "deep.tif":
            assert written.getexif()[0x010F] == "A camera"
        assert written.info.get("icc_profile") == (None if name == "photo.jpg" else ICC)


@pytest.mark.parametrize("format", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("name", ["photo.jpg", "scan.tif"])
def test_what_exif_says_is_kept_in_every_format(run, tmp_path, name, format):
    exif = Image.Exif()
    exif[0x010F], exif[0x011A] = "A maker", 300.0
    shot = {0x829A: 0.01, 0xA002: 44, 0xA005: {1: "R98"}} if name == "photo.jpg" else {}
    place = {1: "N", 2: (48.0, 8.0, 30.0)} if name == "photo.jpg" else {}
    for part, tags in ((0x8769, shot), (0x8825, place)):
        if tags:
            exif.get_ifd(part).update(tags)
    Image.fromarray(smooth(30, 44, 3)).save(tmp_path / name, exif=exif)
    code, _, err = run(name, "--format", format)
    assert (code, err) == (0, "")
    with Image.open(tmp_path / f"upscaled/{name[:-4]}_x2.{format}") as image:
        kept = image.getexif()
        # the resolution is that of the input and left out; Pillow reads 1 where a TIFF has none
        assert (kept[0x010F], kept.get(0x011A, 1)) == ("A maker", 1)
        # not the size of the input, nor where in its file something was
        assert kept.get_ifd(0x8769) == {tag: v for tag, v in shot.items() if tag == 0x829A}
        assert kept.get_ifd(0x8825) == place


def test_broken_exif_is_left_behind_with_a_line(run, tmp_path):
    text = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\2\0\0\0" + b"6\0\0\0" + bytes(4)  # orientation
    for name, data in ("text.jpg", text), ("garbage.png", b"garbage "):
        Image.fromarray(smooth(30, 44, 3)).save(tmp_path / name, exif=data)
    code, _, err = run("text.jpg", "garbage.png")
    assert code == 0 and "garbage.png: without its EXIF, which is broken" in err
    assert Image.open("upscaled/text_x2.jpg").size == (88, 60)


def test_exif_that_a_jpeg_cannot_hold_is_left_behind_with_a_line(run, tmp_path):
    exif = Image.Exif()
    exif[0x010F], exif.get_ifd(0x8769)[0x927C] = "A maker", bytes(70_000)
    Image.fromarray(smooth(30, 44, 3)).save(tmp_path / "a.png", exif=exif)
    code, _, err = run("a.png", "--format", "jpg")
    assert code == 0 and "without its EXIF" in err and len(err.splitlines()) == 1
    with Image.open(tmp_path / "upscaled/a_x2.jpg") as image:
        assert image.size == (88, 60) and not image.getexif()


def over_black(file) -> np.ndarray:
    """What a TIFF with straight alpha shows over black, in [0, 255]."""
    image = tifffile.imread(file)
    top = np.iinfo(image.dtype).max
    return image[..., :-1] / top * image[..., -1:] / top * 255


def test_premultiplied_transparency(run, tmp_path):
    """The same picture premultiplied and straight, at 8 and 16 bits (TIFF 6.0, ExtraSamples)."""
    image = smooth(40, 60, 4, 65535)
    colours, alpha = image[..., :-1].astype(float), image[..., -1:] / 65535
    premultiplied = np.concatenate([np.rint(colours * alpha), image[..., -1:]], -1)
    arrays = {
        "straight": (image, "unassalpha"),
        "deep": (premultiplied.astype(np.uint16), "assocalpha"),
        "flat": (np.rint(premultiplied / 257).astype(np.uint8), "assocalpha"),
    }
    for name, (array, kind) in arrays.items():
        how = {"photometric": "rgb", "extrasamples": [kind]}
        tifffile.imwrite(tmp_path / f"{name}.tif", array, **how)
    code, _, err = run("straight.tif", "deep.tif", "flat.tif")
    assert (code, err) == (0, "")
    straight, deep, flat = (over_black(tmp_path / f"upscaled/{name}_x2.tif") for name in arrays)
    assert straight.shape == (80, 120, 3)
    assert np.abs(deep - straight).max() < 0.05 and np.abs(flat - straight).max() < 3


@pytest.mark.parametrize("top", [255, 65535])
def test_an_extra_channel_that_is_no_transparency(run, tmp_path, network, top):
    image = smooth(30, 44, 4, top)
    how = {"photometric": "rgb", "extrasamples": ["unspecified"]}
    tifffile.imwrite(tmp_path / "a.tif", image, **how)
    code, _, err = run("a.tif")
    assert code == 0 and "without an extra channel" in err
    output = tifffile.imread(tmp_path / "upscaled/a_x2.tif")
    assert np.abs(output - rounded(direct(network, image[..., :3] / top), top)).max() <= 2


def test_deep_tiffs_of_other_layouts(run, tmp_path):
    image = smooth(30, 44, 3, 65535)
    cv2.imwrite(str(tmp_path / "lzw.tif"), image[..., ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, 5])
    assert np.array_equal(image_files.read(tmp_path / "lzw.tif").array, image)
    planes = {"photometric": "rgb", "planarconfig": "separate"}
    tifffile.imwrite(tmp_path / "planar.tif", image.transpose(2, 0, 1), **planes)
    veil = {"photometric": "minisblack", "extrasamples": ["unassalpha"], "planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "veil.tif", image[..., :2], **veil)
    code, _, err = run("planar.tif", "veil.tif")
    assert code == 2 and len(err.splitlines()) == 2
    assert "planar.tif: its 16-bit channels are stored one after the other; save it" in err
    assert "veil.tif: broken, or of a kind that is not read here" in err


def test_the_largest_value_of_a_pgm_is_white(tmp_path):
    """The format's own page: the values are shares of maxval."""
    image = smooth(30, 44, 1, 1023)
    (tmp_path / "a.pgm").write_bytes(b"P5 44 30 1023\n" + image.astype(">u2").tobytes())
    shares = image_files.read(tmp_path / "a.pgm").array / 65535
    assert shares.shape == image.shape and np.abs(shares - image / 1023).max() < 1e-4


def test_deep_cmyk_is_read_at_eight_bits(run, tmp_path, network):
    image = smooth(30, 44, 4, 65535)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="separated")
    code, _, err = run("a.tif")
    assert code == 0 and "16-bit CMYK is read at 8 bits" in err
    # as it is without a profile: every ink and black take away from white
    inks = image / 65535
    expected = direct(network, (1 - inks[..., :3]) * (1 - inks[..., 3:]))
    output = np.asarray(Image.open(tmp_path / "upscaled/a_x2.tif"))
    assert np.abs(output - np.clip(expected, 0, 1) * 255).max() < 3


# What ICC.1 requires of a profile's header; no reader here looks further.
GREY = ICC[:16] + b"GRAY" + ICC[20:]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def add_to_png(file, *chunks: bytes) -> None:
    """Put chunks behind the header of a PNG."""
    data = file.read_bytes()
    file.write_bytes(data[:33] + b"".join(chunks) + data[33:])


@pytest.mark.parametrize(
    ("channels", "top", "profile", "kept"),
    [(1, 255, GREY, True), (1, 255, ICC, False), (2, 255, GREY, True), (3, 255, GREY, False),
     (1, 65535, GREY, True), (1, 65535, ICC, False), (2, 65535, GREY, False)],
)  # fmt: skip
def test_a_profile_fits_the_pixels_or_is_left_out(run, tmp_path, channels, top, profile, kept):
    """PNG 11.3.2.3: greyscale images have a greyscale profile, and colour ones none."""
    file, image = tmp_path / "a.png", smooth(30, 44, channels, top)
    height, width = image.shape[:2]
    colour = {1: 0, 2: 4, 3: 2}[channels]
    header = struct.pack(">IIBBBBB", width, height, 8 if top == 255 else 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in image)
    chunks = [(b"IHDR", header), (b"iCCP", b"p\0\0" + zlib.compress(profile))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))
    code, _, err = run(file)
    assert code == 0 and ("without its colour profile" in err) != kept
    with Image.open(tmp_path / "upscaled/a_x2.png") as output:
        assert output.info.get("icc_profile") == (profile if kept else None)


def test_colours_that_a_png_describes_by_other_means_are_named(run, tmp_path):
    srgb = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    chunks = {
        "usual": png_chunk(b"gAMA", struct.pack(">I", 45455)) + png_chunk(b"cHRM", srgb),
        "linear": png_chunk(b"gAMA", struct.pack(">I", 100000)),
        "wide": png_chunk(b"cHRM", srgb[:8] + struct.pack(">I", 70000) + srgb[12:]),
        "film": png_chunk(b"cICP", bytes([9, 16, 0, 1])),
    }
    for name, data in chunks.items():
        Image.fromarray(smooth(30, 44, 3)).save(tmp_path / f"{name}.png")
        add_to_png(tmp_path / f"{name}.png", data)
    code, _, err = run("*.png")
    assert code == 0 and len(err.splitlines()) == 3 and "usual" not in err
    assert err.count("without its gAMA, cHRM or cICP chunk") == 3


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
def test_the_resolution_is_left_out(run, tmp_path, suffix):
    Image.fromarray(smooth(30, 44, 3)).save(tmp_path / f"a{suffix}", dpi=(300, 300))
    assert run(f"a{suffix}")[0] == 0
    data = (tmp_path / f"upscaled/a_x2{suffix}").read_bytes()
    if suffix == ".bmp":
        assert struct.unpack("<2i", data[38:46]) == (0, 0)
    elif suffix == ".jpg":
        assert data[6:11] == b"JFIF\0" and data[13] == 0  # no unit
    elif suffix == ".png":
        assert b"pHYs" not in data
    else:
        tags = tifffile.TiffFile(io.BytesIO(data)).pages.first.tags
        assert not {282, 283, 296} & {tag.code for tag in tags}


def test_text_and_profiles_of_megabytes(run, tmp_path):
    image, noise = Image.fromarray(smooth(30, 44, 3)), np.random.default_rng(0).bytes(1_200_000)
    image.save(tmp_path / "text.png")
    add_to_png(tmp_path / "text.png", png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21))))
    profile = struct.pack(">I", len(ICC) + len(noise)) + ICC[4:] + noise
    image.save(tmp_path / "photo.jpg", icc_profile=profile)
    code, _, err = run("text.png", "photo.jpg", "--format", "png")
    assert (code, err) == (0, "mlrn upscale: text.png: without its text\n")
    code, _, err = run("upscaled", "-o", "again")
    assert (code, err) == (0, "")
    with Image.open(tmp_path / "again/photo_x2_x2.png") as output:
        assert output.size == (176, 120) and output.info["icc_profile"] == profile


def test_lossless_webp_stays_lossless(run, tmp_path, network):
    image = smooth(30, 44, 3)
    Image.fromarray(image).save(tmp_path / "a.webp", lossless=True, icc_profile=ICC)
    Image.fromarray(image).save(tmp_path / "b.webp", icc_profile=ICC)
    assert run("*.webp")[0] == 0
    expected = rounded(direct(network, image / 255), 255)
    assert near(np.asarray(Image.open(tmp_path / "upscaled/a_x2.webp")), expected)
    assert b"VP8L" not in (tmp_path / "upscaled/b_x2.webp").read_bytes()


@pytest.mark.parametrize("name", ["a.bmp", "a.tiff"])
def test_a_line_says_which_format_has_no_exif(run, tmp_path, name):
    exif = Image.Exif()
    exif[0x010F] = "A maker"
    tags = [np.frombuffer(exif.tobytes().removeprefix(b"Exif\0\0"), np.uint8)]
    deep = smooth(30, 44, 3, 65535)
    cv2.imwriteWithMetadata(str(tmp_path / "a.png"), deep, [cv2.IMAGE_METADATA_EXIF], tags)
    code, _, err = run("a.png", "-o", name)
    assert code == 0 and "EXIF" in err and len(err.splitlines()) == 1


def test_a_deep_png_with_one_transparent_grey(tmp_path):
    image = smooth(30, 44, 1, 65535)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    add_to_png(tmp_path / "a.png", png_chunk(b"tRNS", struct.pack(">H", image[5, 5, 0])))
    array = image_files.read(tmp_path / "a.png").array
    opaque = 65535 * (image != image[5, 5])
    assert np.array_equal(array, np.concatenate([image, opaque], axis=-1))


def test_a_deep_scan_whose_white_is_zero(run, tmp_path, network):
    image = smooth(30, 44, 1, 65535)
    tifffile.imwrite(tmp_path / "scan.tif", 65535 - image[..., 0], photometric="miniswhite")
    assert run("scan.tif")[0] == 0
    expected = direct(network, np.repeat(image, 3, axis=-1) / 65535).mean(-1)
    output = tifffile.imread(tmp_path / "upscaled/scan_x2.tif")
    assert np.abs(output - rounded(expected, 65535)).max() <= 2


def test_grey_palette_and_transparency(run, tmp_path, network):
    colour = Image.fromarray(smooth(36, 50, 3))
    colour.convert("L").save(tmp_path / "grey.png")
    colour.convert("L").convert("1").save(tmp_path / "bits.png")
    palette = colour.quantize(16)
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "holes.png", transparency=3)
    Image.fromarray(smooth(36, 50, 2)).save(tmp_path / "veil.png")
    Image.fromarray(smooth(36, 50, 4)).save(tmp_path / "glass.webp", lossless=True)
    colour.convert("CMYK").save(tmp_path / "print.jpg")
    code, _, err = run(tmp_path)
    assert (code, err) == (0, "")
    modes = {}
    for file in (tmp_path / "upscaled").iterdir():
        with Image.open(file) as image:
            assert image.size == (100, 72)
            modes[file.name.split("_")[0]] = image.mode
    assert modes == {
        "grey": "L", "bits": "L", "palette": "RGB", "holes": "RGBA", "veil": "LA",
        "glass": "RGBA", "print": "RGB",
    }  # fmt: skip
    with Image.open(tmp_path / "upscaled/palette_x2.png") as image:
        expected = direct(network, np.asarray(palette.convert("RGB")) / 255)
        assert near(np.asarray(image), rounded(expected, 255))


def test_what_is_there_is_kept_and_what_is_bad_is_named(run, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(smooth(30, 30, 3)).save(photos / "good.png")
    Image.fromarray(smooth(30, 30, 4)).save(photos / "glass.png")
    whole = (photos / "good.png").read_bytes()
    (photos / "torn.png").write_bytes(whole[: len(whole) // 2])
    (photos / "text.jpg").write_text("no image")
    tifffile.imwrite(photos / "float.tif", np.zeros((9, 9, 3), np.float32), photometric="rgb")
    code, out, err = run(photos, "absent.png", "-o", "large", "--format", "jpg")
    assert code == 1 and "1 upscaled, 5 not: large, x2 by " in out and " on torch, " in out
    assert len(err.splitlines()) == 5 and "Traceback" not in err
    for name in ("torn.png", "text.jpg", "float.tif", "glass.png", "absent.png"):
        assert sum(name in line for line in err.splitlines()) == 1
    assert [f.name for f in (tmp_path / "large").iterdir()] == ["good_x2.jpg"]

    output = tmp_path / "large/good_x2.jpg"
    output.write_bytes(b"mine")
    code, out, _ = run("-i", photos / "good.png", "-o", "large", "--format", "jpg")
    assert code == 0 and "0 upscaled, 1 already there" in out and output.read_bytes() == b"mine"
    code, _, err = run(photos / "good.png", "-o", "large", "--format", "jpg", "--overwrite")
    assert (code, err) == (0, "") and output.read_bytes() != b"mine"
    code, _, err = run(photos / "good.png", "-o", photos / "good.png", "--overwrite")
    assert code == 2 and "would be an input as well" in err
    assert (photos / "good.png").read_bytes() == whole


def test_two_inputs_for_one_output(run, tmp_path):
    for name in ("a.png", "a.bmp", "b.png"):
        Image.fromarray(smooth(30, 30, 3)).save(tmp_path / name)
    code, out, err = run("*.*", "--format", "png")
    assert code == 1 and "1 upscaled, 2 not" in out and len(err.splitlines()) == 2
    for name in ("a.bmp", "a.png"):
        assert f"{name}: upscaled/a_x2.png would be the output of another input as well" in err
    assert [file.name for file in (tmp_path / "upscaled").iterdir()] == ["b_x2.png"]
    code, out, _ = run("a.*", "a.png", "-o", "both")
    assert code == 0 and "2 upscaled: both" in out


@pytest.mark.parametrize("output", ["upscaled", "."])
def test_an_output_is_no_input_of_the_next_run(run, tmp_path, output):
    (tmp_path / "below").mkdir()
    for name in ("a.png", "below/b.png"):
        Image.fromarray(smooth(30, 30, 3)).save(tmp_path / name)
    assert "2 upscaled" in run(".", "-r", "-o", output)[1]
    code, out, err = run(".", "-r", "-o", output)
    assert (code, err) == (0, "") and "0 upscaled, 2 already there" in out
    made = {path.relative_to(tmp_path / output) for path in tmp_path.rglob("*_x2*.png")}
    assert {str(path) for path in made} == {"a_x2.png", "below/b_x2.png"}
    # named itself, an output may be upscaled again, but not be replaced
    code, out, err = run("a.png", tmp_path / output / "a_x2.png", "-o", output, "--overwrite")
    assert code == 1 and "a_x2.png would be an input as well" in err and "1 upscaled" in out
    assert (tmp_path / output / "a_x2_x2.png").exists()


def test_a_folder_stands_for_all_images_that_can_be_read(run, tmp_path):
    (tmp_path / "photos/.hidden").mkdir(parents=True)
    frames = [Image.fromarray(smooth(30, 44, 3)), Image.new("RGB", (44, 30))]
    frames[0].save(tmp_path / "photos/a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "photos/b", "PNG")
    frames[0].save(tmp_path / "photos/.hidden/c.png")
    (tmp_path / "photos/readme.txt").write_text("P6 is no image")
    code, out, err = run("photos", "-r")
    assert code == 0 and "2 upscaled" in out
    assert err == "mlrn upscale: photos/a.gif: only the first of its 2 frames or pages\n"
    assert sorted(f.name for f in (tmp_path / "upscaled").iterdir()) == ["a_x2.png", "b_x2.png"]
    code, _, err = run("photos/a.gif", "-o", "out.gif")
    assert code == 2 and "-o out.gif: .gif is not written; use png" in err
    assert not (tmp_path / "out.gif").exists()


def test_folders_below_keep_their_places(run, tmp_path):
    for folder in ("", "a", "a/b"):
        (tmp_path / "photos" / folder).mkdir(exist_ok=True)
        Image.fromarray(smooth(30, 30, 3)).save(tmp_path / "photos" / folder / "same.png")
    assert run("photos", "-r", "-o", "large")[0] == 0
    made = {str(path.relative_to(tmp_path)) for path in (tmp_path / "large").rglob("*.png")}
    assert made == {f"large/{folder}same_x2.png" for folder in ("", "a/", "a/b/")}


def test_a_failure_in_the_middle_leaves_nothing_behind(run, tmp_path, monkeypatch):
    Image.fromarray(smooth(30, 30, 3)).save(tmp_path / "a.png")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    code, _, err = run("a.png")
    assert code == 2 and "No space left" in err
    assert not list((tmp_path / "upscaled").iterdir())


def test_a_disk_that_is_full_before_the_last_bytes_of_a_deep_png(run, tmp_path):
    resource = pytest.importorskip("resource")
    cv2.imwrite(str(tmp_path / "a.png"), smooth(40, 50, 3, 65535))
    assert run("a.png")[0] == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    short = (tmp_path / "upscaled/a_x2.png").stat().st_size - 100
    resource.setrlimit(resource.RLIMIT_FSIZE, (short, before[1]))
    try:
        code, _, err = run("a.png", "-o", "other")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and "File too large" in err and not list((tmp_path / "other").iterdir())


def test_what_is_beyond_memory_is_refused(run, tmp_path, monkeypatch):
    Image.fromarray(smooth(30, 30, 3)).save(tmp_path / "a.png")
    monkeypatch.setattr(upscale, "free_memory", lambda: 14000)  # 60 x 60 x 4 bytes are more
    code, _, err = run("a.png")
    assert code == 2 and "60x60" in err
    monkeypatch.setattr(image_files, "free_memory", lambda: 3000)
    code, _, err = run("a.png")
    assert code == 2 and "it takes 0.0 GB of memory, which is more than is free" in err
    # a header of 2**24 rows, for which there are strips of 30
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, smooth(30, 30, 1, 65535)[..., 0], photometric="minisblack")
    with tifffile.TiffFile(file, mode="r+") as tiff:
        tiff.pages.first.tags["ImageLength"].overwrite(2**24)
        tiff.pages.first.tags["RowsPerStrip"].overwrite(30)
    monkeypatch.undo()
    with pytest.raises(image_files.BadImage, match="^broken"):
        image_files.read(file)


V1, V2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")
STAT = {
    V1: "active_file 1\ninactive_file 1\ntotal_inactive_file 5000\ntotal_active_file 3000\n",
    V2: "anon 1\ninactive_file 5000\nactive_file 3000\n",
}


@pytest.mark.parametrize(
    ("told", "group", "names", "limit", "free"),
    [
        # a container, whose cached files make way
        ("0::/", "", V2, "40000", 18_000),
        # a step of a batch job, limited by the job
        ("0::/slurm/job_7/step_0", "slurm/job_7", V2, "40000", 18_000),
        ("0::/", "", V2, "max", 102_400),
        # a container that is told its path on the host, but has its files at the top
        ("5:cpu,cpuacct:/\n4:memory:/docker/d2\n0::/", "memory", V1, "40000", 18_000),
        ("4:memory:/a", "memory/a", V1, "9223372036854771712", 102_400),
        ("4:memory:/a", "memory/a", V1, "20000", 0),
    ],
)
def test_the_limits_of_containers_and_batch_jobs(tmp_path, told, group, names, limit, free):
    """The files are as the kernel documents them, in cgroup-v1/memory.rst and cgroup-v2.rst."""
    group = tmp_path / "sys/fs/cgroup" / group
    for folder in (group, tmp_path / "proc/self"):
        folder.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 400 kB\nMemAvailable: 100 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(told + "\n")
    for name, text in zip((*names, "memory.stat"), (limit, "30000", STAT[names]), strict=True):
        (group / name).write_text(text.rstrip() + "\n")
    assert free_memory(tmp_path) == free


def test_a_checkpoint_says_which_mlrn_it_is_of(run, tmp_path, network, option_file):
    image = smooth(30, 40, 3)
    Image.fromarray(image).save(tmp_path / "a.png")
    code, _, _ = run("a.png", network=["--weights", option_file.replace("net.yml", "net.pth")])
    assert code == 0
    output = np.asarray(Image.open(tmp_path / "upscaled/a_x2.png"))
    assert near(output, rounded(direct(network, image / 255), 255))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--opt", "{opt}", "--scale", "2"], "--scale"),
        (["--opt", "absent.yml"], "absent.yml"),
        (["--scale", "2", "--weights", "absent.pth"], "absent.pth"),
        (["--scale", "4", "--weights", "{net}"], "is of an x2 network, not x4"),
        (["--opt", "{opt}", "--tile", "10"], "192"),
        (["--opt", "{opt}", "--quality", "0"], "--quality"),
        (["", "--opt", "{opt}"], "name an image"),
    ],
)
def test_mistakes(run, tmp_path, option_file, arguments, told):
    Image.fromarray(smooth(30, 30, 3)).save(tmp_path / "a.png")
    names = {"opt": option_file, "net": option_file.replace("net.yml", "net.pth")}
    code, _, err = run("a.png", network=[word.format(**names) for word in arguments])
    assert code == 2 and told in err and len(err.splitlines()) == 1


def test_a_scale_stands_for_its_shipped_weights(network, option_file):
    for scale in (2, 3):
        ours, theirs = Upscaler(scale=scale).network, sources.load(f"x{scale}")[0]
        assert all(
            torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
        )
    assert Upscaler().scale == 4 and Upscaler(network, scale=2).scale == 2
    for model in (network, option_file):
        with pytest.raises(UserError, match="scale must be 2, as of this network, not 3"):
            Upscaler(model, scale=3)
    with pytest.raises(UserError, match="scale must be 4, as of this network, not '4'"):
        Upscaler(scale="4")
    with pytest.raises(UserError, match="is named 'x5'"):
        Upscaler(scale=5)


def test_networks_that_make_no_image_of_an_image():
    with pytest.raises(UserError, match="does not upscale"):
        Upscaler(torch.nn.Conv2d(3, 5, 3))
