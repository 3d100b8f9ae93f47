"""What conv2d_batch_norm keeps between forward and backward, and what it computes again."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

import bcos_kernels
from bcos_kernels import conv2d_batch_norm
from bcosification.evaluation.measuring import bytes_kept
from tests.bcos_kernels import harness
from tests.bcos_kernels.conv2d_batch_norm_cases import (
    MODES,
    Case,
    Mode,
    apply,
    assert_same,
    differentiate,
    gradient_of_output,
    inputs_of,
    leaves_of,
    named,
    running_var_of,
    window,
)


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
