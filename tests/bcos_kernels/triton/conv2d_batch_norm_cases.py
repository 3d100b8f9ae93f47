"""Cases of the Triton convolution with a batch normalisation against the float64 reference, which
test_conv2d_batch_norm.py runs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import pytest
import torch

import bcos_kernels
from bcos_kernels import reference, triton_kernels
from tests.bcos_kernels.harness import conv2d_batch_norm, only
from tests.bcos_kernels.tolerances import assert_close_to_reference as assert_close
from tests.bcos_kernels.triton.harness import (
    DTYPES,
    exact_float32,
    lay_out,
    prepare_interpreter,
    random,
    use_descriptors,
)

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int, int] = (2, 6, 7, 6)  # x
    outputs: int = 10
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: str = "fp32"
    b: float = 2.0
    normalize: bool = False
    max_out: int = 1
    bias: bool = False
    squares: bool = False  # Σ_c x² is given
    training: bool = True
    affine: bool = True
    residual: bool = False
    activation: str | None = "relu"
    layout: str = "channels_last"
    dz_layout: str = "channels_last"
    recompute: bool = False  # backward without y

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}"

    @property
    def geometry(self) -> tuple:
        return (self.stride, self.padding, (1, 1), self.groups)


def _across_dtypes(*cases: Case) -> list[Case]:
    return [replace(case, dtype=dtype) for case in cases for dtype in DTYPES]


ONE = {"kernel": (1, 1), "padding": (0, 0)}
CASES = [
    *_across_dtypes(
        Case("training", residual=True),
        Case("training, no residual", normalize=True, squares=True),
        Case("eval", training=False, residual=True, squares=True),
        Case("eval, no residual", training=False, normalize=True, bias=True),
        Case("eval, 1x1", training=False, residual=True, shape=(2, 16, 5, 4), **ONE),
        Case("training, depthwise", shape=(2, 20, 5, 4), outputs=20, groups=20, residual=True),
        Case("eval, depthwise", shape=(2, 6, 5, 4), outputs=6, groups=6, training=False, residual=True),
    ),
    Case("training, depthwise, no residual", shape=(2, 6, 5, 4), outputs=12, groups=6, normalize=True, stride=(2, 1)),
    Case("training, depthwise, contiguous", shape=(2, 6, 5, 4), outputs=6, groups=6, layout="contiguous"),
    Case("eval, depthwise, several tiles", shape=(2, 37, 13, 12), outputs=37, groups=37, training=False, bias=True),
    Case("eval, depthwise, contiguous", shape=(2, 6, 5, 4), outputs=12, groups=6, training=False, layout="contiguous",
         residual=True, normalize=True),
    Case("eval, depthwise, max_out 2", shape=(2, 6, 5, 4), outputs=6, groups=6, training=False, max_out=2),
    Case("eval, groups of 2, bare", shape=(2, 8, 5, 4), outputs=8, groups=4, training=False, affine=False,
         activation=None, dtype="bf16"),
    Case("eval, groups of 4", shape=(2, 8, 5, 4), outputs=8, groups=2, training=False, bias=True),
    Case("training, depthwise, recomputed", shape=(2, 6, 5, 4), outputs=6, groups=6, recompute=True, affine=False),
    Case("training, 1x1", residual=True, shape=(2, 16, 5, 4), **ONE),
    Case("training, bare", affine=False, activation=None, residual=True),
    Case("eval, bare", training=False, affine=False, activation=None, residual=True),
    Case("eval, bare, no residual", training=False, affine=False, activation=None, dtype="bf16"),
    Case("training, contiguous", layout="contiguous", dz_layout="contiguous", residual=True),
    Case("eval, contiguous", layout="contiguous", dz_layout="contiguous", residual=True, training=False),
    Case("training, groups", groups=2, stride=(2, 1), residual=True),
    Case("eval, groups", groups=2, stride=(2, 1), residual=True, training=False),
    Case("eval, several tiles", shape=(2, 3, 13, 10), outputs=70, training=False),
    Case("training, several tiles", shape=(2, 3, 13, 10), outputs=70, dtype="bf16"),
    Case("eval, 1x1, several tiles", shape=(2, 20, 9, 8), outputs=70, training=False, squares=True, **ONE),
    Case("training, recomputed", recompute=True, residual=True),
    Case("eval, recomputed", recompute=True, training=False),
    Case("training, expanded gradient", dz_layout="expanded", residual=True),
    Case("eval, strided gradient", dz_layout="strided", training=False),
    Case("training, general b", b=1.5, residual=True),
    Case("eval, general b", b=1.5, training=False, residual=True),
    Case("eval, max_out 2", max_out=2, training=False, dtype="bf16"),
    Case("eval, b 1", b=1.0, training=False),
]


def _inputs(case: Case, device: str) -> dict[str, torch.Tensor | None]:
    dtype, units, channels = DTYPES[case.dtype], case.outputs * case.max_out, case.shape[1] // case.groups
    x = random(case.shape, 1, dtype, device)
    weight = random((units, channels, *case.kernel), 2, dtype, device, (channels * case.kernel[0] ** 2) ** -0.5)
    size = tuple((case.shape[2 + i] + 2 * case.padding[i] - case.kernel[i]) // case.stride[i] + 1 for i in (0, 1))
    like_z, vector = (case.shape[0], case.outputs, *size), (case.outputs,)
    running_var = random(vector, 8, torch.float32, device).square() + 0.1
    return {
        "x": lay_out(x, case.layout),
        "weight": weight,
        "bias": random((units,), 3, dtype, device, 0.1) if case.bias else None,
        "norm_weight": random(vector, 5, torch.float32, device) if case.affine else None,
        "norm_bias": random(vector, 6, torch.float32, device) if case.affine else None,
        "residual": lay_out(random(like_z, 7, dtype, device), case.layout) if case.residual else None,
        "running_var": None if case.training else running_var,
        "dz": lay_out(random(like_z, 4, dtype, device), case.dz_layout),
    }


LEAVES = ("x", "weight", "bias", "norm_weight", "norm_bias", "residual")


def _oracle(
    case: Case, inputs: dict, dtype: torch.dtype | None, detach: bool, found: torch.Tensor
) -> dict[str, torch.Tensor | None]:
    """z and the gradients by autograd through the definition, in ``dtype`` or as they are, with the ReLU's mask of
    ``found``: rounding decides about outputs near 0, so a mask of the definition's own would be another one."""
    leaves = {k: None if (t := inputs[k]) is None else t.detach().to(dtype or t.dtype).requires_grad_() for k in LEAVES}
    running_var = inputs["running_var"]
    z = conv2d_batch_norm(reference)(
        leaves["x"], leaves["weight"], leaves["bias"], *case.geometry, b=case.b, normalize_weight=case.normalize,
        max_out=case.max_out, running_var=None if running_var is None else running_var.to(dtype or running_var.dtype),
        norm_weight=leaves["norm_weight"], norm_bias=leaves["norm_bias"], training=case.training,
        residual=leaves["residual"], detach=detach, eps=EPS,
    )  # fmt: skip
    masked = z if case.activation is None else torch.where(found <= 0, 0.0, z)
    masked.backward(inputs["dz"].to(z.dtype))
    return {"z": z.detach() if case.activation is None else z.detach().relu()} | {
        f"d{k}": None if t is None else t.grad for k, t in leaves.items()
    }


