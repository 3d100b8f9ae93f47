"""Runs that are resumed from another folder, or with data that have moved."""

import dataclasses
import shutil
import warnings

import pytest
import torch
from PIL import Image

from bcosification.train.configuration import FinetuneConfig, with_absolute_paths
from bcosification.train.finetuning import finetune
from bcosification.train.run_folder import saved_config
from tests.bcosification.train.small import STATISTICS, small_network


def images(folder, classes=("a", "b"), count=3):
    for part in ("train", "val"):
        for name in classes:
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.new("RGB", (16, 16), (40 * i, 90, 200)).save(folder / part / name / f"{i}.png")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Of a run that has done one epoch of two, started in `tmp_path / "here"` with relative paths."""
    here = tmp_path / "here"
    images(here / "data")
    monkeypatch.chdir(here)
    config = FinetuneConfig(
        data="data", output="run", epochs=1, batch_size=4, image_size=16, num_workers=0, progress=False,
        conversion=STATISTICS, accelerator="cpu",
    )  # fmt: skip
    finetune(config, model=small_network())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return dataclasses.replace(saved_config(here / "run"), output=str(here / "run"), epochs=2)


def test_a_run_is_resumed_from_anywhere(config, tmp_path):
    assert config.data == str(tmp_path / "here" / "data")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [row["epoch"] for row in finetune(config, model=small_network(), resume=True).history] == [1, 2]


def test_data_that_have_moved(config, tmp_path):
    (tmp_path / "here" / "data").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="got '.*here/data'; the run in .* was trained on it: data= tells"):
        finetune(config, model=small_network(), resume=True)
    moved = dataclasses.replace(config, data="../moved")
    assert len(finetune(moved, model=small_network(), resume=True).history) == 2
    assert saved_config(tmp_path / "here" / "run").data == str(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="got '../nowhere'$"):  # what was given, and is no place of the run's
        finetune(dataclasses.replace(config, data="../nowhere"), model=small_network(), resume=True)


@pytest.mark.parametrize(
    "other, message",
    [
        (dict(classes=("a", "b", "c")), r"6 .* in 2 classes \(a, b\); got data='.*' with 9 images .* in 3 classes"),
        (dict(count=4), "6 images to train on and 6 to validate on; got data='.*other' with 8 images .* own$"),
        ("digits", r"data='.*here/data'; got data='digits': another run needs a folder of its own"),
    ],
)
def test_other_data_are_another_run(config, tmp_path, other, message):
    if isinstance(other, dict):
        images(tmp_path / "other", **other)
        other = str(tmp_path / "other")
    before = (tmp_path / "here" / "run" / "config.yaml").read_text()
    with pytest.raises(ValueError, match=message):
        finetune(dataclasses.replace(config, data=other), model=small_network(), resume=True)
    assert (tmp_path / "here" / "run" / "config.yaml").read_text() == before


def test_as_many_other_files_are_another_run(config, tmp_path):
    shutil.copytree(tmp_path / "here" / "data", tmp_path / "other")
    file = tmp_path / "other" / "val" / "a" / "0.png"
    file.rename(file.with_name("zero.png"))
    with pytest.raises(ValueError, match="with as many, but other files: another run"):
        finetune(dataclasses.replace(config, data=str(tmp_path / "other")), model=small_network(), resume=True)


def test_files_that_came_to_the_same_place_are_told(config, tmp_path):
    images(tmp_path / "here" / "data", count=4)
    with pytest.warns(UserWarning, match="began with .6 images .* then, 8 images to train on and 8 .* on with these"):
        assert len(finetune(config, model=small_network(), resume=True).history) == 2


def test_a_checkpoint_that_tells_nothing_of_its_data(config, tmp_path):
    """As those of earlier versions: resumed where it was, not with data from another place."""
    path = tmp_path / "here" / "run" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["ImageDataModule"]
    torch.save(checkpoint, path)
    images(tmp_path / "other")
    with pytest.raises(ValueError, match="expected the data of the run .*its checkpoint tells no more of them; got "):
        finetune(dataclasses.replace(config, data=str(tmp_path / "other")), model=small_network(), resume=True)
    assert len(finetune(config, model=small_network(), resume=True).history) == 2


def test_what_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("resnet18", "ours", "digits", "bert", "runs/a"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ours" / "config.json").write_text("{}")
    (tmp_path / "weights.pth").write_text("")
    paths = (
        ("data", "resnet18"), ("data", "shards/{0..3}.tar"), ("model", "ours"), ("model", "runs/a"),
        ("model", "weights.pth"), ("teacher", "weights.pth"), ("weights", "weights.pth"),
    )  # fmt: skip
    names = (
        ("data", "digits"), ("data", "nowhere"), ("data", "s3://x/0.tar"), ("model", "resnet18"),
        ("model", "timm:resnet18"), ("model", "transformers:user/name"), ("weights", "IMAGENET1K_V1"),
        ("output", "ours"), ("arch", "ours"),
    )  # fmt: skip
    for option, value in paths:
        assert with_absolute_paths({option: value}) == {option: str(tmp_path / value)}
    for option, value in names:
        assert with_absolute_paths({option: value}) == {option: value}
    assert with_absolute_paths({"model": "transformers:bert"}) == {"model": f"transformers:{tmp_path / 'bert'}"}
    assert with_absolute_paths({"weights": None, "b": 2.0}) == {"weights": None, "b": 2.0}
