"""Kernels over a weight's rows, shared by linear and conv2d: the reciprocal norms, and the last stage of ∂L/∂w.

A row is walked in the order (r, s, c), the order of conv2d's reduction; linear is the case R = S = 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bcos_math import index64, widen

BLOCK = 1024
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
    channels,
    stride_wu, stride_wc, stride_wr, stride_ws,
    R: tl.constexpr, S: tl.constexpr, INDEX64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Math: out_u = 1/‖w_u‖, and 0 for a row of norm 0.

    Shapes: w (U, C, R, S) any strides; out (U,) float32. Grid: one program a row. Numerics: float32.
    Traffic: reads w once, 2·U·C·R·S FLOPs.
    """
    row = widen(tl.program_id(0), INDEX64)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, R * S * channels, BLOCK):
        k = start + tl.arange(0, BLOCK)
        offset = row * stride_wu + element_of_row(k, channels, S, stride_wc, stride_wr, stride_ws)
        w = tl.load(w_ptr + offset, mask=k < R * S * channels, other=0.0).to(tl.float32)
        total += w * w
    norm = tl.sqrt_rn(tl.sum(total, axis=0))
    tl.store(out_ptr + row, tl.where(norm == 0, 0.0, 1 / tl.where(norm == 0, 1.0, norm)))


@triton.jit
def weight_gradient_kernel(
    dw_ptr, dbias_ptr,
    partial_ptr, dbias_partial_ptr, w_ptr, rnorm_ptr,
    units, channels, splits,
    stride_du, stride_dc, stride_dr, stride_ds,
    stride_wu, stride_wc, stride_wr, stride_ws,
    R: tl.constexpr, S: tl.constexpr, NORMALIZE: tl.constexpr, INDEX64: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Math: dŵ = Σ over splits of partial; dw = dŵ, or (dŵ − ŵ(ŵ·dŵ))/‖w‖ if NORMALIZE; dbias likewise.

    Shapes: partial (splits, U, R·S·C) float32, dbias_partial (splits, U) float32 or None, w and dw (U, C, R, S) any
    strides, rnorm (U,) float32. Grid: one program a row. Numerics: float32, fixed order.
    Traffic: reads partial once (twice if NORMALIZE), writes dw once.
    """
    row = widen(tl.program_id(0), INDEX64)
    size = R * S * channels
    projection = tl.zeros((BLOCK,), dtype=tl.float32)
    rnorm = 1.0
    if NORMALIZE:
        rnorm = tl.load(rnorm_ptr + row)
        for start in range(0, size, BLOCK):
            k = start + tl.arange(0, BLOCK)
            offset = row * stride_wu + element_of_row(k, channels, S, stride_wc, stride_wr, stride_ws)
            w = tl.load(w_ptr + offset, mask=k < size, other=0.0).to(tl.float32)
            for split in range(0, splits):
                partial = partial_ptr + (widen(split * units, INDEX64) + row) * size + k
                projection += tl.load(partial, mask=k < size, other=0.0) * (w * rnorm)
    along = tl.sum(projection, axis=0)
    for start in range(0, size, BLOCK):
        k = start + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for split in range(0, splits):
            total += tl.load(partial_ptr + (widen(split * units, INDEX64) + row) * size + k, mask=k < size, other=0.0)
        if NORMALIZE:
            offset = row * stride_wu + element_of_row(k, channels, S, stride_wc, stride_wr, stride_ws)
            w = tl.load(w_ptr + offset, mask=k < size, other=0.0).to(tl.float32)
            total = (total - w * rnorm * along) * rnorm
        offset = row * stride_du + element_of_row(k, channels, S, stride_dc, stride_dr, stride_ds)
        tl.store(dw_ptr + offset, total, mask=k < size)
    if dbias_ptr is not None:
        dbias = 0.0
        for split in range(0, splits):
            dbias += tl.load(dbias_partial_ptr + split * units + row)
        tl.store(dbias_ptr + row, dbias)


def reciprocal_norms(weight: Tensor) -> Tensor:
    """1/‖w‖ of every row of a (U, C, R, S) weight, float32; 0 for a row of norm 0."""
    units, channels, r, s = weight.shape
    out = torch.empty((units,), dtype=torch.float32, device=weight.device)
    weight_reciprocal_norm_kernel[(units,)](
        out, weight, channels, *weight.stride(), R=r, S=s, INDEX64=index64(weight), BLOCK=BLOCK, num_warps=4
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
    weight_gradient_kernel[(units,)](
        dw, dbias, partial, dbias_partial, weight, rnorm,
        units, channels, partial.shape[0],
        *dw.stride(), *weight.stride(),
        R=r, S=s, NORMALIZE=rnorm is not None, INDEX64=index64(weight, dw, partial), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return dbias
