"""Cases of the Triton convolution against the float64 reference, which test_conv2d.py runs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import pytest
import torch

import bcos_kernels
from bcos_kernels import reference, triton_kernels
from bcos_kernels.triton_kernels import conv2d_small_groups
from tests.bcos_kernels.harness import only
from tests.bcos_kernels.tolerances import assert_close_to_reference as assert_close
from tests.bcos_kernels.triton.harness import (
    DTYPES,
    exact_float32,
    lay_out,
    prepare_interpreter,
    random,
)


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int, int] = (2, 6, 7, 6)  # x
    outputs: int = 10
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: str = "fp32"
    b: float = 2.0
    b_tensor: bool = False
    normalize: bool = False
    max_out: int = 1
    bias: bool = False
    layout: str = "channels_last"
    dy_layout: str = "channels_last"
    weight_layout: str = "contiguous"
    scale: float = 1.0
    recompute: bool = False  # backward without y, as after an in-place change of the output
    squares: bool = False  # Σ_c x² is given
    zeros: bool = False  # a sample and a unit of zeros

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}"

    @property
    def geometry(self) -> tuple:
        return (self.stride, self.padding, self.dilation, self.groups)


def _across_dtypes(*cases: Case) -> list[Case]:
    return [replace(case, dtype=dtype) for case in cases for dtype in DTYPES]


CASES = [
    *_across_dtypes(
        Case("3x3"),
        Case("strided general b, normalized, bias", b=1.5, normalize=True, bias=True, stride=(2, 2)),
        Case("groups, b tensor, max_out 2", b=1.75, b_tensor=True, max_out=2, groups=2, outputs=4),
        Case("recomputed", recompute=True, normalize=True, max_out=2, bias=True, stride=(2, 1), outputs=5),
        Case("1x1", kernel=(1, 1), padding=(0, 0), shape=(2, 16, 5, 4), layout="contiguous", dy_layout="contiguous"),
        Case("1x1 as linear", kernel=(1, 1), padding=(0, 0), shape=(2, 16, 5, 4), dy_layout="contiguous"),
        Case("squares given", squares=True, stride=(2, 1)),
        Case("groups", shape=(1, 12, 5, 6), outputs=12, groups=2, normalize=True),
        Case("groups of 8", shape=(1, 24, 5, 6), outputs=24, groups=3),
        Case("depthwise 7x7", shape=(2, 12, 6, 5), outputs=12, kernel=(7, 7), padding=(3, 3), groups=12),
        Case("depthwise, stride", shape=(1, 70, 6, 5), outputs=70, groups=70, stride=(2, 1), normalize=True, bias=True),
        Case("groups of 4, general b", shape=(1, 8, 6, 5), outputs=8, groups=2, b=1.5, dy_layout="contiguous"),
    ),
    Case("depthwise, pixels innermost", shape=(2, 20, 6, 5), outputs=20, groups=20, layout="contiguous"),
    Case("depthwise, pixels innermost, max_out 3", shape=(2, 5, 9, 9), outputs=5, groups=5, layout="contiguous",
         dy_layout="contiguous", max_out=3, normalize=True),
    Case("depthwise 5x5", shape=(3, 37, 12, 11), outputs=37, kernel=(5, 5), padding=(2, 2), groups=37, dtype="bf16"),
    Case("depthwise, weight channels_last", shape=(2, 6, 5, 4), outputs=12, groups=6, layout="contiguous",
         weight_layout="channels_last"),
    Case("depthwise, multiplier 3", shape=(2, 12, 5, 4), outputs=36, groups=12, bias=True, b=1.5, dtype="fp16"),
    Case("depthwise, multiplier 4", shape=(1, 9, 6, 6), outputs=36, groups=9, stride=(2, 2), normalize=True),
    Case("groups of 2", shape=(2, 34, 5, 4), outputs=34, groups=17, normalize=True, dtype="bf16"),
    Case("groups of 2, max_out 2", shape=(2, 10, 5, 4), outputs=10, groups=5, max_out=2, bias=True, dtype="fp16"),
    Case("groups of 3, 2 units", shape=(2, 12, 5, 4), outputs=8, groups=4, b=1.75, b_tensor=True),
    Case("groups of 3, max_out 3", shape=(2, 6, 5, 4), outputs=2, groups=2, max_out=3, normalize=True, bias=True),
    Case("groups of 4, unaligned", shape=(1, 40, 5, 5), outputs=40, groups=10, layout="offset", weight_layout="offset"),
    Case("groups of 4, zeros", shape=(2, 8, 5, 5), outputs=8, groups=2, zeros=True, normalize=True, b=1.5),
    Case("groups of 4, values of 1e4", shape=(1, 8, 5, 5), outputs=8, groups=2, scale=1e4, dtype="fp16"),
    Case("depthwise, splits", shape=(2, 4, 33, 33), outputs=4, groups=4, bias=True),
    Case("depthwise, dilation and stride", shape=(1, 6, 13, 12), outputs=6, groups=6, dilation=(2, 3), stride=(4, 2),
         padding=(3, 1), b=1.5, normalize=True),
    Case("depthwise, stride beyond kernel", shape=(1, 5, 11, 10), outputs=5, groups=5, kernel=(2, 1), stride=(3, 4),
         padding=(0, 0)),
    Case("depthwise 11x11", shape=(1, 3, 7, 6), outputs=3, groups=3, kernel=(11, 11), padding=(5, 5)),
    Case("depthwise 1x1", shape=(2, 6, 5, 4), outputs=12, groups=6, kernel=(1, 1), padding=(0, 0), squares=True),
    Case("depthwise, oblong", shape=(1, 5, 4, 9), outputs=5, groups=5, kernel=(1, 5), padding=(0, 2), stride=(1, 2)),
    Case("depthwise, one pixel", shape=(3, 6, 1, 1), outputs=6, groups=6),
    Case("depthwise, max_out 4", shape=(2, 6, 5, 4), outputs=6, groups=6, max_out=4, bias=True, recompute=True),
    Case("depthwise, b 1", shape=(2, 6, 5, 4), outputs=6, groups=6, b=1.0, bias=True),
    Case("depthwise, b tensor", shape=(2, 6, 5, 4), outputs=18, groups=6, b=1.75, b_tensor=True, dtype="bf16"),
    Case("depthwise, zeros", shape=(2, 6, 5, 5), outputs=6, groups=6, zeros=True, normalize=True, dtype="fp16"),
    Case("depthwise, values of 1e4", shape=(1, 6, 5, 5), outputs=6, groups=6, scale=1e4, dtype="fp16"),
    Case("depthwise, strided memory", shape=(2, 6, 5, 5), outputs=6, groups=6, layout="strided", dy_layout="strided",
         weight_layout="strided"),
    Case("depthwise, expanded", shape=(2, 6, 5, 5), outputs=6, groups=6, layout="expanded", dy_layout="expanded"),
    Case(
        "1x1 as linear, all options",
        kernel=(1, 1),
        padding=(0, 0),
        b=1.75,
        b_tensor=True,
        normalize=True,
        max_out=2,
        bias=True,
        weight_layout="channels_last",
        squares=True,
    ),
    Case("1x1 as linear, b 1", kernel=(1, 1), padding=(0, 0), b=1.0, max_out=3, outputs=6, bias=True),
    Case("1x1 as linear, zeros", kernel=(1, 1), padding=(0, 0), zeros=True, normalize=True),
    Case("1x1 as linear, recomputed", kernel=(1, 1), padding=(0, 0), recompute=True, max_out=2, squares=True),
    Case("1x1 of padded images", kernel=(1, 1), shape=(1, 6, 4, 4)),
    Case("squares given, dilation", squares=True, dilation=(2, 3), padding=(2, 3), normalize=True, b=1.5),
    Case("squares given, several tiles", squares=True, shape=(2, 3, 13, 10), outputs=70, layout="contiguous"),
    Case("squares given, groups", squares=True, groups=2, outputs=4),
    Case("squares given, stem", squares=True, shape=(1, 6, 9, 10), kernel=(7, 7), stride=(2, 2), padding=(3, 3)),
    Case("tile-exact", shape=(1, 32, 8, 8), outputs=32, kernel=(1, 1), padding=(0, 0)),
    Case("channels in blocks", shape=(1, 32, 6, 6), outputs=33, weight_layout="channels_last"),
    Case("channels in blocks", shape=(1, 64, 5, 5), outputs=64, dtype="bf16", normalize=True),
    Case("several tiles, splits", shape=(2, 3, 13, 10), outputs=70, layout="contiguous"),
    Case("depthwise 7x7", shape=(1, 3, 6, 5), outputs=3, kernel=(7, 7), padding=(3, 3), groups=3),
    Case("depthwise multiplier", shape=(2, 3, 6, 5), outputs=6, groups=3, normalize=True, dtype="bf16", bias=True),
    Case("dilation", dilation=(2, 3), padding=(2, 3)),
    Case("dilation and stride", shape=(1, 4, 13, 12), dilation=(2, 3), stride=(4, 2), padding=(3, 1), b=1.5),
    Case("stride beyond kernel", shape=(1, 4, 11, 10), kernel=(2, 1), stride=(3, 4), padding=(0, 0)),
    Case("stride beyond image", shape=(2, 4, 2, 3), stride=(5, 4)),
    Case("groups of 24 and 8", shape=(2, 48, 5, 4), outputs=16, groups=2, stride=(2, 1), bias=True, dtype="bf16"),
    Case("groups of 8 and 40, max_out 2", shape=(1, 16, 5, 4), outputs=80, groups=2, max_out=2, normalize=True),
    Case("40 channels", shape=(1, 40, 6, 5), outputs=24, layout="contiguous", dtype="fp16"),
    Case("patches", shape=(2, 6, 8, 8), outputs=12, kernel=(4, 4), stride=(4, 4), padding=(0, 0), normalize=True),
    Case("stem 7x7", shape=(1, 6, 9, 10), outputs=8, kernel=(7, 7), stride=(2, 2), padding=(3, 3), dtype="bf16"),
    Case("11x11", shape=(1, 2, 7, 6), outputs=3, kernel=(11, 11), padding=(5, 5), layout="contiguous"),
    Case("oblong", shape=(1, 5, 4, 9), kernel=(1, 5), padding=(0, 2), stride=(1, 2)),
    Case("one pixel", shape=(3, 6, 1, 1)),
    Case("one value", shape=(1, 1, 1, 1), outputs=1, kernel=(1, 1), padding=(0, 0)),
    Case("b 1, bias, max_out 3", b=1.0, bias=True, max_out=3, outputs=6, groups=2),
    Case("b tensor, normalized, bias, groups", b=2.5, b_tensor=True, normalize=True, bias=True, groups=3, outputs=6),
    Case("recomputed, general b", recompute=True, b=1.25, groups=2),
    Case("strided memory", layout="strided", dy_layout="strided", weight_layout="strided", bias=True, max_out=2),
    Case("transposed", layout="transposed", dy_layout="transposed", weight_layout="transposed"),
    Case("expanded", layout="expanded", dy_layout="expanded", normalize=True),
    Case("unaligned", layout="offset", dy_layout="offset", weight_layout="offset", shape=(1, 16, 6, 6), outputs=16),
    Case("zeros", zeros=True, normalize=True, shape=(2, 6, 5, 5)),
    Case("zeros", zeros=True, normalize=True, shape=(2, 6, 5, 5), dtype="fp16"),
    Case("zeros, general b", zeros=True, b=1.5, shape=(2, 6, 5, 5)),
    Case("values of 1e4", scale=1e4, dtype="fp16", shape=(1, 6, 5, 5)),
    Case("values of 1e4, general b", scale=1e4, dtype="fp16", b=1.5, normalize=True, shape=(1, 6, 5, 5)),
]


def _output_size(case: Case) -> tuple[int, int]:
    return tuple(
        (case.shape[2 + i] + 2 * case.padding[i] - case.dilation[i] * (case.kernel[i] - 1) - 1) // case.stride[i] + 1
        for i in (0, 1)
    )


def _inputs(case: Case, device: str) -> dict[str, torch.Tensor | None]:
    dtype = DTYPES[case.dtype]
    units, channels = case.outputs * case.max_out, case.shape[1] // case.groups
    x = random(case.shape, 1, dtype, device, case.scale)
    fan_in = channels * case.kernel[0] * case.kernel[1]
    weight = random((units, channels, *case.kernel), 2, dtype, device, fan_in**-0.5)
    if case.zeros:
        x[1] = 0
        weight[2] = 0
    # gradients of large inputs stay within float16
    dy = random((case.shape[0], case.outputs, *_output_size(case)), 4, dtype, device, case.scale**-0.5)
    return {
        "x": lay_out(x, case.layout),
        "weight": lay_out(weight, case.weight_layout),
        "bias": random((units,), 3, dtype, device, 0.1) if case.bias else None,
        "dy": lay_out(dy, case.dy_layout),
        "b": torch.tensor(case.b, device=device) if case.b_tensor else None,
    }


def _oracle(case: Case, inputs: dict, dtype: torch.dtype, detach: bool) -> dict[str, torch.Tensor | None]:
    """y and the gradients by autograd through the definition, computed in ``dtype``."""
    leaves = {k: None if t is None else t.detach().to(dtype).requires_grad_() for k, t in inputs.items() if k != "dy"}
    b = case.b if leaves["b"] is None else leaves["b"]
    y = reference.conv2d(
        leaves["x"], leaves["weight"], leaves["bias"], *case.geometry, b=b, normalize_weight=case.normalize,
        max_out=case.max_out, detach=detach,
    )  # fmt: skip
    y.backward(inputs["dy"].to(dtype))
    return {"y": y.detach()} | {f"d{k}": None if t is None else t.grad for k, t in leaves.items()}


def _is_channels_last(t: torch.Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def check(case: Case, device: str) -> None:
    """Forward, training and explanation gradients of one case against the oracle."""
    dtype, inputs = DTYPES[case.dtype], _inputs(case, device)
    x, weight, bias, dy = inputs["x"], inputs["weight"], inputs["bias"], inputs["dy"]
    options = (*case.geometry, case.b if inputs["b"] is None else 0.0, inputs["b"])
    squares = x.float().square().sum(1) if case.squares else None
    y, n, a, index = triton_kernels.conv2d_forward(
        x, weight, bias, *options, case.normalize, case.max_out, True, squares
    )
    assert y.dtype == dtype
    channels_last = _is_channels_last(x) or _is_channels_last(weight)
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    is_one = case.b == 1 and not case.b_tensor
    shape = (case.shape[0], case.outputs, *_output_size(case))
    assert n.shape == ((0,) if is_one else (shape[0], case.groups, *shape[2:]))
    # norms of small groups lie as the output does
    as_output = channels_last and not is_one and conv2d_small_groups.takes(weight, case.groups)
    assert n.is_contiguous(memory_format=torch.channels_last if as_output else torch.contiguous_format)
    keeps_a = case.b_tensor or case.b not in (1, 2) or (case.b == 2 and case.dtype == "fp16")
    assert a.shape == (shape if keeps_a else (0,)) and index.shape == (shape if case.max_out > 1 else (0,))
    wide_norm = None
    if not is_one:
        wide_norm = reference.conv2d_norm(x.double(), case.kernel, *case.geometry)
        assert_close("n", n, None, wide_norm, torch.float32)
    held = (None, n[:0], a[:0], index) if case.recompute else (y, n, a, index)
    for detach in (False, True):
        exact = _oracle(case, inputs, torch.float64, detach)
        eager = _oracle(case, inputs, dtype, detach)
        if not detach:
            assert_close("y", y, eager["y"], exact["y"], dtype)
        needs = (True, True, case.bias, case.b_tensor)
        dx, dw, dbias, db = triton_kernels.conv2d_backward(
            dy, x, weight, bias, *options, *held, case.normalize, case.max_out, detach, *needs
        )
        assert_close(f"dx, detach={detach}", dx, eager["dx"], exact["dx"], dtype)
        assert_close(f"dw, detach={detach}", dw, eager["dweight"], exact["dweight"], dtype)
        assert dx.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        assert not _is_channels_last(weight) or _is_channels_last(dw)
        if case.zeros:
            assert not y[1].any() and torch.isfinite(dx).all()
            assert not case.normalize or not dw[2].any()
        if case.bias:
            assert_close(f"dbias, detach={detach}", dbias, eager["dbias"], exact["dbias"], dtype)
        if case.b_tensor and detach:
            assert db.shape == () and db.item() == 0
        elif case.b_tensor:
            per_output = wide_norm.repeat_interleave(case.outputs // case.groups, dim=1)
            pre_scale = a if a.numel() else exact["y"]
            terms = dy.double() * exact["y"] * (pre_scale.double().abs() / per_output + 1e-6).log()
            assert db.dtype == torch.float32
            assert_close("db", db, None, exact["db"], dtype, scale=terms)


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


PLAIN = ((1, 1), (1, 1), (1, 1), 1, 2.0, None)  # stride, padding, dilation, groups, b


@pytest.mark.parametrize("batch, outputs, groups", [(0, 4, 1), (2, 0, 1), (0, 3, 3), (2, 0, 3)])
def test_empty(batch, outputs, groups):
    x, weight, bias = torch.randn(batch, 3, 5, 5), torch.randn(outputs, 3 // groups, 3, 3), torch.randn(outputs)
    options = ((1, 1), (1, 1), (1, 1), groups, 2.0, None)
    y, n, a, index = triton_kernels.conv2d_forward(x, weight, bias, *options, True, 1, True)
    assert y.shape == (batch, outputs, 5, 5) and n.shape == (batch, groups, 5, 5)
    dx, dw, dbias, db = triton_kernels.conv2d_backward(
        torch.randn(y.shape), x, weight, bias, *options, y, n, a, index, True, 1, False, True, True, True, False
    )
    for gradient, of in ((dx, x), (dw, weight), (dbias, bias)):
        assert gradient.shape == of.shape and not gradient.any()
    assert db is None


def test_unneeded_gradients_are_none():
    x, weight, dy = torch.randn(1, 4, 5, 5), torch.randn(3, 4, 3, 3), torch.randn(1, 3, 5, 5)
    y, n, a, index = triton_kernels.conv2d_forward(x, weight, None, *PLAIN, False, 1, True)
    arguments = (dy, x, weight, None, *PLAIN, y, n, a, index, False, 1, False)
    full = triton_kernels.conv2d_backward(*arguments, True, True, False, False)
    only_dx = triton_kernels.conv2d_backward(*arguments, True, False, False, False)
    only_dw = triton_kernels.conv2d_backward(*arguments, False, True, False, False)
    assert torch.equal(only_dx[0], full[0]) and only_dx[1:] == (None, None, None)
    assert torch.equal(only_dw[1], full[1]) and (only_dw[0], *only_dw[2:]) == (None, None, None)


def test_nan_reaches_the_windows_that_see_it():
    x, weight = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
    x[1, 2, 0, 0] = float("nan")
    seen = torch.zeros(2, 2, 6, 6, dtype=torch.bool)
    seen[1, :, :2, :2] = True
    y, n, a, index = triton_kernels.conv2d_forward(x, weight, None, *PLAIN, True, 2, True)
    assert torch.equal(y.isnan(), seen) and torch.equal(n.isnan(), seen[:, :1])
    dx, dw, _, _ = triton_kernels.conv2d_backward(
        torch.ones_like(y), x, weight, None, *PLAIN, y, n, a, index, True, 2, False, True, True, False, False
    )
    assert torch.isfinite(dx[0]).all() and torch.isfinite(dx[1, :, 3:, 3:]).all() and dx[1, :, :2, :2].isnan().all()
    assert dw.isnan().any()


@pytest.mark.parametrize("of_group, max_out", [(1, 1), (1, 3), (2, 2)])
def test_nan_reaches_its_group_alone(of_group, max_out):
    x, weight = torch.randn(2, 6, 6, 6), torch.randn(6 // of_group * max_out, of_group, 3, 3)
    groups = 6 // of_group
    x[1, 2, 0, 0] = float("nan")
    seen = torch.zeros(2, groups, 6, 6, dtype=torch.bool)
    seen[1, 2 // of_group, :2, :2] = True
    options = ((1, 1), (1, 1), (1, 1), groups, 2.0, None)
    y, n, _, _ = triton_kernels.conv2d_forward(x, weight, None, *options, True, max_out, True)
    assert torch.equal(y.isnan(), seen) and torch.equal(n.isnan(), seen)


def test_norms_may_lie_as_the_activation_does():
    """Of several groups they come in either order, and the gradients are the same bits."""
    x, weight, dy = torch.randn(2, 6, 5, 4), torch.randn(6, 1, 3, 3), torch.randn(2, 6, 5, 4)
    for w, groups in ((weight, 6), (torch.randn(6, 3, 3, 3), 2), (torch.randn(12, 3, 3, 3), 2)):
        window = ((1, 1), (1, 1), (1, 1), groups, 2.0, None)
        y, n, a, index = triton_kernels.conv2d_forward(x, w, None, *window, False, 1, True)
        dy = torch.randn(y.shape)
        first, second = (
            triton_kernels.conv2d_backward(
                dy, x, w, None, *window, y, n.contiguous(memory_format=format_), a, index, False, 1, False, True, True,
                False, False,
            )
            for format_ in (torch.contiguous_format, torch.channels_last)
        )  # fmt: skip
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_groups_of_few_channels_multiply_elementwise(monkeypatch):
    """Up to four channels and units, of several groups; one group, however few its channels, is a matrix product."""
    gradient = importlib.import_module("bcos_kernels.triton_kernels.conv2d_small_groups_gradient")
    ran = []
    for module, name in (
        (conv2d_small_groups, "launch_forward"), (gradient, "launch_da"), (gradient, "launch_dx"),
        (gradient, "launch_dw"),
    ):  # fmt: skip
        launch = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, launch=launch, name=name: (ran.append(name), launch(*a))[1])
    # the forward once, the gradient in training and in explanation mode
    whole = ["launch_forward", *["launch_da", "launch_dx", "launch_dw"] * 2]
    for channels, units, groups, small in (
        (4, 4, 2, True), (1, 1, 3, True), (5, 4, 2, False), (4, 5, 2, False), (3, 4, 1, False)
    ):  # fmt: skip
        check(Case("", shape=(1, channels * groups, 4, 3), outputs=units * groups, groups=groups), "cpu")
        assert ran == whole * small, (channels, units, groups)
        ran.clear()


def test_given_squares_are_what_the_norms_are_made_of():
    x, weight, squares = torch.randn(2, 4, 5, 5), torch.randn(3, 4, 3, 3), torch.rand(2, 5, 5)
    _, n, _, _ = triton_kernels.conv2d_forward(x, weight, None, *PLAIN, False, 1, False, squares)
    box = torch.nn.functional.conv2d(squares.double()[:, None], torch.ones(1, 1, 3, 3, dtype=torch.double), padding=1)
    assert_close("n", n, None, (box + 1e-6).sqrt(), torch.float32)


def test_one_pixel_windows_run_as_a_linear_layer(monkeypatch):
    conv2d = importlib.import_module("bcos_kernels.triton_kernels.conv2d")
    calls = []
    launch = conv2d.linear.launch_forward
    monkeypatch.setattr(conv2d.linear, "launch_forward", lambda *a, **k: (calls.append(1), launch(*a, **k)))
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(3, 4, 1, 1)
    window = ((1, 1), (0, 0), (1, 1), 1, 2.0, None)
    for t in (x, lay_out(x, "channels_last")):
        triton_kernels.conv2d_forward(t, weight, None, *window, False, 1, False)
    assert len(calls) == 1


def test_offsets_in_int64(monkeypatch):
    for name in ("conv2d", "conv2d_gradient", "conv2d_small_groups", "conv2d_small_groups_gradient"):
        module = importlib.import_module(f"bcos_kernels.triton_kernels.{name}")
        monkeypatch.setattr(module, "index64", lambda *tensors: True)
    check(Case("int64", max_out=2, normalize=True, stride=(2, 1), groups=2, outputs=4, bias=True), "cpu")
    check(Case("int64", squares=True, stride=(1, 2)), "cpu")
    check(Case("int64", shape=(1, 12, 5, 4), outputs=12, groups=2, max_out=2), "cpu")


def test_float64_is_not_built():
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="conv2d: .*float32, bfloat16, float16, got torch.float64"):
        triton_kernels.conv2d_forward(x, x, None, *PLAIN, False, 1, True)
    with pytest.raises(NotImplementedError, match="conv2d"):
        triton_kernels.conv2d_backward(
            x, x, x, None, *PLAIN, x, x, x, x, False, 1, False, True, True, False, False
        )  # fmt: skip


def test_public_function():
    x = torch.randn(3, 6, 5, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    with only("triton", "conv2d", "conv2d_backward"):
        y = bcos_kernels.conv2d(x, weight, padding="same", padding_mode="reflect", normalize_weight=True)
        y.square().sum().backward()
    leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = reference.conv2d(*leaves, padding="same", padding_mode="reflect", normalize_weight=True)
    expected.square().sum().backward()
    assert_close("y", y, None, expected, torch.float32)
    assert_close("dx", x.grad, None, leaves[0].grad, torch.float32)
    assert_close("dw", weight.grad, None, leaves[1].grad, torch.float32)
