"""Launchers of fused ops made of a backend's other launchers: what runs where nobody has built the fused form."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = (
    "conv2d_batch_norm_forward",
    "conv2d_batch_norm_backward",
    "linear_gelu_forward",
    "linear_gelu_backward",
)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.float64 if t.dtype == torch.float64 else torch.float32)


def _held(y: Tensor, b: float, b_tensor: Tensor | None) -> Tensor | None:
    """y where a layer's backward is built from it, as an autograd Function would pass it."""
    return y if b_tensor is None and b == 2 and y.dtype != torch.float16 else None


def keeps_pre_scale(backend: str, dtype: torch.dtype, b: float, b_tensor: Tensor | None, max_out: int) -> bool:
    """Whether a backend's fused ops keep a in the place of y, in any of its variants."""
    of_cuda = backend.partition(":")[0] == "cuda"
    return of_cuda and b_tensor is None and b == 2 and max_out == 1 and dtype != torch.float16


def scaled(a: Tensor, n: Tensor) -> Tensor:
    """y of a convolution's a, B = 2."""
    n = n if n.shape[1] == 1 else n.repeat_interleave(a.shape[1] // n.shape[1], dim=1)
    return (a * (a.abs() / n)).to(a.dtype)


def sum_squares(y: Tensor, dim: int = 1) -> Tensor:
    """Σ y² over a dimension, of an activation (N, C, H, W) over its channels, in the norms' type."""
    return _wide(y).square().sum(dim)


def conv2d_batch_norm_forward(
    launcher: Callable[[str], Callable], x, weight, bias, norm_weight, norm_bias, residual, running_var, squares,
    stride, padding, dilation, groups, b, b_tensor, normalize_weight, max_out, training, eps, activation, keep, detach,
    emits_squares,
):  # fmt: skip
    """The convolution, then the normalisation: (z, squares of z, y, n, a, index, mean, var)."""
    y, n, a, index = launcher("conv2d_forward")(
        x, weight, bias, stride, padding, dilation, groups, b, b_tensor, normalize_weight, max_out, keep, squares
    )
    z, mean, var, emitted = launcher("batch_norm_uncentered_forward")(
        y, norm_weight, norm_bias, residual, running_var, training, eps, activation, emits_squares
    )
    return z, emitted, y if keep else y.new_empty((0,)), n, a, index, mean, var


def conv2d_batch_norm_backward(
    launcher: Callable[[str], Callable], dz, x, weight, bias, norm_weight, norm_bias, z, y, n, a, index, mean, var,
    stride, padding, dilation, groups, b, b_tensor, normalize_weight, max_out, training, eps, activation, detach,
    need_dx, need_dw, need_dbias, need_db, need_dnorm_weight, need_dnorm_bias, need_dresidual,
):  # fmt: skip
    """Gradients (dx, dw, dbias, db, dnorm_weight, dnorm_bias, dresidual); y without elements is computed again."""
    layer = (stride, padding, dilation, groups, b, b_tensor)
    if not y.numel():
        y, n, a, index = launcher("conv2d_forward")(x, weight, bias, *layer, normalize_weight, max_out, True, None)
    inside = need_dx or need_dw or need_dbias or need_db
    dy, dnorm_weight, dnorm_bias, dresidual = launcher("batch_norm_uncentered_backward")(
        dz, y, z, norm_weight, norm_bias, mean, var, training, eps, activation, detach,
        inside, need_dnorm_weight, need_dnorm_bias, need_dresidual,
    )  # fmt: skip
    dx = dw = dbias = db = None
    if inside:
        dx, dw, dbias, db = launcher("conv2d_backward")(
            dy, x, weight, bias, *layer, _held(y, b, b_tensor), n, a, index, normalize_weight, max_out, detach,
            need_dx, need_dw, need_dbias, need_db,
        )  # fmt: skip
    return dx, dw, dbias, db, dnorm_weight, dnorm_bias, dresidual


def linear_gelu_forward(
    launcher: Callable[[str], Callable], x, weight, bias, squares, b, b_tensor, normalize_weight, max_out, keep,
    emits_squares,
):  # fmt: skip
    """The linear layer, then the GELU: (h, squares of h, y, n, a, index)."""
    y, n, a, index = launcher("linear_forward")(x, weight, bias, b, b_tensor, normalize_weight, max_out, keep, squares)
    h = F.gelu(y)
    return h, sum_squares(h, -1) if emits_squares else n.new_empty((0,)), y if keep else y.new_empty((0,)), n, a, index


def linear_gelu_backward(
    launcher: Callable[[str], Callable], dh, x, weight, bias, y, n, a, index, b, b_tensor, normalize_weight, max_out,
    detach, need_dx, need_dw, need_dbias, need_db,
):  # fmt: skip
    """Gradients (dx, dw, dbias, db); the gate is a constant in explanation mode."""
    v = _wide(y)
    slope = 0.5 * (1 + torch.erf(v * math.sqrt(0.5)))
    if not detach:
        slope = slope + v * torch.exp(-0.5 * v.square()) / math.sqrt(2 * math.pi)
    dy = (_wide(dh) * slope).to(y.dtype)
    return launcher("linear_backward")(
        dy, x, weight, bias, b, b_tensor, _held(y, b, b_tensor), n, a, index, normalize_weight, max_out, detach,
        need_dx, need_dw, need_dbias, need_db,
    )  # fmt: skip
