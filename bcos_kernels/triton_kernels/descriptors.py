"""The three products of a linear layer of 16-bit types for sm_90 and newer: tiles come by tensor descriptors (TMA).

The mathematics is that of linear.py's kernels, max_out = 1. The hardware copies tiles into shared memory and fills what
lies outside with zeros, so no thread computes addresses or masks, and the tiles feed the matrix units from there.
Forward and dx are persistent: as many programs as multiprocessors, each walking tiles. Descriptors are made on the
host: on the device they would need a workspace from an allocator that is global to the process.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .bcos_math import GENERAL, accumulate, b_mode, contiguous, index64, norm_of, shares_of, sum_shares, tile_of, widen
from .configs import Config, descriptor_config_for, doubled, shortened
from .epilogue import NOTHING, finish_tile
from .weights import normalized_weight, split_rows

GROUP_M = 8


@triton.jit
def linear_forward_persistent_kernel(
    y_ptr, n_ptr, a_ptr, kept_ptr, emitted_ptr,
    x_desc, w_desc, bias_ptr, rnorm_ptr, b_ptr, squares_ptr, residual_ptr, var_ptr, norm_w_ptr, norm_b_ptr,
    M, N, K,
    b, eps,
    B_MODE: tl.constexpr, WINDOW: tl.constexpr, RELU: tl.constexpr, GELU: tl.constexpr, SLOPE: tl.constexpr,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Math: as `linear_forward_kernel`.

    Shapes: descriptors of x (M, K) in blocks BLOCK_M × BLOCK_K and w (N, K) in blocks BLOCK_N × BLOCK_K; y, a, kept,
    residual (M, N) contiguous; the others as there. Grid: programs that walk the tiles of y, one after the other.
    Numerics: products, norm and scale in float32; what is stored is rounded once.
    Traffic: reads x and w, writes y and n; 2·M·N·K FLOPs.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            x = x_desc.load([pid_m * BLOCK_M, start])
            w = w_desc.load([pid_n * BLOCK_N, start])
            total = accumulate(x, w.T, total, "ieee")
            if B_MODE != 1:
                if squares_ptr is None:
                    x32 = x.to(tl.float32)
                    squares += tl.sum(x32 * x32, axis=1)
        rows = widen(pid_m, INDEX64) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = rows < M
        if squares_ptr is not None:
            squares = tl.load(squares_ptr + rows, mask=row_mask, other=0.0)
        n = norm_of(squares, WINDOW)
        if n_ptr is not None:
            if pid_n == 0:
                tl.store(n_ptr + rows, n, mask=row_mask)
        columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        column_mask = columns < N
        finish_tile(
            y_ptr, a_ptr, None, kept_ptr, emitted_ptr,
            bias_ptr, rnorm_ptr, b_ptr, residual_ptr, var_ptr, norm_w_ptr, norm_b_ptr,
            total, n[:, None], columns, column_mask, rows, row_mask, rows * N, columns, column_mask, pid_n,
            M, 1,
            b, eps,
            B_MODE, 1, 1, RELU, GELU, SLOPE, INDEX64, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def linear_backward_dx_persistent_kernel(
    dx_ptr,
    da_desc, w_desc, x_ptr, q_ptr,
    M, N, K,
    stride_xm, stride_xk,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Math: dx = da · ŵ + x ⊙ q.

    Shapes: descriptors of da (M, N) in blocks BLOCK_M × BLOCK_K and ŵ (N, K) in blocks BLOCK_K × BLOCK_N; x (M, K) any
    strides; q (M,) float32 or None; dx (M, K) contiguous. Grid: programs that walk the tiles of dx, one after the
    other. Numerics: float32, dx rounded once. Traffic: reads da, ŵ and x, writes dx; 2·M·N·K FLOPs.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_k = tl.cdiv(K, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_k, tl.num_programs(0)):
        pid_m, pid_k = tile_of(tile, tiles_m, tiles_k, GROUP_M)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, N, BLOCK_K):
            da = da_desc.load([pid_m * BLOCK_M, start])
            w = w_desc.load([start, pid_k * BLOCK_N])
            total = accumulate(da, w, total, "ieee")
        rows = widen(pid_m, INDEX64) * BLOCK_M + tl.arange(0, BLOCK_M)
        features = widen(pid_k * BLOCK_N + tl.arange(0, BLOCK_N), INDEX64)
        row_mask = rows < M
        mask = row_mask[:, None] & (features < K)[None, :]
        if q_ptr is not None:
            x = tl.load(x_ptr + (rows[:, None] * stride_xm + features[None, :] * stride_xk), mask=mask, other=0.0)
            total += x.to(tl.float32) * tl.load(q_ptr + rows, mask=row_mask, other=0.0)[:, None]
        tl.store(dx_ptr + (rows[:, None] * K + features[None, :]), total, mask=mask)


@triton.jit
def linear_backward_dw_descriptor_kernel(
    partial_ptr, dbias_ptr,
    da_desc, x_desc,
    M, N, K, chunk,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Math: partial_s = daᵀ · x and dbias_s = Σ da over the rows of split s.

    Shapes: descriptors of da (M, N) in blocks BLOCK_K × BLOCK_M and x (M, K) in blocks BLOCK_K × BLOCK_N; partial
    (splits, N, K) and dbias (splits, N) float32 contiguous, dbias may be None. Grid: (tiles of BLOCK_M units × BLOCK_N
    features, splits of chunk rows, a multiple of BLOCK_K). Numerics: float32. Traffic: reads da and x, writes partial;
    2·M·N·K FLOPs.
    """
    pid_n, pid_k = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    split = tl.program_id(1)
    first = split * chunk
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(first, tl.minimum(first + chunk, M), BLOCK_K):
        da = da_desc.load([start, pid_n * BLOCK_M])
        x = x_desc.load([start, pid_k * BLOCK_N])
        total = accumulate(da.T, x, total, "ieee")
        if dbias_ptr is not None:
            dbias += tl.sum(da.to(tl.float32), axis=0)
    units = pid_n * BLOCK_M + tl.arange(0, BLOCK_M)
    features = pid_k * BLOCK_N + tl.arange(0, BLOCK_N)
    unit_mask = units < N
    slot = widen(split, INDEX64) * N + units
    mask = unit_mask[:, None] & (features < K)[None, :]
    tl.store(partial_ptr + (slot[:, None] * K + features[None, :]), total, mask=mask)
    if dbias_ptr is not None:
        if pid_k == 0:
            tl.store(dbias_ptr + slot, dbias, mask=unit_mask)


