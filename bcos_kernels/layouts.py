"""Strides of the ops' tensors: what a launcher may rely on, and what it has to return.

Dimensions of size 1 leave strides open. Ops return exactly the strides that their fakes announce, and libraries err on
odd ones, so a launcher that does not see to both itself is wrapped here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from inspect import signature

import torch
from torch import Tensor

from .composed import sum_squares


def is_channels_last(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


def own_format(t: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(t) else torch.contiguous_format


def memory_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The layout of a convolution's output: channels_last if the input or the weight is."""
    either = is_channels_last(x) or is_channels_last(weight)
    return torch.channels_last if either else torch.contiguous_format


def norms_format(x: Tensor, weight: Tensor, groups: int) -> torch.memory_format:
    """The layout of a convolution's norms (N, G, P, Q): the output's, so that both are read alike; one group leaves
    nothing to choose."""
    return memory_format(x, weight) if groups > 1 else torch.contiguous_format


def _strides(shape: torch.Size, format_: torch.memory_format) -> tuple[int, ...]:
    if format_ == torch.channels_last:
        _, c, h, w = shape
        return (h * w * c, 1, w * c, c)
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step = step * max(size, 1)
    return tuple(reversed(strides))


def canonical(t: Tensor) -> Tensor:
    """t with the usual strides in its dimensions of size 1, which leave them open.

    Others make the library's convolutions err: of a channels_last weight (O, C, 1, S) with strides (C S, 1, C, C),
    grouped ones in float32 return wrong values, some in float16 raise.
    """
    if 1 not in t.shape or not t.numel():
        return t
    format_ = torch.contiguous_format if t.is_contiguous() else torch.channels_last
    if not t.is_contiguous(memory_format=format_):
        return t
    strides = _strides(t.shape, format_)
    return t if t.stride() == strides else t.as_strided(t.shape, strides)


def with_layout(t: Tensor, format_: torch.memory_format) -> Tensor:
    """t in exactly the strides that the fake announces (dimensions of size 1 leave strides open)."""
    t = t.contiguous(memory_format=format_)
    if 1 not in t.shape and t.numel():
        return t
    if not t.numel():
        return torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=format_)
    strides = _strides(t.shape, format_)
    if t.stride() == strides:
        return t
    # Same storage, but no view of t: autograd forbids in-place changes (`out += identity`) of a Function's view.
    return t.new_empty((0,)).set_(t.untyped_storage(), t.storage_offset(), t.shape, strides)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else with_layout(t, torch.contiguous_format)


def _as(t: Tensor | None, format_: torch.memory_format) -> Tensor | None:
    return t if t is None or t.dim() < 2 else with_layout(t, format_)


@cache
def _takes(launch: Callable, argument: str) -> bool:
    return argument in signature(launch).parameters


# A launcher may know nothing of the last argument of the forwards, what a producer has left or is to leave of Σ_c x²
# (squares.py): its kernels compute norms themselves, and the sums are one pass here.


def _with_squares(launch: Callable, arguments: tuple) -> tuple:
    return arguments if _takes(launch, "squares") else arguments[:-1]


def _linear_forward(launch: Callable, *arguments) -> tuple:
    return tuple(map(_contiguous, launch(*_with_squares(launch, arguments))))


def _dense(launch: Callable, *arguments) -> tuple:
    return tuple(map(_contiguous, launch(*arguments)))


def _conv2d_forward(launch: Callable, x, weight, *options) -> tuple:
    x, weight = canonical(x), canonical(weight)
    y, n, a, index = launch(x, weight, *_with_squares(launch, options))
    format_ = memory_format(x, weight)
    return _as(y, format_), _as(n, norms_format(x, weight, options[4])), _as(a, format_), _as(index, format_)


def _conv2d_backward(launch: Callable, dy, x, weight, *options) -> tuple:
    dy, x, weight = canonical(dy), canonical(x), canonical(weight)
    dx, dw, dbias, db = launch(dy, x, weight, *options)
    return _as(dx, memory_format(x, weight)), _as(dw, own_format(weight)), dbias, db


def _batch_norm_uncentered_forward(launch: Callable, x, *options) -> tuple:
    if _takes(launch, "emits_squares"):
        y, mean, var, squares = launch(x, *options)
    else:
        y, mean, var = launch(x, *options[:-1])
        squares = sum_squares(y) if options[-1] else var.new_empty((0,))
    return _as(y, own_format(x)), mean, var, squares


def _batch_norm_uncentered_backward(launch: Callable, dy, x, *options) -> tuple:
    dx, dweight, dbias, dresidual = launch(dy, x, *options)
    return _as(dx, own_format(x)), dweight, dbias, _as(dresidual, own_format(x))


def _conv2d_batch_norm_forward(launch: Callable, x, weight, *options) -> tuple:
    x, weight = canonical(x), canonical(weight)
    z, squares, y, n, a, index, mean, var = launch(x, weight, *options)
    format_ = memory_format(x, weight)
    z, y, a, index = (_as(t, format_) for t in (z, y, a, index))
    return z, squares, y, _as(n, norms_format(x, weight, options[9])), a, index, mean, var


def _conv2d_batch_norm_backward(launch: Callable, dz, x, weight, *options) -> tuple:
    dz, x, weight = canonical(dz), canonical(x), canonical(weight)
    dx, dw, *others, dresidual = launch(dz, x, weight, *options)
    format_ = memory_format(x, weight)
    return _as(dx, format_), _as(dw, own_format(weight)), *others, _as(dresidual, format_)


_AROUND = {
    "linear_forward": _linear_forward,
    "linear_backward": _dense,
    "conv2d_forward": _conv2d_forward,
    "conv2d_backward": _conv2d_backward,
    "batch_norm_uncentered_forward": _batch_norm_uncentered_forward,
    "batch_norm_uncentered_backward": _batch_norm_uncentered_backward,
    "conv2d_batch_norm_forward": _conv2d_batch_norm_forward,
    "conv2d_batch_norm_backward": _conv2d_batch_norm_backward,
    "linear_gelu_forward": _dense,
    "linear_gelu_backward": _dense,
}


def strict(name: str, launch: Callable) -> Callable:
    """Launcher ``name`` with canonical strides in and the announced strides out."""
    around = _AROUND[name]

    @wraps(launch)
    def launcher(*arguments):
        return around(launch, *arguments)

    return launcher
