"""Gated activations and scaling gates against torch's and torchvision's, and what is constant in them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops.misc import SqueezeExcitation

from bcosification import nn as bnn
from bcosification.nn.modes import constant_modules, explanation_mode

ACTIVATIONS = {
    bnn.SiLU: F.silu,
    bnn.Hardswish: F.hardswish,
    bnn.Mish: F.mish,
    bnn.QuickGELU: lambda x: x * torch.sigmoid(1.702 * x),
    bnn.ReLU6: F.relu6,
    bnn.GELU: F.gelu,
}


def points(dtype=torch.float64):
    return torch.linspace(-8, 8, 129, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("kind", ACTIVATIONS, ids=lambda kind: kind.__name__)
def test_value_and_gradient(kind):
    module, x, plain = kind(), points(), ACTIVATIONS[kind]
    (slope,) = torch.autograd.grad(plain(x).sum(), x)
    (got,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(module(x), plain(x), rtol=0, atol=0)
    torch.testing.assert_close(got, slope, rtol=1e-14, atol=1e-16)
    module.set_explanation_mode()
    y = module(x)
    (frozen,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, plain(x), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(frozen * x, plain(x), rtol=1e-12, atol=1e-14)  # linear, and nothing added
    assert frozen.isfinite().all() and (frozen - slope).abs().max() > 0.05


def test_relu6_above_6_attributes_the_6_to_its_input():
    module, x = bnn.ReLU6(), torch.tensor([-2.0, 0.0, 3.0, 6.0, 12.0, torch.inf], requires_grad=True)
    module.set_explanation_mode()
    (slope,) = torch.autograd.grad(module(x).sum(), x)
    assert slope.tolist() == [0.0, 0.0, 1.0, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("kind", [kind for kind in ACTIVATIONS if kind is not bnn.GELU], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("explain", [False, True])
def test_in_place(kind, explain):
    x, expected = points(), kind()(points())
    module = kind(inplace=True)
    module.set_explanation_mode(explain)
    read = x * 1
    y = module(read)
    assert y.data_ptr() == read.data_ptr()
    torch.testing.assert_close(read, expected, rtol=1e-12, atol=1e-14)
    (slope,) = torch.autograd.grad(y.sum(), x)
    other = kind()
    other.set_explanation_mode(explain)
    torch.testing.assert_close(slope, torch.autograd.grad(other(x).sum(), x)[0])


@pytest.mark.parametrize("kind", ACTIVATIONS, ids=lambda kind: kind.__name__)
def test_half_precision_gates_are_computed_in_float32(kind):
    x, module = points(torch.bfloat16), kind()
    module.set_explanation_mode()
    y = module(x)
    assert y.dtype == torch.bfloat16
    wide = x.detach().double()
    exact = ACTIVATIONS[kind](wide)
    # two roundings to 8 bits, and the gate's own in float32, of numbers up to 1 that may cancel to a small gate
    assert ((y - exact).abs() <= 2**-7 * exact.abs() + 2**-22 * wide.abs()).all()


def test_squeeze_excitation_is_torchvisions():
    torch.manual_seed(0)
    theirs = SqueezeExcitation(8, 3, nn.SiLU, nn.Hardsigmoid).double()
    ours = bnn.SqueezeExcitation(8, 3, nn.SiLU, nn.Hardsigmoid).double()
    assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    grad = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    expected = torch.autograd.grad((theirs(x) * grad).sum(), [x, theirs.fc1.weight])
    got = torch.autograd.grad((ours(x) * grad).sum(), [x, ours.fc1.weight])
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)
    with explanation_mode(ours):
        y = ours(x)
        torch.testing.assert_close(y, theirs(x), rtol=0, atol=0)
        (frozen,) = torch.autograd.grad((y * grad).sum(), x)
    torch.testing.assert_close(frozen, grad * theirs._scale(x).detach(), rtol=1e-13, atol=1e-15)
    assert (frozen - expected[0]).abs().max() > 1e-3


def test_what_is_inside_a_scaling_gate_is_constant():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), bnn.SqueezeExcitation(8, 2), nn.Sequential(nn.Conv2d(8, 4, 1)))
    assert constant_modules(model) == set(model[1].children())
    assert constant_modules(copy.deepcopy(model[2])) == set()


def test_a_gate_or_scale_has_to_be_defined():
    with pytest.raises(NotImplementedError, match="GatedActivation: .* gate"):
        bnn.GatedActivation()(torch.ones(1))
    with pytest.raises(NotImplementedError, match="ScalingGate: .* scale"):
        bnn.ScalingGate()(torch.ones(1))
