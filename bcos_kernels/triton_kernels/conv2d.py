"""B-cos convolution in Triton, as an implicit GEMM: x (n, C, H, W), weight (O·max_out, C/G, R, S), y (n, O, P, Q).

Rows of the product are the n·P·Q windows, its columns the units of one group, its reduction runs over (r, s, c), c
fastest: channels_last is read in its own order, any other strides are read as they are, no patch is ever stored. The
window's norm comes from the tiles that the product loads anyway.

Forward (one kernel):

    a   = max over the units u of output o of ŵ_u·p + β_u,   ŵ_u = w_u/‖w_u‖ or w_u,   p the window of group g
    n   = sqrt(Σ p² + 1e-6)
    y   = a (B = 1),  a·|a|/n (B = 2),  a·(|a|/n + 1e-6)^(B−1) (else)

Backward, g = ∂L/∂y, from y and n (B = 2) or a and n (general B, float16):

    1  ∂L/∂a and q = (∂L/∂n)/n, (n, G, P, Q), in one pass over g and y (or a); ∂L/∂B beside them
    2  dx = transposed convolution of ∂L/∂a with ŵ, + x ⊙ (transposed box filter of q) in the epilogue
    3  dŵ = Σ over windows of ∂L/∂a · p, in splits that are added in a fixed order, then through the weight norm; dβ
       beside it

∂L/∂a lies per output; with max_out the loads of 2 and 3 spread it to the winning units.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bcos_math import (
    ONE,
    TWO,
    accumulate,
    b_mode,
    bcos_gradient,
    bcos_output,
    check_dtype,
    convolution_precision,
    exponent_of,
    index64,
    keeps_pre_scale,
    members_of,
    memory_format,
    on_device,
    present,
    sum_of,
    tile_of,
    units_of_tile,
    widen,
    winner,
)
from .configs import config_for, fitted, flattened, reduced, widened
from .weights import finish_weight_gradient, reciprocal_norms, split_rows

GROUP_M = 8


@triton.jit
def window_of_row(rows, P, Q):
    """(image, p, q) of a row of the product."""
    pixel = rows % (P * Q)
    return rows // (P * Q), pixel // Q, pixel % Q


@triton.jit
def conv2d_forward_kernel(
    y_ptr, n_ptr, a_ptr, index_ptr,
    x_ptr, w_ptr, bias_ptr, rnorm_ptr, b_ptr,
    M, outputs, channels, H, W, P, Q,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wu, stride_wc, stride_wr, stride_ws,
    stride_yn, stride_yc, stride_yh, stride_yw,
    step_h, step_w, pad_h, pad_w, dil_h, dil_w,
    b,
    R: tl.constexpr, S: tl.constexpr, FLAT: tl.constexpr,
    B_MODE: tl.constexpr, MAX_OUT: tl.constexpr, MEMBERS: tl.constexpr, PRECISION: tl.constexpr,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Math: y, n and where asked a and the winning unit, as in the module's docstring.

    Shapes: x (·, G·channels, H, W), w (G·outputs·MAX_OUT, channels, R, S) any strides; y, a, index (·, G·outputs, P,
    Q) of one stride; n (·, G, P, Q) float32 contiguous; bias and rnorm = 1/‖w‖ (G·outputs·MAX_OUT,); M = windows. y,
    n, a, index, bias, rnorm, b may be None. Grid: (tiles of BLOCK_M windows × BLOCK_N units, G).
    Reduction: a tap at a time, BLOCK_K channels of it; if FLAT, BLOCK_K of all (r, s, c), for channels that fill no
    block.
    Numerics: products, norm and scale in float32; y and a rounded once. Padding adds zeros to product and norm.
    Traffic: reads x (each tap, from L1/L2) and w, writes y and n; 2·M·units·channels·R·S FLOPs, and
    2·BLOCK_M·channels·R·S a program for the norm.
    """
    wide_outputs: tl.constexpr = BLOCK_N // MEMBERS
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(outputs, wide_outputs), GROUP_M)
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    rows = widen(pid_m, INDEX64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    image, p, q = window_of_row(rows, P, Q)
    h0 = p * step_h - pad_h
    w0 = q * step_w - pad_w
    units, unit_mask = units_of_tile(pid_n, outputs, MAX_OUT, MEMBERS, BLOCK_N)
    units = units + group * (outputs * MAX_OUT)
    x_rows = x_ptr + (image * stride_xn + widen(group * channels, INDEX64) * stride_xc)
    w_columns = w_ptr + widen(units, INDEX64) * stride_wu

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if FLAT:
        blocks = tl.cdiv(R * S * channels, BLOCK_K)
        steps = blocks
    else:
        blocks = tl.cdiv(channels, BLOCK_K)
        steps = R * S * blocks
    for step in range(0, steps):
        if FLAT:
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            k_mask = k < R * S * channels
            tap = k // channels
            c = k % channels
            h = h0[:, None] + (tap // S * dil_h)[None, :]
            w = w0[:, None] + (tap % S * dil_w)[None, :]
        else:
            tap = step // blocks
            c = (step % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
            k_mask = c < channels
            h = (h0 + tap // S * dil_h)[:, None]
            w = (w0 + tap % S * dil_w)[:, None]
        inside = row_mask[:, None] & (h >= 0) & (h < H) & (w >= 0) & (w < W) & k_mask[None, :]
        c = widen(c, INDEX64)
        x = tl.load(x_rows[:, None] + (h * stride_xh + w * stride_xw + c[None, :] * stride_xc), mask=inside, other=0.0)
        w_offsets = c * stride_wc + (tap // S * stride_wr + tap % S * stride_ws)
        weight = tl.load(w_columns[None, :] + w_offsets[:, None], mask=k_mask[:, None] & unit_mask[None, :], other=0.0)
        total = accumulate(x, weight, total, PRECISION)
        if B_MODE != 1:
            x32 = x.to(tl.float32)
            squares += tl.sum(x32 * x32, axis=1)

    if rnorm_ptr is not None:
        total *= tl.load(rnorm_ptr + units, mask=unit_mask, other=0.0)[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + units, mask=unit_mask, other=0.0).to(tl.float32)[None, :]
    columns = pid_n * wide_outputs + tl.arange(0, wide_outputs)
    y_rows = image * stride_yn + p * stride_yh + q * stride_yw
    offsets = y_rows[:, None] + (widen(group * outputs + columns, INDEX64) * stride_yc)[None, :]
    mask = row_mask[:, None] & (columns < outputs)[None, :]
    if MAX_OUT > 1:
        a, index = winner(total, unit_mask, BLOCK_M, BLOCK_N, MEMBERS)
        if index_ptr is not None:
            tl.store(index_ptr + offsets, index.to(tl.uint8), mask=mask)
    else:
        a = total
    if a_ptr is not None:
        tl.store(a_ptr + offsets, a, mask=mask)
    n = tl.sqrt(squares + 1e-6)
    if n_ptr is not None:
        if pid_n == 0:
            tl.store(n_ptr + ((image * groups + group) * (P * Q) + rows % (P * Q)), n, mask=row_mask)
    if y_ptr is not None:
        tl.store(y_ptr + offsets, bcos_output(a, n[:, None], exponent_of(b, b_ptr), B_MODE), mask=mask)


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
def first_tap(residue, pad, dil, step, TAPS: tl.constexpr, UNIT_STEP: tl.constexpr):
    """First tap of an axis that reaches the pixels ≡ residue (mod step); TAPS if none does."""
    first = 0
    if not UNIT_STEP:
        first = residue * 0 + TAPS
        for tap in tl.static_range(TAPS - 1, -1, -1):
            first = tl.where((residue + pad - tap * dil) % step == 0, tap, first)
    return first


@triton.jit
def conv2d_backward_dx_kernel(
    dx_ptr,
    da_ptr, index_ptr, x_ptr, w_ptr, rnorm_ptr, q_ptr,
    images, outputs, channels, H, W, P, Q, tiles_m,
    stride_dn, stride_dc, stride_dh, stride_dw,
    stride_an, stride_ac, stride_ah, stride_aw,
    stride_in, stride_ic, stride_ih, stride_iw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wu, stride_wc, stride_wr, stride_ws,
    step_h, step_w, pad_h, pad_w, dil_h, dil_w, tap_step_h, tap_step_w,
    R: tl.constexpr, S: tl.constexpr, UNIT_STEP: tl.constexpr, MAX_OUT: tl.constexpr, PRECISION: tl.constexpr,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Math: dx[h, w, c] = Σ_{r,s,u} da[p, q, u] ŵ[u, c, r, s] + x[h, w, c] · Σ_{r,s} q[p, q],  p·step_h − pad_h +
    r·dil_h = h.

    Shapes: dx, x (images, G·channels, H, W), da, index (images, G·outputs, P, Q), w (G·outputs·MAX_OUT, channels, R,
    S) any strides; rnorm (G·outputs·MAX_OUT,) and q (images, G, P, Q) float32 contiguous. index, rnorm and q may be
    None.
    Grid: (tiles of BLOCK_M pixels × BLOCK_N channels, G, step_h·step_w). A program's pixels share their residue modulo
    the stride, so that it walks exactly the taps that reach them (every tap_step-th from the first: tap_step =
    step/gcd(step, dil)) and no product is with zeros only. Reduction: a tap at a time, BLOCK_K units of it.
    Numerics: float32, dx rounded once. Traffic: reads da (each tap, from L1/L2), w and x, writes dx.
    """
    group = tl.program_id(1)
    groups = tl.num_programs(1)
    residue_h = tl.program_id(2) // step_w
    residue_w = tl.program_id(2) % step_w
    rows_h = tl.cdiv(H - residue_h, step_h)
    rows_w = tl.cdiv(W - residue_w, step_w)
    M = widen(rows_h, INDEX64) * rows_w * images  # at most tiles_m · BLOCK_M: residue 0 has the most pixels
    pid_m, pid_n = tile_of(tl.program_id(0), tiles_m, tl.cdiv(channels, BLOCK_N), GROUP_M)
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
    R: tl.constexpr, S: tl.constexpr, FLAT: tl.constexpr, MAX_OUT: tl.constexpr, PRECISION: tl.constexpr,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Math: partial_s[u, (r, s, c)] = Σ da[p, q, u] x[h, w, c] and dbias_s[u] = Σ da[p, q, u] over the windows of
    split s.

    Shapes: da, index (·, G·outputs, P, Q) and x (·, G·channels, H, W) any strides; partial (splits, G·outputs·MAX_OUT,
    R·S·channels) and dbias (splits, G·outputs·MAX_OUT) float32 contiguous; index and dbias may be None; M = windows.
    Grid: (tiles of BLOCK_M units × BLOCK_N columns, G, splits of chunk windows), BLOCK_K windows at a time. A tile's
    columns are channels of one tap, or if FLAT any (r, s, c).
    Numerics: float32. Traffic: reads da and x (each tap, from L1/L2), writes partial.
    """
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


def _output_shape(x, weight, stride, padding, dilation, max_out) -> tuple[int, int, int, int]:
    size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    return (x.shape[0], weight.shape[0] // max_out, *size)


def _forward(
    x, weight, bias, rnorm, stride, padding, dilation, groups, b, b_tensor, max_out, shape, y, n, a, index
) -> None:
    """Launch the forward kernel for the outputs that are not None; those of shape ``shape`` share their strides."""
    _, _, height, width = x.shape
    units, channels, r, s = weight.shape
    outputs, rows, out_h, out_w = units // max_out // groups, shape[0] * shape[2] * shape[3], shape[2], shape[3]
    members = members_of(max_out)
    int64 = index64(x, weight, y, a, n)
    config = widened(config_for(rows, outputs * members, channels * r * s, x.dtype), int64)
    flat = not fitted(config.block_k, channels)
    config = flattened(config) if flat else config._replace(block_k=fitted(config.block_k, channels))
    config = reduced(config, members)
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(outputs, config.block_n // members)
    layout = next(t for t in (y, a, index, x) if t is not None)
    with on_device(x):
        conv2d_forward_kernel[(tiles, groups)](
            y, n, a, index,
            x, weight, None if bias is None else bias.contiguous(), rnorm, b_tensor,
            rows, outputs, channels, height, width, out_h, out_w,
            *x.stride(), *weight.stride(), *layout.stride(),
            *stride, *padding, *dilation,
            float(b),
            R=r, S=s, FLAT=flat,
            B_MODE=b_mode(b, b_tensor), MAX_OUT=max_out, MEMBERS=members, PRECISION=convolution_precision(),
            INDEX64=int64,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=GROUP_M,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


def _reciprocal_norms(weight: Tensor) -> Tensor:
    with on_device(weight):
        return reciprocal_norms(weight)


def conv2d_forward(x, weight, bias, stride, padding, dilation, groups, b, b_tensor, normalize_weight, max_out, keep):
    """B-cos convolution: x (N, C, H, W), weight (O·max_out, C/G, R, S) → (y, n, a, index), what is not kept being
    empty.

    stride, padding and dilation are pairs; padding is with zeros. y (N, O, P, Q) of x's dtype, channels_last if x or
    weight is; n (N, G, P, Q) float32, the norms (empty for B = 1); a as y, the pre-scale output, if keep and the
    backward needs it; index as y, uint8, the winning unit, if keep and max_out > 1.
    Raises NotImplementedError for a dtype other than float32, bfloat16, float16.
    """
    check_dtype("conv2d", x)
    mode = b_mode(b, b_tensor)
    shape = _output_shape(x, weight, stride, padding, dilation, max_out)
    layout = memory_format(x, weight)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    n = x.new_empty((0,) if mode == ONE else (shape[0], groups, *shape[2:]), dtype=torch.float32)
    a = torch.empty_like(y) if keep and keeps_pre_scale(x, mode) else x.new_empty((0,))
    index = torch.empty_like(y, dtype=torch.uint8) if keep and max_out > 1 else x.new_empty((0,), dtype=torch.uint8)
    if y.numel():
        rnorm = _reciprocal_norms(weight) if normalize_weight else None
        _forward(
            x, weight, bias, rnorm, stride, padding, dilation, groups, b, b_tensor, max_out, shape,
            y, present(n), present(a), present(index),
        )  # fmt: skip
    return y, n, a, index


def conv2d_backward(
    dy, x, weight, bias, stride, padding, dilation, groups, b, b_tensor, y, n, a, index, normalize_weight, max_out,
    detach, need_dx, need_dw, need_dbias, need_db,
):  # fmt: skip
    """Gradients (dx, dw, dbias, db) of `conv2d_forward`, None where not needed; db is a 0-dim float32 tensor.

    y, n, a, index as the forward gave them; with y None (or n empty) what is missing is recomputed from x and weight.
    dx is channels_last if x or weight is, dw if weight is.
    """
    check_dtype("conv2d", x)
    mode = b_mode(b, b_tensor)
    shape = _output_shape(x, weight, stride, padding, dilation, max_out)
    images, _, out_h, out_w = shape
    height, width = x.shape[2:]
    units, channels, r, s = weight.shape
    outputs, rows = units // max_out // groups, images * out_h * out_w
    layout = memory_format(x, weight)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout) if need_dx else None
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=x.device, memory_format=memory_format(weight))
    if not (rows and units):  # no term in any sum
        return (
            dx.zero_() if need_dx else None,
            dw.zero_() if need_dw else None,
            bias.new_zeros(bias.shape) if need_dbias else None,
            x.new_zeros((), dtype=torch.float32) if need_db else None,
        )
    rnorm = _reciprocal_norms(weight) if normalize_weight else None
    index, a, n = present(index), present(a), present(n)
    precision = convolution_precision()

    # v: what ∂L/∂a is computed from. float16 outputs underflow where the gradient does not.
    from_output = a is None and mode == TWO and y is not None and x.dtype != torch.float16
    v = y if from_output else a
    if (mode != ONE and (v is None or n is None)) or (max_out > 1 and index is None):
        empty = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        v = a = empty if mode != ONE else None
        n = x.new_empty((images, groups, out_h, out_w), dtype=torch.float32) if mode != ONE else None
        found = torch.empty_like(empty, dtype=torch.uint8) if max_out > 1 else None
        _forward(
            x, weight, bias, rnorm, stride, padding, dilation, groups, b, b_tensor, max_out, shape, None, n, a, found
        )
        index, from_output = found if index is None else index, False

    da, q, db, dbias = dy, None, None, None
    with on_device(x):
        if mode != ONE:
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

        index_strides = (0, 0, 0, 0) if index is None else index.stride()
        if need_dx and dx.numel():
            pixels = images * triton.cdiv(height, stride[0]) * triton.cdiv(width, stride[1])
            int64 = index64(dx, da, index, x, weight)
            config = widened(config_for(pixels, channels, outputs * max_out, x.dtype), int64)
            tiles_m, tiles_n = triton.cdiv(pixels, config.block_m), triton.cdiv(channels, config.block_n)
            conv2d_backward_dx_kernel[(tiles_m * tiles_n, groups, stride[0] * stride[1])](
                dx,
                da, index, x, weight, rnorm, q,
                images, outputs, channels, height, width, out_h, out_w, tiles_m,
                *dx.stride(), *da.stride(), *index_strides, *x.stride(), *weight.stride(),
                *stride, *padding, *dilation, *(stride[i] // math.gcd(stride[i], dilation[i]) for i in (0, 1)),
                R=r, S=s, UNIT_STEP=stride[0] == stride[1] == 1, MAX_OUT=max_out, PRECISION=precision,
                INDEX64=int64,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=GROUP_M,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
        if need_dw or need_dbias:
            config = config_for(outputs * max_out, channels * r * s, rows, x.dtype)
            flat = not fitted(config.block_n, channels)
            config = flattened(config) if flat else config._replace(block_n=fitted(config.block_n, channels))
            columns = triton.cdiv(channels * r * s, config.block_n)  # tiles: without FLAT, blocks fill each tap exactly
            tiles = triton.cdiv(outputs * max_out, config.block_m) * max(columns, 1)
            chunk, splits = split_rows(rows, tiles * groups, config.block_k)
            partial = x.new_empty((splits, units, channels * r * s), dtype=torch.float32)
            dbias_partial = x.new_empty((splits, units), dtype=torch.float32) if need_dbias else None
            conv2d_backward_dw_kernel[(tiles, groups, splits)](
                partial, dbias_partial,
                da, index, x,
                rows, outputs, channels, height, width, out_h, out_w, chunk,
                *da.stride(), *index_strides, *x.stride(),
                *stride, *padding, *dilation,
                R=r, S=s, FLAT=flat, MAX_OUT=max_out, PRECISION=precision,
                INDEX64=index64(da, index, x, partial),
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=GROUP_M,
                num_warps=config.num_warps, num_stages=config.num_stages,
            )  # fmt: skip
            dbias = finish_weight_gradient(partial, dbias_partial, weight, bias, rnorm, dw)
    return dx, dw if need_dw else None, dbias, db
