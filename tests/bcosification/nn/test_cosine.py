"""L2Norm and PositionMean: values, gradients in both modes, errors."""

import math

import pytest
import torch
import torch.nn.functional as F

from bcosification import nn as bnn
from bcosification.nn import explanation_mode


def test_the_norm_is_torchs_and_a_constant_when_explaining():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    norm = bnn.L2Norm()
    torch.testing.assert_close(norm(x), F.normalize(x, dim=-1), rtol=1e-14, atol=0)
    assert norm(x)[0].tolist() == pytest.approx([0.6, 0.8])
    (trained,) = torch.autograd.grad(norm(x)[0] @ torch.tensor([1.0, 0.0], dtype=torch.float64), x)
    assert trained[0].tolist() == pytest.approx([(25 - 9) / 125, -12 / 125])  # (|x|^2 - x_0^2, -x_0 x_1) / |x|^3
    with explanation_mode(norm):
        (explained,) = torch.autograd.grad(norm(x)[0] @ torch.tensor([1.0, 0.0], dtype=torch.float64), x)
    assert explained[0].tolist() == pytest.approx([0.2, 0.0])


def test_the_norm_of_large_half_precision_values_does_not_overflow():
    y = bnn.L2Norm()(torch.full((2, 64), 3e4, dtype=torch.float16))
    assert y.dtype == torch.float16 and torch.allclose(y.float(), torch.full((2, 64), 1 / 8), rtol=1e-3)


@pytest.mark.parametrize("p", [1, 2, 2.5])
def test_the_mean_of_powers(p):
    cosines = torch.tensor([[[0.5, -0.2], [-1.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    mean = bnn.PositionMean(p)
    expected = [(0.5**p - 1) / 2, -(0.2**p) / 2]
    assert mean(cosines).tolist()[0] == pytest.approx(expected)
    (trained,) = torch.autograd.grad(mean(cosines).sum(), cosines)
    with explanation_mode(mean):
        (explained,) = torch.autograd.grad(mean(cosines).sum(), cosines)
    torch.testing.assert_close(explained, cosines.detach().abs() ** (p - 1) / 2)
    torch.testing.assert_close(trained, p * explained)


@pytest.mark.parametrize(
    "p, kind", [(0.5, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("2", TypeError)]
)
def test_other_powers_are_refused(p, kind):
    with pytest.raises(kind, match="PositionMean: expected p"):
        bnn.PositionMean(p)
