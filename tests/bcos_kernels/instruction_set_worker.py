"""Runs the CPU kernels in a process of its own, whose BCOS_CPU_CAPABILITY chooses their instruction set, and whose
BCOS_CPU_NARROWING what 1x1 convolutions to fewer channels run as.

`python -m tests.bcos_kernels.instruction_set_worker FILE` writes the instruction set and every result there;
test_instruction_sets.py compares them.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import bcos_kernels
from bcos_kernels import _C, reference
from tests.bcos_kernels import harness

# Sizes that are no multiple of any vector's; both layouts; every form of the scaling, of every dtype.
LINEAR = [dict(b=2.0), dict(b=1.5, normalize_weight=True), dict(b=2.0, max_out=3), dict(b=1.0, max_out=3)]
CONV2D = [
    dict(b=2.0, padding=1, layout="channels_last"),
    dict(b=2.0, padding=1, layout="contiguous", normalize_weight=True),
    dict(b=1.5, groups=2, stride=2, layout="channels_last"),
    dict(b=1.5, groups=2, dilation=2, layout="contiguous"),
    dict(b=2.0, max_out=3, layout="channels_last"),
    dict(b=3.0, max_out=3, layout="contiguous"),
]
BATCH_NORM = [
    dict(training=True, activation="relu", layout="channels_last"),
    dict(training=True, activation=None, layout="contiguous"),
    dict(training=False, activation="relu", layout="contiguous"),
]
LAYER_NORM = [dict(detach=False), dict(detach=True), dict(detach=False, eps=1e-2)]
CONV2D_BATCH_NORM = [
    dict(training=True, activation="relu", padding=1, normalize_weight=True, layout="channels_last"),
    dict(training=True, activation=None, groups=2, layout="channels_last"),
    dict(training=False, activation="relu", padding=1, layout="channels_last"),
    dict(training=False, activation=None, groups=2, detach=True, layout="channels_last"),
    dict(training=False, activation="relu", stride=2, layout="contiguous"),
]


def results(module, dtype: torch.dtype, wide: bool = False) -> dict[str, Tensor]:
    """Outputs and gradients of every case by ``module``; ``wide``: in float64, from the values that ``dtype`` has."""

    def values(tensors: list[Tensor]) -> list[Tensor]:
        return [(t.double() if wide else t).requires_grad_() for t in tensors]

    found: dict[str, Tensor] = {}

    def record(name: str, y: Tensor, leaves: list[Tensor]) -> None:
        dy = harness.randn(tuple(y.shape), 9, dtype).to(y.dtype)
        found[f"{name}, y"] = y.detach()
        for i, g in enumerate(torch.autograd.grad(y, leaves, dy)):
            found[f"{name}, gradient {i}"] = g

    for options in LINEAR:
        units = 13 * options.get("max_out", 1)
        if units > 13:
            tensors = [harness.integers((29, 45), 1, dtype), harness.signs((units, 45), 2, dtype)]
        else:
            tensors = [harness.randn((29, 45), 1, dtype), harness.randn((units, 45), 2, dtype, 0.15)]
        leaves = values(tensors)
        record(f"linear {options}", module.linear(*leaves, **options), leaves)
    for case in CONV2D:
        options = dict(case)
        layout, groups = options.pop("layout"), options.get("groups", 1)
        shape, weight_shape = (2, 22, 9, 11), (14 * options.get("max_out", 1), 22 // groups, 3, 3)
        if "max_out" in options:
            tensors = [harness.integers(shape, 1, dtype), harness.signs(weight_shape, 2, dtype)]
        else:
            tensors = [harness.randn(shape, 1, dtype), harness.randn(weight_shape, 2, dtype, 0.1)]
        leaves = values([harness.lay_out(tensors[0], layout), tensors[1]])
        record(f"conv2d {case}", module.conv2d(*leaves, **options), leaves)
    for case in BATCH_NORM:
        options = dict(case)
        layout = options.pop("layout")
        statistics = torch.float64 if wide else reference.statistics_dtype(dtype)
        x = harness.lay_out(harness.randn((3, 21, 7, 5), 1, dtype) + 1, layout)
        residual = harness.lay_out(harness.randn((3, 21, 7, 5), 2, dtype), layout)
        leaves = values([x, residual])
        running_var = torch.full((21,), 0.7, dtype=statistics)
        y = module.batch_norm_uncentered(leaves[0], running_var, residual=leaves[1], **options)
        record(f"batch_norm_uncentered {case}", y, leaves)
    for features, options in zip((21, 48, (7, 9)), LAYER_NORM, strict=True):
        shape = features if isinstance(features, tuple) else (features,)
        x = harness.randn((2, 7, *shape), 1, dtype) + 1
        leaves = values([x, harness.randn(shape, 2, dtype) + 1, harness.randn(shape, 3, dtype)])
        record(f"layer_norm {shape} {options}", module.layer_norm(leaves[0], shape, *leaves[1:], **options), leaves)
    for case in CONV2D_BATCH_NORM:
        options = dict(case)
        layout, groups = options.pop("layout"), options.get("groups", 1)
        statistics = torch.float64 if wide else reference.statistics_dtype(dtype)
        x = harness.lay_out(harness.randn((2, 22, 9, 11), 1, dtype), layout)
        leaves = values([x, harness.randn((14, 22 // groups, 3, 3), 2, dtype, 0.1)])
        running_var = torch.full((14,), 0.01, dtype=statistics)
        z = harness.conv2d_batch_norm(module)(*leaves, running_var=running_var, **options)
        record(f"conv2d_batch_norm {case}", z, leaves)
    for layout, normalize_weight in (("channels_last", True), ("contiguous", False)):  # rows enough to be a convolution
        x = harness.lay_out(harness.randn((2, 40, 24, 25), 1, dtype), layout)
        w = harness.randn((12, 40, 1, 1), 2, dtype, 0.15)
        leaves = values([x, w, harness.randn((12,), 3, dtype)])
        y = module.conv2d(*leaves, normalize_weight=normalize_weight)
        record(f"narrowing conv2d {layout}", y, leaves)
        leaves = values([x, w])
        for training in (True, False):
            running_var = torch.full((12,), 0.01, dtype=torch.float64 if wide else reference.statistics_dtype(dtype))
            z = harness.conv2d_batch_norm(module)(*leaves, running_var=running_var, training=training)
            record(f"narrowing conv2d_batch_norm {layout}, training={training}", z, leaves)
    return found


def main(path: str) -> None:
    found = {}
    ops = ("linear", "conv2d", "batch_norm_uncentered", "conv2d_batch_norm", "layer_norm")
    with harness.only("cpu", *(f"{op}{way}" for op in ops for way in ("", "_backward"))):
        for name, dtype in harness.DTYPES.items():
            found[name] = results(bcos_kernels, dtype)
    torch.save({"capability": _C.cpu_capability(), "results": found}, path)


if __name__ == "__main__":
    main(sys.argv[1])
