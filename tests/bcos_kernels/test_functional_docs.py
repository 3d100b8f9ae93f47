"""The docstrings of the public functions: their examples run, and their eager equivalents are equivalent."""

from __future__ import annotations

import doctest
import inspect
import re
import textwrap

import pytest
import torch

import bcos_kernels
from tests.bcos_kernels import harness
from tests.bcos_kernels.tolerances import assert_close_to_reference

PUBLIC = [name for name in bcos_kernels.__all__]
WITH_EXAMPLES = ["linear", "conv2d", "batch_norm_uncentered", "conv2d_batch_norm", "layer_norm", "backends"]


def test_the_public_names():
    ops = {"linear", "conv2d", "batch_norm_uncentered", "conv2d_batch_norm", "linear_gelu", "layer_norm"}
    assert set(PUBLIC) == {*ops, "backend", "backends", "dispatched", "recomputed", "timed"}


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_exist(name):
    assert inspect.getdoc(getattr(bcos_kernels, name))


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name):
    function = getattr(bcos_kernels, name)
    tests = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    runner = doctest.DocTestRunner(verbose=False)
    for test in tests:
        runner.run(test)
    assert runner.summarize(verbose=False) == doctest.TestResults(0, runner.tries) and runner.tries > 0


def equivalent(name: str, b: float = 2.0, **values) -> torch.Tensor:
    """y, or z, by the block of code in the docstring; for general b, by the line that its comment gives."""
    text = inspect.getdoc(getattr(bcos_kernels, name))
    block = textwrap.dedent(re.search(r"::\n\n((?:    .*\n|\n)+)", text)[1])
    if b != 2.0:
        block = re.sub(r"y = .*# general b: (.*)", r"y = \1", block)
    values["b"] = b
    exec(block, {"torch": torch}, values)
    return values["z" if "z" in values else "y"]


@pytest.mark.parametrize("b", [2.0, 1.5, 3.0])
def test_equivalent_of_linear(b):
    x, weight = harness.randn((5, 6), 1, torch.float64), harness.randn((4, 6), 2, torch.float64)
    bias = harness.randn((4,), 3, torch.float64)
    expected = equivalent("linear", b, x=x, weight=weight, bias=bias)
    assert_close_to_reference("y", bcos_kernels.linear(x, weight, bias, b=b), None, expected, torch.float64)


@pytest.mark.parametrize("b", [2.0, 1.5, 3.0])
def test_equivalent_of_conv2d(b):
    x, weight = harness.randn((2, 4, 9, 8), 1, torch.float64), harness.randn((5, 4, 3, 2), 2, torch.float64)
    bias, ones = harness.randn((5,), 3, torch.float64), torch.ones(1, 1, 3, 2, dtype=torch.float64)
    window = dict(stride=(2, 1), padding=(1, 2), dilation=(2, 1))
    expected = equivalent("conv2d", b, x=x, weight=weight, bias=bias, ones_1_1_kh_kw=ones, **window)
    y = bcos_kernels.conv2d(x, weight, bias, **window, b=b)
    assert_close_to_reference("y", y, None, expected, torch.float64)


@pytest.mark.parametrize("training", [False, True])
def test_equivalent_of_batch_norm_uncentered(training):
    x, residual = harness.randn((4, 3, 5, 5), 1, torch.float64), harness.randn((4, 3, 5, 5), 2, torch.float64)
    options = dict(
        running_var=torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64),
        weight=harness.randn((3,), 3, torch.float64),
        bias=harness.randn((3,), 4, torch.float64),
        residual=residual,
        training=training,
        eps=1e-5,
    )
    expected = equivalent("batch_norm_uncentered", x=x, **options)
    y = bcos_kernels.batch_norm_uncentered(x, activation="relu", **options)
    assert_close_to_reference("y", y, None, expected, torch.float64)


@pytest.mark.parametrize("training", [False, True])
def test_equivalent_of_conv2d_batch_norm(training):
    x, weight = harness.randn((4, 6, 5, 5), 1, torch.float64), harness.randn((8, 3, 3, 3), 2, torch.float64)
    x = harness.lay_out(x, "channels_last")
    options = dict(stride=2, padding=1, dilation=1, groups=2, b=2.0, normalize_weight=True)
    options |= dict(training=training, activation="relu", residual=harness.randn((4, 8, 3, 3), 3, torch.float64))
    vectors = {name: harness.randn((8,), i, torch.float64) for i, name in enumerate(("norm_weight", "norm_bias"), 4)}
    ops = {name: getattr(bcos_kernels, name) for name in ("conv2d", "batch_norm_uncentered")}
    mine, theirs = (harness.randn((8,), 6, torch.float64).square() for _ in range(2))
    expected = equivalent(
        "conv2d_batch_norm", x=x, weight=weight, bias=None, running_var=theirs, **vectors, **options, **ops
    )  # fmt: skip
    z = bcos_kernels.conv2d_batch_norm(x, weight, running_var=mine, **vectors, **options)
    assert_close_to_reference("z", z, None, expected, torch.float64)
    assert_close_to_reference("running_var", mine, None, theirs, torch.float64)


def test_equivalent_of_layer_norm():
    x, weight, bias = (harness.randn(s, i, torch.float64) for i, s in enumerate(((5, 6), (6,), (6,))))
    expected = equivalent("layer_norm", x=x, weight=weight, bias=bias, eps=1e-5)
    assert_close_to_reference("y", bcos_kernels.layer_norm(x, 6, weight, bias), None, expected, torch.float64)


def test_signatures():
    """As fixed for everything that is built on them."""
    parameters = {name: inspect.signature(getattr(bcos_kernels, name)).parameters for name in PUBLIC}

    def described(name: str) -> str:
        values = parameters[name].values()
        first_keyword = next((p.name for p in values if p.kind is p.KEYWORD_ONLY), None)
        written = []
        for p in values:
            written += ["*"] if p.name == first_keyword else []
            written.append(p.name if p.default is p.empty else f"{p.name}={p.default!r}")
        return ", ".join(written)

    assert described("linear") == ("x, weight, bias=None, *, b=2.0, normalize_weight=False, max_out=1, detach=False")
    assert described("conv2d") == (
        "x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, b=2.0, padding_mode='zeros', "
        "normalize_weight=False, max_out=1, detach=False"
    )
    assert described("batch_norm_uncentered") == (
        "x, running_var, weight=None, bias=None, *, training, momentum=0.1, eps=1e-05, activation=None, residual=None, "
        "detach=False"
    )
    assert described("layer_norm") == (
        "x, normalized_shape, weight=None, bias=None, eps=1e-05, *, channels_first=False, detach=False"
    )
    assert described("conv2d_batch_norm") == (
        "x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, running_var, norm_weight=None, "
        "norm_bias=None, training, momentum=0.1, eps=1e-05, activation=None, residual=None, b=2.0, "
        "padding_mode='zeros', normalize_weight=False, max_out=1, detach=False, recompute=None"
    )
