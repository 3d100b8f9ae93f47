"""B-cos convolution with groups of few channels (depthwise above all) in Triton, without matrix products.

What conv2d.py computes, for groups of at most `FEW` channels and `FEW` units. Of a tile of tl.dot all but a sixteenth
to a quarter would be zeros, and its loads would touch two to eight bytes of every sector: here a tile's columns run
through the units of all groups, which lie side by side in channels_last, and products are elementwise. A window's norm
is one value a group here, so Σ_c x² over all channels, which a producer may have left, says nothing about it: it is
summed beside the products.

Norms lie as the output does, so that both are written alike. The gradient is in conv2d_small_groups_gradient.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .bcos_math import (
    b_mode,
    contiguous,
    index64,
    is_channels_last,
    members_of,
    norm_of,
    on_device,
    shares_of,
    strides_of,
    sum_shares,
    units_of_tile,
    widen,
    window_of_row,
)
from .epilogue import NOTHING, finish_tile

FEW = 4
"""Channels and units of a group up to which products run elementwise: R·S·FEW multiplications for an element of dx, 36
of a 3 × 3 window, are what a memory of 5 TB/s leaves time for on units of 60 TFLOP/s (reckoned, not measured)."""
DEPTHWISE_ELEMENTS, FORWARD_ELEMENTS = 4096, 2048
"""Of a tile of the forward with one channel and one unit a group, and with more. 4096 are 32 accumulators a thread in 4
warps, and as many of the norm: a weight is loaded once for the four windows that a thread computes of its unit, and of
199 instructions for a pixel of the window 64 are the products (sm_90). Four channels a group or offsets of 64 bits
would take 255 registers."""
FORWARD_COLUMNS, TALL_COLUMNS = 32, 16
"""Of a tile of the forward, and of one whose window has more than three rows. A tile of m consecutive windows in an
image of width Q reads m/Q + R − 1 rows of pixels for its m/Q, and what it reads again of its neighbours' comes from L2:
with a 7 × 7 window in an image of 56², 64 windows would read their share of x 6 times, 256 read it 2.3 times, and 16
columns of 2 bytes are still a whole sector of 32 (reckoned, not measured)."""
PIXEL_ELEMENTS, PIXEL_COLUMNS = 1024, 4
"""Of any tile where pixels are innermost, at most. The compiler cannot see that windows lie side by side there, and
lets the lanes of a warp run along the columns first: of four it reads 8 pixels each. A thread then has windows of one
column, an address each: with 2048 elements and offsets of 64 bits the forward spills 264 bytes, dx 872."""


@triton.jit
def conv2d_small_groups_forward_kernel(
    y_ptr, n_ptr, a_ptr, index_ptr, kept_ptr, emitted_ptr,
    x_ptr, w_ptr, bias_ptr, rnorm_ptr, b_ptr, residual_ptr, var_ptr, norm_w_ptr, norm_b_ptr,
    M, outputs, H, W, P, Q, tiles_n,
    stride_xn, stride_xc, stride_xh, stride_xw,
    stride_wu, stride_wc, stride_wr, stride_ws,
    stride_yn, stride_yc, stride_yh, stride_yw,
    stride_nn, stride_nc, stride_nh, stride_nw,
    step_h, step_w, pad_h, pad_w, dil_h, dil_w,
    b, eps,
    R: tl.constexpr, S: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr,
    B_MODE: tl.constexpr, MAX_OUT: tl.constexpr, MEMBERS: tl.constexpr,
    RELU: tl.constexpr, GELU: tl.constexpr, SLOPE: tl.constexpr,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Math: y, n and where asked a, the winning unit and what epilogue.py tells of, as in the docstring of conv2d.py.

    Shapes: x (·, groups·CHANNELS, H, W), w (outputs·MAX_OUT, CHANNELS, R, S) any strides; y, a, index, kept, residual
    (·, outputs, P, Q) of one stride; n (·, groups, P, Q) float32 any strides; emitted (tiles_n, M) float32; bias and
    rnorm = 1/‖w‖ (outputs·MAX_OUT,); M = windows; OUTPUTS outputs a group. All but x and w may be None.
    Grid: tiles of BLOCK_M windows × BLOCK_N units, tiles of the same windows one after the other, so that the sectors
    that they share are read once. Columns of one group load the same channels.
    Numerics: products, norm and scale in float32; what is stored is rounded once. Padding adds zeros to product and
    norm.
    Traffic: reads x (each tap, from L1) and w, writes y and n; 4·R·S·CHANNELS FLOPs an output.
    """
    wide_outputs: tl.constexpr = BLOCK_N // MEMBERS
    pid_n = tl.program_id(0) % tiles_n
    rows = widen(tl.program_id(0) // tiles_n, INDEX64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    image, p, q = window_of_row(rows, P, Q)
    h0 = p * step_h - pad_h
    w0 = q * step_w - pad_w
    units, unit_mask = units_of_tile(pid_n, outputs, MAX_OUT, MEMBERS, BLOCK_N)
    # the columns of an output that have no unit load its group's channels too: their norms are then all the same
    output = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)) // MEMBERS
    column_mask = output < outputs
    x_columns = x_ptr + widen(output // OUTPUTS * CHANNELS, INDEX64) * stride_xc
    w_columns = w_ptr + widen(units, INDEX64) * stride_wu

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r in range(R):
        h = h0 + r * dil_h
        in_height = row_mask & (h >= 0) & (h < H)
        x_rows = image * stride_xn + h * stride_xh
        for s in range(S):
            w = w0 + s * dil_w
            mask = (in_height & (w >= 0) & (w < W))[:, None] & column_mask[None, :]
            for c in tl.static_range(CHANNELS):
                x_offsets = x_rows + w * stride_xw + c * stride_xc
                x = tl.load(x_columns[None, :] + x_offsets[:, None], mask=mask, other=0.0).to(tl.float32)
                w_offset = r * stride_wr + s * stride_ws + c * stride_wc
                total += x * tl.load(w_columns + w_offset, mask=unit_mask, other=0.0).to(tl.float32)[None, :]
                if B_MODE != 1:
                    squares += x * x

    if MEMBERS > 1:  # the sum of equal numbers, MEMBERS a power of two: exact
        squares = tl.sum(tl.reshape(squares, (BLOCK_M, wide_outputs, MEMBERS)), axis=2) * (1 / MEMBERS)
    n = norm_of(squares, True)
    columns = pid_n * wide_outputs + tl.arange(0, wide_outputs)
    if n_ptr is not None:
        n_rows = image * stride_nn + p * stride_nh + q * stride_nw
        n_columns = widen(columns // OUTPUTS, INDEX64) * stride_nc
        first = (columns < outputs) & (columns % OUTPUTS == 0)  # of its group
        tl.store(n_ptr + (n_rows[:, None] + n_columns[None, :]), n, mask=row_mask[:, None] & first[None, :])
    finish_tile(
        y_ptr, a_ptr, index_ptr, kept_ptr, emitted_ptr,
        bias_ptr, rnorm_ptr, b_ptr, residual_ptr, var_ptr, norm_w_ptr, norm_b_ptr,
        total, n, units, unit_mask, rows, row_mask, image * stride_yn + p * stride_yh + q * stride_yw,
        columns, columns < outputs, pid_n,
        M, stride_yc,
        b, eps,
        B_MODE, MAX_OUT, MEMBERS, RELU, GELU, SLOPE, INDEX64, BLOCK_M, BLOCK_N,
    )  # fmt: skip


# Launchers -----------------------------------------------------------------------------------------------------------


def takes(weight: Tensor, groups: int) -> bool:
    """Whether the groups of weight (units, C/G, R, S) are several and small: forward and gradient then run here."""
    return groups > 1 and 0 < weight.shape[1] <= FEW and 0 < weight.shape[0] // groups <= FEW


def tile_for(t: Tensor, columns: int, elements: int, most: int) -> tuple[int, int]:
    """(rows, columns) of a tile over t (N, C, H, W): where channels are innermost, of so many elements and at most so
    many columns."""
    if not (is_channels_last(t) or t.stride(1) == 1):
        elements, most = min(elements, PIXEL_ELEMENTS), PIXEL_COLUMNS
    block = min(most, triton.next_power_of_2(columns))
    return elements // block, block


def launch_forward(
    x, weight, bias, rnorm, stride, padding, dilation, groups, b, b_tensor, max_out, shape, y, n, a, index,
    epilogue=NOTHING,
) -> None:  # fmt: skip
    """Launch the forward kernel for the outputs that are not None; those of shape ``shape`` share their strides."""
    layout = next(t for t in (y, a, index) if t is not None)
    units, channels, r, s = weight.shape
    images, outputs, out_h, out_w = shape
    members, rows = members_of(max_out), images * out_h * out_w
    int64 = index64(x, weight, layout, n)
    elements = DEPTHWISE_ELEMENTS if channels == 1 and units == groups and not int64 else FORWARD_ELEMENTS
    block_m, block_n = tile_for(x, outputs * members, elements, FORWARD_COLUMNS if r <= 3 else TALL_COLUMNS)
    tiles_n = triton.cdiv(outputs * members, block_n)
    emitted = shares_of(epilogue.squares, tiles_n)
    with on_device(x):
        conv2d_small_groups_forward_kernel[(triton.cdiv(rows, block_m) * tiles_n,)](
            y, n, a, index, epilogue.kept, emitted,
            x, weight, contiguous(bias), rnorm, b_tensor, *epilogue.inputs,
            rows, outputs, *x.shape[2:], out_h, out_w, tiles_n,
            *x.stride(), *weight.stride(), *layout.stride(), *strides_of(n),
            *stride, *padding, *dilation,
            float(b), epilogue.eps,
            R=r, S=s, CHANNELS=channels, OUTPUTS=outputs // groups,
            B_MODE=b_mode(b, b_tensor), MAX_OUT=max_out, MEMBERS=members, **epilogue.flags,
            INDEX64=int64,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
        sum_shares(epilogue.squares, emitted)
