"""What the tests of the ops share: tensors, a comparison, the ops as functions of tensors alone."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.bcos_kernels import harness


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return harness.randn(shape, seed, dtype)


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(*shape, seed=seed, dtype=dtype).requires_grad_()


def assert_same(got, expected, bound: float = 1e-5) -> None:
    """Tensors, or tuples of them, equal to ``bound`` by norm."""
    if isinstance(got, Tensor):
        got, expected = (got,), (expected,)
    for i, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, i
        difference, norm = (mine - theirs).double().norm().item(), theirs.double().norm().item()
        assert difference <= bound * norm, f"{i}: error {difference / (norm or 1):.3g}"


WINDOW = dict(stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2)
FUNCTIONS = {
    "linear": lambda module, x, w, bias, **options: module.linear(x, w, bias, **options),
    "conv2d": lambda module, x, w, bias, **options: module.conv2d(x, w, bias, **WINDOW, **options),
}


def tensors_of(op: str, max_out: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, weight, bias: pre-scale outputs stay away from 0, where |a| has no second derivative."""
    if op == "linear":
        return [leaf(3, 4, seed=1, dtype=dtype), leaf(2 * max_out, 4, seed=2, dtype=dtype),
                leaf(2 * max_out, seed=3, dtype=dtype)]  # fmt: skip
    return [leaf(1, 4, 3, 4, seed=1, dtype=dtype), leaf(2 * max_out, 2, 2, 2, seed=2, dtype=dtype),
            leaf(2 * max_out, seed=3, dtype=dtype)]  # fmt: skip


def size(t: Tensor) -> int:
    return t.numel() * t.element_size()
