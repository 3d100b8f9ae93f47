"""Accuracy against counting by hand."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bcosification.evaluation import evaluate


class Dropped(nn.Module):
    """Linear logits, spoilt by dropout in training mode."""

    def __init__(self, classes):
        super().__init__()
        self.linear, self.dropout = nn.Linear(12, classes), nn.Dropout(0.9)

    def forward(self, images):
        return self.linear(self.dropout(images.flatten(1)))


def data(classes, count=50, batch_size=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 2, 2, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    return images, labels, DataLoader(TensorDataset(images, labels), batch_size=batch_size)


def build(classes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Dropped(classes)


@pytest.mark.parametrize("progress", [True, False])
def test_top_k(progress):
    model = build(10).train()
    images, labels, loader = data(10)  # the last batch has two images
    result = evaluate(model, loader, topk=(1, 3, 5), progress=progress)
    with torch.no_grad():
        order = model.eval()(images).argsort(1, descending=True)
    expected = {f"top{k}": float((order[:, :k] == labels[:, None]).any(1).float().mean()) for k in (1, 3, 5)}
    assert result == pytest.approx(expected | {"images": 50})
    assert 0 < result["top1"] < result["top3"] < result["top5"] < 1


def test_modes_and_gradients_are_left_alone():
    model = build(10).train()
    model.linear.eval()
    evaluate(model, data(10)[2], progress=False)
    assert model.training and model.dropout.training and not model.linear.training
    assert all(p.grad is None and p.requires_grad and not p.is_inference() for p in model.parameters())


def test_more_places_than_classes():
    result = evaluate(build(3), data(3)[2], progress=False)
    assert result["top5"] == 1.0 and 0 < result["top1"] < 1


def test_default_is_top_1_and_5():
    assert list(evaluate(build(10), data(10)[2], "cpu", progress=False)) == ["top1", "top5", "images"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loader": []}, "at least one image, got an empty loader"),
        ({"topk": (0, 1)}, r"ints >= 1, got \[0, 1\]"),
        ({"topk": ()}, r"ints >= 1, got \[\]"),
        ({"loader": [(torch.rand(2, 3, 2, 2), torch.tensor([0, 10]))]}, r"labels in \[0, 9\], got 0 to 10"),
        ({"loader": [(torch.rand(2, 3, 2, 2), torch.tensor([-1, 1]))]}, r"labels in \[0, 9\], got -1 to 1"),
        ({"loader": [(torch.rand(2, 3, 2, 2), torch.tensor([0]))]}, r"got \(2, 10\) and \(1,\)"),
        ({"loader": [(torch.rand(2, 3, 2, 2), torch.tensor([0.0, 1.0]))]}, "integer labels, got torch.float32"),
    ],
)
def test_bad_input(change, message):
    call = {"model": build(10), "loader": data(10)[2], "progress": False} | change
    with pytest.raises(ValueError, match=message):
        evaluate(**call)


def test_missing_torchmetrics_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", None)
    with pytest.raises(ModuleNotFoundError, match=r"torchmetrics.*pip install 'bcos-kernels\[train\]'"):
        evaluate(build(10), data(10)[2])
