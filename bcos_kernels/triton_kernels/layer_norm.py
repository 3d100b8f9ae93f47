"""Layer normalisation in Triton: rows of K features, y = (x − mean)·rstd·w + β, rstd = 1/√(var + eps).

Forward: mean, then the second moment about it, and what rounding has left of the mean, so that a mean far from zero
costs no digits; a row is read once where a program holds it whole. The pass also leaves Σ y² of each row where asked.
Backward, with g = w·∂L/∂y and x̂ = (x − mean)·rstd:

    dx = rstd·(g − mean of g − x̂·mean of g·x̂)       (the last term not in explanation mode)
    dw = Σ dy·x̂,   dβ = Σ dy                          over rows

One pass makes dx and each program's shares of dw and dβ, which are added in a fixed order. Rows too long for a
program's registers are walked in blocks, and dw and dβ are a pass of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bcos_math import check_dtype, contiguous, index64, on_device, present, sum_splits_kernel, widen

LONGEST = 4096  # features that a program holds whole
BLOCK = 2048  # elements of a tile, where a row has fewer
SUMMED_ROWS = 16  # rows of a tile of the sums of long rows
MAX_SPLITS = 256  # shares of dw and dβ, a constant, so that sums are the same everywhere


@triton.jit
def layer_norm_forward_kernel(
    y_ptr, mean_ptr, rstd_ptr, squares_ptr,
    x_ptr, w_ptr, bias_ptr,
    M, K,
    eps,
    WHOLE: tl.constexpr, INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Math: y = (x − mean)·rstd·w + β, and Σ y² of each row.

    Shapes: x, y (M, K) contiguous; w, bias (K,); mean, rstd, squares (M,) float32; w, bias and squares may be None.
    Grid: blocks of BLOCK_M rows, WHOLE with BLOCK_C ≥ K. Numerics: float32, moments in two passes, y rounded once,
    squares of the rounded. Traffic: reads x, writes y; longer rows read x three times, twice from a cache.
    """
    rows = widen(tl.program_id(0), INDEX64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    offsets = (rows * K)[:, None]
    if WHOLE:
        columns = tl.arange(0, BLOCK_C)
        mask = row_mask[:, None] & (columns < K)[None, :]
        x = tl.load(x_ptr + offsets + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(x, axis=1) / K
        centred = tl.where(mask, x - mean[:, None], 0.0)
        slip = tl.sum(centred, axis=1) / K
        centred = tl.where(mask, centred - slip[:, None], 0.0)
        rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / K + eps)
        squares = store_normalized(
            y_ptr + offsets + columns[None, :], w_ptr, bias_ptr, centred * rstd[:, None], columns, columns < K, mask
        )
    else:
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for start in range(0, K, BLOCK_C):
            columns = start + tl.arange(0, BLOCK_C)
            mask = row_mask[:, None] & (columns < K)[None, :]
            total += tl.sum(tl.load(x_ptr + offsets + columns[None, :], mask=mask, other=0.0).to(tl.float32), axis=1)
        mean = total / K
        left = tl.zeros((BLOCK_M,), dtype=tl.float32)
        moment = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for start in range(0, K, BLOCK_C):
            columns = start + tl.arange(0, BLOCK_C)
            mask = row_mask[:, None] & (columns < K)[None, :]
            x = tl.load(x_ptr + offsets + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            centred = tl.where(mask, x - mean[:, None], 0.0)
            left += tl.sum(centred, axis=1)
            moment += tl.sum(centred * centred, axis=1)
        slip = left / K
        var = moment / K - slip * slip
        rstd = 1 / tl.sqrt(tl.where(var < 0, 0.0, var) + eps)
        squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for start in range(0, K, BLOCK_C):
            columns = start + tl.arange(0, BLOCK_C)
            mask = row_mask[:, None] & (columns < K)[None, :]
            x = tl.load(x_ptr + offsets + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            x_hat = (x - mean[:, None] - slip[:, None]) * rstd[:, None]
            squares += store_normalized(
                y_ptr + offsets + columns[None, :], w_ptr, bias_ptr, x_hat, columns, columns < K, mask
            )
    tl.store(mean_ptr + rows, mean + slip, mask=row_mask)
    tl.store(rstd_ptr + rows, rstd, mask=row_mask)
    if squares_ptr is not None:
        tl.store(squares_ptr + rows, squares, mask=row_mask)


@triton.jit
def store_normalized(y_ptrs, w_ptr, bias_ptr, x_hat, columns, column_mask, mask):
    """Store x̂·w + β; returns Σ of squares of what was stored, by rows."""
    if w_ptr is not None:
        x_hat *= tl.load(w_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        x_hat += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptrs, x_hat, mask=mask)
    stored = tl.where(mask, x_hat.to(y_ptrs.dtype.element_ty).to(tl.float32), 0.0)
    return tl.sum(stored * stored, axis=1)


@triton.jit
def layer_norm_backward_kernel(
    dx_ptr, partial_ptr,
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr,
    M, K, chunk,
    DETACH: tl.constexpr, INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Math: dx, and Σ dy·x̂ and Σ dy over a chunk of rows.

    Shapes: dy, x, dx (M, K) contiguous; w (K,); mean, rstd (M,), partial (splits, 2, K) float32; w, and dx or partial,
    may be None. Grid: splits of chunk rows; BLOCK_C ≥ K. Numerics: float32. Traffic: reads dy and x, writes dx.
    """
    columns = tl.arange(0, BLOCK_C)
    column_mask = columns < K
    dw = tl.zeros((BLOCK_C,), dtype=tl.float32)
    db = tl.zeros((BLOCK_C,), dtype=tl.float32)
    first = widen(tl.program_id(0), INDEX64) * chunk
    for start in range(0, tl.minimum(chunk, M - first), BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        row_mask = rows < M
        mask = row_mask[:, None] & column_mask[None, :]
        offsets = (rows * K)[:, None] + columns[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=row_mask, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x_hat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        if partial_ptr is not None:
            dw += tl.sum(dy * x_hat, axis=0)
            db += tl.sum(dy, axis=0)
        if dx_ptr is not None:
            g = dy
            if w_ptr is not None:
                g *= tl.load(w_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
            dx = g - (tl.sum(g, axis=1) / K)[:, None]
            if not DETACH:
                dx -= x_hat * (tl.sum(g * x_hat, axis=1) / K)[:, None]
            tl.store(dx_ptr + offsets, dx * rstd[:, None], mask=mask)
    if partial_ptr is not None:
        share = partial_ptr + widen(tl.program_id(0), INDEX64) * 2 * K
        tl.store(share + columns, dw, mask=column_mask)
        tl.store(share + K + columns, db, mask=column_mask)


@triton.jit
def layer_norm_backward_dx_kernel(
    dx_ptr,
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr,
    M, K,
    DETACH: tl.constexpr, INDEX64: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Math: dx of one row, however long.

    Shapes: as `layer_norm_backward_kernel`. Grid: rows. Numerics: float32. Traffic: reads dy and x, the second time
    from a cache, writes dx.
    """
    row = widen(tl.program_id(0), INDEX64)
    mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
    of_one = tl.zeros((BLOCK_C,), dtype=tl.float32)
    of_x = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for start in range(0, K, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        mask = columns < K
        g = tl.load(dy_ptr + row * K + columns, mask=mask, other=0.0).to(tl.float32)
        if w_ptr is not None:
            g *= tl.load(w_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        of_one += g
        if not DETACH:
            x = tl.load(x_ptr + row * K + columns, mask=mask, other=0.0).to(tl.float32)
            of_x += g * (x - mean) * rstd
    mean_of_g, mean_of_gx = tl.sum(of_one, axis=0) / K, tl.sum(of_x, axis=0) / K
    for start in range(0, K, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        mask = columns < K
        g = tl.load(dy_ptr + row * K + columns, mask=mask, other=0.0).to(tl.float32)
        if w_ptr is not None:
            g *= tl.load(w_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        dx = g - mean_of_g
        if not DETACH:
            x = tl.load(x_ptr + row * K + columns, mask=mask, other=0.0).to(tl.float32)
            dx -= (x - mean) * rstd * mean_of_gx
        tl.store(dx_ptr + row * K + columns, dx * rstd, mask=mask)


@triton.jit
def layer_norm_backward_sums_kernel(
    partial_ptr,
    dy_ptr, x_ptr, mean_ptr, rstd_ptr,
    M, K, chunk,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Math: Σ dy·x̂ and Σ dy over a chunk of rows, of a block of features.

    Shapes: as `layer_norm_backward_kernel`. Grid: (blocks of BLOCK_C features, splits of chunk rows).
    Numerics: float32. Traffic: reads dy and x.
    """
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_mask = columns < K
    dw = tl.zeros((BLOCK_C,), dtype=tl.float32)
    db = tl.zeros((BLOCK_C,), dtype=tl.float32)
    first = widen(tl.program_id(1), INDEX64) * chunk
    for start in range(0, tl.minimum(chunk, M - first), BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        row_mask = rows < M
        mask = row_mask[:, None] & column_mask[None, :]
        offsets = (rows * K)[:, None] + columns[None, :]
        dy = tl.load(dy_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=row_mask, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)
        dw += tl.sum(dy * tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0), axis=0)
        db += tl.sum(dy, axis=0)
    share = partial_ptr + widen(tl.program_id(1), INDEX64) * 2 * K
    tl.store(share + columns, dw, mask=column_mask)
    tl.store(share + K + columns, db, mask=column_mask)


# Launchers -----------------------------------------------------------------------------------------------------------


def _sizes(x: Tensor, dims: int) -> tuple[int, int]:
    """(rows, features)."""
    features = x.shape[x.dim() - dims :].numel()
    return x.shape[: x.dim() - dims].numel(), features


def _tile(features: int) -> tuple[int, int, int]:
    """(rows, features, warps) of a program's tile."""
    block_c = min(max(triton.next_power_of_2(features), 16), LONGEST)
    return max(BLOCK // block_c, 1), block_c, 4 if block_c < 2048 else 8


def _split(rows: int, block_m: int) -> tuple[int, int]:
    """(rows of a split, splits) of the sums over rows, at least four tiles each."""
    splits = max(1, min(MAX_SPLITS, triton.cdiv(rows, 4 * block_m)))
    chunk = triton.cdiv(triton.cdiv(rows, splits), block_m) * block_m
    return chunk, triton.cdiv(rows, chunk)


def layer_norm_forward(x, dims, weight, bias, eps, emits_squares):
    """Layer normalisation of x over its last ``dims`` dimensions → (y, mean, rstd, squares).

    y of x's shape and dtype, contiguous; mean, rstd and, if emits_squares, squares (else empty) of the shape of the
    other dimensions, float32. Raises NotImplementedError for a dtype other than float32, bfloat16, float16.
    """
    check_dtype("layer_norm", x)
    x = x.contiguous()
    rows, features = _sizes(x, dims)
    shape = x.shape[: x.dim() - dims]
    y = torch.empty_like(x)
    mean, rstd = x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)
    squares = x.new_empty(shape if emits_squares else (0,), dtype=torch.float32)
    if not x.numel():
        return y, mean.fill_(float("nan")), rstd.fill_(float("nan")), squares.zero_()
    block_m, block_c, warps = _tile(features)
    with on_device(x):
        layer_norm_forward_kernel[(triton.cdiv(rows, block_m),)](
            y, mean, rstd, present(squares),
            x, contiguous(weight), contiguous(bias),
            rows, features,
            float(eps),
            WHOLE=features <= block_c,
            INDEX64=index64(x), BLOCK_M=block_m, BLOCK_C=block_c, num_warps=warps,
        )  # fmt: skip
    return y, mean, rstd, squares


def layer_norm_backward(dy, x, dims, weight, bias, mean, rstd, detach, need_dx, need_dweight, need_dbias):
    """Gradients (dx, dweight, dbias) of `layer_norm_forward`, None where not needed."""
    check_dtype("layer_norm", x)
    dy, x, mean, rstd, weight = map(contiguous, (dy, x, mean, rstd, weight))
    rows, features = _sizes(x, dims)
    dx = torch.empty_like(x) if need_dx else None
    sums = x.new_empty((2, features), dtype=torch.float32) if need_dweight or need_dbias else None
    block_m, block_c, warps = _tile(features)
    whole, wide = features <= block_c, index64(x)
    if not x.numel():
        sums = None if sums is None else sums.zero_()
    else:
        chunk, splits = block_m, triton.cdiv(rows, block_m)
        partial = None
        if sums is not None:
            chunk, splits = _split(rows, block_m if whole else SUMMED_ROWS)
            partial = x.new_empty((splits, 2, features), dtype=torch.float32)
        with on_device(x):
            if whole and (need_dx or partial is not None):
                layer_norm_backward_kernel[(splits,)](
                    dx, partial,
                    dy, x, weight, mean, rstd,
                    rows, features, chunk,
                    DETACH=detach,
                    INDEX64=wide, BLOCK_M=block_m, BLOCK_C=block_c, num_warps=warps,
                )  # fmt: skip
            if not whole and need_dx:
                layer_norm_backward_dx_kernel[(rows,)](
                    dx, dy, x, weight, mean, rstd, rows, features, DETACH=detach, INDEX64=wide, BLOCK_C=block_c,
                    num_warps=warps,
                )  # fmt: skip
            if not whole and partial is not None:
                layer_norm_backward_sums_kernel[(triton.cdiv(features, 128), splits)](
                    partial, dy, x, mean, rstd, rows, features, chunk, INDEX64=wide, BLOCK_M=SUMMED_ROWS, BLOCK_C=128,
                    num_warps=4,
                )  # fmt: skip
            if partial is not None:
                sum_splits_kernel[(triton.cdiv(2 * features, 256),)](
                    sums, partial, 2 * features, splits, INDEX64=index64(partial), BLOCK_M=256, num_warps=4
                )
    dweight = sums[0].view(weight.shape).to(weight.dtype) if need_dweight else None
    # a copy where it is float32 already: the two may not share memory
    return dx, dweight, sums[1].view(bias.shape).to(bias.dtype, copy=True) if need_dbias else None
