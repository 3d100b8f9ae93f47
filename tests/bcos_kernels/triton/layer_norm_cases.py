"""Cases of the Triton layer normalisation against the float64 reference, which test_layer_norm.py runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

import bcos_kernels
from bcos_kernels import reference, squares, triton_kernels
from bcos_kernels.triton_kernels import layer_norm
from tests.bcos_kernels.harness import only
from tests.bcos_kernels.tolerances import assert_close_to_reference as assert_close
from tests.bcos_kernels.triton.harness import DTYPES, lay_out, prepare_interpreter, random


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...] = (37, 45)
    dims: int = 1
    dtype: str = "fp32"
    weight: bool = True
    bias: bool = True
    layout: str = "contiguous"
    dy_layout: str = "contiguous"
    offset: float = 0.0  # of the mean
    scale: float = 1.0

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}"


CASES = [
    *(replace(case, dtype=dtype) for case in (
        Case("odd"), Case("several tiles and splits", (300, 96)), Case("long rows", (7, 2 * layer_norm.LONGEST + 13)),
        Case("large values", scale=1e4),
    ) for dtype in DTYPES),
    Case("tile-exact", (64, 64)),
    Case("single row", (1, 384)),
    Case("one feature", (9, 1)),
    Case("no parameters", weight=False, bias=False),
    Case("no weight, bf16", weight=False, dtype="bf16"),
    Case("no bias", bias=False),
    Case("two dimensions", (4, 3, 5, 9), 2),
    Case("one row, two dimensions", (5, 9), 2),
    Case("strided", (6, 7, 20), layout="strided", dy_layout="transposed"),
    Case("expanded", (6, 7, 20), layout="expanded", dy_layout="expanded"),
    Case("mean far from zero", offset=100.0),
    Case("long rows, mean far from zero", (3, layer_norm.LONGEST + 1), offset=100.0),
]  # fmt: skip


def _inputs(case: Case, device: str) -> dict[str, torch.Tensor | None]:
    dtype, shape = DTYPES[case.dtype], case.shape[len(case.shape) - case.dims :]
    x = (random(case.shape, 1, torch.float32, device, case.scale) + case.offset).to(dtype)
    return {
        "x": lay_out(x, case.layout),
        "weight": random(shape, 2, torch.float32, device, 0.3) + 1 if case.weight else None,
        "bias": random(shape, 3, dtype, device) if case.bias else None,
    }


def _oracle(case: Case, inputs: dict, dy: torch.Tensor, dtype: torch.dtype | None, detach: bool) -> dict:
    leaves = {k: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for k, t in inputs.items()}
    shape = case.shape[len(case.shape) - case.dims :]
    y = reference.layer_norm(leaves["x"], shape, leaves["weight"], leaves["bias"], detach=detach)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach()} | {f"d{k}": t.grad for k, t in leaves.items() if t is not None}


def check(case: Case, device: str) -> None:
    """Forward, training and explanation gradients of one case against the oracle."""
    dtype, inputs = DTYPES[case.dtype], _inputs(case, device)
    dy = lay_out(random(case.shape, 4, dtype, device), case.dy_layout)
    for detach in (False, True):
        exact, eager = (_oracle(case, inputs, dy, t, detach) for t in (torch.float64, None))
        y, mean, rstd, emitted = triton_kernels.layer_norm_forward(
            inputs["x"], case.dims, inputs["weight"], inputs["bias"], 1e-5, True
        )
        assert y.dtype == dtype and y.is_contiguous()
        assert mean.shape == rstd.shape == emitted.shape == case.shape[: len(case.shape) - case.dims]
        assert_close("y", y, eager["y"], exact["y"], dtype)
        over = tuple(range(-case.dims, 0))
        assert_close("squares", emitted, None, y.double().square().sum(over), torch.float32)
        needs = (True, case.weight, case.bias)
        call = (dy, inputs["x"], case.dims, inputs["weight"], inputs["bias"], mean, rstd, detach)
        dx, dweight, dbias = triton_kernels.layer_norm_backward(*call, *needs)
        for name, gradient, need in (("dx", dx, True), ("dweight", dweight, case.weight), ("dbias", dbias, case.bias)):
            assert (gradient is not None) == need
            if need:
                assert_close(f"{name}, detach={detach}", gradient, eager[name], exact[name], dtype)
        alone, nothing, _ = triton_kernels.layer_norm_backward(*call, True, False, False)
        assert torch.equal(alone, dx) and nothing is None
        if case.weight:
            nothing, alone, _ = triton_kernels.layer_norm_backward(*call, False, True, False)
            assert torch.equal(alone, dweight) and nothing is None


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    prepare_interpreter()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case):
    check(case, "cpu")


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(shape):
    x, weight = torch.randn(shape), torch.randn(shape[1])
    y, mean, rstd, emitted = triton_kernels.layer_norm_forward(x, 1, weight, weight, 1e-5, True)
    assert y.shape == shape and mean.shape == rstd.shape == emitted.shape == shape[:1]
    dx, dw, db = triton_kernels.layer_norm_backward(y, x, 1, weight, weight, mean, rstd, False, True, True, True)
    assert dx.shape == shape and torch.equal(dw, torch.zeros(shape[1])) and torch.equal(db, torch.zeros(shape[1]))


def test_nan_stays_in_its_row():
    x = torch.randn(5, 33)
    x[2, 7] = float("nan")
    y, *_ = triton_kernels.layer_norm_forward(x, 1, None, None, 1e-5, False)
    assert torch.isnan(y[2]).all() and torch.isfinite(y[[0, 1, 3, 4]]).all()


def test_public_function():
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    with only("triton", "layer_norm", "layer_norm_backward"):
        y = bcos_kernels.layer_norm(x, 8, weight)
        y.square().sum().backward()
    leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = reference.layer_norm(leaves[0], 8, leaves[1])
    expected.square().sum().backward()
    assert_close("y", y, None, expected, torch.float32)
    assert_close("dx", x.grad, None, leaves[0].grad, torch.float32)
    assert_close("dw", weight.grad, None, leaves[1].grad, torch.float32)
    with bcos_kernels.backend("triton"):
        left = squares.squares_of(bcos_kernels.layer_norm(x, 8, weight), squares.FEATURES)
    assert_close("squares", left, None, expected.detach().square().sum(-1).flatten(), torch.float32)
