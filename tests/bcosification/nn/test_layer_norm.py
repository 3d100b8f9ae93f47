"""LayerNorm against torch's, the peer's, and the frozen affine map in explanation mode."""

import pytest
import torch
import torch.nn.functional as F
from bcos.modules import norms

from bcos_kernels import squares
from bcosification.nn import BcosLinear, LayerNorm


@pytest.mark.parametrize("explaining", [False, True], ids=["plain", "explaining"])
@pytest.mark.parametrize("shape", [(6,), (5, 6)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_against_the_peer(shape, bias, explaining):
    peer = norms.DetachableLayerNorm(shape, bias=bias).double()
    ours = LayerNorm(shape, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.uniform_(-1, 1)
    ours.load_state_dict(peer.state_dict())
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    direction = torch.randn_like(x)
    results = []
    for module in (ours, peer):
        module.set_explanation_mode(explaining)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append((y, *torch.autograd.grad(y, (leaf, *module.parameters()), direction)))
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def test_constant_gain_completes_the_affine_map():
    ours = LayerNorm(6, dtype=torch.float64)
    torch.nn.init.uniform_(ours.bias)
    ours.set_explanation_mode()
    gain = ours.constant_gain = torch.ones(2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    y = ours(x)
    assert torch.allclose(y, F.layer_norm(x, (6,), ours.weight, ours.bias), rtol=1e-10)
    y[..., 0].sum().backward()
    assert torch.allclose(gain.grad, 5 * ours.bias[0].expand(2))
    assert torch.allclose((x * x.grad).sum((1, 2)) + gain.grad, y[..., 0].sum(1), rtol=1e-10)


def test_half_precision_statistics_are_wide():
    ours, x = LayerNorm(64, dtype=torch.bfloat16), torch.randn(3, 64, dtype=torch.bfloat16)
    plain = ours(x)
    ours.set_explanation_mode()
    assert ours(x).dtype == torch.bfloat16
    assert torch.allclose(ours(x).float(), plain.float(), rtol=1e-2, atol=1e-2)


def test_a_linear_layer_behind_it_takes_its_norms():
    """Also behind what hands its input on; explaining or not."""
    ours, layer = LayerNorm(16), BcosLinear(16, 5)
    x = torch.randn(2, 7, 16)
    for between in (torch.nn.Identity(), torch.nn.Dropout(0.0), torch.nn.Dropout(0.5).eval()):
        for explaining in (False, True):
            ours.set_explanation_mode(explaining)
            y = between(ours(x))
            assert squares.squares_of(y, squares.FEATURES) is not None
            torch.testing.assert_close(layer(y), layer(y.clone()), rtol=1e-5, atol=1e-6)


def test_a_gain_in_half_precision_is_rounded_once():
    ours = LayerNorm(64, dtype=torch.bfloat16)
    torch.nn.init.uniform_(ours.bias)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    plain = ours(x)
    ours.constant_gain = torch.ones(3)
    assert torch.equal(ours(x), plain)
