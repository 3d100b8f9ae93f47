"""layer_norm against its definition and torch's, and what is particular to it."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import bcos_kernels
from bcos_kernels import reference
from bcos_kernels.squares import CHANNELS, FEATURES, squares_of
from tests.bcos_kernels import harness
from tests.bcos_kernels.harness import BACKENDS, DTYPES, randn
from tests.bcos_kernels.tolerances import assert_close_to_reference

OPS = torch.ops.bcos_kernels

CASES = {  # shape of x, normalised dimensions, layout of x and dy, mean, standard deviation
    "rows": ((130, 96), 1, "contiguous", 0.0, 1.0),
    "threads": ((200, 384), 1, "contiguous", 4.0, 1.0),
    "odd": ((7, 3, 33), 1, "contiguous", 0.5, 2.0),
    "images": ((2, 5, 4, 48), 1, "contiguous", 0.0, 1.0),
    "one row": ((1, 50), 1, "contiguous", 0.0, 1.0),
    "no rest": ((50,), 1, "contiguous", 0.0, 1.0),
    "two dimensions": ((6, 5, 9), 2, "contiguous", 1.0, 1.0),
    "all dimensions": ((5, 9), 2, "contiguous", 1.0, 1.0),
    "long rows": ((3, 17, 600), 2, "contiguous", 1.0, 1.0),
    "strided": ((9, 4, 20), 1, "strided", 0.0, 1.0),
    "transposed": ((9, 4, 20), 1, "transposed", 0.0, 1.0),
    "expanded": ((9, 4, 20), 1, "expanded", 0.0, 1.0),
    "offset": ((9, 4, 20), 1, "offset", 0.0, 1.0),
    "large": ((9, 4, 200), 1, "contiguous", 0.0, 1e4),
    "mean far from zero": ((9, 4, 200), 1, "contiguous", 100.0, 1.0),
    "one feature": ((9, 1), 1, "contiguous", 0.0, 1.0),
    "empty": ((0, 4, 6), 1, "contiguous", 0.0, 1.0),
}
PARAMETERS = {"affine": ("weight", "bias"), "no bias": ("weight",), "bias alone": ("bias",), "none": ()}


def inputs_of(case: str, dtype: torch.dtype, parameters=("weight", "bias"), wide_parameters: bool = False):
    """x, weight and bias; normalized_shape; ∂L/∂y."""
    shape, dims, layout, mean, std = CASES[case]
    features = shape[len(shape) - dims :]
    of = torch.float32 if wide_parameters else dtype
    inputs = {
        "x": harness.lay_out((randn(shape, 1, torch.float64) * std + mean).to(dtype), layout),
        "weight": (randn(features, 2, torch.float64, 0.5) + 1).to(of) if "weight" in parameters else None,
        "bias": randn(features, 3, of) if "bias" in parameters else None,
    }
    return inputs, features, harness.lay_out(randn(shape, 4, dtype), layout)


def results(function, inputs, features, dy, wide=False, **options):
    leaves = harness.leaves_of(inputs, torch.float64 if wide else None)
    y = function(leaves["x"], features, leaves["weight"], leaves["bias"], **options)
    return {"y": y, **harness.gradients(y, leaves, dy)}


def assert_right(backend, case, dtype, parameters=("weight", "bias"), wide_parameters=False, **options):
    inputs, features, dy = inputs_of(case, dtype, parameters, wide_parameters)
    exact = results(reference.layer_norm, inputs, features, dy, wide=True, **options)
    eager = results(reference.layer_norm, inputs, features, dy, **options)
    with harness.only(backend, "layer_norm", "layer_norm_backward"):
        got = results(bcos_kernels.layer_norm, inputs, features, dy, **options)
    assert got["y"].dtype == dtype and got["y"].is_contiguous()
    for name, value in exact.items():
        if value is None:
            assert got[name] is None
            continue
        assert got[name].dtype == eager[name].dtype
        assert_close_to_reference(f"{case} {name}", got[name], eager[name], value, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("detach", [False, True], ids=["training", "explaining"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients(backend, case, detach, dtype):
    assert_right(backend, case, DTYPES[dtype], detach=detach)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("case", ["odd", "two dimensions"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters(backend, case, parameters, dtype):
    assert_right(backend, case, DTYPES[dtype], PARAMETERS[parameters], wide_parameters=True, eps=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["rows", "two dimensions", "strided"])
def test_is_torch_s(case, dtype):
    """An oracle that is not ours: outputs and gradients of F.layer_norm in float64."""
    inputs, features, dy = inputs_of(case, DTYPES[dtype])
    exact = results(F.layer_norm, inputs, features, dy, wide=True)
    got = results(bcos_kernels.layer_norm, inputs, features, dy)
    for name, value in exact.items():
        assert_close_to_reference(name, got[name], None, value, DTYPES[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("shape", [(2, 6, 5, 4), (3, 6), (2, 6, 5), (2, 6, 3, 2, 2)], ids=str)
def test_channels_first(shape, layout, backend):
    """Torchvision's LayerNorm2d: over dimension 1, channels_last out."""
    if layout == "channels_last" and len(shape) != 4:
        layout = "contiguous"
    x = harness.lay_out(randn(shape, 1, torch.float64), layout).requires_grad_()
    weight, bias = (randn((6,), i, torch.float64).requires_grad_() for i in (2, 3))
    y = F.layer_norm(x.movedim(1, -1), (6,), weight, bias).movedim(-1, 1)
    dy = randn(shape, 4, torch.float64)
    expected = torch.autograd.grad(y, (x, weight, bias), dy)
    with harness.only(backend, "layer_norm", "layer_norm_backward"):
        got = bcos_kernels.layer_norm(x, 6, weight, bias, channels_first=True)
        gradients = torch.autograd.grad(got, (x, weight, bias), dy)
    assert got.movedim(1, -1).is_contiguous()
    for mine, theirs in zip((got, *gradients), (y, *expected), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-13)


