"""Embedded data sets, image folders and the data module."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits

from bcosification.convert.preprocessing import ImageTransform, Preprocessing
from bcosification.train.data import (
    BRIGHTNESS,
    FolderImages,
    ImageDataModule,
    build_datamodule,
    check_source,
    digits,
    evaluation_transform,
    scenes,
)
from bcosification.train.image_files import load_image


def _write(path, color=(200, 30, 30), size=(20, 14)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            for i in range(count):
                _write(tmp_path / part / name / f"{i}.png", (80 * label, 10 * i, 0))
    return tmp_path


def _identity(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


# --- digits and scenes ------------------------------------------------------------------------------------------------


def test_digits_are_the_real_ones_divided_into_two_parts():
    train, val = digits("train"), digits("val")
    assert len(train) + len(val) == 1797
    assert not set(train.source.tolist()) & set(val.source.tolist())
    original = load_digits()
    for part in (train, val):
        assert torch.equal(part.labels, torch.from_numpy(original.target[part.source]).long())
        image, label = part[3]
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32
        expected = torch.from_numpy(original.images[part.source[3]]).float()[None, None] / 16
        expected = F.interpolate(expected, size=(32, 32), mode="bicubic", align_corners=False).clamp(0, 1)[0]
        assert (image - expected).abs().max() <= 0.5 / 255 + 1e-6
        assert label == original.target[part.source[3]]
    shares = torch.bincount(val.labels, minlength=10) / torch.bincount(torch.cat([train.labels, val.labels]))
    assert (shares - 0.2).abs().max() < 0.01


def test_scenes_are_a_function_of_their_seed():
    first = scenes("train", count=12, seed=3)
    again = scenes.__wrapped__("train", count=12, seed=3)
    assert torch.equal(first.images, again.images) and torch.equal(first.boxes, again.boxes)
    assert not torch.equal(first.images, scenes("train", count=12, seed=4).images)
    assert not torch.equal(first.images, scenes("val", count=12, seed=3).images)
    assert scenes("train", count=12, seed=3) is first


def test_scenes_of_the_two_parts_use_different_digits():
    train, val = scenes("train", count=200), scenes("val", count=100)
    assert not set(train.source.tolist()) & set(val.source.tolist())
    original = load_digits()
    for part in (train, val):
        assert torch.equal(part.labels, torch.from_numpy(original.target[part.source]).long())


def test_the_box_of_a_scene_holds_its_digit():
    """The digit stands out from the photograph inside its box, and the boxes lie in the image."""
    part = scenes("val", count=60)
    assert part.boxes.shape == (60, 4)
    x0, y0, x1, y1 = part.boxes.unbind(1)
    assert (x0 >= 0).all() and (y0 >= 0).all() and (x1 <= 64).all() and (y1 <= 64).all()
    sizes = torch.stack([x1 - x0, y1 - y0])
    assert sizes.min() >= 8 and sizes.max() <= 46
    images, _ = part.tensors()
    inside = torch.zeros(60, 64, 64, dtype=torch.bool)
    for i in range(60):
        inside[i, y0[i] : y1[i], x0[i] : x1[i]] = True
    brightness = (images * torch.from_numpy(BRIGHTNESS)[:, None, None]).sum(1)
    contrast = [(brightness[i][inside[i]].mean() - brightness[i][~inside[i]].mean()).abs().item() for i in range(60)]
    assert np.mean(contrast) > 0.1


def test_scene_ink_is_inside_the_box(monkeypatch):
    """With a black photograph everything that is not black is ink: its bounding box is the box, but for a faint rim."""
    import bcosification.train.data as data

    monkeypatch.setattr(data, "_photographs", lambda: (np.zeros((200, 200, 3), np.uint8),))
    part = scenes.__wrapped__("val", count=20)
    for image, box in zip(part.images, part.boxes.tolist(), strict=True):
        peak = int(image.max())
        ink = (image.amax(0) > 0.1 * peak + 1).nonzero()
        (top, left), (bottom, right) = ink.min(0).values.tolist(), (ink.max(0).values + 1).tolist()
        assert [left, top, right, bottom] == pytest.approx(box, abs=1)


@pytest.mark.parametrize("maker", [digits, scenes])
def test_unknown_split(maker):
    with pytest.raises(ValueError, match="expected split in .*got 'test'"):
        maker("test")


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folder_gives_images_and_numbers_of_classes(folder):
    data = FolderImages(folder / "train", _identity)
    assert data.classes == ["ant", "bee", "cat"] and len(data) == 9
    image, label = data[5]
    assert label == 1 and torch.equal(image[:, 0, 0], torch.tensor([80.0, 20.0, 0.0]) / 255)


def test_corrupt_files_are_left_out_and_listed(folder):
    (folder / "train" / "bee" / "1.png").write_bytes(b"not an image")
    whole = folder / "train" / "cat" / "2.png"
    whole.write_bytes(whole.read_bytes()[:60])
    data = FolderImages(folder / "train", _identity)
    assert len(data) == 7
    assert sorted(path for path, _ in data.unreadable) == [str(folder / "train/bee/1.png"), str(whole)]
    assert all(reason for _, reason in data.unreadable)
    assert [label for _, label in data.samples] == [0, 0, 0, 1, 1, 2, 2]


def test_file_that_breaks_later_is_left_out_of_its_batch(folder):
    datamodule = build_datamodule(folder, image_size=16, batch_size=9, num_workers=0, augment=False)
    (folder / "train" / "bee" / "1.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="bee/1.png cannot be read"):
        images, labels = next(iter(datamodule.train_dataloader()))
    assert images.shape == (8, 3, 16, 16)
    assert labels.bincount().tolist() == [3, 2, 3]


def test_all_corrupt_is_an_error(folder):
    for path in (folder / "val").rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(ValueError, match="all 6 are unreadable"):
        FolderImages(folder / "val", _identity)


def test_header_check_is_satisfied_with_a_header(folder):
    path = folder / "val" / "ant" / "0.png"
    path.write_bytes(path.read_bytes()[:-30])
    assert len(FolderImages(folder / "val", _identity, check="full").unreadable) == 1
    assert FolderImages(folder / "val", _identity, check="header").unreadable == []


def test_a_class_missing_in_val_does_not_shift_the_others(folder):
    for path in (folder / "val" / "ant").iterdir():
        path.unlink()
    (folder / "val" / "ant").rmdir()
    with pytest.warns(UserWarning, match="no readable image of 'ant'"):
        datamodule = build_datamodule(folder, image_size=16)
    assert {label for _, label in datamodule.val.samples} == {1, 2}
    assert datamodule.class_names == ["ant", "bee", "cat"]


def test_folder_errors_name_what_is_missing(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"one of digits, scenes, or a folder of images, got '.*nowhere'"):
        build_datamodule(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="missing: val/"):
        (tmp_path / "half" / "train").mkdir(parents=True)
        build_datamodule(tmp_path / "half")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="one sub-folder per class, found an empty folder"):
        FolderImages(empty, _identity)
    (empty / "dog").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected images \(.*\.jpg.*\) in its 1 class folders, found none"):
        FolderImages(empty, _identity)
    (folder / "train" / "dog").mkdir()
    with pytest.raises(FileNotFoundError, match="readable images in every class, found none in 'dog'"):
        FolderImages(folder / "train", _identity)
    _write(folder / "val" / "dog" / "0.png")
    with pytest.raises(ValueError, match="expected the classes of the training part.*got also 'dog'"):
        FolderImages(folder / "val", _identity, class_to_idx={"ant": 0, "bee": 1, "cat": 2})


def test_transparent_pixels_are_laid_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(load_image(tmp_path / "clear.png")).min() == 255


# --- the data module --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, size", [("digits", 32), ("scenes", 64), ("digits", 48)])
def test_embedded_batches_are_in_range_and_sized(name, size):
    datamodule = build_datamodule(name, image_size=size, batch_size=16)
    for loader in (datamodule.train_dataloader(), datamodule.val_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (16, 3, size, size) and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.05
        assert labels.dtype == torch.int64 and labels.max() < datamodule.num_classes == 10


def _epoch(datamodule, epoch):
    loader = datamodule.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [(images.clone(), labels) for images, labels in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_depends_on_seed_and_number_alone(folder, workers):
    """Order and augmentation: the same with and without workers, another in the next epoch and for another seed."""
    options = dict(image_size=16, batch_size=4)
    reference = _epoch(build_datamodule(folder, num_workers=0, **options), 2)
    torch.manual_seed(123)  # the state of the global generator does not matter
    again = _epoch(build_datamodule(folder, num_workers=workers, **options), 2)
    assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(reference, again, strict=True))
    for other in (
        _epoch(build_datamodule(folder, num_workers=workers, **options), 3),
        _epoch(build_datamodule(folder, num_workers=workers, seed=1, **options), 2),
    ):
        assert any(not torch.equal(a, b) for (a, _), (b, _) in zip(reference, other, strict=True))


def test_an_epoch_visits_every_image_once(folder):
    datamodule = build_datamodule(folder, image_size=8, batch_size=2, augment=False, num_workers=0)
    seen = [image[:, 0, 0].mul(255).round().int().tolist() for images, _ in _epoch(datamodule, 0) for image in images]
    assert len(seen) == 8 and len({tuple(v) for v in seen}) == 8  # nine images, the odd one waits for the next epoch
    datamodule = build_datamodule(folder, image_size=8, batch_size=64, augment=False, num_workers=0)
    assert sum(len(labels) for _, labels in _epoch(datamodule, 0)) == 9


def test_evaluation_transform_matches_torchvisions_preset():
    from torchvision.transforms._presets import ImageClassification

    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (90, 130, 3), dtype=np.uint8))
    preset = ImageClassification(crop_size=56, resize_size=64, mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.allclose(evaluation_transform(56)(image), preset(image), atol=1e-6)


def test_validation_of_arguments():
    val = digits("val")
    with pytest.raises(ValueError, match="batch_size >= 1, got 0"):
        ImageDataModule(None, val, val.class_names, batch_size=0)
    with pytest.raises(ValueError, match="no training part"):
        ImageDataModule(None, val, val.class_names).train_dataloader()


def test_evaluation_only_takes_class_folders_directly(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        direct = build_datamodule(folder / "val", image_size=16, evaluation_only=True, num_workers=0)
        below = build_datamodule(folder, image_size=16, evaluation_only=True, num_workers=0)
    assert direct.train is None and len(direct.val) == len(below.val) == 6
    numbered = build_datamodule(
        folder, image_size=16, evaluation_only=True, class_names=["cat", "bee", "ant"], num_workers=0
    )
    assert {label for path, label in numbered.val.samples if "/cat/" in path} == {0}


def test_a_folder_does_not_hide_data_that_come_with_the_package(tmp_path, monkeypatch):
    """A run named like its data would otherwise be taken for them when it is resumed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits" / "best").mkdir(parents=True)
    check_source("digits")
    assert build_datamodule("digits").num_classes == 10
    with pytest.raises(FileNotFoundError, match="expected digits/train and digits/val"):
        check_source("./digits")


