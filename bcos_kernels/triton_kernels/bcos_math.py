"""What the kernels of all ops share: the scalar B-cos math on tiles, index helpers, and the launchers' checks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# the interpreter multiplies bfloat16 operands as the integers it stores them in
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))

# Values of the flag B_MODE: the exponents 1 and 2 have forms of their own.
GENERAL, ONE, TWO = 0, 1, 2

# Device helpers ------------------------------------------------------------------------------------------------------


@triton.jit
def widen(index, INDEX64: tl.constexpr):
    """Index in int64 where an offset can pass 2³¹."""
    if INDEX64:
        index = index.to(tl.int64)
    return index


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile (row, column) of a program: GROUP_M rows of tiles are walked column by column, so that operands stay in
    L2."""
    in_group = GROUP_M * tiles_n
    first = (pid // in_group) * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + (pid % in_group) % rows, (pid % in_group) // rows


@triton.jit
def window_of_row(rows, P, Q):
    """(image, p, q) of a convolution's windows, counted along the rows of the images."""
    pixel = rows % (P * Q)
    return rows // (P * Q), pixel // Q, pixel % Q


@triton.jit
def units_of_tile(tile, outputs, MAX_OUT: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Units computed by the columns of a tile, and which columns have one.

    An output is the maximum over MAX_OUT units; it takes MEMBERS columns, the power of two from MAX_OUT up.
    """
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if MAX_OUT == 1:
        unit = column
        valid = column < outputs
    else:
        member = column % MEMBERS
        unit = (column // MEMBERS) * MAX_OUT + member
        valid = (column // MEMBERS < outputs) & (member < MAX_OUT)
    return unit, valid


@triton.jit
def winner(a, valid, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MEMBERS: tl.constexpr):
    """Maximum over the MEMBERS columns of each output, and its index; the first of equals wins, NaN beats
    everything."""
    a = tl.where(valid[None, :], a, float("-inf"))
    a = tl.reshape(a, (BLOCK_M, BLOCK_N // MEMBERS, MEMBERS))
    is_nan = a != a
    best, index = tl.max(tl.where(is_nan, float("inf"), a), axis=2, return_indices=True)
    has_nan = tl.max(is_nan.to(tl.int32), axis=2) > 0
    return tl.where(has_nan, float("nan"), best), index


@triton.jit
def accumulate(left, right, total, PRECISION: tl.constexpr):
    """total + left · right, in float32."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def exponent_of(b, b_ptr):
    """The exponent B: the number, or the value behind the pointer where B is a tensor."""
    if b_ptr is not None:
        b = tl.load(b_ptr)
    return tl.cast(b, tl.float32)


@triton.jit
def logarithm(c):
    """log2 of a positive float as whole + fraction, |fraction| ≤ 1/2: the error is 1e-7 of the fraction."""
    bits = c.to(tl.int32, bitcast=True)
    whole = (bits - 0x3F3504F3) >> 23  # the mantissa lies in [sqrt(1/2), sqrt(2))
    fraction = tl.log2((bits - (whole << 23)).to(tl.float32, bitcast=True))
    return whole.to(tl.float32), fraction


@triton.jit
def power(c, exponent, whole, fraction):
    """c^exponent, c's logarithm given. It is multiplied in two parts, for its rounding would be the error of the result
    (5e-7 at c = 1e-6 and B = 3): the upper 16 bits of the exponent times a whole number below 2⁸ are exact.
    """
    upper = (exponent.to(tl.int32, bitcast=True) & -256).to(tl.float32, bitcast=True)
    rest = (exponent - upper) * whole + exponent * fraction
    nearest = tl.floor(upper * whole + rest + 0.5)
    result = tl.exp2((upper * whole - nearest) + rest) * tl.exp2(nearest)
    return tl.where(c < float("inf"), result, c)  # the bits of NaN and infinity are no logarithm


@triton.jit
def bcos_output(a, n, b, B_MODE: tl.constexpr):
    """y of a and its norm: a (B = 1), a·|a|/n (B = 2), else a·(|a|/n + 1e-6)^(B−1)."""
    if B_MODE == 1:
        y = a
    elif B_MODE == 2:
        y = a * (tl.abs(a) / n)
    else:
        c = tl.abs(a) / n + 1e-6
        whole, fraction = logarithm(c)
        y = a * power(c, b - 1, whole, fraction)
    return y


@triton.jit
def bcos_gradient(g, v, n, b, B_MODE: tl.constexpr, FROM_OUTPUT: tl.constexpr, DETACH: tl.constexpr):
    """(∂L/∂a, −n·∂L/∂n before its sum, ∂L/∂B before its sum) of g = ∂L/∂y.

    v is a, or y where FROM_OUTPUT (B = 2 only, |a|/n = sqrt(|y|/n)). DETACH: the scale is a constant.
    """
    if B_MODE == 2:
        if FROM_OUTPUT:
            cosine = tl.sqrt(tl.abs(v) / n)
            y = v
        else:
            cosine = tl.abs(v) / n
            y = v * cosine
        through_n = g * y
        through_b = through_n
        if DETACH:
            da = g * cosine
        else:
            da = 2 * g * cosine
    else:
        cosine = tl.abs(v) / n
        c = cosine + 1e-6
        whole, fraction = logarithm(c)
        scale = power(c, b - 1, whole, fraction)
        slope = (b - 1) * (scale / c) * cosine  # a · ∂scale/∂a
        through_n = g * v * slope
        through_b = g * v * scale * ((whole + fraction) * 0.6931471805599453)
        if DETACH:
            da = g * scale
        else:
            da = g * (scale + slope)
    return da, through_n, through_b


@triton.jit
def norm_of(squares, WINDOW: tl.constexpr):
    """n of Σ p²: sqrt(Σ p² + 1e-6) of a convolution's window, ‖p‖ + 1e-12 of a linear layer's row."""
    if WINDOW:
        n = tl.sqrt(squares + 1e-6)
    else:
        n = tl.sqrt(squares) + 1e-12
    return n


@triton.jit
def sum_kernel(out_ptr, partial_ptr, count, BLOCK: tl.constexpr):
    """Math: out = Σ partial. Shapes: partial (count,) float32, out () float32. Grid: one program, so that the order of
    the sum never changes. Numerics: float32. Traffic: reads count elements.
    """
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + i, mask=i < count, other=0.0)
    tl.store(out_ptr, tl.sum(total, axis=0))


@triton.jit
def sum_splits_kernel(out_ptr, partial_ptr, M, splits, INDEX64: tl.constexpr, BLOCK_M: tl.constexpr):
    """Math: out_m = Σ_s partial_sm. Shapes: partial (splits, M), out (M,), float32. Grid: blocks of BLOCK_M.
    Numerics: float32, splits added in order. Traffic: reads partial once, writes out.
    """
    rows = widen(tl.program_id(0), INDEX64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = rows < M
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    ptrs = partial_ptr + rows
    for _ in range(0, splits):
        total += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += M
    tl.store(out_ptr + rows, total, mask=mask)


# Host helpers --------------------------------------------------------------------------------------------------------


def check_dtype(op: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        built = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise NotImplementedError(f"{op}: the triton backend is built for {built}, got {x.dtype}")


def b_mode(b: float, b_tensor: Tensor | None) -> int:
    if b_tensor is None and b in (1, 2):
        return int(b)
    return GENERAL


def keeps_pre_scale(x: Tensor, mode: int) -> bool:
    """Whether the backward wants a itself: y and n are enough for B = 2, but not in float16, where y underflows."""
    return mode == GENERAL or (mode == TWO and x.dtype == torch.float16)


def present(t: Tensor | None) -> Tensor | None:
    """None for a tensor that was not kept."""
    return t if t is not None and t.numel() else None


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def on_device(x: Tensor) -> AbstractContextManager:
    """Kernels are launched on the current device: make it x's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def index64(*tensors: Tensor | None) -> bool:
    """Whether an element of a tensor lies 2³¹ or more elements from its first (a tile's overhang included)."""
    margin = 1 << 20
    for t in tensors:
        if t is not None and t.numel():
            last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            if max(last, t.numel()) >= 2**31 - margin:
                return True
    return False


def matmul_precision() -> str:
    """How tl.dot multiplies float32: exactly, unless torch allows tf32 in matrix products."""
    return "tf32" if _allows_tf32(torch.backends.cuda.matmul) else "ieee"


def convolution_precision() -> str:
    """How tl.dot multiplies float32: exactly, unless torch allows tf32 in convolutions."""
    return "tf32" if _allows_tf32(torch.backends.cudnn) else "ieee"


def _allows_tf32(backend: object) -> bool:
    try:
        return bool(backend.allow_tf32)
    except RuntimeError:
        # torch refuses the older switch once the newer one, fp32_precision, has been used
        conv = getattr(backend, "conv", backend)
        return getattr(conv, "fp32_precision", "ieee") == "tf32"


def is_channels_last(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def memory_format(*tensors: Tensor) -> torch.memory_format:
    """channels_last if any of the tensors is."""
    return torch.channels_last if any(is_channels_last(t) for t in tensors) else torch.contiguous_format


def strides_of(t: Tensor | None) -> tuple[int, ...]:
    """Of a tensor of four dimensions that may be absent."""
    return (0, 0, 0, 0) if t is None else t.stride()


def members_of(max_out: int) -> int:
    """Columns of a tile that one output takes."""
    return triton.next_power_of_2(max_out)


def sum_of(partial: Tensor) -> Tensor:
    """Deterministic sum of a float32 vector, as a 0-dim tensor."""
    out = torch.empty((), dtype=torch.float32, device=partial.device)
    sum_kernel[(1,)](out, partial, partial.numel(), BLOCK=1024, num_warps=4)
    return out


def shares_of(out: Tensor | None, splits: int) -> Tensor | None:
    """Where ``splits`` programs leave their shares of a float32 vector, (splits, M): in itself if there is one."""
    return out if out is None or splits == 1 else out.new_empty((splits, out.numel()))


def sum_shares(out: Tensor | None, shares: Tensor | None) -> None:
    """Add up what `shares_of` gave room for, in order."""
    if out is None or shares is out:
        return
    splits, rows = shares.shape
    sum_splits_kernel[(triton.cdiv(rows, 256),)](
        out, shares, rows, splits, INDEX64=index64(shares), BLOCK_M=256, num_warps=4
    )