# Where the formulas have holes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_rows(backend, dtype):
    """Variance 0: the output is the bias, and gradients are finite and those of the definition."""
    dtype = DTYPES[dtype]
    x = torch.tensor([0.0, 3.0, -1e4], dtype=dtype)[:, None].repeat(1, 24).requires_grad_()
    bias, dy = randn((24,), 3, dtype), randn((3, 24), 4, dtype)
    with bcos_kernels.backend(backend):
        y = bcos_kernels.layer_norm(x, 24, None, bias)
        (dx,) = torch.autograd.grad(y, x, dy)
    assert_close_to_reference("y", y, None, bias.double().expand(3, 24), dtype)
    expected = (dy.double() - dy.double().mean(1, keepdim=True)) / 1e-5**0.5
    if dtype != torch.float16:  # 316 times dy is no number that it has many of
        assert_close_to_reference("dx", dx, None, expected, dtype)
    assert torch.isfinite(dx).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_stays_in_its_row(value, backend):
    x, dy = randn((6, 37), 1, torch.float32), randn((6, 37), 2, torch.float32)
    exact = x.clone().double().requires_grad_()
    clean = [0, 1, 2, 4, 5]
    (expected,) = torch.autograd.grad(reference.layer_norm(exact, 37), exact, dy.double())
    x[3, 11] = value
    x.requires_grad_()
    with bcos_kernels.backend(backend):
        y = bcos_kernels.layer_norm(x, 37)
        (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.isnan(y[3]).any() and torch.isnan(dx[3]).all()
    assert torch.isfinite(y[clean]).all()
    assert_close_to_reference("dx", dx[clean], None, expected[clean], torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape, features", [((0, 5), (5,)), ((3, 0), (0,)), ((0, 2, 5), (2, 5)), ((4, 0, 5), (5,))])
def test_nothing(shape, features, backend):
    x, weight = torch.ones(shape, requires_grad=True), torch.ones(features, requires_grad=True)
    bias = torch.ones(features, requires_grad=True)
    with bcos_kernels.backend(backend):
        y = bcos_kernels.layer_norm(x, features, weight, bias)
        gradients = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert y.shape == shape
    for g, t in zip(gradients, (x, weight, bias), strict=True):
        assert g.shape == t.shape and not g.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_feature_has_no_gradient(backend):
    x, weight = randn((9, 1), 1, torch.float32).requires_grad_(), torch.full((1,), 1.7)
    with bcos_kernels.backend(backend):
        for detach in (False, True):
            (dx,) = torch.autograd.grad(bcos_kernels.layer_norm(x, 1, weight, detach=detach).square().sum(), x)
            assert not dx.any()


# Derivatives ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["odd", "two dimensions"])
def test_gradcheck(case):
    shape, dims = {"odd": ((2, 3, 5), 1), "two dimensions": ((2, 2, 3), 2)}[case]
    features = shape[len(shape) - dims :]
    leaves = [randn(s, i, torch.float64).requires_grad_() for i, s in enumerate((shape, features, features))]

    def function(x, weight, bias):
        return bcos_kernels.layer_norm(x, features, weight, bias)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("detach", [False, True], ids=["training", "explaining"])
@pytest.mark.parametrize("dims", [1, 2])
def test_second_and_third_derivatives_are_the_definition_s(dims, detach):
    shape = (3, 4, 6)
    features = shape[3 - dims :]
    leaves = [randn(s, i, torch.float64).requires_grad_() for i, s in enumerate((shape, features, features))]

    def function(module):
        return lambda x, weight, bias: module.layer_norm(x, features, weight, bias, detach=detach)

    got, expected = (harness.second_derivatives(function(m), leaves) for m in (bcos_kernels, reference))
    for order in (0, 1):
        for mine, theirs in zip(got[order], expected[order], strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)

    def third(module):
        y = function(module)(*leaves)
        (first,) = torch.autograd.grad(y.pow(3).sum(), leaves[0], create_graph=True)
        (second,) = torch.autograd.grad(first.pow(3).sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(second.square().sum(), leaves[:2])

    for mine, theirs in zip(third(bcos_kernels), third(reference), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_the_variance_is_constant_when_explaining_and_the_mean_is_not():
    """x = (3, 7): mean 5, standard deviation 2; ∂y/∂x = (I − 1/2)/2, in training 0 where there are two values."""
    x = torch.tensor([[3.0, 7.0]], dtype=torch.float64)

    def jacobian(detach):
        of_x = torch.func.jacrev(lambda x: bcos_kernels.layer_norm(x, 2, eps=0.0, detach=detach))
        return of_x(x).view(2, 2)

    assert torch.allclose(jacobian(True), torch.tensor([[0.25, -0.25], [-0.25, 0.25]], dtype=torch.float64))
    assert jacobian(False).abs().max() < 1e-12


# As torch sees the op -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("emits", [False, True])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("grad", [False, True], ids=["constant", "leaf"])
@pytest.mark.parametrize("case, dtype", [("odd", "fp32"), ("two dimensions", "bf16"), ("strided", "fp64")])
def test_opcheck(case, dtype, grad, detach, emits):
    inputs, features, dy = inputs_of(case, DTYPES[dtype])
    x, weight, bias = inputs.values()
    dims = len(features)
    y, mean, rstd, _ = OPS.layer_norm(x, dims, weight, bias, 1e-5, detach)
    leaves = [t.clone().requires_grad_(grad) for t in (x, weight, bias)]
    coarse = {"atol": 4e-2, "rtol": 4e-2} if dtype == "bf16" else {}
    torch.library.opcheck(OPS.layer_norm.default, (leaves[0], dims, *leaves[1:], 1e-5, detach, emits), **coarse)
    torch.library.opcheck(
        OPS.layer_norm_backward.default,
        (dy.requires_grad_(grad), leaves[0], dims, *leaves[1:], mean, rstd, 1e-5, detach, [True, True, True], ""),
        **coarse,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "strided", "transposed", "expanded"])
@pytest.mark.parametrize("shape, dims", [((0, 6), 1), ((1, 6), 1), ((5, 1), 1), ((2, 3, 1), 2), ((2, 3, 1, 4), 1)])
def test_strides_that_fakes_announce(shape, dims, layout, backend):
    x = harness.lay_out(torch.ones(shape), layout)
    weight = torch.ones(shape[len(shape) - dims :])
    with bcos_kernels.backend(backend):
        for emits in (False, True):
            call = (x, dims, weight, weight.clone(), 1e-5, False, emits)
            got = OPS.layer_norm(*call)
            meta = OPS.layer_norm(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in call))
            assert [(t.shape, t.stride(), t.dtype) for t in got] == [(t.shape, t.stride(), t.dtype) for t in meta]
        _, mean, rstd, _ = got
        call = (x, x, dims, weight, weight.clone(), mean, rstd, 1e-5, False, [True] * 3, "")
        got = OPS.layer_norm_backward(*call)
        meta = OPS.layer_norm_backward(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in call))
        assert [(t.shape, t.stride(), t.dtype) for t in got] == [(t.shape, t.stride(), t.dtype) for t in meta]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(compiler):
    """One graph, also for other numbers of rows; the linear layer behind it included."""
    torch.compiler.reset()
    weight, bias = randn((12,), 2, torch.float64).requires_grad_(), randn((12,), 3, torch.float64).requires_grad_()
    w = randn((5, 12), 5, torch.float64).requires_grad_()

    def function(x, module=bcos_kernels):
        return module.linear(module.layer_norm(x, (12,), weight, bias), w)

    compiled = torch.compile(function, fullgraph=True, backend=compiler, dynamic=True)
    for rows in (7, 9):
        x = randn((rows, 12), rows, torch.float64).requires_grad_()
        leaves = (x, weight, bias, w)
        got, expected = (torch.autograd.grad(f.square().sum(), leaves) for f in (compiled(x), function(x, reference)))
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-11)


