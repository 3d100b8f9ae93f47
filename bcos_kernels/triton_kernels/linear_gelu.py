"""B-cos linear layer with a GELU behind it in Triton: h = GELU(y), y as in linear.py, B = 2.

Forward: the layer's kernel, GELU and Σ h² of each row in its epilogue. Backward: one pass from ∂L/∂h and y to ∂L/∂a and
q, then the layer's products; the gradient of y is never written. Other options run as composed.py puts them together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import composed
from . import own_launcher
from .bcos_math import ONE, TWO, b_mode, check_dtype, present
from .epilogue import Epilogue
from .linear import backward, forward


def _is_fused(x: Tensor, b: float, b_tensor: Tensor | None, max_out: int) -> bool:
    """Whether a backward goes from ∂L/∂h to ∂L/∂a at once: B = 2, and y is all that it takes of the outputs."""
    return b_mode(b, b_tensor) == TWO and max_out == 1 and x.dtype != torch.float16


def linear_gelu_forward(x, weight, bias, squares, b, b_tensor, normalize_weight, max_out, keep, emits_squares):
    """B-cos linear layer with a GELU behind it → (h, Σ h² per row, y, n, a, index), what is not kept being empty."""
    check_dtype("linear_gelu", x)
    if keep and not _is_fused(x, b, b_tensor, max_out):
        return composed.linear_gelu_forward(
            own_launcher, x, weight, bias, squares, b, b_tensor, normalize_weight, max_out, keep, emits_squares
        )
    rows = x.shape[0]
    h = x.new_empty((rows, weight.shape[0] // max_out))
    n = x.new_empty((0 if b_mode(b, b_tensor) == ONE else rows,), dtype=torch.float32)
    y = torch.empty_like(h) if keep else h.new_empty((0,))
    emitted = x.new_empty((rows if emits_squares else 0,), dtype=torch.float32)
    epilogue = Epilogue(gelu=True, kept=present(y), squares=present(emitted))
    a, index = forward(x, weight, bias, b, b_tensor, normalize_weight, max_out, keep, squares, h, n, epilogue)
    return h, emitted, y, n, a, index


def linear_gelu_backward(
    dh, x, weight, bias, y, n, a, index, b, b_tensor, normalize_weight, max_out, detach,
    need_dx, need_dw, need_dbias, need_db,
):  # fmt: skip
    """Gradients (dx, dw, dbias, db) of `linear_gelu_forward`, None where not needed."""
    check_dtype("linear_gelu", x)
    needs = (need_dx, need_dw, need_dbias, need_db)
    if not _is_fused(x, b, b_tensor, max_out):
        return composed.linear_gelu_backward(
            own_launcher, dh, x, weight, bias, y, n, a, index, b, b_tensor, normalize_weight, max_out, detach, *needs
        )
    return backward(
        dh, x, weight, bias, b, b_tensor, y, n, a, index, normalize_weight, max_out, detach, *needs, True
    )  # fmt: skip
