"""Gradient of the convolution of conv2d_small_groups.py in Triton, without matrix products.

The three steps of conv2d_gradient.py, and the second of conv2d_batch_norm.py, for groups of few channels: a tile's
columns run through the groups, which lie side by side in channels_last, and products are elementwise.

Norms and q are read and written in the strides that they have: where they lie as the activation does, all is coalesced.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_uncentered import as_rows, pass_relu
from .bcos_math import (
    bcos_gradient,
    exponent_of,
    index64,
    strides_of,
    sum_of,
    sum_shares,
    widen,
    window_of_row,
)
from .conv2d import first_tap
from .conv2d_small_groups import tile_for
from .epilogue import channel_scale
from .weights import finish_weight_gradient

DA_ELEMENTS, DX_ELEMENTS = 1024, 2048
"""Of a tile. With 2048 the pass to ∂L/∂a of a general B takes 255 registers, 8 bytes of which spill."""
COLUMNS = 64
"""Of these tiles, where channels are innermost."""
DW_ELEMENTS = 4096
"""Accumulators of a program of ∂L/∂w: 32 registers a thread in 4 warps."""
TAPS = 64
"""The most taps that one program of ∂L/∂w takes: a 7 × 7 window at once."""
DW_PROGRAMS, DW_SPLITS, DW_LAST = 1024, 128, 8
"""Programs of ∂L/∂w to aim at, the most splits, and what a first sum makes of more than that many. Constants: the order
of every sum is the same on every device."""


@triton.jit
def conv2d_small_groups_backward_da_kernel(
    da_ptr, q_ptr, db_ptr,
    dy_ptr, v_ptr, n_ptr, b_ptr,
    M, groups, P, Q,
    stride_an, stride_ac, stride_ah, stride_aw,
    stride_gn, stride_gc, stride_gh, stride_gw,
    stride_vn, stride_vc, stride_vh, stride_vw,
    stride_nn, stride_nc, stride_nh, stride_nw,
    b,
    OUTPUTS: tl.constexpr, B_MODE: tl.constexpr, FROM_OUTPUT: tl.constexpr, DETACH: tl.constexpr,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Math: da = ∂L/∂a; q = (∂L/∂n)/n; db = this program's share of ∂L/∂B.

    Shapes: dy, v and da (·, groups·OUTPUTS, P, Q) any strides, v = y if FROM_OUTPUT else a; n, q (·, groups, P, Q)
    float32 of one stride; db (programs,) float32. q and db may be None. Grid: (blocks of BLOCK_M windows, blocks of
    BLOCK_G groups), a group's outputs one after the other. Numerics: float32. Traffic: reads dy, v and n, writes da and
    q.
    """
    rows = widen(tl.program_id(0), INDEX64) * BLOCK_M + tl.arange(0, BLOCK_M)
    image, p, q = window_of_row(rows, P, Q)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    mask = (rows < M)[:, None] & (group < groups)[None, :]
    group = widen(group, INDEX64)
    n_rows = image * stride_nn + p * stride_nh + q * stride_nw
    n_offsets = n_rows[:, None] + (group * stride_nc)[None, :]
    n = tl.load(n_ptr + n_offsets, mask=mask, other=1.0)
    b = exponent_of(b, b_ptr)
    a_rows = image * stride_an + p * stride_ah + q * stride_aw
    g_rows = image * stride_gn + p * stride_gh + q * stride_gw
    v_rows = image * stride_vn + p * stride_vh + q * stride_vw
    through_n_sum = tl.zeros((BLOCK_M, BLOCK_G), dtype=tl.float32)
    through_b_sum = tl.zeros((BLOCK_M, BLOCK_G), dtype=tl.float32)
    for j in range(OUTPUTS):  # unrolled, four outputs of a general B spilled 320 bytes a thread
        channel = group * OUTPUTS + j
        g = tl.load(dy_ptr + (g_rows[:, None] + (channel * stride_gc)[None, :]), mask=mask, other=0.0)
        v = tl.load(v_ptr + (v_rows[:, None] + (channel * stride_vc)[None, :]), mask=mask, other=0.0)
        da, through_n, through_b = bcos_gradient(
            g.to(tl.float32), v.to(tl.float32), n, b, B_MODE, FROM_OUTPUT, DETACH
        )
        tl.store(da_ptr + (a_rows[:, None] + (channel * stride_ac)[None, :]), da, mask=mask)
        through_n_sum += through_n
        through_b_sum += through_b
    if q_ptr is not None:
        tl.store(q_ptr + n_offsets, -(through_n_sum / n) / n, mask=mask)
    if db_ptr is not None:
        share = tl.sum(tl.sum(tl.where(mask, through_b_sum, 0.0), axis=1), axis=0)
        tl.store(db_ptr + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)), share)


