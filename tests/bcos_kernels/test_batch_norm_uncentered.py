"""batch_norm_uncentered of every backend against the float64 reference: values, statistics and gradients."""

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
    shape: tuple[int, ...] = (5, 7, 4, 3)
    training: bool = True
    weight: bool = True
    bias: bool = False
    residual: bool = False
    relu: bool = False
    eps: float = 1e-5
    momentum: float = 0.1
    mean: float = 0.4
    scale: float = 1.0
    layout: str = "contiguous"
    dy_layout: str = "contiguous"
    residual_layout: str = "contiguous"
    zero: str = ""  # "channels", "all"
    parameters_in_float32: bool = True  # as under autocast; else in x's dtype

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("tile-exact", shape=(4, 16, 8, 8), layout="channels_last", dy_layout="channels_last", bias=True),
    Case("odd"),
    Case("odd, channels_last", layout="channels_last", dy_layout="channels_last"),
    Case("eval", training=False, bias=True),
    Case("eval, channels_last", training=False, bias=True, layout="channels_last", relu=True),
    Case("no weight, no bias", weight=False),
    Case("eval, no weight, no bias", weight=False, training=False),
    Case("bias and no weight", weight=False, bias=True),
    Case("relu", relu=True, bias=True),
    Case("relu, channels_last", relu=True, layout="channels_last", dy_layout="channels_last"),
    Case("relu, bias, weight, residual", relu=True, bias=True, residual=True),
    Case("relu, residual, channels_last", relu=True, bias=True, residual=True, layout="channels_last",
         dy_layout="channels_last", residual_layout="channels_last"),
    Case("relu, residual, mixed layouts", relu=True, residual=True, layout="channels_last",
         residual_layout="strided", dy_layout="transposed"),
    Case("residual", residual=True, bias=True),
    Case("residual, eval, channels_last", residual=True, training=False, layout="channels_last"),
    Case("residual, relu, eval", residual=True, relu=True, training=False, residual_layout="channels_last"),
    Case("expanded residual", residual=True, relu=True, residual_layout="expanded"),
    Case("one row", shape=(1, 9, 1, 1), eps=0.1),
    Case("one pixel an image", shape=(6, 9, 1, 1), layout="channels_last"),
    Case("one channel", shape=(6, 1, 5, 3), relu=True),
    Case("one image", shape=(1, 6, 5, 3), layout="channels_last"),
    Case("empty", shape=(0, 6, 5, 3), bias=True, residual=True, relu=True),
    Case("empty, eval", shape=(0, 6, 5, 3), training=False),
    Case("two dimensions", shape=(33, 6), relu=True, bias=True),
    Case("three dimensions", shape=(4, 6, 9), bias=True),
    Case("three dimensions, transposed", shape=(4, 6, 9), layout="transposed", dy_layout="transposed", relu=True),
    Case("five dimensions", shape=(2, 3, 4, 2, 5), bias=True, residual=True),
    Case("more than a block of channels", shape=(2, 300, 3, 3), layout="channels_last", relu=True),
    Case("more threads' work than one", shape=(8, 24, 20, 20), layout="channels_last", dy_layout="channels_last"),
    Case("more than a block of pixels", shape=(2, 3, 40, 30), relu=True),
    Case("strided", layout="strided", dy_layout="strided"),
    Case("expanded", layout="expanded", dy_layout="expanded"),
    Case("unaligned", layout="offset", dy_layout="offset"),
    Case("mean of 100", mean=100.0, shape=(4, 6, 8, 8)),
    Case("mean of 100, channels_last", mean=100.0, shape=(4, 6, 8, 8), layout="channels_last"),
    Case("values of 1e4", scale=1e4, mean=0.0, eps=1.0),
    Case("values of 1e4, channels_last", scale=1e4, mean=0.0, layout="channels_last"),
    Case("values of 1e-3, large eps", scale=1e-2, mean=0.0, eps=1e-3),
    Case("zero channels", zero="channels", bias=True, layout="channels_last"),
    Case("zero channels, planes", zero="channels", relu=True),
    Case("zero input", zero="all", relu=True),
    Case("momentum 1", momentum=1.0),
    Case("momentum 0", momentum=0.0),
    Case("parameters in x's dtype", parameters_in_float32=False, bias=True, relu=True, residual=True),
]  # fmt: skip


