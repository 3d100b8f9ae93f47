"""The ops as torch sees them: schemas and fakes, derivatives of first and second order, in-place neighbours, autocast,
torch.func, checkpointing, and what is kept between forward and backward."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bcos_kernels
from bcos_kernels import reference
from tests.bcos_kernels import harness
from tests.bcos_kernels.tolerances import assert_close_to_reference

OPS = torch.ops.bcos_kernels


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return harness.randn(shape, seed, dtype)


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(*shape, seed=seed, dtype=dtype).requires_grad_()


def assert_same(got, expected, bound: float = 1e-5) -> None:
    """Tensors, or tuples of them, equal to ``bound`` by norm."""
    if isinstance(got, Tensor):
        got, expected = (got,), (expected,)
    for i, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, i
        difference, norm = (mine - theirs).double().norm().item(), theirs.double().norm().item()
        assert difference <= bound * norm, f"{i}: error {difference / (norm or 1):.3g}"


# Schemas, fakes, registration -----------------------------------------------------------------------------------------

LINEAR_OPTIONS = {  # bias, b_tensor, b, normalize_weight, max_out, keep, detach
    "b 2": (False, False, 2.0, False, 1, True, False),
    "b 1, bias": (True, False, 1.0, False, 1, True, False),
    "b 1.5, normalized, bias": (True, False, 1.5, True, 1, True, False),
    "b tensor, max_out": (False, True, 0.0, True, 2, True, False),
    "explaining": (False, False, 2.0, True, 1, True, True),
    "nothing kept": (False, False, 1.5, False, 2, False, False),
}


@pytest.mark.parametrize(
    "dtype, grad",
    [("fp32", False), ("fp32", True), ("fp16", True), ("bf16", True), ("fp64", True)],
    ids=lambda value: {False: "constant", True: "leaf"}.get(value, value),
)
@pytest.mark.parametrize("options", LINEAR_OPTIONS)
def test_opcheck_linear(options, grad, dtype):
    bias, b_tensor, *rest = LINEAR_OPTIONS[options]
    dtype = harness.DTYPES[dtype]
    arguments = [
        randn(5, 6, seed=1, dtype=dtype).requires_grad_(grad),
        randn(4, 6, seed=2, dtype=dtype).requires_grad_(grad),
        randn(4, seed=3, dtype=dtype).requires_grad_(grad) if bias else None,
        torch.tensor(1.7, requires_grad=grad) if b_tensor else None,
        *rest,
    ]
    torch.library.opcheck(OPS.linear.default, arguments, **_tolerance(dtype))


def _tolerance(dtype: torch.dtype) -> dict:
    """Of comparisons with compiled code, which computes derivatives of low precision in another order."""
    coarse = {torch.float16: 5e-3, torch.bfloat16: 4e-2}
    return {"atol": coarse[dtype], "rtol": coarse[dtype]} if dtype in coarse else {}


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("grad", [False, True], ids=["constant", "leaf"])
@pytest.mark.parametrize("options", list(LINEAR_OPTIONS)[:4])
def test_opcheck_linear_backward(options, grad, detach):
    bias, b_tensor, b, normalize, max_out, *_ = LINEAR_OPTIONS[options]
    x, weight = randn(5, 6, seed=1), randn(4, 6, seed=2)
    bias = randn(4, seed=3) if bias else None
    exponent = torch.tensor(1.7) if b_tensor else None
    y, n, a, index = OPS.linear(x, weight, bias, exponent, b, normalize, max_out, True)
    dy = randn(*y.shape, seed=4).requires_grad_(grad)
    needs = [True, True, bias is not None, exponent is not None]
    torch.library.opcheck(
        OPS.linear_backward.default,
        (dy, x.requires_grad_(grad), weight.requires_grad_(grad), bias, exponent, y if b == 2 else None, n, a, index, b,
         normalize, max_out, detach, needs, ""),
    )  # fmt: skip


CONV2D_OPTIONS = {  # window, bias, b_tensor, b, normalize_weight, max_out, keep, detach, layout, dtype
    "b 2": (((1, 1), (1, 1), (1, 1), 1), False, False, 2.0, False, 1, True, False, "contiguous", "fp32"),
    "b 1, bias, channels_last": (
        ((2, 1), (0, 1), (1, 2), 1), True, False, 1.0, True, 1, True, False, "channels_last", "fp32",
    ),
    "b 1.5, groups": (((1, 1), (1, 1), (1, 1), 2), False, False, 1.5, True, 1, True, False, "contiguous", "fp32"),
    "b tensor, max_out, channels_last": (
        ((2, 2), (1, 0), (1, 1), 1), True, True, 0.0, False, 2, True, False, "channels_last", "fp32",
    ),
    "depthwise, channels_last, explaining": (
        ((1, 1), (1, 1), (1, 1), 4), False, False, 2.0, False, 1, True, True, "channels_last", "fp32",
    ),
    "groups, max_out, bias, bf16": (
        ((1, 1), (1, 1), (2, 1), 2), True, False, 2.0, True, 2, True, False, "channels_last", "bf16",
    ),
    "b tensor, fp64, explaining": (
        ((1, 2), (1, 1), (1, 1), 1), False, True, 0.0, True, 1, True, True, "offset", "fp64",
    ),
    "nothing kept": (((1, 1), (1, 1), (1, 1), 1), False, False, 1.5, False, 2, False, False, "strided", "fp32"),
}  # fmt: skip


def _conv2d_tensors(options: str, grad: bool):
    window, bias, b_tensor, *rest, layout, dtype = CONV2D_OPTIONS[options]
    dtype = harness.DTYPES[dtype]
    x = harness.lay_out(randn(2, 4, 6, 5, seed=1, dtype=dtype), layout).requires_grad_(grad)
    weight = randn(4, 4 // window[3], 3, 2, seed=2, dtype=dtype).requires_grad_(grad)
    bias = randn(4, seed=3, dtype=dtype).requires_grad_(grad) if bias else None
    return window, (x, weight, bias, torch.tensor(1.7, requires_grad=grad) if b_tensor else None), rest


@pytest.mark.parametrize("grad", [False, True], ids=["constant", "leaf"])
@pytest.mark.parametrize("options", CONV2D_OPTIONS)
def test_opcheck_conv2d(options, grad):
    window, tensors, rest = _conv2d_tensors(options, grad)
    torch.library.opcheck(OPS.conv2d.default, (*tensors, *window, *rest), **_tolerance(tensors[0].dtype))


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("grad", [False, True], ids=["constant", "leaf"])
@pytest.mark.parametrize("options", list(CONV2D_OPTIONS)[:-1])
def test_opcheck_conv2d_backward(options, grad, detach):
    window, tensors, (b, normalize, max_out, *_) = _conv2d_tensors(options, False)
    y, n, a, index = OPS.conv2d(*tensors, *window, b, normalize, max_out, True)
    dy = randn(*y.shape, seed=4, dtype=y.dtype).requires_grad_(grad)
    x, weight, bias, exponent = tensors
    needs = [True, True, bias is not None, exponent is not None]
    held = (y if b == 2 else None, n, a, index)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not grad or harness.convolutions_have_second_derivatives_of_symbolic_sizes():
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(
        OPS.conv2d_backward.default,
        (dy, x.requires_grad_(grad), weight, bias, exponent, *held, *window, b, normalize, max_out, detach, needs, ""),
        test_utils=checks,
        **_tolerance(x.dtype),
    )


BATCH_NORM_OPTIONS = {  # weight, bias, residual, training, activation, layout, shape, dtype
    "training": (True, False, False, True, None, "contiguous", (3, 4, 2, 3), "fp32"),
    "training, relu, residual": (True, True, True, True, "relu", "channels_last", (3, 4, 2, 3), "fp32"),
    "training, rows, bf16": (True, False, True, True, "relu", "contiguous", (5, 4), "bf16"),
    "training, no parameters, fp64": (False, False, False, True, "relu", "offset", (3, 4, 5), "fp64"),
    "eval": (False, False, False, False, None, "contiguous", (3, 4, 2, 3), "fp32"),
    "eval, relu, residual": (True, True, True, False, "relu", "strided", (3, 4, 2, 3), "fp32"),
    "eval, bias, fp16": (False, True, False, False, None, "channels_last", (3, 4, 2, 3), "fp16"),
}


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("grad", [False, True], ids=["constant", "leaf"])
@pytest.mark.parametrize("options", BATCH_NORM_OPTIONS)
def test_opcheck_batch_norm_uncentered(options, grad, detach):
    weight, bias, residual, training, activation, layout, shape, dtype = BATCH_NORM_OPTIONS[options]
    dtype = harness.DTYPES[dtype]
    x = harness.lay_out(randn(*shape, seed=1, dtype=dtype), layout).requires_grad_(grad)
    arguments = (
        x,
        randn(4, seed=2).requires_grad_(grad) if weight else None,
        randn(4, seed=3).requires_grad_(grad) if bias else None,
        randn(*shape, seed=4, dtype=dtype).requires_grad_(grad) if residual else None,
        None if training else randn(4, seed=5).square() + 0.5,
        training,
        1e-5,
        activation,
        detach,
    )
    torch.library.opcheck(OPS.batch_norm_uncentered.default, arguments, **_tolerance(dtype))


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("options", BATCH_NORM_OPTIONS)
def test_opcheck_batch_norm_uncentered_backward(options, detach):
    weight, bias, residual, training, activation, layout, shape, dtype = BATCH_NORM_OPTIONS[options]
    dtype = harness.DTYPES[dtype]
    x = harness.lay_out(randn(*shape, seed=1, dtype=dtype), layout)
    weight, bias = randn(4, seed=2) if weight else None, randn(4, seed=3) if bias else None
    running_var = None if training else randn(4, seed=5).square() + 0.5
    y, mean, var, _ = OPS.batch_norm_uncentered(x, weight, bias, None, running_var, training, 1e-5, activation)
    needs = [True, weight is not None, bias is not None, residual and activation is not None]
    torch.library.opcheck(
        OPS.batch_norm_uncentered_backward.default,
        (leaf(*shape, seed=4, dtype=dtype), x.requires_grad_(), y if activation else None, weight, bias, mean, var,
         training, 1e-5, activation, detach, needs, ""),
        **_tolerance(dtype),
    )  # fmt: skip


def open_strides(t: Tensor) -> Tensor:
    """t with other strides where the size is 1, as permutations leave them."""
    if not t.numel():
        return t
    return t.as_strided(t.shape, [7 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)])


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda t: (
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.t().contiguous().t()
    ),
    "open": open_strides,
}


def assert_announced(op, arguments) -> tuple[Tensor, ...]:
    """The fake's shapes, strides and dtypes are those of the results; compiled code relies on them."""
    results = op(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
    for i, (real, fake) in enumerate(zip(results, fakes, strict=True)):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype), i
    return results


