"""Derivatives of the ops, of first, second and third order, and only those that are asked for."""

from __future__ import annotations

import pytest
import torch

import bcos_kernels
from bcos_kernels import reference
from tests.bcos_kernels import harness
from tests.bcos_kernels.op_cases import FUNCTIONS, assert_same, leaf, randn, tensors_of


@pytest.mark.parametrize("options", ["plain", "normalized", "max_out"])
@pytest.mark.parametrize("b", [1.0, 2.0, 1.5, "tensor"])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_gradcheck(op, b, options):
    max_out = 2 if options == "max_out" else 1
    tensors = tensors_of(op, max_out)
    if b == "tensor":
        tensors.append(torch.tensor(1.7, dtype=torch.float64, requires_grad=True))

    def function(x, weight, bias, exponent=b):
        return FUNCTIONS[op](
            bcos_kernels, x, weight, bias, b=exponent, normalize_weight=options != "plain", max_out=max_out
        )

    assert torch.autograd.gradcheck(function, tensors, atol=1e-6)
    assert torch.autograd.gradgradcheck(function, tensors, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "batch"])
def test_gradcheck_batch_norm(training, activation):
    x = leaf(3, 2, 2, 1, seed=1, dtype=torch.float64)
    parameters = leaf(2, seed=2, dtype=torch.float64), leaf(2, seed=3, dtype=torch.float64)
    residual = leaf(3, 2, 2, 1, seed=4, dtype=torch.float64)

    def function(x, weight, bias, residual):
        return bcos_kernels.batch_norm_uncentered(
            x, torch.tensor([0.5, 2.0], dtype=torch.float64), weight, bias, training=training, activation=activation,
            residual=residual,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (x, *parameters, residual))
    assert torch.autograd.gradgradcheck(function, (x, *parameters, residual))


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize("options", ["plain", "normalized", "max_out"])
@pytest.mark.parametrize("b", [1.0, 2.0, 1.5, "tensor"])
@pytest.mark.parametrize("detach", [False, True], ids=["training", "explaining"])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_second_derivatives_are_the_definition_s(op, detach, b, options, dtype):
    """Elementwise, in training and with the scale a constant at every order."""
    max_out, dtype = 2 if options == "max_out" else 1, harness.DTYPES[dtype]
    tensors = tensors_of(op, max_out, dtype)
    if b == "tensor":
        tensors.append(torch.tensor(1.7, dtype=dtype, requires_grad=True))

    def function(module):
        return lambda x, weight, bias, exponent=b: FUNCTIONS[op](
            module, x, weight, bias, b=exponent, normalize_weight=options == "normalized", max_out=max_out,
            detach=detach,
        )  # fmt: skip

    got = harness.second_derivatives(function(bcos_kernels), tensors)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    # the same directions, rounded to the dtype under test
    expected = harness.second_derivatives(function(reference), exact)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    for order in (0, 1):
        for mine, theirs in zip(got[order], expected[order], strict=True):
            scale = max(theirs.abs().max().item(), 1e-3)
            assert torch.allclose(mine.double(), theirs, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_third_derivatives(op):
    """The backward's backward is itself differentiable."""
    tensors = tensors_of(op)

    def third(module):
        y = FUNCTIONS[op](module, *tensors, normalize_weight=True)
        (first,) = torch.autograd.grad(y.square().sum(), tensors[0], create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), tensors[0], create_graph=True)
        return torch.autograd.grad(second.square().sum(), tensors)

    assert_same(third(bcos_kernels), third(reference), 1e-10)


