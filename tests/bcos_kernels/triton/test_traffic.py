"""What the Triton backend moves, by the model of traffic.py, against the floor of a layer and against a plain layer.

The floor reads every input and writes every result once. Plain is what convolution (or product), batch normalisation,
addition and ReLU move as kernels of a library, one each for the forward, the statistics, the normalisation with what
follows it, dx, dw, and the two passes of the normalisation's backward.
"""

from __future__ import annotations

import inspect
from unittest import mock

import pytest
import torch

from bcos_kernels import triton_kernels
from bcos_kernels.triton_kernels import descriptors, layer_norm
from tests.bcos_kernels.triton.traffic import KERNELS, channels_last, moved, recording, size

EPS = 1e-5


class Layer:
    """A convolution of ResNet-50 (ConvNeXt, with groups) with its normalisation, residual and ReLU, bfloat16, batch 32,
    channels_last."""

    def __init__(self, channels: int, outputs: int, pixels: int, kernel: int, groups: int = 1):
        self.x = channels_last(32, channels, pixels, pixels)
        self.weight = channels_last(outputs, channels // groups, kernel, kernel)
        self.y = channels_last(32, outputs, pixels, pixels)
        self.vector = torch.empty(outputs, device="meta")
        self.n = torch.empty(32, groups, pixels, pixels, device="meta")
        self.squares = torch.empty(32, pixels, pixels, device="meta")
        self.nothing = torch.empty(0, device="meta")
        self.window = ((1, 1), (kernel // 2, kernel // 2), (1, 1), groups)
        self.options = (*self.window, 2.0, None, False, 1)

    def conv2d(self, squares: bool = True) -> None:
        known = self.squares if squares else None
        triton_kernels.conv2d_forward(self.x, self.weight, None, *self.options, True, known)

    def conv2d_backward(self) -> None:
        nothing = self.nothing
        triton_kernels.conv2d_backward(
            self.y, self.x, self.weight, None, *self.window, 2.0, None, self.y, self.n, nothing, nothing, False, 1,
            False, True, True, False, False,
        )  # fmt: skip

    def block(self, training: bool, keep: bool) -> None:
        triton_kernels.conv2d_batch_norm_forward(
            self.x, self.weight, None, self.vector, self.vector, self.y, None if training else self.vector,
            self.squares, *self.options, training, EPS, "relu", keep, False, True,
        )  # fmt: skip

    def block_backward(self, residual: bool) -> None:
        triton_kernels.conv2d_batch_norm_backward(
            self.y, self.x, self.weight, None, self.vector, self.vector, self.y if residual else None, self.y, self.n,
            self.nothing, self.nothing, self.vector, self.vector, *self.options, True, EPS, "relu", False,
            True, True, False, False, True, True, residual,
        )  # fmt: skip

    def explanation_backward(self) -> None:
        triton_kernels.conv2d_batch_norm_backward(
            self.y, self.x, self.weight, None, self.vector, self.vector, self.y, self.y, self.n, self.nothing,
            self.nothing, self.nothing, self.vector, *self.options, False, EPS, "relu", True,
            True, False, False, False, False, False, False,
        )  # fmt: skip


# what is run → (x, w, y read or written at the floor, by a plain layer), in tensors of these sizes
FORMS = {
    "conv2d": (lambda layer: layer.conv2d(), (1, 1, 1), (1, 1, 1)),
    "conv2d, squares unknown": (lambda layer: layer.conv2d(squares=False), (1, 1, 1), (1, 1, 1)),
    "conv2d, backward": (lambda layer: layer.conv2d_backward(), (2, 2, 2), (2, 2, 2)),
    # y goes out, in for the statistics and in again: all of it has to be known first
    "block, training": (lambda layer: layer.block(True, True), (1, 1, 5), (1, 1, 5)),
    "block, inference": (lambda layer: layer.block(False, False), (1, 1, 2), (1, 1, 2)),
    # dz, y and z in, the residual's gradient out; the sums have to be known before dx
    "block, backward": (lambda layer: layer.block_backward(True), (2, 2, 7), (2, 2, 10)),
    "block, backward without residual": (lambda layer: layer.block_backward(False), (2, 2, 4), (2, 2, 7)),
    "explanation, backward": (lambda layer: layer.explanation_backward(), (1, 1, 2), (1, 1, 4)),
}
# (form, channels, outputs, pixels, kernel[, groups]) → most that may be moved, in floors and in plain layers
CASES = {
    ("conv2d", 64, 256, 56, 1): (1.02, 1.02),
    ("conv2d", 64, 64, 56, 3): (1.04, 1.04),
    ("conv2d, squares unknown", 64, 64, 56, 3): (1.02, 1.02),
    # a pass from dy and y to ∂L/∂a, and the norm's term reads x once more
    ("conv2d, backward", 64, 256, 56, 1): (2.4, 2.4),
    ("conv2d, backward", 256, 64, 56, 1): (1.8, 1.8),
    ("block, training", 64, 256, 56, 1): (1.02, 1.02),
    ("block, training", 64, 64, 56, 3): (1.02, 1.02),
    ("block, training", 512, 2048, 7, 1): (1.02, 1.02),
    ("block, inference", 64, 256, 56, 1): (1.03, 1.03),
    ("block, inference", 512, 512, 7, 3): (1.01, 1.01),
    # the norm's term alone is left
    ("block, backward", 64, 256, 56, 1): (1.5, 1.05),
    ("block, backward", 64, 64, 56, 3): (1.55, 1.15),
    # dw's splits, float32: more than the activations, which are small here
    ("block, backward", 512, 2048, 7, 1): (2.1, 1.51),
    ("block, backward without residual", 64, 64, 56, 3): (1.8, 1.2),
    ("block, backward without residual", 256, 64, 56, 1): (1.7, 1.33),
    # the mask is in the slope, nothing flows through the norm
    ("explanation, backward", 64, 256, 56, 1): (1.9, 1.01),
    ("explanation, backward", 64, 64, 56, 3): (1.7, 1.01),
    # norms and q are values a window and channel here, of 32 bits, each as large as two activations: of 14 that move,
    # ∂L/∂a takes 7, dx 5, dw 2; dw's splits are a quarter of one more. The forward writes n beside y.
    ("conv2d", 96, 96, 56, 7, 96): (2.01, 2.01),
    ("conv2d", 128, 128, 56, 3, 32): (1.26, 1.26),
    ("block, training", 96, 96, 56, 3, 96): (1.35, 1.35),
    ("block, inference", 96, 96, 56, 3, 96): (1.72, 1.72),
    ("conv2d, backward", 96, 96, 56, 7, 96): (3.58, 3.58),
    ("block, backward without residual", 96, 96, 56, 3, 96): (2.7, 1.8),
    ("explanation, backward", 96, 96, 56, 3, 96): (1.7, 1.01),
}


@pytest.mark.parametrize("described", [False, True], ids=["general", "descriptors"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_moves_little_more_than_it_must(case, described, record_property):
    form, *sizes = case
    run, *counts = FORMS[form]
    layer = Layer(*sizes)
    with recording() as launches, mock.patch.object(descriptors, "architecture", lambda: 90 * described):
        run(layer)
    total = sum(launch.read + launch.written for launch in launches)
    sizes = (size(layer.x), size(layer.weight), size(layer.y))
    ratios = [total / sum(c * s for c, s in zip(count, sizes, strict=True)) for count in counts]
    record_property("launches", [launch._asdict() for launch in launches])
    print(f"{case}: {ratios[0]:.3f} of the floor, {ratios[1]:.3f} of a plain layer, {len(launches)} launches")
    for ratio, bound, name in zip(ratios, CASES[case], ("floor", "plain layer"), strict=True):
        assert ratio < bound, f"{ratio:.3f} times the {name}: " + ", ".join(map(str, launches))


@pytest.mark.parametrize("features", [96, 384, 1536, 2 * layer_norm.LONGEST])
def test_layer_norm(features):
    """Forward: x in, y out. Backward: dy and x in, dx out, and shares of dw and db, under a tenth; once more dy and x
    where rows are too long. A plain network's LayerNorm reads dy and x for dw and db again in any case."""
    x = torch.empty(32 * 197, features, dtype=torch.bfloat16, device="meta")
    vector = torch.empty(features, device="meta")
    with recording() as launches:
        y, mean, rstd, _ = triton_kernels.layer_norm_forward(x, 1, vector, vector, EPS, True)
        forward = sum(launch.read + launch.written for launch in launches)
        launches.clear()
        triton_kernels.layer_norm_backward(y, x, 1, vector, vector, mean, rstd, False, True, True, True)
        backward = sum(launch.read + launch.written for launch in launches)
    assert 2 * size(x) <= forward < 2.1 * size(x)
    passes = 3 if features <= layer_norm.LONGEST else 5
    assert passes * size(x) <= backward < (passes + 0.7) * size(x)


def test_every_kernel_is_in_the_table():
    names = set()
    for file in {*triton_kernels._FILES.values(), "bcos_math", "weights", "descriptors", "epilogue",
                 "conv2d_small_groups", "conv2d_small_groups_gradient"}:
        module = __import__(f"bcos_kernels.triton_kernels.{file}", fromlist=["_"])
        names |= {name for name in vars(module) if name.endswith("_kernel")}
        for name in names & set(KERNELS) & set(vars(module)):
            arguments = inspect.signature(getattr(module, name).fn).parameters
            for written in KERNELS[name].writes.split():
                assert f"{written}_ptr" in arguments, f"{name} has no {written}_ptr"
    assert names == set(KERNELS)


def test_bytes_are_those_of_the_arguments():
    x, w, y = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((8, 4), (6, 4), (8, 6)))
    n, q = torch.empty(8, device="meta"), torch.empty(8, device="meta")
    arguments = {"y_ptr": y, "n_ptr": n, "a_ptr": None, "x_ptr": x, "w_ptr": w, "M": 8}
    assert moved("linear_forward_kernel", arguments)[1:] == (2 * 32 + 2 * 24, 2 * 48 + 4 * 8)
    gradient = {"dx_ptr": x, "da_ptr": y, "w_ptr": w, "x_ptr": x, "q_ptr": None}
    assert moved("linear_backward_dx_kernel", gradient)[1:] == (2 * 48 + 2 * 24, 2 * 32)
    assert moved("linear_backward_dx_kernel", gradient | {"q_ptr": q})[1] == 2 * 48 + 2 * 24 + 2 * 32 + 4 * 8
