"""A short run that the tests of the commands share, and images."""

import pytest
from PIL import Image

from bcosification.cli import main
from bcosification.train.data import digits


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A short run of the command: ResNet-18 from random weights, two steps on digits."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    arguments = "--model resnet18 --no-pretrained --data digits --epochs 1 --batch-size 8 --limit-batches 2 --lr 1e-3"
    assert main(["finetune", *arguments.split(), "--out", str(folder), "--accelerator", "cpu", "--no-progress"]) == 0
    return folder


@pytest.fixture
def digit_files(tmp_path):
    val = digits("val")
    files = []
    for i in range(3):
        path = tmp_path / "images" / f"digit{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(val.images[i].permute(1, 2, 0).numpy()).save(path)
        files.append(path)
    return files
