"""What a forward kernel does to a tile of its product before storing it, and what may follow the B-cos scaling there.

    a = max over the units u of output o of ŵ_u·p + β_u
    y = a·s(|a|/n)                                                   nothing follows
    z = act(y/√(var + eps)·γ + δ + residual)                         a normalisation of known variance follows
    h = y·Φ(y)                                                       a GELU follows

Where something follows, y is rounded to its type first, as a backward and a recomputation find it. Kept of y is y
itself, or in explanation mode the slope ∂z/∂a = γ/√(var + eps)·|a|/n where act let z pass: every scale is a constant
there. The squares of what is stored are summed over the tile's columns, for the norms of the layer that reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .bcos_math import bcos_output, exponent_of, widen, winner


@triton.jit
def channel_scale(var_ptr, w_ptr, channels, mask, eps):
    """w/√(var + eps) of a block of channels; w may be None."""
    scale = 1 / tl.sqrt(tl.load(var_ptr + channels, mask=mask, other=1.0).to(tl.float32) + eps)
    if w_ptr is not None:
        scale *= tl.load(w_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    return scale


@triton.jit
def gelu_slope(y, DETACH: tl.constexpr):
    """∂GELU(y)/∂y = Φ(y) + y·φ(y), the gate Φ(y) alone in explanation mode.

    The tail is Abramowitz and Stegun's 7.1.26 (absolute error 1e-7, without cancellation on either side), as in
    csrc/math.h: the branches of an erf cost registers in an epilogue that has none to spare.
    """
    z = tl.abs(y) * 0.7071067811865476
    t = 1 / (1 + 0.3275911 * z)
    density = tl.exp(-z * z)
    p = (((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
    tail = 0.5 * p * t * density
    slope = tl.where(y < 0, tail, 1 - tail)
    if not DETACH:
        slope += y * density * 0.3989422804014327
    return slope


@triton.jit
def finish_tile(
    y_ptr, a_ptr, index_ptr, kept_ptr, squares_ptr,
    bias_ptr, rnorm_ptr, b_ptr, residual_ptr, var_ptr, norm_w_ptr, norm_b_ptr,
    total, n, units, unit_mask, rows, row_mask, y_rows, channels, channel_mask, share,
    M, stride_yc,
    b, eps,
    B_MODE: tl.constexpr, MAX_OUT: tl.constexpr, MEMBERS: tl.constexpr,
    RELU: tl.constexpr, GELU: tl.constexpr, SLOPE: tl.constexpr,
    INDEX64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store a tile, as in the module's docstring: total (BLOCK_M, BLOCK_N) = w·p of its units, n (BLOCK_M, outputs) the
    norm of each output, (BLOCK_M, 1) where they share it.

    y, a, index, kept and residual lie alike: at y_rows + channels·stride_yc. squares (·, M): the sums of this tile go
    to row ``share``. All pointers may be None; a normalisation follows where var is not.
    """
    if rnorm_ptr is not None:
        total *= tl.load(rnorm_ptr + units, mask=unit_mask, other=0.0)[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + units, mask=unit_mask, other=0.0).to(tl.float32)[None, :]
    offsets = y_rows[:, None] + (widen(channels, INDEX64) * stride_yc)[None, :]
    mask = row_mask[:, None] & channel_mask[None, :]
    if MAX_OUT > 1:
        a, index = winner(total, unit_mask, BLOCK_M, BLOCK_N, MEMBERS)
        if index_ptr is not None:
            tl.store(index_ptr + offsets, index.to(tl.uint8), mask=mask)
    else:
        a = total
    if a_ptr is not None:
        tl.store(a_ptr + offsets, a, mask=mask)
    if y_ptr is not None:
        dtype = y_ptr.dtype.element_ty
        out = bcos_output(a, n, exponent_of(b, b_ptr), B_MODE)
        if GELU:
            out = out.to(dtype).to(tl.float32)
            if kept_ptr is not None:
                tl.store(kept_ptr + offsets, out, mask=mask)
            out *= gelu_slope(out, True)
        if var_ptr is not None:
            scale = channel_scale(var_ptr, norm_w_ptr, channels, channel_mask, eps)
            out = out.to(dtype).to(tl.float32)
            if kept_ptr is not None:
                if not SLOPE:
                    tl.store(kept_ptr + offsets, out, mask=mask)
            out *= scale[None, :]
            if norm_b_ptr is not None:
                out += tl.load(norm_b_ptr + channels, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
            if residual_ptr is not None:
                out += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            if kept_ptr is not None:
                if SLOPE:
                    slope = tl.abs(a) / n * scale[None, :]
                    if RELU:
                        slope = tl.where(out <= 0, 0.0, slope)
                    tl.store(kept_ptr + offsets, slope, mask=mask)
            if RELU:
                out = tl.where(out <= 0, 0.0, out)  # NaN passes
        tl.store(y_ptr + offsets, out, mask=mask)
        if squares_ptr is not None:
            stored = tl.where(mask, out.to(dtype).to(tl.float32), 0.0)
            sums = tl.sum(stored * stored, axis=1)
            tl.store(squares_ptr + (widen(share, INDEX64) * M + rows), sums, mask=row_mask)


@dataclass(frozen=True)
class Epilogue:
    """What follows the scaling: a normalisation of known variance, a GELU or nothing, and where its extras go.

    kept: tensor for y, or for the slope where ``slope``; squares: one float32 per row of the product, for the sums over
    what is stored. residual and kept lie in memory as the output does.
    """

    var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    eps: float = 0.0
    relu: bool = False
    gelu: bool = False
    slope: bool = False
    kept: Tensor | None = None
    squares: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        """The kernel's arguments residual, var, norm_w and norm_b."""
        return self.residual, self.var, self.weight, self.bias

    @property
    def flags(self) -> dict[str, bool]:
        return {"RELU": self.relu, "GELU": self.gelu, "SLOPE": self.slope}


NOTHING = Epilogue()
