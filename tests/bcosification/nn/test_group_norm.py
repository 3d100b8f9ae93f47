"""GroupNorm against torch's, the peer's, and the frozen affine map in explanation mode."""

import pytest
import torch
import torch.nn.functional as F
from bcos.modules import norms

from bcosification.nn import GroupNorm


@pytest.mark.parametrize("explaining", [False, True], ids=["plain", "explaining"])
@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not affine"])
def test_against_the_peer(groups, affine, explaining):
    peer = norms.DetachableGroupNorm2d(groups, 6, affine=affine).double()
    ours = GroupNorm(groups, 6, affine=affine, dtype=torch.float64)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.uniform_(-1, 1)
    ours.load_state_dict(peer.state_dict())
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    direction = torch.randn_like(x)
    results = []
    for module in (ours, peer):
        module.set_explanation_mode(explaining)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append((y, *torch.autograd.grad(y, (leaf, *module.parameters()), direction)))
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 3), (2, 6, 3, 4)], ids=str)
def test_constant_gain_completes_the_affine_map(shape):
    ours = GroupNorm(3, 6, dtype=torch.float64)
    torch.nn.init.uniform_(ours.bias)
    ours.set_explanation_mode()
    gain = ours.constant_gain = torch.ones(2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = ours(x)
    assert torch.allclose(y, F.group_norm(x, 3, ours.weight, ours.bias), rtol=1e-10)
    y[:, 0].sum().backward()
    places = y[0, 0].numel()
    assert torch.allclose(gain.grad, places * ours.bias[0].expand(2))
    completed = (x * x.grad).flatten(1).sum(1) + gain.grad
    assert torch.allclose(completed, y[:, 0].reshape(2, -1).sum(1), rtol=1e-10)