def test_exported():
    class Norm(torch.nn.Module):
        def forward(self, x):
            return bcos_kernels.layer_norm(x, 12, detach=True)

    example = randn((7, 12), 1, torch.float64)
    program = torch.export.export(Norm(), (example,), dynamic_shapes=({0: torch.export.Dim("rows", min=1)},))
    assert "bcos_kernels.layer_norm.default" in program.graph_module.code.replace("torch.ops.", "")
    x = randn((9, 12), 2, torch.float64).requires_grad_()
    got, expected = (
        torch.autograd.grad(f(x).pow(3).sum(), x)[0]
        for f in (program.module(), lambda x: reference.layer_norm(x, 12, detach=True))
    )
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("detach", [False, True], ids=["training", "explaining"])
@pytest.mark.parametrize("in_dims", [(0, None, None), (1, None, None), (None, 0, None), (0, 0, 0), (2, None, 1)])
def test_vmap(in_dims, detach):
    """Batched x runs as one call, batched parameters by samples; gradients of either."""
    x, weight, bias = randn((4, 5, 6), 1, torch.float64), randn((6,), 2, torch.float64), randn((6,), 3, torch.float64)
    tensors = [
        t if d is None else torch.stack([t, 2 * t + 1, t.flip(0)], d)
        for t, d in zip((x, weight, bias), in_dims, strict=True)
    ]

    def value(module):
        return lambda *tensors: module.layer_norm(tensors[0], 6, *tensors[1:], detach=detach)

    def gradients(module):
        def loss(*tensors):
            return value(module)(*tensors).pow(3).sum()

        return torch.func.grad(loss, (0, 1, 2))

    for make in (value, gradients):
        got, expected = (torch.func.vmap(make(m), in_dims)(*tensors) for m in (bcos_kernels, reference))
        for mine, theirs in zip(*((t if isinstance(t, tuple) else (t,)) for t in (got, expected)), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-11)


