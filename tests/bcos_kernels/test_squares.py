"""Σ_c x² that the pass that wrote an activation leaves with it, for the norms of the layer that reads it next: what the
sums are, which layers take them, and that a tensor that they are no longer true of has none."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor

import bcos_kernels
from bcos_kernels import reference, squares
from tests.bcos_kernels import harness
from tests.bcos_kernels.tolerances import assert_close_to_reference

OPS = torch.ops.bcos_kernels


def left_with(z: Tensor) -> Tensor | None:
    """What a convolution finds."""
    return squares.squares_of(z, squares.CHANNELS)


def falsify(z: Tensor) -> None:
    """Makes the sums four times as large, and so the norms of whoever takes them twice as large."""
    left, *rest = z._bcos_squares
    z._bcos_squares = (4 * left, *rest)


def activation(shape=(3, 6, 7, 9), layout="channels_last", dtype=torch.float32, seed=1) -> Tensor:
    return harness.lay_out(harness.randn(shape, seed, dtype), layout)


def by_norm(module, x: Tensor, training: bool = True, residual: bool = False, detach: bool = False) -> Tensor:
    running_var = None if training else torch.full((x.shape[1],), 0.7, dtype=reference.statistics_dtype(x.dtype))
    return module.batch_norm_uncentered(
        x, running_var, training=training, activation="relu" if residual else None,
        residual=x.detach().flip(0) if residual else None, detach=detach,
    )  # fmt: skip


def by_layer(module, x: Tensor, training: bool = True, residual: bool = False, detach: bool = False) -> Tensor:
    channels = x.shape[1]
    weight = torch.linspace(-1, 1, channels**2, dtype=torch.float64).sin().view(channels, channels, 1, 1).to(x.dtype)
    running_var = None if training else torch.full((x.shape[1],), 0.2, dtype=reference.statistics_dtype(x.dtype))
    return harness.conv2d_batch_norm(module)(
        x, weight, None, running_var=running_var, training=training, activation="relu" if residual else None,
        residual=x.detach().flip(0) if residual else None, detach=detach,
    )  # fmt: skip


PRODUCERS = {"batch_norm_uncentered": by_norm, "conv2d_batch_norm": by_layer}


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("op", PRODUCERS)
def test_the_sums(op, layout, backend, dtype):
    """Of the values as they were stored, in the norms' type, one per pixel; no part of a graph."""
    dtype = harness.DTYPES[dtype]
    wide = reference.statistics_dtype(dtype)
    for shape in ((3, 6, 7, 9), (6, 5, 1, 1), (2, 1, 3, 4), (2, 40, 21, 20)):
        for training in (True, False):
            for residual in (True, False):
                for grad in (True, False):
                    x = activation(shape, layout, dtype).requires_grad_(grad)
                    with harness.only(backend, op):
                        z = PRODUCERS[op](bcos_kernels, x, training, residual)
                    left = left_with(z)
                    assert left.dtype == wide and not left.requires_grad
                    assert_close_to_reference(
                        f"{shape}", left, None, z.detach().double().square().sum(1), wide
                    )  # fmt: skip


def test_where_there_are_none():
    """Other tensors with the same values, empty ones, and those of other dimensions."""
    z = by_norm(bcos_kernels, activation())
    assert left_with(z) is not None and left_with(z.contiguous(memory_format=torch.channels_last)) is not None
    with torch.no_grad():
        others = (z.clone(), z.detach(), z.view(z.shape), z[:], z.flatten(2), z.contiguous(), z.double(), z.relu())
    assert all(left_with(t) is None for t in others)
    assert left_with(by_norm(bcos_kernels, activation((0, 6, 7, 9)), training=False)) is None
    for shape in ((5, 6), (5, 6, 7), (2, 6, 3, 2, 2)):
        assert left_with(by_norm(bcos_kernels, activation(shape, "contiguous"))) is None


