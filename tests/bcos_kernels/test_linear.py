"""linear of every backend against the float64 reference: values, gradients and explanation-mode gradients."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

import bcos_kernels
from bcos_kernels import reference
from tests.bcos_kernels import harness
from tests.bcos_kernels.tolerances import assert_close_to_reference


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...] = (37, 45)
    outputs: int = 19
    b: float = 2.0
    b_tensor: bool = False
    normalize: bool = False
    max_out: int = 1
    bias: bool = False
    layout: str = "contiguous"
    dy_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    scale: float = 1.0
    zero: str = ""  # "rows", "units", "all": what is zero
    in_place: bool = False  # the output is changed in place before the backward

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("tile-exact", shape=(64, 64), outputs=64),
    Case("odd"),
    Case("odd, normalized", normalize=True),
    Case("odd, bias", bias=True),
    Case("single row", shape=(1, 33), outputs=5),
    Case("single element", shape=(1, 1), outputs=1),
    Case("single unit, normalized", shape=(12, 40), outputs=1, normalize=True),
    Case("more columns than rows", shape=(3, 300), outputs=70),
    Case("more threads' work than one", shape=(400, 24), outputs=50),
    Case("empty", shape=(0, 5), outputs=4, bias=True),
    Case("no outputs", shape=(3, 5), outputs=0),
    Case("no inputs", shape=(3, 0), outputs=4),
    Case("one vector", shape=(45,)),
    Case("three dimensions", shape=(2, 7, 20)),
    Case("five dimensions, transposed", shape=(2, 1, 3, 4, 20), layout="transposed", b=1.5),
    Case("strided", layout="strided", dy_layout="strided", weight_layout="strided", bias=True),
    Case("transposed", layout="transposed", dy_layout="transposed", weight_layout="transposed", normalize=True),
    Case("expanded", layout="expanded", dy_layout="expanded"),
    Case("unaligned", layout="offset", dy_layout="offset", weight_layout="offset"),
    Case("zero rows", zero="rows"),
    Case("zero rows, b 1.5", zero="rows", b=1.5),
    Case("zero units, normalized", zero="units", normalize=True),
    Case("zero input", zero="all", normalize=True),
    Case("zero input, b 3", zero="all", b=3.0),
    Case("values of 1e4", scale=1e4),
    Case("values of 1e4, b 1.5, normalized", scale=1e4, b=1.5, normalize=True),
    Case("b 1", b=1.0),
    Case("b 1, bias, max_out 3", b=1.0, bias=True, max_out=3),
    Case("b 1.5", b=1.5),
    Case("b 3, normalized, bias", b=3.0, normalize=True, bias=True),
    Case("b tensor 1.75", b=1.75, b_tensor=True),
    Case("b tensor 2, normalized, bias", b=2.0, b_tensor=True, normalize=True, bias=True),
    Case("b tensor 1", b=1.0, b_tensor=True),
    Case("max_out 2", max_out=2),
    Case("max_out 2, normalized, bias, b tensor", max_out=2, normalize=True, bias=True, b=2.5, b_tensor=True),
    Case("max_out 5, three dimensions, b 1.5", shape=(2, 9, 45), max_out=5, b=1.5),
    Case("changed in place", in_place=True, normalize=True, bias=True),
    Case("changed in place, three dimensions", shape=(2, 7, 20), in_place=True),
    Case("changed in place, max_out 3", in_place=True, max_out=3, normalize=True),
    Case("blocks of rows", shape=(2900, 60), outputs=70),
    Case("blocks of rows, fewer outputs than inputs", shape=(2900, 70), outputs=60, normalize=True),
    Case("blocks of rows, bias, b 1.5", shape=(2900, 60), outputs=70, bias=True, b=1.5),
    Case("blocks of rows, max_out 2, b tensor", shape=(2900, 60), outputs=35, max_out=2, b=2.5, b_tensor=True),
    Case("blocks of rows, changed in place", shape=(2900, 60), outputs=70, in_place=True),
    Case("a weight too large for blocks", shape=(40, 520), outputs=530, normalize=True),
]


def inputs_of(case: Case, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor | None], torch.Tensor]:
    """(x, weight, bias, b) and ∂L/∂y."""
    units, columns = case.outputs * case.max_out, case.shape[-1]
    if case.max_out > 1:
        x = harness.integers(case.shape, 1, dtype)
        weight = harness.signs((units, columns), 2, dtype)
        bias = harness.integers((units,), 3, dtype)
    else:
        x = harness.randn(case.shape, 1, dtype, case.scale)
        weight = harness.randn((units, columns), 2, dtype, max(columns, 1) ** -0.5)
        bias = harness.randn((units,), 3, dtype, 0.3)
    if case.zero == "rows":
        x[::3] = 0
    if case.zero == "units":
        weight[::4] = 0
    if case.zero == "all":
        x.zero_()
    # float16 holds the gradients of large inputs if ∂L/∂y is small
    dy = harness.randn((*case.shape[:-1], case.outputs), 4, dtype, case.scale**-0.5)
    wide = reference.statistics_dtype(dtype)
    return {
        "x": harness.lay_out(x, case.layout),
        "weight": harness.lay_out(weight, case.weight_layout),
        "bias": bias if case.bias else None,
        "b": torch.tensor(case.b, dtype=wide) if case.b_tensor else None,
    }, harness.lay_out(dy, case.dy_layout)


def differentiate(function, case: Case, leaves, dy, detach: bool) -> dict[str, torch.Tensor | None]:
    y = function(
        leaves["x"],
        leaves["weight"],
        leaves["bias"],
        b=case.b if leaves["b"] is None else leaves["b"],
        normalize_weight=case.normalize,
        max_out=case.max_out,
        detach=detach,
    )
    value = y.detach().clone()
    if case.in_place and function is bcos_kernels.linear:
        y += 1
    return {"y": value, **harness.gradients(y, leaves, dy)}


def terms_of_db(case: Case, inputs, dy) -> torch.Tensor:
    """What ∂L/∂B is the sum of: g y log c."""
    exact = {name: None if t is None else t.detach().double() for name, t in inputs.items()}
    options = dict(normalize_weight=case.normalize, max_out=case.max_out)
    a = reference.linear(exact["x"], exact["weight"], exact["bias"], b=1.0, **options)
    y = reference.linear(exact["x"], exact["weight"], exact["bias"], b=case.b, **options)
    return dy.double() * y * (a.abs() / reference.linear_norm(exact["x"]) + 1e-6).log()


@functools.lru_cache(maxsize=8)
def expectations(position: int, dtype: torch.dtype, detach: bool) -> tuple[dict, dict]:
    """(oracle in float64, eager reference in ``dtype``) of a case, which the tests of both backends are held to."""
    case = CASES[position]
    inputs, dy = inputs_of(case, dtype)
    oracle = differentiate(reference.linear, case, harness.leaves_of(inputs, torch.float64), dy, detach)
    return oracle, differentiate(reference.linear, case, harness.leaves_of(inputs), dy, detach)


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, backend, dtype):
    dtype = harness.DTYPES[dtype]
    inputs, dy = inputs_of(case, dtype)
    for detach in (False, True):
        oracle, eager = expectations(CASES.index(case), dtype, detach)
        with harness.only(backend, "linear", "linear_backward"):
            got = differentiate(bcos_kernels.linear, case, harness.leaves_of(inputs), dy, detach)
        assert got["y"].dtype == dtype and got["y"].is_contiguous()
        for name, value in got.items():
            if name == "db" and detach:
                assert value is None  # nothing flows to b; the definition agrees
                assert oracle[name] is None
                continue
            scale = terms_of_db(case, inputs, dy) if name == "db" else None
            assert_close_to_reference(f"{name}, detach={detach}", value, eager[name], oracle[name], dtype, scale)
        if not detach:
            y = got["y"]
        assert torch.equal(got["y"], y)  # the mode changes gradients alone
        if case.zero == "units":
            assert not got["dweight"][::4].any() and not got["y"][..., ::4].any()
        if case.zero == "all":
            assert not got["y"].any() and not got["dweight"].any()


@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "b"])
@pytest.mark.parametrize("b", [1.0, 2.0, 1.5])
def test_one_gradient_alone(wanted, backend, b):
    """What is not asked for changes nothing in what is."""
    case = Case("", bias=True, b=b, b_tensor=wanted == "b", normalize=True)
    inputs, dy = inputs_of(case, torch.float32)
    with harness.only(backend, "linear", "linear_backward"):
        every = differentiate(bcos_kernels.linear, case, harness.leaves_of(inputs), dy, False)
        leaves = {k: None if t is None else t.detach().requires_grad_(k == wanted) for k, t in inputs.items()}
        y = bcos_kernels.linear(
            leaves["x"], leaves["weight"], leaves["bias"], b=b if leaves["b"] is None else leaves["b"],
            normalize_weight=True,
        )  # fmt: skip
        (alone,) = torch.autograd.grad(y, leaves[wanted], dy)
    assert torch.equal(alone, every[f"d{wanted}"])


@pytest.mark.parametrize("backend", harness.BACKENDS)
def test_b_of_another_dtype(backend):
    """b's gradient comes in b's own dtype."""
    case = Case("", b=1.75, b_tensor=True)
    inputs, dy = inputs_of(case, torch.bfloat16)
    oracle = differentiate(reference.linear, case, harness.leaves_of(inputs, torch.float64), dy, False)
    for b_dtype in (torch.bfloat16, torch.float64):
        leaves = harness.leaves_of(inputs) | {"b": torch.tensor(1.75, dtype=b_dtype, requires_grad=True)}
        with harness.only(backend, "linear", "linear_backward"):
            got = differentiate(bcos_kernels.linear, case, leaves, dy, False)
        assert got["db"].dtype == b_dtype
        terms = terms_of_db(case, inputs, dy)
        assert_close_to_reference("db", got["db"], None, oracle["db"], torch.bfloat16, terms)


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("b", [1.0, 2.0, 1.5])
@pytest.mark.parametrize("max_out", [1, 3])
def test_nan_comes_out_where_it_goes_in(max_out, b, backend, dtype):
    dtype = harness.DTYPES[dtype]
    x, weight = harness.randn((5, 8), 1, dtype), harness.randn((6, 8), 2, dtype)
    x[2, 1] = float("nan")
    x[3, 0] = float("inf")
    x.requires_grad_(), weight.requires_grad_()
    with harness.only(backend, "linear", "linear_backward"):
        y = bcos_kernels.linear(x, weight, b=b, normalize_weight=True, max_out=max_out)
        y.sum().backward()
    assert y[2].isnan().all() and not torch.isfinite(y[3]).any() and torch.isfinite(y[[0, 1, 4]]).all()
    assert torch.isfinite(x.grad[[0, 1, 4]]).all()
    assert weight.grad.isnan().any()
    if b != 1:
        assert x.grad[2].isnan().all()


@pytest.mark.parametrize("backend", harness.BACKENDS)
def test_nan_in_the_weight(backend):
    x, weight = harness.randn((5, 8), 1, torch.float32), harness.randn((6, 8), 2, torch.float32)
    weight[1, 3] = float("nan")
    with harness.only(backend, "linear"):
        for options in (dict(), dict(normalize_weight=True), dict(b=1.5), dict(b=1)):
            y = bcos_kernels.linear(x, weight, **options)
            assert y[:, 1].isnan().all() and torch.isfinite(y[:, [0, 2, 3, 4, 5]]).all(), options
        y = bcos_kernels.linear(x, weight, max_out=2)
        assert y[:, 0].isnan().all() and torch.isfinite(y[:, 1:]).all()


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("b", [1.0, 2.0, 1.5])
def test_ties_go_to_the_first_unit(b, backend, dtype):
    dtype = harness.DTYPES[dtype]
    # whole numbers, of which products are exact in whatever order a library sums them
    x = harness.integers((4, 6), 1, dtype)
    weight = harness.signs((3, 6), 2, dtype).repeat_interleave(3, dim=0).requires_grad_()
    with harness.only(backend, "linear", "linear_backward"):
        bcos_kernels.linear(x, weight, b=b, max_out=3).sum().backward()
    by_unit = weight.grad.unflatten(0, (3, 3))
    assert by_unit[:, 0].abs().sum(1).all() and not by_unit[:, 1:].any()


@pytest.mark.parametrize("backend", harness.BACKENDS)
def test_256_units_an_output(backend):
    """The winning unit is kept in a byte."""
    x = torch.ones(2, 3)
    weight = torch.zeros(512, 3)
    weight[255], weight[256] = 1, 2
    weight.requires_grad_()
    with harness.only(backend, "linear", "linear_backward"):
        y = bcos_kernels.linear(x, weight, max_out=256)
        y.sum().backward()
    assert torch.allclose(y, torch.tensor([[9 / 3**0.5, 36 / 3**0.5]] * 2))
    assert weight.grad.abs().sum(1).nonzero().flatten().tolist() == [255, 256]