@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows, columns, units", [(0, 6, 4), (1, 6, 1), (5, 1, 4), (5, 6, 1), (1, 1, 1), (5, 6, 4)])
def test_strides_that_fakes_of_linear_announce(rows, columns, units, layout, backend):
    with bcos_kernels.backend(backend):
        for b, max_out in ((1.0, 1), (2.0, 2), (1.5, 1), (1.5, 2)):
            x, weight = (LAYOUTS[layout](randn(*shape)) for shape in ((rows, columns), (units * max_out, columns)))
            _, n, a, index = assert_announced(OPS.linear, (x, weight, None, None, b, True, max_out, True))
            dy = LAYOUTS[layout](randn(rows, units))
            held = (None, n, a, index, b, True, max_out, False, [True, True, False, False], "")
            assert_announced(OPS.linear_backward, (dy, x, weight, None, None, *held))


@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize(
    "layout, weight_layout", [*((k, k) for k in LAYOUTS), ("contiguous", "channels_last"), ("open", "contiguous")]
)
@pytest.mark.parametrize(
    "shape, units, kernel",
    [
        ((2, 1, 4, 5), 1, (3, 2)),
        ((1, 3, 1, 1), 4, (1, 1)),
        ((2, 3, 1, 4), 1, (1, 3)),
        ((0, 3, 4, 4), 2, (3, 3)),
        ((2, 3, 4, 4), 2, (3, 1)),
    ],
)
def test_strides_that_fakes_of_conv2d_announce(shape, units, kernel, layout, weight_layout, backend):
    window = ((1, 1), (0, 0), (1, 1), 1)
    with bcos_kernels.backend(backend):
        for b, max_out in ((1.0, 1), (2.0, 2), (1.5, 2)):
            x, weight = (
                LAYOUTS[layout](randn(*shape)),
                LAYOUTS[weight_layout](randn(units * max_out, shape[1], *kernel)),
            )
            y, n, a, index = assert_announced(OPS.conv2d, (x, weight, None, None, *window, b, True, max_out, True))
            dy = LAYOUTS[weight_layout](randn(*y.shape))
            held = (None, n, a, index, *window, b, True, max_out, False, [True, True, False, False], "")
            assert_announced(OPS.conv2d_backward, (dy, x, weight, None, None, *held))


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(3, 1, 4, 4), (1, 4, 1, 1), (3, 4, 1, 2), (0, 4, 2, 2), (3, 4, 2, 2), (3, 1), (1, 4)]
)
def test_strides_that_fakes_of_batch_norm_announce(shape, layout, backend):
    x, residual = LAYOUTS[layout](randn(*shape)), randn(*shape, seed=1)
    with bcos_kernels.backend(backend):
        for running_var in (None, torch.ones(shape[1])):
            training = running_var is None
            norm = (x, None, None, residual, running_var, training, 1e-5, "relu")
            y, mean, var, _ = assert_announced(OPS.batch_norm_uncentered, norm)
            if len(shape) == 4:
                assert_announced(OPS.batch_norm_uncentered, (*norm, False, True))
            held = (y, None, None, mean, var, training, 1e-5, "relu", False, [True, False, False, True], "")
            assert_announced(OPS.batch_norm_uncentered_backward, (residual, x, *held))


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize(
    "layout, weight_layout", [*((k, k) for k in LAYOUTS), ("contiguous", "channels_last"), ("open", "contiguous")]
)
@pytest.mark.parametrize(
    "shape, units, kernel, groups",
    [
        ((2, 1, 4, 5), 1, (3, 2), 1),
        ((1, 3, 1, 1), 4, (1, 1), 1),
        ((2, 4, 1, 4), 2, (1, 3), 2),
        ((0, 3, 4, 4), 2, (3, 3), 1),
        ((2, 4, 4, 4), 4, (3, 1), 4),
        ((2, 3, 4, 4), 2, (1, 1), 1),
    ],
)
def test_strides_that_fakes_of_conv2d_batch_norm_announce(
    shape, units, kernel, groups, layout, weight_layout, backend
):  # fmt: skip
    window, scale, shift = ((1, 1), (0, 0), (1, 1), groups), randn(units, seed=3), randn(units, seed=4)
    x, weight = LAYOUTS[layout](randn(*shape)), LAYOUTS[weight_layout](randn(units, shape[1] // groups, *kernel))
    with bcos_kernels.backend(backend):
        for running_var, b, keep, detach in (
            (None, 2.0, True, False), (torch.ones(units), 2.0, True, True), (torch.ones(units), 1.5, True, False),
            (torch.ones(units), 2.0, False, False),
        ):  # fmt: skip
            training = running_var is None
            options = (*window, b, True, 1, training, 1e-5, "relu")
            arguments = (x, weight, None, None, scale, shift, None, running_var, None, *options, keep, detach, True)
            z, _, *held = assert_announced(OPS.conv2d_batch_norm, arguments)
            dz = LAYOUTS[weight_layout](randn(*z.shape))
            needs = [True, True, False, False, True, True, True]
            if keep:
                rest = (dz, x, weight, None, None, scale, shift, z, *held, *options, detach, needs, "")
                assert_announced(OPS.conv2d_batch_norm_backward, rest)


def test_meta_and_fake_tensors():
    """Shapes and types without values, as deferred initialisation and tracing ask for."""
    x, weight = randn(2, 4, 7, 7, seed=1), randn(6, 4, 3, 3, seed=2)
    expected = bcos_kernels.conv2d(x, weight, stride=2, max_out=2)
    y = bcos_kernels.conv2d(x.to("meta"), weight.to("meta"), stride=2, max_out=2)
    assert y.is_meta and y.shape == expected.shape and y.stride() == expected.stride()
    with torch._subclasses.FakeTensorMode() as mode:
        y = bcos_kernels.conv2d(mode.from_tensor(x), mode.from_tensor(weight), stride=2, max_out=2)
        z = bcos_kernels.batch_norm_uncentered(y, None, training=True, activation="relu")
        out = bcos_kernels.linear(z.flatten(1), torch.empty(5, z[0].numel()))
    assert y.shape == z.shape == expected.shape and z.dtype == torch.float32 and out.shape == (2, 5)


def test_ops_called_directly_are_differentiable():
    """Callers of torch.ops (exported graphs among them) get gradients too."""
    x, weight = leaf(5, 6, seed=1), leaf(4, 6, seed=2)
    y = OPS.linear(x, weight, None, None, 2.0, False, 1, False)[0]
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = torch.autograd.grad(reference.linear(*exact).square().sum(), exact)
    got = torch.autograd.grad(y.square().sum(), (x, weight))
    for name, mine, theirs in zip(("dx", "dw"), got, expected, strict=True):
        assert_close_to_reference(name, mine, None, theirs, torch.float32)


# Derivatives of second order ------------------------------------------------------------------------------------------

WINDOW = dict(stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
FUNCTIONS = {
    "linear": lambda module, x, w, bias, **options: module.linear(x, w, bias, **options),
    "conv2d": lambda module, x, w, bias, **options: module.conv2d(x, w, bias, **WINDOW, **options),
}


def tensors_of(op: str, max_out: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, weight, bias: pre-scale outputs stay away from 0, where |a| has no second derivative."""
    if op == "linear":
        return [leaf(3, 4, seed=1, dtype=dtype), leaf(2 * max_out, 4, seed=2, dtype=dtype),
                leaf(2 * max_out, seed=3, dtype=dtype)]  # fmt: skip
    return [leaf(1, 4, 3, 4, seed=1, dtype=dtype), leaf(2 * max_out, 2, 2, 2, seed=2, dtype=dtype),
            leaf(2 * max_out, seed=3, dtype=dtype)]  # fmt: skip


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


# In-place neighbours --------------------------------------------------------------------------------------------------


def block(module, x, weights, residual):
    """conv → in-place addition → in-place ReLU → conv → view → linear → in-place ReLU, as models write it."""
    out = module.conv2d(x, weights[0], padding=1)
    out += residual
    out = F.relu(out, inplace=True)
    out = module.conv2d(out, weights[1], stride=2, normalize_weight=True)
    out.mul_(0.5)
    out = module.linear(out.mean((2, 3)), weights[2])
    return torch.relu_(out)


def block_inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [
        leaf(2, 4, 6, 6, seed=1, dtype=dtype),
        leaf(5, 4, 3, 3, seed=2, dtype=dtype),
        leaf(6, 5, 3, 3, seed=3, dtype=dtype),
        leaf(7, 6, seed=4, dtype=dtype),
        leaf(2, 5, 6, 6, seed=5, dtype=dtype),
    ]


def run_block(function, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    y = function(tensors[0], tensors[1:4], tensors[4])
    return y.detach(), *torch.autograd.grad(y.square().sum(), tensors)


def expected_block() -> tuple[Tensor, ...]:
    exact = [t.detach().double().requires_grad_() for t in block_inputs()]
    return tuple(t.float() for t in run_block(lambda *args: block(reference, *args), exact))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_in_place_neighbours(compiler):
    torch.compiler.reset()

    def function(x, weights, residual):
        return block(bcos_kernels, x, weights, residual)

    if compiler != "eager":
        function = torch.compile(function, backend=compiler, fullgraph=True)
    assert_same(run_block(function, block_inputs()), expected_block())


@pytest.mark.parametrize("b", [1.0, 2.0, 1.5])
@pytest.mark.parametrize("change", ["+=", "relu_", "fill_", "copy_", "index", "view"])
def test_changes_of_an_output_do_not_reach_its_backward(change, b):
    """The gradient is that of the output as it was, whatever is written over it before the backward."""
    x, weight = leaf(5, 6, seed=1), leaf(4, 6, seed=2)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    y, z = bcos_kernels.linear(x, weight, b=b), reference.linear(*exact, b=b).clone()
    for out in (y, z):
        if change == "+=":
            out += 3
        elif change == "relu_":
            out.relu_()
        elif change == "fill_":
            with torch.no_grad():
                out.fill_(7.0)
        elif change == "copy_":
            out[:2].copy_(out[2:4].detach() * 2)
        elif change == "index":
            out[1] = 0
        else:
            out.view(2, 10).mul_(2)
    got, expected = torch.autograd.grad(y.sum(), (x, weight)), torch.autograd.grad(z.sum(), exact)
    assert_same(got, tuple(t.float() for t in expected))


def test_changed_inputs_are_an_error():
    """x and the weight are saved as they are; changing them before the backward is noticed as everywhere in torch."""
    x, weight = leaf(5, 6, seed=1), leaf(4, 6, seed=2)
    y = bcos_kernels.linear(x * 1, weight)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_relu_fused_into_the_norm_guards_its_output():
    """y is kept for the mask, as torch's own ReLU does, where it was added to; else x gives the mask."""
    x = leaf(4, 3, 2, 2, seed=1)
    residual = leaf(4, 3, 2, 2, seed=2)
    y = bcos_kernels.batch_norm_uncentered(x, None, training=True, activation="relu", residual=residual)
    y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    expected = torch.autograd.grad(bcos_kernels.batch_norm_uncentered(x, None, training=True).relu().square().sum(), x)
    y = bcos_kernels.batch_norm_uncentered(x, None, training=True, activation="relu")
    square = y * y.detach().clone() * 2  # the gradient of the square, without y itself
    y.detach().zero_()
    torch.testing.assert_close(torch.autograd.grad(square.sum(), x), expected)
    y = bcos_kernels.batch_norm_uncentered(x, None, training=True)
    y += 1  # without it nothing of y is needed
    y.sum().backward()


@pytest.mark.parametrize("b", [1.0, 2.0, 1.5])
def test_a_second_backward(b):
    x, weight = leaf(2, 4, 6, 6, seed=1), leaf(5, 4, 3, 3, seed=2)
    y = bcos_kernels.conv2d(x, weight, b=b)
    first = torch.autograd.grad(y.sum(), (x, weight), retain_graph=True)
    y += 1  # from here on y has to be recomputed
    second = torch.autograd.grad(y.sum(), (x, weight), retain_graph=True)
    third = torch.autograd.grad(y.sum(), (x, weight))
    assert_same(second, first)
    assert_same(third, second, 0.0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), (x, weight))


# Compiled, exported ---------------------------------------------------------------------------------------------------


class Network(torch.nn.Module):
    """conv → norm (+ residual, ReLU) → conv with max_out, b learnable → pooled → linear."""

    def __init__(self):
        super().__init__()
        parameters = ((6, 4, 3, 3), (6,), (6,), (12, 3, 3, 3), (5, 6))
        self.weights = torch.nn.ParameterList([randn(*shape, seed=i) for i, shape in enumerate(parameters)])
        self.b = torch.nn.Parameter(torch.tensor(1.6))
        self.register_buffer("running_var", torch.ones(6))
        self.detach, self.fill = False, None

    def forward(self, x):
        w = self.weights
        y = bcos_kernels.conv2d(x, w[0], padding=1, normalize_weight=True, detach=self.detach)
        y = bcos_kernels.batch_norm_uncentered(
            y, self.running_var, w[1], w[2], training=self.training, activation="relu", residual=y.detach() * 0.5,
            detach=self.detach,
        )  # fmt: skip
        y = bcos_kernels.conv2d(y, w[3], stride=2, groups=2, max_out=2, b=self.b, detach=self.detach)
        return bcos_kernels.linear(y.mean((2, 3)), w[4], b=1.5, detach=self.detach)


def network_results(model, network, x):
    x = x.clone().requires_grad_()
    y = model(x)
    network.zero_grad()
    y.square().sum().backward()
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    return y.detach(), network.running_var.clone(), x.grad, *grads


@pytest.mark.parametrize("mode", ["training", "eval", "explaining"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_network_equals_eager(compiler, mode):
    torch.compiler.reset()
    network = Network().train(mode == "training")
    network.detach = mode == "explaining"
    x = randn(3, 4, 7, 7, seed=9).to(memory_format=torch.channels_last)
    expected = network_results(network, network, x)
    network.running_var.fill_(1.0)
    compiled = torch.compile(network, backend=compiler, fullgraph=True)
    got = network_results(compiled, network, x)
    assert_same(got, expected)


def test_compiled_for_any_batch_size():
    torch.compiler.reset()
    network = Network().eval()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (2, 5, 3):
        x = randn(size, 4, 7, 7, seed=size)
        assert_same(network_results(compiled, network, x), network_results(network, network, x))


def test_compiled_without_gradients():
    torch.compiler.reset()
    network = Network().eval()
    x = randn(3, 4, 7, 7, seed=9)
    with torch.no_grad():
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        assert_same(compiled(x), network(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    network = Network().eval()
    x = randn(3, 4, 7, 7, seed=9)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: batch},), strict=strict)
    # strict export keeps autograd Functions as graphs of their own
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    called = {str(node.target) for graph in graphs for node in graph.nodes if "bcos_kernels" in str(node.target)}
    assert called == {
        "bcos_kernels.conv2d.default",
        "bcos_kernels.linear.default",
        "bcos_kernels.batch_norm_uncentered.default",
    }
    for inputs in (x, randn(5, 4, 7, 7, seed=8)):
        assert_same(program.module()(inputs), network(inputs))
    assert_same(program.run_decompositions().module()(x), network(x))


# Autocast -------------------------------------------------------------------------------------------------------------


def test_autocast_casts_inputs_and_weights():
    x, weight, bias = leaf(5, 6, seed=1), leaf(4, 6, seed=2), leaf(4, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        y = bcos_kernels.linear(x, weight, bias)
        image = bcos_kernels.conv2d(randn(1, 2, 4, 4), randn(3, 2, 3, 3))
    assert y.dtype == image.dtype == torch.bfloat16
    cast = [t.detach().bfloat16().requires_grad_() for t in (x, weight, bias)]
    expected = bcos_kernels.linear(*cast)
    assert torch.equal(y, expected)
    got = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert [g.dtype for g in got] == [torch.float32] * 3
    for mine, theirs in zip(got, torch.autograd.grad(expected.sum(), cast), strict=True):
        assert torch.equal(mine, theirs.float())


def test_autocast_leaves_b_and_statistics_alone():
    x, b = leaf(64, 6, seed=1), torch.tensor(1.7001, requires_grad=True)
    weight = leaf(4, 6, seed=2)
    running_var, scale = torch.ones(6), leaf(6, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        y = bcos_kernels.linear(x, weight, b=b)
        z = bcos_kernels.batch_norm_uncentered(x + 3, running_var, scale, training=True, momentum=1.0)
    assert z.dtype == torch.bfloat16 and running_var.dtype == torch.float32
    expected = (x + 3).detach().bfloat16().double().var(0, unbiased=False)
    assert (running_var / expected - 1).abs().max() < 1e-5
    # 1.7001 would be 1.703 in bfloat16
    cast = [t.detach().bfloat16() for t in (x, weight)]
    assert torch.equal(y, bcos_kernels.linear(*cast, b=1.7001)) or torch.equal(y, bcos_kernels.linear(*cast, b=b))
    db, dscale = torch.autograd.grad(y.sum(), b)[0], torch.autograd.grad(z.sum(), scale)[0]
    assert db.dtype == dscale.dtype == torch.float32
    exact = torch.tensor(1.7001, dtype=torch.float64, requires_grad=True)
    out = reference.linear(*(t.double() for t in cast), b=exact)
    assert_close_to_reference("db", db, None, torch.autograd.grad(out.sum(), exact)[0], torch.bfloat16)


def test_autocast_leaves_float64_alone():
    x, weight = randn(5, 6, seed=1, dtype=torch.float64), randn(4, 6, seed=2, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = bcos_kernels.linear(x, weight)
    assert y.dtype == torch.float64
    assert_same(y, reference.linear(x, weight), 1e-14)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("op", FUNCTIONS)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("change", [False, True], ids=["", "changed in place"])
def test_autocast_around_the_backward_alone(change, order, op, backend):
    """A backward that runs inside an autocast region has its forward's types."""
    tensors = tensors_of(op, dtype=torch.float32)

    def derivatives(module, tensors, autocast: bool):
        y = FUNCTIONS[op](module, *tensors, normalize_weight=True)
        if change:
            y = y.add_(1) if module is bcos_kernels else y + 1
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            first = torch.autograd.grad(y.sum(), tensors, create_graph=order == 2)
            return first if order == 1 else torch.autograd.grad(sum(g.sum() for g in first), tensors[:2])

    with bcos_kernels.backend(backend):
        got = derivatives(bcos_kernels, tensors, True)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = derivatives(reference, exact, False)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == torch.float32
        assert_close_to_reference(op, mine, None, theirs, torch.float32)


def test_autocast_compiled():
    torch.compiler.reset()
    network, x = Network().eval(), randn(3, 4, 7, 7, seed=9)

    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            return network(x)

    expected = function(x).detach()
    got = torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    assert got.dtype == torch.bfloat16
    assert_same(got.detach(), expected, 1e-2)
    got.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in network.parameters())


# torch.func -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("b", [1.0, 2.0, 1.5])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_jacobians(op, b, detach):
    x, weight, bias = (t.detach() for t in tensors_of(op, 2))
    options = dict(b=b, max_out=2, normalize_weight=True, detach=detach)

    def function(module):
        return lambda *tensors: FUNCTIONS[op](module, *tensors, **options)

    for argnums in (0, 1, 2):
        got = torch.func.jacrev(function(bcos_kernels), argnums)(x, weight, bias)
        expected = torch.autograd.functional.jacobian(function(reference), (x, weight, bias))[argnums]
        assert_same(got, expected, 1e-12)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_hessian(op):
    x, weight, bias = (t.detach() for t in tensors_of(op))

    def function(module):
        return lambda x: FUNCTIONS[op](module, x, weight, bias).square().sum()

    got = torch.func.jacrev(torch.func.jacrev(function(bcos_kernels)))(x)
    assert_same(got, torch.autograd.functional.hessian(function(reference), x), 1e-10)


@pytest.mark.parametrize("b", [2.0, 1.5, "tensor"])
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, None), (1, 1)])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_vmap(op, in_dims, b):
    x, weight, bias = (t.detach() for t in tensors_of(op, 2))
    batched = [
        t if d is None else torch.stack([t * (1 + 0.3 * i) for i in range(3)], d)
        for t, d in zip((x, weight), in_dims, strict=True)
    ]
    exponent = torch.tensor(1.7, dtype=torch.float64) if b == "tensor" else b

    def function(module):
        return lambda x, weight: FUNCTIONS[op](module, x, weight, bias, b=exponent, max_out=2)

    got = torch.func.vmap(function(bcos_kernels), in_dims)(*batched)
    expected = torch.stack(
        [
            function(reference)(*(t if d is None else t.select(d, i) for t, d in zip(batched, in_dims, strict=True)))
            for i in range(3)
        ]
    )
    assert_same(got, expected, 1e-12)


@pytest.mark.parametrize("b", [2.0, 1.5])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_gradients_per_sample(op, b):
    """vmap over grad: one gradient of the weight for every sample."""
    x, weight, bias = (t.detach() for t in tensors_of(op))
    samples = torch.stack([x, x * 1.5, x.flip(0)])

    def loss(module):
        return lambda weight, x: FUNCTIONS[op](module, x, weight, bias, b=b).square().sum()

    got = torch.func.vmap(torch.func.grad(loss(bcos_kernels)), (None, 0))(weight, samples)
    expected = torch.stack([torch.func.grad(loss(reference))(weight, s) for s in samples])
    assert_same(got, expected, 1e-12)


def test_vmap_of_batch_norm():
    x, weight = randn(3, 4, 2, 3, 3, seed=1, dtype=torch.float64), randn(2, seed=2, dtype=torch.float64)

    def function(module):
        return lambda x: module.batch_norm_uncentered(
            x, None, weight, training=True, activation="relu"
        ).square().sum()  # fmt: skip

    got = torch.func.vmap(torch.func.grad(function(bcos_kernels)))(x)
    assert_same(got, torch.stack([torch.func.grad(function(reference))(s) for s in x]), 1e-12)


def test_functional_call():
    """Parameters swapped in, as explanations and meta-learning do."""
    network, x = Network().eval(), randn(3, 4, 7, 7, seed=9)
    parameters = {k: v.detach() * 1.1 for k, v in network.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(network, parameters, (x,)).square().sum()

    got = torch.func.grad(loss)(parameters)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.1)
    network(x).square().sum().backward()
    for name, p in network.named_parameters():
        assert_same(got[name], p.grad)


# What is kept between forward and backward ----------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    expected = run_block(lambda *args: block(bcos_kernels, *args), block_inputs())

    def function(x, weights, residual):
        return checkpoint(
            lambda x, *rest: block(bcos_kernels, x, rest[:3], rest[3]), x, *weights, residual, use_reentrant=reentrant
        )

    tensors = block_inputs()
    y = function(tensors[0], tensors[1:4], tensors[4])
    y.square().sum().backward()  # the reentrant form knows only backward()
    assert_same((y.detach(), *(t.grad for t in tensors)), expected)


def test_under_saved_tensor_hooks_all_that_is_kept_goes_through_them():
    """Offloading sees every tensor: y is not held beside them, but recomputed."""
    x, weight = leaf(2, 4, 6, 6, seed=1), leaf(5, 4, 3, 3, seed=2)
    expected = torch.autograd.grad(bcos_kernels.conv2d(x, weight).sum(), (x, weight))
    with torch.autograd.graph.save_on_cpu():
        y = bcos_kernels.conv2d(x, weight)
        kept = weakref.ref(y.untyped_storage())
        total = y.sum()
    del y
    gc.collect()
    assert kept() is None
    assert_same(torch.autograd.grad(total, (x, weight)), expected)


def kept_bytes(function) -> tuple[int, Tensor]:
    """(bytes allocated by ``function`` that are still there after it, what it returned)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    return sum(event.self_cpu_memory_usage for event in profile.key_averages()), result


def size(t: Tensor) -> int:
    return t.numel() * t.element_size()


KEPT = {  # options, what is kept besides x and y: the norms, pre-scale values (fp16 and general B), winning units
    "b 2": (dict(), torch.float32, dict(n=1)),
    "b 2, normalized": (dict(normalize_weight=True), torch.float32, dict(n=1)),
    "b 2, bf16": (dict(), torch.bfloat16, dict(n=1)),
    "b 2, fp16": (dict(), torch.float16, dict(n=1, a=1)),
    "b 1": (dict(b=1), torch.float32, dict()),
    "b 1.5": (dict(b=1.5), torch.float32, dict(n=1, a=1)),
    "max_out 2": (dict(max_out=2), torch.float32, dict(n=1, index=1)),
    "explaining": (dict(detach=True), torch.float32, dict(n=1)),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", KEPT)
def test_bytes_kept_by_a_convolution(case, layout):
    options, dtype, besides = KEPT[case]
    x = harness.lay_out(randn(2, 32, 40, 40, seed=1, dtype=dtype), layout).requires_grad_()
    weight = leaf(32, 32, 3, 3, seed=2, dtype=dtype)

    def forward():
        return bcos_kernels.conv2d(x, weight, padding=1, **options)

    forward()  # what is allocated once and for all
    kept, y = kept_bytes(forward)
    norms = 2 * 40 * 40 * 4
    allowed = (
        size(y) + norms * besides.get("n", 0) + size(y) * besides.get("a", 0) + y.numel() * besides.get("index", 0)
    )
    assert size(y) <= kept <= allowed + 8192, (kept, allowed)


@pytest.mark.parametrize("case", KEPT)
def test_bytes_kept_by_a_linear_layer(case):
    options, dtype, besides = KEPT[case]
    x, weight = leaf(4, 200, 48, seed=1, dtype=dtype), leaf(96, 48, seed=2, dtype=dtype)

    def forward():
        return bcos_kernels.linear(x, weight, **options)

    forward()
    kept, y = kept_bytes(forward)
    norms = 800 * 4
    allowed = (
        size(y) + norms * besides.get("n", 0) + size(y) * besides.get("a", 0) + y.numel() * besides.get("index", 0)
    )
    assert size(y) <= kept <= allowed + 8192, (kept, allowed)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_bytes_kept_by_batch_norm(activation):
    x, residual = leaf(2, 32, 40, 40, seed=1), leaf(2, 32, 40, 40, seed=2)

    def forward():
        return bcos_kernels.batch_norm_uncentered(x, None, training=True, activation=activation, residual=residual)

    forward()
    kept, y = kept_bytes(forward)
    squares = 2 * 40 * 40 * 4  # for the norms of the next layer
    assert size(y) <= kept <= size(y) + squares + 8192


def test_backward_lets_go_of_the_output():
    x, weight = leaf(2, 4, 6, 6, seed=1), leaf(5, 4, 3, 3, seed=2)
    y = bcos_kernels.conv2d(x, weight)
    kept = weakref.ref(y.untyped_storage())
    total = y.sum()
    del y
    gc.collect()
    assert kept() is not None  # it is what the backward starts from
    total.backward()
    gc.collect()
    assert kept() is None


def test_a_graph_that_is_never_run_is_freed():
    x, weight = leaf(2, 4, 6, 6, seed=1), leaf(5, 4, 3, 3, seed=2)
    y = bcos_kernels.conv2d(x, weight)
    kept = weakref.ref(y.untyped_storage())
    gc.disable()
    try:
        del y
        assert kept() is None  # no cycle of references holds it
    finally:
        gc.enable()


def test_gradients_do_not_share_memory():
    """With one another, nor with a buffer that the next call writes to."""
    x, weight = leaf(2, 4, 6, 6, seed=1), leaf(5, 4, 1, 1, seed=2)
    for b, max_out in ((1.0, 1), (2.0, 1), (2.0, 5), (1.5, 1)):

        def grads(scale, b=b, max_out=max_out):
            y = bcos_kernels.conv2d(x, weight, b=b, max_out=max_out)
            return torch.autograd.grad(y.sum() * scale, (x, weight))  # noqa: B023

        first = grads(1.0)
        copies = [g.clone() for g in first]
        second = grads(-3.0)
        assert all(torch.equal(g, c) for g, c in zip(first, copies, strict=True))
        assert len({g.untyped_storage().data_ptr() for g in (*first, *second)}) == 4


# Determinism and threads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_runs_repeat_bit_for_bit(layout):
    x = harness.lay_out(randn(4, 16, 20, 20, seed=1), layout).requires_grad_()
    weight, scale = leaf(24, 16, 3, 3, seed=2), leaf(24, seed=3)
    b = torch.tensor(1.6, requires_grad=True)

    def run():
        y = bcos_kernels.conv2d(x, weight, padding=1, normalize_weight=True, b=b)
        y = bcos_kernels.batch_norm_uncentered(y, None, scale, training=True, activation="relu")
        y = bcos_kernels.linear(y.mean((2, 3)), torch.ones(3, 24), b=1.5)
        return y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight, b, scale))

    first = run()
    for _ in range(5):
        for mine, theirs in zip(run(), first, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_any_number_of_threads(layout):
    """Work split over more threads than the machine has cores: the same numbers, but for the order of sums."""
    shape = (4, 24, 32, 32)
    x, dy = harness.lay_out(randn(*shape, seed=1), layout), harness.lay_out(randn(*shape, seed=4), layout)
    leaves = [x, randn(24, 24, 3, 3, seed=2), 1 + 0.1 * randn(24, seed=3), randn(30, 24, seed=5)]

    def run(module, leaves):
        leaves = [t.detach().requires_grad_() for t in leaves]
        y = module.conv2d(leaves[0], leaves[1], padding=1, normalize_weight=True)
        y = module.batch_norm_uncentered(y, None, leaves[2], training=True, activation="relu")
        z = module.linear(y.permute(0, 2, 3, 1), leaves[3], b=1.5)
        return z.detach(), *torch.autograd.grad([y, z], leaves, [dy.to(y.dtype), torch.ones_like(z)])

    expected = run(reference, [t.double() for t in leaves])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with bcos_kernels.backend("cpu"):
                got = run(bcos_kernels, leaves)
            for mine, theirs in zip(got, expected, strict=True):
                assert_close_to_reference(f"{count} threads", mine, None, theirs, torch.float32)
    finally:
        torch.set_num_threads(threads)


def test_from_several_python_threads():
    """Concurrent layers of different sizes do not disturb one another."""

    def run(seed: int) -> tuple[Tensor, ...]:
        x, weight = leaf(2, 4, 6 + seed, 6, seed=seed), leaf(5, 4, 3, 3, seed=2)
        y = bcos_kernels.conv2d(x, weight, b=2.0 if seed % 2 else 1.5)
        return y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight))

    expected = [run(seed) for seed in range(6)]
    found: dict[int, list] = {seed: [] for seed in range(6)}

    def work(seed: int) -> None:
        for _ in range(10):
            found[seed].append(run(seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for seed in range(6):
        assert len(found[seed]) == 10
        for results in found[seed]:
            assert_same(results, expected[seed], 1e-6)


def test_an_empty_batch_is_a_process_s_first():
    """Nothing of an earlier layer is there that a backward could do with."""
    program = (
        "import torch, bcos_kernels\n"
        "from bcos_kernels import batch_norm_uncentered, conv2d, conv2d_batch_norm, linear\n"
        "weight = torch.randn(2, 3, requires_grad=True)\n"
        "kernel = torch.randn(2, 3, 1, 1, requires_grad=True)\n"
        "image = torch.empty(0, 3, 4, 4).to(memory_format=torch.channels_last)\n"
        "for b in (2.0, 1.5):\n"
        "    linear(torch.empty(0, 3), weight, b=b).sum().backward()\n"
        "    conv2d(image, kernel, b=b).sum().backward()\n"
        "    conv2d_batch_norm(image, kernel, b=b, running_var=torch.ones(2), training=False).sum().backward()\n"
        "assert not weight.grad.any() and not kernel.grad.any()\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, (run.returncode, run.stderr)


def _needs_memory(gibibytes: float):
    """Skips where less is available (Linux tells; elsewhere it is tried)."""
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 2**20
    except OSError:
        return
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of memory, {free:.1f} are available")


@pytest.mark.slow
@pytest.mark.parametrize("op", FUNCTIONS)
def test_more_than_two_billion_elements(op):
    """Offsets are 64 bits wide: an output of more than 2³¹ elements, of which only the last ones are compared."""
    _needs_memory(11)
    units = 2**11
    weight = randn(units, 4, seed=2, dtype=torch.bfloat16)
    x = randn(2**20 + 5, 4, seed=1, dtype=torch.bfloat16)
    assert len(x) * units > 2**31
    with torch.no_grad(), bcos_kernels.backend("cpu"):
        if op == "linear":
            tail = bcos_kernels.linear(x, weight)[-3:].clone()
        else:
            x = x[: 2**20 + 2]
            image = x.view(2, -1, 1, 4).permute(0, 3, 1, 2)  # channels_last
            y = bcos_kernels.conv2d(image, weight.view(units, 4, 1, 1))
            assert y.numel() > 2**31
            tail = y[-1, :, -3:, 0].t().clone()
    wide = x[-3:].double()
    if op == "linear":
        expected = reference.linear(wide, weight.double())
    else:
        expected = reference.conv2d(wide.t()[None, :, :, None], weight.double().view(units, 4, 1, 1))[0, :, :, 0].t()
    assert_close_to_reference("y", tail, None, expected, torch.bfloat16)


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
