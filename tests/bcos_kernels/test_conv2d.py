"""conv2d of every backend against the float64 reference: values, gradients and explanation-mode gradients."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

import bcos_kernels
from bcos_kernels import dispatch, reference
from tests.bcos_kernels import harness
from tests.bcos_kernels.tolerances import assert_close_to_reference


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...] = (3, 6, 9, 11)
    outputs: int = 8
    kernel: tuple[int, int] = (3, 3)
    window: dict = field(default_factory=dict)  # stride, padding, dilation, groups, padding_mode
    b: float = 2.0
    b_tensor: bool = False
    normalize: bool = False
    max_out: int = 1
    bias: bool = False
    layout: str = "contiguous"
    dy_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    scale: float = 1.0
    zero: str = ""  # "half", "patches", "units", "all": what is zero
    in_place: bool = False  # the output is changed in place before the backward

    def __str__(self) -> str:
        return self.name


def window(**options) -> dict:
    return options


CASES = [
    Case("tile-exact", shape=(2, 16, 16, 16), outputs=32, window=window(padding=1), layout="channels_last"),
    Case("odd", shape=(3, 5, 9, 11), outputs=7, kernel=(3, 2)),
    Case("odd, normalized", shape=(3, 5, 9, 11), outputs=7, normalize=True, window=window(padding=1)),
    Case("1x1", kernel=(1, 1)),
    Case("1x1, channels_last", kernel=(1, 1), layout="channels_last", dy_layout="channels_last", normalize=True),
    Case("1x1, stride 2", kernel=(1, 1), window=window(stride=2), layout="channels_last"),
    Case("1x1, padding 1", kernel=(1, 1), window=window(padding=1)),
    Case("2x2, padding 1", kernel=(2, 2), window=window(padding=1)),
    Case("1x7 and its padding", kernel=(1, 7), window=window(padding=(0, 3))),
    Case("5x5", kernel=(5, 5), window=window(padding=2), layout="channels_last"),
    Case("7x7, stride 2", shape=(2, 6, 17, 19), kernel=(7, 7), window=window(stride=2, padding=3), normalize=True),
    Case("11x11, stride 4", shape=(1, 3, 27, 25), kernel=(11, 11), window=window(stride=4, padding=2)),
    Case("11x11, more window than image", shape=(2, 2, 5, 6), kernel=(11, 11), window=window(padding=5)),
    Case("stride > kernel", kernel=(2, 2), window=window(stride=3)),
    Case("stride > kernel, padded, channels_last", kernel=(1, 2), window=window(stride=(3, 4), padding=(0, 1)),
         layout="channels_last"),
    Case("dilation 2", window=window(dilation=2, padding=2)),
    Case("dilation (2, 3), stride (2, 1), b 1.5", kernel=(3, 2), window=window(dilation=(2, 3), stride=(2, 1)), b=1.5),
    Case("groups 2", window=window(groups=2, padding=1)),
    Case("groups 2, channels_last, b 1.5", window=window(groups=2, padding=1), layout="channels_last", b=1.5),
    Case("groups 3, normalized, bias", outputs=9, window=window(groups=3), normalize=True, bias=True),
    Case("depthwise", outputs=6, window=window(groups=6, padding=1)),
    Case("depthwise, channels_last, stride 2", outputs=6, window=window(groups=6, padding=1, stride=2),
         layout="channels_last", normalize=True),
    Case("depthwise, two outputs a channel", outputs=12, window=window(groups=6), weight_layout="channels_last"),
    Case("depthwise 7x7, 40 channels", shape=(1, 40, 8, 8), outputs=40, kernel=(7, 7),
         window=window(groups=40, padding=3), layout="channels_last"),
    Case("groups of one-channel maps, 1x1", outputs=6, kernel=(1, 1), window=window(groups=6)),
    Case("one image", shape=(1, 6, 9, 11), bias=True),
    Case("one-pixel image", shape=(1, 5, 1, 1), kernel=(1, 1)),
    Case("one-pixel image, 3x3", shape=(2, 5, 1, 1), window=window(padding=1), layout="channels_last"),
    Case("one-pixel output, one channel", shape=(4, 1, 3, 3), outputs=1),
    Case("one row, channels_last", shape=(2, 6, 1, 13), kernel=(1, 3), layout="channels_last"),
    Case("one channel in, channels_last weight", shape=(2, 1, 6, 7), weight_layout="channels_last"),
    Case("one channel out, channels_last", outputs=1, layout="channels_last", window=window(padding=1)),
    Case("empty", shape=(0, 6, 9, 11), bias=True),
    Case("empty, channels_last, b 1.5", shape=(0, 6, 9, 11), layout="channels_last", b=1.5, b_tensor=True),
    Case("more than a block of pixels", shape=(1, 4, 24, 29), outputs=5, window=window(padding=1)),
    Case("more than a block of pixels, b tensor", shape=(2, 4, 24, 29), outputs=4, window=window(padding=1, groups=2),
         b=1.5, b_tensor=True),
    Case("more than a block of channels", shape=(1, 300, 3, 4), outputs=270, kernel=(1, 1), layout="channels_last"),
    Case("more than a block of channels, planes", shape=(1, 300, 3, 4), outputs=270, kernel=(1, 1)),
    Case("unbatched", shape=(6, 9, 11), window=window(padding=1)),
    Case("unbatched, strided, b 1.5", shape=(6, 9, 11), layout="strided", b=1.5),
    Case("strided", layout="strided", dy_layout="strided", weight_layout="strided", normalize=True),
    Case("transposed", layout="transposed", dy_layout="transposed", weight_layout="transposed"),
    Case("expanded", layout="expanded", dy_layout="expanded", window=window(padding=1)),
    Case("unaligned", layout="offset", dy_layout="offset", weight_layout="offset"),
    Case("channels_last gradient alone", dy_layout="channels_last"),
    Case("channels_last weight alone", weight_layout="channels_last", window=window(padding=1), normalize=True),
    Case("channels_last throughout", layout="channels_last", dy_layout="channels_last", weight_layout="channels_last",
         window=window(padding=1, stride=2), normalize=True),
    Case("same", window=window(padding="same")),
    Case("same, even kernel", kernel=(4, 2), window=window(padding="same")),
    Case("same, dilation", kernel=(2, 3), window=window(padding="same", dilation=(3, 2)), layout="channels_last"),
    Case("valid", window=window(padding="valid", stride=2)),
    Case("reflect", window=window(padding=2, padding_mode="reflect")),
    Case("replicate, b 1.5", window=window(padding=(3, 1), padding_mode="replicate"), b=1.5, layout="channels_last"),
    Case("circular", window=window(padding=(1, 2), padding_mode="circular"), normalize=True),
    Case("circular, same, even kernel", kernel=(2, 2), window=window(padding="same", padding_mode="circular")),
    Case("reflect, unbatched, same", shape=(6, 9, 11), window=window(padding="same", padding_mode="reflect")),
    Case("half zeros", zero="half", window=window(padding=1)),
    Case("zero patches", zero="patches", window=window(padding=1), normalize=True),
    Case("zero patches, b 1.5", zero="patches", b=1.5, layout="channels_last"),
    Case("zero patches, bias", zero="patches", bias=True),
    Case("zero units, normalized", zero="units", normalize=True, weight_layout="channels_last"),
    Case("zero input", zero="all", normalize=True, window=window(padding=1)),
    Case("zero input, b 3, channels_last", zero="all", b=3.0, layout="channels_last"),
    Case("values of 1e4", scale=1e4, window=window(padding=1)),
    Case("values of 1e4, channels_last, b 1.5, normalized", scale=1e4, b=1.5, normalize=True, layout="channels_last"),
    Case("b 1", b=1.0, window=window(padding=1)),
    Case("b 1, normalized, bias, max_out 3, channels_last", b=1.0, normalize=True, bias=True, max_out=3,
         layout="channels_last"),
    Case("b 1.5, channels_last", b=1.5, layout="channels_last", window=window(padding=1)),
    Case("b 3, normalized, bias", b=3.0, normalize=True, bias=True),
    Case("b tensor 1.75", b=1.75, b_tensor=True),
    Case("b tensor 2, normalized, bias, channels_last", b=2.0, b_tensor=True, normalize=True, bias=True,
         layout="channels_last"),
    Case("b tensor 1", b=1.0, b_tensor=True),
    Case("max_out 2", max_out=2, window=window(padding=1)),
    Case("max_out 2, channels_last", max_out=2, window=window(padding=1), layout="channels_last", normalize=True),
    Case("max_out 3, groups 2, bias, b tensor", max_out=3, outputs=4, window=window(groups=2), bias=True, b=2.5,
         b_tensor=True),
    Case("max_out 2, depthwise, channels_last, b 1.5", max_out=2, outputs=6, window=window(groups=6, padding=2),
         kernel=(5, 5), b=1.5, layout="channels_last"),
    Case("max_out 3, one channel out, channels_last", outputs=1, max_out=3, layout="channels_last"),
    Case("max_out 2, one channel out, b 1, channels_last weight", outputs=1, max_out=2, b=1.0,
         weight_layout="channels_last"),
    Case("max_out 2, one channel out a group, b 1.5, channels_last", outputs=2, max_out=2, b=1.5,
         window=window(groups=2), layout="channels_last"),
    Case("changed in place", in_place=True, normalize=True, bias=True, window=window(padding=1)),
    Case("changed in place, channels_last", in_place=True, layout="channels_last", window=window(stride=2)),
    Case("changed in place, unbatched", in_place=True, shape=(6, 9, 11)),
    Case("changed in place, max_out 2, groups 2", in_place=True, max_out=2, window=window(groups=2)),
    Case("changed in place, one-pixel image", in_place=True, shape=(2, 5, 1, 1), window=window(padding=1),
         layout="channels_last"),
    Case("blocks of rows", shape=(3, 60, 31, 33), outputs=70, kernel=(1, 1), layout="channels_last"),
    Case("blocks of rows, normalized, bias, b 1.5", shape=(3, 60, 31, 33), outputs=50, kernel=(1, 1), normalize=True,
         bias=True, b=1.5, layout="channels_last", dy_layout="channels_last"),
    Case("blocks of rows, stride (2, 3)", shape=(11, 60, 31, 33), outputs=70, kernel=(1, 1),
         window=window(stride=(2, 3)), layout="channels_last"),
    Case("blocks of rows, stride 2, max_out 2, b tensor", shape=(5, 60, 41, 43), outputs=35, kernel=(1, 1), max_out=2,
         window=window(stride=2), b=1.75, b_tensor=True, layout="channels_last"),
    Case("a weight too large for blocks, stride 2", shape=(2, 520, 5, 4), outputs=530, kernel=(1, 1), normalize=True,
         window=window(stride=2), layout="channels_last"),
    Case("a weight too large for blocks, stride 2, b 1", shape=(2, 520, 5, 4), outputs=530, kernel=(1, 1), b=1.0,
         window=window(stride=2), layout="channels_last"),
    Case("blocks of rows, changed in place", shape=(3, 60, 31, 33), outputs=70, kernel=(1, 1), in_place=True,
         weight_layout="channels_last", layout="channels_last"),
]  # fmt: skip


def inputs_of(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
    """x, weight, bias and b."""
    units, groups = case.outputs * case.max_out, case.window.get("groups", 1)
    weight_shape = (units, case.shape[-3] // groups, *case.kernel)
    patch = torch.Size(weight_shape[1:]).numel()
    if case.max_out > 1:
        x = harness.integers(case.shape, 1, dtype)
        weight = harness.signs(weight_shape, 2, dtype)
        bias = harness.integers((units,), 3, dtype)
    else:
        x = harness.randn(case.shape, 1, dtype, case.scale)
        weight = harness.randn(weight_shape, 2, dtype, patch**-0.5)
        bias = harness.randn((units,), 3, dtype, 0.3)
    if case.zero == "half":
        x.relu_()
    if case.zero == "patches":
        x[..., :6, :] = 0
    if case.zero == "units":
        weight[::3] = 0
    if case.zero == "all":
        x.zero_()
    wide = reference.statistics_dtype(dtype)
    return {
        "x": harness.lay_out(x, case.layout),
        "weight": harness.lay_out(weight, case.weight_layout),
        "bias": bias if case.bias else None,
        "b": torch.tensor(case.b, dtype=wide) if case.b_tensor else None,
    }


def apply(function, case: Case, leaves, b=None, detach: bool = False) -> torch.Tensor:
    return function(
        leaves["x"],
        leaves["weight"],
        leaves["bias"],
        **case.window,
        b=b or (case.b if leaves["b"] is None else leaves["b"]),
        normalize_weight=case.normalize,
        max_out=case.max_out,
        detach=detach,
    )


def differentiate(function, case: Case, leaves, dy, detach: bool) -> dict[str, torch.Tensor | None]:
    y = apply(function, case, leaves, detach=detach)
    value = y.detach().clone()
    if case.in_place and function is bcos_kernels.conv2d:
        y += 1
    return {"y": value, **harness.gradients(y, leaves, dy)}


def gradient_of_output(case: Case, inputs, dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        shape = apply(reference.conv2d, case, harness.leaves_of(inputs, torch.float64)).shape
    # float16 holds the gradients of large inputs if ∂L/∂y is small
    dy = harness.randn(shape, 4, dtype, case.scale**-0.5)
    if case.bias and case.zero == "patches":
        dy[..., :4, :] = 0  # y = β|β|/1e-3 there, which is compared as it is
    return harness.lay_out(dy, case.dy_layout)


def terms_of_db(case: Case, inputs, dy) -> torch.Tensor:
    """What ∂L/∂B is the sum of: g y log c, and c from y = a c^(B − 1)."""
    exact = {name: None if t is None else t.detach().double() for name, t in inputs.items()}
    a = apply(reference.conv2d, case, exact, b=1.0)
    y = apply(reference.conv2d, case, exact)
    if case.b == 1:  # c from B = 2, but for the epsilon in it
        log_c = (apply(reference.conv2d, case, exact, b=2.0) / a).abs().log()
    else:
        log_c = (y / a).abs().log() / (case.b - 1)
    return torch.where(a == 0, 0.0, dy.double() * y * log_c)


@functools.lru_cache(maxsize=8)
def expectations(position: int, dtype: torch.dtype, detach: bool) -> tuple[dict, dict]:
    """(oracle in float64, eager reference in ``dtype``) of a case, which the tests of both backends are held to."""
    case = CASES[position]
    inputs = inputs_of(case, dtype)
    dy = gradient_of_output(case, inputs, dtype)
    oracle = differentiate(reference.conv2d, case, harness.leaves_of(inputs, torch.float64), dy, detach)
    return oracle, differentiate(reference.conv2d, case, harness.leaves_of(inputs), dy, detach)


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, backend, dtype):
    dtype = harness.DTYPES[dtype]
    inputs = inputs_of(case, dtype)
    dy = gradient_of_output(case, inputs, dtype)
    for detach in (False, True):
        oracle, eager = expectations(CASES.index(case), dtype, detach)
        with harness.only(backend, "conv2d", "conv2d_backward"):
            got = differentiate(bcos_kernels.conv2d, case, harness.leaves_of(inputs), dy, detach)
        assert got["y"].dtype == dtype
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
            assert not got["dweight"][::3].any() and not got["y"][:, ::3].any()
        if case.zero == "all":
            assert not got["y"].any() and not got["dweight"].any()


@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("b, dtype", [(1, "fp32"), (2, "fp32"), (2, "fp16"), (1.5, "bf16")])
@pytest.mark.parametrize("max_out", [1, 2])
@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_layout_of_the_output(layout, weight_layout, max_out, b, dtype, backend):
    """channels_last if the input or the weight is, and the gradients alike, whatever the layout of ∂L/∂y."""
    case = Case("", b=b, max_out=max_out, layout=layout, weight_layout=weight_layout)
    leaves = harness.leaves_of(inputs_of(case, harness.DTYPES[dtype]))
    with harness.only(backend, "conv2d", "conv2d_backward"):
        y = apply(bcos_kernels.conv2d, case, leaves)
        dx, dweight = torch.autograd.grad(y, (leaves["x"], leaves["weight"]), torch.ones_like(y))
    last, first = torch.channels_last, torch.contiguous_format
    either = last if "channels_last" in (layout, weight_layout) else first
    assert y.is_contiguous(memory_format=either)
    assert dx.is_contiguous(memory_format=either)
    assert dweight.is_contiguous(memory_format=last if weight_layout == "channels_last" else first)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize(
    "shape, outputs, kernel",
    [
        ((2, 3, 1, 1), 4, (1, 1)),
        ((2, 1, 4, 4), 1, (3, 3)),
        ((2, 3, 4, 4), 1, (3, 3)),
        ((1, 3, 3, 3), 4, (3, 3)),
        ((2, 3, 1, 5), 4, (1, 3)),
        ((2, 3, 5, 1), 4, (3, 1)),
    ],
    ids=str,
)
def test_in_place_addition_to_outputs_of_size_one(shape, outputs, kernel, backend, layout):
    """Dimensions of size 1 leave strides open; whichever the output has, it is no view: `out += identity` is legal."""
    x = harness.lay_out(harness.randn(shape, 1, torch.float32), layout)
    weight = harness.randn((outputs, shape[1], *kernel), 2, torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight)]
    with harness.only(backend, "conv2d", "conv2d_backward"):
        y = bcos_kernels.conv2d(*leaves)
        identity = harness.randn(tuple(y.shape), 3, torch.float32).requires_grad_()
        assert not y._is_view()
        y += identity
        y = torch.relu_(y)
        got = torch.autograd.grad(y.square().sum(), [*leaves, identity])
    exact = [t.detach().double().requires_grad_() for t in (*leaves, identity)]
    z = torch.relu(reference.conv2d(*exact[:2]) + exact[2])
    for name, value, expected in zip(
        ("dx", "dweight", "didentity"), got, torch.autograd.grad(z.square().sum(), exact), strict=True
    ):
        assert_close_to_reference(name, value, None, expected, torch.float32)


@pytest.mark.parametrize("order, dtype", [*((1, dtype) for dtype in harness.DTYPES), (2, "fp32"), (2, "fp64")])
@pytest.mark.parametrize("odd", ["x", "weight", "dy"])
@pytest.mark.parametrize("backend", harness.BACKENDS)
def test_open_strides_of_dimensions_of_size_one(backend, odd, order, dtype):
    """Which stride such a dimension has means nothing; torch's own convolution returns wrong values for some."""
    dtype = harness.DTYPES[dtype]
    x = harness.lay_out(harness.randn((1, 21, 1, 13), 1, dtype), "channels_last")
    weight = harness.lay_out(harness.randn((21, 7, 1, 5), 2, dtype, 0.2), "channels_last")
    dy = harness.lay_out(harness.randn((1, 21, 1, 9), 3, dtype), "channels_last")
    tensors = {"x": x, "weight": weight, "dy": dy}
    t = tensors[odd]
    # as a permutation leaves them behind: dimensions of size 1 with the stride of their neighbour
    tensors[odd] = t.as_strided(
        t.shape, [t.shape[1] if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]
    )
    assert tensors[odd].is_contiguous(memory_format=torch.channels_last) and torch.equal(tensors[odd], t)

    def derivatives(module, tensors):
        leaves = harness.leaves_of(tensors)
        y = module.conv2d(leaves["x"], leaves["weight"], groups=3, normalize_weight=True)
        first = torch.autograd.grad(y, (leaves["x"], leaves["weight"]), leaves["dy"], create_graph=order == 2)
        if order == 1:
            return y, *first
        return torch.autograd.grad(first[0].square().sum(), list(leaves.values()))

    with bcos_kernels.backend(backend):
        got = derivatives(bcos_kernels, tensors)
    exact = derivatives(reference, {name: t.double().contiguous() for name, t in tensors.items()})
    for mine, theirs in zip(got, exact, strict=True):
        assert_close_to_reference(f"{odd}, order {order}", mine, None, theirs, dtype)


