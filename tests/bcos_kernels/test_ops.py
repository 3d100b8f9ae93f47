"""The ops as torch sees them: schemas, fakes and the strides that they announce, registration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bcos_kernels
from bcos_kernels import reference
from tests.bcos_kernels import harness
from tests.bcos_kernels.op_cases import leaf, randn
from tests.bcos_kernels.tolerances import assert_close_to_reference

OPS = torch.ops.bcos_kernels


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