# Launchers -----------------------------------------------------------------------------------------------------------


def architecture() -> int:
    """90 for sm_90; 0 where no NVIDIA GPU is what kernels are compiled for."""
    if knobs.runtime.interpret:
        return 0
    target = driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


def multiprocessors(x: Tensor) -> int:
    """Programs of a persistent kernel; 132 are those of an H100, where there is no device to ask."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def _describable(t: Tensor) -> bool:
    """Whether rows of t (two dimensions) are contiguous and begin at multiples of 16 bytes."""
    rows, columns = t.stride()
    return columns == 1 and rows > 0 and rows * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0 and t.numel() > 0


def config_of(m: int, n: int, k: int, left: Tensor, right: Tensor) -> Config | None:
    """Tile for an (m, n) result reduced over k, None where the kernels of linear.py have to run."""
    config = descriptor_config_for(m, n, k, left.dtype)
    if config is None or left.dtype != right.dtype or architecture() < 90:
        return None
    return config if _describable(left) and _describable(right) else None


def _tile_arguments(config: Config, int64: bool) -> dict:
    return {
        "INDEX64": int64, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "GROUP_M": GROUP_M, "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def forward(x, weight, bias, rnorm, b, b_tensor, squares, window, y, n, a, epilogue, config) -> None:
    (rows, inputs), outputs = x.shape, weight.shape[0]
    mode, programs = b_mode(b, b_tensor), multiprocessors(x)
    if epilogue == NOTHING and mode != GENERAL and bias is None and rnorm is None and architecture() == 90:
        config = doubled(config, rows, outputs, programs)
    config = shortened(config, epilogue.slope or mode == GENERAL)
    tiles_n = triton.cdiv(outputs, config.block_n)
    emitted = shares_of(epilogue.squares, tiles_n)
    tiles = triton.cdiv(rows, config.block_m) * tiles_n
    linear_forward_persistent_kernel[(min(tiles, programs),)](
        y, n, a, epilogue.kept, emitted,
        TensorDescriptor.from_tensor(x, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k]),
        contiguous(bias), rnorm, b_tensor, squares, *epilogue.inputs,
        rows, outputs, inputs,
        float(b), epilogue.eps,
        B_MODE=mode, WINDOW=window, **epilogue.flags, **_tile_arguments(config, index64(y, a)),
    )  # fmt: skip
    sum_shares(epilogue.squares, emitted)


def backward_dx(dx, da, x, weight, rnorm, q, config) -> None:
    (rows, outputs), inputs = da.shape, x.shape[1]
    weight = weight if rnorm is None else normalized_weight(weight, rnorm)
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(inputs, config.block_n)
    linear_backward_dx_persistent_kernel[(min(tiles, multiprocessors(x)),)](
        dx,
        TensorDescriptor.from_tensor(da, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(weight, [config.block_k, config.block_n]),
        x, q,
        rows, outputs, inputs,
        *x.stride(),
        **_tile_arguments(config, index64(dx, x)),
    )  # fmt: skip


def backward_dw(da, x, need_dbias, config) -> tuple[Tensor, Tensor | None]:
    """(partial, dbias_partial) of the splits, as `finish_weight_gradient` takes them."""
    (rows, outputs), inputs = da.shape, x.shape[1]
    tiles = triton.cdiv(outputs, config.block_m) * triton.cdiv(inputs, config.block_n)
    chunk, splits = split_rows(rows, tiles, config.block_k)
    partial = x.new_empty((splits, outputs, inputs), dtype=torch.float32)
    dbias_partial = x.new_empty((splits, outputs), dtype=torch.float32) if need_dbias else None
    linear_backward_dw_descriptor_kernel[(tiles, splits)](
        partial, dbias_partial,
        TensorDescriptor.from_tensor(da, [config.block_k, config.block_m]),
        TensorDescriptor.from_tensor(x, [config.block_k, config.block_n]),
        rows, outputs, inputs, chunk,
        **_tile_arguments(config, index64(partial)),
    )  # fmt: skip
    return partial, dbias_partial
