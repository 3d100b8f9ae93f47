"""Cases of the Triton linear layer against the float64 reference, which test_linear.py runs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import pytest
import torch

import bcos_kernels
from bcos_kernels import reference, triton_kernels
from tests.bcos_kernels.harness import only
from tests.bcos_kernels.tolerances import assert_close_to_reference as assert_close
from tests.bcos_kernels.triton.harness import (
    DTYPES,
    exact_float32,
    lay_out,
    prepare_interpreter,
    random,
    use_descriptors,
)


@dataclass(frozen=True)
class Case:
    name: str
    rows: int = 37
    inputs: int = 45
    outputs: int = 19
    dtype: str = "fp32"
    b: float = 2.0
    b_tensor: bool = False
    normalize: bool = False
    max_out: int = 1
    bias: bool = False
    layout: str = "contiguous"
    dy_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    scale: float = 1.0
    recompute: bool = False  # backward without y, as after an in-place change of the output
    squares: bool = False  # Σ x² of the rows is given
    zero_row: int | None = None
    zero_unit: int | None = None

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}"


def _across_dtypes(*cases: Case) -> list[Case]:
    return [replace(case, dtype=dtype) for case in cases for dtype in DTYPES]


CASES = [
    *_across_dtypes(
        Case("odd"),
        Case("general b, normalized, bias", b=1.5, normalize=True, bias=True),
        Case("max_out 2, b tensor", b=1.75, b_tensor=True, max_out=2),
        Case("recomputed", recompute=True, normalize=True, max_out=2, bias=True),
        Case("b 1, bias, max_out 3", b=1.0, bias=True, max_out=3, outputs=9),
        Case("squares given", squares=True),
    ),
    Case("squares given, several tiles", squares=True, rows=70, inputs=70, outputs=70, normalize=True, max_out=2),
    Case("squares given, general b", squares=True, b=1.5),
    Case("squares given, b 1", squares=True, b=1.0),
    Case("squares given, zero rows", squares=True, zero_row=3, dtype="fp16"),
    Case("squares given, values of 1e4", squares=True, scale=1e4, dtype="fp16"),
    Case("tile-exact", rows=64, inputs=64, outputs=64),
    Case("several tiles, splits", rows=300, inputs=70, outputs=70, dtype="bf16"),
    Case("several tiles, splits", rows=300, inputs=70, outputs=140),
    Case("single row", rows=1, inputs=33, outputs=5),
    Case("single element", rows=1, inputs=1, outputs=1),
    Case("b 2.5 tensor, normalized, max_out 2, bias", b=2.5, b_tensor=True, normalize=True, max_out=2, bias=True),
    Case("b 6", b=6.0),
    Case("b tensor 1", b=1.0, b_tensor=True),
    Case("recomputed, general b", recompute=True, b=1.25),
    Case("normalized, max_out 5", normalize=True, max_out=5, outputs=7),
    Case("strided", layout="strided", dy_layout="strided", weight_layout="strided"),
    Case("transposed", layout="transposed", dy_layout="transposed", weight_layout="transposed", bias=True),
    Case("expanded", layout="expanded", dy_layout="expanded", dtype="bf16"),
    Case("unaligned", layout="offset", dy_layout="offset", weight_layout="offset", rows=32, inputs=32, outputs=32),
    Case("zero rows", zero_row=3, zero_unit=2, normalize=True),
    Case("zero rows", zero_row=3, zero_unit=2, normalize=True, dtype="fp16"),
    Case("zero rows, general b", zero_row=3, b=1.5),
    Case("zero rows, bias", zero_row=3, bias=True),
    Case("values of 1e4", scale=1e4, dtype="fp16"),
    Case("values of 1e4, general b", scale=1e4, dtype="fp16", b=1.5, normalize=True),
]

# taken by tensor descriptors where there are any: tiles in both directions, none of them full
DESCRIPTOR_CASES = [
    Case("descriptors", rows=150, inputs=72, outputs=136, dtype="bf16", normalize=True, bias=True),
    Case("descriptors", rows=150, inputs=72, outputs=136, dtype="fp16", squares=True),
    Case("descriptors, tall", rows=150, inputs=136, outputs=64, dtype="bf16", b=1.5, squares=True),
    Case("descriptors, twice the columns", rows=150, inputs=64, outputs=256, dtype="bf16"),
    Case("descriptors, splits", rows=600, inputs=40, outputs=64, dtype="bf16", b=1.0, bias=True),
]
CASES += DESCRIPTOR_CASES


def _inputs(case: Case, device: str) -> dict[str, torch.Tensor | None]:
    dtype = DTYPES[case.dtype]
    units = case.outputs * case.max_out
    x = random((case.rows, case.inputs), 1, dtype, device, case.scale)
    weight = random((units, case.inputs), 2, dtype, device, case.inputs**-0.5)
    if case.zero_row is not None:
        x[case.zero_row] = 0
    if case.zero_unit is not None:
        weight[case.zero_unit] = 0
    bias = random((units,), 3, dtype, device, 0.1) if case.bias else None
    # gradients of large inputs stay within float16
    dy = random((case.rows, case.outputs), 4, dtype, device, case.scale**-0.5)
    b_tensor = torch.tensor(case.b, device=device) if case.b_tensor else None
    if case.bias and case.zero_row is not None:
        dy[case.zero_row] = 0  # y = β|β|/1e-12 there: only the output is compared
    return {
        "x": lay_out(x, case.layout),
        "weight": lay_out(weight, case.weight_layout),
        "bias": bias,
        "dy": lay_out(dy, case.dy_layout),
        "b": b_tensor,
    }


def _oracle(case: Case, inputs: dict, dtype: torch.dtype, detach: bool) -> dict[str, torch.Tensor | None]:
    """y and the gradients by autograd through the definition, computed in ``dtype``."""
    leaves = {k: None if t is None else t.detach().to(dtype).requires_grad_() for k, t in inputs.items() if k != "dy"}
    b = case.b if leaves["b"] is None else leaves["b"]
    y = reference.linear(
        leaves["x"], leaves["weight"], leaves["bias"], b=b, normalize_weight=case.normalize, max_out=case.max_out,
        detach=detach,
    )  # fmt: skip
    y.backward(inputs["dy"].to(dtype))
    return {"y": y.detach()} | {f"d{k}": None if t is None else t.grad for k, t in leaves.items()}


def check(case: Case, device: str) -> None:
    """Forward, training and explanation gradients of one case against the oracle."""
    dtype, inputs = DTYPES[case.dtype], _inputs(case, device)
    x, weight, bias, dy = inputs["x"], inputs["weight"], inputs["bias"], inputs["dy"]
    options = (case.b if inputs["b"] is None else 0.0, inputs["b"])
    squares = x.float().square().sum(1) if case.squares else None
    y, n, a, index = triton_kernels.linear_forward(
        x, weight, bias, *options, case.normalize, case.max_out, True, squares
    )
    assert y.dtype == dtype and y.is_contiguous()
    is_one = case.b == 1 and not case.b_tensor
    assert n.shape == ((0,) if is_one else (case.rows,)) and n.dtype == torch.float32
    keeps_a = case.b_tensor or case.b not in (1, 2) or (case.b == 2 and case.dtype == "fp16")
    assert a.shape == ((case.rows, case.outputs) if keeps_a else (0,))
    assert index.shape == ((case.rows, case.outputs) if case.max_out > 1 else (0,))
    if not is_one:
        assert_close("n", n, None, reference.linear_norm(x.double()).squeeze(-1), torch.float32)
    held = (None, n[:0], a[:0], index) if case.recompute else (y, n, a, index)
    for detach in (False, True):
        exact = _oracle(case, inputs, torch.float64, detach)
        eager = _oracle(case, inputs, dtype, detach)
        if not detach:
            assert_close("y", y, eager["y"], exact["y"], dtype)
        needs = (True, True, case.bias, case.b_tensor)
        dx, dw, dbias, db = triton_kernels.linear_backward(
            dy, x, weight, bias, *options, *held, case.normalize, case.max_out, detach, *needs
        )
        assert_close(f"dx, detach={detach}", dx, eager["dx"], exact["dx"], dtype)
        assert_close(f"dw, detach={detach}", dw, eager["dweight"], exact["dweight"], dtype)
        if case.zero_unit is not None:
            assert not dw[case.zero_unit].any()
        if case.bias:
            assert_close(f"dbias, detach={detach}", dbias, eager["dbias"], exact["dbias"], dtype)
        if case.b_tensor and detach:
            assert db.shape == () and db.item() == 0
        elif case.b_tensor:
            wide = reference.linear_norm(x.double())
            pre_scale = a if a.numel() else exact["y"]
            terms = dy.double() * exact["y"] * (pre_scale.double().abs() / wide + 1e-6).log()
            assert db.dtype == torch.float32
            assert_close("db", db, None, exact["db"], dtype, scale=terms)


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    prepare_interpreter()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case):
    check(case, "cpu")


@pytest.mark.parametrize("case", DESCRIPTOR_CASES, ids=str)
def test_descriptors(case, monkeypatch):
    ran = use_descriptors(monkeypatch)
    check(case, "cpu")
    assert set(ran) == {"forward", "backward_dx", "backward_dw"}


@pytest.mark.parametrize("layout", ["offset", "strided", "transposed", "expanded"])
def test_what_descriptors_cannot_describe(layout, monkeypatch):
    ran = use_descriptors(monkeypatch)
    case = Case("not described", rows=80, inputs=64, outputs=64, dtype="bf16", layout=layout, weight_layout=layout)
    inputs = _inputs(case, "cpu")
    y, *_ = triton_kernels.linear_forward(inputs["x"], inputs["weight"], None, 2.0, None, False, 1, False)
    assert_close("y", y, None, _oracle(case, inputs, torch.float64, False)["y"], torch.bfloat16)
    assert not ran


@pytest.mark.parametrize("rows, inputs, outputs", [(0, 5, 4), (3, 5, 0), (3, 0, 4)])
def test_empty(rows, inputs, outputs):
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    dy = torch.randn(rows, outputs)
    y, n, a, index = triton_kernels.linear_forward(x, weight, bias, 1.5, None, False, 1, True)
    expected = reference.linear(x.double(), weight.double(), bias.double(), b=1.5)
    assert_close("y", y, None, expected, torch.float32)
    dx, dw, dbias, db = triton_kernels.linear_backward(
        dy, x, weight, bias, 1.5, None, y, n, a, index, False, 1, False, True, True, True, False
    )
    assert dx.shape == x.shape and not dx.any()
    assert dw.shape == weight.shape and not dw.any()
    assert dbias.shape == bias.shape and bool(dbias.any()) == (inputs == 0)
    assert db is None


def test_unneeded_gradients_are_none():
    x, weight, dy = torch.randn(5, 4), torch.randn(3, 4), torch.randn(5, 3)
    y, n, a, index = triton_kernels.linear_forward(x, weight, None, 2.0, None, False, 1, True)
    arguments = (dy, x, weight, None, 2.0, None, y, n, a, index, False, 1, False)
    full = triton_kernels.linear_backward(*arguments, True, True, False, False)
    only_dx = triton_kernels.linear_backward(*arguments, True, False, False, False)
    only_dw = triton_kernels.linear_backward(*arguments, False, True, False, False)
    assert torch.equal(only_dx[0], full[0]) and only_dx[1:] == (None, None, None)
    assert torch.equal(only_dw[1], full[1]) and (only_dw[0], *only_dw[2:]) == (None, None, None)


def test_nothing_is_kept_unless_asked():
    x, weight = torch.randn(5, 4), torch.randn(6, 4)
    y, n, a, index = triton_kernels.linear_forward(x, weight, None, 1.5, None, False, 2, False)
    assert (a.numel(), index.numel(), n.shape) == (0, 0, (5,))


def test_nan_comes_out_where_it_goes_in():
    x, weight = torch.randn(5, 4), torch.randn(6, 4)
    x[2, 1] = float("nan")
    for b, max_out in ((2.0, 1), (1.5, 2), (1.0, 3)):
        y, n, a, index = triton_kernels.linear_forward(x, weight, None, b, None, True, max_out, True)
        assert torch.equal(y.isnan().all(1), x.isnan().any(1)) and torch.equal(y.isnan().any(1), x.isnan().any(1))
        gradients = triton_kernels.linear_backward(
            torch.ones_like(y), x, weight, None, b, None, y, n, a, index, True, max_out, False, True, True, False, False
        )
        if b != 1:
            assert gradients[0][2].isnan().all() and torch.isfinite(gradients[0][[0, 1, 3, 4]]).all()
        assert gradients[1].isnan().any()


def test_given_squares_are_what_the_norms_are_made_of():
    x, weight, squares = torch.randn(5, 4), torch.randn(6, 4), torch.rand(5)
    y, n, _, _ = triton_kernels.linear_forward(x, weight, None, 2.0, None, False, 1, False, squares)
    assert_close("n", n, None, squares.double().sqrt(), torch.float32)
    a = x @ weight.t()
    assert_close("y", y, None, (a * a.abs() / n[:, None]).double(), torch.float32)


def test_ties_go_to_the_first_unit():
    x, weight = torch.randn(4, 6), torch.randn(3, 6).repeat_interleave(2, dim=0)
    y, n, a, index = triton_kernels.linear_forward(x, weight, None, 2.0, None, False, 2, True)
    assert index.dtype == torch.uint8 and not index.any()
    dw = triton_kernels.linear_backward(
        torch.ones_like(y), x, weight, None, 2.0, None, y, n, a, index, False, 2, False, False, True, False, False
    )[1]
    assert dw[::2].any() and not dw[1::2].any()


def test_offsets_in_int64(monkeypatch):
    module = importlib.import_module("bcos_kernels.triton_kernels.linear")
    monkeypatch.setattr(module, "index64", lambda *tensors: True)
    check(Case("int64", max_out=2, normalize=True), "cpu")


def test_float64_is_not_built():
    x = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="linear: .*float32, bfloat16, float16, got torch.float64"):
        triton_kernels.linear_forward(x, x, None, 2.0, None, False, 1, True)
    with pytest.raises(NotImplementedError, match="linear"):
        triton_kernels.linear_backward(
            x, x, x, None, 2.0, None, x, x, x, x, False, 1, False, True, True, False, False
        )  # fmt: skip


def test_public_function():
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    with only("triton", "linear", "linear_backward"):
        y = bcos_kernels.linear(x, weight, normalize_weight=True)
        y.square().sum().backward()
    leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = reference.linear(*leaves, normalize_weight=True)
    expected.square().sum().backward()
    assert_close("y", y, None, expected, torch.float32)
    assert_close("dx", x.grad, None, leaves[0].grad, torch.float32)
    assert_close("dw", weight.grad, None, leaves[1].grad, torch.float32)


def check_exactly(case: Case, device: str) -> None:
    """`check` without tf32, for a GPU."""
    with exact_float32():
        check(case, device)
