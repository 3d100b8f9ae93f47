"""Σ_c x² of an activation, left behind by the pass that wrote it, for the norms of the layer that reads it next.

The sums travel as an attribute of the very tensor that an op returned: whatever model code does with it, a layer that
is given that tensor, unchanged, finds them, and any other tensor has none. They are values without a gradient: the
gradient through the norm is taken from x, so that ∂L/∂x is whole wherever somebody asks for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, ops

CHANNELS, FEATURES = 1, -1
"""The dimension that was summed over: a convolution's channels, a linear layer's features."""


def wanted(x: Tensor) -> bool:
    """Whether an op that writes an activation like ``x`` should emit them: for backends that read them.

    Not where an output's attribute cannot be trusted later: compiled code and inference mode have no versions,
    transforms and modes wrap tensors.
    """
    if torch.compiler.is_compiling() or ops.functorch_active() or torch.is_inference_mode_enabled():
        return False
    return type(x) in (Tensor, torch.nn.Parameter) and dispatch.runs_kernels(x.device)


def declare(x: Tensor, squares: Tensor, dim: int) -> Tensor:
    """Leave ``squares``, summed over ``dim``, with ``x``; returns ``x``."""
    if squares.numel():
        x._bcos_squares = (squares, dim, x._version, x.data_ptr())
    return x


def squares_of(x: Tensor, dim: int) -> Tensor | None:
    """What was left with ``x`` for a layer that sums over ``dim``, unless x was changed in place since."""
    if torch.compiler.is_compiling():
        return None
    left = getattr(x, "_bcos_squares", None)
    if left is None or left[1:] != (dim, x._version, x.data_ptr()) or ops.functorch_active():
        return None
    return left[0]