def test_images_of_other_depths(tmp_path):
    """Pillow's own conversion of 16 bits to 8 makes everything above 255 white."""
    values = np.linspace(0, 65535, 32 * 32).round().astype(np.uint16).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray(values.astype(">u2")).save(tmp_path / "deep.tiff")
    expected = np.repeat((values / 257).round()[..., None], 3, 2)
    for name in ("deep.png", "deep.tiff"):
        got = load_image(tmp_path / name)
        assert got.mode == "RGB" and np.abs(np.asarray(got) - expected).max() <= 1, name
    with Image.open(tmp_path / "deep.png") as image:
        transformed = ImageTransform(Preprocessing((0.5,) * 3, (0.5,) * 3))(image)
    assert np.abs(255 * transformed.permute(1, 2, 0).numpy() - expected).max() <= 1
    for name, kind in (("F", "floating point"), ("I", "32-bit integers")):
        Image.fromarray(values.astype({"F": np.float32, "I": np.int32}[name])).save(tmp_path / f"{name}.tiff")
        with pytest.raises(ValueError, match=f"of 8 or 16 bits a channel, got one of {kind}"):
            load_image(tmp_path / f"{name}.tiff")


def test_cmyk_and_grey_are_read_as_they_look(tmp_path):
    picture = Image.linear_gradient("L").resize((64, 64))
    for mode in ("L", "CMYK", "1", "RGB"):
        picture.convert(mode).save(tmp_path / f"{mode}.tiff")
        got = np.asarray(load_image(tmp_path / f"{mode}.tiff")).astype(float)
        assert got.shape == (64, 64, 3) and abs(got.mean() - np.asarray(picture).mean()) < 3
