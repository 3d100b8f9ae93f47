"""linear_gelu against its definition, and what is particular to it; options of linear are tested in test_linear.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bcos_kernels
from bcos_kernels import reference
from bcos_kernels.recompute import recipe_of
from bcos_kernels.squares import CHANNELS, FEATURES, squares_of
from tests.bcos_kernels import harness
from tests.bcos_kernels.harness import BACKENDS, DTYPES, kept_bytes, randn
from tests.bcos_kernels.tolerances import assert_close_to_reference

# rows, in, out: a product that runs in blocks of rows, one with a weight too large for it, odd sizes, one row, none
CASES = {"blocks": (600, 64, 96), "large weight": (40, 520, 530), "odd": (7, 5, 9), "one row": (1, 8, 16),
         "empty": (0, 4, 6)}  # fmt: skip
OPTIONS = {
    "b 2": {},
    "normalised": {"normalize_weight": True},
    "detached": {"detach": True},
    "b 1": {"b": 1},
    "b 1.5": {"b": 1.5},
    "max_out 2": {"max_out": 2},
}


definition = harness.linear_gelu(reference)


def case(name, dtype, max_out=1, bias=True):
    rows, k, n = CASES[name]
    if max_out > 1:  # exact products: which unit is the largest does not depend on rounding
        weight = harness.signs((n * max_out, k), 2, dtype, nonzeros=min(k, 4))
        return {"x": harness.integers((rows, k), 1, dtype), "weight": weight, "bias": None}
    scale = 3 / k**0.5  # outputs of both signs, where the GELU bends
    return {
        "x": randn((rows, k), 1, dtype),
        "weight": randn((n * max_out, k), 2, dtype, scale),
        "bias": randn((n * max_out,), 3, dtype) if bias else None,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients(backend, name, options, dtype):
    dtype, options = DTYPES[dtype], OPTIONS[options]
    inputs = case(name, dtype, options.get("max_out", 1), bias="normalize_weight" not in options)
    leaves, wide = harness.leaves_of(inputs), harness.leaves_of(inputs, torch.float64)
    eager = harness.leaves_of(inputs)
    oracle = definition(*wide.values(), **options)
    dy = randn(tuple(oracle.shape), 4, dtype)
    expected = {"h": oracle, **harness.gradients(oracle, wide, dy.double())}
    y = definition(*eager.values(), **options)
    rough = {"h": y, **harness.gradients(y, eager, dy)}
    with harness.only(backend, "linear_gelu", "linear_gelu_backward"):
        h = bcos_kernels.linear_gelu(*leaves.values(), **options)
        got = {"h": h, **harness.gradients(h, leaves, dy)}
    assert h.dtype == dtype
    for key, value in expected.items():
        if value is None:
            assert got[key] is None
            continue
        assert_close_to_reference(key, got[key], rough[key], value, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_learnable_exponent(backend):
    inputs = case("odd", torch.float64)
    b = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    leaves, wide = harness.leaves_of(inputs), harness.leaves_of(inputs)
    with bcos_kernels.backend(backend):
        h = bcos_kernels.linear_gelu(*leaves.values(), b=b)
        (db,) = torch.autograd.grad(h.square().sum(), b)
    (expected,) = torch.autograd.grad(definition(*wide.values(), b=b).square().sum(), b)
    assert torch.allclose(db, expected, rtol=1e-10)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, -1e-30, 30.0, -30.0, 1e4, -1e4, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_the_gate_from_end_to_end(value, dtype):
    """x = weight = √|v| in one dimension: y is v, however large or small."""
    x = torch.tensor([[abs(value) ** 0.5, 0.0]], dtype=DTYPES[dtype])
    w = torch.tensor([[abs(value) ** 0.5, 0.0]], dtype=DTYPES[dtype]) * (-1 if value < 0 else 1)
    x.requires_grad_()
    with bcos_kernels.backend("cpu"):
        h = bcos_kernels.linear_gelu(x, w)
        (dx,) = torch.autograd.grad(h.sum(), x)
    wide = x.detach().double().requires_grad_()
    expected = definition(wide, w.double())
    (expected_dx,) = torch.autograd.grad(expected.sum(), wide)
    assert torch.allclose(h.double(), expected, rtol=1e-5, atol=1e-30, equal_nan=True)
    if torch.isfinite(expected).all():
        assert torch.allclose(dx.double(), expected_dx, rtol=1e-5, atol=1e-30)


def test_gates_of_many_values():
    """Φ and its derivative over the range in which they change, by the op itself, to float32's rounding."""
    y = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    root = y.abs().sqrt()
    x = torch.stack([root, torch.zeros_like(root)], 1).float()
    sign = torch.where(y < 0, -1.0, 1.0)
    signed = x * sign.float()[:, None]
    weight = torch.tensor([[1.0, 0.0]])
    h = bcos_kernels.linear_gelu(signed, weight)[:, 0]
    a = signed[:, 0].double()
    exact = F.gelu(a * a.abs() / (a.abs() + 1e-12))
    assert (h.double() - exact).abs().max() < 1e-6