def check(case: Case, device: str) -> None:
    """Forward and all gradients of one case against the oracle, in training and explanation mode; what is kept."""
    dtype, inputs = DTYPES[case.dtype], _inputs(case, device)
    x, weight, bias, norm_weight, norm_bias = (inputs[k] for k in LEAVES[:5])
    layer = (*case.geometry, case.b, None, case.normalize, case.max_out)
    squares = x.float().square().sum(1) if case.squares else None
    forward = (
        x, weight, bias, norm_weight, norm_bias, inputs["residual"], inputs["running_var"], squares, *layer,
        case.training, EPS, case.activation,
    )  # fmt: skip
    y_alone = triton_kernels.conv2d_forward(x, weight, bias, *layer, True, squares)[0]
    for detach in (False, True):
        z, emitted, y, n, a, index, mean, var = triton_kernels.conv2d_batch_norm_forward(*forward, True, detach, True)
        exact, eager = (_oracle(case, inputs, type_, detach, z) for type_ in (torch.float64, None))
        assert z.dtype == dtype and z.is_contiguous(memory_format=_format(case))
        assert_close("z", z, eager["z"], exact["z"], dtype)
        assert_close("squares", emitted, None, z.double().square().sum(1), torch.float32)
        fused = case.b == 2 and case.max_out == 1 and case.dtype != "fp16"
        if detach and not case.training and fused:
            slope = y_alone.float().abs().div(n.repeat_interleave(case.outputs // case.groups, 1)).sqrt()
            slope /= (var + EPS).sqrt()[:, None, None]
            slope = slope if norm_weight is None else slope * norm_weight[:, None, None]
            slope = slope if case.activation is None else torch.where(z <= 0, 0.0, slope)
            assert_close("slope", y, None, slope.double(), torch.bfloat16)
        else:
            assert torch.equal(y, y_alone)
        bare = triton_kernels.conv2d_batch_norm_forward(*forward, False, detach, False)
        assert_close("z, nothing kept", bare[0], eager["z"], exact["z"], dtype)
        assert torch.equal(bare[3], n) and not any(bare[i].numel() for i in (1, 2, 4, 5))
        if case.recompute:
            y = y[:0]
        for z_or_none in (z, None) if case.activation and not case.residual else (z,):
            _check_gradients(case, inputs, layer, (z_or_none, y, n, a, index, mean, var), detach, exact, eager)


def _check_gradients(case: Case, inputs: dict, layer: tuple, kept: tuple, detach: bool, exact: dict, eager: dict):
    x, weight, bias, norm_weight, norm_bias = (inputs[k] for k in LEAVES[:5])
    names = ("x", "weight", "bias", None, "norm_weight", "norm_bias", "residual")
    present = [name is not None and inputs[name] is not None for name in names]
    # with and without those of the normalisation's parameters, for which a slope is not enough
    for asked in (present, [p and i not in (4, 5) for i, p in enumerate(present)]):
        gradients = triton_kernels.conv2d_batch_norm_backward(
            inputs["dz"], x, weight, bias, norm_weight, norm_bias, *kept, *layer, case.training, EPS, case.activation,
            detach, *asked,
        )  # fmt: skip
        for name, gradient, need in zip(names, gradients, asked, strict=True):
            assert need or gradient is None
            if need:
                of = inputs[name]
                assert gradient.dtype == of.dtype
                # those of float32 parameters are sums over values that were rounded to the op's type
                of_type = of.dtype if name in ("x", "weight", "bias", "residual") else DTYPES[case.dtype]
                assert_close(f"d{name}, detach={detach}", gradient, eager[f"d{name}"], exact[f"d{name}"], of_type)


def _format(case: Case) -> torch.memory_format:
    return torch.channels_last if case.layout == "channels_last" else torch.contiguous_format


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
    check(Case("1x1", training=False, shape=(2, 72, 9, 8), outputs=136, residual=True, dtype="bf16", **ONE), "cpu")
    assert set(ran) == {"forward", "backward_dx", "backward_dw"}


def test_offsets_in_int64(monkeypatch):
    for name in ("conv2d", "conv2d_gradient", "conv2d_small_groups", "conv2d_small_groups_gradient",
                 "conv2d_batch_norm", "batch_norm_uncentered", "bcos_math"):
        module = importlib.import_module(f"bcos_kernels.triton_kernels.{name}")
        monkeypatch.setattr(module, "index64", lambda *tensors: True)
    check(Case("int64", residual=True, groups=2, squares=True), "cpu")
    check(Case("int64", training=False, outputs=70, squares=True), "cpu")
    check(Case("int64", training=False, shape=(2, 6, 5, 4), outputs=6, groups=6, residual=True), "cpu")


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    x, weight, vector = torch.randn(0, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.ones(4)
    layer = ((1, 1), (1, 1), (1, 1), 1, 2.0, None, False, 1)
    z, emitted, y, n, a, index, mean, var = triton_kernels.conv2d_batch_norm_forward(
        x, weight, None, vector, vector, None, vector, None, *layer, training, EPS, "relu", True, False, True
    )
    assert z.shape == (0, 4, 5, 5) and emitted.shape == (0, 5, 5)
    gradients = triton_kernels.conv2d_batch_norm_backward(
        z, x, weight, None, vector, vector, z, y, n, a, index, mean, var, *layer, training, EPS, "relu", False,
        True, True, False, False, True, True, True,
    )  # fmt: skip
    for gradient, of in zip(gradients, (x, weight, None, None, vector, vector, z), strict=True):
        assert gradient is None if of is None else gradient.shape == of.shape and not gradient.any()


def test_nan_comes_out_where_it_goes_in():
    x, weight, vector = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.ones(4)
    x[1, 2, 0, 0] = float("nan")
    z, emitted, *_ = triton_kernels.conv2d_batch_norm_forward(
        x, weight, None, vector, vector, None, vector, None, (1, 1), (1, 1), (1, 1), 1, 2.0, None, False, 1, False, EPS,
        "relu", False, False, True,
    )  # fmt: skip
    seen = torch.zeros(2, 4, 6, 6, dtype=torch.bool)
    seen[1, :, :2, :2] = True
    assert torch.equal(z.isnan(), seen) and torch.equal(emitted.isnan(), seen[:, 0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("detach", [True, False])
def test_public_function(training, detach):
    tensors = [torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3), torch.rand(4), torch.randn(4), torch.randn(2, 4, 6, 5)]

    def run(function, dtype):
        x, weight, norm_weight, norm_bias, residual = leaves = [
            t.detach().to(dtype, copy=True).requires_grad_() for t in tensors
        ]
        running_var = torch.ones(4, dtype=dtype)
        z = function(
            x, weight, padding=1, running_var=running_var, norm_weight=norm_weight, norm_bias=norm_bias,
            training=training, activation="relu", residual=residual, detach=detach,
        )  # fmt: skip
        z.square().sum().backward()
        return {"z": z, "running_var": running_var} | {f"d{i}": t.grad for i, t in enumerate(leaves)}

    with only("triton", "conv2d_batch_norm", "conv2d_batch_norm_backward"):
        found = run(bcos_kernels.conv2d_batch_norm, torch.float32)
    exact = run(conv2d_batch_norm(reference), torch.float64)
    for name, value in found.items():
        assert_close(name, value, None, exact[name], torch.float32)


def test_norms_travel_from_block_to_block(monkeypatch):
    conv2d = importlib.import_module("bcos_kernels.triton_kernels.conv2d_batch_norm")
    modules = (conv2d, importlib.import_module("bcos_kernels.triton_kernels.conv2d"))
    given = []
    launch = modules[1].launch_forward

    def noting(*arguments):
        given.append(arguments[12] is not None)
        return launch(*arguments)

    for module in modules:
        monkeypatch.setattr(module, "launch_forward", noting)
    x, weights = torch.randn(2, 4, 6, 6), (torch.randn(4, 4, 3, 3), torch.randn(4, 4, 1, 1))
    for training in (True, False):
        with bcos_kernels.backend("triton"):
            z = x
            for weight in weights:
                z = bcos_kernels.conv2d_batch_norm(
                    z, weight, padding=weight.shape[2] // 2, running_var=torch.ones(4), training=training,
                    activation="relu",
                )  # fmt: skip
        expected = x.double()
        for weight in weights:
            expected = conv2d_batch_norm(reference)(
                expected, weight.double(), padding=weight.shape[2] // 2, running_var=torch.ones(4).double(),
                training=training, activation="relu",
            )  # fmt: skip
        assert_close("z", z, None, expected, torch.float32)
    assert given == [False, True, False, True]


OPTIONS = [
    {}, {"layout": "contiguous"}, {"training": False}, {"training": False, "detach": True}, {"kernel": 1},
    {"training": False, "kernel": 1, "size": 1}, {"groups": 2}, {"groups": 2, "training": False}, {"keep": False},
    {"channels": 1}, {"dtype": torch.float16, "training": False}, {"training": False, "keep": False, "max_out": 2},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_results_are_as_the_fakes_announce(options):
    channels, size, kernel = (options.get(k, default) for k, default in (("channels", 4), ("size", 5), ("kernel", 3)))
    groups, dtype, max_out = options.get("groups", 1), options.get("dtype", torch.float32), options.get("max_out", 1)
    training, detach, keep = options.get("training", True), options.get("detach", False), options.get("keep", True)
    x = lay_out(torch.randn(2, channels, size, size, dtype=dtype), options.get("layout", "channels_last"))
    weight, vector = torch.randn(6 * max_out, channels // groups, kernel, kernel, dtype=dtype), torch.rand(6) + 1
    layer = ([2, 1], [kernel // 2] * 2, [1, 1], groups, 2.0, False, max_out, training, EPS, "relu")
    arguments = (x, weight, None, None, vector, vector, None, vector, None, *layer, keep, detach, True)
    ops = torch.ops.bcos_kernels
    with bcos_kernels.backend("triton"):
        results = ops.conv2d_batch_norm(*arguments)
        z, _, y, n, a, index, mean, var = results
        backward = (
            torch.randn_like(z), *arguments[:6], z, y, n, a, index, mean, var, *layer, detach,
            [True, True, False, False, True, True, True], "",
        )  # fmt: skip
        gradients = ops.conv2d_batch_norm_backward(*backward)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in arguments]
        fake_backward = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in backward]
        announced = (*ops.conv2d_batch_norm(*fake), *ops.conv2d_batch_norm_backward(*fake_backward))
    for i, (real, promise) in enumerate(zip((*results, *gradients), announced, strict=True)):
        assert (real.shape, real.stride(), real.dtype) == (promise.shape, promise.stride(), promise.dtype), i
