"""Kernels over a weight's rows, shared by linear and conv2d: the reciprocal norms, ŵ, and the last stage of ∂L/∂w.

A row is walked in the order (r, s, c), the order of conv2d's reduction; linear is the case R = S = 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bcos_math import index64, widen

# rows and elements of a row that one program takes at a time
BLOCK_U, BLOCK_K = 8, 256
# about two waves of programs on the largest GPUs; a constant, so that the order of every sum is the same everywhere
SPLIT_PROGRAMS = 256


@triton.jit
def element_of_row(k, channels, S: tl.constexpr, stride_c, stride_r, stride_s):
    """Offset in its row of element k, counted in the order (r, s, c)."""
    tap = k // channels
    return (k % channels) * stride_c + (tap // S) * stride_r + (tap % S) * stride_s


@triton.jit
def weight_reciprocal_norm_kernel(
    out_ptr,
    w_ptr,
    units, channels,
    stride_wu, stride_wc, stride_wr, stride_ws,
    R: tl.constexpr, S: tl.constexpr, INDEX64: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Math: out_u = 1/‖w_u‖, and 0 for a row of norm 0.

    Shapes: w (units, channels, R, S) any strides; out (units,) float32. Grid: BLOCK_U rows a program.
    Numerics: float32. Traffic: reads w once, 2·units·channels·R·S FLOPs.
    """
    rows = widen(tl.program_id(0), INDEX64) * BLOCK_U + tl.arange(0, BLOCK_U)
    row_mask = rows < units
    size = R * S * channels
    total = tl.zeros((BLOCK_U, BLOCK_K), dtype=tl.float32)
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        element = element_of_row(k, channels, S, stride_wc, stride_wr, stride_ws)
        offsets = (rows * stride_wu)[:, None] + element[None, :]
        w = tl.load(w_ptr + offsets, mask=row_mask[:, None] & (k < size)[None, :], other=0.0).to(tl.float32)
        total += w * w
    norm = tl.sqrt(tl.sum(total, axis=1))
    tl.store(out_ptr + rows, tl.where(norm == 0, 0.0, 1 / tl.where(norm == 0, 1.0, norm)), mask=row_mask)


