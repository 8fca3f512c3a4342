"""`imresize` against MATLAB's own pixels and against MATLAB's published algorithm, written out."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from mlrn_arch.inference.resize import imresize

BENCHMARK = Path(__file__).parents[1].parent / "shared" / "data" / "benchmark"


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("name", ["Set5", "Set14"])
def test_published_lr_images_are_reproduced(name, scale):
    folder = BENCHMARK / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    files = sorted((folder / f"GTmod{scale}").iterdir())
    assert len(files) == int(name[3:])
    for file in files:
        gt = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        lq = cv2.imread(str(folder / f"LRbicx{scale}" / file.name), cv2.IMREAD_UNCHANGED)
        out = imresize(gt, scale)
        assert out.shape == lq.shape
        inside = slice(2, -2)  # the published LR were made from uncropped images
        np.testing.assert_array_equal(out[inside, inside], lq[inside, inside], err_msg=file.name)


def matlab_matrix(length: int, scale: int) -> np.ndarray:
    """imresize.m's `contributions` as a dense matrix: output x input, float64."""

    def cubic(x):
        x = np.abs(x)
        near = 1.5 * x**3 - 2.5 * x**2 + 1
        far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return near * (x <= 1) + far * ((x > 1) & (x <= 2))

    factor, width = 1 / scale, 4 * scale
    x = np.arange(1, -(-length // scale) + 1)[:, None]
    u = x / factor + 0.5 * (1 - 1 / factor)
    indices = np.floor(u - width / 2) + np.arange(width + 2)
    weights = factor * cubic(factor * (u - indices))
    weights /= weights.sum(1, keepdims=True)
    aux = np.concatenate([np.arange(length), np.arange(length)[::-1]])
    indices = aux[(indices.astype(int) - 1) % len(aux)]
    matrix = np.zeros((len(x), length))
    np.add.at(matrix, (np.arange(len(x))[:, None], indices), weights)
    return matrix


@pytest.mark.parametrize("scale", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("shape", [(96, 120, 3), (61, 47), (1, 9, 1), (5, 300, 4)])
def test_agrees_with_the_definition_borders_included(shape, scale):
    rng = np.random.default_rng(0)
    img = rng.integers(0, 256, shape, dtype=np.uint8)
    img.flat[: img.size // 2] = rng.choice([0, 255], img.size // 2)  # clipping happens
    rows = np.tensordot(matlab_matrix(shape[0], scale), img, 1)
    rows = np.floor(rows.clip(0, 255) + 0.5)
    both = np.moveaxis(np.tensordot(matlab_matrix(shape[1], scale), rows, ([1], [1])), 0, 1)
    exact = np.floor(both.clip(0, 255) + 0.5)
    out = imresize(img, scale)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, exact)


def test_values_known_by_hand():
    flat = np.full((12, 12, 3), 77, np.uint8)
    assert np.all(imresize(flat, 3) == 77)
    # One bright row; x2 weighs the rows of an output pixel by (-3 -9 29 111 111 29 -9 -3) / 256.
    img = np.zeros((16, 8), np.uint8)
    img[6] = 200
    assert imresize(img, 2)[:, 0].tolist() == [0, 0, 23, 87, 0, 0, 0, 0]


def test_memory_order_and_crops_do_not_matter():
    img = np.random.default_rng(1).integers(0, 256, (48, 60, 3), dtype=np.uint8)
    turned = np.asfortranarray(img)[:36, :48, ::-1]
    np.testing.assert_array_equal(imresize(turned, 3), imresize(turned.copy(), 3))


@pytest.mark.parametrize(
    "img, scale",
    [
        (np.zeros((8, 8)), 2),
        (np.zeros((8, 8, 5), np.uint8), 2),
        (np.zeros(8, np.uint8), 2),
        (np.zeros((0, 8), np.uint8), 2),
        (np.zeros((8, 8), np.uint8), 1),
        (np.zeros((8, 8), np.uint8), 2.5),
    ],
)
def test_refuses_what_it_cannot_do(img, scale):
    with pytest.raises(ValueError):
        imresize(img, scale)