def test_jacobians_and_hessians():
    x, weight = randn((5,), 1, torch.float64), randn((5,), 2, torch.float64)
    for transform in (torch.func.jacrev, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        got, expected = (transform(lambda x, m=m: m.layer_norm(x, 5, weight))(x) for m in (bcos_kernels, reference))
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-11)


def test_in_place_neighbours_and_checkpointing():
    """The output is the user's; nothing of it is kept."""
    inputs, features, dy = inputs_of("threads", torch.float32)

    def block(x, weight, bias, layer=bcos_kernels.layer_norm):
        y = layer(x, features, weight, bias)
        y += 1
        return y.relu_()

    leaves = harness.leaves_of(inputs)
    expected = torch.autograd.grad(block(*leaves.values(), F.layer_norm), list(leaves.values()), dy)
    forms = (
        block,
        lambda *given: checkpoint(block, *given, use_reentrant=False),
        lambda *given: checkpoint(block, *given, use_reentrant=True),
    )
    for function in forms:
        y = function(*leaves.values())
        y.backward(dy)
        for t, theirs in zip(leaves.values(), expected, strict=True):
            assert torch.allclose(t.grad, theirs, rtol=1e-4, atol=1e-4)
            t.grad = None
    with torch.autograd.graph.save_on_cpu():
        y = block(*leaves.values())
    for mine, theirs in zip(torch.autograd.grad(y, list(leaves.values()), dy), expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_changed_input_is_an_error():
    x = randn((5, 8), 1, torch.float32).requires_grad_()
    h = x * 2
    y = bcos_kernels.layer_norm(h, 8)
    h += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def kept_bytes(function) -> tuple[int, torch.Tensor]:
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    return sum(event.self_cpu_memory_usage for event in profile.key_averages()), result


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_no_more_bytes_are_kept_than_torch_keeps(layout):
    x = harness.lay_out(randn((64, 24), 1, torch.float32), layout).requires_grad_()
    weight, bias = torch.ones(24, requires_grad=True), torch.zeros(24, requires_grad=True)
    mine, y = kept_bytes(lambda: bcos_kernels.layer_norm(x, 24, weight, bias))
    theirs, z = kept_bytes(lambda: F.layer_norm(x, (24,), weight, bias))
    of_squares = 4 * 64  # y's own, as long as y lives
    assert mine - of_squares <= theirs, (mine, theirs)
    assert torch.allclose(y, z, atol=1e-5)


def test_only_the_gradients_that_are_asked_for(monkeypatch):
    leaves = harness.leaves_of(inputs_of("rows", torch.float32)[0])
    asked = []
    run = bcos_kernels.dispatch.run

    def noting(op, direction, x, arguments, *rest):
        if direction == "backward":
            asked.append(arguments[-3:])
        return run(op, direction, x, arguments, *rest)

    monkeypatch.setattr(bcos_kernels.dispatch, "run", noting)
    y = bcos_kernels.layer_norm(leaves["x"], 96, leaves["weight"], leaves["bias"])
    for name in leaves:
        torch.autograd.grad(y.sum(), leaves[name], retain_graph=True)
    assert asked == [(True, False, False), (False, True, False), (False, False, True)]


def test_runs_repeat_bit_for_bit():
    inputs, features, dy = inputs_of("threads", torch.float32)
    first, second = (results(bcos_kernels.layer_norm, inputs, features, dy) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_any_number_of_threads():
    inputs, features, dy = inputs_of("threads", torch.float64)
    expected = results(reference.layer_norm, inputs, features, dy)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            got = results(bcos_kernels.layer_norm, inputs, features, dy)
            for name, value in expected.items():
                assert torch.allclose(got[name], value, rtol=1e-11, atol=1e-12), (name, threads)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_autocast_on_cpus_is_torch_s(dtype):
    """There layer_norm is not cast: the output has x's type, whatever the parameters'."""
    x, weight = randn((5, 8), 1, DTYPES[dtype]), torch.ones(8)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = bcos_kernels.layer_norm(x, 8, weight), F.layer_norm(x, (8,), weight)
        assert y.dtype == expected.dtype == DTYPES[dtype]
    assert torch.allclose(y.float(), expected.float(), rtol=1e-2, atol=1e-2)


def test_autocast_elsewhere_is_in_float32(monkeypatch):
    """As torch's on GPUs; of a device that there is none of, by its fakes."""
    x = torch.empty(5, 8, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(bcos_kernels.functional, "_autocast_dtype", lambda x: torch.bfloat16)
    assert bcos_kernels.layer_norm(x, 8).dtype == torch.float32
    assert bcos_kernels.layer_norm(torch.ones(5, 8, dtype=torch.bfloat16), 8).dtype == torch.bfloat16


# What it leaves for the next layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("between", ["nothing", "Identity", "Dropout(0)"])
def test_a_linear_layer_finds_the_norms(between, backend, dtype):
    dtype = DTYPES[dtype]
    x, w = randn((4, 10, 40), 1, dtype), randn((24, 40), 2, dtype, 0.2)
    module = {"nothing": lambda y: y, "Identity": torch.nn.Identity(), "Dropout(0)": torch.nn.Dropout(0.0)}[between]
    with bcos_kernels.backend(backend):
        y = module(bcos_kernels.layer_norm(x, 40, randn((40,), 3, dtype)))
        left = squares_of(y, FEATURES)
        assert squares_of(y, CHANNELS) is None and not left.requires_grad
        wide = reference.statistics_dtype(dtype)
        assert_close_to_reference("squares", left, None, y.double().square().sum(-1).flatten(), wide)
        with_norms, without = bcos_kernels.linear(y, w), bcos_kernels.linear(y.clone(), w)
        assert (with_norms - without).double().norm() <= 2e-3 * without.double().norm()
        y._bcos_squares = (4 * left, *y._bcos_squares[1:])
        if backend == "cpu":  # was it given them at all?
            assert not torch.allclose(bcos_kernels.linear(y, w).float(), without.float(), rtol=0.1)


def test_a_convolution_finds_the_norms_of_channels_first():
    x = harness.lay_out(randn((3, 8, 5, 4), 1, torch.float32), "channels_last")
    w = randn((6, 8, 2, 2), 2, torch.float32)
    y = bcos_kernels.layer_norm(x, 8, channels_first=True)
    left = squares_of(y, CHANNELS)
    assert left.shape == (3, 5, 4) and squares_of(y, FEATURES) is None
    assert torch.allclose(left, y.square().sum(1), rtol=1e-5)
    expected = bcos_kernels.conv2d(y.clone(memory_format=torch.channels_last), w)
    assert torch.allclose(bcos_kernels.conv2d(y, w), expected, rtol=1e-5, atol=1e-5)
    y._bcos_squares = (4 * left, *y._bcos_squares[1:])
    assert not torch.allclose(bcos_kernels.conv2d(y, w), expected, rtol=0.1)


def test_where_none_are_left():
    x = randn((3, 4, 8), 1, torch.float32)
    for y in (
        bcos_kernels.layer_norm(x, (4, 8)),
        bcos_kernels.layer_norm(x, 4, channels_first=True),
        bcos_kernels.layer_norm(x[:0], 8),
        bcos_kernels.layer_norm(x[0, 0], 8),
        bcos_kernels.layer_norm(x, 8) + 1,
        bcos_kernels.layer_norm(x, 8).mul_(2),
    ):
        assert squares_of(y, FEATURES) is None and squares_of(y, CHANNELS) is None


def test_gradients_of_what_lies_between():
    """All that flows through the next layer's norm reaches y, also for who asks for y's gradient."""
    x, w = randn((5, 8), 1, torch.float64).requires_grad_(), randn((4, 8), 2, torch.float64).requires_grad_()

    def gradients(module):
        y = module.layer_norm(x, 8)
        return torch.autograd.grad(module.linear(y, w).square().sum(), (y, x, w))

    for mine, theirs in zip(gradients(bcos_kernels), gradients(reference), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def test_recomputed():
    """An activation that is declared so is no longer kept by the layer norm that reads it."""
    x, w = randn((6, 8), 1, torch.float64).requires_grad_(), randn((8, 8), 2, torch.float64).requires_grad_()

    def gradients(recompute):
        h = bcos_kernels.linear(x, w)
        if recompute:
            h = bcos_kernels.recomputed(h, bcos_kernels.linear, x, w)
        y = bcos_kernels.layer_norm(h, 8)
        assert all(t is None or t.data_ptr() != h.data_ptr() for t in y.grad_fn.saved_tensors) == recompute
        return torch.autograd.grad(y.pow(3).sum(), (x, w))

    for mine, theirs in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(mine, theirs)
