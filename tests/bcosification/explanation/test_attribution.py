"""Attribution methods against formulas computed by hand."""

import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from bcosification.explanation import (
    bcos_contributions,
    explain,
    grad_cam,
    input_x_gradient,
    integrated_gradients,
)
from bcosification.explanation.attribution import last_feature_map
from bcosification.nn import Normalize
from tests.bcosification import tiny_networks
from tests.bcosification.tiny_networks import build

STANDARD = [input_x_gradient, integrated_gradients, grad_cam]
TARGETS = torch.tensor([0, 2, 1])


class Block(nn.Module):
    """Its shortcut comes last among its modules, but not in the forward pass."""

    def __init__(self, inside, outside):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(inside, outside, 3, 2, 1), nn.BatchNorm2d(outside), nn.ReLU()
        self.shortcut = nn.Conv2d(inside, outside, 1, 2)

    def forward(self, x):
        shortcut = self.shortcut(x)
        return self.relu(self.norm(self.conv(x)) + shortcut)


def standard():
    torch.manual_seed(0)
    layers = [Block(3, 6), nn.Dropout(0.5), Block(6, 8)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(Normalize([0.4, 0.5, 0.6], [0.2, 0.25, 0.3]), *layers, *head).eval()


def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def gradient(model, x, targets=TARGETS):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).gather(1, targets[:, None]).sum(), x)[0]


def test_bcos_contributions():
    network, x6 = build("own_convnet"), tiny_networks.images()
    maps = bcos_contributions(network, x6, TARGETS)
    torch.testing.assert_close(maps, explain(network, x6, TARGETS).contributions, rtol=0, atol=0)


def test_input_x_gradient():
    model, x = standard(), images()
    torch.testing.assert_close(input_x_gradient(model, x, TARGETS), (x * gradient(model, x)).sum(1))


def test_integrated_gradients_add_up_to_the_difference_of_the_logits():
    model, x = standard(), images()
    maps = integrated_gradients(model, x, TARGETS, steps=400)
    difference = (model(x) - model(torch.zeros_like(x))).gather(1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close(maps.sum((1, 2)), difference, rtol=2e-2, atol=2e-3)


def test_integrated_gradients_of_a_linear_model_are_input_times_gradient():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)), images()
    expected = (x * model[1].weight[TARGETS].view_as(x)).sum(1)
    torch.testing.assert_close(integrated_gradients(model, x, TARGETS, steps=3), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_grad_cam(interpolation):
    model, x = standard(), images()
    features = model[:4](x).detach().requires_grad_()
    logits = model[4:](features).gather(1, TARGETS[:, None]).sum()
    importance = torch.autograd.grad(logits, features)[0].mean((2, 3), keepdim=True)
    cam = F.relu((importance * features).sum(1, keepdim=True)).detach()
    options = {"align_corners": False} if interpolation == "bilinear" else {}
    expected = F.interpolate(cam, (16, 16), mode=interpolation, **options)[:, 0]
    assert expected.any()
    torch.testing.assert_close(grad_cam(model, x, TARGETS, interpolation=interpolation), expected)


def test_the_last_feature_map():
    model = standard()
    assert last_feature_map(model, images()) is model[3]  # the block, not its shortcut and not the pooled features
    assert last_feature_map(nn.Sequential(model[0], nn.Conv2d(3, 4, 16), nn.Flatten()), images()) is model[0]


def test_a_named_layer():
    model, x = standard(), images()
    by_name = grad_cam(model, x, TARGETS, layer="1.conv")
    torch.testing.assert_close(by_name, grad_cam(model, x, TARGETS, layer=model[1].conv), rtol=0, atol=0)
    assert not torch.allclose(by_name, grad_cam(model, x, TARGETS))


def test_grad_cam_of_torchvisions_networks():
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    resnet = torchvision.models.resnet18(weights=None).eval()
    assert last_feature_map(resnet, x) is resnet.layer4
    densenet = torchvision.models.densenet121(weights=None).eval()
    assert last_feature_map(densenet, x) is densenet.features
    assert grad_cam(densenet, x, 3).shape == (1, 64, 64)  # its features are changed in place by the ReLU that follows


@pytest.mark.parametrize("method", STANDARD)
def test_batches_and_modes(method):
    model, x = standard().train(), images()
    model[1].eval()
    before = [m.training for m in model.modules()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    x.requires_grad_()
    with torch.no_grad():
        whole = method(model, x, TARGETS)
    torch.testing.assert_close(method(model, x, TARGETS, batch_size=2), whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(method(model, x, 2)[1:2], method(model, x[1:2], [2]), rtol=1e-4, atol=1e-6)
    assert [m.training for m in model.modules()] == before
    assert all(bool((p.grad == 1).all()) and p.requires_grad for p in model.parameters())
    assert x.grad is None and not whole.requires_grad and whole.shape == (3, 16, 16)


@pytest.mark.parametrize("method", STANDARD)
def test_frozen_parameters(method):
    model, x = standard(), images()
    expected = method(model, x, TARGETS)
    torch.testing.assert_close(method(model.requires_grad_(False), x, TARGETS), expected)


@pytest.mark.parametrize("method", STANDARD)
def test_bad_input(method, monkeypatch):
    model, x = standard(), images()
    with pytest.raises(ValueError, match=r"\(N, C, H, W\), N >= 1, got \(3, 16, 16\)"):
        method(model, x[0], 0)
    with pytest.raises(ValueError, match=r"one target per image, shape \(3,\), got \(2,\)"):
        method(model, x, [0, 1])
    with pytest.raises(TypeError, match="integer targets, got torch.float32"):
        method(model, x, [0.0, 1.0, 2.0])
    with pytest.raises(TypeError, match="floating-point tensor, got torch.uint8"):
        method(model, x.to(torch.uint8), 0)
    with pytest.raises(ValueError, match="batch_size >= 1, got .*0"):
        method(model, x, 0, batch_size=0)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'bcos-kernels\[explain\]'"):
        method(model, x, 0)


def test_grad_cam_without_a_layer():
    with pytest.raises(ValueError, match="name of a layer, .* got 'layer5'"):
        grad_cam(standard(), images(), 0, layer="layer5")
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    with pytest.raises(ValueError, match="feature maps .* more than one pixel, got Sequential"):
        grad_cam(flat, images(), 0)
