"""What the tests of conv2d_batch_norm share: cases, modes, the definition by the two ops."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bcos_kernels import conv2d_batch_norm, reference
from tests.bcos_kernels import harness

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


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def assert_same(got: Tensor, expected: Tensor, bound: float, name: str = "") -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype, name
    difference, norm = (got - expected).norm().item(), expected.norm().item()
    assert difference <= bound * norm, f"{name}: error {difference / (norm or 1):.3g}"


# Small, and in channels_last still more than one pixel and channel, so that the fused form runs.
SMALL = Case("small", shape=(2, 2, 3, 3), outputs=2, kernel=(2, 2), normalize=True, eps=1e-3)
