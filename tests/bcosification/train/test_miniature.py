"""The parts of the demo, and the whole of it at the smallest size."""

import json

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import bcosification
from bcosification.train import miniature


def test_the_network_is_torchvisions_resnet():
    model = miniature.small_resnet(width=16)
    assert type(model) is torchvision.models.ResNet
    assert model.conv1.stride == (1, 1)
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 10)
    assert model.layer4(torch.rand(1, 64, 8, 8)).shape == (1, 128, 4, 4)
    # B-cosified without B and with biases and max pooling, it is the same function.
    model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
    images = torch.rand(2, 3, 64, 64)
    same = bcosification.bcosify(model, b=1, bias="keep", pool="keep", mean=miniature.MEAN, std=miniature.STD)
    assert torch.allclose(same(images), miniature._standard(model)(images), atol=1e-4)


@pytest.mark.parametrize("arm", ["bcosified", "bcos_v2"])
@pytest.mark.parametrize("training", [False, True])
def test_peer_layers_compute_the_same(arm, training):
    torch.manual_seed(0)
    model = miniature._converted(arm, miniature.small_resnet(width=16)).train(training)
    peer = miniature.with_peer_layers(model)
    assert not any(isinstance(m, bcosification.nn.BcosConv2d) for m in peer.modules())
    images = torch.rand(3, 3, 32, 32)
    ours, theirs = model(images), peer(images)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    for output, network in ((ours, model), (theirs, peer)):
        network.zero_grad()
        output.square().sum().backward()
    gradients = [
        {n.replace(".linear.", "."): p.grad for n, p in network.named_parameters()} for network in (model, peer)
    ]
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 1e-3 * gradient.norm() + 1e-6, name


def test_the_arms_differ_as_the_paper_says():
    network = miniature.small_resnet(width=4)
    v2, bcosified = miniature._converted("bcos_v2", network), miniature._converted("bcosified", network)
    for model, normalised, activations in ((v2, True, 0), (bcosified, False, 5)):
        layers = [m for m in model.modules() if isinstance(m, bcosification.nn.BcosConv2d)]
        assert layers and all(layer.normalize_weight is normalised and layer.b == 2 for layer in layers)
        assert sum(isinstance(m, torch.nn.ReLU) for m in model.modules()) == activations
        assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    assert isinstance(v2.normalize, torch.nn.Identity) and not isinstance(bcosified.normalize, torch.nn.Identity)


def test_first_epoch_at():
    history = [{"epoch": i + 1, "val_top1": value} for i, value in enumerate((0.2, 0.6, 0.5, 0.9))]
    assert [miniature.first_epoch_at(history, a) for a in (0.1, 0.6, 0.61, 0.95)] == [1, 2, 4, None]


def test_mean_and_spread():
    assert miniature._spread([0.5, 0.7], 100) == "60.0 ± 10.0"
    assert miniature._spread([0.5]) == "0.5"
    assert miniature._spread([3, None]) == "3.0 ± 0.0 (1 of 2 seeds)"
    assert miniature._spread([None, None]) == "–"


def test_the_whole_at_the_smallest_size(tmp_path, capsys):
    small = (
        "--seeds 2 --epochs 1 --pretrain-epochs 1 --train-images 32 --val-images 40 --width 16 --batch-size 16 "
        "--localisation-images 4 --grids 1 --integration-steps 2 --timing-steps 1"
    )
    assert miniature.main(["--out", str(tmp_path / "demo"), *small.split()]) == 0
    names = {"table.md", "results.json", "explanations.png", "grid.png", "training_curves.png"}
    assert {path.name for path in (tmp_path / "demo").iterdir()} == names
    text = (tmp_path / "demo" / "table.md").read_text()
    assert text in capsys.readouterr().out
    numbers = json.loads((tmp_path / "demo" / "results.json").read_text())
    for arm in ("standard", "bcosified", "bcos_v2", "random_weights"):
        assert numbers["accuracy"][arm] == [history[arm][-1]["val_top1"] for history in numbers["histories"]]
        assert all(value * 40 == pytest.approx(round(value * 40), abs=1e-4) for value in numbers["accuracy"][arm])
    assert f"| {miniature._spread(numbers['accuracy']['bcosified'], 100)} |" in text
    for result in numbers["localisation"]:
        boxes = bcosification.train.data.scenes("val", count=40).boxes[:4].double()
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 64**2
        assert result["chance"]["epg"] == pytest.approx(areas.mean().item())
        assert 0 < result["bcosified"]["epg"] < 1
    assert set(numbers["seconds_per_epoch"]) == {"plain", "fused", "peer"}
    assert all(value > 0 for value in numbers["seconds_per_epoch"].values())
    for name in names:
        if name.endswith(".png"):
            assert np.asarray(Image.open(tmp_path / "demo" / name)).std() > 10


def test_bad_arguments(capsys):
    assert miniature.main(["--epochs", "0"]) == 2
    assert "expected --epochs >= 1, got 0" in capsys.readouterr().err
