"""The derivatives of the ops, however they are asked for: transforms of torch.func on the ops themselves, exported
programs, forward mode, and what explanation mode holds constant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.gradcheck import GradcheckError

import bcos_kernels
from bcos_kernels import reference
from tests.bcos_kernels import harness
from tests.bcos_kernels.tolerances import assert_close_to_reference

OPS = torch.ops.bcos_kernels
WINDOW = ((2, 1), (1, 0), (1, 2), 2)
RUNNING_VAR = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return harness.randn(shape, seed, dtype)


def leaf(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return randn(*shape, seed=seed, dtype=dtype).requires_grad_()


def assert_same(got: Tensor, expected: Tensor, bound: float = 1e-12) -> None:
    assert got.shape == expected.shape
    assert (got - expected).norm() <= bound * expected.norm(), (got - expected).norm() / expected.norm()


# name → (x, weight), the op, the public function of a module
def _linear(x, weight, detach):
    return OPS.linear(x, weight, None, None, 2.0, True, 1, False, detach)[0]


def _conv2d(x, weight, detach):
    return OPS.conv2d(x, weight, None, None, *WINDOW, 1.5, False, 2, False, detach)[0]


def _batch_norm(x, weight, detach):
    return OPS.batch_norm_uncentered(x, weight, None, x * 2, None, True, 1e-5, "relu", detach)[0]


def _conv2d_batch_norm(x, weight, detach):
    var = RUNNING_VAR[:2]
    options = (2.0, True, 1, False, 1e-5, "relu", False, detach, False)
    return OPS.conv2d_batch_norm(x, weight, None, None, var, None, None, var, None, *WINDOW, *options)[0]


def _layer_norm(x, weight, detach):
    return OPS.layer_norm(x, 1, weight, None, 1e-5, detach)[0]


CALLS = {
    "linear": (
        ((3, 4), (2, 4)), _linear,
        lambda module, x, w, detach: module.linear(x, w, normalize_weight=True, detach=detach),
    ),
    "conv2d": (
        ((1, 4, 3, 4), (4, 2, 2, 2)), _conv2d,
        lambda module, x, w, detach: module.conv2d(x, w, None, *WINDOW, b=1.5, max_out=2, detach=detach),
    ),
    "batch_norm_uncentered": (
        ((2, 3, 2, 1), (3,)), _batch_norm,
        lambda module, x, w, detach: module.batch_norm_uncentered(
            x, None, w, training=True, activation="relu", residual=x * 2, detach=detach
        ),
    ),
    "conv2d_batch_norm": (
        ((1, 4, 3, 4), (2, 2, 2, 2)), _conv2d_batch_norm,
        lambda module, x, w, detach: harness.conv2d_batch_norm(module)(
            x, w, None, *WINDOW, normalize_weight=True, norm_weight=RUNNING_VAR[:2], running_var=RUNNING_VAR[:2],
            training=False, activation="relu", detach=detach,
        ),
    ),
    "layer_norm": (
        ((2, 3, 4), (4,)), _layer_norm, lambda module, x, w, detach: module.layer_norm(x, 4, w, detach=detach),
    ),
}  # fmt: skip


def tensors_of(op: str) -> tuple[Tensor, Tensor]:
    return tuple(randn(*shape, seed=i + 1) for i, shape in enumerate(CALLS[op][0]))


# The ops themselves, as exported programs call them -------------------------------------------------------------------


@pytest.mark.parametrize("detach", [False, True], ids=["training", "explaining"])
@pytest.mark.parametrize("op", CALLS)
def test_transforms_of_ops(op, detach):
    """jacrev, jacrev of jacrev, vmap, and jacrev under vmap, of torch.ops.bcos_kernels.*: the definition's numbers."""
    x, weight = tensors_of(op)
    _, of_op, public = CALLS[op]
    jacrev = torch.func.jacrev

    def mine(*tensors):
        return of_op(*tensors, detach)

    def theirs(*tensors):
        return public(reference, *tensors, detach)

    jacobian = torch.autograd.functional.jacobian
    for place in (0, 1):
        assert_same(jacrev(mine, place)(x, weight), jacobian(theirs, (x, weight))[place])

    def of_weight(function):
        """∂²y/∂x∂w: in explanation mode ∂W(x)/∂w."""
        return jacrev(jacrev(function, 0), 1)(x, weight)

    assert_same(of_weight(mine), of_weight(theirs))
    samples = torch.stack([x, 1.5 * x, x.flip(0)])
    got = torch.func.vmap(mine, (0, None))(samples, weight)
    assert_same(got, torch.stack([theirs(s, weight) for s in samples]))
    got = torch.func.vmap(jacrev(mine), (0, None))(samples, weight)
    assert_same(got, torch.stack([jacobian(theirs, (s, weight))[0] for s in samples]))


