"""conv2d_batch_norm of every backend against the float64 definition of the two ops: values, running statistics,
gradients of both orders in training and in explanation mode; what is kept, recomputed, compiled and transformed."""

from __future__ import annotations

import gc
import itertools
import weakref
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

import bcos_kernels
from bcos_kernels import composed, conv2d_batch_norm, reference
from bcosification.evaluation.measuring import bytes_kept
from tests.bcos_kernels import harness
from tests.bcos_kernels.tolerances import assert_close_to_reference

OPS = torch.ops.bcos_kernels
BOTH = ("conv2d_batch_norm", "conv2d_batch_norm_backward")


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
    bias: bool = False  # the convolution's
    parameters: bool = True  # the normalisation's
    layout: str = "channels_last"
    dz_layout: str = "channels_last"
    weight_layout: str = "contiguous"
    residual_layout: str = "channels_last"
    zero: bool = False
    eps: float = 1e-5

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Mode:
    training: bool = True
    relu: bool = True
    residual: bool = False
    detach: bool = False


MODES = [Mode(*flags) for flags in itertools.product((True, False), repeat=4)]
HALF = [Mode(*flags) for flags in itertools.product((True, False), repeat=4) if sum(flags) % 2]  # any three in all ways


def window(**options) -> dict:
    return options


CASES = [
    Case("3x3", window=window(padding=1), normalize=True),
    Case("3x3, stride 2, channels_last throughout", window=window(stride=2, padding=1), weight_layout="channels_last"),
    Case("3x3, no parameters, conv bias", parameters=False, bias=True),
    Case("1x1", kernel=(1, 1), normalize=True),
    Case("1x1, stride 2, conv bias", kernel=(1, 1), window=window(stride=2), bias=True),
    Case("groups 2", window=window(groups=2, padding=1), normalize=True),
    Case("depthwise, stride 2", outputs=6, window=window(groups=6, padding=1, stride=2), bias=True),
    Case("dilation (1, 2)", window=window(dilation=(1, 2), padding=(0, 1))),
    Case("odd", shape=(3, 5, 7, 9), outputs=7, kernel=(3, 2), eps=1e-3),
    Case("reflect", window=window(padding=1, padding_mode="reflect"), dz_layout="strided"),
    Case("one-pixel images", shape=(24, 5, 1, 1), kernel=(1, 1)),
    Case("one-pixel images, 3x3, channels_last weight", shape=(40, 16, 1, 1), window=window(padding=1),
         weight_layout="channels_last"),
    Case("two blocks of rows", shape=(3, 60, 21, 21), outputs=40, kernel=(1, 1), normalize=True),
    Case("a block of rows, stride (2, 3)", shape=(3, 40, 23, 31), outputs=60, kernel=(1, 1),
         window=window(stride=(2, 3)), bias=True, dz_layout="contiguous"),
    Case("contiguous", window=window(padding=1), layout="contiguous", dz_layout="contiguous",
         residual_layout="contiguous", bias=True),
    Case("contiguous, channels_last weight", window=window(padding=1), layout="contiguous", residual_layout="strided",
         weight_layout="channels_last", dz_layout="transposed"),
    Case("strided", layout="strided", weight_layout="strided", dz_layout="strided", residual_layout="expanded"),
    Case("empty", shape=(0, 6, 9, 11), bias=True),
    Case("empty, b 1.5", shape=(0, 6, 9, 11), b=1.5, layout="contiguous"),
    Case("zero input", zero=True, window=window(padding=1)),
    Case("max_out 2", max_out=2, window=window(padding=1)),
    Case("max_out 2, contiguous, b 1", max_out=2, b=1.0, layout="contiguous", bias=True),
    Case("b 1", b=1.0, kernel=(1, 1)),
    Case("b 1.5, normalized", b=1.5, normalize=True),
    Case("b tensor 1.75, groups 2, conv bias", b=1.75, b_tensor=True, window=window(groups=2), bias=True),
]  # fmt: skip


