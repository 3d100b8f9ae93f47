"""B-cos convolution (B = 2) with an uncentered batch normalisation, residual and ReLU behind it in Triton.

    y = a·|a|/n as in conv2d.py,   z = act(y/√(var + eps)·γ + δ + residual)

Forward in training: the convolution, the statistics of y, one pass from y to z, which also leaves Σ_c z² where asked.
Forward with known statistics: all of it in the convolution's epilogue (epilogue.py). Kept is y, or in explanation mode
with known statistics the slope ∂z/∂a.

Backward, g = ∂L/∂z where the ReLU let z pass, r = 1/√(var + eps):

    1  Σ g and Σ g·y per channel (batch_norm_uncentered.py), where a gradient of γ, δ or var needs them
    2  ∂L/∂y = g·γ·r − (y − mean)·r³·γ·(Σ g y)/M, of which at once ∂L/∂a = 2 ∂L/∂y·sqrt(|y|/n) (1 in explanation mode)
       and q = (∂L/∂n)/n, ∂L/∂n = −Σ_o ∂L/∂y·y/n; from the slope ∂L/∂a = ∂L/∂z·slope
    3  the convolution's dx and dw (conv2d_gradient.py)

The gradient of y is never written. Other options run as composed.py puts them together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import composed
from . import conv2d_small_groups_gradient as small_groups
from . import own_launcher
from .batch_norm_uncentered import as_rows, launch_sums, pass_relu
from .bcos_math import (
    ONE,
    TWO,
    b_mode,
    bcos_gradient,
    check_dtype,
    contiguous,
    index64,
    memory_format,
    on_device,
    present,
    widen,
)
from .conv2d import conv2d_forward, empty_norms, launch_forward, output_shape, reciprocal_weight_norms
from .conv2d_gradient import launch_products
from .conv2d_small_groups import takes
from .epilogue import Epilogue, channel_scale


@triton.jit
def conv2d_batch_norm_backward_da_kernel(
    da_ptr, q_ptr, dresidual_ptr,
    dz_ptr, y_ptr, z_ptr, n_ptr, var_ptr, norm_w_ptr, norm_b_ptr, mean_ptr, slope_ptr,
    M, outputs, L,
    stride_an, stride_ac, stride_al, stride_gn, stride_gc, stride_gl,
    eps,
    RELU: tl.constexpr, FROM_SLOPE: tl.constexpr, DETACH: tl.constexpr,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Math: step 2 of the module's docstring; dresidual = g.

    Shapes: da, dresidual, y (the slope ∂z/∂a if FROM_SLOPE), z (·, G·outputs, L) of one stride, dz of any; n, q (·, G,
    L) float32 contiguous; var, γ, δ, mean and slope = r³·γ·(Σ g y)/M (G·outputs,); M = windows. q, dresidual, γ, δ may
    be None; z where the mask comes from y; mean and slope where var is a constant. Grid: (blocks of BLOCK_M windows,
    G): a program takes all outputs of its group, so that their sum needs no atomics. Numerics: float32, da rounded
    once.
    Traffic: reads dz, y and z once, writes da and dresidual.
    """
    group = tl.program_id(1)
    rows = widen(tl.program_id(0), INDEX64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    image, pixel = rows // L, rows % L
    n_offsets = (image * tl.num_programs(1) + group) * L + pixel
    if not FROM_SLOPE:
        n = tl.load(n_ptr + n_offsets, mask=row_mask, other=1.0)
    through_n_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, outputs, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        channel_mask = columns < outputs
        mask = row_mask[:, None] & channel_mask[None, :]
        channels = group * outputs + columns
        c = widen(channels, INDEX64)[None, :]
        offsets = image[:, None] * stride_an + pixel[:, None] * stride_al + c * stride_ac
        g_offsets = image[:, None] * stride_gn + pixel[:, None] * stride_gl + c * stride_gc
        g = tl.load(dz_ptr + g_offsets, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if FROM_SLOPE:
            tl.store(da_ptr + offsets, g * y, mask=mask)  # the mask is in the slope
            if dresidual_ptr is not None:
                if RELU:
                    z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                    g = tl.where(z <= 0, 0.0, g)
                tl.store(dresidual_ptr + offsets, g, mask=mask)
        else:
            scale = channel_scale(var_ptr, norm_w_ptr, channels, channel_mask, eps)
            if RELU:
                dtype: tl.constexpr = y_ptr.dtype.element_ty
                g = pass_relu(g, y, z_ptr, offsets, mask, norm_b_ptr, scale, channels, channel_mask, dtype)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + offsets, g, mask=mask)
            g *= scale[None, :]
            if slope_ptr is not None:
                mean = tl.load(mean_ptr + channels, mask=channel_mask, other=0.0)
                slope = tl.load(slope_ptr + channels, mask=channel_mask, other=0.0)
                g -= (y - mean[None, :]) * slope[None, :]
            da, through_n, _ = bcos_gradient(g, y, n[:, None], 2.0, 2, True, DETACH)
            tl.store(da_ptr + offsets, da, mask=mask)
            if q_ptr is not None:
                through_n_sum += tl.sum(through_n, axis=1)
    if q_ptr is not None:
        tl.store(q_ptr + n_offsets, -(through_n_sum / n) / n, mask=row_mask)


# Launchers -----------------------------------------------------------------------------------------------------------


def _is_fused(x: Tensor, b: float, b_tensor: Tensor | None, max_out: int) -> bool:
    """Whether a backward goes from ∂L/∂z to ∂L/∂a at once: B = 2, and y is all that it takes of the outputs."""
    return b_mode(b, b_tensor) == TWO and max_out == 1 and x.dtype != torch.float16


def conv2d_batch_norm_forward(
    x, weight, bias, norm_weight, norm_bias, residual, running_var, squares, stride, padding, dilation, groups, b,
    b_tensor, normalize_weight, max_out, training, eps, activation, keep, detach, emits_squares,
):  # fmt: skip
    """(z, Σ_c z², y, n, a, index, mean, var), what is not kept being empty.

    As `conv2d_forward` and `batch_norm_uncentered_forward` have them; with known statistics in explanation mode the
    slope ∂z/∂a stands for y.
    """
    check_dtype("conv2d_batch_norm", x)
    shape = output_shape(x, weight, stride, padding, dilation, max_out)
    # in training there is nothing to fuse: the statistics need all of y
    fused = not training and (not keep or _is_fused(x, b, b_tensor, max_out))
    if not fused or 0 in shape:
        return composed.conv2d_batch_norm_forward(
            own_launcher, x, weight, bias, norm_weight, norm_bias, residual, running_var, squares, stride, padding,
            dilation, groups, b, b_tensor, normalize_weight, max_out, training, eps, activation, keep, detach,
            emits_squares,
        )  # fmt: skip
    layout = memory_format(x, weight)
    z = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    kept = torch.empty_like(z) if keep else x.new_empty((0,))
    is_one = b_mode(b, b_tensor) == ONE
    n = x.new_empty((0,), dtype=torch.float32) if is_one else empty_norms(x, weight, groups, shape)
    emitted = x.new_empty((shape[0], *shape[2:]) if emits_squares else (0,), dtype=torch.float32)
    var = running_var.to(torch.float32, copy=True)
    epilogue = Epilogue(
        var.contiguous(), contiguous(norm_weight), contiguous(norm_bias),
        None if residual is None else residual.contiguous(memory_format=layout), float(eps),
        relu=activation == "relu", slope=detach, kept=present(kept), squares=present(emitted),
    )  # fmt: skip
    launch_forward(
        x, weight, bias, reciprocal_weight_norms(weight) if normalize_weight else None, stride, padding, dilation,
        groups, b, b_tensor, max_out, shape, squares, z, present(n), None, None, epilogue,
    )  # fmt: skip
    nothing = x.new_empty((0,))
    return z, emitted, kept, n, nothing, nothing.to(torch.uint8), nothing.float(), var


def conv2d_batch_norm_backward(
    dz, x, weight, bias, norm_weight, norm_bias, z, y, n, a, index, mean, var, stride, padding, dilation, groups, b,
    b_tensor, normalize_weight, max_out, training, eps, activation, detach, need_dx, need_dw, need_dbias, need_db,
    need_dnorm_weight, need_dnorm_bias, need_dresidual,
):  # fmt: skip
    """Gradients (dx, dw, dbias, db, dnorm_weight, dnorm_bias, dresidual) of `conv2d_batch_norm_forward`, None where not
    needed. z is read for the ReLU's mask only: None where there was no residual, the mask then comes from y. y without
    elements is computed again.
    """
    check_dtype("conv2d_batch_norm", x)
    if not _is_fused(x, b, b_tensor, max_out) or not dz.numel():
        return composed.conv2d_batch_norm_backward(
            own_launcher, dz, x, weight, bias, norm_weight, norm_bias, z, y, n, a, index, mean, var, stride, padding,
            dilation, groups, b, b_tensor, normalize_weight, max_out, training, eps, activation, detach,
            need_dx, need_dw, need_dbias, need_db, need_dnorm_weight, need_dnorm_bias, need_dresidual,
        )  # fmt: skip
    from_slope = detach and not training and y.numel() > 0
    if not y.numel() or from_slope and (need_dnorm_weight or need_dnorm_bias):
        y, n, _, _ = conv2d_forward(
            x, weight, bias, stride, padding, dilation, groups, b, None, normalize_weight, max_out, True
        )
        from_slope = False
    layout = memory_format(x, weight)
    y, z = y.contiguous(memory_format=layout), None if z is None else z.contiguous(memory_format=layout)
    few = takes(weight, groups)
    n = n.contiguous(memory_format=memory_format(n) if few else torch.contiguous_format)
    relu, inside = activation == "relu", need_dx or need_dw or need_dbias
    dnorm_weight = torch.empty_like(norm_weight) if need_dnorm_weight else None
    dnorm_bias = torch.empty_like(norm_bias) if need_dnorm_bias else None
    # without a ReLU the residual's gradient is dz itself; a copy, as an op may not return one of its inputs
    dresidual = None
    if need_dresidual:
        dresidual = torch.empty_like(y) if relu else dz.clone(memory_format=layout)
    dx = dw = dbias = slope = None
    gamma, delta, var = contiguous(norm_weight), contiguous(norm_bias), var.contiguous()
    dz3, y3, z3 = as_rows(dz), as_rows(y), as_rows(z) if relu else None
    through_variance = inside and training and not detach
    with on_device(x):
        if need_dnorm_weight or need_dnorm_bias or through_variance:
            slope = launch_sums(dz3, y3, z3, gamma, delta, var, eps, relu, dnorm_weight, dnorm_bias)
        if inside or (need_dresidual and relu):
            da = torch.empty_like(y)
            q = torch.empty_like(n) if need_dx and not detach else None
            da3, dresidual3 = as_rows(da), as_rows(dresidual) if relu else None
            if not through_variance:
                mean = slope = None
            if from_slope:  # elementwise: groups are of no matter
                z3 = None if dresidual is None else z3
                _launch_backward_da(
                    da3, None, dresidual3, dz3, y3, z3, None, var, gamma, delta, None, None, 1, eps, relu, True, detach
                )
            elif few:
                small_groups.launch_batch_norm_da(
                    da3, q, dresidual3, dz3, y3, z3, n, var, gamma, delta, mean, slope, eps, relu, detach
                )
            else:
                _launch_backward_da(
                    da3, q, dresidual3, dz3, y3, z3, n, var, gamma, delta, mean, slope, groups, eps, relu, False, detach
                )
            rnorm = reciprocal_weight_norms(weight) if normalize_weight else None
            dx, dw, dbias = launch_products(
                da, q, None, x, weight, bias, rnorm, stride, padding, dilation, groups, max_out, need_dx, need_dw,
                need_dbias,
            )  # fmt: skip
    return dx, dw, dbias, None, dnorm_weight, dnorm_bias, dresidual


def _launch_backward_da(
    da3, q, dresidual3, dz3, y3, z3, n, var, gamma, delta, mean, slope, groups, eps, relu, from_slope, detach
) -> None:
    images, channels, pixels = da3.shape
    rows, outputs = images * pixels, channels // groups
    block_c = min(max(triton.next_power_of_2(outputs), 16), 128)
    # whole rows: fewer of them a program where there would be no two programs a multiprocessor
    block_m = max(min(2048 // block_c, triton.next_power_of_2(triton.cdiv(rows * groups, 512))), 4)
    conv2d_batch_norm_backward_da_kernel[(triton.cdiv(rows, block_m), groups)](
        da3, q, dresidual3,
        dz3, y3, z3, n, var, gamma, delta, mean, slope,
        rows, outputs, pixels,
        *da3.stride(), *dz3.stride(),
        float(eps),
        RELU=relu, FROM_SLOPE=from_slope, DETACH=detach,
        INDEX64=index64(da3, dz3), BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
