"""Pictures against hand-computed pixels, matplotlib's colour map and the files that are written."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from bcosification.explanation import pictures


def test_colour_of_single_pixels():
    # Pixel (0, 0) looks for red, (0, 1) for black (all inverses), (1, 0) speaks against: transparent, (1, 1) is empty.
    weights = torch.zeros(6, 2, 2)
    weights[0, 0, 0] = 3.0
    weights[3:, 0, 1] = torch.tensor([1.0, 2.0, 2.0])
    weights[1, 1, 0] = -1.0
    picture = pictures.color_picture(torch.ones(6, 2, 2), weights, smooth=None, percentile=100)
    np.testing.assert_allclose(picture[0, 0], [1, 0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(picture[0, 1], [0, 0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(picture[1], 0, atol=1e-6)


def test_smoothing_averages_alpha_with_zeros_outside():
    weights = torch.zeros(6, 5, 5)
    weights[0, 2, 2] = 1.0
    picture = pictures.color_picture(torch.ones(6, 5, 5), weights, smooth=3, percentile=100)
    expected = np.zeros((5, 5))
    expected[1:4, 1:4] = 1
    np.testing.assert_allclose(picture[..., 3], expected, atol=1e-6)


def test_a_map_of_zeros_is_transparent():
    assert not pictures.color_picture(torch.rand(6, 8, 8), torch.zeros(6, 8, 8)).any()


def test_quantiles_of_large_images_are_the_same(monkeypatch):
    image, weights = torch.rand(6, 40, 30), torch.randn(6, 40, 30)
    expected = pictures.color_picture(image, weights)
    monkeypatch.setattr(pictures, "_QUANTILE_LIMIT", 100)
    np.testing.assert_allclose(pictures.color_picture(image, weights), expected, atol=1e-6)


def test_half_precision_is_computed_in_float32():
    image, weights = torch.rand(6, 16, 16).half(), torch.randn(6, 16, 16).half()
    expected = pictures.color_picture(image.float(), weights.float())
    np.testing.assert_array_equal(pictures.color_picture(image, weights), expected)


def test_contributions_are_blue_white_and_red():
    values = torch.tensor([[-2.0, -1.0], [0.0, 4.0]])
    picture = pictures.contribution_picture(values, percentile=100)
    assert picture.dtype == np.float32
    np.testing.assert_allclose(picture, matplotlib.colormaps["bwr"]((values.numpy() + 4) / 8), atol=1e-6)
    np.testing.assert_allclose(picture[1, 1], [1, 0, 0, 1], atol=1e-6)
    assert picture[1, 0, :3].min() > 0.99  # zero is white
    assert picture[0, 0, 2] == 1 and picture[0, 0, 0] < picture[0, 1, 0] < 1  # the more against, the bluer


def test_contributions_beyond_the_percentile_are_cut():
    values = np.zeros((10, 10), dtype=np.float32)
    values[0, 0], values[5] = 1000, 1
    picture = pictures.contribution_picture(values, percentile=90)
    np.testing.assert_allclose(picture[5], np.tile([1, 0, 0, 1], (10, 1)), atol=1e-6)


def test_contributions_of_zero_are_white():
    np.testing.assert_allclose(pictures.contribution_picture(torch.zeros(3, 3)), 1, atol=0.01)


def test_images_plain_and_encoded():
    image = torch.rand(3, 4, 5)
    expected = np.concatenate([image.permute(1, 2, 0).numpy(), np.ones((4, 5, 1))], 2)
    np.testing.assert_allclose(pictures.image_picture(image), expected, atol=1e-7)
    np.testing.assert_allclose(pictures.image_picture(torch.cat([image, 1 - image])), expected, atol=1e-7)
    np.testing.assert_allclose(pictures.image_picture(image[:1])[..., 2], image[0], atol=1e-7)


def test_on_background():
    picture = np.array([[[1.0, 0.0, 0.0, 0.25], [0.0, 1.0, 0.0, 1.0]]], dtype=np.float32)
    np.testing.assert_allclose(pictures.on_background(picture), [[[1, 0.75, 0.75, 1], [0, 1, 0, 1]]])
    np.testing.assert_allclose(pictures.on_background(picture, (0, 0, 0))[0, 0], [0.25, 0, 0, 1])


def test_saved_pictures_keep_size_and_transparency(tmp_path):
    picture = np.random.default_rng(0).random((5, 7, 4), dtype=np.float32)
    path = pictures.save_picture(picture, tmp_path / "a" / "b.png")
    saved = Image.open(path)
    assert saved.size == (7, 5) and saved.mode == "RGBA"
    np.testing.assert_allclose(np.asarray(saved) / 255, picture, atol=0.5 / 255 + 1e-6)


def test_a_grid_shows_every_picture_in_its_place(tmp_path):
    colors = np.array([[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 1, 0], [0, 1, 1], [1, 0, 1]]], dtype=np.float32)
    rows = [[np.tile(np.append(color, 1).astype(np.float32), (8, 8, 1)) for color in row] for row in colors]
    rows[1][1] = None
    figure = pictures.picture_grid(
        rows,
        row_labels=["first", "second"],
        column_labels=["a", "b", "c"],
        cell_labels=[["x", None, None], [None, None, "y"]],
        title="grid",
    )
    axes = np.array(figure.axes).reshape(2, 3)
    assert [axis.get_title() for axis in axes[0]] == ["a", "b", "c"]
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["first", "second"]
    assert axes[0, 0].get_xlabel() == "x" and axes[1, 2].get_xlabel() == "y" and not axes[1, 1].images
    path = pictures.save_figure(figure, tmp_path / "grid.png", dpi=100)
    drawn = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255
    figure.draw_without_rendering()
    for (i, j), axis in np.ndenumerate(axes):
        if (i, j) == (1, 1):
            continue
        x, y = axis.transData.transform((3.5, 3.5)) * 100 / figure.dpi
        np.testing.assert_allclose(drawn[drawn.shape[0] - 1 - int(y), int(x)], colors[i, j], atol=0.02)


@pytest.mark.parametrize(
    ("shape", "size", "factor"),
    [((32, 48), 224, 7), ((48, 32), 224, 7), ((33, 40), 224, 7), ((64, 64), 224, 4), ((224, 224), 224, 1)]
    + [((300, 400), 224, 1), ((5, 5), None, 1), ((5, 5), 0, 1), ((5, 9), 6, 2)],
)  # fmt: skip
def test_enlarged_pictures_hold_every_pixel_as_a_square(shape, size, factor):
    picture = np.random.default_rng(0).random((*shape, 4), dtype=np.float32)
    large = pictures.enlarged(picture, size)
    assert large.shape == (shape[0] * factor, shape[1] * factor, 4)
    assert min(large.shape[:2]) >= (size or 0)
    for i in range(factor):
        for j in range(factor):
            assert np.array_equal(large[i::factor, j::factor], picture)


def test_pyplot_and_its_backend_stay_out(tmp_path):
    # pyplot would choose a backend, and with it a window system.
    code = (
        "import sys, torch, bcosification.explanation.pictures as p;"
        "p.save_figure(p.picture_grid([[p.image_picture(torch.rand(3, 4, 4))]]), sys.argv[1]);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr


@pytest.mark.parametrize("module", ["matplotlib", "PIL"])
def test_a_missing_library_is_named(monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'bcos-kernels\[explain\]'"):
        if module == "PIL":
            pictures.save_picture(np.zeros((2, 2, 4)), tmp_path / "a.png")
        else:
            pictures.contribution_picture(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pictures.color_picture(torch.rand(3, 4, 4), torch.rand(3, 4, 4)), r"\(6, H, W\), got \(3, 4, 4\)"),
        (lambda: pictures.color_picture(torch.rand(6, 4, 4), torch.rand(6, 4, 5)), r"\(6, 4, 4\) and \(6, 4, 5\)"),
        (
            lambda: pictures.color_picture(torch.rand(6, 4, 4), torch.rand(6, 4, 4), smooth=4),
            "smooth to be odd.* got 4",
        ),
        (
            lambda: pictures.color_picture(torch.rand(6, 4, 4), torch.rand(6, 4, 4), smooth=-1),
            "odd and >= 1, .* got -1",
        ),
        (lambda: pictures.color_picture(torch.rand(6, 4, 4), torch.rand(6, 4, 4), percentile=0), "percentile"),
        (lambda: pictures.contribution_picture(torch.rand(1, 4, 4)), r"\(H, W\), got \(1, 4, 4\)"),
        (lambda: pictures.contribution_picture(torch.rand(4, 4), percentile=101), "percentile > 0 and <= 100, got 101"),
        (lambda: pictures.image_picture(torch.rand(2, 4, 4)), r"got \(2, 4, 4\)"),
        (lambda: pictures.on_background(np.zeros((4, 4, 3))), r"\(H, W, 4\), got \(4, 4, 3\)"),
        (lambda: pictures.picture_grid([]), "equal length, got lengths"),
        (lambda: pictures.picture_grid([[None], [None, None]]), r"equal length, got lengths \[1, 2\]"),
        (lambda: pictures.picture_grid([[None]], row_labels=["a", "b"]), "expected 1 row_labels, got 2"),
        (lambda: pictures.enlarged(np.zeros((2, 2, 4)), -1), "expected size >= 0, got -1"),
        (lambda: pictures.save_picture(np.zeros((2, 2, 4)), "a.jpg"), r"ends in \.png, got 'a\.jpg'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