@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "b"])
@pytest.mark.parametrize("b", [1.0, 2.0, 1.5])
def test_one_gradient_alone(wanted, b, backend):
    """What is not asked for changes nothing in what is."""
    case = Case("", bias=True, b=b, b_tensor=wanted == "b", normalize=True, layout="channels_last")
    inputs = inputs_of(case, torch.float32)
    dy = gradient_of_output(case, inputs, torch.float32)
    exact = differentiate(reference.conv2d, case, harness.leaves_of(inputs, torch.float64), dy, False)
    leaves = {k: None if t is None else t.detach().requires_grad_(k == wanted) for k, t in inputs.items()}
    with harness.only(backend, "conv2d", "conv2d_backward"):
        (alone,) = torch.autograd.grad(apply(bcos_kernels.conv2d, case, leaves), leaves[wanted], dy)
    scale = terms_of_db(case, inputs, dy) if wanted == "b" else None
    assert_close_to_reference(wanted, alone, None, exact[f"d{wanted}"], torch.float32, scale)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(1, 2), "same"])
@pytest.mark.parametrize("backend", harness.BACKENDS)
def test_padding_is_that_of_torch(backend, padding, mode):
    """For every mode as `torch.nn.Conv2d` pads, which is another implementation than the reference's."""
    layer = torch.nn.Conv2d(4, 6, (2, 3), padding=padding, padding_mode=mode, bias=False, dtype=torch.float64)
    ones = torch.nn.Conv2d(1, 1, (2, 3), padding=padding, padding_mode=mode, bias=False, dtype=torch.float64)
    torch.nn.init.ones_(ones.weight)
    x = harness.randn((2, 4, 6, 7), 1, torch.float64)
    with torch.no_grad():
        a, n = layer(x), (ones(x.square().sum(1, keepdim=True)) + 1e-6).sqrt()
        with harness.only(backend, "conv2d"):
            y = bcos_kernels.conv2d(x, layer.weight, padding=padding, padding_mode=mode)
    assert_close_to_reference("y", y, None, a * a.abs() / n, torch.float64)


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("b, max_out", [(1.0, 1), (2.0, 1), (1.5, 1), (2.0, 2)])
def test_nan_comes_out_where_it_goes_in(b, max_out, layout, backend, dtype):
    dtype = harness.DTYPES[dtype]
    x, weight = harness.randn((2, 4, 7, 7), 1, dtype), harness.randn((6, 4, 3, 3), 2, dtype)
    x[0, 1, 0, 0] = float("nan")
    x = harness.lay_out(x, layout).requires_grad_()
    weight.requires_grad_()
    with harness.only(backend, "conv2d", "conv2d_backward"):
        y = bcos_kernels.conv2d(x, weight, b=b, max_out=max_out)
        y.float().sum().backward()
    expected = torch.zeros(y.shape, dtype=torch.bool)
    expected[0, :, 0, 0] = True
    assert torch.equal(y.isnan(), expected)
    assert torch.isfinite(x.grad[1]).all() and torch.isfinite(x.grad[0, :, 3:]).all()
    assert weight.grad.isnan().any()
    if b != 1:
        assert x.grad[0, :, 0, 0].isnan().all()


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_ties_go_to_the_first_unit(layout, backend, dtype):
    dtype = harness.DTYPES[dtype]
    # whole numbers, of which products are exact in whatever order a library sums them
    x = harness.lay_out(harness.integers((2, 3, 5, 5), 1, dtype), layout)
    weight = harness.signs((4, 3, 3, 3), 2, dtype).repeat_interleave(3, dim=0).requires_grad_()
    with harness.only(backend, "conv2d", "conv2d_backward"):
        bcos_kernels.conv2d(x, weight, max_out=3).sum().backward()
    by_unit = weight.grad.unflatten(0, (4, 3)).flatten(2).abs().sum(2)
    assert by_unit[:, 0].all() and not by_unit[:, 1:].any()


