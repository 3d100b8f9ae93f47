"""BcosLinear against the peer's."""

import bcos.modules
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bcosification.nn import BcosLinear


@pytest.mark.parametrize("explaining", [False, True], ids=["training", "explaining"])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (8,)], ids=str)
@pytest.mark.parametrize("options", [dict(), dict(b=1), dict(b=1.25), dict(b=3), dict(max_out=2)], ids=str)
def test_against_the_peer(options, shape, explaining):
    peer = bcos.modules.BcosLinear(8, 6, **options).double()
    ours = BcosLinear(8, 6, dtype=torch.float64, **options)
    ours.load_state_dict(peer.state_dict())
    peer.set_explanation_mode(explaining)
    ours.set_explanation_mode(explaining)
    x = torch.randn(shape, dtype=torch.float64)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(mine), peer(theirs)
    direction = torch.randn_like(expected)
    dx, dw = torch.autograd.grad(y, (mine, ours.weight), direction)
    dx_peer, dw_peer = torch.autograd.grad(expected, (theirs, peer.linear.weight), direction)
    for name, a, b in (("y", y, expected), ("dx", dx, dx_peer), ("dw", dw, dw_peer)):
        assert (a - b).norm() <= 1e-11 * b.norm(), name


def test_b_cosification_form_has_no_weight_norm_and_may_have_a_bias():
    layer = BcosLinear(8, 6, bias=True, normalize_weight=False, dtype=torch.float64)
    x = torch.randn(5, 8, dtype=torch.float64)
    a = F.linear(x, layer.weight, layer.bias)
    assert torch.allclose(layer(x), a * a.abs() / x.norm(dim=1, keepdim=True), rtol=1e-11)
    assert "in_features=8, out_features=6, bias=True, b=2, normalize_weight=False" in repr(layer)


@pytest.mark.parametrize("bias", [False, True])
def test_initialised_as_torch_does(bias):
    torch.manual_seed(3)
    expected = nn.Linear(4, 6, bias=bias)
    torch.manual_seed(3)
    layer = BcosLinear(4, 6, bias=bias)
    assert torch.equal(layer.weight, expected.weight)
    assert layer.bias is None if not bias else torch.equal(layer.bias, expected.bias)