@pytest.mark.parametrize("detach", [False, True], ids=["training", "explaining"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "batch"])
def test_second_derivatives_of_batch_norm(training, detach):
    tensors = [
        leaf(3, 2, 2, 2, seed=1, dtype=torch.float64),
        leaf(2, seed=2, dtype=torch.float64),
        leaf(2, seed=3, dtype=torch.float64),
        leaf(3, 2, 2, 2, seed=4, dtype=torch.float64),
    ]

    def function(module):
        return lambda x, weight, bias, residual: module.batch_norm_uncentered(
            x, torch.tensor([0.5, 2.0], dtype=torch.float64), weight, bias, training=training, activation="relu",
            residual=residual, detach=detach,
        )  # fmt: skip

    got, expected = (harness.second_derivatives(function(m), tensors) for m in (bcos_kernels, reference))
    for order in (0, 1):
        assert_same(got[order], expected[order], 1e-10)


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("b", [1.0, 2.0, 1.5])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_second_derivatives_at_zero_patches_are_finite(op, b, dtype):
    dtype = harness.DTYPES[dtype]
    x, weight, _ = tensors_of(op, dtype=dtype)
    x = torch.zeros_like(x, requires_grad=True)
    y = FUNCTIONS[op](bcos_kernels, x, weight, None, b=b, normalize_weight=True)
    first = torch.autograd.grad(y.sum(), (x, weight), create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), (x, weight), allow_unused=True)
    assert not y.any() and all(torch.isfinite(g).all() for g in (*first, *second) if g is not None)


def test_nothing_flows_to_a_learnable_b_when_explaining():
    """Also where it is all that requires a gradient: y is then a constant, on every backend."""
    x, weight = randn(5, 6, seed=1), randn(4, 6, seed=2)
    b = torch.tensor(1.5, requires_grad=True)
    for backend in ("reference", "cpu"):
        with bcos_kernels.backend(backend):
            y = bcos_kernels.linear(x, weight, b=b, detach=True)
            image = bcos_kernels.conv2d(randn(1, 2, 4, 4), randn(3, 2, 3, 3), b=b, detach=True)
        assert not y.requires_grad and not image.requires_grad
        assert_same(y, reference.linear(x, weight, b=1.5))


@pytest.mark.filterwarnings("error")
def test_a_learnable_b_is_used_without_warnings():
    b = torch.tensor(1.5, requires_grad=True)
    for detach in (False, True):
        y = bcos_kernels.linear(leaf(5, 6, seed=1), randn(4, 6, seed=2), b=b, detach=detach)
        y.sum().backward()


# Only what is asked for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["x", "weight", "both"])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_only_the_gradients_that_are_asked_for_are_computed(op, asked, monkeypatch):
    """The gradient with respect to the images alone computes no weight gradients, whatever requires one."""
    x, weight, bias = tensors_of(op)
    expected = dict(zip("x weight bias".split(), torch.autograd.grad(
        FUNCTIONS[op](bcos_kernels, x, weight, bias).square().sum(), (x, weight, bias)), strict=True))  # fmt: skip
    launch, needs = getattr(bcos_kernels.cpu, f"{op}_backward"), []
    monkeypatch.setattr(
        bcos_kernels.cpu, f"{op}_backward", lambda *arguments: needs.append(arguments[-4:]) or launch(*arguments)
    )
    targets = {"x": (x,), "weight": (weight,), "both": (x, weight)}[asked]
    # x and weight through an op of torch's each: the edge does not lead to the leaf itself
    y = FUNCTIONS[op](bcos_kernels, x * 1, weight * 1, bias)
    got = torch.autograd.grad(y.square().sum(), targets)
    assert needs == [(asked != "weight", asked != "x", False, False)]
    for name, g in zip(("x", "weight") if asked == "both" else (asked,), got, strict=True):
        torch.testing.assert_close(g, expected[name])
    needs.clear()
    FUNCTIONS[op](bcos_kernels, x, weight, bias).sum().backward(inputs=list(targets))
    assert needs == [(asked != "weight", asked != "x", False, False)]
    assert bias.grad is None
    needs.clear()
    FUNCTIONS[op](bcos_kernels, x, weight, bias).sum().backward()
    assert needs == [(True, True, True, False)]
