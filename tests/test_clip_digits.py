"""The example that trains, B-cosifies and distils small CLIP models, at the smallest size."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bcosification

FILE = Path(__file__).parents[1] / "examples" / "clip_digits.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("clip_digits", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_contrastive_loss(example):
    """CLIP's two losses: images among captions, captions among their images."""
    torch.manual_seed(0)
    module = example.ContrastiveModule(example.small_clip("resnet", 4))
    logits = torch.randn(4, 10)
    labels = torch.tensor([3, 7, 3, 0])
    module.logits = lambda images, tokens: logits
    module.log = lambda *_, **__: None
    images = sum(-logits[i].log_softmax(0)[labels[i]] for i in range(4)) / 4
    of_caption = {3: [0, 2], 7: [1], 0: [3]}
    captions = sum(-logits[:, d].log_softmax(0)[own].mean() for d, own in of_caption.items()) / 3
    loss = module.training_step((torch.zeros(4, 3, 64, 64), labels), 0)
    torch.testing.assert_close(loss, (images + captions) / 2)


@pytest.mark.parametrize("tower, size", [("resnet", 128), ("vit", 64)])
def test_what_is_read_in_grids(example, tower, size):
    """Of two grids, all four digits and two of four."""
    options = example.argparse.Namespace(out="nowhere")
    study = example.Study.__new__(example.Study)
    study.tower, study.options = tower, options
    images = torch.rand(8, 3, 64, 64)
    labels = torch.tensor([0, 1, 2, 3, 6, 7, 8, 9])
    logits = torch.zeros(2, 10)
    logits[0, :4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    logits[1, torch.tensor([0, 1, 6, 7])] = 1.0

    def classifier(grids):
        assert grids.shape == (2, 3, size, size)
        corner = images[2] if tower == "resnet" else images[2].unflatten(2, (32, 2)).unflatten(1, (32, 2)).mean((2, 4))
        cell = size // 2
        torch.testing.assert_close(  # the third one is at the left below; borders of cells are mixed with neighbours
            grids[0, :, cell + 2 : -2, 2 : cell - 2], corner[:, 2:-2, 2:-2], atol=0.35, rtol=0
        )
        return logits

    assert study.read(classifier, images, labels) == pytest.approx(6 / 8)


def test_the_whole_at_the_smallest_size(example, tmp_path, capsys, monkeypatch):
    small = "--epochs 1 --distill-epochs 1 --limit-batches 2 --batch-size 8 --width 8 --grids 1 --localisation-images 4"
    arguments = ["--out", str(tmp_path), *small.split()]
    part = bcosification.train.data.scenes("val", count=40)
    monkeypatch.setattr(example, "scenes", lambda split, size: part)
    assert example.main(arguments) == 0
    first = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    text = (tmp_path / "table.md").read_text()
    assert text in first and "Measured on" in text
    assert list(results) == ["resnet", "vit"]
    assert list(results["resnet"]) == [
        "teacher, input x gradient", "converted", "student", "teacher, Grad-CAM", "student, unpool, p = 1",
        "student, unpool, p = 3",
    ]  # fmt: skip
    for tower in ("resnet", "vit"):
        for row in results[tower].values():
            assert row["images"] == 40 and 0 <= row["top1"] <= row["top5"] <= 1 and 0 <= row["epg"] <= 1
            assert (row["read_in_grids"] is None) == (row["gridpg"] is None)
        student = bcosification.load(tmp_path / tower / "student" / "best")
        classifier = student.classifier(example.DIGITS, example.TEMPLATES)
        images, labels = part.tensors()
        with torch.no_grad():
            top1 = (classifier(images).argmax(1) == labels).float().mean()
        assert results[tower]["student"]["top1"] == pytest.approx(float(top1))
        assert np.asarray(Image.open(tmp_path / tower / "grid.png")).std() > 5
        assert (tmp_path / tower / "pictures" / "explanations.json").is_file()
    # The same command takes up what is there: nothing is trained again, the numbers are the same.
    before = (tmp_path / "resnet" / "student" / "last.ckpt").stat().st_mtime_ns
    assert example.main(arguments) == 0
    assert (tmp_path / "resnet" / "student" / "last.ckpt").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "results.json").read_text()) == results
