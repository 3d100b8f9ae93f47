"""The CUDA backend, its passes emulated on the CPU, against the definition in float64."""

from __future__ import annotations

import functools

import pytest
import torch

import bcos_kernels
from bcos_kernels import reference
from tests.bcos_kernels import harness
from tests.bcos_kernels.cuda.emulated import backwards, emulated
from tests.bcos_kernels.instruction_set_worker import results
from tests.bcos_kernels.tolerances import assert_close_to_reference

pytestmark = pytest.mark.skipif(not harness.has_compiler(), reason="no C++ compiler here")

DTYPES = ["fp32", "bf16", "fp16"]
OPS = ("linear", "conv2d", "batch_norm_uncentered", "conv2d_batch_norm", "layer_norm")


def both_ways(*ops: str) -> tuple[str, ...]:
    return tuple(f"{op}{way}" for op in ops for way in ("", "_backward"))


@functools.cache
def oracle(dtype: str) -> tuple[dict, dict]:
    dtype = harness.DTYPES[dtype]
    return results(reference, dtype, wide=True), results(reference, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_options(dtype):
    """Sizes that fill no pack, both layouts, every form of the scaling and the normalisation."""
    with emulated(), harness.only("cuda", *both_ways(*OPS)):
        found = results(bcos_kernels, harness.DTYPES[dtype])
    exact, eager = oracle(dtype)
    assert found.keys() == exact.keys() and len(found) > 30
    for name, value in found.items():
        assert_close_to_reference(f"{name}, {dtype}", value, eager[name], exact[name], harness.DTYPES[dtype])


def compare(name, op, inputs, dtype, *ops, activation=None, **options):
    """``op`` of the backend and of the definition on the same values: outputs and every gradient.

    A ReLU's mask is that of the backend's output: rounding decides about outputs near 0.
    """

    def run(module, wide, mask=None):
        leaves = harness.leaves_of(inputs, torch.float64 if wide else None)
        values = {k: v(wide) if callable(v) else v for k, v in options.items()}
        if activation and module is bcos_kernels:
            values["activation"] = activation
        y = op(module)(**leaves, **values)
        y = y if mask is None else torch.where(mask, y, 0)
        dy = harness.randn(tuple(y.shape), 9, dtype)
        return {"y": y.detach(), **harness.gradients(y, leaves, dy)}, dy

    with emulated(), harness.only("cuda", *both_ways(*ops)):
        got, _ = run(bcos_kernels, False)
    mask = got["y"] > 0 if activation else None
    (eager, _), (exact, dy) = run(reference, False, mask), run(reference, True, mask)
    for key, value in got.items():
        terms = dy.double() * exact["y"] if key == "db" else None  # a sum, measured against its terms
        assert_close_to_reference(f"{name} {key}", value, eager[key], exact[key], dtype, terms)


CONVOLUTIONS = {
    "aligned": dict(shape=(2, 32, 8, 8), outputs=48, kernel=3, padding=1),
    "pointwise": dict(shape=(3, 64, 6, 5), outputs=24, kernel=1),
    "depthwise": dict(shape=(2, 32, 9, 7), outputs=32, kernel=3, padding=1, groups=32),
    "depthwise-odd": dict(shape=(2, 15, 9, 7), outputs=15, kernel=5, padding=2, groups=15, stride=2),
    "multiplied": dict(shape=(2, 6, 7, 7), outputs=18, kernel=3, groups=6),
    "grouped": dict(shape=(2, 32, 7, 6), outputs=64, kernel=3, groups=4, stride=2, padding=1),
    "grouped-odd": dict(shape=(2, 10, 7, 6), outputs=6, kernel=(1, 3), groups=2, padding=(0, 1)),
    "dilated": dict(shape=(1, 16, 11, 12), outputs=16, kernel=3, dilation=(2, 3), stride=(3, 1), padding=2),
    "stem": dict(shape=(2, 6, 19, 19), outputs=16, kernel=7, stride=2, padding=3),
    "strided-pointwise": dict(shape=(2, 16, 7, 7), outputs=32, kernel=1, stride=2),
    "one-pixel": dict(shape=(1, 8, 1, 1), outputs=8, kernel=1),
}


def convolution(case: str, dtype, layout="channels_last", **more):
    spec = CONVOLUTIONS[case]
    kernel = spec["kernel"] if isinstance(spec["kernel"], tuple) else (spec["kernel"],) * 2
    groups = spec.get("groups", 1)
    x = harness.lay_out(harness.randn(spec["shape"], 1, dtype), layout)
    weight = harness.randn((spec["outputs"], spec["shape"][1] // groups, *kernel), 2, dtype, 0.3)
    options = {k: v for k, v in spec.items() if k in ("stride", "padding", "dilation", "groups")}
    return dict(x=x, weight=weight, **more), options


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv2d(case, dtype):
    dtype = harness.DTYPES[dtype]
    inputs, options = convolution(case, dtype)
    compare(f"conv2d {case}", lambda module: module.conv2d, inputs, dtype, "conv2d", **options)


@pytest.mark.parametrize("layout", ["contiguous", "strided", "transposed", "expanded", "offset"])
@pytest.mark.parametrize("options", [dict(b=2.0), dict(b=1.5, normalize_weight=True)], ids=str)
def test_layouts(layout, options):
    inputs, window = convolution("grouped", torch.float32, layout)
    compare(f"conv2d {layout}", lambda module: module.conv2d, inputs, torch.float32, "conv2d", **window, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_out", [1, 2])
@pytest.mark.parametrize("detach", [False, True])
def test_learnable_b_and_bias(dtype, max_out, detach):
    dtype = harness.DTYPES[dtype]
    x, weight = harness.integers((37, 40), 1, dtype), harness.signs((24 * max_out, 40), 2, dtype)
    bias = harness.integers((24 * max_out,), 3, dtype)
    inputs = dict(x=x, weight=weight, bias=bias)
    if not detach:
        inputs["b"] = torch.tensor(1.75)

    def op(module):
        return lambda b=1.75, **tensors: module.linear(**tensors, b=b, max_out=max_out, detach=detach)

    compare("linear", op, inputs, dtype, "linear")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["aligned", "pointwise", "depthwise", "grouped", "stem", "grouped-odd"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [False, True])
def test_conv2d_batch_norm(case, dtype, training, with_residual):
    dtype = harness.DTYPES[dtype]
    inputs, options = convolution(case, dtype)
    with torch.no_grad():
        shape = reference.conv2d(**inputs, **options).shape
    channels = shape[1]
    inputs |= dict(
        norm_weight=harness.randn((channels,), 3, torch.float32) + 1.5,
        norm_bias=harness.randn((channels,), 4, torch.float32),
    )
    if with_residual:
        inputs["residual"] = harness.lay_out(harness.randn(tuple(shape), 5, dtype), "channels_last")

    def running_var(wide):
        return torch.full((channels,), 0.3, dtype=torch.float64 if wide else torch.float32)

    compare(
        f"conv2d_batch_norm {case}", harness.conv2d_batch_norm, inputs, dtype, "conv2d_batch_norm",
        running_var=running_var, training=training, activation="relu", **options,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["output", "inner", "both"])
@pytest.mark.parametrize("case", ["aligned", "depthwise"])
def test_recompute(case, recompute, dtype):
    """What is computed again gives the same gradients, though a lies in the place of y."""
    dtype = harness.DTYPES[dtype]
    inputs, options = convolution(case, dtype)

    def gradients(recompute):
        leaves = harness.leaves_of(inputs)
        var = torch.full((inputs["weight"].shape[0],), 0.3)
        z = bcos_kernels.conv2d_batch_norm(
            **leaves, **options, running_var=var, training=True, activation="relu", recompute=recompute
        )
        y = bcos_kernels.conv2d(z, torch.ones(4, z.shape[1], 1, 1, dtype=dtype))
        return harness.gradients(y, leaves, harness.randn(tuple(y.shape), 9, dtype))

    with emulated(), bcos_kernels.backend("cuda"):
        kept, again = gradients(None), gradients(recompute)
    for key, value in kept.items():
        error = (again[key].double() - value.double()).norm() / value.double().norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2), (key, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("features", [(40, 24), (33, 129)], ids=str)
def test_linear_gelu(features, detach, dtype):
    dtype = harness.DTYPES[dtype]
    inputs = dict(x=harness.randn((50, features[0]), 1, dtype), weight=harness.randn(features[::-1], 2, dtype, 0.3))
    inputs["bias"] = harness.randn((features[1],), 3, dtype)
    compare("linear_gelu", harness.linear_gelu, inputs, dtype, "linear_gelu", detach=detach)


@pytest.mark.parametrize("b", [2, 1.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_gelu_computed_again_for_the_layer_behind(dtype, b):
    dtype = harness.DTYPES[dtype]
    shapes = [(3, 20, 24), (40, 24), (8, 40)]

    def gradients(recompute):
        x, w1, w2 = (harness.randn(shape, i, dtype, 0.4).requires_grad_() for i, shape in enumerate(shapes, 1))
        with emulated(), bcos_kernels.backend("cuda"):
            h = bcos_kernels.linear_gelu(x, w1, b=b, recompute=recompute)
            return torch.autograd.grad(bcos_kernels.linear(h, w2).square().sum(), (x, w1, w2))

    for got, expected in zip(gradients("output"), gradients(None), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(5, 24, 9, 8), (700, 24), (3, 21, 40), (2, 2048, 3, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_norm_uncentered(shape, dtype):
    """Many splits of the rows, channels of several tiles, a mean far from 0."""
    dtype = harness.DTYPES[dtype]
    x = harness.randn(shape, 1, dtype) + 4
    inputs = dict(
        x=x, weight=harness.randn((shape[1],), 2, torch.float32), bias=harness.randn((shape[1],), 3, torch.float32)
    )

    def running_var(wide):
        return torch.ones(shape[1], dtype=torch.float64 if wide else torch.float32)

    compare(
        "batch_norm_uncentered", lambda module: module.batch_norm_uncentered, inputs, dtype, "batch_norm_uncentered",
        running_var=running_var, training=True, activation="relu",
    )  # fmt: skip


LAYER_NORMS = {  # shape of x, dimensions that are normalised
    "kept": ((37, 40), 1), "odd": ((21, 45), 1), "short": ((70, 8), 1), "one feature": ((9, 1), 1),
    "long": ((3, 2056), 1), "images": ((4, 5, 6, 48), 1), "two dimensions": ((5, 3, 4, 6), 2),
    "many rows": ((700, 24), 1),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("case", LAYER_NORMS)
def test_layer_norm(case, detach, dtype):
    """Rows in a team's registers and read again, of every alignment; a mean away from 0."""
    dtype, (shape, dims) = harness.DTYPES[dtype], LAYER_NORMS[case]
    of_features = shape[len(shape) - dims :]
    x = harness.randn(shape, 1, dtype) + 4
    inputs = dict(x=x, weight=harness.randn(of_features, 2, torch.float32) + 1)
    inputs["bias"] = harness.randn(of_features, 3, dtype)
    for leave_out in ((), ("weight",), ("bias",), ("weight", "bias")) if case == "odd" else ((),):
        given = {name: t for name, t in inputs.items() if name not in leave_out}
        compare(
            "layer_norm", lambda module: module.layer_norm, given, dtype, "layer_norm", normalized_shape=of_features,
            detach=detach,
        )  # fmt: skip


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded", "offset"])
def test_layouts_of_layer_norm(layout):
    inputs = dict(x=harness.lay_out(harness.randn((6, 5, 16), 1, torch.float32), layout), weight=torch.ones(16))
    compare(f"{layout}", lambda module: module.layer_norm, inputs, torch.float32, "layer_norm", normalized_shape=16)


def test_a_linear_layer_takes_the_norms_of_a_layer_norm():
    x, w = harness.randn((10, 4, 16), 1, torch.float32), harness.randn((24, 16), 2, torch.float32, 0.3)
    with emulated(), bcos_kernels.backend("cuda"), torch.no_grad():
        y = bcos_kernels.layer_norm(x, 16)
        squares = bcos_kernels.squares.squares_of(y, bcos_kernels.squares.FEATURES)
        with_sums, without = bcos_kernels.linear(y, w), bcos_kernels.linear(y.clone(), w)
        nan = x.clone()
        nan[3, 1, 2] = float("nan")
        spoiled = torch.isnan(bcos_kernels.layer_norm(nan, 16))
        assert bcos_kernels.layer_norm(x[:0], 16).shape == (0, 4, 16)
    assert (squares.double() - y.double().square().sum(-1).flatten()).abs().max() < 1e-5
    assert torch.allclose(with_sums, without, rtol=1e-5, atol=1e-6)
    assert spoiled[3, 1].all() and spoiled.sum() == 16


def test_the_next_layer_takes_the_sums_of_squares():
    """A layer behind a normalisation reads what that left; its numbers are those of a layer that reads x."""
    x = harness.lay_out(harness.randn((2, 16, 6, 6), 1, torch.float32), "channels_last")
    w = harness.randn((16, 16, 3, 3), 2, torch.float32, 0.3)
    with emulated(), bcos_kernels.backend("cuda"), torch.no_grad():
        z = bcos_kernels.conv2d_batch_norm(x, w, running_var=torch.ones(16), training=False, activation="relu")
        squares = bcos_kernels.squares.squares_of(z, bcos_kernels.squares.CHANNELS)
        with_sums = bcos_kernels.conv2d(z, w[:, :, :1, :1])
        without = bcos_kernels.conv2d(z.clone(memory_format=torch.channels_last), w[:, :, :1, :1])
    assert (squares.double() - z.double().square().sum(1)).abs().max() < 1e-5
    assert torch.allclose(with_sums, without, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_nan_and_large(dtype):
    """Zero patches have finite gradients, NaN stays where it is, 1e4 does not overflow in the norm."""
    dtype = harness.DTYPES[dtype]
    x = torch.zeros(3, 16, 4, 4, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x[1] = 1e4
    x[2, 3, 0, 0] = float("nan")
    w = torch.full((8, 16, 1, 1), 1e-3, dtype=dtype, requires_grad=True)
    x.requires_grad_()
    with emulated(), bcos_kernels.backend("cuda"):
        y = bcos_kernels.conv2d(x, w)
        (dx,) = torch.autograd.grad(y.float().sum(), x)
    exact = reference.conv2d(x.detach().double(), w.detach().double())
    assert not y[0].any() and torch.isfinite(dx[:2]).all()
    assert torch.isnan(y[2, :, 0, 0]).all() and torch.isfinite(y[2, :, 1:]).all()
    assert ((y[1].double() - exact[1]).norm() / exact[1].norm()) < 1e-2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_order_of_threads_does_not_matter(dtype):
    """Bit for bit: where a barrier is missing, the other order reads what is not there yet."""
    dtype = harness.DTYPES[dtype]
    with emulated(), bcos_kernels.backend("cuda"):
        found = results(bcos_kernels, dtype)
        with backwards():
            again = results(bcos_kernels, dtype)
    different = [name for name, value in found.items() if not torch.equal(value, again[name])]
    assert not different


def test_empty():
    shape = (0, 8, 5, 5)
    x = torch.empty(shape, requires_grad=True)
    w = torch.ones(4, 8, 1, 1, requires_grad=True)
    with emulated(), bcos_kernels.backend("cuda"):
        y = bcos_kernels.conv2d(x, w)
        dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert y.shape == (shape[0], 4, *shape[2:]) and dx.shape == x.shape and not dw.any()


def test_float64_is_refused():
    x = torch.ones(2, 3, dtype=torch.float64)
    with (
        emulated(),
        bcos_kernels.backend("cuda"),
        pytest.raises(NotImplementedError, match=r"float32, bfloat16, float16"),
    ):
        bcos_kernels.linear(x, x)
