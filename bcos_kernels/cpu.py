"""The CPU backend: launchers of the C++ ops of csrc/cpu, which call the library's convolutions and matrix products.

csrc/cpu/layers.cpp tells how a layer runs and what it moves. Both dense layouts are native: channels innermost
(channels_last, linear) and pixels innermost (contiguous). Anything else is copied to one of them first.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import composed
from .layouts import is_channels_last

STRICT_LAYOUTS = True  # takes any strides, and returns those that the ops' fakes announce

_LIBRARY = Path(__file__).parent / "_lib" / "libbcos_kernels_cpu.so"


@cache
def unusable_reason() -> str | None:
    """Why this backend cannot run here, or None. Loads the op library on the first call."""
    from .dispatch import build_report

    if not _LIBRARY.exists():
        return build_report().get("cpu") or f"its library {_LIBRARY.name} is missing from the installation"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"its library {_LIBRARY.name} does not load: {error}"
    return None


@cache
def _op(name: str):
    return getattr(torch.ops.bcos_kernels_cpp, name).default


def _mode(b: float, b_tensor: Tensor | None) -> tuple[int, float]:
    """(1, 2 or 0 for any other B, the exponent B − 1)."""
    if b_tensor is not None:
        return 0, float(b_tensor) - 1.0  # in host memory: reading it waits for nothing
    return (int(b) if b in (1, 2) else 0), b - 1.0


def linear_forward(x, weight, bias, b, b_tensor, normalize_weight, max_out, keep, squares):
    """x (M, K), weight (N·max_out, K) → y (M, N), n (M,), a (M, N) and winning units where kept."""
    return _op("linear_forward")(x, weight, bias, *_mode(b, b_tensor), normalize_weight, max_out, squares, keep)


def _check_channels(op: str, x: Tensor) -> None:
    if x.shape[1] == 0:  # the library's convolution divides by them
        raise NotImplementedError(f"{op}: the CPU kernels expect C >= 1 of x (N, C, H, W), got {tuple(x.shape)}")


def _gradients(found: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(found, needs, strict=True))


def linear_backward(
    dy, x, weight, bias, b, b_tensor, y, n, a, index, normalize_weight, max_out, detach, need_dx, need_dw, need_dbias,
    need_db,
):  # fmt: skip
    """Gradients (dx, dw, dbias, db) from y and n, or from a; y None: a is computed again."""
    needs = (need_dx, need_dw, need_dbias, need_db)
    found = _op("linear_backward")(
        dy, x, weight, bias, *_mode(b, b_tensor), y, n, a, index, normalize_weight, max_out, detach, *needs
    )
    return _gradients(found, needs)


def conv2d_forward(
    x, weight, bias, stride, padding, dilation, groups, b, b_tensor, normalize_weight, max_out, keep, squares
):
    """x (N, C, H, W), weight (O·max_out, C/G, R, S) → y (N, O, P, Q), n (N, G, P, Q); a, winning units where kept."""
    _check_channels("conv2d", x)
    return _op("conv2d_forward")(
        x, weight, bias, *stride, *padding, *dilation, groups, *_mode(b, b_tensor), normalize_weight, max_out, squares,
        keep,
    )  # fmt: skip


def conv2d_backward(
    dy, x, weight, bias, stride, padding, dilation, groups, b, b_tensor, y, n, a, index, normalize_weight, max_out,
    detach, need_dx, need_dw, need_dbias, need_db,
):  # fmt: skip
    """Gradients (dx, dw, dbias, db) from y and n, or from a; y None: a is computed again."""
    _check_channels("conv2d", x)
    needs = (need_dx, need_dw, need_dbias, need_db)
    found = _op("conv2d_backward")(
        dy, x, weight, bias, *stride, *padding, *dilation, groups, *_mode(b, b_tensor), y, n, a, index,
        normalize_weight, max_out, detach, *needs,
    )  # fmt: skip
    return _gradients(found, needs)


def batch_norm_uncentered_forward(x, weight, bias, residual, running_var, training, eps, activation, emits_squares):
    """y = act(x/√(var + eps)·w + bias + residual); (y, mean, var, Σ_c y²), mean empty in eval mode."""
    return _op("batch_norm_forward")(
        x, weight, bias, residual, running_var, training, eps, activation == "relu", emits_squares
    )


def batch_norm_uncentered_backward(
    dy, x, y, weight, bias, mean, var, training, eps, activation, detach, need_dx, need_dweight, need_dbias,
    need_dresidual,
):  # fmt: skip
    """Gradients (dx, dweight, dbias, dresidual); y is read for the ReLU's mask where there was a residual, else the
    mask comes from x and y may be None."""
    needs = (need_dx, need_dweight, need_dbias, need_dresidual)
    found = _op("batch_norm_backward")(
        dy, x, y, weight, bias, mean, var, training, eps, activation == "relu", detach, *needs
    )  # fmt: skip
    dx, dweight, dbias, dresidual = _gradients(found, needs)
    if need_dweight:
        dweight = dweight.to(weight.dtype)
    if need_dbias:
        dbias = dbias.to(bias.dtype)
    return dx, dweight, dbias, dresidual


def layer_norm_forward(x, dims, weight, bias, eps, emits_squares):
    """(y, mean, 1/√(var + eps), Σ y² per row) of x (..., features of ``dims`` dimensions)."""
    return _op("layer_norm_forward")(x, dims, weight, bias, eps, emits_squares)


def layer_norm_backward(dy, x, dims, weight, bias, mean, rstd, detach, need_dx, need_dweight, need_dbias):
    """Gradients (dx, dweight, dbias)."""
    needs = (need_dx, need_dweight, need_dbias)
    found = _op("layer_norm_backward")(dy, x, dims, weight, mean, rstd, detach, *needs)
    dx, dweight, dbias = _gradients(found, needs)
    if need_dweight:
        dweight = dweight.to(weight.dtype)
    if need_dbias:
        dbias = dbias.to(bias.dtype)
    return dx, dweight, dbias


def _is_fused(x: Tensor, weight: Tensor, b: float, b_tensor: Tensor | None, max_out: int) -> bool:
    """Whether convolution and normalisation run as one: B = 2, channels innermost, neither float16 nor empty."""
    rows = is_channels_last(x) or is_channels_last(weight)
    return rows and b_tensor is None and b == 2 and max_out == 1 and x.dtype != torch.float16 and x.numel() > 0


def _here(launcher: str):
    return globals()[launcher]


def conv2d_batch_norm_forward(
    x, weight, bias, norm_weight, norm_bias, residual, running_var, squares, stride, padding, dilation, groups, b,
    b_tensor, normalize_weight, max_out, training, eps, activation, keep, detach, emits_squares,
):  # fmt: skip
    """(z, Σ_c z², y, n, a, index, mean, var); with known statistics in explanation mode the slope stands for y."""
    _check_channels("conv2d_batch_norm", x)
    if not _is_fused(x, weight, b, b_tensor, max_out):
        return composed.conv2d_batch_norm_forward(
            _here, x, weight, bias, norm_weight, norm_bias, residual, running_var, squares, stride, padding, dilation,
            groups, b, b_tensor, normalize_weight, max_out, training, eps, activation, keep, detach, emits_squares,
        )  # fmt: skip
    z, emitted, y, slope, n, mean, var = _op("conv2d_batch_norm_forward")(
        x, squares, weight, bias, running_var, norm_weight, norm_bias, residual, *stride, *padding, *dilation, groups,
        normalize_weight, training, eps, activation == "relu", keep, detach, emits_squares,
    )  # fmt: skip
    nothing = x.new_empty((0,))
    return z, emitted, slope if slope.numel() else y, n, nothing, nothing.to(torch.uint8), mean, var


def conv2d_batch_norm_backward(
    dz, x, weight, bias, norm_weight, norm_bias, z, y, n, a, index, mean, var, stride, padding, dilation, groups, b,
    b_tensor, normalize_weight, max_out, training, eps, activation, detach, need_dx, need_dw, need_dbias, need_db,
    need_dnorm_weight, need_dnorm_bias, need_dresidual,
):  # fmt: skip
    """Gradients (dx, dw, dbias, db, dnorm_weight, dnorm_bias, dresidual) from z, y and n, or from the slope."""
    _check_channels("conv2d_batch_norm", x)
    needs = (need_dx, need_dw, need_dbias, need_db, need_dnorm_weight, need_dnorm_bias, need_dresidual)
    if not _is_fused(x, weight, b, b_tensor, max_out) or not dz.numel():
        return composed.conv2d_batch_norm_backward(
            _here, dz, x, weight, bias, norm_weight, norm_bias, z, y, n, a, index, mean, var, stride, padding, dilation,
            groups, b, b_tensor, normalize_weight, max_out, training, eps, activation, detach, *needs,
        )  # fmt: skip
    from_slope = detach and not training and y.numel() > 0
    slope = y if from_slope else y.new_empty((0,))
    if from_slope and (need_dnorm_weight or need_dnorm_bias) or not y.numel():
        y, n, _, _ = conv2d_forward(
            x, weight, bias, stride, padding, dilation, groups, b, None, normalize_weight, max_out, True, None
        )
        slope = slope.new_empty((0,))
    elif from_slope:
        y = None
    dx, dw, dbias, dnorm_weight, dnorm_bias, dresidual = _op("conv2d_batch_norm_backward")(
        dz, x, weight, bias, norm_weight, norm_bias, z, y, slope, n, mean, var, *stride, *padding, *dilation, groups,
        normalize_weight, training, eps, activation == "relu", detach, need_dx, need_dw, need_dbias,
        need_dnorm_weight, need_dnorm_bias, need_dresidual,
    )  # fmt: skip
    found = _gradients((dx, dw, dbias, dx, dnorm_weight, dnorm_bias, dresidual), needs)
    dx, dw, dbias, db, dnorm_weight, dnorm_bias, dresidual = found
    if need_dnorm_weight:
        dnorm_weight = dnorm_weight.to(norm_weight.dtype)
    if need_dnorm_bias:
        dnorm_bias = dnorm_bias.to(norm_bias.dtype)
    return dx, dw, dbias, None, dnorm_weight, dnorm_bias, dresidual


def linear_gelu_forward(x, weight, bias, squares, b, b_tensor, normalize_weight, max_out, keep, emits_squares):
    """(h, Σ h² per row, y, n, a, index)."""
    if b_tensor is not None or b != 2 or max_out != 1 or x.dtype == torch.float16:
        return composed.linear_gelu_forward(
            _here, x, weight, bias, squares, b, b_tensor, normalize_weight, max_out, keep, emits_squares
        )
    h, emitted, y, n = _op("linear_gelu_forward")(x, weight, bias, squares, normalize_weight, keep, emits_squares)
    nothing = x.new_empty((0,))
    return h, emitted, y, n, nothing, nothing.to(torch.uint8)


def linear_gelu_again(y, n, plain):
    """h of the y that the forward kept, to the same bits."""
    if not plain or y.dtype == torch.float16:
        return composed.linear_gelu_again(y, n, plain)
    return _op("linear_gelu_again")(y)


def linear_gelu_backward(
    dh, x, weight, bias, y, n, a, index, b, b_tensor, normalize_weight, max_out, detach,
    need_dx, need_dw, need_dbias, need_db,
):  # fmt: skip
    """Gradients (dx, dw, dbias, db) from y and n."""
    needs = (need_dx, need_dw, need_dbias, need_db)
    if b_tensor is not None or b != 2 or max_out != 1 or x.dtype == torch.float16:
        return composed.linear_gelu_backward(
            _here, dh, x, weight, bias, y, n, a, index, b, b_tensor, normalize_weight, max_out, detach, *needs
        )
    dx, dw, dbias = _op("linear_gelu_backward")(
        dh, x, weight, bias, y, n, normalize_weight, detach, need_dx, need_dw, need_dbias
    )
    return _gradients((dx, dw, dbias, dx), needs)
