"""RMSNorm against torch's, and against its formula with the scale held."""

import pytest
import torch
from torch import nn

from bcosification.nn import RMSNorm, RMSNorm2d, explanation_mode


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("affine", [True, False])
def test_equals_torchs(eps, affine):
    layer, theirs = RMSNorm((3, 6), eps, affine).double(), nn.RMSNorm((3, 6), eps, affine).double()
    if affine:
        nn.init.normal_(layer.weight)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), theirs(x))
    with explanation_mode(layer):
        torch.testing.assert_close(layer(x), theirs(x))


def test_of_channels_equals_that_of_the_last_dimension():
    layer, last = RMSNorm2d(6, 1e-4).double(), RMSNorm(6, 1e-4).double()
    nn.init.normal_(layer.weight)
    last.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"RMSNorm2d: expected x of shape \(N, C, H, W\), got \(2, 6\)"):
        layer(x[..., 0, 0])


def test_the_scale_is_a_constant_of_explanations():
    layer = RMSNorm(2, eps=0.0).double()
    layer.weight.data = torch.tensor([2.0, 5.0]).double()
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)  # root mean square √12.5
    with explanation_mode(layer):
        y = layer(x)
    jacobian = torch.stack([torch.autograd.grad(y[0, i], x, retain_graph=True)[0][0] for i in range(2)])
    torch.testing.assert_close(jacobian, torch.diag(layer.weight.detach()) / 12.5**0.5)
    torch.testing.assert_close((jacobian @ x[0]).detach(), y[0].detach())


def test_half_precision_takes_its_mean_in_float32():
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # whose squares float16 does not hold
    layer = RMSNorm(4096, device="cpu", dtype=torch.float16)
    with explanation_mode(layer):
        torch.testing.assert_close(layer(x), torch.ones_like(x), rtol=2e-3, atol=0)