@pytest.mark.parametrize("backend", harness.BACKENDS)
def test_large_values_do_not_overflow_in_the_norm(backend):
    """1e4 squared is beyond float16: an all-1e4 image has |cos| = 1 with a constant weight and y = a."""
    x = torch.full((1, 8, 5, 5), 1e4, dtype=torch.float16)
    weight = torch.full((2, 8, 3, 3), 1 / 72, dtype=torch.float16)
    with harness.only(backend, "conv2d"):
        y = bcos_kernels.conv2d(x, weight)
    a = F.conv2d(x.double(), weight.double())
    assert_close_to_reference("y", y, None, a * a / (1e4 * 72**0.5), torch.float16)


@pytest.mark.parametrize("kernel", [1, 3])
def test_no_input_channels(kernel):
    """As in torch, whose output has none either. The CPU kernels leave it to the definition."""
    x, weight = torch.randn(2, 0, 6, 6), torch.randn(8, 0, kernel, kernel)
    for options in ({}, {"b": 1.5}):
        with pytest.warns(RuntimeWarning, match="the CPU kernels expect C >= 1"):
            dispatch._warned.clear()
            y = bcos_kernels.conv2d(x, weight, **options)
        assert y.shape == F.conv2d(x, weight).shape
    with bcos_kernels.backend("cpu"), pytest.raises(NotImplementedError, match="conv2d: the CPU kernels expect C >= 1"):
        bcos_kernels.conv2d(x, weight)
