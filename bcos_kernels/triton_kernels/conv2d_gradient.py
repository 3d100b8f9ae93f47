"""Gradient of the B-cos convolution of conv2d.py in Triton, g = ∂L/∂y, from y and n (B = 2) or a and n (general B,
float16):

    1  ∂L/∂a and q = (∂L/∂n)/n, (n, G, P, Q), in one pass over g and y (or a); ∂L/∂B beside them
    2  dx = transposed convolution of ∂L/∂a with ŵ, + x ⊙ (transposed box filter of q) in the epilogue
    3  dŵ = Σ over windows of ∂L/∂a · p, in splits that are added in a fixed order, then through the weight norm; dβ
       beside it

∂L/∂a lies per output; with max_out the loads of 2 and 3 spread it to the winning units. Windows of one pixel over
channels_last run 2 and 3 as a linear layer, groups of few channels all three without matrix products
(conv2d_small_groups_gradient.py).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import conv2d_small_groups_gradient as small_groups
from . import linear
from .bcos_math import (
    ONE,
    TWO,
    accumulate,
    b_mode,
    bcos_gradient,
    check_dtype,
    convolution_precision,
    exponent_of,
    index64,
    memory_format,
    on_device,
    present,
    strides_of,
    sum_of,
    tile_of,
    widen,
    window_of_row,
)
from .configs import aligned, config_for, fitted, flattened, shortened
from .conv2d import (
    GROUP_M,
    empty_norms,
    first_tap,
    launch_forward,
    output_shape,
    reciprocal_weight_norms,
    rows_of,
    runs_as_linear,
)
from .conv2d_small_groups import takes
from .weights import finish_weight_gradient, split_rows


@triton.jit
def conv2d_backward_da_kernel(
    da_ptr, q_ptr, db_ptr,
    dy_ptr, v_ptr, n_ptr, b_ptr,
    M, outputs, P, Q,
    stride_an, stride_ac, stride_ah, stride_aw,
    stride_gn, stride_gc, stride_gh, stride_gw,
    stride_vn, stride_vc, stride_vh, stride_vw,
    b,
    B_MODE: tl.constexpr, FROM_OUTPUT: tl.constexpr, DETACH: tl.constexpr,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Math: da = ∂L/∂a; q = (∂L/∂n)/n; db = this program's share of ∂L/∂B.

    Shapes: dy, v and da (·, G·outputs, P, Q) any strides, v = y if FROM_OUTPUT else a; n, q (·, G, P, Q) float32
    contiguous; db (programs,) float32. q and db may be None. Grid: (blocks of BLOCK_M windows, G): a program takes all
    outputs of its group, so that their sum needs no atomics. Numerics: float32. Traffic: reads dy and v once, writes
    da once.
    """
    group = tl.program_id(1)
    rows = widen(tl.program_id(0), INDEX64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    image, p, q = window_of_row(rows, P, Q)
    n_offsets = (image * tl.num_programs(1) + group) * (P * Q) + rows % (P * Q)
    n = tl.load(n_ptr + n_offsets, mask=row_mask, other=1.0)
    b = exponent_of(b, b_ptr)
    g_rows = image * stride_gn + p * stride_gh + q * stride_gw
    v_rows = image * stride_vn + p * stride_vh + q * stride_vw
    a_rows = image * stride_an + p * stride_ah + q * stride_aw
    through_n_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    through_b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, outputs, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        mask = row_mask[:, None] & (columns < outputs)[None, :]
        channel = widen(group * outputs + columns, INDEX64)[None, :]
        g = tl.load(dy_ptr + (g_rows[:, None] + channel * stride_gc), mask=mask, other=0.0)
        v = tl.load(v_ptr + (v_rows[:, None] + channel * stride_vc), mask=mask, other=0.0)
        da, through_n, through_b = bcos_gradient(
            g.to(tl.float32), v.to(tl.float32), n[:, None], b, B_MODE, FROM_OUTPUT, DETACH
        )
        tl.store(da_ptr + (a_rows[:, None] + channel * stride_ac), da, mask=mask)
        if q_ptr is not None:
            through_n_sum += tl.sum(through_n, axis=1)
        if db_ptr is not None:
            through_b_sum += tl.sum(through_b, axis=1)
    if q_ptr is not None:
        tl.store(q_ptr + n_offsets, -(through_n_sum / n) / n, mask=row_mask)
    if db_ptr is not None:
        tl.store(db_ptr + (tl.program_id(0) * tl.num_programs(1) + group), tl.sum(through_b_sum, axis=0))


@triton.jit
def conv2d_backward_dx_kernel(
    dx_ptr,
    da_ptr, index_ptr, x_ptr, w_ptr, rnorm_ptr, q_ptr,
    images, outputs, channels, groups, H, W, P, Q, tiles_m,
    stride_dn, stride_dc, stride_dh, stride_dw,
    stride_an, stride_ac, stride_ah, stride_aw,
    stride_in, stride_ic, stride_ih, stride_iw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wu, stride_wc, stride_wr, stride_ws,
    step_h, step_w, pad_h, pad_w, dil_h, dil_w, tap_step_h, tap_step_w,
    R: tl.constexpr, S: tl.constexpr, UNIT_STEP: tl.constexpr, ALIGNED: tl.constexpr, MAX_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Math: dx[h, w, c] = Σ_{r,s,u} da[p, q, u] ŵ[u, c, r, s] + x[h, w, c] · Σ_{r,s} q[p, q],  p·step_h − pad_h +
    r·dil_h = h.

    Shapes: dx, x (images, G·channels, H, W), da, index (images, G·outputs, P, Q), w (G·outputs·MAX_OUT, channels, R,
    S) any strides; rnorm (G·outputs·MAX_OUT,) and q (images, G, P, Q) float32 contiguous. index, rnorm and q may be
    None. ALIGNED: channels and outputs are multiples of 8.
    Grid: (tiles of BLOCK_M pixels × BLOCK_N channels of each group, groups one after the other; step_h·step_w). A
    program's pixels share their residue modulo
    the stride, so that it walks exactly the taps that reach them (every tap_step-th from the first: tap_step =
    step/gcd(step, dil)) and no product is with zeros only. Reduction: a tap at a time, BLOCK_K units of it.
    Numerics: float32, dx rounded once. Traffic: reads da (each tap, from L1/L2), w and x, writes dx.
    """
    if ALIGNED:  # told to the compiler, which reads and writes 16 bytes at once then
        channels = channels // 8 * 8
        outputs = outputs // 8 * 8
    group = tl.program_id(0) % groups
    tile = tl.program_id(0) // groups
    residue_h = tl.program_id(1) // step_w
    residue_w = tl.program_id(1) % step_w
    rows_h = tl.cdiv(H - residue_h, step_h)
    rows_w = tl.cdiv(W - residue_w, step_w)
    M = widen(rows_h, INDEX64) * rows_w * images  # at most tiles_m · BLOCK_M: residue 0 has the most pixels
    pid_m, pid_n = tile_of(tile, tiles_m, tl.cdiv(channels, BLOCK_N), GROUP_M)
    rows = widen(pid_m, INDEX64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    image, i, j = window_of_row(rows, tl.maximum(rows_h, 1), tl.maximum(rows_w, 1))
    h = residue_h + i * step_h
    w = residue_w + j * step_w
    c = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c_mask = c < channels
    c = widen(c, INDEX64)

    r0 = first_tap(residue_h, pad_h, dil_h, step_h, R, UNIT_STEP)
    s0 = first_tap(residue_w, pad_w, dil_w, step_w, S, UNIT_STEP)
    taps_h = tl.cdiv(R - r0, tap_step_h)
    taps_w = tl.cdiv(S - s0, tap_step_w)
    group_units = outputs * MAX_OUT
    blocks = tl.cdiv(group_units, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, taps_h * taps_w * blocks):
        tap = step // blocks
        r = r0 + tap // taps_w * tap_step_h
        s = s0 + tap % taps_w * tap_step_w
        # exact divisions: every pixel of the program is reached by this tap
        p = (h + pad_h - r * dil_h) // step_h
        q = (w + pad_w - s * dil_w) // step_w
        inside = row_mask & (h + pad_h >= r * dil_h) & (p < P) & (w + pad_w >= s * dil_w) & (q < Q)
        unit = (step % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        unit_mask = unit < group_units
        output = widen(group * outputs + unit // MAX_OUT, INDEX64)
        mask = inside[:, None] & unit_mask[None, :]
        a_rows = image * stride_an + p * stride_ah + q * stride_aw
        da = tl.load(da_ptr + (a_rows[:, None] + (output * stride_ac)[None, :]), mask=mask, other=0.0)
        if MAX_OUT > 1:
            i_rows = image * stride_in + p * stride_ih + q * stride_iw
            index = tl.load(index_ptr + (i_rows[:, None] + (output * stride_ic)[None, :]), mask=mask, other=0)
            da = tl.where(index.to(tl.int32) == (unit % MAX_OUT)[None, :], da, 0.0)
        unit = group * group_units + unit
        w_rows = widen(unit, INDEX64) * stride_wu + (r * stride_wr + s * stride_ws)
        w_offsets = w_rows[:, None] + (c * stride_wc)[None, :]
        weight = tl.load(w_ptr + w_offsets, mask=unit_mask[:, None] & c_mask[None, :], other=0.0)
        if rnorm_ptr is not None:
            rnorm = tl.load(rnorm_ptr + unit, mask=unit_mask, other=0.0)
            weight = (weight.to(tl.float32) * rnorm[:, None]).to(w_ptr.dtype.element_ty)
        total = accumulate(da.to(w_ptr.dtype.element_ty), weight, total, PRECISION)

    mask = row_mask[:, None] & c_mask[None, :]
    c = c + widen(group * channels, INDEX64)
    if q_ptr is not None:
        under = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for tap in range(0, taps_h * taps_w):
            r = r0 + tap // taps_w * tap_step_h
            s = s0 + tap % taps_w * tap_step_w
            p = (h + pad_h - r * dil_h) // step_h
            q = (w + pad_w - s * dil_w) // step_w
            inside = row_mask & (h + pad_h >= r * dil_h) & (p < P) & (w + pad_w >= s * dil_w) & (q < Q)
            under += tl.load(q_ptr + (((image * groups + group) * P + p) * Q + q), mask=inside, other=0.0)
        x_rows = image * stride_xn + h * stride_xh + w * stride_xw
        x = tl.load(x_ptr + (x_rows[:, None] + (c * stride_xc)[None, :]), mask=mask, other=0.0)
        total += x.to(tl.float32) * under[:, None]
    d_rows = image * stride_dn + h * stride_dh + w * stride_dw
    tl.store(dx_ptr + (d_rows[:, None] + (c * stride_dc)[None, :]), total, mask=mask)


@triton.jit
def conv2d_backward_dw_kernel(
    partial_ptr, dbias_ptr,
    da_ptr, index_ptr, x_ptr,
    M, outputs, channels, H, W, P, Q, chunk,
    stride_an, stride_ac, stride_ah, stride_aw,
    stride_in, stride_ic, stride_ih, stride_iw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    step_h, step_w, pad_h, pad_w, dil_h, dil_w,
    R: tl.constexpr, S: tl.constexpr, FLAT: tl.constexpr, ALIGNED: tl.constexpr, MAX_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Math: partial_s[u, (r, s, c)] = Σ da[p, q, u] x[h, w, c] and dbias_s[u] = Σ da[p, q, u] over the windows of
    split s.

    Shapes: da, index (·, G·outputs, P, Q) and x (·, G·channels, H, W) any strides; partial (splits, G·outputs·MAX_OUT,
    R·S·channels) and dbias (splits, G·outputs·MAX_OUT) float32 contiguous; index and dbias may be None; M = windows.
    Grid: (tiles of BLOCK_M units × BLOCK_N columns, G, splits of chunk windows), BLOCK_K windows at a time. A tile's
    columns are channels of one tap, or if FLAT any (r, s, c). ALIGNED: channels and outputs are multiples of 8.
    Numerics: float32. Traffic: reads da and x (each tap, from L1/L2), writes partial.
    """
    if ALIGNED:
        channels = channels // 8 * 8
        outputs = outputs // 8 * 8
    group = tl.program_id(1)
    group_units = outputs * MAX_OUT
    columns = R * S * channels
    blocks = tl.cdiv(channels, BLOCK_N)
    if FLAT:
        tiles_n = tl.cdiv(columns, BLOCK_N)
    else:
        tiles_n = R * S * blocks
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(group_units, BLOCK_M), tiles_n, GROUP_M)
    if FLAT:
        column = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        column_mask = column < columns
        tap = column // channels
        c = column % channels
    else:
        tap = pid_n // blocks
        c = (pid_n % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        column_mask = c < channels
        column = tap * channels + c
    tap_h = tap // S * dil_h - pad_h
    tap_w = tap % S * dil_w - pad_w
    c = widen(group * channels + c, INDEX64)
    unit = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    unit_mask = unit < group_units
    output = widen(group * outputs + unit // MAX_OUT, INDEX64)

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_M,), dtype=tl.float32)
    first = widen(tl.program_id(2), INDEX64) * chunk
    for start in range(0, chunk, BLOCK_K):
        rows = first + start + tl.arange(0, BLOCK_K)
        row_mask = rows < M
        image, p, q = window_of_row(rows, P, Q)
        mask = unit_mask[:, None] & row_mask[None, :]
        a_rows = image * stride_an + p * stride_ah + q * stride_aw
        da = tl.load(da_ptr + (a_rows[None, :] + (output * stride_ac)[:, None]), mask=mask, other=0.0)
        if MAX_OUT > 1:
            i_rows = image * stride_in + p * stride_ih + q * stride_iw
            index = tl.load(index_ptr + (i_rows[None, :] + (output * stride_ic)[:, None]), mask=mask, other=0)
            da = tl.where(index.to(tl.int32) == (unit % MAX_OUT)[:, None], da, 0.0)
        if FLAT:
            h = (p * step_h)[:, None] + tap_h[None, :]
            w = (q * step_w)[:, None] + tap_w[None, :]
        else:
            h = (p * step_h + tap_h)[:, None]
            w = (q * step_w + tap_w)[:, None]
        inside = row_mask[:, None] & (h >= 0) & (h < H) & (w >= 0) & (w < W) & column_mask[None, :]
        x_offsets = (image * stride_xn)[:, None] + h * stride_xh + w * stride_xw + (c * stride_xc)[None, :]
        x = tl.load(x_ptr + x_offsets, mask=inside, other=0.0)
        total = accumulate(da.to(x_ptr.dtype.element_ty), x, total, PRECISION)
        if dbias_ptr is not None:
            dbias += tl.sum(da.to(tl.float32), axis=1)
    slot = (widen(tl.program_id(2), INDEX64) * tl.num_programs(1) + group) * group_units + unit
    mask = unit_mask[:, None] & column_mask[None, :]
    tl.store(partial_ptr + (slot[:, None] * columns + column[None, :]), total, mask=mask)
    if dbias_ptr is not None:
        if pid_n == 0:
            tl.store(dbias_ptr + slot, dbias, mask=unit_mask)


# Launchers -----------------------------------------------------------------------------------------------------------


def launch_products(
    da, q, index, x, weight, bias, rnorm, stride, padding, dilation, groups, max_out, need_dx, need_dw, need_dbias
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx, dw, dbias), None where not needed, from ∂L/∂a and q; dx is channels_last if x or weight is, dw if weight
    is."""
    dx = dw = dbias = None
    precision = convolution_precision()
    if need_dx:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x, weight))
    if need_dw or need_dbias:
        dw = torch.empty(weight.shape, dtype=weight.dtype, device=x.device, memory_format=memory_format(weight))
    if runs_as_linear(weight, stride, padding, groups, x, *(t for t in (dx,) if t is not None)):
        da, index, x, matrix = rows_of(da), rows_of(index), rows_of(x), weight[:, :, 0, 0]
        if dx is not None:
            linear.launch_backward_dx(rows_of(dx), da, index, x, matrix, rnorm, q, max_out, precision)
        if dw is not None:
            dbias = linear.launch_backward_dw(
                dw[:, :, 0, 0], da, index, x, matrix, bias, rnorm, max_out, need_dbias, precision
            )
    elif takes(weight, groups):
        window = (stride, padding, dilation, groups, max_out)
        if dx is not None and dx.numel():
            small_groups.launch_dx(dx, da, q, index, x, weight, rnorm, *window)
        if dw is not None:
            dbias = small_groups.launch_dw(dw, da, index, x, weight, bias, rnorm, *window, need_dbias)
    else:
        if dx is not None and dx.numel():
            _launch_dx(dx, da, q, index, x, weight, rnorm, stride, padding, dilation, groups, max_out, precision)
        if dw is not None:
            dbias = _launch_dw(
                dw, da, index, x, weight, bias, rnorm, stride, padding, dilation, groups, max_out, need_dbias, precision
            )
    return dx, dw if need_dw else None, dbias


def _launch_dx(dx, da, q, index, x, weight, rnorm, stride, padding, dilation, groups, max_out, precision) -> None:
    units, channels, r, s = weight.shape
    images, _, out_h, out_w = da.shape
    height, width = x.shape[2:]
    outputs = units // max_out // groups
    pixels = images * triton.cdiv(height, stride[0]) * triton.cdiv(width, stride[1])
    int64 = index64(dx, da, index, x, weight)
    config = shortened(config_for(pixels, channels, outputs * max_out, x.dtype), int64)
    # where pixels lie at no multiples of 16 elements, each element is loaded by an address of its own (40 channels at
    # 128 × 64 in 4 warps: 496 bytes of spills a thread)
    if da.stride(1) != 1 or dx.stride(1) != 1 or da.shape[1] % 16 or dx.shape[1] % 16:
        config = flattened(config)._replace(block_k=min(config.block_k, 64 // x.itemsize))
    tiles_m, tiles_n = triton.cdiv(pixels, config.block_m), triton.cdiv(channels, config.block_n)
    conv2d_backward_dx_kernel[(tiles_m * tiles_n * groups, stride[0] * stride[1])](
        dx,
        da, index, x, weight, rnorm, q,
        images, outputs, channels, groups, height, width, out_h, out_w, tiles_m,
        *dx.stride(), *da.stride(), *strides_of(index), *x.stride(), *weight.stride(),
        *stride, *padding, *dilation, *(stride[i] // math.gcd(stride[i], dilation[i]) for i in (0, 1)),
        R=r, S=s, UNIT_STEP=stride[0] == stride[1] == 1, ALIGNED=aligned(channels, outputs), MAX_OUT=max_out,
        PRECISION=precision,
        INDEX64=int64,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=GROUP_M,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _launch_dw(
    dw, da, index, x, weight, bias, rnorm, stride, padding, dilation, groups, max_out, need_dbias, precision
) -> Tensor | None:
    units, channels, r, s = weight.shape
    images, _, out_h, out_w = da.shape
    outputs, rows = units // max_out // groups, images * out_h * out_w
    config = config_for(outputs * max_out, channels * r * s, rows, x.dtype)
    block_n = fitted(config.block_n, channels)
    config = config._replace(block_n=block_n) if block_n else flattened(config)
    columns = triton.cdiv(channels * r * s, config.block_n)  # tiles: without FLAT, blocks fill each tap exactly
    tiles = triton.cdiv(outputs * max_out, config.block_m) * max(columns, 1)
    chunk, splits = split_rows(rows, tiles * groups, config.block_k)
    partial = x.new_empty((splits, units, channels * r * s), dtype=torch.float32)
    dbias_partial = x.new_empty((splits, units), dtype=torch.float32) if need_dbias else None
    conv2d_backward_dw_kernel[(tiles, groups, splits)](
        partial, dbias_partial,
        da, index, x,
        rows, outputs, channels, *x.shape[2:], out_h, out_w, chunk,
        *da.stride(), *strides_of(index), *x.stride(),
        *stride, *padding, *dilation,
        R=r, S=s, FLAT=not block_n, ALIGNED=aligned(channels, outputs), MAX_OUT=max_out, PRECISION=precision,
        INDEX64=index64(da, index, x, partial),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=GROUP_M,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return finish_weight_gradient(partial, dbias_partial, weight, bias, rnorm, dw)


def conv2d_backward(
    dy, x, weight, bias, stride, padding, dilation, groups, b, b_tensor, y, n, a, index, normalize_weight, max_out,
    detach, need_dx, need_dw, need_dbias, need_db,
):  # fmt: skip
    """Gradients (dx, dw, dbias, db) of `conv2d_forward`, None where not needed; db is a 0-dim float32 tensor.

    y, n, a, index as the forward gave them, n in any strides; with y None (or n empty) what is missing is recomputed
    from x and weight. dx is channels_last if x or weight is, dw if weight is.
    """
    check_dtype("conv2d", x)
    mode = b_mode(b, b_tensor)
    shape = output_shape(x, weight, stride, padding, dilation, max_out)
    images, _, out_h, out_w = shape
    outputs, rows = shape[1] // groups, images * out_h * out_w
    layout = memory_format(x, weight)
    if not (rows and shape[1]):  # no term in any sum
        return (
            torch.empty_like(x, memory_format=layout).zero_() if need_dx else None,
            torch.empty_like(weight, memory_format=memory_format(weight)).zero_() if need_dw else None,
            bias.new_zeros(bias.shape) if need_dbias else None,
            x.new_zeros((), dtype=torch.float32) if need_db else None,
        )
    rnorm = reciprocal_weight_norms(weight) if normalize_weight else None
    index, a, n = present(index), present(a), present(n)

    # v: what ∂L/∂a is computed from. float16 outputs underflow where the gradient does not.
    from_output = a is None and mode == TWO and y is not None and x.dtype != torch.float16
    v = y if from_output else a
    if (mode != ONE and (v is None or n is None)) or (max_out > 1 and index is None):
        empty = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        v = a = empty if mode != ONE else None
        n = empty_norms(x, weight, groups, shape) if mode != ONE else None
        found = torch.empty_like(empty, dtype=torch.uint8) if max_out > 1 else None
        launch_forward(
            x, weight, bias, rnorm, stride, padding, dilation, groups, b, b_tensor, max_out, shape, None,
            None, n, a, found,
        )  # fmt: skip
        index, from_output = found if index is None else index, False

    da, q, db = dy, None, None
    with on_device(x):
        if mode != ONE and takes(weight, groups):
            da = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
            q, db = small_groups.launch_da(
                da, dy, v, n, b, b_tensor, mode, from_output, detach, need_dx and not detach, need_db and not detach
            )
        elif mode != ONE:
            n = n.contiguous()
            block_m, block_n = 32, 64
            programs = triton.cdiv(rows, block_m)
            da = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
            q = torch.empty_like(n) if need_dx and not detach else None
            partial = x.new_empty((programs * groups,), dtype=torch.float32) if need_db and not detach else None
            conv2d_backward_da_kernel[(programs, groups)](
                da, q, partial,
                dy, v, n, b_tensor,
                rows, outputs, out_h, out_w,
                *da.stride(), *dy.stride(), *v.stride(),
                float(b),
                B_MODE=mode, FROM_OUTPUT=from_output, DETACH=detach,
                INDEX64=index64(dy, v, da, n), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
            )  # fmt: skip
            if partial is not None:
                db = sum_of(partial)
        if need_db and db is None:
            db = x.new_zeros((), dtype=torch.float32)
        dx, dw, dbias = launch_products(
            da, q, index, x, weight, bias, rnorm, stride, padding, dilation, groups, max_out, need_dx, need_dw,
            need_dbias,
        )  # fmt: skip
    return dx, dw, dbias, db