class Layers(torch.nn.Module):
    """A convolution, a norm and a linear layer; b of the first learnable."""

    def __init__(self, detach: bool) -> None:
        super().__init__()
        shapes = ((4, 3, 3, 3), (4,), (5, 4))
        self.weights = torch.nn.ParameterList([randn(*shape, seed=i + 5) for i, shape in enumerate(shapes)])
        self.b = torch.nn.Parameter(torch.tensor(1.6, dtype=torch.float64))
        self.detach, self.module = detach, bcos_kernels

    def forward(self, x):
        kernel, scale, weight = self.weights
        y = self.module.conv2d(x, kernel, b=self.b, detach=self.detach)
        y = self.module.batch_norm_uncentered(y, None, scale, training=True, activation="relu", detach=self.detach)
        return self.module.linear(y.mean((2, 3)), weight, detach=self.detach)


@pytest.mark.parametrize("frozen", [False, True], ids=["parameters", "frozen"])
@pytest.mark.parametrize("detach", [False, True], ids=["training", "explaining"])
def test_exported_programs_are_differentiated_in_the_mode_they_were_made_in(detach, frozen):
    """First and second derivatives, and the Jacobian by torch.func."""
    layers = Layers(detach).requires_grad_(not frozen)
    example, x = randn(2, 3, 5, 5, seed=1), leaf(4, 3, 5, 5, seed=2)
    sizes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(layers, (example,), dynamic_shapes=sizes).module()
    definition = Layers(detach)
    definition.module = reference
    parameters = list(definition.weights)

    def derivatives(function, parameters):
        """∂y/∂x in one direction; and how it changes with x and the weights."""
        y = function(x)
        (first,) = torch.autograd.grad(y.square().sum() if not detach else y.sum(), x, create_graph=True)
        along = randn(*x.shape, seed=3)
        return y, first, *torch.autograd.grad((first * along).sum(), [x, *parameters], materialize_grads=True)

    expected = derivatives(definition, [] if frozen else parameters)
    got = derivatives(program, [] if frozen else [p for p in program.parameters() if p.dim()])
    for mine, theirs in zip(got, expected, strict=True):
        assert_same(mine, theirs, 1e-10)
    jacobian = torch.func.jacrev(program)(x.detach())
    assert_same(jacobian, torch.autograd.functional.jacobian(definition, x.detach()), 1e-10)
    if not frozen:
        (db,) = torch.autograd.grad(program(x).sum(), program.b, allow_unused=True)
        assert (db is None) == detach


# Explanation mode -----------------------------------------------------------------------------------------------------

SHAPES = {
    "linear": ((3, 4), (2, 4)), "conv2d": ((1, 4, 3, 4), (2, 2, 2, 2)), "batch_norm_uncentered": ((3, 2, 2), ()),
    "layer_norm": ((3, 5), ()),
}  # fmt: skip


def explaining(op: str, x: Tensor, weight: Tensor | None, b, module=bcos_kernels, detach: bool = True) -> Tensor:
    if op == "linear":
        return module.linear(x, weight, b=b, detach=detach)
    if op == "conv2d":
        return module.conv2d(x, weight, None, *WINDOW, b=b, detach=detach)
    if op == "layer_norm":
        return module.layer_norm(x, x.shape[-1], detach=detach)
    return module.batch_norm_uncentered(x, None, training=True, detach=detach)


@pytest.mark.parametrize(
    "op, b",
    [
        *((op, b) for op in ("linear", "conv2d") for b in (2.0, 1.5, "tensor")),
        ("batch_norm_uncentered", None),
        ("layer_norm", None),
    ],
)
def test_gradcheck_fails_when_explaining(op, b):
    """The scale is a constant, so the gradient is not the derivative; nor is the second one. At B = 1 both are."""
    x, weight = leaf(*SHAPES[op][0], seed=1), leaf(*SHAPES[op][1], seed=2)
    b = torch.tensor(1.7, dtype=torch.float64) if b == "tensor" else b
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: explaining(op, x, weight, b, detach=False), (x,), atol=1e-5)
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda x: explaining(op, x, weight, b), (x,))
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        torch.autograd.gradgradcheck(lambda x, w: explaining(op, x, w, b), (x, weight))
    if b is not None:
        assert torch.autograd.gradcheck(lambda x, w: explaining(op, x, w, 1.0), (x, weight))


# Further windows: the second-order check of the public function in training mode -------------------------------------