def inputs_of(case: Case, dtype: torch.dtype) -> dict[str, Tensor | None]:
    units, groups = case.outputs * case.max_out, case.window.get("groups", 1)
    weight_shape = (units, case.shape[1] // groups, *case.kernel)
    patch = torch.Size(weight_shape[1:]).numel()
    if case.max_out > 1:
        x, weight = harness.integers(case.shape, 1, dtype), harness.signs(weight_shape, 2, dtype)
        bias = harness.integers((units,), 3, dtype)
    else:
        x, weight = harness.randn(case.shape, 1, dtype), harness.randn(weight_shape, 2, dtype, patch**-0.5)
        bias = harness.randn((units,), 3, dtype, 0.3)
    if case.zero:
        x.zero_()
    wide = reference.statistics_dtype(dtype)
    residual = harness.randn(shape_of_output(case), 5, dtype)
    return {
        "x": harness.lay_out(x, case.layout),
        "weight": harness.lay_out(weight, case.weight_layout),
        "bias": bias if case.bias else None,
        "b": torch.tensor(case.b, dtype=wide) if case.b_tensor else None,
        "norm_weight": 1 + harness.randn((case.outputs,), 6, wide, 0.3) if case.parameters else None,
        "norm_bias": harness.randn((case.outputs,), 7, wide, 0.3) if case.parameters else None,
        "residual": harness.lay_out(residual, case.residual_layout),
    }


def shape_of_output(case: Case) -> tuple[int, ...]:
    x = torch.empty(case.shape, device="meta")
    weight = torch.empty((case.outputs, case.shape[1] // case.window.get("groups", 1), *case.kernel), device="meta")
    return tuple(reference.conv2d(x, weight, **case.window, b=1.0).shape)


def running_var_of(case: Case, dtype: torch.dtype) -> Tensor:
    """About the variance of a convolution's output."""
    values = (0.5 + harness.randn((case.outputs,), 8, torch.float64).square()) / 10
    return values.to(reference.statistics_dtype(dtype))


def gradient_of_output(case: Case, dtype: torch.dtype) -> Tensor:
    return harness.lay_out(harness.randn(shape_of_output(case), 4, dtype), case.dz_layout)


def leaves_of(inputs: dict[str, Tensor | None], mode: Mode, dtype: torch.dtype | None = None):
    return harness.leaves_of(inputs if mode.residual else inputs | {"residual": None}, dtype)


def options_of(case: Case, leaves) -> dict:
    """Of the convolution."""
    b = case.b if leaves["b"] is None else leaves["b"]
    return dict(**case.window, b=b, normalize_weight=case.normalize, max_out=case.max_out)


def apply(case: Case, leaves, mode: Mode, running_var: Tensor | None, **others) -> Tensor:
    return conv2d_batch_norm(
        leaves["x"], leaves["weight"], leaves["bias"], **options_of(case, leaves), running_var=running_var,
        norm_weight=leaves["norm_weight"], norm_bias=leaves["norm_bias"], residual=leaves["residual"],
        training=mode.training, eps=case.eps, activation="relu" if mode.relu else None, detach=mode.detach, **others,
    )  # fmt: skip


def separately(module, case: Case, leaves, mode: Mode, running_var: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    """(y, z) by the two ops of ``module``."""
    y = module.conv2d(
        leaves["x"], leaves["weight"], leaves["bias"], **options_of(case, leaves), detach=mode.detach
    )  # fmt: skip
    return y, module.batch_norm_uncentered(
        y, running_var, leaves["norm_weight"], leaves["norm_bias"], training=mode.training, eps=case.eps,
        residual=leaves["residual"], activation="relu" if relu else None, detach=mode.detach,
    )  # fmt: skip


def differentiate(case: Case, leaves, mode: Mode, dz: Tensor) -> dict[str, Tensor | None]:
    running_var = running_var_of(case, leaves["x"].dtype)
    z = apply(case, leaves, mode, running_var)
    return {"z": z.detach(), "running_var": running_var, **harness.gradients(z, leaves, dz)}


def define(case: Case, inputs, mode: Mode, dz: Tensor, z: Tensor, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """What `differentiate` should give: the definition in ``dtype``, with the ReLU's mask of ``z``.

    Rounding decides about outputs near 0, so a mask of the definition's own would be another one.
    """
    leaves, running_var = leaves_of(inputs, mode, dtype), running_var_of(case, dtype)
    y, pre = separately(reference, case, leaves, mode, running_var, relu=False)
    passes = z > 0 if mode.relu else torch.ones_like(z, dtype=torch.bool)
    out = torch.where(passes, pre, 0.0)
    found = harness.gradients(out, leaves | {"y": y}, dz)
    return {"z": out.detach(), "pre": pre.detach(), "running_var": running_var, **found} | {
        f"terms of {name}": terms for name, terms in terms_of(case, leaves, y, found["dy"], passes * dz, mode).items()
    }


def terms_of(case: Case, leaves, y: Tensor, dy: Tensor, dz: Tensor, mode: Mode) -> dict[str, Tensor]:
    """What ∂L/∂B and ∂L/∂(norm weight) are sums of, in which terms cancel: g y log c, and g y/std.

    c from y = a c^(B − 1); g is the gradient of y, respectively z's behind the ReLU.
    """
    y, dy, terms = y.detach(), dy.detach(), {}
    if leaves["norm_weight"] is not None:
        dims = (0, 2, 3)
        var = y.var(dims, unbiased=False) if mode.training else running_var_of(case, torch.float64)
        terms["dnorm_weight"] = dz * y / (var + case.eps).sqrt()[:, None, None]
    if leaves["b"] is not None and not mode.detach:
        a = reference.conv2d(leaves["x"], leaves["weight"], leaves["bias"], **options_of(case, leaves) | {"b": 1.0})
        terms["db"] = dy * y * (y / a.detach()).abs().log() / (case.b - 1)
    return terms


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, backend, dtype):
    dtype = harness.DTYPES[dtype]
    inputs, dz = inputs_of(case, dtype), gradient_of_output(case, dtype)
    modes = MODES if backend == "cpu" and dtype != torch.float16 else HALF  # where nothing is fused
    with harness.only(backend, *BOTH):
        found = [differentiate(case, leaves_of(inputs, mode), mode, dz) for mode in modes]
    before = running_var_of(case, dtype)
    for mode, got in zip(modes, found, strict=True):
        z = got["z"]
        oracle = define(case, inputs, mode, dz, z, torch.float64)
        eager = oracle if dtype == torch.float64 else define(case, inputs, mode, dz, z, dtype)
        assert z.dtype == dtype
        pre = oracle["pre"]
        if mode.relu and pre.numel():
            assert (z >= 0).all()
            differs = (z <= 0) != (pre <= 0)
            assert (pre[differs].abs() <= 4 * torch.finfo(dtype).eps * pre.abs().max()).all(), mode
        running_var = got.pop("running_var")
        if mode.training and z.numel():
            assert_close_to_reference(
                f"running_var, {mode}", running_var, eager["running_var"], oracle["running_var"], dtype
            )
        else:
            assert torch.equal(running_var, before)
        for name, value in got.items():
            if value is None:
                assert name == "db" and mode.detach and oracle[name] is None  # nothing flows to b
                continue
            # the rounding of a channel's statistics is common to all terms of ∂L/∂B: the bound alone applies
            rounded = None if name == "db" else eager[name]
            scale = oracle.get(f"terms of {name}")
            assert_close_to_reference(f"{name}, {mode}", value, rounded, oracle[name], dtype, scale)


# Beside the two ops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["3x3", "contiguous", "two blocks of rows", "groups 2", "b 1.5, normalized"])
@pytest.mark.parametrize("backend", harness.BACKENDS)
def test_equals_the_two_ops(backend, case):
    """To the bit where they are what runs; the fused form sums a channel's moments in another order. running_var is
    updated alike, with any momentum, and left alone in eval mode."""
    case = named(case)
    fused = backend == "cpu" and case.b == 2 and case.layout == "channels_last"
    inputs, dz = inputs_of(case, torch.float32), gradient_of_output(case, torch.float32)
    for mode in MODES:
        leaves, mine, theirs = leaves_of(inputs, mode), *(running_var_of(case, torch.float32) for _ in range(2))
        with bcos_kernels.backend(backend):
            z = apply(case, leaves, mode, mine, momentum=0.3)
            got = {"z": z, "running_var": mine, **harness.gradients(z, leaves, dz)}
            y = bcos_kernels.conv2d(leaves["x"], leaves["weight"], leaves["bias"], **options_of(case, leaves),
                                    detach=mode.detach)  # fmt: skip
            out = bcos_kernels.batch_norm_uncentered(
                y, theirs, leaves["norm_weight"], leaves["norm_bias"], training=mode.training, momentum=0.3,
                eps=case.eps, activation="relu" if mode.relu else None, residual=leaves["residual"], detach=mode.detach,
            )  # fmt: skip
            expected = {"z": out, "running_var": theirs, **harness.gradients(out, leaves, dz)}
        assert mode.training != torch.equal(mine, running_var_of(case, torch.float32))
        for name, value in got.items():
            assert_same(value, expected[name], 1e-6 if fused else 0.0, f"{name}, {mode}")


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def assert_same(got: Tensor, expected: Tensor, bound: float, name: str = "") -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype, name
    difference, norm = (got - expected).norm().item(), expected.norm().item()
    assert difference <= bound * norm, f"{name}: error {difference / (norm or 1):.3g}"


FUSED = {  # changes to a case, whether convolution and normalisation run as one
    "channels_last": (dict(), "fp32", True),
    "1x1, fp64": (dict(kernel=(1, 1)), "fp64", True),
    "depthwise, bf16": (dict(outputs=6, window=window(groups=6)), "bf16", True),
    "channels_last weight alone": (dict(layout="contiguous", weight_layout="channels_last"), "fp32", True),
    "contiguous": (dict(layout="contiguous"), "fp32", False),
    "fp16": (dict(), "fp16", False),
    "max_out 2": (dict(max_out=2), "fp32", False),
    "b 1.5": (dict(b=1.5), "fp32", False),
    "b tensor 2": (dict(b_tensor=True), "fp32", False),
    "empty": (dict(shape=(0, 6, 9, 11)), "fp32", False),
}


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused(name, monkeypatch):
    """As the docstring says it; forward and backward agree."""
    changes, dtype, fused = FUSED[name]
    case, mode, dtype, ran = replace(Case(""), **changes), Mode(residual=True), harness.DTYPES[dtype], []
    leaves, dz = leaves_of(inputs_of(case, dtype), mode), gradient_of_output(case, dtype)
    launchers = [f"conv2d_batch_norm_{direction}" for direction in ("forward", "backward")]
    for launcher in launchers:
        launch = getattr(composed, launcher)
        monkeypatch.setattr(composed, launcher, lambda *a, n=launcher, f=launch: ran.append(n) or f(*a))
    with harness.only("cpu", *BOTH):
        differentiate(case, leaves, mode, dz)
    assert ran == ([] if fused else launchers)


@pytest.mark.parametrize("b", [2.0, 1.5])
@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("backend", harness.BACKENDS)
def test_layout_of_the_output(backend, layout, weight_layout, b):
    """channels_last if the input or the weight is, and the gradients alike; no view, so that z may be changed."""
    case = Case("", b=b, layout=layout, weight_layout=weight_layout, residual_layout="strided", dz_layout="transposed")
    inputs, dz = inputs_of(case, torch.float32), gradient_of_output(case, torch.float32)
    last, first = torch.channels_last, torch.contiguous_format
    either = last if "channels_last" in (layout, weight_layout) else first
    for mode in MODES:
        leaves = leaves_of(inputs, mode)
        with harness.only(backend, *BOTH):
            z = apply(case, leaves, mode, running_var_of(case, torch.float32))
            found = harness.gradients(z, leaves, dz)
        assert z.is_contiguous(memory_format=either) and not z._is_view()
        assert found["dx"].is_contiguous(memory_format=either)
        assert found["dweight"].is_contiguous(memory_format=last if weight_layout == "channels_last" else first)
        assert not mode.residual or not mode.relu or found["dresidual"].is_contiguous(memory_format=either)


@pytest.mark.parametrize("parameters", ["fp64", "bf16"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", harness.BACKENDS)
def test_parameters_of_other_types(backend, dtype, parameters):
    """The normalisation's are of any type, and their gradients and buffers of theirs."""
    case, dtype, other = Case(""), harness.DTYPES[dtype], harness.DTYPES[parameters]
    inputs, dz = inputs_of(case, dtype), gradient_of_output(case, dtype)
    inputs |= {name: inputs[name].to(other) for name in ("norm_weight", "norm_bias")}
    for training in (True, False):
        mode = Mode(training, relu=False)
        leaves, running_var = leaves_of(inputs, mode), running_var_of(case, dtype).to(other)
        with harness.only(backend, *BOTH):
            z = apply(case, leaves, mode, running_var)
            got = harness.gradients(z, leaves, dz)
        exact, expected_var = leaves_of(inputs, mode, torch.float64), running_var_of(case, dtype).to(other).double()
        _, expected = separately(reference, case, exact, mode, expected_var, relu=False)
        bound = torch.bfloat16 if torch.bfloat16 in (dtype, other) else torch.float32
        assert_close_to_reference("z", z, None, expected, dtype)
        assert_close_to_reference("running_var", running_var, None, expected_var, bound)
        assert running_var.dtype == other
        for name, value in harness.gradients(expected, exact, dz).items():
            if value is not None:
                assert got[name].dtype == (other if "norm" in name else dtype)
                assert_close_to_reference(name, got[name], None, value, bound)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("backend", harness.BACKENDS)
def test_nan_comes_out_where_it_goes_in(backend, layout):
    """With known statistics at the windows that see it; a batch's variance spreads it over its channels: over all."""
    case = Case("", layout=layout, dz_layout=layout)
    inputs, dz = inputs_of(case, torch.float32), gradient_of_output(case, torch.float32)
    inputs["x"][0, 1, 0, 0] = float("nan")
    expected = torch.zeros(dz.shape, dtype=torch.bool)
    expected[0, :, 0, 0] = True
    for mode in MODES:
        leaves = leaves_of(inputs, mode)
        with harness.only(backend, *BOTH):
            z = apply(case, leaves, mode, running_var_of(case, torch.float32))
            found = harness.gradients(z, leaves, dz)
        assert found["dx"][0, :, 0, 0].isnan().all() and found["dweight"].isnan().any()
        assert found["dnorm_weight"].isnan().all() and torch.isfinite(found["dnorm_bias"]).all()
        if mode.training:
            assert z.isnan().all()
        else:
            assert torch.equal(z.isnan(), expected)
            assert torch.isfinite(found["dx"][1:]).all() and torch.isfinite(found["dx"][0, :, 3:]).all()


def test_any_number_of_threads():
    """Moments and sums of pieces that threads share: the same numbers, but for the order of sums."""
    case, mode = replace(named("two blocks of rows"), shape=(2, 60, 21, 21)), Mode(residual=True)
    dz = gradient_of_output(case, torch.float32)
    threads = torch.get_num_threads()
    try:
        for kernel in ((1, 1), (3, 3)):
            case = replace(case, kernel=kernel, window=window(padding=kernel[0] // 2))
            inputs = inputs_of(case, torch.float32)
            for count in (2, 5):
                torch.set_num_threads(count)
                with harness.only("cpu", *BOTH):
                    got = differentiate(case, leaves_of(inputs, mode), mode, dz)
                expected = define(case, inputs, mode, dz, got["z"], torch.float64)
                for name, value in got.items():
                    if value is not None:
                        scale = expected.get(f"terms of {name}")
                        assert_close_to_reference(f"{name}, {count}", value, None, expected[name], torch.float32, scale)
    finally:
        torch.set_num_threads(threads)


# Derivatives ----------------------------------------------------------------------------------------------------------

# Small, and in channels_last still more than one pixel and channel, so that the fused form runs.
SMALL = Case("small", shape=(2, 2, 3, 3), outputs=2, kernel=(2, 2), normalize=True, eps=1e-3)
SMALL_CASES = [
    replace(SMALL, name="channels_last, conv bias", bias=True, normalize=False),
    replace(SMALL, name="channels_last, groups, stride", window=window(groups=2, stride=(1, 2), padding=(0, 1))),
    replace(SMALL, name="contiguous, max_out", layout="contiguous", max_out=2),
    replace(SMALL, name="b tensor", b=1.7, b_tensor=True),
]


def small(case: Case, mode: Mode) -> tuple[dict[str, Tensor], object]:
    """Leaves by name, and z as a function of them, contiguous ones brought to the layout of the case."""
    inputs = inputs_of(case, torch.float64)
    if case.max_out > 1:  # no ties
        inputs["x"], inputs["weight"] = (harness.randn(tuple(inputs[k].shape), i, torch.float64)
                                         for i, k in enumerate(("x", "weight"), 11))  # fmt: skip
    leaves = {
        name: t.contiguous().requires_grad_() for name, t in leaves_of(inputs, mode).items() if t is not None
    }  # fmt: skip

    running_var = None if mode.training else running_var_of(case, torch.float64)

    def function(module, *tensors):
        values = dict.fromkeys(inputs) | dict(zip(leaves, tensors, strict=True))
        if case.layout == "channels_last":  # also inside vmap
            values["x"] = values["x"].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        if module is bcos_kernels:
            return apply(case, values, mode, running_var)
        return separately(module, case, values, mode, running_var, mode.relu)[1]

    return leaves, function


@pytest.mark.parametrize("training", [True, False], ids=["batch", "eval"])
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_gradcheck(case, training):
    leaves, function = small(case, Mode(training, relu=True, residual=True))

    def mine(*tensors):
        return function(bcos_kernels, *tensors)

    assert torch.autograd.gradcheck(mine, tuple(leaves.values()), atol=1e-6)
    assert torch.autograd.gradgradcheck(mine, tuple(leaves.values()), atol=1e-5)


@pytest.mark.parametrize("mode", [m for m in MODES if m.relu], ids=str)
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_second_derivatives_are_the_definition_s(case, mode):
    """In training, and with scale and variance constant at every order: ∂W(x)/∂w among them."""
    leaves, function = small(case, mode)
    got, expected = (
        harness.second_derivatives(lambda *tensors, m=module: function(m, *tensors), list(leaves.values()))
        for module in (bcos_kernels, reference)
    )
    for order in (0, 1):
        for mine, theirs in zip(got[order], expected[order], strict=True):
            assert_same(mine, theirs, 1e-10, f"order {order + 1}")


@pytest.mark.parametrize("training", [True, False], ids=["batch", "eval"])
def test_gradcheck_fails_when_explaining(training):
    """Scale and variance are constants, so that the gradient is not the derivative, nor is the second one."""
    leaves, function = small(SMALL, Mode(training, relu=False, detach=True))
    x, *others = leaves.values()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        with pytest.raises(GradcheckError, match="Jacobian mismatch"):
            check(lambda x, weight: function(bcos_kernels, x, weight, *others[1:]), (x, others[0]))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_transforms(mode):
    """jacrev, vmap, and vmap of a gradient, with parameters per sample."""
    leaves, function = small(SMALL, mode)
    tensors = [t.detach() for t in leaves.values()]
    for place in (0, 1):
        got = torch.func.jacrev(lambda *t: function(bcos_kernels, *t), place)(*tensors)
        expected = torch.autograd.functional.jacobian(lambda *t: function(reference, *t), tuple(tensors))[place]
        assert_same(got, expected, 1e-10, f"jacobian {place}")
    samples = [torch.stack([t, 1.5 * t, t.flip(0)]) for t in tensors]

    def of_weight(module, *tensors):
        return torch.func.grad(lambda w, x, *rest: function(module, x, w, *rest).square().sum())(
            tensors[1], tensors[0], *tensors[2:]
        )

    for derived in (function, of_weight):
        got = torch.func.vmap(lambda *t, d=derived: d(bcos_kernels, *t))(*samples)
        expected = torch.stack([derived(reference, *sample) for sample in zip(*samples, strict=True)])
        assert_same(got, expected, 1e-10)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_only_the_gradients_that_are_asked_for_are_computed(layout, mode, monkeypatch):
    """Each alone has the numbers that it has among all; that of the parameters in eval mode when explaining, where y
    is not what is kept, too."""
    launch, needs = bcos_kernels.cpu.conv2d_batch_norm_backward, []
    monkeypatch.setattr(
        bcos_kernels.cpu, BOTH[1], lambda *arguments: needs.append(arguments[-7:]) or launch(*arguments)
    )
    case = Case("", shape=(2, 4, 6, 5), bias=True, layout=layout)
    inputs, dz = inputs_of(case, torch.float32), gradient_of_output(case, torch.float32)
    leaves = {name: t for name, t in leaves_of(inputs, mode).items() if t is not None}
    order = ("x", "weight", "bias", "b", "norm_weight", "norm_bias", "residual")

    def gradients(*targets):
        # by an op of torch's each: the edges do not lead to the leaves themselves
        values = dict.fromkeys(order) | {name: t * 1 for name, t in leaves.items()}
        z = apply(case, values, mode, running_var_of(case, torch.float32))
        needs.clear()
        found = torch.autograd.grad(z, [leaves[name] for name in targets], dz)
        # without a ReLU the residual's gradient is z's, and nothing is asked of the op
        asked = tuple(name in targets and (name != "residual" or mode.relu) for name in order)
        assert needs == [asked]
        return found

    every = dict(zip(leaves, gradients(*leaves), strict=True))
    z = apply(case, dict.fromkeys(order) | leaves, mode, running_var_of(case, torch.float32)).detach()
    oracle = define(case, inputs, mode, dz, z, torch.float64)
    for name in leaves:
        (alone,) = gradients(name)
        assert_same(alone, every[name], 1e-6, name)
        assert_close_to_reference(name, alone, None, oracle[f"d{name}"], torch.float32, oracle.get(f"terms of d{name}"))


# What is kept ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("case", ["3x3", "contiguous", "two blocks of rows", "b 1.5, normalized"])
def test_changes_of_an_output_do_not_reach_its_backward(case, backend):
    """Nor do they between two backwards of one graph. Only a ReLU behind a residual, whose mask is in z alone, guards z
    as torch's own does; the reference's without one too."""
    case = named(case)
    inputs, dz = inputs_of(case, torch.float32), gradient_of_output(case, torch.float32)
    for mode in MODES:
        leaves, running_var = leaves_of(inputs, mode), running_var_of(case, torch.float32)
        with bcos_kernels.backend(backend):
            expected = harness.gradients(apply(case, leaves, mode, running_var.clone()), leaves, dz)
            z = apply(case, leaves, mode, running_var)
            loss = (z * dz).sum()
            targets = [t for t in leaves.values() if t is not None]
            first = torch.autograd.grad(loss, targets, retain_graph=True, allow_unused=True)
            with torch.no_grad():
                z.neg_()
            if mode.relu and (mode.residual or backend == "reference"):
                with pytest.raises(RuntimeError, match="^conv2d_batch_norm: .*modified by an inplace operation"):
                    torch.autograd.grad(loss, targets, allow_unused=True)
                continue
            second = torch.autograd.grad(loss, targets, allow_unused=True)
        names = [f"d{name}" for name, t in leaves.items() if t is not None]
        for name, *found in zip(names, first, second, strict=True):
            for value in found:
                assert_same(value, expected[name], 0.0, f"{name}, {mode}")


@pytest.mark.parametrize("backend", harness.BACKENDS)
@pytest.mark.parametrize("recompute", [None, "inner", "both"])
def test_under_saved_tensor_hooks_all_that_is_kept_goes_through_them(recompute, backend):
    """Offloading sees every tensor, and z is not held beside them; declarations to recompute do nothing there."""
    case = named("3x3")
    inputs, dz = inputs_of(case, torch.float32), gradient_of_output(case, torch.float32)
    for mode in MODES:
        if mode.residual and recompute == "both":
            continue
        with bcos_kernels.backend(backend):
            leaves = leaves_of(inputs, mode)
            expected = differentiate(case, leaves, mode, dz)
            with torch.autograd.graph.save_on_cpu(pin_memory=False):
                z = apply(case, leaves, mode, running_var_of(case, torch.float32), recompute=recompute)
                total = (z * dz).sum()
            got = harness.gradients(total, leaves, torch.ones(()))
        for name, value in got.items():
            if value is not None:
                assert_same(value, expected[name], 0.0, f"{name}, {mode}")
    with bcos_kernels.backend(backend):
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.clone()) or len(packed) - 1,
                                                      lambda i: packed[i]):  # fmt: skip
            z = apply(case, leaves_of(inputs, Mode()), Mode(), None, recompute=recompute)
            kept, total = weakref.ref(z.untyped_storage()), z.sum()
    assert z.shape in [t.shape for t in packed]  # y
    del z
    gc.collect()
    assert kept() is None
    total.backward()


def size(t: Tensor) -> int:
    return t.numel() * t.element_size()


BYTES = {  # what is alive after a forward: activations of z's size, of that also where z is given on
    "training": (Mode(residual=True), None, 2),
    "eval": (Mode(False), None, 2),
    "explaining a batch": (Mode(detach=True), None, 2),
    "explaining": (Mode(False, detach=True, residual=True), None, 2),
    "inner": (Mode(residual=True), "inner", 1),
    "eval, inner": (Mode(False), "inner", 1),
}


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("name", BYTES)
def test_bytes_kept(name, kernel):
    """z, y (or the slope), norms, and the sums of squares for the next layer's; without gradients z and these alone."""
    mode, recompute, activations = BYTES[name]
    case = Case("", shape=(2, 32, 40, 40), outputs=32, kernel=kernel, window=window(padding=kernel[0] // 2))
    inputs = inputs_of(case, torch.float32)
    leaves, running_var = leaves_of(inputs, mode), running_var_of(case, torch.float32)

    def forward():
        return apply(case, leaves, mode, running_var, recompute=recompute)

    z, a_map = size(forward()), 2 * 40 * 40 * 4
    assert activations * z <= bytes_kept(forward) <= activations * z + 2 * a_map + 8192
    with torch.no_grad():
        assert z <= bytes_kept(forward) <= z + a_map + 8192


def chain(case: Case, leaves, mode: Mode, recompute: str | None, second: Tensor) -> Tensor:
    """Two of them, and a convolution behind that takes z."""
    z = apply(case, leaves, mode, running_var_of(case, leaves["x"].dtype), recompute=recompute)
    z = conv2d_batch_norm(
        z, second, running_var=torch.ones(len(second)), training=mode.training, activation="relu", detach=mode.detach,
        recompute=recompute,
    )  # fmt: skip
    return bcos_kernels.conv2d(z, second.transpose(0, 1), detach=mode.detach)


@pytest.mark.parametrize("recompute", ["output", "inner", "both"])
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("case", ["3x3", "contiguous", "two blocks of rows", "b 1.5, normalized"])
@pytest.mark.parametrize("backend", harness.BACKENDS)
def test_recomputed_gradients_are_the_same_to_the_bit(backend, case, dtype, recompute):
    case, dtype = named(case), harness.DTYPES[dtype]
    inputs, second = inputs_of(case, dtype), harness.randn((5, case.outputs, 1, 1), 9, dtype, 0.3).requires_grad_()
    for mode in MODES:
        if mode.residual:
            continue
        leaves = {name: t for name, t in leaves_of(inputs, mode).items() if t is not None} | {"second": second}

        def gradients(recompute, leaves=leaves, mode=mode):
            y = chain(case, dict.fromkeys(inputs) | leaves, mode, recompute, second)
            return torch.autograd.grad(y.sum(), list(leaves.values()))

        with bcos_kernels.backend(backend):
            for name, got, expected in zip(leaves, gradients(recompute), gradients(None), strict=True):
                assert torch.equal(got, expected), f"d{name}, {mode}"


@pytest.mark.parametrize("training", [True, False], ids=["batch", "eval"])
def test_what_is_recomputed_is_not_kept(training):
    case, mode = Case("", shape=(2, 32, 20, 20), outputs=32, kernel=(1, 1)), Mode(training)
    leaves = leaves_of(inputs_of(case, torch.float32), mode)
    second = harness.randn((16, 32, 1, 1), 9, torch.float32).requires_grad_()
    first, other, a_map = 2 * 32 * 400 * 4, 2 * 16 * 400 * 4, 2 * 400 * 4
    kept = {
        recompute: bytes_kept(lambda r=recompute: chain(case, leaves, mode, r, second))
        for recompute in (None, "output", "inner", "both")
    }
    # of an output, Σ z² goes too, except what the next layer's recipe takes
    assert 0 <= kept[None] - kept["output"] - (first + other) <= 2 * a_map
    assert kept[None] - kept["inner"] == first + other
    assert 0 <= kept[None] - kept["both"] - 2 * (first + other) <= 2 * a_map


def test_recomputing_that_cannot_be():
    case, mode = named("3x3"), Mode(residual=True)
    inputs = inputs_of(case, torch.float32)
    leaves = leaves_of(inputs, mode)
    for recompute in ("output", "both", "y"):
        with pytest.raises(ValueError, match=f"^conv2d_batch_norm: expected recompute .*, got '{recompute}'"):
            apply(case, leaves, mode, None, recompute=recompute)
    z = apply(case, leaves, mode, None, recompute="inner")
    with pytest.raises(RuntimeError, match="expected a backward without create_graph"):
        torch.autograd.grad(z.sum(), leaves["weight"], create_graph=True)
    z = apply(case, leaves, mode, None, recompute="inner")
    with torch.no_grad():
        leaves["weight"].mul_(2)
    with pytest.raises(RuntimeError, match="in-place operation|inplace operation"):
        z.sum().backward()
    case, mode = named("3x3"), Mode()
    leaves = leaves_of(inputs, mode)
    z = apply(case, leaves, mode, None, recompute="both")
    first = torch.autograd.grad(z.sum(), leaves["x"], retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(z.sum(), leaves["x"]))  # a retained graph computes again


# Compiled, exported, under autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", HALF, ids=str)
def test_compiled(mode):
    """One graph without breaks; declarations to recompute do nothing there."""
    torch.compiler.reset()
    case = named("3x3")
    inputs, dz = inputs_of(case, torch.float32), gradient_of_output(case, torch.float32)
    before = running_var_of(case, torch.float32)

    def function(leaves, running_var):
        return apply(case, leaves, mode, running_var, recompute="inner")

    def results(function):
        leaves, running_var = leaves_of(inputs, mode), before.clone()
        z = function(leaves, running_var)
        found = {"z": z.detach().clone(), "running_var": running_var, **harness.gradients(z, leaves, dz)}
        return {name: value for name, value in found.items() if value is not None}

    expected = results(function)
    got = results(torch.compile(function, backend="aot_eager", fullgraph=True))
    for name, value in got.items():
        assert_same(value, expected[name], 1e-6, name)
    assert got.keys() == expected.keys()


def test_compiled_for_any_batch_size():
    torch.compiler.reset()
    case, mode = Case("", kernel=(1, 1)), Mode()
    leaves = leaves_of(inputs_of(case, torch.float32), mode)

    def function(x):
        return apply(case, leaves | {"x": x}, mode, None)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for images in (2, 5, 3):
        x = harness.lay_out(harness.randn((images, 6, 9, 11), images, torch.float32), "channels_last").requires_grad_()
        got, expected = (torch.autograd.grad(f(x).square().sum(), (x, leaves["weight"])) for f in (compiled, function))
        for mine, theirs in zip(got, expected, strict=True):
            assert_same(mine, theirs, 1e-5)


class Layer(torch.nn.Module):
    def __init__(self, case: Case, mode: Mode) -> None:
        super().__init__()
        self.case, self.mode = case, mode
        inputs = inputs_of(case, torch.float64)
        for name in ("weight", "norm_weight", "norm_bias"):
            self.register_parameter(name, torch.nn.Parameter(inputs[name]))
        self.running_var = torch.nn.Buffer(running_var_of(case, torch.float64))

    def leaves(self, x):
        parameters = {"weight": self.weight, "norm_weight": self.norm_weight, "norm_bias": self.norm_bias}
        return {"x": x, "bias": None, "b": None, "residual": None, **parameters}

    def forward(self, x):
        return apply(self.case, self.leaves(x), self.mode, self.running_var)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("detach", [False, True], ids=["training", "explaining"])
def test_export(detach, strict):
    """One op in the graph, which is differentiated in the mode that it was made in."""
    mode = Mode(False, detach=detach)
    layer = Layer(SMALL, mode)
    x = inputs_of(SMALL, torch.float64)["x"]
    batch = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(layer, (x,), dynamic_shapes=batch, strict=strict)
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    called = [str(node.target) for graph in graphs for node in graph.nodes if "bcos_kernels" in str(node.target)]
    assert called == ["bcos_kernels.conv2d_batch_norm.default"]
    x = torch.cat([x, 2 * x]).contiguous(memory_format=torch.channels_last).requires_grad_()
    module = program.module()
    expected = separately(reference, SMALL, layer.leaves(x), mode, layer.running_var, relu=True)[1]
    got = module(x)
    assert_same(got, expected, 1e-12)
    parameters, theirs = [x, *module.parameters()], [x, *layer.parameters()]
    for mine, other in zip(torch.autograd.grad(got.square().sum(), parameters),
                           torch.autograd.grad(expected.square().sum(), theirs), strict=True):  # fmt: skip
        assert_same(mine, other, 1e-12)


def test_autocast():
    """As the two ops: x, weight, bias and residual are cast, statistics and parameters of the norm are not."""
    case, mode = named("1x1, stride 2, conv bias"), Mode(residual=True)
    leaves, running_var = leaves_of(inputs_of(case, torch.float32), mode), running_var_of(case, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z = apply(case, leaves, mode, running_var)
    cast = {name: t if t is None or "norm" in name else t.detach().bfloat16() for name, t in leaves.items()}
    expected_var = running_var_of(case, torch.float32)
    expected = apply(case, cast, mode, expected_var)
    assert z.dtype == torch.bfloat16 and torch.equal(z, expected)
    assert running_var.dtype == torch.float32 and torch.equal(running_var, expected_var)
    for name, g in harness.gradients(z, leaves, torch.ones_like(z)).items():
        assert g.dtype == torch.float32 and torch.isfinite(g).all(), name


# As torch sees the ops ------------------------------------------------------------------------------------------------

OPTIONS = {  # the case, mode, dtype, keep
    "training": (Case("", shape=(2, 4, 6, 5), outputs=4, kernel=(3, 2)), Mode(), "fp32", True),
    "training, residual, groups, contiguous": (
        Case("", shape=(2, 4, 6, 5), outputs=4, window=window(groups=2), layout="contiguous", bias=True),
        Mode(residual=True), "fp32", True,
    ),
    "eval, fp64, residual without relu": (
        Case("", shape=(2, 4, 6, 5), outputs=4, kernel=(1, 1), normalize=True),
        Mode(False, relu=False, residual=True), "fp64", True,
    ),
    "explaining, fp64": (Case("", shape=(2, 4, 6, 5), outputs=4), Mode(False, detach=True), "fp64", True),
    "explaining a batch, depthwise": (
        Case("", shape=(2, 4, 6, 5), outputs=4, window=window(groups=4, stride=2)), Mode(detach=True), "fp32", True,
    ),
    "b tensor, max_out": (
        Case("", shape=(2, 4, 6, 5), outputs=4, b=1.7, b_tensor=True, max_out=2, bias=True), Mode(False), "fp64", True,
    ),
    "b 1, no parameters, strided": (
        Case("", shape=(2, 4, 6, 5), outputs=4, b=1.0, parameters=False, layout="strided"), Mode(residual=True),
        "fp32", True,
    ),
    "nothing kept": (Case("", shape=(2, 4, 6, 5), outputs=4), Mode(False), "fp32", False),
}  # fmt: skip


def arguments_of(options: str, grad: bool) -> tuple:
    """Of the op: tensors and options."""
    case, mode, dtype, keep = OPTIONS[options]
    dtype = harness.DTYPES[dtype]
    leaves = leaves_of(inputs_of(case, dtype), mode)
    leaves = {name: None if t is None else t.requires_grad_(grad) for name, t in leaves.items()}
    names = ("x", "weight", "bias", "b", "norm_weight", "norm_bias", "residual")
    groups, stride = case.window.get("groups", 1), case.window.get("stride", 1)
    return (
        *(leaves[name] for name in names), None if mode.training else running_var_of(case, dtype), None,
        (stride, stride), (0, 0), (1, 1), groups, case.b, case.normalize, case.max_out, mode.training, case.eps,
        "relu" if mode.relu else None, keep, mode.detach, True,
    )  # fmt: skip


@pytest.mark.parametrize("grad", [False, True], ids=["constant", "leaf"])
@pytest.mark.parametrize("options", OPTIONS)
def test_opcheck(options, grad):
    torch.library.opcheck(OPS.conv2d_batch_norm.default, arguments_of(options, grad))


@pytest.mark.parametrize("grad", [False, True], ids=["constant", "leaf"])
@pytest.mark.parametrize("options", list(OPTIONS)[:-1])
def test_opcheck_backward(options, grad):
    tensors, rest = arguments_of(options, False)[:7], arguments_of(options, False)[9:19]
    detach = OPTIONS[options][1].detach
    z, _, *held = OPS.conv2d_batch_norm(*arguments_of(options, False))
    x, weight, bias, b, norm_weight, norm_bias, residual = tensors
    dz = harness.randn(tuple(z.shape), 4, z.dtype).requires_grad_(grad)
    needs = [t is not None for t in tensors]
    needs[3] = needs[3] and not detach
    needs[6] = needs[6] and rest[-1] is not None
    mask = z if rest[-1] is not None and residual is not None else None
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    seconds = grad and options not in ("training", "explaining, fp64")  # that it takes
    if not seconds and (not grad or harness.convolutions_have_second_derivatives_of_symbolic_sizes()):
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(
        OPS.conv2d_batch_norm_backward.default,
        (dz, x.requires_grad_(grad), weight, bias, b, norm_weight, norm_bias, mask, *held, *rest, detach, needs, ""),
        test_utils=checks,
    )