def inputs_of(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
    wide = reference.statistics_dtype(dtype)
    channels = case.shape[1]
    parameter_dtype = wide if case.parameters_in_float32 else dtype
    x = (harness.randn(case.shape, 1, torch.float64) + case.mean) * case.scale
    if case.zero == "channels":
        x[:, ::2] = 0
    if case.zero == "all":
        x.zero_()
    residual = harness.randn(case.shape, 5, dtype)
    return {
        "x": harness.lay_out(x.to(dtype), case.layout),
        "weight": 1 + harness.randn((channels,), 2, parameter_dtype, 0.3) if case.weight else None,
        "bias": harness.randn((channels,), 3, parameter_dtype, 0.3) if case.bias else None,
        "residual": harness.lay_out(residual, case.residual_layout) if case.residual else None,
    }


def running_var_of(case: Case, dtype: torch.dtype) -> torch.Tensor:
    return (0.5 + harness.randn((case.shape[1],), 6, torch.float64).square()).to(reference.statistics_dtype(dtype))


def differentiate(function, case: Case, leaves, dtype, dy, detach: bool) -> dict[str, torch.Tensor | None]:
    running_var = running_var_of(case, dtype)
    y = function(
        leaves["x"],
        running_var,
        leaves["weight"],
        leaves["bias"],
        training=case.training,
        momentum=case.momentum,
        eps=case.eps,
        activation="relu" if case.relu else None,
        residual=leaves["residual"],
        detach=detach,
    )
    return {"y": y.detach(), "running_var": running_var, **harness.gradients(y, leaves, dy)}


def gradient_of_output(case: Case, dtype: torch.dtype) -> torch.Tensor:
    return harness.lay_out(harness.randn(case.shape, 4, dtype), case.dy_layout)


@functools.lru_cache(maxsize=8)
def expectations(position: int, dtype: torch.dtype, detach: bool) -> tuple[dict, dict]:
    """(oracle in float64, eager reference in ``dtype``) of a case, which the tests of both backends are held to."""
    case = CASES[position]
    inputs, dy = inputs_of(case, dtype), gradient_of_output(case, dtype)
    exact = harness.leaves_of(inputs, torch.float64)
    oracle = differentiate(reference.batch_norm_uncentered, case, exact, torch.float64, dy, detach)
    eager = differentiate(reference.batch_norm_uncentered, case, harness.leaves_of(inputs), dtype, dy, detach)
    if not case.training:
        oracle["running_var"] = running_var_of(case, dtype).double()
    return oracle, eager


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, backend, dtype):
    dtype = harness.DTYPES[dtype]
    inputs, dy = inputs_of(case, dtype), gradient_of_output(case, dtype)
    for detach in (False, True):
        oracle, eager = expectations(CASES.index(case), dtype, detach)
        with harness.only(backend, "batch_norm_uncentered", "batch_norm_uncentered_backward"):
            got = differentiate(bcos_kernels.batch_norm_uncentered, case, harness.leaves_of(inputs), dtype, dy, detach)
        assert got["y"].dtype == dtype
        running_var = got.pop("running_var")
        if case.training and 0 in case.shape:
            assert torch.equal(running_var, running_var_of(case, dtype))  # nothing to learn from
        elif case.training:
            statistics = torch.float64 if dtype == torch.float64 else torch.float32
            expected = oracle["running_var"]
            assert_close_to_reference("running_var", running_var, eager["running_var"], expected, statistics)
        else:
            assert torch.equal(running_var, running_var_of(case, dtype))
        for name, value in got.items():
            assert_close_to_reference(f"{name}, detach={detach}", value, eager[name], oracle[name], dtype)
        if not detach:
            y = got["y"]
        assert torch.equal(got["y"], y)  # the mode changes gradients alone


@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("relu", [False, True])
def test_layout_of_the_output(relu, layout, backend):
    case = Case("", layout=layout, residual=True, residual_layout="channels_last", relu=relu)
    leaves = harness.leaves_of(inputs_of(case, torch.float32))
    with harness.only(backend, "batch_norm_uncentered", "batch_norm_uncentered_backward"):
        got = differentiate(
            bcos_kernels.batch_norm_uncentered,
            case,
            leaves,
            torch.float32,
            gradient_of_output(case, torch.float32),
            False,
        )
    expected = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert got["y"].is_contiguous(memory_format=expected)
    assert got["dx"].is_contiguous(memory_format=expected)


