"""Derivatives of conv2d_batch_norm: of second order, under torch.func, and only those that are asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

import bcos_kernels
from bcos_kernels import reference
from tests.bcos_kernels import harness
from tests.bcos_kernels.conv2d_batch_norm_cases import (
    BOTH,
    MODES,
    SMALL,
    Case,
    Mode,
    apply,
    assert_same,
    define,
    gradient_of_output,
    inputs_of,
    leaves_of,
    running_var_of,
    separately,
    window,
)
from tests.bcos_kernels.tolerances import assert_close_to_reference

SMALL_CASES = [
    replace(SMALL, name="channels_last, conv bias", bias=True, normalize=False),
    replace(SMALL, name="channels_last, groups, stride", window=window(groups=2, stride=(1, 2), padding=(0, 1))),
    replace(SMALL, name="contiguous, max_out", layout="contiguous", max_out=2),
    replace(SMALL, name="b tensor", b=1.7, b_tensor=True),
]


def small(case: Case, mode: Mode) -> tuple[dict[str, Tensor], object]:
    """Leaves by name, and z as a function of them, contiguous ones brought to the layout of the case."""
    inputs = inputs_of(case, torch.float64)
    if case.max_out > 1:  # no ties
        inputs["x"], inputs["weight"] = (harness.randn(tuple(inputs[k].shape), i, torch.float64)
                                         for i, k in enumerate(("x", "weight"), 11))  # fmt: skip
    leaves = {
        name: t.contiguous().requires_grad_() for name, t in leaves_of(inputs, mode).items() if t is not None
    }  # fmt: skip

    running_var = None if mode.training else running_var_of(case, torch.float64)

    def function(module, *tensors):
        values = dict.fromkeys(inputs) | dict(zip(leaves, tensors, strict=True))
        if case.layout == "channels_last":  # also inside vmap
            values["x"] = values["x"].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        if module is bcos_kernels:
            return apply(case, values, mode, running_var)
        return separately(module, case, values, mode, running_var, mode.relu)[1]

    return leaves, function


@pytest.mark.parametrize("training", [True, False], ids=["batch", "eval"])
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_gradcheck(case, training):
    leaves, function = small(case, Mode(training, relu=True, residual=True))

    def mine(*tensors):
        return function(bcos_kernels, *tensors)

    assert torch.autograd.gradcheck(mine, tuple(leaves.values()), atol=1e-6)
    assert torch.autograd.gradgradcheck(mine, tuple(leaves.values()), atol=1e-5)


@pytest.mark.parametrize("mode", [m for m in MODES if m.relu], ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_second_derivatives_are_the_definition_s(case, mode):
    """In training, and with scale and variance constant at every order: ∂W(x)/∂w among them."""
    leaves, function = small(case, mode)
    got, expected = (
        harness.second_derivatives(lambda *tensors, m=module: function(m, *tensors), list(leaves.values()))
        for module in (bcos_kernels, reference)
    )
    for order in (0, 1):
        for mine, theirs in zip(got[order], expected[order], strict=True):
            assert_same(mine, theirs, 1e-10, f"order {order + 1}")


@pytest.mark.parametrize("training", [True, False], ids=["batch", "eval"])
def test_gradcheck_fails_when_explaining(training):
    """Scale and variance are constants, so that the gradient is not the derivative, nor is the second one."""
    leaves, function = small(SMALL, Mode(training, relu=False, detach=True))
    x, *others = leaves.values()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        with pytest.raises(GradcheckError, match="Jacobian mismatch"):
            check(lambda x, weight: function(bcos_kernels, x, weight, *others[1:]), (x, others[0]))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_transforms(mode):
    """jacrev, vmap, and vmap of a gradient, with parameters per sample."""
    leaves, function = small(SMALL, mode)
    tensors = [t.detach() for t in leaves.values()]
    for place in (0, 1):
        got = torch.func.jacrev(lambda *t: function(bcos_kernels, *t), place)(*tensors)
        expected = torch.autograd.functional.jacobian(lambda *t: function(reference, *t), tuple(tensors))[place]
        assert_same(got, expected, 1e-10, f"jacobian {place}")
    samples = [torch.stack([t, 1.5 * t, t.flip(0)]) for t in tensors]

    def of_weight(module, *tensors):
        return torch.func.grad(lambda w, x, *rest: function(module, x, w, *rest).square().sum())(
            tensors[1], tensors[0], *tensors[2:]
        )

    for derived in (function, of_weight):
        got = torch.func.vmap(lambda *t, d=derived: d(bcos_kernels, *t))(*samples)
        expected = torch.stack([derived(reference, *sample) for sample in zip(*samples, strict=True)])
        assert_same(got, expected, 1e-10)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_only_the_gradients_that_are_asked_for_are_computed(layout, mode, monkeypatch):
    """Each alone has the numbers that it has among all; that of the parameters in eval mode when explaining, where y
    is not what is kept, too."""
    launch, needs = bcos_kernels.cpu.conv2d_batch_norm_backward, []
    monkeypatch.setattr(
        bcos_kernels.cpu, BOTH[1], lambda *arguments: needs.append(arguments[-7:]) or launch(*arguments)
    )
    case = Case("", shape=(2, 4, 6, 5), bias=True, layout=layout)
    inputs, dz = inputs_of(case, torch.float32), gradient_of_output(case, torch.float32)
    leaves = {name: t for name, t in leaves_of(inputs, mode).items() if t is not None}
    order = ("x", "weight", "bias", "b", "norm_weight", "norm_bias", "residual")

    def gradients(*targets):
        # by an op of torch's each: the edges do not lead to the leaves themselves
        values = dict.fromkeys(order) | {name: t * 1 for name, t in leaves.items()}
        z = apply(case, values, mode, running_var_of(case, torch.float32))
        needs.clear()
        found = torch.autograd.grad(z, [leaves[name] for name in targets], dz)
        # without a ReLU the residual's gradient is z's, and nothing is asked of the op
        asked = tuple(name in targets and (name != "residual" or mode.relu) for name in order)
        assert needs == [asked]
        return found

    every = dict(zip(leaves, gradients(*leaves), strict=True))
    z = apply(case, dict.fromkeys(order) | leaves, mode, running_var_of(case, torch.float32)).detach()
    oracle = define(case, inputs, mode, dz, z, torch.float64)
    for name in leaves:
        (alone,) = gradients(name)
        assert_same(alone, every[name], 1e-6, name)
        assert_close_to_reference(name, alone, None, oracle[f"d{name}"], torch.float32, oracle.get(f"terms of d{name}"))
