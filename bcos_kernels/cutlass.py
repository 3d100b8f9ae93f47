"""The variant "cutlass" of the CUDA backend: CUTLASS's kernels in the place of a product and the pass behind it, for
the calls that they take. cutlass_build.py builds them, on request only: some for Hopper, and some for sm_80 that every
other device from compute capability 8.0 on takes.

    linear forward       x and w → y with 1/n given; on Hopper, where nothing keeps n, with the norms summed beside the
                         products
    linear gradient      ∂L/∂a, w, x and q → dx with the norm's term; alone and with a GELU behind it
    conv2d forward       x and w → y with 1/n given
    conv2d gradient      ∂L/∂a, w, x and q → dx with the norm's term, stride 1; alone and with a BatchNorm behind it

A 1×1 convolution without stride and padding is a product over pixels and takes the kernels of linear layers: Hopper's
are persistent and load the next tile while one is written, whereas CUTLASS's convolution takes one tile a program, and
only one such program fits a multiprocessor; those for sm_80 do without a convolution's index arithmetic. Every other
call is cuda.py's own, so that the variant takes whatever the backend takes. cuda.py asks here inside `running` alone,
which also tells whether a kernel of these ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import cutlass_build

if TYPE_CHECKING:
    from .cuda import _Layer

_NAMESPACE = "bcos_kernels_cutlass"
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_ALIGNMENT = 8  # elements in the 16 bytes that copies to shared memory move
_LIMIT = 2**31  # CUTLASS counts rows, columns and pixels in 32 bits, and bytes of sm_80's convolutions
_STRIDES = 8  # the most of the im2col mode of Hopper's tensor memory accelerator
_WINDOW = 32  # bits of the masks with which sm_80's convolutions predicate their loads


class Use:
    """What `running` tells: ``ran``, whether any of the kernels was launched."""

    ran = False


_use: ContextVar[Use | None] = ContextVar("bcos_kernels_cutlass", default=None)


@contextmanager
def running() -> Iterator[Use]:
    """Inside, launchers of cuda.py use these kernels for what they take."""
    use = Use()
    token = _use.set(use)
    try:
        yield use
    finally:
        _use.reset(token)


@cache
def unusable_reason() -> str | None:
    """Why these kernels cannot run here, or None. Loads their library on the first call, and never builds it."""
    from . import cuda

    reason = cuda.unusable_reason()
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability()
    name = ".".join(map(str, capability))
    if not cutlass_build.kinds_for(capability):
        return f"its kernels are for compute capability 8.0 and later, got {name}"
    library = cutlass_build.built()
    if library is None:
        return cutlass_build.unbuildable_reason() or "not built: python -m bcos_kernels.cutlass_build, minutes of nvcc"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"its library {library} does not load: {error}"
    if _kinds().isdisjoint(cutlass_build.kinds_for(capability)):
        return f"its library holds no kernel for compute capability {name}: python -m bcos_kernels.cutlass_build"
    return None


@cache
def _op(name: str):
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


@cache
def _kinds() -> frozenset[str]:
    """The kernels that the library holds."""
    return frozenset(line.split()[0] for line in _op("kernels")().splitlines())


# --- what the kernels take: the checks of csrc/cuda/cutlass/ops.cpp ---------------------------------------------------


@cache
def _suffix(device: torch.device) -> str:
    """What the names of the kernels that a device takes end in."""
    return "" if torch.cuda.get_device_capability(device) == (9, 0) else "_sm80"


def _has(stem: str, x: Tensor) -> bool:
    return x.dtype in _DTYPES and f"{stem}{_suffix(x.device)}_{_DTYPES[x.dtype]}" in _kinds()


def _is_aligned(t: Tensor) -> bool:
    return t.is_meta or t.data_ptr() % 16 == 0


def _are_operands(*tensors: Tensor) -> bool:
    """Of one type, densely packed with channels innermost, at addresses and of sizes that the kernels count with."""
    dense = torch.channels_last if tensors[0].dim() == 4 else torch.contiguous_format
    return all(
        t.dtype == tensors[0].dtype
        and t.is_contiguous(memory_format=dense)
        and _is_aligned(t)
        and t.numel() > 0
        and max(t.shape) < _LIMIT
        for t in tensors
    )


def takes_linear(x: Tensor, weight: Tensor) -> bool:
    """x (M, K), weight (N, K)."""
    return _are_operands(x, weight) and weight.shape[0] % _ALIGNMENT == 0 and weight.shape[1] % _ALIGNMENT == 0


def takes_conv2d(
    x: Tensor, weight: Tensor, outputs: tuple[int, int], stride: tuple[int, int], groups: int, is_sm80: bool
) -> bool:
    """x (N, C, H, W), weight (O, C, R, S), outputs (P, Q)."""
    images, channels, height, width = x.shape
    if is_sm80:
        elements = max(x.numel(), weight.numel(), images * outputs[0] * outputs[1] * weight.shape[0])
        fits = max(weight.shape[2:]) <= _WINDOW and elements * x.element_size() < _LIMIT
    else:
        fits = max(stride) <= _STRIDES
    return (
        groups == 1
        and _are_operands(x, weight)
        and channels % _ALIGNMENT == 0
        and weight.shape[0] % _ALIGNMENT == 0
        and fits
        and images * height * width < _LIMIT
        and images * outputs[0] * outputs[1] < _LIMIT
    )


# --- calling them -----------------------------------------------------------------------------------------------------


def _launch(stem: str, *arguments) -> Tensor:
    """The kernel of that stem that the tensors' device takes."""
    made = _op(stem + _suffix(arguments[0].device))(*arguments)
    _use.get().ran = True
    return made


