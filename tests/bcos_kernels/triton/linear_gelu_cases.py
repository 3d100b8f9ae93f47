"""Cases of the Triton linear layer with a GELU against the float64 reference, which test_linear_gelu.py runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

import bcos_kernels
from bcos_kernels import reference, triton_kernels
from tests.bcos_kernels.harness import linear_gelu, only
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
    squares: bool = False  # Σ x² of the rows is given
    layout: str = "contiguous"
    dy_layout: str = "contiguous"
    zero_row: int | None = None

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}"


def _across_dtypes(*cases: Case) -> list[Case]:
    return [replace(case, dtype=dtype) for case in cases for dtype in DTYPES]


CASES = [
    *_across_dtypes(
        Case("odd"),
        Case("squares given, normalized, bias", squares=True, normalize=True, bias=True),
        Case("general b, max_out 2", b=1.5, max_out=2),
    ),
    Case("tile-exact", rows=64, inputs=64, outputs=64),
    Case("several tiles", rows=70, inputs=70, outputs=140),
    Case("single row", rows=1, inputs=33, outputs=5),
    Case("b 1, bias", b=1.0, bias=True),
    Case("b tensor", b=1.75, b_tensor=True),
    Case("zero row", zero_row=3, normalize=True, dtype="bf16"),
    Case("strided", layout="strided", dy_layout="strided"),
    Case("expanded gradient", dy_layout="expanded"),
]


def _inputs(case: Case, device: str) -> dict[str, torch.Tensor | None]:
    dtype, units = DTYPES[case.dtype], case.outputs * case.max_out
    x = random((case.rows, case.inputs), 1, dtype, device)
    if case.zero_row is not None:
        x[case.zero_row] = 0
    return {
        "x": lay_out(x, case.layout),
        "weight": random((units, case.inputs), 2, dtype, device, 3 * case.inputs**-0.5),
        "bias": random((units,), 3, dtype, device, 0.1) if case.bias else None,
        "dh": lay_out(random((case.rows, case.outputs), 4, dtype, device), case.dy_layout),
        "b": torch.tensor(case.b, device=device) if case.b_tensor else None,
    }


def _oracle(case: Case, inputs: dict, dtype: torch.dtype, detach: bool) -> dict[str, torch.Tensor | None]:
    """h and the gradients by autograd through the definition, computed in ``dtype``."""
    leaves = {k: None if t is None else t.detach().to(dtype).requires_grad_() for k, t in inputs.items() if k != "dh"}
    h = linear_gelu(reference)(
        leaves["x"], leaves["weight"], leaves["bias"], b=case.b if leaves["b"] is None else leaves["b"],
        normalize_weight=case.normalize, max_out=case.max_out, detach=detach,
    )  # fmt: skip
    h.backward(inputs["dh"].to(dtype))
    return {"h": h.detach()} | {f"d{k}": None if t is None else t.grad for k, t in leaves.items()}


def check(case: Case, device: str) -> None:
    """Forward, training and explanation gradients of one case against the oracle."""
    dtype, inputs = DTYPES[case.dtype], _inputs(case, device)
    x, weight, bias, dh = inputs["x"], inputs["weight"], inputs["bias"], inputs["dh"]
    layer = (case.b if inputs["b"] is None else 0.0, inputs["b"], case.normalize, case.max_out)
    squares = x.float().square().sum(1) if case.squares else None
    h, emitted, y, n, a, index = triton_kernels.linear_gelu_forward(x, weight, bias, squares, *layer, True, True)
    assert h.dtype == dtype and h.is_contiguous()
    assert_close("squares", emitted, None, h.double().square().sum(1), torch.float32)
    alone = triton_kernels.linear_forward(x, weight, bias, *layer, True, squares)
    assert all(torch.equal(one, other) for one, other in zip((y, n, a, index), alone, strict=True))
    bare = triton_kernels.linear_gelu_forward(x, weight, bias, squares, *layer, False, False)
    assert torch.equal(bare[3], n) and not any(bare[i].numel() for i in (1, 2, 4, 5))
    for detach in (False, True):
        exact, eager = _oracle(case, inputs, torch.float64, detach), _oracle(case, inputs, dtype, detach)
        if not detach:
            assert_close("h", h, eager["h"], exact["h"], dtype)
            assert_close("h, nothing kept", bare[0], eager["h"], exact["h"], dtype)
        needs = (True, True, case.bias, case.b_tensor and not detach)
        gradients = triton_kernels.linear_gelu_backward(dh, x, weight, bias, y, n, a, index, *layer, detach, *needs)
        for name, gradient, need in zip(("dx", "dweight", "dbias"), gradients, needs, strict=False):
            assert need or gradient is None
            if need:
                assert_close(f"{name}, detach={detach}", gradient, eager[name], exact[name], dtype)
        if needs[3]:
            assert_close("db", gradients[3], eager["db"], exact["db"], dtype)


def check_exactly(case: Case, device: str) -> None:
    """`check` without tf32, for a GPU."""
    with exact_float32():
        check(case, device)


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    prepare_interpreter()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case):
    check(case, "cpu")


def test_descriptors(monkeypatch):
    ran = use_descriptors(monkeypatch)
    check(Case("descriptors", rows=150, inputs=72, outputs=136, dtype="bf16", squares=True), "cpu")
    assert set(ran) == {"forward", "backward_dx", "backward_dw"}


def test_empty_batch():
    x, weight = torch.randn(0, 5), torch.randn(4, 5)
    layer = (2.0, None, False, 1)
    h, emitted, y, n, a, index = triton_kernels.linear_gelu_forward(x, weight, None, None, *layer, True, True)
    assert h.shape == (0, 4) and emitted.shape == (0,)
    dx, dw, _, _ = triton_kernels.linear_gelu_backward(
        h, x, weight, None, y, n, a, index, *layer, False, True, True, False, False
    )
    assert dx.shape == x.shape and torch.equal(dw, torch.zeros(4, 5))


def test_public_function():
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    with only("triton", "linear_gelu", "linear_gelu_backward"):
        h = bcos_kernels.linear_gelu(x, weight, normalize_weight=True)
        h.square().sum().backward()
    leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = linear_gelu(reference)(*leaves, normalize_weight=True)
    expected.square().sum().backward()
    assert_close("h", h, None, expected, torch.float32)
    assert_close("dx", x.grad, None, leaves[0].grad, torch.float32)
    assert_close("dw", weight.grad, None, leaves[1].grad, torch.float32)