WINDOWS = {  # layout, x, weight, bias, options
    "depthwise": ("channels_last", (1, 3, 3, 3), (3, 1, 2, 2), None, dict(groups=3, normalize_weight=True)),
    "depthwise, two units a channel": (
        "contiguous", (1, 2, 3, 3), (4, 1, 3, 1), (4,), dict(groups=2, padding=(1, 0)),
    ),
    "groups, max_out": (
        "expanded", (2, 4, 1, 3), (8, 2, 1, 2), None, dict(groups=2, max_out=2, normalize_weight=True),
    ),
    "one pixel, strided": ("channels_last", (2, 3, 3, 3), (2, 3, 1, 1), None, dict(stride=2)),
    "dilated": ("strided", (1, 2, 4, 4), (2, 2, 2, 2), None, dict(dilation=(2, 3), padding=1)),
    "same": ("transposed", (1, 2, 3, 3), (2, 2, 2, 2), (2,), dict(padding="same")),
    "reflect": ("channels_last", (1, 2, 3, 3), (2, 2, 2, 2), None, dict(padding=1, padding_mode="reflect")),
    "no batch": ("transposed", (2, 3, 3), (2, 2, 2, 2), None, dict(stride=(1, 2))),
}  # fmt: skip


@pytest.mark.parametrize("b", [2.0, "tensor"])
@pytest.mark.parametrize("case", WINDOWS)
def test_gradcheck_of_convolutions(case, b):
    layout, shape, weight, bias, options = WINDOWS[case]
    tensors = [randn(*shape, seed=1), randn(*weight, seed=2)]
    tensors += [] if bias is None else [randn(*bias, seed=3)]
    tensors += [torch.tensor(1.7, dtype=torch.float64)] if b == "tensor" else []
    tensors = [t.requires_grad_() for t in tensors]

    def function(x, weight, *rest):
        exponent = rest[-1] if b == "tensor" else b
        return bcos_kernels.conv2d(harness.lay_out(x, layout), weight, rest[0] if bias else None, **options, b=exponent)

    assert torch.autograd.gradcheck(function, tensors, atol=1e-6)
    assert torch.autograd.gradgradcheck(function, tensors, atol=1e-5)


# Forward mode ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", CALLS)
def test_forward_mode_is_refused_by_name(op):
    """Not built; never may a tangent be lost in silence, parameters with gradients or without."""
    x, weight = tensors_of(op)
    _, of_op, public = CALLS[op]
    functions = {"public": lambda x: public(bcos_kernels, x, weight, False), "op": lambda x: of_op(x, weight, False)}
    message = f"^{op}: expected reverse-mode differentiation .*, got forward mode"
    for function in functions.values():
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jvp(function, (x,), (x,))
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jacfwd(function)(x)
        with pytest.raises(NotImplementedError, match=f"^{op}(_backward)?: expected reverse-mode"):
            torch.func.hessian(lambda x, f=function: f(x).sum())(x)
        with forward_ad.dual_level():
            with pytest.raises(NotImplementedError, match=message):
                function(forward_ad.make_dual(x, x))
            with pytest.raises(NotImplementedError, match=message):
                function(forward_ad.make_dual(x, x).requires_grad_())
            # what has no tangent is computed as ever
            assert_same(function(x), public(reference, x, weight, False))
    leaf = x.clone().requires_grad_()
    with forward_ad.dual_level():
        y = functions["public"](leaf)
        with pytest.raises(NotImplementedError, match=f"^{op}_backward: expected reverse-mode"):
            torch.autograd.grad(y, leaf, forward_ad.make_dual(y.detach(), y.detach()))


# Non-finite input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("b, max_out", [(1.0, 1), (2.0, 1), (1.5, 2)])
@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_is_not_finite_stays_where_it_is(value, b, max_out, backend, layout):
    """One such pixel: outputs that see it are not finite, all others are the definition's; so are the gradients.

    In float32: the library's own bfloat16 convolution carries a NaN into the window beside it on some processors.
    """
    dtype = torch.float32
    x, weight = randn(2, 3, 6, 6, seed=1, dtype=dtype), randn(4 * max_out, 3, 3, 3, seed=2, dtype=dtype)
    x[1, 2, 5, 5] = value
    x = harness.lay_out(x, layout).requires_grad_()
    weight.requires_grad_()
    with bcos_kernels.backend(backend):
        y = bcos_kernels.conv2d(x, weight, b=b, max_out=max_out)
        dx, dw = torch.autograd.grad(y.sum(), (x, weight))
    sees = torch.zeros(y.shape, dtype=torch.bool)
    sees[1, :, 3, 3] = True
    assert not torch.isfinite(y[sees]).any()
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = reference.conv2d(*exact, b=b, max_out=max_out)
    assert_close_to_reference("y", y[~sees], None, expected[~sees], dtype)
    # pixels outside the one window that sees it
    clean = torch.ones(x.shape, dtype=torch.bool)
    clean[1, :, 3:, 3:] = False
    (expected_dx,) = torch.autograd.grad(expected.sum(), exact[0])
    assert_close_to_reference("dx", dx[clean], None, expected_dx[clean], dtype)
    assert not torch.isfinite(dw).all()