def _reciprocal_weight_norm(layer: _Layer) -> Tensor | None:
    """1/‖w‖ of every unit, 0 for a unit without weights; None where weights are taken as they are."""
    if not layer.normalize_weight:
        return None
    weight = layer.weight
    norm = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim())), dtype=torch.float32)
    return torch.where(norm == 0, 0.0, norm.reciprocal())


def _as_matrix(t: Tensor) -> Tensor:
    """(N, C, H, W) with channels innermost as (N·H·W, C): a view."""
    if t.dim() == 2:
        return t
    images, channels, height, width = t.shape
    return t.permute(0, 2, 3, 1).reshape(images * height * width, channels)


def _like(rows: Tensor, t: Tensor) -> Tensor:
    """(N·H·W, C) as images of the sizes of t, its channels innermost; a matrix stays one."""
    if t.dim() == 2:
        return rows
    return rows.view(t.shape[0], *t.shape[2:], rows.shape[1]).permute(0, 3, 1, 2)


def forward(layer: _Layer, mode: int, max_out: int, keep: bool, squares: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """(y, n) of a layer, or None for a call that is cuda.py's own: any but B = 2 without bias and max_out, and where a
    has to be kept. Where the squares are summed beside the products, n is left unwritten: nothing is kept then, so that
    nobody reads it."""
    x, weight = layer.x, layer.weight
    if _use.get() is None or mode != 2 or max_out > 1 or layer.bias is not None:
        return None
    if keep and x.dtype == torch.float16:
        return None
    if layer.is_linear and not keep and squares is None and _has("linear_norm_forward", x):
        if not takes_linear(x, weight):
            return None
        n = torch.empty((x.shape[0],), dtype=torch.float32, device=x.device)
        return _launch("linear_norm_forward", x, weight, _reciprocal_weight_norm(layer)), n
    if _is_product(layer) and _has("linear_forward", x):
        rows, units = _as_matrix(x), _as_matrix(weight)
        if not takes_linear(rows, units):
            return None
        n = layer.norms(squares)
        y = _launch("linear_forward", rows, units, n.reciprocal().view(-1), _reciprocal_weight_norm(layer))
        return _like(y, x), n
    if layer.is_linear or not _has("conv2d_forward", x):
        return None
    if not takes_conv2d(x, weight, layer.windows()[2:], layer.stride, layer.groups, _suffix(x.device) == "_sm80"):
        return None
    n = layer.norms(squares)
    window = (*layer.stride, *layer.padding, *layer.dilation)
    return _launch("conv2d_forward", x, weight, n.reciprocal(), _reciprocal_weight_norm(layer), *window), n


def backward_dx(layer: _Layer, da: Tensor, q: Tensor | None) -> Tensor | None:
    """dx = ∂L/∂a · w (of a convolution: transposed) + x ⊙ (transposed box filter of q), q (M,) or (N, 1, P, Q). None
    for a call that is cuda.py's own: without q, where the library's product is all there is to do, and of a convolution
    with a stride, which neither kernel computes (Hopper's takes it, wrongly)."""
    if _use.get() is None or q is None or layer.stride != (1, 1):
        return None
    x, w = layer.x, layer.w
    if _is_product(layer) and _has("linear_backward_dx", x):
        rows, units, gradient = _as_matrix(x), _as_matrix(w), _as_matrix(da)
        if not takes_linear(rows, units) or not _are_operands(rows, gradient):
            return None
        return _like(_launch("linear_backward_dx", gradient, units, rows, q.reshape(-1)), x)
    if layer.is_linear or not _has("conv2d_backward_dx", x):
        return None
    if not _are_operands(x, da):
        return None
    if not takes_conv2d(x, w, da.shape[2:], layer.stride, layer.groups, _suffix(x.device) == "_sm80"):
        return None
    window = (*layer.stride, *layer.padding, *layer.dilation)
    return _launch("conv2d_backward_dx", da, w, x, layer.spread(q), *window)


def _is_product(layer: _Layer) -> bool:
    return layer.is_pointwise and layer.groups == 1