@triton.jit
def conv2d_small_groups_batch_norm_backward_da_kernel(
    da_ptr, q_ptr, dresidual_ptr,
    dz_ptr, y_ptr, z_ptr, n_ptr, var_ptr, norm_w_ptr, norm_b_ptr, mean_ptr, slope_ptr,
    M, groups, L,
    stride_an, stride_ac, stride_al, stride_gn, stride_gc, stride_gl, stride_nn, stride_nc, stride_nl,
    eps,
    OUTPUTS: tl.constexpr, RELU: tl.constexpr, DETACH: tl.constexpr,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Math: step 2 of conv2d_batch_norm.py from y; dresidual = g.

    Shapes: as conv2d_batch_norm_backward_da_kernel, n and q (·, groups, L) of one stride. Grid: (blocks of BLOCK_M
    windows, blocks of BLOCK_G groups), a group's outputs one after the other. Numerics: float32, da rounded once.
    Traffic: reads dz, y, z and n once, writes da, dresidual and q.
    """
    rows = widen(tl.program_id(0), INDEX64) * BLOCK_M + tl.arange(0, BLOCK_M)
    image, pixel = rows // L, rows % L
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    group_mask = group < groups
    mask = (rows < M)[:, None] & group_mask[None, :]
    n_rows = image * stride_nn + pixel * stride_nl
    n_offsets = n_rows[:, None] + (widen(group, INDEX64) * stride_nc)[None, :]
    n = tl.load(n_ptr + n_offsets, mask=mask, other=1.0)
    a_rows = image * stride_an + pixel * stride_al
    g_rows = image * stride_gn + pixel * stride_gl
    through_n_sum = tl.zeros((BLOCK_M, BLOCK_G), dtype=tl.float32)
    for j in range(OUTPUTS):
        channels = group * OUTPUTS + j
        c = widen(channels, INDEX64)[None, :]
        offsets = a_rows[:, None] + c * stride_ac
        g = tl.load(dz_ptr + (g_rows[:, None] + c * stride_gc), mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        scale = channel_scale(var_ptr, norm_w_ptr, channels, group_mask, eps)
        if RELU:
            dtype: tl.constexpr = y_ptr.dtype.element_ty
            g = pass_relu(g, y, z_ptr, offsets, mask, norm_b_ptr, scale, channels, group_mask, dtype)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offsets, g, mask=mask)
        g *= scale[None, :]
        if slope_ptr is not None:
            mean = tl.load(mean_ptr + channels, mask=group_mask, other=0.0)
            slope = tl.load(slope_ptr + channels, mask=group_mask, other=0.0)
            g -= (y - mean[None, :]) * slope[None, :]
        da, through_n, _ = bcos_gradient(g, y, n, 2.0, 2, True, DETACH)
        tl.store(da_ptr + offsets, da, mask=mask)
        through_n_sum += through_n
    if q_ptr is not None:
        tl.store(q_ptr + n_offsets, -(through_n_sum / n) / n, mask=mask)


@triton.jit
def conv2d_small_groups_backward_dx_kernel(
    dx_ptr,
    da_ptr, index_ptr, x_ptr, w_ptr, rnorm_ptr, q_ptr,
    images, channels, H, W, P, Q,
    stride_dn, stride_dc, stride_dh, stride_dw,
    stride_an, stride_ac, stride_ah, stride_aw,
    stride_in, stride_ic, stride_ih, stride_iw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wu, stride_wc, stride_wr, stride_ws,
    stride_qn, stride_qc, stride_qh, stride_qw,
    step_h, step_w, pad_h, pad_w, dil_h, dil_w, tap_step_h, tap_step_w,
    R: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr, UNITS: tl.constexpr, MAX_OUT: tl.constexpr,
    UNIT_STEP: tl.constexpr, INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Math: dx[h, w, c] = Σ_{r,s,u} da[p, q, u] ŵ[u, c, r, s] + x[h, w, c] · Σ_{r,s} q[p, q],  p·step_h − pad_h +
    r·dil_h = h, u the UNITS units of c's group.

    Shapes: dx, x (images, channels, H, W), da, index (images, ·, P, Q), w (·, CHANNELS, R, S), q (images, groups, P,
    Q) float32, any strides; rnorm (units,) float32. index, rnorm and q may be None.
    Grid: (tiles of BLOCK_M pixels, of BLOCK_C channels, step_h·step_w); pixels of a program share their residue modulo
    the stride, as in conv2d_backward_dx_kernel. Numerics: float32, dx rounded once.
    Traffic: reads da and q (each tap, from L1/L2), w and x, writes dx; 2·R·S·UNITS FLOPs an element.
    """
    residue_h = tl.program_id(2) // step_w
    residue_w = tl.program_id(2) % step_w
    rows_h = tl.cdiv(H - residue_h, step_h)
    rows_w = tl.cdiv(W - residue_w, step_w)
    M = widen(rows_h, INDEX64) * rows_w * images
    rows = widen(tl.program_id(0), INDEX64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    image, i, j = window_of_row(rows, tl.maximum(rows_h, 1), tl.maximum(rows_w, 1))
    h = residue_h + i * step_h
    w = residue_w + j * step_w
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = c < channels
    group = c // CHANNELS
    of_group = c % CHANNELS

    r0 = first_tap(residue_h, pad_h, dil_h, step_h, R, UNIT_STEP)
    s0 = first_tap(residue_w, pad_w, dil_w, step_w, S, UNIT_STEP)
    taps_h = tl.cdiv(R - r0, tap_step_h)
    taps_w = tl.cdiv(S - s0, tap_step_w)
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    under = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for tap in range(0, taps_h * taps_w):
        r = r0 + tap // taps_w * tap_step_h
        s = s0 + tap % taps_w * tap_step_w
        # exact divisions: every pixel of the program is reached by this tap
        p = (h + pad_h - r * dil_h) // step_h
        q = (w + pad_w - s * dil_w) // step_w
        inside = row_mask & (h + pad_h >= r * dil_h) & (p < P) & (w + pad_w >= s * dil_w) & (q < Q)
        mask = inside[:, None] & c_mask[None, :]
        a_rows = image * stride_an + p * stride_ah + q * stride_aw
        for u in range(UNITS):
            unit = group * UNITS + u
            output = widen(group * (UNITS // MAX_OUT) + u // MAX_OUT, INDEX64)
            da = tl.load(da_ptr + (a_rows[:, None] + (output * stride_ac)[None, :]), mask=mask, other=0.0)
            if MAX_OUT > 1:
                i_rows = image * stride_in + p * stride_ih + q * stride_iw
                index = tl.load(index_ptr + (i_rows[:, None] + (output * stride_ic)[None, :]), mask=mask, other=0)
                da = tl.where(index.to(tl.int32) == u % MAX_OUT, da, 0.0)
            w_offsets = widen(unit, INDEX64) * stride_wu + of_group * stride_wc + (r * stride_wr + s * stride_ws)
            weight = tl.load(w_ptr + w_offsets, mask=c_mask, other=0.0).to(tl.float32)
            if rnorm_ptr is not None:
                weight *= tl.load(rnorm_ptr + unit, mask=c_mask, other=0.0)
            total += da.to(tl.float32) * weight[None, :]
        if q_ptr is not None:
            q_rows = image * stride_qn + p * stride_qh + q * stride_qw
            q_columns = widen(group, INDEX64) * stride_qc
            under += tl.load(q_ptr + (q_rows[:, None] + q_columns[None, :]), mask=mask, other=0.0)

    mask = row_mask[:, None] & c_mask[None, :]
    c = widen(c, INDEX64)
    if q_ptr is not None:
        x_rows = image * stride_xn + h * stride_xh + w * stride_xw
        x = tl.load(x_ptr + (x_rows[:, None] + (c * stride_xc)[None, :]), mask=mask, other=0.0)
        total += x.to(tl.float32) * under
    d_rows = image * stride_dn + h * stride_dh + w * stride_dw
    tl.store(dx_ptr + (d_rows[:, None] + (c * stride_dc)[None, :]), total, mask=mask)


@triton.jit
def conv2d_small_groups_backward_dw_kernel(
    partial_ptr, dbias_ptr,
    da_ptr, index_ptr, x_ptr,
    M, units, H, W, P, Q, chunk,
    stride_an, stride_ac, stride_ah, stride_aw,
    stride_in, stride_ic, stride_ih, stride_iw,
    stride_xn, stride_xc, stride_xh, stride_xw,
    step_h, step_w, pad_h, pad_w, dil_h, dil_w,
    R: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr, UNITS: tl.constexpr, MAX_OUT: tl.constexpr,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Math: partial_s[u, (r, s, c)] = Σ da[p, q, u] x[h, w, c] and dbias_s[u] = Σ da[p, q, u] over the windows of
    split s.

    Shapes: da, index (·, units/MAX_OUT, P, Q) and x (·, ·, H, W) any strides; partial (splits, units, R·S·CHANNELS) and
    dbias (splits, units) float32 contiguous; index and dbias may be None; M = windows.
    Grid: (blocks of BLOCK_C weights of one tap, u and c; blocks of BLOCK_T taps; splits of chunk windows), BLOCK_M
    windows at a time, each with sums of its own, which are added at the end: no reduction in the loop.
    Numerics: float32. Traffic: reads da and x (each tap, from L1), writes partial.
    """
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_mask = column < units * CHANNELS
    unit = column // CHANNELS
    of_group = column % CHANNELS
    c = widen(unit // UNITS * CHANNELS + of_group, INDEX64)
    output = widen(unit // MAX_OUT, INDEX64)
    tap = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    tap_h = tap // S * dil_h - pad_h
    tap_w = tap % S * dil_w - pad_w

    total = tl.zeros((BLOCK_M, BLOCK_T, BLOCK_C), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    first = widen(tl.program_id(2), INDEX64) * chunk
    for start in range(0, chunk, BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        row_mask = rows < M
        image, p, q = window_of_row(rows, P, Q)
        mask = row_mask[:, None] & column_mask[None, :]
        a_rows = image * stride_an + p * stride_ah + q * stride_aw
        da = tl.load(da_ptr + (a_rows[:, None] + (output * stride_ac)[None, :]), mask=mask, other=0.0).to(tl.float32)
        if MAX_OUT > 1:
            i_rows = image * stride_in + p * stride_ih + q * stride_iw
            index = tl.load(index_ptr + (i_rows[:, None] + (output * stride_ic)[None, :]), mask=mask, other=0)
            da = tl.where(index.to(tl.int32) == (unit % MAX_OUT)[None, :], da, 0.0)
        h = (p * step_h)[:, None] + tap_h[None, :]
        w = (q * step_w)[:, None] + tap_w[None, :]
        inside = row_mask[:, None] & (h >= 0) & (h < H) & (w >= 0) & (w < W) & (tap < R * S)[None, :]
        x_pixels = (image * stride_xn)[:, None] + h * stride_xh + w * stride_xw
        x_offsets = x_pixels[:, :, None] + (c * stride_xc)[None, None, :]
        x = tl.load(x_ptr + x_offsets, mask=inside[:, :, None] & column_mask[None, None, :], other=0.0)
        total += x.to(tl.float32) * da[:, None, :]
        if dbias_ptr is not None:
            dbias += da
    slot = widen(tl.program_id(2), INDEX64) * units + unit
    mask = (tap < R * S)[:, None] & column_mask[None, :]
    offsets = slot[None, :] * (R * S * CHANNELS) + tap[:, None] * CHANNELS + of_group[None, :]
    tl.store(partial_ptr + offsets, tl.sum(total, axis=0), mask=mask)
    if dbias_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(dbias_ptr + slot, tl.sum(dbias, axis=0), mask=column_mask & (of_group == 0))


# Launchers -----------------------------------------------------------------------------------------------------------


def launch_da(da, dy, v, n, b, b_tensor, mode, from_output, detach, need_q, need_db) -> tuple[Tensor | None, ...]:
    """Fill da; returns (q in n's strides, db), None where not needed."""
    images, channels, out_h, out_w = da.shape
    groups, rows = n.shape[1], images * out_h * out_w
    block_m, block_g = tile_for(dy, groups, DA_ELEMENTS, COLUMNS)
    programs = (triton.cdiv(rows, block_m), triton.cdiv(groups, block_g))
    q = torch.empty_like(n) if need_q else None
    partial = da.new_empty((math.prod(programs),), dtype=torch.float32) if need_db else None
    conv2d_small_groups_backward_da_kernel[programs](
        da, q, partial,
        dy, v, n, b_tensor,
        rows, groups, out_h, out_w,
        *da.stride(), *dy.stride(), *v.stride(), *n.stride(),
        float(b),
        OUTPUTS=channels // groups, B_MODE=mode, FROM_OUTPUT=from_output, DETACH=detach,
        INDEX64=index64(dy, v, da, n), BLOCK_M=block_m, BLOCK_G=block_g, num_warps=4,
    )  # fmt: skip
    return q, None if partial is None else sum_of(partial)


def launch_batch_norm_da(
    da3, q, dresidual3, dz3, y3, z3, n, var, gamma, delta, mean, slope, eps, relu, detach
) -> None:  # fmt: skip
    """Fill da (N, C, L), q where it is not None, and dresidual where it is not; n and q in one layout, dense."""
    images, channels, pixels = da3.shape
    n3, q3, groups, rows = as_rows(n), as_rows(q), n.shape[1], images * pixels
    block_m, block_g = tile_for(y3, groups, DA_ELEMENTS, COLUMNS)
    conv2d_small_groups_batch_norm_backward_da_kernel[(triton.cdiv(rows, block_m), triton.cdiv(groups, block_g))](
        da3, q3, dresidual3,
        dz3, y3, z3, n3, var, gamma, delta, mean, slope,
        rows, groups, pixels,
        *da3.stride(), *dz3.stride(), *n3.stride(),
        float(eps),
        OUTPUTS=channels // groups, RELU=relu, DETACH=detach,
        INDEX64=index64(da3, dz3, n3), BLOCK_M=block_m, BLOCK_G=block_g, num_warps=4,
    )  # fmt: skip


def launch_dx(dx, da, q, index, x, weight, rnorm, stride, padding, dilation, groups, max_out) -> None:
    units, of_group, r, s = weight.shape
    images, channels, height, width = x.shape
    block_m, block_c = tile_for(dx, channels, DX_ELEMENTS, COLUMNS)
    pixels = images * triton.cdiv(height, stride[0]) * triton.cdiv(width, stride[1])
    grid = (triton.cdiv(pixels, block_m), triton.cdiv(channels, block_c), stride[0] * stride[1])
    conv2d_small_groups_backward_dx_kernel[grid](
        dx,
        da, index, x, weight, rnorm, q,
        images, channels, height, width, *da.shape[2:],
        *dx.stride(), *da.stride(), *strides_of(index), *x.stride(), *weight.stride(), *strides_of(q),
        *stride, *padding, *dilation, *(stride[i] // math.gcd(stride[i], dilation[i]) for i in (0, 1)),
        R=r, S=s, CHANNELS=of_group, UNITS=units // groups, MAX_OUT=max_out,
        UNIT_STEP=stride[0] == stride[1] == 1, INDEX64=index64(dx, da, index, x, weight, q),
        BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip


def dw_tile(taps: int, columns: int) -> tuple[int, int, int]:
    """(windows at a time, taps, weights of a tap) of a program of ∂L/∂w."""
    block_t = min(triton.next_power_of_2(taps), TAPS)
    block_c = min(triton.next_power_of_2(columns), 32 if block_t > 16 else 64)
    return max(1, min(DW_ELEMENTS // (block_t * block_c), 16)), block_t, block_c


def dw_splits(rows: int, tiles: int, block_m: int) -> tuple[int, int]:
    """(windows of a split, number of splits); more splits than `DW_LAST` are a multiple of it."""
    splits = max(1, min(DW_PROGRAMS // max(tiles, 1), triton.cdiv(rows, 8 * block_m), DW_SPLITS))
    if splits > DW_LAST:
        splits = splits // DW_LAST * DW_LAST
    return triton.cdiv(triton.cdiv(rows, splits), block_m) * block_m, splits


def launch_dw(
    dw, da, index, x, weight, bias, rnorm, stride, padding, dilation, groups, max_out, need_dbias
) -> Tensor | None:
    """Fill dw; returns dbias or None."""
    units, of_group, r, s = weight.shape
    images, _, out_h, out_w = da.shape
    rows = images * out_h * out_w
    block_m, block_t, block_c = dw_tile(r * s, units * of_group)
    tiles = (triton.cdiv(units * of_group, block_c), triton.cdiv(r * s, block_t))
    chunk, splits = dw_splits(rows, math.prod(tiles), block_m)
    partial = x.new_empty((splits, units, r * s * of_group), dtype=torch.float32)
    dbias_partial = x.new_empty((splits, units), dtype=torch.float32) if need_dbias else None
    conv2d_small_groups_backward_dw_kernel[(*tiles, splits)](
        partial, dbias_partial,
        da, index, x,
        rows, units, *x.shape[2:], out_h, out_w, chunk,
        *da.stride(), *strides_of(index), *x.stride(),
        *stride, *padding, *dilation,
        R=r, S=s, CHANNELS=of_group, UNITS=units // groups, MAX_OUT=max_out,
        INDEX64=index64(da, index, x, partial),
        BLOCK_M=block_m, BLOCK_T=block_t, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return finish_weight_gradient(_fewer(partial), _fewer(dbias_partial), weight, bias, rnorm, dw)


def _fewer(partial: Tensor | None) -> Tensor | None:
    """At most `DW_LAST` splits: what sums them over a weight's rows has few programs. Every DW_LAST-th is added."""
    if partial is None or partial.shape[0] <= DW_LAST:
        return partial
    shares = partial.view(-1, DW_LAST * partial[0].numel())
    out = shares.new_empty((shares.shape[1],))
    sum_shares(out, shares)
    return out.view(DW_LAST, *partial.shape[1:])