@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_gradient_alone(layout, relu, wanted, backend):
    """What is not asked for changes nothing in what is."""
    case = Case("", bias=True, residual=True, relu=relu, layout=layout)
    inputs, dy = inputs_of(case, torch.float32), gradient_of_output(case, torch.float32)
    leaves = {k: t.detach().requires_grad_(k == wanted) for k, t in inputs.items()}
    oracle = differentiate(
        reference.batch_norm_uncentered, case, harness.leaves_of(inputs, torch.float64), torch.float64, dy, False
    )
    with harness.only(backend, "batch_norm_uncentered", "batch_norm_uncentered_backward"):
        y = bcos_kernels.batch_norm_uncentered(
            leaves["x"], None, leaves["weight"], leaves["bias"], training=True, residual=leaves["residual"],
            activation="relu" if relu else None,
        )  # fmt: skip
        (alone,) = torch.autograd.grad(y, leaves[wanted], dy)
    assert_close_to_reference(wanted, alone, None, oracle[f"d{wanted}"], torch.float32)


@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_statistics_are_wide(dtype, backend):
    """Batch statistics of low-precision values are float32, and buffers keep their own dtype."""
    dtype = harness.DTYPES[dtype]
    x = harness.randn((64, 3, 16, 16), 1, dtype) + 3
    expected = x.double().var((0, 2, 3), unbiased=False)
    for statistics in (torch.float32, torch.float64, dtype):
        running_var = torch.zeros(3, dtype=statistics)
        with harness.only(backend, "batch_norm_uncentered"):
            y = bcos_kernels.batch_norm_uncentered(x, running_var, training=True, momentum=1.0, eps=0.0)
        assert running_var.dtype == statistics and y.dtype == dtype
        tolerance = 2e-3 if statistics == torch.float16 else 8e-3 if statistics == torch.bfloat16 else 1e-6
        assert (running_var.double() / expected - 1).abs().max() < tolerance


@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_nan_comes_out_where_it_goes_in(relu, training, layout, backend):
    x = harness.lay_out(harness.randn((3, 4, 5, 5), 1, torch.float32), layout)
    x[1, 2, 3, 3] = float("nan")
    x.requires_grad_()
    with harness.only(backend, "batch_norm_uncentered", "batch_norm_uncentered_backward"):
        y = bcos_kernels.batch_norm_uncentered(x, torch.ones(4), training=training, activation="relu" if relu else None)
        y.sum().backward()
    if training:
        assert y[:, 2].isnan().all() and x.grad[:, 2].isnan().all()
    else:
        assert y[1, 2, 3, 3].isnan() and y.isnan().sum() == 1 and torch.isfinite(x.grad).all()
    assert torch.isfinite(y[:, [0, 1, 3]]).all() and torch.isfinite(x.grad[:, [0, 1, 3]]).all()


@pytest.mark.parametrize("backend", harness.BACKENDS)
def test_nothing_is_centred(backend):
    """y = x / √(var + eps): of a constant it is the constant over √eps, not 0."""
    x = torch.full((2, 1, 3, 3), 2.0)
    with harness.only(backend, "batch_norm_uncentered"):
        y = bcos_kernels.batch_norm_uncentered(x, None, training=True, eps=0.25)
    assert torch.allclose(y, torch.full_like(x, 4.0), rtol=1e-6)


@pytest.mark.parametrize("backend", harness.BACKENDS)
def test_running_var_may_be_shared_with_a_parameterless_eval(backend):
    """The buffer that is read in eval mode is neither written nor part of the graph."""
    x, running_var = harness.randn((4, 3, 2, 2), 1, torch.float32).requires_grad_(), torch.tensor([1.0, 4.0, 9.0])
    with harness.only(backend, "batch_norm_uncentered", "batch_norm_uncentered_backward"):
        y = bcos_kernels.batch_norm_uncentered(x, running_var, training=False, eps=0.0)
        running_var.fill_(100.0)  # another batch's update between forward and backward
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(y, x / torch.tensor([1.0, 2.0, 3.0])[:, None, None])
    assert torch.allclose(dx, 1 / torch.tensor([1.0, 2.0, 3.0])[:, None, None].expand_as(x))
