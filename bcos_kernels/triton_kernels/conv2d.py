"""B-cos convolution in Triton, as an implicit GEMM: x (n, C, H, W), weight (O·max_out, C/G, R, S), y (n, O, P, Q).

Rows of the product are the n·P·Q windows, its columns the units of one group, its reduction runs over (r, s, c), c
fastest: channels_last is read in its own order, any other strides are read as they are, no patch is ever stored. The
window's norm comes from the tiles that the product loads anyway, or where the pass that wrote x has left Σ_c x², from
a box filter over that map.

    a   = max over the units u of output o of ŵ_u·p + β_u,   ŵ_u = w_u/‖w_u‖ or w_u,   p the window of group g
    n   = sqrt(Σ p² + 1e-6)
    y   = a (B = 1),  a·|a|/n (B = 2),  a·(|a|/n + 1e-6)^(B−1) (else)

A normalisation of known variance may follow in the same kernel (epilogue.py). Windows of one pixel over channels_last
run as a linear layer (linear.py): their rows lie in memory one behind the other. Groups of few channels run without
matrix products (conv2d_small_groups.py). The gradient is in conv2d_gradient.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import conv2d_small_groups, linear
from .bcos_math import (
    ONE,
    accumulate,
    b_mode,
    check_dtype,
    contiguous,
    convolution_precision,
    index64,
    keeps_pre_scale,
    members_of,
    memory_format,
    norm_of,
    on_device,
    present,
    shares_of,
    sum_shares,
    tile_of,
    units_of_tile,
    widen,
    window_of_row,
)
from .configs import aligned, config_for, fitted, flattened, reduced, shortened
from .epilogue import NOTHING, finish_tile
from .weights import reciprocal_norms

GROUP_M = 8


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
def conv2d_forward_kernel(
    y_ptr, n_ptr, a_ptr, index_ptr, kept_ptr, emitted_ptr,
    x_ptr, w_ptr, bias_ptr, rnorm_ptr, b_ptr, squares_ptr, residual_ptr, var_ptr, norm_w_ptr, norm_b_ptr,
    M, outputs, channels, groups, H, W, P, Q,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wu, stride_wc, stride_wr, stride_ws,
    stride_yn, stride_yc, stride_yh, stride_yw,
    step_h, step_w, pad_h, pad_w, dil_h, dil_w,
    b, eps,
    R: tl.constexpr, S: tl.constexpr, FLAT: tl.constexpr, ALIGNED: tl.constexpr,
    B_MODE: tl.constexpr, MAX_OUT: tl.constexpr, MEMBERS: tl.constexpr,
    RELU: tl.constexpr, GELU: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Math: y, n and where asked a, the winning unit and what epilogue.py tells of, as in the module's docstring.

    Shapes: x (·, G·channels, H, W), w (G·outputs·MAX_OUT, channels, R, S) any strides; y, a, index, kept, residual (·,
    G·outputs, P, Q) of one stride; n (·, G, P, Q) and squares = Σ_c x² (·, H, W; one group) float32 contiguous; emitted
    (G · tiles of outputs, M) float32; bias and rnorm = 1/‖w‖ (G·outputs·MAX_OUT,); M = windows. All but x and w may be
    None. ALIGNED: channels and outputs are multiples of 8. Grid: tiles of BLOCK_M windows × BLOCK_N units, those of the
    groups one after the other, as the channels of several may lie in one sector.
    Reduction: a tap at a time, BLOCK_K channels of it; if FLAT, BLOCK_K of all (r, s, c), for channels that fill no
    block. The norm comes from the same tiles, or from squares: R·S loads a window.
    Numerics: products, norm and scale in float32; what is stored is rounded once. Padding adds zeros to product and
    norm.
    Traffic: reads x (each tap, from L1/L2) and w, writes y and n; 2·M·units·channels·R·S FLOPs, and without squares
    2·BLOCK_M·channels·R·S a program for the norm.
    """
    if ALIGNED:  # told to the compiler, which reads and writes 16 bytes at once then
        channels = channels // 8 * 8
        outputs = outputs // 8 * 8
    wide_outputs: tl.constexpr = BLOCK_N // MEMBERS
    group = tl.program_id(0) % groups
    tile = tl.program_id(0) // groups
    pid_m, pid_n = tile_of(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(outputs, wide_outputs), GROUP_M)
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
            if squares_ptr is None:
                x32 = x.to(tl.float32)
                squares += tl.sum(x32 * x32, axis=1)

    if squares_ptr is not None:
        for tap in range(0, R * S):
            h = h0 + tap // S * dil_h
            w = w0 + tap % S * dil_w
            inside = row_mask & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            squares += tl.load(squares_ptr + ((image * H + h) * W + w), mask=inside, other=0.0)
    n = norm_of(squares, True)
    if n_ptr is not None:
        if pid_n == 0:
            tl.store(n_ptr + ((image * groups + group) * (P * Q) + rows % (P * Q)), n, mask=row_mask)
    columns = pid_n * wide_outputs + tl.arange(0, wide_outputs)
    finish_tile(
        y_ptr, a_ptr, index_ptr, kept_ptr, emitted_ptr,
        bias_ptr, rnorm_ptr, b_ptr, residual_ptr, var_ptr, norm_w_ptr, norm_b_ptr,
        total, n[:, None], units, unit_mask, rows, row_mask, image * stride_yn + p * stride_yh + q * stride_yw,
        group * outputs + columns, columns < outputs, group * tl.cdiv(outputs, wide_outputs) + pid_n,
        M, stride_yc,
        b, eps,
        B_MODE, MAX_OUT, MEMBERS, RELU, GELU, SLOPE, INDEX64, BLOCK_M, BLOCK_N,
    )  # fmt: skip


