"""Convolutions with TensorFlow's padding, and with weights mixed of experts', against timm's and image by image."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import CondConv2d
from timm.layers.padding import pad_same as timms

from bcosification.nn import BcosCondConv2d, BcosConv2d, BcosConv2dSame, explanation_mode
from bcosification.nn.conv2d_same import pad_same

SHAPES = [((7, 8), (3, 3), (2, 2), (1, 1)), ((5, 6), (4, 2), (1, 3), (2, 1)), ((3, 3), (1, 1), (2, 2), (1, 1))]


@pytest.mark.parametrize("size, kernel, stride, dilation", SHAPES)
def test_padding_is_timms(size, kernel, stride, dilation):
    x = torch.randn(2, 3, *size)
    assert torch.equal(pad_same(x, kernel, stride, dilation), timms(x, kernel, stride, dilation))


@pytest.mark.parametrize("size, kernel, stride, dilation", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_convolution_of_the_padded_image(size, kernel, stride, dilation, bias):
    layer = BcosConv2dSame(4, 6, kernel, stride, dilation=dilation, groups=2, bias=bias).double()
    plain = BcosConv2d(4, 6, kernel, stride, dilation=dilation, groups=2, bias=bias).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    y = layer(x)
    assert y.shape[2:] == tuple(-(-s // step) for s, step in zip(size, stride, strict=True))
    torch.testing.assert_close(y, plain(timms(x, kernel, stride, dilation)))


@pytest.mark.parametrize("padding", [(1, 1), "same"])
@pytest.mark.parametrize("b, normalize_weight", [(1, False), (2, False), (1.5, True)])
def test_mixed_weights_are_each_images_own(padding, b, normalize_weight):
    layer = BcosCondConv2d(
        4, 6, (3, 3), (2, 2), padding, groups=2, num_experts=3, b=b, normalize_weight=normalize_weight
    ).double()
    x, routing = torch.randn(2, 4, 6, 7, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    experts = layer.weight.view(3, 6, 2, 3, 3)
    expected = []
    for image, shares in zip(x.split(1), routing, strict=True):
        kind = BcosConv2dSame if padding == "same" else BcosConv2d
        own = kind(4, 6, 3, 2, 0 if padding == "same" else 1, groups=2, b=b, normalize_weight=normalize_weight)
        own = own.double()
        own.weight.data = torch.einsum("e,eoikl->oikl", shares, experts).detach()
        expected.append(own(image))
    torch.testing.assert_close(layer(x, routing), torch.cat(expected))
    with explanation_mode(layer):
        torch.testing.assert_close(layer(x, routing), torch.cat(expected))


def test_at_b_1_it_is_timms():
    theirs = CondConv2d(4, 6, 3, stride=2, padding="same", num_experts=3).double()
    layer = BcosCondConv2d(4, 6, (3, 3), (2, 2), "same", num_experts=3, b=1).double()
    layer.load_state_dict(theirs.state_dict())
    x, routing = torch.randn(3, 4, 6, 7, dtype=torch.float64), torch.rand(3, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(x, routing), theirs(x, routing))


def test_explained_mixed_weights_are_linear_in_the_image():
    layer = BcosCondConv2d(4, 6, (3, 3), num_experts=2).double()
    x, routing = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True), torch.rand(2, 2).double()
    with explanation_mode(layer):
        y = layer(x, routing)
    grad = torch.randn_like(y)
    (weights,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close((weights * x).sum((1, 2, 3)), (y * grad).sum((1, 2, 3)))
    mixed = torch.einsum("ne,eo->no", routing, layer.weight.detach()).view(2, 6, 4, 3, 3)
    expected = []
    for image, weight, g in zip(x.split(1), mixed, grad.split(1), strict=True):
        a = F.conv2d(image.detach(), weight)
        n = (F.conv2d(image.detach().square(), torch.ones(1, 4, 3, 3).double()) + 1e-6).sqrt()
        expected.append(F.conv_transpose2d(g * a.abs() / n, weight))
    torch.testing.assert_close(weights, torch.cat(expected))