WINDOWS = {  # shape of x, kernel, options, whether the sums are used
    "1x1": ((3, 6, 7, 9), (1, 1), dict(), True),
    "1x1, stride 2": ((3, 6, 7, 9), (1, 1), dict(stride=2), True),
    "1x1, padding 1, b 1.5": ((3, 6, 7, 9), (1, 1), dict(padding=1, b=1.5), True),
    "blocks of rows": ((3, 40, 21, 21), (1, 1), dict(), True),
    "blocks of rows, stride (2, 1), b tensor": ((3, 40, 21, 21), (1, 1), dict(stride=(2, 1), b=1.7), True),
    "3x3": ((3, 6, 7, 9), (3, 3), dict(padding=1, normalize_weight=True), True),
    "3x2, stride 2, dilation 2, max_out": ((3, 6, 7, 9), (3, 2), dict(stride=2, dilation=2, max_out=2), True),
    "one-pixel images": ((6, 5, 1, 1), (1, 1), dict(), True),
    "one-pixel images, 3x3": ((6, 5, 1, 1), (3, 3), dict(padding=1), True),
    "groups 2": ((3, 6, 7, 9), (3, 3), dict(groups=2), False),
    "depthwise": ((3, 6, 7, 9), (3, 3), dict(groups=6), False),
    "b 1": ((3, 6, 7, 9), (3, 3), dict(b=1.0), False),
    "reflect": ((3, 6, 7, 9), (3, 3), dict(padding=1, padding_mode="reflect"), False),
    "same, even kernel": ((3, 6, 7, 9), (2, 2), dict(padding="same"), False),
}