# Launchers -----------------------------------------------------------------------------------------------------------


def output_shape(x, weight, stride, padding, dilation, max_out) -> tuple[int, int, int, int]:
    size = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    return (x.shape[0], weight.shape[0] // max_out, *size)


def rows_of(t: Tensor | None) -> Tensor | None:
    """(N, C, H, W) as (N·H·W, C): a view of channels_last, else a copy."""
    return t if t is None else t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def runs_as_linear(weight: Tensor, stride, padding, groups: int, *activations: Tensor) -> bool:
    """Whether the windows are single pixels, and those of all ``activations`` lie one behind the other."""
    single = weight.shape[2:] == (1, 1) and stride == (1, 1) and padding == (0, 0) and groups == 1
    return single and all(t.permute(0, 2, 3, 1).is_contiguous() for t in activations)


def reciprocal_weight_norms(weight: Tensor) -> Tensor:
    with on_device(weight):
        return reciprocal_norms(weight)


def empty_norms(x: Tensor, weight: Tensor, groups: int, shape: tuple[int, ...]) -> Tensor:
    """n (N, G, P, Q) of an output of ``shape``, float32: contiguous, but as the output where groups are small."""
    layout = memory_format(x, weight) if conv2d_small_groups.takes(weight, groups) else torch.contiguous_format
    n_shape = (shape[0], groups, *shape[2:])
    return torch.empty(n_shape, dtype=torch.float32, device=x.device, memory_format=layout)


def launch_forward(
    x, weight, bias, rnorm, stride, padding, dilation, groups, b, b_tensor, max_out, shape, squares, y, n, a, index,
    epilogue=NOTHING,
) -> None:  # fmt: skip
    """Launch the forward kernel for the outputs that are not None; those of shape ``shape`` share their strides."""
    if conv2d_small_groups.takes(weight, groups):
        conv2d_small_groups.launch_forward(
            x, weight, bias, rnorm, stride, padding, dilation, groups, b, b_tensor, max_out, shape, y, n, a, index,
            epilogue,
        )  # fmt: skip
        return
    squares = None if groups > 1 or b_mode(b, b_tensor) == ONE else contiguous(squares)
    layout = next(t for t in (y, a, index, x) if t is not None)
    if runs_as_linear(weight, stride, padding, groups, x, layout):
        linear.launch_forward(
            rows_of(x), weight[:, :, 0, 0], bias, rnorm, b, b_tensor, max_out, squares, convolution_precision(), True,
            y, n, a, index, epilogue,
        )  # fmt: skip
        return
    _, _, height, width = x.shape
    units, channels, r, s = weight.shape
    outputs, rows, out_h, out_w = units // max_out // groups, shape[0] * shape[2] * shape[3], shape[2], shape[3]
    members = members_of(max_out)
    int64 = index64(x, weight, y, a, n)
    config = config_for(rows, outputs * members, channels * r * s, x.dtype)
    config = shortened(config, int64 or epilogue.slope)
    block_k = fitted(config.block_k, channels)
    if not block_k or x.stride(1) != 1:  # an address for each element of x
        config = flattened(config)
    config = config._replace(block_k=block_k or config.block_k)
    config = reduced(config, members)
    tiles_n = triton.cdiv(outputs, config.block_n // members)
    emitted = shares_of(epilogue.squares, tiles_n * groups)
    with on_device(x):
        conv2d_forward_kernel[(triton.cdiv(rows, config.block_m) * tiles_n * groups,)](
            y, n, a, index, epilogue.kept, emitted,
            x, weight, contiguous(bias), rnorm, b_tensor, squares, *epilogue.inputs,
            rows, outputs, channels, groups, height, width, out_h, out_w,
            *x.stride(), *weight.stride(), *layout.stride(),
            *stride, *padding, *dilation,
            float(b), epilogue.eps,
            R=r, S=s, FLAT=not block_k, ALIGNED=aligned(channels, outputs),
            B_MODE=b_mode(b, b_tensor), MAX_OUT=max_out, MEMBERS=members, **epilogue.flags,
            PRECISION=convolution_precision(),
            INDEX64=int64,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=GROUP_M,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        sum_shares(epilogue.squares, emitted)


def conv2d_forward(
    x, weight, bias, stride, padding, dilation, groups, b, b_tensor, normalize_weight, max_out, keep, squares=None
):
    """B-cos convolution: x (N, C, H, W), weight (O·max_out, C/G, R, S) → (y, n, a, index), what is not kept being
    empty.

    stride, padding and dilation are pairs; padding is with zeros. y (N, O, P, Q) of x's dtype, channels_last if x or
    weight is; n (N, G, P, Q) float32, the norms (empty for B = 1), laid out as y where groups are small, else
    contiguous; a as y, the pre-scale output, if keep and the backward needs it; index as y, uint8, the winning unit, if
    keep and max_out > 1. squares (N, H, W) float32: Σ_c x² where known, from which the norms are then taken (for one
    group).
    Raises NotImplementedError for a dtype other than float32, bfloat16, float16.
    """
    check_dtype("conv2d", x)
    mode = b_mode(b, b_tensor)
    shape = output_shape(x, weight, stride, padding, dilation, max_out)
    layout = memory_format(x, weight)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    n = x.new_empty((0,), dtype=torch.float32) if mode == ONE else empty_norms(x, weight, groups, shape)
    a = torch.empty_like(y) if keep and keeps_pre_scale(x, mode) else x.new_empty((0,))
    index = torch.empty_like(y, dtype=torch.uint8) if keep and max_out > 1 else x.new_empty((0,), dtype=torch.uint8)
    if y.numel():
        launch_forward(
            x, weight, bias, reciprocal_weight_norms(weight) if normalize_weight else None, stride, padding, dilation,
            groups, b, b_tensor, max_out, shape, squares, y, present(n), present(a), present(index),
        )  # fmt: skip
    return y, n, a, index