@triton.jit
def weight_normalize_kernel(
    out_ptr,
    w_ptr, rnorm_ptr,
    units, columns,
    stride_ou, stride_wu, stride_wk,
    INDEX64: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Math: ŵ = w·rnorm. Shapes: w (units, columns) any strides, rnorm (units,) float32, out (units, columns) of
    contiguous rows. Grid: (blocks of BLOCK_U units, of BLOCK_K columns). Numerics: float32, rounded once.
    Traffic: reads w, writes ŵ.
    """
    rows = widen(tl.program_id(0), INDEX64) * BLOCK_U + tl.arange(0, BLOCK_U)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_mask = rows < units
    mask = row_mask[:, None] & (k < columns)[None, :]
    w = tl.load(w_ptr + (rows[:, None] * stride_wu + k[None, :] * stride_wk), mask=mask, other=0.0).to(tl.float32)
    rnorm = tl.load(rnorm_ptr + rows, mask=row_mask, other=0.0)
    tl.store(out_ptr + (rows[:, None] * stride_ou + k[None, :]), w * rnorm[:, None], mask=mask)


@triton.jit
def weight_gradient_kernel(
    dw_ptr, dbias_ptr,
    partial_ptr, dbias_partial_ptr, w_ptr, rnorm_ptr,
    units, channels, splits,
    stride_du, stride_dc, stride_dr, stride_ds,
    stride_wu, stride_wc, stride_wr, stride_ws,
    R: tl.constexpr, S: tl.constexpr, INDEX64: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Math: dŵ = Σ over splits of partial; dw = (dŵ − ŵ(ŵ·dŵ))/‖w‖, or dŵ if rnorm is None; dbias likewise.

    Shapes: partial (splits, units, R·S·channels) float32, dbias_partial (splits, units) float32 or None, w and dw
    (units, channels, R, S) any strides, rnorm (units,) float32 or None. Grid: BLOCK_U rows a program.
    Numerics: float32, fixed order. Traffic: reads partial once (twice with rnorm), writes dw once.
    """
    rows = widen(tl.program_id(0), INDEX64) * BLOCK_U + tl.arange(0, BLOCK_U)
    row_mask = rows < units
    size = R * S * channels
    rnorm = tl.zeros((BLOCK_U,), dtype=tl.float32)
    along = tl.zeros((BLOCK_U,), dtype=tl.float32)
    if rnorm_ptr is not None:
        rnorm = tl.load(rnorm_ptr + rows, mask=row_mask, other=0.0)
        for start in range(0, size, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            mask = row_mask[:, None] & (k < size)[None, :]
            element = element_of_row(k, channels, S, stride_wc, stride_wr, stride_ws)
            w = tl.load(w_ptr + ((rows * stride_wu)[:, None] + element[None, :]), mask=mask, other=0.0).to(tl.float32)
            partial = partial_ptr + ((rows * size)[:, None] + k[None, :])
            total = tl.zeros((BLOCK_U, BLOCK_K), dtype=tl.float32)
            for split in range(0, splits):
                total += tl.load(partial + widen(split * units, INDEX64) * size, mask=mask, other=0.0)
            along += tl.sum(total * w, axis=1) * rnorm
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (k < size)[None, :]
        partial = partial_ptr + ((rows * size)[:, None] + k[None, :])
        total = tl.zeros((BLOCK_U, BLOCK_K), dtype=tl.float32)
        for split in range(0, splits):
            total += tl.load(partial + widen(split * units, INDEX64) * size, mask=mask, other=0.0)
        if rnorm_ptr is not None:
            element = element_of_row(k, channels, S, stride_wc, stride_wr, stride_ws)
            w = tl.load(w_ptr + ((rows * stride_wu)[:, None] + element[None, :]), mask=mask, other=0.0).to(tl.float32)
            total = (total - w * (rnorm * along)[:, None]) * rnorm[:, None]
        element = element_of_row(k, channels, S, stride_dc, stride_dr, stride_ds)
        tl.store(dw_ptr + ((rows * stride_du)[:, None] + element[None, :]), total, mask=mask)
    if dbias_ptr is not None:
        dbias = tl.zeros((BLOCK_U,), dtype=tl.float32)
        for split in range(0, splits):
            dbias += tl.load(dbias_partial_ptr + (split * units + rows), mask=row_mask, other=0.0)
        tl.store(dbias_ptr + rows, dbias, mask=row_mask)


def reciprocal_norms(weight: Tensor) -> Tensor:
    """1/‖w‖ of every row of a (U, C, R, S) weight, float32; 0 for a row of norm 0."""
    units, channels, r, s = weight.shape
    out = torch.empty((units,), dtype=torch.float32, device=weight.device)
    weight_reciprocal_norm_kernel[(triton.cdiv(units, BLOCK_U),)](
        out,
        weight,
        units, channels,
        *weight.stride(),
        R=r, S=s, INDEX64=index64(weight), BLOCK_U=BLOCK_U, BLOCK_K=BLOCK_K, num_warps=4,
    )  # fmt: skip
    return out


def normalized_weight(weight: Tensor, rnorm: Tensor) -> Tensor:
    """ŵ of a (U, K) weight, its rows beginning at multiples of 16 bytes."""
    units, columns = weight.shape
    aligned = 16 // weight.itemsize
    out = weight.new_empty((units, triton.cdiv(columns, aligned) * aligned))[:, :columns]
    weight_normalize_kernel[(triton.cdiv(units, BLOCK_U), triton.cdiv(columns, BLOCK_K))](
        out,
        weight, rnorm,
        units, columns,
        out.stride(0), *weight.stride(),
        INDEX64=index64(weight, out), BLOCK_U=BLOCK_U, BLOCK_K=BLOCK_K, num_warps=4,
    )  # fmt: skip
    return out


def split_rows(rows: int, tiles: int, block: int) -> tuple[int, int]:
    """(rows of a split, number of splits) for a reduction over ``rows`` that feeds ``tiles`` result tiles."""
    splits = max(1, min(SPLIT_PROGRAMS // max(tiles, 1), triton.cdiv(rows, 4 * block), 64))
    chunk = triton.cdiv(triton.cdiv(rows, splits), block) * block
    return chunk, triton.cdiv(rows, chunk)


def finish_weight_gradient(
    partial: Tensor, dbias_partial: Tensor | None, weight: Tensor, bias: Tensor | None, rnorm: Tensor | None, dw: Tensor
) -> Tensor | None:
    """Sum the splits into ``dw`` ((U, C, R, S), any strides), through the weight norm if given; returns dbias."""
    units, channels, r, s = weight.shape
    dbias = None if dbias_partial is None else torch.empty((units,), dtype=bias.dtype, device=bias.device)
    weight_gradient_kernel[(triton.cdiv(units, BLOCK_U),)](
        dw, dbias, partial, dbias_partial, weight, rnorm,
        units, channels, partial.shape[0],
        *dw.stride(), *weight.stride(),
        R=r, S=s, INDEX64=index64(weight, dw, partial), BLOCK_U=BLOCK_U, BLOCK_K=BLOCK_K, num_warps=4,
    )  # fmt: skip
    return dbias