def layer(op: str, z: Tensor, window: str) -> Tensor:
    """The output of `conv2d`, or of `conv2d_batch_norm` with known statistics, given z."""
    shape, kernel, options, _ = WINDOWS[window]
    weight = harness.randn((12, shape[1] // options.get("groups", 1), *kernel), 3, z.dtype, 0.3)
    if "tensor" in window:
        options = options | {"b": torch.tensor(options["b"])}
    if op == "conv2d":
        return bcos_kernels.conv2d(z, weight, **options)
    running_var = torch.ones(12 // options.get("max_out", 1))
    return bcos_kernels.conv2d_batch_norm(z, weight, running_var=running_var, training=False, **options)


@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", ["conv2d", "conv2d_batch_norm"])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_layer_given_them_has_the_same_numbers(window, op, layout, dtype):
    dtype = harness.DTYPES[dtype]
    bound = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-3}[dtype]
    x = activation(WINDOWS[window][0], layout, dtype)
    with torch.no_grad(), bcos_kernels.backend("cpu"):
        z = by_norm(bcos_kernels, x, residual=True)
        expected = layer(op, z.clone(), window)
        assert (layer(op, z, window) - expected).norm() <= bound * expected.norm()
        falsify(z)  # was it given them at all?
        assert torch.allclose(layer(op, z, window), expected, rtol=0.1) != WINDOWS[window][3]


CHANGES = {
    "+=": lambda z: z.add_(1),
    "relu_": lambda z: z.relu_(),
    "a sample": lambda z: z[1].mul_(3),
    "a view": lambda z: z.flatten(2).mul_(2) if z.is_contiguous() else z.permute(0, 2, 3, 1).flatten(1).mul_(2),
    "detached": lambda z: z.detach().copy_(2 * z.detach()),
    "out=": lambda z: torch.mul(z.detach(), 2, out=z.detach()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", PRODUCERS)
def test_a_tensor_changed_in_place_has_none(op, layout, change):
    x = activation(layout=layout).requires_grad_()
    z = PRODUCERS[op](bcos_kernels, x)
    assert left_with(z) is not None
    CHANGES[change](z)
    assert left_with(z) is None
    weight = harness.randn((5, 6, 3, 3), 3, torch.float32, 0.3).requires_grad_()
    got = bcos_kernels.conv2d(z, weight)
    exact = [t.detach().double().requires_grad_() for t in (z, weight)]
    expected = reference.conv2d(*exact)
    assert_close_to_reference("y", got, None, expected, torch.float32)
    for mine, theirs in zip(torch.autograd.grad(got.sum(), (z, weight)),
                            torch.autograd.grad(expected.sum(), exact), strict=True):  # fmt: skip
        assert_close_to_reference("gradient", mine, None, theirs, torch.float32)


def test_a_four_dimensional_input_of_a_linear_layer():
    """Whose features are the last dimension: the sums over channels are none of its rows', also where there are as
    many of the ones as of the others."""
    for shape in ((2, 4, 3, 4), (2, 5, 3, 4)):
        z = by_norm(bcos_kernels, activation(shape, "contiguous"))
        weight = harness.randn((5, 4), 3, torch.float32)
        y = bcos_kernels.linear(z, weight)
        assert_close_to_reference("y", y, None, reference.linear(z.double(), weight.double()), torch.float32)


@pytest.mark.parametrize("op", PRODUCERS)
def test_inference_mode(op):
    """Whose tensors have no versions."""
    x, weight = activation(), harness.randn((5, 6, 3, 3), 3, torch.float32)
    expected = bcos_kernels.conv2d(PRODUCERS[op](bcos_kernels, x), weight)
    with torch.inference_mode():
        z = PRODUCERS[op](bcos_kernels, x)
        y = bcos_kernels.conv2d(z, weight)
        assert torch.allclose(y, expected, rtol=1e-5)
        z.mul_(2)
        assert torch.allclose(bcos_kernels.conv2d(z, weight), 2 * expected, rtol=1e-5)


def test_copies_on_disk_and_in_memory():
    """Which take a tensor's attributes along."""
    z, weight = by_norm(bcos_kernels, activation()), harness.randn((5, 6, 3, 3), 3, torch.float32)
    file = io.BytesIO()
    torch.save(z, file)
    file.seek(0)
    for t in (torch.load(file, weights_only=True), copy.deepcopy(z), copy.copy(z)):
        assert torch.allclose(bcos_kernels.conv2d(t, weight), bcos_kernels.conv2d(z.clone(), weight), rtol=1e-5)
        t.mul_(2)
        assert torch.allclose(bcos_kernels.conv2d(t, weight), bcos_kernels.conv2d(t.clone(), weight), rtol=1e-5)


# Derivatives ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("detach", [False, True], ids=["training", "explaining"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("window", ["1x1", "3x3", "groups 2"])
@pytest.mark.parametrize("op", PRODUCERS)
def test_gradients_of_what_lies_between(op, window, layout, detach, order):
    """The sums are values: all that flows through the norm of a layer reaches z, however z's gradient is asked for."""
    _, kernel, options, _ = WINDOWS[window]
    weight = harness.randn((4, 6 // options.get("groups", 1), *kernel), 3, torch.float64).requires_grad_()
    x = activation((2, 6, 3, 4), layout, torch.float64).requires_grad_()

    def derivatives(module):
        z = PRODUCERS[op](module, x, detach=detach)
        y = module.conv2d(z, weight, **options, detach=detach)
        tensors = (z, x, weight)
        found = torch.autograd.grad(y.square().sum(), tensors, create_graph=order == 2)
        if order == 2:
            loss = sum((g * harness.randn(tuple(g.shape), i, g.dtype)).sum() for i, g in enumerate(found))
            return torch.autograd.grad(loss, tensors)
        return found

    assert left_with(PRODUCERS[op](bcos_kernels, x)) is not None
    for mine, theirs in zip(derivatives(bcos_kernels), derivatives(reference), strict=True):
        assert (mine - theirs).norm() <= 1e-11 * theirs.norm()


@pytest.mark.parametrize("op", PRODUCERS)
def test_nothing_is_left_in_compiled_code_and_transforms(op):
    """Nor read there: a version means nothing to a graph that runs later, and transforms wrap tensors."""
    x, weight = activation(), harness.randn((5, 6, 3, 3), 3, torch.float32)
    seen = []

    def function(x):
        z = PRODUCERS[op](bcos_kernels, x)
        seen.append(hasattr(z, "_bcos_squares"))
        return bcos_kernels.conv2d(z, weight).square().sum()

    torch.func.grad(function)(x)
    torch.func.vmap(function)(torch.stack([x, 2 * x]))
    torch.func.jacrev(function)(x)
    assert seen == [False] * 3
    torch.compiler.reset()
    z = torch.compile(lambda x: PRODUCERS[op](bcos_kernels, x), backend="aot_eager", fullgraph=True)(x)
    assert left_with(z) is None
    consumer = torch.compile(lambda z: bcos_kernels.conv2d(z, weight), backend="aot_eager", fullgraph=True)
    z = PRODUCERS[op](bcos_kernels, x)
    falsify(z)
    for function in (consumer, torch.func.vmap(lambda z: bcos_kernels.conv2d(z, weight)[0], (0,))):
        given = z if function is consumer else z.unsqueeze(1)
        got, expected = function(given), bcos_kernels.conv2d(z.clone(), weight)
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_autocast():
    """What is cast is another tensor; what is in autocast's type already is the very one."""
    weight = harness.randn((5, 6, 3, 3), 3, torch.float32)
    z = by_norm(bcos_kernels, activation())
    with torch.autocast("cpu", torch.bfloat16):
        y = bcos_kernels.conv2d(z, weight)
        assert torch.equal(y, bcos_kernels.conv2d(z.bfloat16(), weight))
        low = by_norm(bcos_kernels, activation())
        assert low.dtype == torch.bfloat16 and left_with(low).dtype == torch.float32
        y, expected = bcos_kernels.conv2d(low, weight), bcos_kernels.conv2d(low.clone(), weight)
        assert (y - expected).norm() <= 2e-3 * expected.norm()


# The ops --------------------------------------------------------------------------------------------------------------


def calls(given: Tensor | None) -> dict:
    """Name → (op, arguments), ``given`` as the op's squares."""
    x, weight, ones = activation((2, 4, 5, 6)), harness.randn((4, 4, 3, 3), 2, torch.float32), torch.ones(4)
    window = ((1, 1), (1, 1), (1, 1), 1)
    rows = harness.randn((60, 4), 3, torch.float32)
    return {
        "linear": (OPS.linear.default, (rows, weight[:, :, 0, 0], None, None, 2.0, False, 1, True, False, given)),
        "conv2d": (OPS.conv2d.default, (x, weight, None, None, *window, 2.0, False, 1, True, False, given)),
        "b 1.5": (OPS.conv2d.default, (x, weight, None, None, *window, 1.5, False, 1, True, False, given)),
        "conv2d_batch_norm": (
            OPS.conv2d_batch_norm.default,
            (x, weight, None, None, ones, None, None, ones, given, *window, 2.0, False, 1, False, 1e-5, "relu", True,
             False, True),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("op", calls(None))
def test_sums_of_another_tensor_are_refused(op):
    """By their size and type, before they are read."""
    wrong = (torch.ones(2, 5, 5), torch.ones(60, 2), torch.ones(2, 5, 6).double(), torch.ones(2, 5, 12)[:, :, ::2])
    with bcos_kernels.backend("cpu"):
        for given in wrong:
            call, arguments = calls(given)[op]
            with pytest.raises(RuntimeError, match="squares"):
                call(*arguments)
        call, arguments = calls(torch.ones(2, 5, 6).view(60) if op == "linear" else torch.ones(2, 5, 6))[op]
        call(*arguments)


@pytest.mark.parametrize("op", calls(None))
def test_opcheck(op):
    call, arguments = calls(torch.ones(60) if op == "linear" else torch.ones(2, 5, 6))[op]
    torch.library.opcheck(call, [t.requires_grad_() if i < 2 else t for i, t in enumerate(arguments)])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck_of_the_op_that_emits_them(layout):
    x = activation((2, 4, 5, 6), layout).requires_grad_()
    torch.library.opcheck(
        OPS.batch_norm_uncentered.default, (x, None, None, None, None, True, 1e-5, "relu", False, True)
    )
