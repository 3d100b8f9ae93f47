"""What the passes of the CUDA backend move, counted in the emulation, against the floor of a plain network."""

from __future__ import annotations

import pytest
import torch

import bcos_kernels
from tests.bcos_kernels import harness
from tests.bcos_kernels.cuda.emulated import emulated, traffic

pytestmark = pytest.mark.skipif(not harness.has_compiler(), reason="no C++ compiler here")

# Rows enough that what a thread reads once for its whole share (the origin of its moments) is under a tenth.
N, C, O, SIZE = 4, 16, 32, 32  # noqa: E741


def activation(channels: int) -> int:
    """Bytes of an activation, bfloat16."""
    return 2 * N * channels * SIZE * SIZE


def tensors(kernel: int):
    x = harness.lay_out(harness.randn((N, C, SIZE, SIZE), 1, torch.bfloat16), "channels_last").requires_grad_()
    weight = harness.randn((O, C, kernel, kernel), 2, torch.bfloat16, 0.2).requires_grad_()
    dy = harness.lay_out(harness.randn((N, O, SIZE, SIZE), 3, torch.bfloat16), "channels_last")
    return x, weight, dy


def assert_moves(name: str, read: float, written: float, slack: float = 0.07) -> None:
    """In bytes of activations; with `slack` for what is read again from a cache."""
    got = traffic()
    assert read <= got[0] <= read * (1 + slack), f"{name}: read {got[0]}, floor {read}"
    assert written == got[1], f"{name}: written {got[1]}, floor {written}"


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_layer(kernel):
    """Forward: x for the norm, y in place. Backward: dy and y once, ∂L/∂a out; dx in place with x beside it."""
    x, weight, dy = tensors(kernel)
    with emulated(), bcos_kernels.backend("cuda"):
        traffic()
        y = bcos_kernels.conv2d(x, weight, padding=kernel // 2)
        assert_moves("forward", activation(C) + activation(O), activation(O))
        torch.autograd.grad(y, (x, weight), dy)
        assert_moves("backward", 2 * activation(O) + 2 * activation(C), activation(O) + activation(C))


@pytest.mark.parametrize("with_residual", [False, True])
def test_a_layer_with_its_batch_norm(with_residual):
    """What a plain network's BatchNorm with ReLU moves: forward 2 reads and 1 write, backward 4 reads and 1 write, and
    a residual's own; nothing for the scaling. The layer's norm comes with x, and only dx += x ⊙ q is B-cos's."""
    x, weight, dz = tensors(3)
    with emulated(), bcos_kernels.backend("cuda"):
        x = bcos_kernels.batch_norm_uncentered(x, torch.ones(C), training=True)  # leaves the sums of squares
        residual = dz.clone(memory_format=torch.channels_last).requires_grad_() if with_residual else None
        traffic()
        z = bcos_kernels.conv2d_batch_norm(
            x, weight, padding=1, running_var=torch.ones(O), training=True, activation="relu", residual=residual
        )
        assert_moves("forward", (2 + with_residual) * activation(O), activation(O))
        asked = (x, weight, *((residual,) if with_residual else ()))
        torch.autograd.grad(z, asked, dz)
        # behind a residual the mask is in z, which both passes read
        reads = (4 + 2 * with_residual) * activation(O) + 2 * activation(C)
        assert_moves("backward", reads, (1 + with_residual) * activation(O) + activation(C))


def test_layer_norm():
    """Forward: x in, y out. Backward: dy and x for dx, and again for dw and db, as torch's."""
    rows, features = 300, 256
    x = harness.randn((rows, features), 1, torch.bfloat16).requires_grad_()
    weight, bias = torch.ones(features, requires_grad=True), torch.zeros(features, requires_grad=True)
    size = 2 * rows * features
    with emulated(), bcos_kernels.backend("cuda"):
        traffic()
        y = bcos_kernels.layer_norm(x, features, weight, bias)
        assert_moves("forward", size, size)
        torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y), retain_graph=True)
        assert_moves("backward", 4 * size, size)
        torch.autograd.grad(y, x, torch.ones_like(y))
        assert_moves("explanation, backward", 2 * size, size)


def test_known_statistics():
    """Inference: one pass in place. Explanations: the slope goes to the convolution's output, and back is one pass."""
    x, weight, dz = tensors(3)
    with emulated(), bcos_kernels.backend("cuda"):
        traffic()
        with torch.no_grad():
            bcos_kernels.conv2d_batch_norm(
                x, weight, padding=1, running_var=torch.ones(O), training=False, activation="relu"
            )
        assert_moves("inference", activation(C) + activation(O), activation(O))
        z = bcos_kernels.conv2d_batch_norm(
            x, weight, padding=1, running_var=torch.ones(O), training=False, activation="relu", detach=True
        )
        assert_moves("explanation, forward", activation(C) + activation(O), 2 * activation(O))
        torch.autograd.grad(z, x, dz)
        assert_moves("explanation, backward", 2 * activation(O), activation(O))
