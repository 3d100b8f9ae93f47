"""GELU against torch's, and its constant gate."""

import pytest
import torch
import torch.nn.functional as F

from bcosification.nn import GELU


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_value_and_gradient(approximate):
    module = GELU(approximate)
    x = torch.linspace(-4, 4, 101, dtype=torch.float64, requires_grad=True)
    expected = F.gelu(x, approximate=approximate)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    (plain,) = torch.autograd.grad(module(x).sum(), x)
    assert torch.equal(plain, slope)
    module.set_explanation_mode()
    y = module(x)
    (frozen,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-15)
    positive = x.detach() != 0
    assert torch.allclose(frozen[positive], (expected / x)[positive], rtol=1e-12, atol=1e-15)
    assert not torch.allclose(frozen, slope)


def test_bad_argument():
    with pytest.raises(ValueError, match="'none' or 'tanh', got 'erf'"):
        GELU("erf")