def test_second_derivatives():
    inputs = {k: v for k, v in case("odd", torch.float64).items() if v is not None}
    leaves = tuple(t.requires_grad_() for t in inputs.values())
    assert torch.autograd.gradcheck(bcos_kernels.linear_gelu, leaves)
    assert torch.autograd.gradgradcheck(bcos_kernels.linear_gelu, leaves)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda *given: bcos_kernels.linear_gelu(*given, detach=True), leaves)
    x, weight, bias = leaves

    def second(function):
        (w_of_x,) = torch.autograd.grad(function(x, weight, bias, detach=True).square().sum(), x, create_graph=True)
        return torch.autograd.grad(w_of_x.square().sum(), (x, weight, bias))

    for got, expected in zip(second(bcos_kernels.linear_gelu), second(definition), strict=True):
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("b", [2.0, 1.5])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_opcheck(b, dtype):
    x, weight, bias = case("odd", DTYPES[dtype]).values()
    x.requires_grad_(), weight.requires_grad_()
    for emits in (False, True):
        arguments = (x, weight, bias, None, None, b, True, 1, True, False, emits)
        torch.library.opcheck(torch.ops.bcos_kernels.linear_gelu, arguments)
    h, _, y, n, a, index = torch.ops.bcos_kernels.linear_gelu(*arguments)
    dh = torch.randn_like(h.detach())
    held = [t.detach() for t in (y, n, a, index)]
    torch.library.opcheck(
        torch.ops.bcos_kernels.linear_gelu_backward,
        (dh, x.detach(), weight.detach(), bias, None, *held, b, True, 1, False, [True, True, False, False], ""),
    )


