"""Uncentered batch normalisation in Triton: x (N, C, ...), statistics per channel.

    y = act(x/√(var + eps)·w + β + residual),   act the identity or ReLU

var is the biased variance of the batch in training, the running one in evaluation; only the output is not centred.

Forward: in training, mean and M2 of blocks of rows (the second moment about the block's own mean), combined block by
block (Chan, Golub & LeVeque), so that a mean far from zero costs no digits; then one elementwise pass.
Backward, g = ∂L/∂y where the ReLU let y pass, r = 1/√(var + eps):

    dβ = Σ g,   dw = r·Σ g x,   dresidual = g
    dx = g·w·r − (x − mean)·r³·w·(Σ g x)/M      (the second term in training only, and not in explanation mode)

Σ g and Σ g x in blocks that are added in a fixed order, then one elementwise pass. The ReLU's mask is taken from y, or
where there was no residual from x, to read one tensor less. The pass that writes y also leaves Σ_c y² where asked. A
row is one (sample, pixel): kernels see tensors as (N, C, L) of any strides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bcos_math import (
    check_dtype,
    contiguous,
    index64,
    memory_format,
    on_device,
    present,
    shares_of,
    sum_shares,
    widen,
)
from .epilogue import channel_scale

# rows split over at most this many programs in the channel sums; a constant, so that sums are the same everywhere
MAX_SPLITS = 128


@triton.jit
def batch_norm_statistics_kernel(
    mean_ptr, moment_ptr,
    x_ptr,
    M, C, L, chunk,
    stride_xn, stride_xc, stride_xl,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Math: mean and Σ (x − mean)² of each channel over a chunk of rows.

    Shapes: x (N, C, L) any strides, M = N·L rows; mean, moment (splits, C) float32. Grid: (blocks of BLOCK_C channels,
    splits of chunk rows). Numerics: float32, moments about the mean of each BLOCK_M rows. Traffic: reads x once.
    """
    channels = widen(tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), INDEX64)
    channel_mask = channels < C
    first = widen(tl.program_id(1), INDEX64) * chunk
    mean = tl.zeros((BLOCK_C,), dtype=tl.float32)
    moment = tl.zeros((BLOCK_C,), dtype=tl.float32)
    seen = 0.0
    rows_in_split = tl.minimum(chunk, M - first)
    for start in range(0, rows_in_split, BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        mask = (start + tl.arange(0, BLOCK_M) < rows_in_split)[:, None] & channel_mask[None, :]
        offsets = ((rows // L) * stride_xn + (rows % L) * stride_xl)[:, None] + (channels * stride_xc)[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        count = tl.sum((start + tl.arange(0, BLOCK_M) < rows_in_split).to(tl.float32), axis=0)
        block_mean = tl.sum(x, axis=0) / count
        centred = tl.where(mask, x - block_mean[None, :], 0.0)
        slip = tl.sum(centred, axis=0) / count  # what rounding left of the mean
        step = block_mean - mean + slip
        block_moment = tl.sum(centred * centred, axis=0) - slip * slip * count
        moment += block_moment + step * step * (seen / (seen + count) * count)
        mean += step * (count / (seen + count))
        seen += count
    offsets = tl.program_id(1) * C + channels
    tl.store(mean_ptr + offsets, mean, mask=channel_mask)
    tl.store(moment_ptr + offsets, moment, mask=channel_mask)


@triton.jit
def batch_norm_variance_kernel(
    mean_ptr, var_ptr,
    split_mean_ptr, split_moment_ptr,
    M, C, chunk, splits,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Math: mean and biased variance from those of the splits.

    Shapes: split_mean, split_moment (splits, C), mean, var (C,), float32. Grid: blocks of BLOCK_C channels.
    Numerics: float32, splits combined in order.
    """
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    mean = tl.zeros((BLOCK_C,), dtype=tl.float32)
    moment = tl.zeros((BLOCK_C,), dtype=tl.float32)
    chunk_rows = chunk * 1.0
    for split in range(0, splits):
        seen = split * chunk_rows
        count = tl.minimum(M * 1.0 - seen, chunk_rows)
        split_mean = tl.load(split_mean_ptr + split * C + channels, mask=channel_mask, other=0.0)
        split_moment = tl.load(split_moment_ptr + split * C + channels, mask=channel_mask, other=0.0)
        step = split_mean - mean
        moment += split_moment + step * step * (seen / (seen + count) * count)
        mean += step * (count / (seen + count))
    tl.store(mean_ptr + channels, mean, mask=channel_mask)
    tl.store(var_ptr + channels, moment / M, mask=channel_mask)


@triton.jit
def batch_norm_forward_kernel(
    y_ptr, squares_ptr,
    x_ptr, var_ptr, w_ptr, bias_ptr, residual_ptr,
    M, C, L, chunk,
    stride_yn, stride_yc, stride_yl, stride_xn, stride_xc, stride_xl, stride_rn, stride_rc, stride_rl,
    eps,
    RELU: tl.constexpr, INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Math: y = act(x/√(var + eps)·w + β + residual), and Σ y² over the channels of each program.

    Shapes: x, residual, y (N, C, L) any strides; var, w, bias (C,); squares (splits of C, M) float32; w, bias, residual
    and squares may be None. Grid: (blocks of BLOCK_M rows, splits of chunk channels).
    Numerics: float32, y rounded once, squares of the rounded; ReLU passes NaN. Traffic: reads x and residual, writes y.
    """
    rows = widen(tl.program_id(0), INDEX64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n, l = (rows // L)[:, None], (rows % L)[:, None]  # noqa: E741  (l: the pixel)
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, chunk, BLOCK_C):
        channels = tl.program_id(1) * chunk + start + tl.arange(0, BLOCK_C)
        channel_mask = channels < C
        mask = (rows < M)[:, None] & channel_mask[None, :]
        scale = channel_scale(var_ptr, w_ptr, channels, channel_mask, eps)
        c = widen(channels, INDEX64)[None, :]
        x = tl.load(x_ptr + (n * stride_xn + l * stride_xl + c * stride_xc), mask=mask, other=0.0)
        y = x.to(tl.float32) * scale[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + channels, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
        if residual_ptr is not None:
            offsets = n * stride_rn + l * stride_rl + c * stride_rc
            y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            y = tl.where(y <= 0, 0.0, y)
        tl.store(y_ptr + (n * stride_yn + l * stride_yl + c * stride_yc), y, mask=mask)
        if squares_ptr is not None:
            stored = tl.where(mask, y.to(y_ptr.dtype.element_ty).to(tl.float32), 0.0)
            squares += tl.sum(stored * stored, axis=1)
    if squares_ptr is not None:
        tl.store(squares_ptr + (widen(tl.program_id(1), INDEX64) * M + rows), squares, mask=rows < M)


@triton.jit
def pass_relu(g, x, y_ptr, y_offsets, mask, bias_ptr, scale, channels, channel_mask, dtype: tl.constexpr):
    """g where the ReLU let the output pass: by the output itself, or y None by x, of which it is computed again."""
    if y_ptr is not None:
        y = tl.load(y_ptr + y_offsets, mask=mask, other=0.0).to(tl.float32)
    else:
        y = x * scale[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + channels, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
        y = y.to(dtype).to(tl.float32)  # a small value that was rounded to 0 did not pass
    return tl.where(y <= 0, 0.0, g)


@triton.jit
def batch_norm_backward_sums_kernel(
    g_sum_ptr, gx_sum_ptr,
    dy_ptr, x_ptr, y_ptr, var_ptr, w_ptr, bias_ptr,
    M, C, L, chunk,
    stride_gn, stride_gc, stride_gl, stride_xn, stride_xc, stride_xl, stride_yn, stride_yc, stride_yl,
    eps,
    RELU: tl.constexpr, INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Math: Σ g and Σ g x of each channel over a chunk of rows, g = dy, with RELU where the output is not ≤ 0.

    Shapes: dy, x, y (N, C, L) any strides; var, w, bias (C,); sums (splits, C) float32; w, bias and y may be None.
    Grid: (blocks of BLOCK_C channels, splits of chunk rows). Numerics: float32. Traffic: reads dy, x and y once.
    """
    channels = widen(tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), INDEX64)
    channel_mask = channels < C
    first = widen(tl.program_id(1), INDEX64) * chunk
    scale = channel_scale(var_ptr, w_ptr, channels, channel_mask, eps)
    g_sum = tl.zeros((BLOCK_C,), dtype=tl.float32)
    gx_sum = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for start in range(0, tl.minimum(chunk, M - first), BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & channel_mask[None, :]
        n, l = (rows // L)[:, None], (rows % L)[:, None]  # noqa: E741
        c = channels[None, :]
        g = tl.load(dy_ptr + (n * stride_gn + l * stride_gl + c * stride_gc), mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + (n * stride_xn + l * stride_xl + c * stride_xc), mask=mask, other=0.0).to(tl.float32)
        if RELU:
            y_offsets = n * stride_yn + l * stride_yl + c * stride_yc
            dtype: tl.constexpr = x_ptr.dtype.element_ty
            g = pass_relu(g, x, y_ptr, y_offsets, mask, bias_ptr, scale, channels, channel_mask, dtype)
        g_sum += tl.sum(g, axis=0)
        gx_sum += tl.sum(g * x, axis=0)
    offsets = tl.program_id(1) * C + channels
    tl.store(g_sum_ptr + offsets, g_sum, mask=channel_mask)
    tl.store(gx_sum_ptr + offsets, gx_sum, mask=channel_mask)


@triton.jit
def batch_norm_backward_parameters_kernel(
    dw_ptr, dbias_ptr, slope_ptr,
    g_sum_ptr, gx_sum_ptr, var_ptr, w_ptr,
    M, C, splits,
    eps,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Math: dw = r·Σ g x, dβ = Σ g, slope = r³·w·(Σ g x)/M from the sums of the splits, r = 1/√(var + eps).

    Shapes: sums (splits, C) float32; var, w, dw, dbias (C,); slope (C,) float32. dw, dbias and w may be None.
    Grid: blocks of BLOCK_C channels. Numerics: float32, splits added in order.
    """
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    g_sum = tl.zeros((BLOCK_C,), dtype=tl.float32)
    gx_sum = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for split in range(0, splits):
        g_sum += tl.load(g_sum_ptr + split * C + channels, mask=channel_mask, other=0.0)
        gx_sum += tl.load(gx_sum_ptr + split * C + channels, mask=channel_mask, other=0.0)
    r = 1 / tl.sqrt(tl.load(var_ptr + channels, mask=channel_mask, other=1.0).to(tl.float32) + eps)
    if dw_ptr is not None:
        tl.store(dw_ptr + channels, gx_sum * r, mask=channel_mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + channels, g_sum, mask=channel_mask)
    slope = gx_sum * r * r * r / M
    if w_ptr is not None:
        slope *= tl.load(w_ptr + channels, mask=channel_mask, other=0.0).to(tl.float32)
    tl.store(slope_ptr + channels, slope, mask=channel_mask)


@triton.jit
def batch_norm_backward_kernel(
    dx_ptr, dresidual_ptr,
    dy_ptr, x_ptr, y_ptr, var_ptr, w_ptr, bias_ptr, mean_ptr, slope_ptr,
    M, C, L,
    stride_dn, stride_dc, stride_dl,
    stride_gn, stride_gc, stride_gl, stride_xn, stride_xc, stride_xl, stride_yn, stride_yc, stride_yl,
    eps,
    RELU: tl.constexpr, INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Math: dresidual = g, dx = g·w/√(var + eps) − (x − mean)·slope, g = dy, with RELU where the output is not ≤ 0.

    Shapes: dy, x, y (N, C, L) any strides; dx, dresidual (N, C, L) of one stride; var, w, bias, mean, slope (C,).
    Either output may be None; mean and slope are None where var is a constant; w, bias and y may be None.
    Grid: (blocks of BLOCK_M rows, blocks of BLOCK_C channels). Numerics: float32, rounded once.
    Traffic: reads dy, and where they are needed x and y, once; writes dx and dresidual.
    """
    rows = widen(tl.program_id(0), INDEX64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < C
    mask = (rows < M)[:, None] & channel_mask[None, :]
    n, l = (rows // L)[:, None], (rows % L)[:, None]  # noqa: E741
    c = widen(channels, INDEX64)[None, :]
    scale = channel_scale(var_ptr, w_ptr, channels, channel_mask, eps)
    g = tl.load(dy_ptr + (n * stride_gn + l * stride_gl + c * stride_gc), mask=mask, other=0.0).to(tl.float32)
    x = g  # not read where nothing depends on it
    if x_ptr is not None:
        x = tl.load(x_ptr + (n * stride_xn + l * stride_xl + c * stride_xc), mask=mask, other=0.0).to(tl.float32)
    if RELU:
        y_offsets = n * stride_yn + l * stride_yl + c * stride_yc
        dtype: tl.constexpr = dy_ptr.dtype.element_ty
        g = pass_relu(g, x, y_ptr, y_offsets, mask, bias_ptr, scale, channels, channel_mask, dtype)
    offsets = n * stride_dn + l * stride_dl + c * stride_dc
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + offsets, g, mask=mask)
    if dx_ptr is not None:
        dx = g * scale[None, :]
        if slope_ptr is not None:
            mean = tl.load(mean_ptr + channels, mask=channel_mask, other=0.0)
            slope = tl.load(slope_ptr + channels, mask=channel_mask, other=0.0)
            dx -= (x - mean[None, :]) * slope[None, :]
        tl.store(dx_ptr + offsets, dx, mask=mask)


# Launchers -----------------------------------------------------------------------------------------------------------


def as_rows(t: Tensor | None) -> Tensor | None:
    """(N, C, ...) as (N, C, L): a view wherever the strides allow one, else a copy."""
    if t is None:
        return None
    return t.unsqueeze(2) if t.dim() == 2 else t.flatten(2)


def strides_of(t: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if t is None else t.stride()


def block_for(channels: int, rows: int, channel_stride: int) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_C) of the elementwise and summing kernels: 2048 elements, wide along the contiguous dimension."""
    if channel_stride == 1 and channels > 1:
        block_c = min(triton.next_power_of_2(channels), 64)
        return min(2048 // block_c, max(triton.next_power_of_2(rows), 16)), block_c
    return min(1024, max(triton.next_power_of_2(rows), 16)), 2


def _split(rows: int, channels: int, block_m: int, block_c: int) -> tuple[int, int]:
    """(rows of a split, splits) of the channel sums: about 512 programs in all, at least four blocks of rows each."""
    blocks = triton.cdiv(channels, block_c)
    splits = max(1, min(MAX_SPLITS, triton.cdiv(512, blocks), triton.cdiv(rows, 4 * block_m)))
    chunk = triton.cdiv(triton.cdiv(rows, splits), block_m) * block_m
    return chunk, triton.cdiv(rows, chunk)


def _split_channels(channels: int, rows: int, block_m: int, block_c: int) -> tuple[int, int]:
    """(channels of a split, splits) of a pass that sums over channels: whole rows where that makes 512 programs, for
    every further split writes and reads its sums."""
    splits = max(1, min(triton.cdiv(512, triton.cdiv(rows, block_m)), triton.cdiv(channels, block_c)))
    chunk = triton.cdiv(triton.cdiv(channels, splits), block_c) * block_c
    return chunk, triton.cdiv(channels, chunk)


def batch_norm_uncentered_forward(x, weight, bias, residual, running_var, training, eps, activation, emits_squares):
    """Uncentered batch normalisation of x (N, C, ...) → (y, mean, var, squares).

    y of x's dtype, channels_last if x is; var (C,) float32, the biased batch variance in training, else a copy of
    running_var; mean (C,) float32 in training, else empty; squares (N, ...) float32, Σ_c y², if emits_squares, else
    empty.
    Raises NotImplementedError for a dtype other than float32, bfloat16, float16.
    """
    check_dtype("batch_norm_uncentered", x)
    channels = x.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    squares = x.new_empty((x.shape[0], *x.shape[2:]) if emits_squares else (0,), dtype=torch.float32)
    x3, y3, residual3 = as_rows(x), as_rows(y), as_rows(residual)
    pixels = x3.shape[2]
    rows = x3.shape[0] * pixels
    block_m, block_c = block_for(channels, rows, x3.stride(1))
    blocks = triton.cdiv(channels, block_c)
    if not training:
        mean, var = x.new_empty((0,), dtype=torch.float32), running_var.to(torch.float32, copy=True)
    elif not rows:
        # as the mean and variance of nothing are in torch
        mean, var = x.new_full((2, channels), float("nan"), dtype=torch.float32)
    else:
        mean, var = x.new_empty((2, channels), dtype=torch.float32)
    if not y.numel():
        return y, mean, var, squares.zero_()
    with on_device(x):
        if training:
            chunk, splits = _split(rows, channels, block_m, block_c)
            split_mean, split_moment = x.new_empty((2, splits, channels), dtype=torch.float32)
            batch_norm_statistics_kernel[(blocks, splits)](
                split_mean, split_moment,
                x3,
                rows, channels, pixels, chunk,
                *x3.stride(),
                INDEX64=index64(x3), BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4,
            )  # fmt: skip
            batch_norm_variance_kernel[(triton.cdiv(channels, 128),)](
                mean, var, split_mean, split_moment, rows, channels, chunk, splits, BLOCK_C=128, num_warps=4
            )
        chunk = block_c
        if emits_squares:
            if x3.stride(1) != 1:
                block_m, block_c = 128, 16  # runs of pixels still, but more programs that walk the channels
            chunk, blocks = _split_channels(channels, rows, block_m, block_c)
        shares = shares_of(present(squares), blocks)
        batch_norm_forward_kernel[(triton.cdiv(rows, block_m), blocks)](
            y3, shares,
            x3, var, contiguous(weight), contiguous(bias), residual3,
            rows, channels, pixels, chunk,
            *y3.stride(), *x3.stride(), *strides_of(residual3),
            float(eps),
            RELU=activation == "relu",
            INDEX64=index64(x3, y3, residual3), BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
        sum_shares(present(squares), shares)
    return y, mean, var, squares


def launch_sums(dy3, x3, y3, weight, bias, var, eps, relu, dweight, dbias) -> Tensor:
    """Fill dweight and dbias where they are not None; returns r³·w·(Σ g x)/M, what the variance's gradient is made of.

    dy3, x3, y3 (N, C, L); vectors are contiguous.
    """
    channels, pixels = x3.shape[1:]
    rows = x3.shape[0] * pixels
    block_m, block_c = block_for(channels, rows, x3.stride(1))
    chunk, splits = _split(rows, channels, block_m, block_c)
    g_sum, gx_sum = x3.new_empty((2, splits, channels), dtype=torch.float32)
    batch_norm_backward_sums_kernel[(triton.cdiv(channels, block_c), splits)](
        g_sum, gx_sum,
        dy3, x3, y3, var, weight, bias,
        rows, channels, pixels, chunk,
        *dy3.stride(), *x3.stride(), *strides_of(y3),
        float(eps),
        RELU=relu,
        INDEX64=index64(dy3, x3, y3), BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    slope = x3.new_empty((channels,), dtype=torch.float32)
    batch_norm_backward_parameters_kernel[(triton.cdiv(channels, 128),)](
        dweight, dbias, slope, g_sum, gx_sum, var, weight, rows, channels, splits, float(eps), BLOCK_C=128, num_warps=4
    )
    return slope


def batch_norm_uncentered_backward(
    dy, x, y, weight, bias, mean, var, training, eps, activation, detach, need_dx, need_dweight, need_dbias,
    need_dresidual,
):  # fmt: skip
    """Gradients (dx, dweight, dbias, dresidual) of `batch_norm_uncentered_forward`, None where not needed.

    y is the output, read for the ReLU's mask only; None without one, or where there was no residual: the mask then
    comes from x. mean and var are the forward's.
    """
    check_dtype("batch_norm_uncentered", x)
    channels = x.shape[1]
    layout = memory_format(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout) if need_dx else None
    dresidual = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout) if need_dresidual else None
    if not x.numel():
        dweight = weight.new_zeros(weight.shape) if need_dweight else None
        return dx, dweight, bias.new_zeros(bias.shape) if need_dbias else None, dresidual
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device) if need_dweight else None
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=x.device) if need_dbias else None
    relu, through_variance = activation == "relu", need_dx and training and not detach
    dy3, x3, y3 = as_rows(dy), as_rows(x), as_rows(y) if relu else None
    pixels = x3.shape[2]
    rows = x3.shape[0] * pixels
    weight, bias, var = contiguous(weight), contiguous(bias), var.contiguous()
    slope = None
    with on_device(x):
        if need_dweight or need_dbias or through_variance:
            slope = launch_sums(dy3, x3, y3, weight, bias, var, eps, relu, dweight, dbias)
        if need_dx or need_dresidual:
            out = as_rows(dx if need_dx else dresidual)
            block_m, block_c = block_for(channels, rows, x3.stride(1))
            reads_x = through_variance or relu and y3 is None
            batch_norm_backward_kernel[(triton.cdiv(rows, block_m), triton.cdiv(channels, block_c))](
                as_rows(dx), as_rows(dresidual),
                dy3, x3 if reads_x else None, y3, var, weight, bias,
                present(mean) if through_variance else None, slope if through_variance else None,
                rows, channels, pixels,
                *out.stride(), *dy3.stride(), *x3.stride(), *strides_of(y3),
                float(eps),
                RELU=relu,
                INDEX64=index64(out, dy3, x3, y3), BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4,
            )  # fmt: skip
    return dx, dweight, dbias, dresidual
