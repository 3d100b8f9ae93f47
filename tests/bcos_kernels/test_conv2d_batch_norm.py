"""conv2d_batch_norm of every backend against the float64 definition of the two ops: values, running statistics and
gradients in training and in explanation mode, layouts, types."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import bcos_kernels
from bcos_kernels import composed, reference
from tests.bcos_kernels import harness
from tests.bcos_kernels.conv2d_batch_norm_cases import (
    BOTH,
    CASES,
    HALF,
    MODES,
    Case,
    Mode,
    apply,
    assert_same,
    define,
    differentiate,
    gradient_of_output,
    inputs_of,
    leaves_of,
    named,
    options_of,
    running_var_of,
    separately,
    window,
)
from tests.bcos_kernels.tolerances import assert_close_to_reference


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
