"""B-cos linear layer in Triton: x (M, K), weight (N·max_out, K), y (M, N).

Forward (one kernel; the norm comes from the tiles that the product loads anyway):

    a_mo = max over the units u of output o of ŵ_u·x_m + β_u,   ŵ_u = w_u/‖w_u‖ or w_u
    n_m  = ‖x_m‖ + 1e-12
    y    = a (B = 1),  a·|a|/n (B = 2),  a·(|a|/n + 1e-6)^(B−1) (else)

Backward, g = ∂L/∂y, from y and n (B = 2) or a and n (general B, float16):

    1  ∂L/∂a and q_m = (∂L/∂n_m)/‖x_m‖ in one pass over g and y (or a); ∂L/∂B beside them
    2  dx = ∂L/∂a · ŵ + x ⊙ q, the second term in the epilogue
    3  dŵ = (∂L/∂a)ᵀ · x in splits of M that are added in a fixed order, then through the weight norm; dβ beside it

∂L/∂a lies per output; with max_out the loads of 2 and 3 spread it to the winning units. A GELU may follow the scaling
(epilogue.py); its gradient is taken in 1. Convolutions with windows of one pixel run here too, with their own norm.
Where the device copies tiles by descriptors and the operands allow it, descriptors.py has the products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import descriptors
from .bcos_math import (
    ONE,
    TWO,
    accumulate,
    b_mode,
    bcos_gradient,
    check_dtype,
    contiguous,
    exponent_of,
    index64,
    keeps_pre_scale,
    matmul_precision,
    members_of,
    norm_of,
    on_device,
    present,
    shares_of,
    sum_of,
    sum_shares,
    tile_of,
    units_of_tile,
    widen,
)
from .configs import config_for, reduced, shortened
from .epilogue import NOTHING, finish_tile, gelu_slope
from .weights import finish_weight_gradient, reciprocal_norms, split_rows

GROUP_M = 8


@triton.jit
def linear_forward_kernel(
    y_ptr, n_ptr, a_ptr, index_ptr, kept_ptr, emitted_ptr,
    x_ptr, w_ptr, bias_ptr, rnorm_ptr, b_ptr, squares_ptr, residual_ptr, var_ptr, norm_w_ptr, norm_b_ptr,
    M, N, K,
    stride_xm, stride_xk, stride_wu, stride_wk,
    b, eps,
    B_MODE: tl.constexpr, MAX_OUT: tl.constexpr, MEMBERS: tl.constexpr, WINDOW: tl.constexpr,
    RELU: tl.constexpr, GELU: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Math: y, n and where asked a, the winning unit and what epilogue.py tells of, as in the module's docstring.

    Shapes: x (M, K), w (N·MAX_OUT, K) any strides; y, a, index, kept, residual (M, N) contiguous; n, squares = Σ x²
    (M,) float32; emitted (tiles of N, M) float32; bias and rnorm = 1/‖w‖ (N·MAX_OUT,). All but x and w may be None.
    WINDOW: rows are windows of one pixel, with a convolution's norm. Grid: one program a tile of BLOCK_M rows × BLOCK_N
    units.
    Numerics: products, norm and scale in float32; what is stored is rounded once.
    Traffic: reads x and w, writes y and n; 2·M·N·MAX_OUT·K FLOPs, and without squares 2·BLOCK_M·K a program.
    """
    outputs: tl.constexpr = BLOCK_N // MEMBERS
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, outputs), GROUP_M)
    rows = widen(pid_m, INDEX64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    units, unit_mask = units_of_tile(pid_n, N, MAX_OUT, MEMBERS, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (rows[:, None] * stride_xm + ks[None, :] * stride_xk)
    w_ptrs = w_ptr + (widen(units, INDEX64)[None, :] * stride_wu + ks[:, None] * stride_wk)

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs, mask=row_mask[:, None] & (ks < K - start)[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=(ks < K - start)[:, None] & unit_mask[None, :], other=0.0)
        total = accumulate(x, w, total, PRECISION)
        if B_MODE != 1:
            if squares_ptr is None:
                x32 = x.to(tl.float32)
                squares += tl.sum(x32 * x32, axis=1)
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk

    if squares_ptr is not None:
        squares = tl.load(squares_ptr + rows, mask=row_mask, other=0.0)
    n = norm_of(squares, WINDOW)
    if n_ptr is not None:
        if pid_n == 0:
            tl.store(n_ptr + rows, n, mask=row_mask)
    columns = pid_n * outputs + tl.arange(0, outputs)
    finish_tile(
        y_ptr, a_ptr, index_ptr, kept_ptr, emitted_ptr,
        bias_ptr, rnorm_ptr, b_ptr, residual_ptr, var_ptr, norm_w_ptr, norm_b_ptr,
        total, n[:, None], units, unit_mask, rows, row_mask, rows * N, columns, columns < N, pid_n,
        M, 1,
        b, eps,
        B_MODE, MAX_OUT, MEMBERS, RELU, GELU, SLOPE, INDEX64, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def linear_backward_da_kernel(
    da_ptr, q_ptr, db_ptr,
    dy_ptr, v_ptr, n_ptr, b_ptr,
    M, N,
    stride_gm, stride_gn, stride_vm, stride_vn,
    b,
    B_MODE: tl.constexpr, FROM_OUTPUT: tl.constexpr, DETACH: tl.constexpr, GELU: tl.constexpr,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Math: da = ∂L/∂a; q = (∂L/∂n)/‖x‖ with ‖x‖ = n − 1e-12, 0 where it is 0; db = this program's share of ∂L/∂B. With
    GELU, v = y and dy is the gradient behind it: ∂L/∂y = dy·(Φ(y) + y·φ(y)).

    Shapes: dy, v (M, N) any strides, v = y if FROM_OUTPUT else a; n, q (M,) float32; da (M, N) contiguous; db
    (programs,) float32. q and db may be None. Grid: one program BLOCK_M whole rows, so that the sum over outputs needs
    no atomics.
    Numerics: float32. Traffic: reads dy and v once, writes da once.
    """
    rows = widen(tl.program_id(0), INDEX64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    n = tl.load(n_ptr + rows, mask=row_mask, other=1.0)
    b = exponent_of(b, b_ptr)
    through_n_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    through_b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        columns = widen(start + tl.arange(0, BLOCK_N), INDEX64)
        mask = row_mask[:, None] & (columns < N)[None, :]
        g = tl.load(dy_ptr + (rows[:, None] * stride_gm + columns[None, :] * stride_gn), mask=mask, other=0.0)
        v = tl.load(v_ptr + (rows[:, None] * stride_vm + columns[None, :] * stride_vn), mask=mask, other=0.0)
        g, v = g.to(tl.float32), v.to(tl.float32)
        if GELU:
            g *= gelu_slope(v, DETACH)
        da, through_n, through_b = bcos_gradient(g, v, n[:, None], b, B_MODE, FROM_OUTPUT, DETACH)
        tl.store(da_ptr + (rows[:, None] * N + columns[None, :]), da, mask=mask)
        if q_ptr is not None:
            through_n_sum += tl.sum(through_n, axis=1)
        if db_ptr is not None:
            through_b_sum += tl.sum(through_b, axis=1)
    if q_ptr is not None:
        norm = n - 1e-12
        q = -(through_n_sum / n) / tl.where(norm == 0, 1.0, norm)
        tl.store(q_ptr + rows, tl.where(norm == 0, 0.0, q), mask=row_mask)
    if db_ptr is not None:
        tl.store(db_ptr + tl.program_id(0), tl.sum(through_b_sum, axis=0))


@triton.jit
def linear_backward_dx_kernel(
    dx_ptr,
    da_ptr, index_ptr, x_ptr, w_ptr, rnorm_ptr, q_ptr,
    M, N, K,
    stride_am, stride_an, stride_xm, stride_xk, stride_wu, stride_wk,
    MAX_OUT: tl.constexpr, PRECISION: tl.constexpr,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Math: dx = da · ŵ + x ⊙ q.

    Shapes: da (M, N) and x (M, K), w (N·MAX_OUT, K) any strides; index (M, N) uint8 contiguous; rnorm (N·MAX_OUT,) and
    q (M,) float32; dx (M, K) contiguous. index, rnorm and q may be None. Grid: one program a tile of BLOCK_M rows ×
    BLOCK_N input features, reduced over the units, BLOCK_K at a time. Numerics: float32, dx rounded once.
    Traffic: reads da, w and x, writes dx; 2·M·N·MAX_OUT·K FLOPs.
    """
    pid_m, pid_k = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    rows = widen(pid_m, INDEX64) * BLOCK_M + tl.arange(0, BLOCK_M)
    features = widen(pid_k * BLOCK_N + tl.arange(0, BLOCK_N), INDEX64)
    row_mask = rows < M
    feature_mask = features < K
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, N * MAX_OUT, BLOCK_K):
        units = start + tl.arange(0, BLOCK_K)
        unit_mask = units < N * MAX_OUT
        outputs = widen(units // MAX_OUT, INDEX64)
        mask = row_mask[:, None] & unit_mask[None, :]
        da = tl.load(da_ptr + (rows[:, None] * stride_am + outputs[None, :] * stride_an), mask=mask, other=0.0)
        if MAX_OUT > 1:
            index = tl.load(index_ptr + (rows[:, None] * N + outputs[None, :]), mask=mask, other=0)
            da = tl.where(index.to(tl.int32) == (units % MAX_OUT)[None, :], da, 0.0)
        w_offsets = widen(units, INDEX64)[:, None] * stride_wu + features[None, :] * stride_wk
        w = tl.load(w_ptr + w_offsets, mask=unit_mask[:, None] & feature_mask[None, :], other=0.0)
        if rnorm_ptr is not None:
            rnorm = tl.load(rnorm_ptr + units, mask=unit_mask, other=0.0)
            w = (w.to(tl.float32) * rnorm[:, None]).to(w_ptr.dtype.element_ty)
        total = accumulate(da.to(w_ptr.dtype.element_ty), w, total, PRECISION)
    mask = row_mask[:, None] & feature_mask[None, :]
    if q_ptr is not None:
        x = tl.load(x_ptr + (rows[:, None] * stride_xm + features[None, :] * stride_xk), mask=mask, other=0.0)
        total += x.to(tl.float32) * tl.load(q_ptr + rows, mask=row_mask, other=0.0)[:, None]
    tl.store(dx_ptr + (rows[:, None] * K + features[None, :]), total, mask=mask)


@triton.jit
def linear_backward_dw_kernel(
    partial_ptr, dbias_ptr,
    da_ptr, index_ptr, x_ptr,
    M, N, K, chunk,
    stride_am, stride_an, stride_xm, stride_xk,
    MAX_OUT: tl.constexpr, PRECISION: tl.constexpr,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Math: partial_s = daᵀ · x and dbias_s = Σ da over the rows of split s.

    Shapes: da (M, N) and x (M, K) any strides; index (M, N) uint8 contiguous or None; partial (splits, N·MAX_OUT, K)
    and dbias (splits, N·MAX_OUT) or None, float32. Grid: (tiles of BLOCK_M units × BLOCK_N features, splits of chunk
    rows), BLOCK_K rows at a time. Numerics: float32. Traffic: reads da and x, writes partial; 2·M·N·MAX_OUT·K FLOPs.
    """
    all_units = N * MAX_OUT
    tiles_k = tl.maximum(tl.cdiv(K, BLOCK_N), 1)  # a layer without inputs still has a bias
    pid_u, pid_k = tile_of(tl.program_id(0), tl.cdiv(all_units, BLOCK_M), tiles_k, GROUP_M)
    split = widen(tl.program_id(1), INDEX64)
    units = pid_u * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = widen(units // MAX_OUT, INDEX64)
    features = widen(pid_k * BLOCK_N + tl.arange(0, BLOCK_N), INDEX64)
    unit_mask = units < all_units
    feature_mask = features < K
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_M,), dtype=tl.float32)
    first = split * chunk
    for start in range(0, chunk, BLOCK_K):
        rows = first + start + tl.arange(0, BLOCK_K)
        row_mask = rows < M
        mask = unit_mask[:, None] & row_mask[None, :]
        da = tl.load(da_ptr + (rows[None, :] * stride_am + outputs[:, None] * stride_an), mask=mask, other=0.0)
        if MAX_OUT > 1:
            index = tl.load(index_ptr + (rows[None, :] * N + outputs[:, None]), mask=mask, other=0)
            da = tl.where(index.to(tl.int32) == (units % MAX_OUT)[:, None], da, 0.0)
        x_offsets = rows[:, None] * stride_xm + features[None, :] * stride_xk
        x = tl.load(x_ptr + x_offsets, mask=row_mask[:, None] & feature_mask[None, :], other=0.0)
        total = accumulate(da.to(x_ptr.dtype.element_ty), x, total, PRECISION)
        if dbias_ptr is not None:
            dbias += tl.sum(da.to(tl.float32), axis=1)
    slot = split * all_units + units
    mask = unit_mask[:, None] & feature_mask[None, :]
    tl.store(partial_ptr + (widen(slot, INDEX64)[:, None] * K + features[None, :]), total, mask=mask)
    if dbias_ptr is not None:
        if pid_k == 0:
            tl.store(dbias_ptr + slot, dbias, mask=unit_mask)


# Launchers -----------------------------------------------------------------------------------------------------------


def _as_convolution(matrix: Tensor) -> Tensor:
    """(U, K) as the (U, K, 1, 1) that the weight kernels take."""
    return matrix[:, :, None, None]


def launch_forward(
    x, weight, bias, rnorm, b, b_tensor, max_out, squares, precision, window, y, n, a, index, epilogue=NOTHING
) -> None:  # fmt: skip
    """Launch the forward kernel for the outputs that are not None; ``window``: rows are windows of one pixel."""
    rows, outputs = x.shape[0], weight.shape[0] // max_out
    with on_device(x):
        config = descriptors.config_of(rows, outputs, x.shape[1], x, weight) if max_out == 1 else None
        if config:
            descriptors.forward(x, weight, bias, rnorm, b, b_tensor, squares, window, y, n, a, epilogue, config)
            return
    members = members_of(max_out)
    int64 = index64(x, weight, y, a)
    # with a GELU the larger tiles spill 16 bytes a thread on sm_100
    short = epilogue.slope or (epilogue.gelu and descriptors.architecture() >= 100)
    config = shortened(config_for(rows, outputs * members, x.shape[1], x.dtype), short)
    config = reduced(config, members)
    tiles_n = triton.cdiv(outputs, config.block_n // members)
    emitted = shares_of(epilogue.squares, tiles_n)
    with on_device(x):
        linear_forward_kernel[(triton.cdiv(rows, config.block_m) * tiles_n,)](
            y, n, a, index, epilogue.kept, emitted,
            x, weight, contiguous(bias), rnorm, b_tensor, squares, *epilogue.inputs,
            rows, outputs, x.shape[1],
            *x.stride(), *weight.stride(),
            float(b), epilogue.eps,
            B_MODE=b_mode(b, b_tensor), MAX_OUT=max_out, MEMBERS=members, WINDOW=window, **epilogue.flags,
            PRECISION=precision,
            INDEX64=int64,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=GROUP_M,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        sum_shares(epilogue.squares, emitted)


def _reciprocal_norms(weight: Tensor) -> Tensor:
    with on_device(weight):
        return reciprocal_norms(_as_convolution(weight))


def forward(x, weight, bias, b, b_tensor, normalize_weight, max_out, keep, squares, y, n, epilogue=NOTHING):
    """Fill y and n; returns a and index, what is not kept being empty."""
    mode = b_mode(b, b_tensor)
    shape = (x.shape[0], weight.shape[0] // max_out)
    a = x.new_empty(shape if keep and keeps_pre_scale(x, mode) else (0,))
    index = x.new_empty(shape if keep and max_out > 1 else (0,), dtype=torch.uint8)
    if x.shape[0]:
        rnorm = _reciprocal_norms(weight) if normalize_weight else None
        launch_forward(
            x, weight, bias, rnorm, b, b_tensor, max_out, contiguous(squares) if mode != ONE else None,
            matmul_precision(), False, y, present(n), present(a), present(index), epilogue,
        )  # fmt: skip
    return a, index


def linear_forward(x, weight, bias, b, b_tensor, normalize_weight, max_out, keep, squares=None):
    """B-cos linear layer: x (M, K), weight (N·max_out, K) → (y, n, a, index), what is not kept being empty.

    y (M, N) of x's dtype; n (M,) float32, the norms (empty for B = 1); a (M, N), the pre-scale output, if keep and the
    backward needs it; index (M, N) uint8, the winning unit, if keep and max_out > 1. squares (M,) float32: Σ x² of each
    row where known, from which the norms are then taken.
    Raises NotImplementedError for a dtype other than float32, bfloat16, float16.
    """
    check_dtype("linear", x)
    y = x.new_empty((x.shape[0], weight.shape[0] // max_out))
    n = x.new_empty((0 if b_mode(b, b_tensor) == ONE else x.shape[0],), dtype=torch.float32)
    return y, n, *forward(x, weight, bias, b, b_tensor, normalize_weight, max_out, keep, squares, y, n)


def _launch_backward_da(dy, v, n, b, b_tensor, from_output, detach, gelu, need_q, need_db):
    """(∂L/∂a, q or None, ∂L/∂B or None) in one pass."""
    rows, outputs = dy.shape
    block_m, block_n = 16, 64
    programs = triton.cdiv(rows, block_m)
    da = v.new_empty((rows, outputs))
    q = v.new_empty((rows,), dtype=torch.float32) if need_q and not detach else None
    partial = v.new_empty((programs,), dtype=torch.float32) if need_db and not detach else None
    linear_backward_da_kernel[(programs,)](
        da, q, partial,
        dy, v, n, b_tensor,
        rows, outputs,
        *dy.stride(), *v.stride(),
        float(b),
        B_MODE=b_mode(b, b_tensor), FROM_OUTPUT=from_output, DETACH=detach, GELU=gelu,
        INDEX64=index64(dy, v, da), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return da, q, None if partial is None else sum_of(partial)


def launch_backward_dx(dx, da, index, x, weight, rnorm, q, max_out, precision) -> None:
    """dx (M, K) = da · ŵ + x ⊙ q, da (M, N)."""
    (rows, outputs), inputs = da.shape, x.shape[1]
    if not inputs:
        return
    config = descriptors.config_of(rows, inputs, outputs, da, weight) if max_out == 1 else None
    if config:
        descriptors.backward_dx(dx, da, x, weight, rnorm, q, config)
        return
    config = config_for(rows, inputs, weight.shape[0], x.dtype)
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(inputs, config.block_n)
    linear_backward_dx_kernel[(tiles,)](
        dx,
        da, index, x, weight, rnorm, q,
        rows, outputs, inputs,
        *da.stride(), *x.stride(), *weight.stride(),
        MAX_OUT=max_out, PRECISION=precision,
        INDEX64=index64(da, x, weight, dx),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=GROUP_M,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def launch_backward_dw(dw, da, index, x, weight, bias, rnorm, max_out, need_dbias, precision) -> Tensor | None:
    """dw (U, K) from da (M, N) and x (M, K); returns dbias where needed."""
    (rows, outputs), (units, inputs) = da.shape, weight.shape
    config = descriptors.config_of(units, inputs, rows, da, x) if max_out == 1 else None
    if config:
        partial, dbias_partial = descriptors.backward_dw(da, x, need_dbias, config)
    else:
        config = config_for(units, inputs, rows, x.dtype)
        tiles = triton.cdiv(units, config.block_m) * max(triton.cdiv(inputs, config.block_n), 1)
        chunk, splits = split_rows(rows, tiles, config.block_k)
        partial = x.new_empty((splits, units, inputs), dtype=torch.float32)
        dbias_partial = x.new_empty((splits, units), dtype=torch.float32) if need_dbias else None
        linear_backward_dw_kernel[(tiles, splits)](
            partial, dbias_partial,
            da, index, x,
            rows, outputs, inputs, chunk,
            *da.stride(), *x.stride(),
            MAX_OUT=max_out, PRECISION=precision,
            INDEX64=index64(da, x, partial),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=GROUP_M,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return finish_weight_gradient(partial, dbias_partial, _as_convolution(weight), bias, rnorm, _as_convolution(dw))


def backward(
    dy, x, weight, bias, b, b_tensor, y, n, a, index, normalize_weight, max_out, detach, need_dx, need_dw, need_dbias,
    need_db, gelu=False,
):  # fmt: skip
    """As `linear_backward`; with ``gelu`` dy is the gradient behind a GELU."""
    mode = b_mode(b, b_tensor)
    rows, outputs = x.shape[0], weight.shape[0] // max_out
    if not (rows and outputs):  # no term in any sum
        return (
            x.new_zeros(x.shape) if need_dx else None,
            weight.new_zeros(weight.shape) if need_dw else None,
            bias.new_zeros(bias.shape) if need_dbias else None,
            x.new_zeros((), dtype=torch.float32) if need_db else None,
        )
    rnorm = _reciprocal_norms(weight) if normalize_weight else None
    index, a, n = present(index), present(a), present(n)
    precision = matmul_precision()

    # v: what ∂L/∂a is computed from. float16 outputs underflow where the gradient does not.
    from_output = a is None and mode == TWO and y is not None and x.dtype != torch.float16
    v = y if from_output else a
    if (mode != ONE and (v is None or n is None)) or (max_out > 1 and index is None):
        v = a = x.new_empty((rows, outputs)) if mode != ONE else None
        n = x.new_empty((rows,), dtype=torch.float32) if mode != ONE else None
        found = x.new_empty((rows, outputs), dtype=torch.uint8) if max_out > 1 else None
        launch_forward(x, weight, bias, rnorm, b, b_tensor, max_out, None, precision, False, None, n, a, found)
        index, from_output = found if index is None else index, False

    da, q, db = dy, None, None
    dx = dw = dbias = None
    with on_device(x):
        if mode != ONE:
            da, q, db = _launch_backward_da(dy, v, n, b, b_tensor, from_output, detach, gelu, need_dx, need_db)
        if need_db and db is None:
            db = x.new_zeros((), dtype=torch.float32)
        if need_dx:
            dx = x.new_empty(x.shape)
            launch_backward_dx(dx, da, index, x, weight, rnorm, q, max_out, precision)
        if need_dw or need_dbias:
            dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
            dbias = launch_backward_dw(dw, da, index, x, weight, bias, rnorm, max_out, need_dbias, precision)
    return dx, dw if need_dw else None, dbias, db


def linear_backward(
    dy, x, weight, bias, b, b_tensor, y, n, a, index, normalize_weight, max_out, detach, need_dx, need_dw, need_dbias,
    need_db,
):  # fmt: skip
    """Gradients (dx, dw, dbias, db) of `linear_forward`, None where not needed; db is a 0-dim float32 tensor.

    y, n, a, index as the forward gave them; with y None (or n empty) what is missing is recomputed from x and weight.
    """
    check_dtype("linear", x)
    return backward(
        dy, x, weight, bias, b, b_tensor, y, n, a, index, normalize_weight, max_out, detach, need_dx, need_dw,
        need_dbias, need_db,
    )  # fmt: skip
