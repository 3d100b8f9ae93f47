"""QKVLinear against nn.Linear, what is constant in it, and attention made of it against nn.MultiheadAttention."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bcosification.nn import QKVLinear


def layer(**options):
    torch.manual_seed(0)
    return QKVLinear(4, 9, dtype=torch.float64, **options)


def test_value_and_gradients_are_the_linear_layers():
    module, x = layer(), torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 5, 9, dtype=torch.float64)
    expected = F.linear(x, module.weight, module.bias)
    got = module(x)
    assert torch.equal(got, expected) and isinstance(module, nn.Linear)
    inputs = [x, module.weight, module.bias]
    for one, other in zip(
        torch.autograd.grad((got * grad).sum(), inputs), torch.autograd.grad((expected * grad).sum(), inputs),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other)


def test_q_and_k_are_constants_when_explaining():
    module, x = layer(), torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    plain = module(x)
    module.set_explanation_mode()
    y = module(x)
    assert torch.equal(y, plain)
    grad = torch.randn(2, 5, 9, dtype=torch.float64)
    (got,) = torch.autograd.grad((y * grad).sum(), x)
    torch.testing.assert_close(got, grad[..., 6:] @ module.weight[6:])


def test_k_may_have_no_bias():
    module, x = layer(key_bias=False), torch.randn(2, 5, 4, dtype=torch.float64)
    bias = module.bias.detach().clone()
    bias[3:6] = 0
    torch.testing.assert_close(module(x), F.linear(x, module.weight, bias))
    module(x).sum().backward()
    assert module.bias.grad[3:6].tolist() == [0, 0, 0] and module.bias.grad[0] == 10


@pytest.mark.parametrize("windows", [1, 3])
def test_the_bias_of_v_is_a_constant_with_a_gain_per_sample(windows):
    module, x = layer(), torch.randn(2 * windows, 5, 4, dtype=torch.float64)
    module.set_explanation_mode()
    gain = torch.ones(2, dtype=torch.float64, requires_grad=True)
    plain = module(x)
    module.constant_gain = gain
    y = module(x)
    assert torch.equal(y, plain)
    grad = torch.randn(2 * windows, 5, 9, dtype=torch.float64)
    (got,) = torch.autograd.grad((y * grad).sum(), gain)
    expected = (grad[..., 6:] * module.bias[6:]).sum((1, 2)).view(2, windows).sum(1)
    torch.testing.assert_close(got, expected.detach())


def test_the_output_has_three_parts():
    with pytest.raises(ValueError, match="multiple of 3, got 8"):
        QKVLinear(4, 8)
