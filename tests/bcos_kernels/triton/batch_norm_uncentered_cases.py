"""Cases of the Triton batch normalisation against the float64 reference, which test_batch_norm_uncentered.py runs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import pytest
import torch

import bcos_kernels
from bcos_kernels import reference, triton_kernels
from tests.bcos_kernels.harness import only
from tests.bcos_kernels.tolerances import assert_close_to_reference as assert_close
from tests.bcos_kernels.triton.harness import DTYPES, exact_float32, lay_out, prepare_interpreter, random


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...] = (4, 7, 5, 6)
    dtype: str = "fp32"
    training: bool = True
    weight: bool = True
    bias: bool = True
    residual: bool = False
    activation: str | None = None
    layout: str = "contiguous"
    dy_layout: str = "contiguous"
    parameters: str = "fp32"  # dtype of weight, bias and running_var
    mean: float = 1.0
    scale: float = 1.0
    eps: float = 1e-5

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}"


def _across_dtypes(*cases: Case) -> list[Case]:
    return [replace(case, dtype=dtype) for case in cases for dtype in DTYPES]


CASES = [
    *_across_dtypes(
        Case("training"),
        Case("training, relu, residual, channels_last", activation="relu", residual=True, layout="channels_last"),
        Case("eval, relu, residual", training=False, activation="relu", residual=True),
        Case("training, bare, channels_last", weight=False, bias=False, layout="channels_last"),
    ),
    Case("eval", training=False, layout="channels_last", dy_layout="channels_last"),
    *_across_dtypes(Case("training, relu", activation="relu", layout="channels_last")),
    Case("eval, relu", training=False, activation="relu"),
    Case("wide rows", shape=(2, 200, 3, 3), layout="channels_last", activation="relu"),
    Case("wide rows", shape=(2, 200, 3, 3), residual=True, dtype="bf16"),
    Case("half parameters", dtype="bf16", parameters="bf16", activation="relu"),
    Case("rows and channels", shape=(33, 5), activation="relu", residual=True),
    Case("channels last of three", shape=(6, 40, 3)),
    Case("sequences", shape=(3, 5, 9), activation="relu"),
    Case("volumes", shape=(2, 3, 4, 3, 2)),
    Case("one channel", shape=(3, 1, 4, 4), layout="channels_last"),
    Case("one row", shape=(1, 6), eps=0.1, mean=0.0),
    Case("many rows, splits", shape=(5, 3, 40, 30), layout="contiguous"),
    Case("many rows, splits", shape=(3, 70, 13, 12), layout="channels_last", dy_layout="channels_last"),
    Case("strided", layout="strided", dy_layout="strided", residual=True),
    Case("transposed", layout="transposed", dy_layout="transposed"),
    Case("expanded gradient", dy_layout="expanded", activation="relu"),
    Case("mean far from zero", mean=100.0, shape=(8, 4, 9, 9)),
    Case("mean far from zero", mean=100.0, shape=(8, 4, 9, 9), layout="channels_last"),
    Case("values of 1e4", dtype="fp16", scale=1e4, mean=0.0),
]


def _inputs(case: Case, device: str) -> dict[str, torch.Tensor | None]:
    dtype, parameters, channels = DTYPES[case.dtype], DTYPES[case.parameters], case.shape[1]
    x = random(case.shape, 1, torch.float32, device, case.scale) + case.mean
    running_var = random((channels,), 5, torch.float32, device).square() + 0.1
    return {
        "x": lay_out(x.to(dtype), case.layout),
        "weight": random((channels,), 2, parameters, device) if case.weight else None,
        "bias": random((channels,), 3, parameters, device) if case.bias else None,
        "residual": lay_out(random(case.shape, 6, dtype, device), case.layout) if case.residual else None,
        "running_var": None if case.training else running_var.to(parameters),
        "dy": lay_out(random(case.shape, 4, dtype, device), case.dy_layout),
    }


def _oracle(case: Case, inputs: dict, dtype: torch.dtype | None, detach: bool) -> dict[str, torch.Tensor | None]:
    """y and the gradients by autograd through the definition, in ``dtype`` or as they are."""
    leaves = {}
    for name in ("x", "weight", "bias", "residual"):
        t = inputs[name]
        leaves[name] = None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
    running_var = inputs["running_var"]
    y = reference.batch_norm_uncentered(
        leaves["x"], None if running_var is None else running_var.to(dtype or running_var.dtype), leaves["weight"],
        leaves["bias"], training=case.training, eps=case.eps, activation=case.activation, residual=leaves["residual"],
        detach=detach,
    )  # fmt: skip
    y.backward(inputs["dy"].to(y.dtype))
    return {"y": y.detach()} | {f"d{k}": None if t is None else t.grad for k, t in leaves.items()}


def check(case: Case, device: str) -> None:
    """Forward, statistics, training and explanation gradients of one case against the oracle."""
    dtype, inputs = DTYPES[case.dtype], _inputs(case, device)
    x, weight, bias, dy = inputs["x"], inputs["weight"], inputs["bias"], inputs["dy"]
    forward = (x, weight, bias, inputs["residual"], inputs["running_var"], case.training, case.eps, case.activation)
    y, mean, var, squares = triton_kernels.batch_norm_uncentered_forward(*forward, True)
    assert y.dtype == dtype and mean.dtype == var.dtype == torch.float32
    assert squares.is_contiguous()
    assert_close("squares", squares, None, y.double().square().sum(1), torch.float32)
    bare = triton_kernels.batch_norm_uncentered_forward(*forward, False)
    assert torch.equal(bare[0], y) and bare[3].shape == (0,)
    if case.training:
        dims = [d for d in range(x.dim()) if d != 1]
        exact_var, exact_mean = torch.var_mean(x.double(), dim=dims, unbiased=False)
        assert_close("mean", mean, None, exact_mean, torch.float32)
        assert_close("var", var, None, exact_var, torch.float32)
    else:
        assert mean.numel() == 0 and torch.equal(var, inputs["running_var"].float())
        assert var.data_ptr() != inputs["running_var"].data_ptr()
    for detach in (False, True):
        exact = _oracle(case, inputs, torch.float64, detach)
        eager = _oracle(case, inputs, None, detach)
        if not detach:
            assert_close("y", y, eager["y"], exact["y"], dtype)
        needs = (True, case.weight, case.bias, case.residual)
        gradients = triton_kernels.batch_norm_uncentered_backward(
            dy, x, y if case.activation else None, weight, bias, mean, var, case.training, case.eps, case.activation,
            detach, *needs,
        )  # fmt: skip
        for name, gradient, of in zip(
            ("dx", "dweight", "dbias", "dresidual"), gradients, (x, weight, bias, inputs["residual"]), strict=True
        ):
            if of is None:
                assert gradient is None
                continue
            assert gradient.dtype == of.dtype
            assert_close(f"{name}, detach={detach}", gradient, eager[name], exact[name], of.dtype)
        if case.activation and not case.residual:
            from_x = triton_kernels.batch_norm_uncentered_backward(
                dy, x, None, weight, bias, mean, var, case.training, case.eps, case.activation, detach, *needs
            )
            for one, other in zip(gradients, from_x, strict=True):
                assert one is None or torch.equal(one, other)


def check_exactly(case: Case, device: str) -> None:
    """`check`; there is no matrix product whose precision torch could choose, but the oracles of all ops run alike."""
    with exact_float32():
        check(case, device)


@pytest.fixture(scope="module", autouse=True)
def interpreter():
    prepare_interpreter()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case):
    check(case, "cpu")


def test_empty_batch():
    x, weight = torch.randn(0, 3, 4, 4), torch.randn(3)
    y, mean, var, squares = triton_kernels.batch_norm_uncentered_forward(
        x, weight, None, None, None, True, 1e-5, "relu", True
    )
    assert squares.shape == (0, 4, 4)
    assert y.shape == x.shape and var.isnan().all() and mean.isnan().all()
    y, mean, var, _ = triton_kernels.batch_norm_uncentered_forward(
        x, weight, None, None, torch.ones(3), False, 1e-5, None, False
    )
    assert y.shape == x.shape and torch.equal(var, torch.ones(3))
    dx, dweight, dbias, dresidual = triton_kernels.batch_norm_uncentered_backward(
        y, x, None, weight, None, mean, var, False, 1e-5, None, False, True, True, False, False
    )
    assert dx.shape == x.shape and torch.equal(dweight, torch.zeros(3)) and dbias is None and dresidual is None


def test_nan_comes_out_where_it_goes_in():
    x = torch.randn(3, 4, 5)
    x[1, 2, 3] = float("nan")
    y, _, var, _ = triton_kernels.batch_norm_uncentered_forward(x, None, None, None, None, True, 1e-5, "relu", False)
    assert var.isnan().tolist() == [False, False, True, False]
    assert y[:, 2].isnan().all() and torch.isfinite(y[:, [0, 1, 3]]).all()
    y, _, _, squares = triton_kernels.batch_norm_uncentered_forward(
        x, None, None, None, torch.ones(4), False, 1e-5, "relu", True
    )
    assert torch.equal(y.isnan(), x.isnan()) and torch.equal(squares.isnan(), x.isnan().any(1))


def test_unneeded_gradients_are_none():
    x, weight, bias, dy = torch.randn(3, 4, 5), torch.randn(4), torch.randn(4), torch.randn(3, 4, 5)
    _, mean, var, _ = triton_kernels.batch_norm_uncentered_forward(x, weight, bias, None, None, True, 1e-5, None, False)
    arguments = (dy, x, None, weight, bias, mean, var, True, 1e-5, None, False)
    full = triton_kernels.batch_norm_uncentered_backward(*arguments, True, True, True, True)
    for one in range(4):
        some = triton_kernels.batch_norm_uncentered_backward(*arguments, *(i == one for i in range(4)))
        assert torch.equal(some[one], full[one])
        assert all(some[i] is None for i in range(4) if i != one)


def test_offsets_in_int64(monkeypatch):
    module = importlib.import_module("bcos_kernels.triton_kernels.batch_norm_uncentered")
    monkeypatch.setattr(module, "index64", lambda *tensors: True)
    check(Case("int64", activation="relu", residual=True), "cpu")


def test_float64_is_not_built():
    x = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="batch_norm_uncentered: .*float16, got torch.float64"):
        triton_kernels.batch_norm_uncentered_forward(x, None, None, None, None, True, 1e-5, None, False)


def test_public_function():
    x, weight = torch.randn(4, 3, 5, requires_grad=True), torch.randn(3, requires_grad=True)
    running_var = torch.ones(3)
    with only("triton", "batch_norm_uncentered", "batch_norm_uncentered_backward"):
        y = bcos_kernels.batch_norm_uncentered(x, running_var, weight, training=True, activation="relu")
        y.square().sum().backward()
    leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected_var = torch.ones(3, dtype=torch.float64)
    expected = reference.batch_norm_uncentered(leaves[0], expected_var, leaves[1], training=True, activation="relu")
    expected.square().sum().backward()
    assert_close("y", y, None, expected, torch.float32)
    assert_close("running_var", running_var, None, expected_var, torch.float32)
    assert_close("dx", x.grad, None, leaves[0].grad, torch.float32)
    assert_close("dweight", weight.grad, None, leaves[1].grad, torch.float32)
