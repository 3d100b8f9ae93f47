"""What launches move between a GPU's memory and its multiprocessors, counted from their arguments. Needs no GPU.

A model, not a measurement: each tensor that a kernel is given moves once, whole, however often its tiles are read (from
L2, if they fit there). Data per kernel: what it writes, and what it reads other than once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction


class Moves(NamedTuple):
    """Arguments (without _ptr and _desc) that a kernel writes; those it reads not at all, or more than once."""

    writes: str
    reads: dict[str, int] = {}


KERNELS = {
    "linear_forward_kernel": Moves("y n a index kept emitted"),
    "linear_forward_persistent_kernel": Moves("y n a kept emitted"),
    "linear_backward_da_kernel": Moves("da q db"),
    "linear_backward_dx_kernel": Moves("dx"),
    "linear_backward_dx_persistent_kernel": Moves("dx"),
    "linear_backward_dw_kernel": Moves("partial dbias"),
    "linear_backward_dw_descriptor_kernel": Moves("partial dbias"),
    "conv2d_forward_kernel": Moves("y n a index kept emitted"),
    "conv2d_backward_da_kernel": Moves("da q db"),
    "conv2d_backward_dx_kernel": Moves("dx"),
    "conv2d_backward_dw_kernel": Moves("partial dbias"),
    "conv2d_small_groups_forward_kernel": Moves("y n a index kept emitted"),
    "conv2d_small_groups_backward_da_kernel": Moves("da q db"),
    "conv2d_small_groups_backward_dx_kernel": Moves("dx"),
    "conv2d_small_groups_backward_dw_kernel": Moves("partial dbias"),
    "conv2d_small_groups_batch_norm_backward_da_kernel": Moves("da q dresidual"),
    "conv2d_batch_norm_backward_da_kernel": Moves("da q dresidual"),
    "batch_norm_statistics_kernel": Moves("mean moment"),
    "batch_norm_variance_kernel": Moves("mean var"),
    "batch_norm_forward_kernel": Moves("y squares"),
    "batch_norm_backward_sums_kernel": Moves("g_sum gx_sum"),
    "batch_norm_backward_parameters_kernel": Moves("dw dbias slope"),
    "batch_norm_backward_kernel": Moves("dx dresidual"),
    "layer_norm_forward_kernel": Moves("y mean rstd squares"),
    "layer_norm_backward_kernel": Moves("dx partial"),
    "layer_norm_backward_dx_kernel": Moves("dx"),
    "layer_norm_backward_sums_kernel": Moves("partial"),
    "weight_reciprocal_norm_kernel": Moves("out"),
    "weight_normalize_kernel": Moves("out"),
    "weight_gradient_kernel": Moves("dw dbias", {"partial": 2, "w": 2}),  # once more for its projection on ŵ
    "sum_kernel": Moves("out"),
    "sum_splits_kernel": Moves("out"),
}
# read in an epilogue that may not be there
ONLY_WITH = {
    "linear_backward_dx_kernel": {"x": "q"},
    "linear_backward_dx_persistent_kernel": {"x": "q"},
    "conv2d_backward_dx_kernel": {"x": "q"},
    "conv2d_small_groups_backward_dx_kernel": {"x": "q"},
    "weight_gradient_kernel": {"w": "rnorm"},
}


class Launch(NamedTuple):
    kernel: str
    read: int  # bytes
    written: int


def moved(kernel: str, arguments: dict[str, object]) -> Launch:
    """Bytes that one launch reads and writes."""
    tensors = {}
    for name, value in arguments.items():
        value = getattr(value, "base", value)  # of a tensor descriptor
        if isinstance(value, Tensor):
            tensors[name.removesuffix("_ptr").removesuffix("_desc")] = value
    writes, times = KERNELS[kernel].writes.split(), KERNELS[kernel].reads
    needs = ONLY_WITH.get(kernel, {})
    read = written = 0
    for name, t in tensors.items():
        size = t.numel() * t.itemsize
        if name in writes:
            written += size
        elif name not in needs or needs[name] in tensors:
            twice = kernel != "weight_gradient_kernel" or "rnorm" in tensors
            read += size * (times.get(name, 1) if twice else 1)
    return Launch(kernel, read, written)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches are noted in the list and neither compiled nor run; tensors may be on the device "meta"."""
    launches: list[Launch] = []

    def note(self, *args, grid, warmup, **kwargs):
        launches.append(moved(self.__name__, dict(zip(self.arg_names, args, strict=False))))

    with mock.patch.object(JITFunction, "run", note):
        yield launches


def channels_last(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)


def size(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.itemsize for t in tensors if t is not None)
