"""The CPU backend: the library's convolutions and matrix products, and the fused passes of csrc/cpu around them.

Forward: the product, then one pass that scales it in place. What is read besides: x once, for Σ_c x²; the norm map and
its box filter are one channel wide. Backward: one pass from (dy, y, n) to ∂L/∂a and q = (∂L/∂n)/‖p‖, the product's own
backward, and dx += x ⊙ (transposed box filter of q).

Both dense layouts are native: channels innermost (channels_last, linear) and pixels innermost (contiguous). Anything
else is copied to one of them first.
"""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_LIBRARY = Path(__file__).parent / "_lib" / "libbcos_kernels_cpu.so"
_BLOCK = 512  # csrc/cpu/kernels.h: kBlock
_WORKSPACE = 64 << 20  # bytes of the largest buffer that a thread keeps
_thread = threading.local()


@cache
def unusable_reason() -> str | None:
    """Why this backend cannot run here, or None. Loads the op library on the first call."""
    from .dispatch import build_report

    if not _LIBRARY.exists():
        return build_report().get("cpu") or f"its library {_LIBRARY.name} is missing from the installation"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"its library {_LIBRARY.name} does not load: {error}"
    return None


def _cpp():
    return torch.ops.bcos_kernels_cpp


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _nothing(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty((0,), dtype=dtype)


def _is_channels_last(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def _dense_weight(weight: Tensor) -> Tensor:
    """The weight with every unit's values next to each other, in the order it has if it has one."""
    return weight if _is_channels_last(weight) else weight.contiguous()


def _normalized(weight: Tensor) -> Tensor:
    """ŵ in the weight's layout."""
    w_hat = torch.empty_like(weight)
    _cpp().normalize_weight(weight, w_hat)
    return w_hat


def _mode(b: float, b_tensor: Tensor | None) -> tuple[int, float]:
    """(1, 2 or 0 for any other B, the exponent B − 1)."""
    if b_tensor is not None:
        return 0, float(b_tensor) - 1.0  # in host memory: reading it waits for nothing
    return (int(b) if b in (1, 2) else 0), b - 1.0


def _keeps_a(dtype: torch.dtype, mode: int) -> bool:
    return mode == 0 or (mode == 2 and dtype == torch.float16)


def _scaled(a, n, layout, shape, mode, exponent, max_out, keep):
    """(y, kept a, index) from the product a; y takes a's place in memory where nothing of a is needed any more."""
    memory_format = torch.channels_last if _is_channels_last(a) else torch.contiguous_format
    keeps_a = keep and _keeps_a(a.dtype, mode)
    if max_out == 1 and mode == 1:
        return a, _nothing(a, a.dtype), _nothing(a, torch.uint8)
    y = a
    if max_out > 1 or keeps_a:
        y = torch.empty(shape, dtype=a.dtype, memory_format=memory_format)
    # with one unit per output, a itself is what is kept
    kept = torch.empty_like(y) if keeps_a and max_out > 1 else None
    index = torch.empty_like(y, dtype=torch.uint8) if keep and max_out > 1 else None
    _cpp().scale(a, y, kept, index, n, *layout, max_out, mode, exponent)
    if keeps_a and max_out == 1:
        kept = a
    return y, _nothing(a, a.dtype) if kept is None else kept, _nothing(a, torch.uint8) if index is None else index


def _workspace(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """A buffer for ∂L/∂a, which lives only inside one backward.

    Kept per thread up to a size: a fresh one for every layer makes the C allocator give pages back to the system and
    fetch them again (12,500 page faults, 28 of the 57 ms of forward and backward of 1x1 64→256 at 56², batch 8).
    """
    count = 1
    for size in shape:
        count *= size
    size = count * dtype.itemsize
    if not 1 << 20 < size <= _WORKSPACE:  # small ones come from the allocator's own store
        return torch.empty(shape, dtype=dtype, memory_format=memory_format)
    buffer = getattr(_thread, "workspace", None)
    if buffer is None or buffer.numel() < size:
        buffer = _thread.workspace = torch.empty(size, dtype=torch.uint8)
    flat = buffer[:size].view(dtype)
    if memory_format == torch.channels_last:
        images, channels, height, width = shape
        return flat.view(images, height, width, channels).permute(0, 3, 1, 2)
    return flat.view(shape)


def _scaled_backward(
    dy, source, index, n, layout, shape, mode, exponent, max_out, from_a, detach, need_db, linear_norm
):  # fmt: skip
    """(da, q or None, ∂L/∂B or None); da is valid until the next call."""
    if mode == 1 and max_out == 1:
        return dy, None, None
    images, pixels, _, groups, rows = layout
    # by the layout and not by dy, which has one channel where one output is the maximum of several units
    memory_format = torch.channels_last if rows and len(shape) == 4 else torch.contiguous_format
    da = _workspace(shape, dy.dtype, memory_format)
    q = torch.empty_like(n) if mode != 1 and not detach else None
    db = None
    if need_db and mode == 0:
        parts = images * pixels if rows else images * groups * -(-pixels // _BLOCK)
        db = torch.empty(parts, dtype=_wide(dy.dtype))
    _cpp().scale_backward(
        dy, source, index if max_out > 1 else None, n if mode != 1 else None, da, q, db, *layout, max_out, mode,
        exponent, from_a, detach, linear_norm,
    )  # fmt: skip
    return da, q, None if db is None else db.sum()


def _projects_in_float32(weight: Tensor, normalize_weight: bool) -> bool:
    """Whether ∂L/∂ŵ is wanted in float32: of a short weight the projection leaves so little that rounding shows."""
    return normalize_weight and weight.dtype in (torch.bfloat16, torch.float16) and weight[0].numel() <= 32


def _weight_gradient(dw_hat: Tensor, weight: Tensor) -> Tensor:
    """∂L/∂w from ∂L/∂ŵ, in the weight's type and layout."""
    wide = weight.to(dw_hat.dtype)
    dw = torch.empty_like(wide)
    memory_format = torch.channels_last if _is_channels_last(weight) else torch.contiguous_format
    _cpp().weight_norm_backward(dw_hat.contiguous(memory_format=memory_format), wide, dw)
    return dw.to(weight.dtype)


def _sum_to_bias(da: Tensor, dims: tuple[int, ...], bias: Tensor) -> Tensor:
    return da.sum(dims, dtype=_wide(da.dtype)).to(bias.dtype)


# linear ---------------------------------------------------------------------------------------------------------------


def _linear_norm(x: Tensor) -> Tensor:
    n = torch.empty(x.shape[0], dtype=_wide(x.dtype))
    _cpp().linear_norm(x, n)
    return n


def linear_forward(x, weight, bias, b, b_tensor, normalize_weight, max_out, keep):
    """x (M, K), weight (N·max_out, K) → y (M, N), n (M,), a (M, N) and winning units where kept."""
    mode, exponent = _mode(b, b_tensor)
    x, weight = x.contiguous(), weight.contiguous()
    if normalize_weight:
        weight = _normalized(weight)
    a = F.linear(x, weight, bias)
    n = None if mode == 1 else _linear_norm(x)
    shape = (x.shape[0], weight.shape[0] // max_out)
    y, kept, index = _scaled(a, n, (1, *shape, 1, True), shape, mode, exponent, max_out, keep)
    return y, _nothing(x, _wide(x.dtype)) if n is None else n, kept, index


def linear_backward(
    dy, x, weight, bias, b, b_tensor, y, n, a, index, normalize_weight, max_out, detach, need_dx, need_dw, need_dbias,
    need_db,
):  # fmt: skip
    """Gradients (dx, dw, dbias, db) from y and n, or from a; y None: a is computed again."""
    mode, exponent = _mode(b, b_tensor)
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    w = _normalized(weight) if normalize_weight else weight
    shape = (x.shape[0], weight.shape[0] // max_out)
    layout = (1, *shape, 1, True)
    source, from_a = _source(mode, dy, y, a)
    if source is None:
        source, _, _ = _scaled(F.linear(x, w, bias), None, layout, shape, 1, 0.0, max_out, False)
    n = n.contiguous() if mode == 1 or n.numel() == x.shape[0] else _linear_norm(x)
    da, q, db = _scaled_backward(
        dy, source.contiguous(), index.contiguous(), n, layout, (x.shape[0], weight.shape[0]), mode, exponent, max_out,
        from_a, detach, need_db, True,
    )  # fmt: skip
    dx = dw = None
    if need_dx:
        dx = da @ w
        if q is not None:
            _cpp().linear_norm_backward(q, x, dx, dx)
    if need_dw:
        dw = da.float().t() @ x.float() if _projects_in_float32(weight, normalize_weight) else da.t() @ x
        if normalize_weight:
            dw = _weight_gradient(dw, weight)
    dbias = _sum_to_bias(da, (0,), bias) if need_dbias else None
    return dx, dw, dbias, _scalar_gradient(db, need_db, x)


def _source(mode: int, dy: Tensor, y: Tensor | None, a: Tensor) -> tuple[Tensor | None, bool]:
    """What the backward is built from, and whether that is a; None where a has to be computed again."""
    if mode == 1:
        return dy, False
    if a.numel() or not dy.numel():
        return (a if a.numel() else dy), True
    if mode == 2 and y is not None:
        return y, False
    return None, True


def _scalar_gradient(db: Tensor | None, needed: bool, x: Tensor) -> Tensor | None:
    return db if db is not None or not needed else torch.zeros((), dtype=_wide(x.dtype))


# conv2d ---------------------------------------------------------------------------------------------------------------


def _window(weight: Tensor, stride, padding, dilation) -> tuple[int, ...]:
    return (weight.shape[2], weight.shape[3], *stride, *padding, *dilation)


def _out_size(x: Tensor, weight: Tensor, stride, padding, dilation) -> tuple[int, int]:
    return tuple(
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )


def _conv2d_norm(x, weight, stride, padding, dilation, groups, channels_last) -> Tensor:
    size = _out_size(x, weight, stride, padding, dilation)
    n = torch.empty((x.shape[0], groups, *size), dtype=_wide(x.dtype))
    _cpp().conv2d_norm(x, n, channels_last, *_window(weight, stride, padding, dilation))
    return n


def _in_layout(t: Tensor, channels_last: bool) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _convolution(x, weight, bias, stride, padding, dilation, groups, channels_last) -> Tensor:
    return _in_layout(F.conv2d(x, weight, bias, stride, padding, dilation, groups), channels_last)


def conv2d_forward(x, weight, bias, stride, padding, dilation, groups, b, b_tensor, normalize_weight, max_out, keep):
    """x (N, C, H, W), weight (O·max_out, C/G, R, S) → y (N, O, P, Q), n (N, G, P, Q); a, winning units where kept."""
    mode, exponent = _mode(b, b_tensor)
    channels_last = _is_channels_last(x) or _is_channels_last(weight)
    x, weight = _in_layout(x, channels_last), _dense_weight(weight)
    if normalize_weight:
        weight = _normalized(weight)
    a = _convolution(x, weight, bias, stride, padding, dilation, groups, channels_last)
    n = None if mode == 1 else _conv2d_norm(x, weight, stride, padding, dilation, groups, channels_last)
    shape = (a.shape[0], a.shape[1] // max_out, a.shape[2], a.shape[3])
    layout = (shape[0], shape[2] * shape[3], shape[1], groups, channels_last)
    y, kept, index = _scaled(a, n, layout, shape, mode, exponent, max_out, keep)
    return y, _nothing(x, _wide(x.dtype)) if n is None else n, kept, index


def conv2d_backward(
    dy, x, weight, bias, stride, padding, dilation, groups, b, b_tensor, y, n, a, index, normalize_weight, max_out,
    detach, need_dx, need_dw, need_dbias, need_db,
):  # fmt: skip
    """Gradients (dx, dw, dbias, db) from y and n, or from a; y None: a is computed again."""
    mode, exponent = _mode(b, b_tensor)
    channels_last = _is_channels_last(x) or _is_channels_last(weight)
    dy, x, weight = _in_layout(dy, channels_last), _in_layout(x, channels_last), _dense_weight(weight)
    w = _normalized(weight) if normalize_weight else weight
    shape = tuple(dy.shape)
    layout = (shape[0], shape[2] * shape[3], shape[1], groups, channels_last)
    source, from_a = _source(mode, dy, y, a)
    if source is None:
        product = _convolution(x, w, bias, stride, padding, dilation, groups, channels_last)
        source, _, _ = _scaled(product, None, layout, shape, 1, 0.0, max_out, False)
    if mode != 1 and n.numel() != shape[0] * groups * shape[2] * shape[3]:
        n = _conv2d_norm(x, weight, stride, padding, dilation, groups, channels_last)
    n = n.contiguous()
    units = (shape[0], weight.shape[0], shape[2], shape[3])
    index = _in_layout(index, channels_last) if index.dim() == 4 else index
    da, q, db = _scaled_backward(
        dy, _in_layout(source, channels_last), index, n, layout, units, mode, exponent, max_out, from_a, detach,
        need_db, False,
    )  # fmt: skip
    dx = dw = None
    wide_dw = need_dw and _projects_in_float32(weight, normalize_weight)
    window = (None, stride, padding, dilation, False, (0, 0), groups)
    if need_dx or need_dw and not wide_dw:
        wanted = (need_dx, need_dw and not wide_dw, False)
        dx, dw, _ = torch.ops.aten.convolution_backward(da, x, w, *window, wanted)
    if wide_dw:
        _, dw, _ = torch.ops.aten.convolution_backward(da.float(), x.float(), w.float(), *window, (False, True, False))
    if need_dx and q is not None:
        dx = _in_layout(dx, channels_last)
        _cpp().conv2d_norm_backward(q, x, dx, dx, channels_last, *_window(weight, stride, padding, dilation))
    if need_dw and normalize_weight:
        dw = _weight_gradient(dw, weight)
    dbias = _sum_to_bias(da, (0, 2, 3), bias) if need_dbias else None
    return dx if need_dx else None, dw if need_dw else None, dbias, _scalar_gradient(db, need_db, x)


# batch_norm_uncentered ------------------------------------------------------------------------------------------------


def _dense(x: Tensor) -> tuple[Tensor, tuple[int, int, int, bool]]:
    """x in a dense layout and (images, pixels, channels, channels innermost)."""
    pixels = x.numel() // max(x.shape[0] * x.shape[1], 1)
    if x.dim() == 2 or _is_channels_last(x):
        return x if x.dim() == 4 else x.contiguous(), (x.shape[0], pixels, x.shape[1], True)
    return x.contiguous(), (x.shape[0], pixels, x.shape[1], False)


def _like(t: Tensor | None, x: Tensor) -> Tensor | None:
    """t in the dense layout of x."""
    if t is None:
        return None
    return t.contiguous(memory_format=torch.channels_last if _is_channels_last(x) else torch.contiguous_format)


def _vector(v: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if v is None else v.detach().to(dtype).contiguous()


def batch_norm_uncentered_forward(x, weight, bias, residual, running_var, training, eps, activation):
    """y = act(x/√(var + eps)·w + bias + residual); (y, mean, var), mean empty in eval mode."""
    dtype = _wide(x.dtype)
    x, layout = _dense(x)
    y = torch.empty_like(x)
    if not training:
        # a copy: an op may not return one of its inputs
        mean, var = None, running_var.detach().to(dtype, copy=True).contiguous()
    elif x.numel():
        mean, var = torch.empty(x.shape[1], dtype=dtype), torch.empty(x.shape[1], dtype=dtype)
    else:
        mean = var = torch.full((x.shape[1],), torch.nan, dtype=dtype)
        return y, mean, var.clone()
    if x.numel():
        _cpp().batch_norm(
            x, y, _like(residual, x), _vector(weight, dtype), _vector(bias, dtype), mean, var, training, eps,
            activation == "relu", *layout,
        )  # fmt: skip
    return y, _nothing(x, dtype) if mean is None else mean, var


def batch_norm_uncentered_backward(
    dy, x, y, weight, bias, mean, var, training, eps, activation, detach, need_dx, need_dweight, need_dbias,
    need_dresidual,
):  # fmt: skip
    """Gradients (dx, dweight, dbias, dresidual); y is read for the ReLU mask."""
    dtype = _wide(x.dtype)
    x, layout = _dense(x)
    dy = _like(dy, x)
    dx = torch.empty_like(x) if need_dx else None
    vectors = [torch.zeros(x.shape[1], dtype=dtype) if need else None for need in (need_dweight, need_dbias)]
    dresidual = None
    if need_dresidual:
        dresidual = torch.empty_like(x) if activation else dy.clone()
    if x.numel():
        _cpp().batch_norm_backward(
            dy, x, _like(y, x) if activation else None, _vector(weight, dtype), mean.contiguous() if training else None,
            var.contiguous(), eps,
            training and not detach and need_dx, dx, *vectors, dresidual if activation else None, *layout,
        )  # fmt: skip
    dweight = vectors[0].to(weight.dtype) if need_dweight else None
    dbias = vectors[1].to(bias.dtype) if need_dbias else None
    return dx, dweight, dbias, dresidual