def test_compiled_transformed_and_autocast():
    x, weight, bias = case("odd", torch.float32).values()
    expected = definition(x, weight, bias)
    compiled = torch.compile(bcos_kernels.linear_gelu, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, weight, bias), expected, rtol=1e-5, atol=1e-6)
    batched = torch.stack([x, 2 * x])
    mapped = torch.vmap(lambda x: bcos_kernels.linear_gelu(x, weight, bias))(batched)
    assert torch.allclose(mapped[0], expected, rtol=1e-5, atol=1e-6)
    jacobian = torch.func.jacrev(bcos_kernels.linear_gelu)(x[0], weight, bias)
    assert torch.allclose(jacobian, torch.func.jacrev(definition)(x[0], weight, bias), rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert bcos_kernels.linear_gelu(x, weight, bias).dtype == torch.bfloat16


def test_the_next_layer_finds_the_sums():
    x, weight, bias = case("blocks", torch.float32).values()
    h = bcos_kernels.linear_gelu(x.view(2, 300, -1), weight, bias)
    squares = squares_of(h, FEATURES)
    assert squares_of(h, CHANNELS) is None and torch.allclose(squares, h.square().sum(-1).flatten(), rtol=1e-5)
    again = randn((8, 96), 5, torch.float32)
    assert torch.allclose(bcos_kernels.linear(h, again), bcos_kernels.linear(h.clone(), again), rtol=1e-5, atol=1e-6)
    # sums over features are not a convolution's
    image = h.view(2, 300, 96, 1).permute(0, 2, 1, 3)
    kernel = randn((4, 96, 1, 1), 6, torch.float32)
    expected = reference.conv2d(image.double(), kernel.double()).float()
    assert torch.allclose(bcos_kernels.conv2d(image, kernel), expected, rtol=1e-4, atol=1e-5)


def test_only_what_is_asked_for_and_saved_tensor_hooks():
    inputs = case("blocks", torch.float64)
    leaves, wide = harness.leaves_of(inputs), harness.leaves_of(inputs)
    expected = harness.gradients(definition(*wide.values()), wide, torch.ones(600, 96, dtype=torch.float64))
    (dx,) = torch.autograd.grad(bcos_kernels.linear_gelu(*leaves.values()).sum(), leaves["x"])
    assert torch.allclose(dx, expected["dx"], rtol=1e-10)
    with torch.autograd.graph.save_on_cpu():
        h = bcos_kernels.linear_gelu(*leaves.values())
    h.mul_(2)  # the output is the user's
    for name, g in harness.gradients(h, leaves, torch.ones_like(h)).items():
        assert torch.allclose(g, 2 * expected[name], rtol=1e-10)

@pytest.mark.parametrize("b", [2, 1.5, "learnable"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_computed_again_has_the_same_bits(backend, dtype, b):
    """h for the layer behind, over rows of tokens, which are a view of what the ops see."""
    dtype = DTYPES[dtype]
    x, w1, w2 = (randn(shape, seed, dtype, 0.4) for seed, shape in enumerate([(3, 20, 33), (70, 33), (5, 70)], 1))
    exponent = randn((), 7, dtype).abs().float() + 1 if b == "learnable" else b

    def gradients(recompute):
        leaves = [t.clone().requires_grad_() for t in (x, w1, w2)]
        if isinstance(exponent, torch.Tensor):
            leaves.append(exponent.clone().requires_grad_())
        power = leaves[3] if len(leaves) == 4 else b
        with bcos_kernels.backend(backend):
            h = bcos_kernels.linear_gelu(leaves[0], leaves[1], b=power, recompute=recompute)
            assert (recipe_of(h) is not None) == (recompute is not None)
            y = bcos_kernels.linear(h, leaves[2])
            return torch.autograd.grad(y.square().sum(), leaves)

    for got, expected in zip(gradients("output"), gradients(None), strict=True):
        assert torch.equal(got, expected)


def leaves_of_shapes(*shapes):
    return [randn(shape, seed, torch.float32).requires_grad_() for seed, shape in enumerate(shapes, 1)]


def test_what_is_computed_again_is_not_kept():
    x, w1, w2 = leaves_of_shapes((64, 16), (256, 16), (16, 256))

    def kept(recompute):
        return kept_bytes(lambda: bcos_kernels.linear(bcos_kernels.linear_gelu(x, w1, recompute=recompute), w2))

    assert kept(None) - kept("output") == 64 * 256 * 4 + 64 * 4  # h, and its sums of squares that lie with it


def test_changed_in_place_the_output_is_kept():
    x, w1, w2 = leaves_of_shapes((9, 6), (8, 6), (4, 8))

    def gradients(recompute):
        h = bcos_kernels.linear_gelu(x, w1, recompute=recompute)
        h += 1
        return torch.autograd.grad(bcos_kernels.linear(h, w2).square().sum(), (x, w1, w2))

    for got, expected in zip(gradients("output"), gradients(None), strict=True):
        assert torch.equal(got, expected)


def test_errors_name_it():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"linear_gelu: expected x.size\(-1\) == weight.size\(1\)"):
        bcos_kernels.linear_gelu(x, torch.ones(2, 4))
    with pytest.raises(ValueError, match="linear_gelu: expected b >= 1"):
        bcos_kernels.linear_gelu(x, torch.ones(2, 3), b=0.5)
    with pytest.raises(ValueError, match="linear_gelu: expected recompute to be None or 'output', got 'both'"):
        bcos_kernels.linear_gelu(torch.ones(2, 4), torch.ones(3, 4), recompute="both")
