"""GlobalResponseNorm against timm's, and its factors as constants."""

import pytest
import torch
from timm.layers.grn import GlobalResponseNorm as Theirs
from torch import nn

from bcosification.nn import GlobalResponseNorm, explanation_mode


def layers(channels_last):
    ours = GlobalResponseNorm(3, 1e-3, channels_last).double()
    theirs = Theirs(3, 1e-3, channels_last).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, torch.randn((2, 4, 5, 3) if channels_last else (2, 3, 4, 5), dtype=torch.float64)


@pytest.mark.parametrize("channels_last", [True, False])
def test_equals_timms(channels_last):
    ours, theirs, x = layers(channels_last)
    torch.testing.assert_close(ours(x), theirs(x))
    with explanation_mode(ours):
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("channels_last", [True, False])
def test_explained_it_is_linear_plus_its_bias(channels_last):
    ours, theirs, x = layers(channels_last)
    x.requires_grad_()
    gain = torch.ones(2, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(x.shape, dtype=torch.float64)
    ours.constant_gain = gain
    with explanation_mode(ours):
        weights, constant = torch.autograd.grad((ours(x) * grad).sum(), (x, gain))
    torch.testing.assert_close((weights * x).sum((1, 2, 3)) + constant, (theirs(x) * grad).sum((1, 2, 3)))
    bias = theirs.bias if channels_last else theirs.bias.view(-1, 1, 1)
    torch.testing.assert_close(constant, (grad * bias).sum((1, 2, 3)))
    torch.testing.assert_close(weights, grad * (theirs(x) - bias) / x)


def test_without_its_bias():
    ours, theirs, x = layers(True)
    ours.bias = None
    torch.testing.assert_close(ours(x), theirs(x) - theirs.bias)
