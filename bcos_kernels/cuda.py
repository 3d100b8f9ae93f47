"""The CUDA C++ backend: the library's convolutions and matrix products, with the fused passes of csrc/cuda around them.

Activations are taken with channels innermost (channels_last, linear); other layouts are copied to that first. What a
layer adds to the plain one's traffic is one pass in place over its output, one over its input where no producer has
left the sums of squares, and two in the backward. With a BatchNorm behind it the scaling is part of the
normalisation's passes: the convolution's own output a is kept in the place of y, y is never stored, and as many bytes
move as in the plain network.

That is the variant "library"; in the variant "cutlass" kernels of cutlass.py stand in for a product with its pass where
they take the call.
"""

from __future__ import annotations

from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from . import composed, cutlass
from .layouts import memory_format, norms_format, own_format, with_layout

STRICT_LAYOUTS = True  # takes any strides, and returns those that the ops' fakes announce
VARIANTS = {"cutlass": cutlass}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LIBRARY = Path(__file__).parent / "_lib" / "libbcos_kernels_cuda.so"
_NAMESPACE = "bcos_kernels_cuda"
_SQUARES, _LINEAR, _WINDOW = 0, 1, 2  # what the sums of squares become
_SHORT = 32  # values of a weight whose projection in 16 bits would show the rounding of its gradient


@cache
def unusable_reason() -> str | None:
    """Why this backend cannot run here, or None. Loads the op library on the first call."""
    from .dispatch import build_report

    if not _LIBRARY.exists():
        return build_report().get("cuda") or f"its library {_LIBRARY.name} is missing from the installation"
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"its library {_LIBRARY.name} does not load: {error}"
    return None


@cache
def _op(name: str):
    return getattr(getattr(torch.ops, _NAMESPACE), name).default


# Tensors --------------------------------------------------------------------------------------------------------------


def _check(op: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        built = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise NotImplementedError(f"{op}: the cuda backend is built for {built}, got {x.dtype}")


def _rows(t: Tensor | None) -> Tensor | None:
    """t with its channels innermost."""
    if t is None:
        return None
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.contiguous()


def _new(t: Tensor, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a tensor like t, of its shape unless another is given, with its channels innermost."""
    shape = t.shape if shape is None else shape
    format_ = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or t.dtype, device=t.device, memory_format=format_)


def _floats(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _nothing(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty((0,), dtype=dtype or x.dtype)


def _present(t: Tensor | None) -> Tensor | None:
    return t if t is not None and t.numel() else None


def _mode(b: float, b_tensor: Tensor | None) -> tuple[int, float]:
    """(1, 2 or 0 for any other B, the exponent B − 1); of a tensor the kernels read the value."""
    if b_tensor is not None:
        return 0, 0.0
    return (int(b) if b in (1, 2) else 0), b - 1.0


# Layers ---------------------------------------------------------------------------------------------------------------


class _Layer:
    """A linear layer (window None) or a convolution: its product, its norms and its gradients from ∂L/∂a."""

    def __init__(self, x, weight, bias, normalize_weight, window=None):
        self.is_linear = window is None
        self.x, self.weight, self.bias = _rows(x), _rows(weight), bias
        self.normalize_weight = normalize_weight
        self.stride, self.padding, self.dilation, self.groups = window or ((1, 1), (0, 0), (1, 1), 1)
        self.kernel = (1, 1) if self.is_linear else tuple(weight.shape[2:])

    @cached_property
    def w(self) -> Tensor:
        """The weight that is multiplied by: w/‖w‖ where it is normalised."""
        if not self.normalize_weight:
            return self.weight
        w = _new(self.weight)
        _op("normalize_weight")(w, self.weight)
        return w

    @property
    def is_pointwise(self) -> bool:
        """Whether the windows are the pixels, or the rows of a linear layer."""
        return self.kernel == (1, 1) and self.padding == (0, 0) and self.stride == (1, 1)

    @property
    def geometry(self) -> tuple[int, ...]:
        return (*self.kernel, *self.stride, *self.padding, *self.dilation)

    def product(self) -> Tensor:
        if not self.is_linear:
            window = (self.stride, self.padding, self.dilation, self.groups)
            return _rows(torch.conv2d(self.x, self.w, self.bias, *window))
        if self.bias is None:
            return torch.mm(self.x, self.w.t())
        return torch.addmm(self.bias, self.x, self.w.t())

    def norms(self, squares: Tensor | None = None) -> Tensor:
        """(N, G, P, Q), or (M,) of a linear layer; float32."""
        x, kind = self.x, _LINEAR if self.is_linear else _WINDOW
        n = _new(x, self.windows(), torch.float32)
        squares = squares if self.groups == 1 else None
        if self.is_pointwise and squares is not None:
            _op("norms_of_squares")(n, squares.contiguous(), kind)
        elif self.is_pointwise:
            _op("segment_norms")(n, x, self.groups, kind)
        else:
            if squares is None and x.shape[1] != self.groups:
                squares = _new(x, (x.shape[0], self.groups, *x.shape[2:]), torch.float32)
                _op("segment_norms")(squares, x, self.groups, _SQUARES)
            _op("window_norms")(n, squares, x, *self.geometry, self.groups)
        return n

    def windows(self) -> tuple[int, ...]:
        """The norms' shape."""
        if self.is_linear:
            return (self.x.shape[0],)
        out = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                self.x.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        ]
        return (self.x.shape[0], self.groups, *out)

    def spread(self, q: Tensor) -> Tensor:
        """What x is multiplied by in dx, (N, 1, H, W): the sum of q over the windows that hold a pixel; one group."""
        if self.is_pointwise:
            return q
        ones = torch.ones((self.x.shape[0], 1, *self.x.shape[2:]), dtype=torch.float32, device=q.device)
        under = torch.zeros_like(ones)
        _op("add_norm_term")(under, ones, q, *self.geometry, 1)
        return under

    def gradients(self, da, q, need_dx, need_dw, need_dbias) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dx, dw, dbias) from ∂L/∂a (shape of the units) and q = (∂L/∂n)/|p|, None where nothing flows through n."""
        dw = dbias = None
        dx = cutlass.backward_dx(self, da, q) if need_dx else None
        fused = dx is not None
        depth = self.weight.numel() // max(self.weight.shape[0], 1)
        wider = self.normalize_weight and need_dw and self.x.dtype != torch.float32 and depth <= _SHORT
        if self.is_linear:
            if need_dx and not fused:
                dx = torch.mm(da, self.w)
            if need_dw:
                dw = torch.mm(da.t(), self.x) if not wider else torch.mm(da.float().t(), self.x.float())
            if need_dbias:
                dbias = da.sum(0, dtype=torch.float32).to(da.dtype)
        else:
            needs = [need_dx and not fused, need_dw and not wider, False]
            if any(needs):
                of_library, dw, _ = self._convolution_backward(da, self.x, self.w, needs)
                dx = dx if fused else of_library
            if wider:
                tensors = (t.float() for t in (da, self.x, self.w))
                _, dw, _ = self._convolution_backward(*tensors, [False, True, False])
            if need_dbias:
                dbias = da.sum((0, 2, 3), dtype=torch.float32).to(da.dtype)
        if need_dx and q is not None and not fused:
            dx = _rows(dx)
            _op("add_norm_term")(dx, self.x, q, *self.geometry, self.groups)
        if need_dw and self.normalize_weight:
            gradient, weight = _rows(dw), self.weight.to(dw.dtype)
            dw = _new(weight)
            _op("weight_norm_backward")(dw, gradient, weight)
            dw = dw.to(self.weight.dtype)
        return dx, dw, dbias

    def _convolution_backward(self, da, x, w, needs):
        return torch.ops.aten.convolution_backward(
            da, x, w, None, self.stride, self.padding, self.dilation, False, (0, 0), self.groups, needs
        )


def _forward(layer: _Layer, b, b_tensor, max_out, keep, squares) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, n, a, index) with channels innermost, what is not kept being empty."""
    mode, exponent = _mode(b, b_tensor)
    by_cutlass = cutlass.forward(layer, mode, max_out, keep, squares)
    if by_cutlass is not None:
        return *by_cutlass, _nothing(layer.x), _nothing(layer.x, torch.uint8)
    units = layer.product()
    n = _nothing(units, torch.float32) if mode == 1 else layer.norms(squares)
    y, a, index = units, _nothing(units), _nothing(units, torch.uint8)
    if mode == 1 and max_out == 1:
        return y, n, a, index
    keeps_a = keep and (mode == 0 or (mode == 2 and units.dtype == torch.float16))
    outputs = (units.shape[0], units.shape[1] // max_out, *units.shape[2:])
    kept = None
    if max_out > 1:
        y = _new(units, outputs)
        if keeps_a:
            a = kept = _new(units, outputs)
        if keep:
            index = _new(units, outputs, torch.uint8)
    elif keeps_a:
        y, a = _new(units), units
    norms, b_tensor = (n if mode != 1 else None), _floats(b_tensor)
    _op("scale")(y, kept, _present(index), units, norms, b_tensor, layer.groups, max_out, mode, exponent)
    return y, n, a, index


def _maximum(layer: _Layer, max_out: int) -> Tensor:
    """a, computed again."""
    units = layer.product()
    if max_out == 1:
        return units
    a = _new(units, (units.shape[0], units.shape[1] // max_out, *units.shape[2:]))
    _op("scale")(a, None, None, units, None, None, layer.groups, max_out, 1, 0.0)
    return a


def _backward(
    layer: _Layer, dy, b, b_tensor, y, n, a, index, max_out, detach, need_dx, need_dw, need_dbias, need_db
):  # fmt: skip
    """(dx, dw, dbias, db) with channels innermost."""
    mode, exponent = _mode(b, b_tensor)
    dy = _rows(dy)
    from_a = not (mode == 2 and y is not None and not a.numel())
    if mode == 1:
        source = dy
    elif not from_a:
        source = _rows(y)
    else:
        source = _rows(a) if a.numel() or not dy.numel() else _maximum(layer, max_out)
    norms = None
    if mode != 1:
        norms = _rows(n) if n.numel() else layer.norms()
    passes_through = mode != 1 and not detach and need_dx
    q = _new(norms) if passes_through else None
    da = dy
    db = None
    if mode != 1 or max_out > 1:
        da = _new(dy, (dy.shape[0], dy.shape[1] * max_out, *dy.shape[2:]))
        winners = _rows(index) if max_out > 1 else None
        partial = _op("scale_backward")(
            da, q, dy, source, winners, norms, _floats(b_tensor), layer.groups, max_out, mode, exponent, from_a, detach,
            layer.is_linear, need_db,
        )  # fmt: skip
        db = partial.sum() if need_db else None
    return *layer.gradients(da, q, need_dx, need_dw, need_dbias), db


# Launchers ------------------------------------------------------------------------------------------------------------


def linear_forward(x, weight, bias, b, b_tensor, normalize_weight, max_out, keep, squares):
    """x (M, K), weight (N·max_out, K) → y (M, N), n (M,), a (M, N) and winning units where kept."""
    _check("linear", x)
    return _forward(_Layer(x, weight, bias, normalize_weight), b, b_tensor, max_out, keep, squares)


def linear_backward(
    dy, x, weight, bias, b, b_tensor, y, n, a, index, normalize_weight, max_out, detach, need_dx, need_dw, need_dbias,
    need_db,
):  # fmt: skip
    """Gradients (dx, dw, dbias, db) from y and n, or from a; y None: a is computed again."""
    _check("linear", x)
    layer = _Layer(x, weight, bias, normalize_weight)
    return _backward(
        layer, dy, b, b_tensor, y, n, a, index, max_out, detach, need_dx, need_dw, need_dbias, need_db
    )  # fmt: skip


def conv2d_forward(
    x, weight, bias, stride, padding, dilation, groups, b, b_tensor, normalize_weight, max_out, keep, squares
):
    """x (N, C, H, W), weight (O·max_out, C/G, R, S) → y (N, O, P, Q), n (N, G, P, Q); a, winning units where kept."""
    _check("conv2d", x)
    layer = _Layer(x, weight, bias, normalize_weight, (stride, padding, dilation, groups))
    y, n, a, index = _forward(layer, b, b_tensor, max_out, keep, squares)
    return _announced(y, n, a, index, x, weight, groups)


def _announced(y, n, a, index, x, weight, groups) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is kept of a convolution in the strides that its fake has."""
    format_ = memory_format(x, weight)
    y, a, index = (with_layout(t, format_) if t.dim() == 4 else t for t in (y, a, index))
    return y, with_layout(n, norms_format(x, weight, groups)) if n.dim() == 4 else n, a, index


def conv2d_backward(
    dy, x, weight, bias, stride, padding, dilation, groups, b, b_tensor, y, n, a, index, normalize_weight, max_out,
    detach, need_dx, need_dw, need_dbias, need_db,
):  # fmt: skip
    """Gradients (dx, dw, dbias, db) from y and n, or from a; y None: a is computed again."""
    _check("conv2d", x)
    layer = _Layer(x, weight, bias, normalize_weight, (stride, padding, dilation, groups))
    dx, dw, dbias, db = _backward(
        layer, dy, b, b_tensor, y, n, a, index, max_out, detach, need_dx, need_dw, need_dbias, need_db
    )
    return _in_layout(dx, memory_format(x, weight)), _in_layout(dw, own_format(weight)), dbias, db


def _in_layout(t: Tensor | None, format_: torch.memory_format) -> Tensor | None:
    return None if t is None else with_layout(t, format_)


def _as_images(t: Tensor | None) -> Tensor | None:
    """(N, C, …) as a matrix or as images with channels innermost."""
    if t is None or t.dim() in (2, 4):
        return _rows(t)
    return _rows(t.reshape(t.shape[0], t.shape[1], -1, 1))


def _of_shape(t: Tensor | None, like: Tensor) -> Tensor | None:
    """Back to the shape and the layout of an activation."""
    if t is None:
        return None
    return with_layout(t, own_format(like)) if t.dim() == like.dim() else t.reshape(like.shape).contiguous()


def _sums_of_rows(like: Tensor, wanted: bool) -> Tensor:
    """Memory for the sums over channels, empty where none are wanted."""
    shape = (like.shape[0], *like.shape[2:]) if wanted else (0,)
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _statistics(v: Tensor, n: Tensor | None, weight, bias, running_var, training, eps, groups=1):
    """(mean, var, factors): the batch's, or the known variance; factors (2, C) are scale and shift."""
    channels = v.shape[1]
    factors = v.new_empty((2, channels), dtype=torch.float32)
    weight, bias = _floats(weight), _floats(bias)
    if not training:
        var = running_var.to(torch.float32, copy=True)
        _op("factors")(factors, weight, bias, var, eps)
        return _nothing(v, torch.float32), var, factors
    mean, var = v.new_empty((channels,), dtype=torch.float32), v.new_empty((channels,), dtype=torch.float32)
    _op("moments")(mean, var, factors, v, n, weight, bias, eps, groups)
    return mean, var, factors


def batch_norm_uncentered_forward(x, weight, bias, residual, running_var, training, eps, activation, emits_squares):
    """y = act(x/√(var + eps)·w + bias + residual); (y, mean, var, Σ_c y²), mean empty in eval mode."""
    _check("batch_norm_uncentered", x)
    v = _as_images(x)
    mean, var, factors = _statistics(v, None, weight, bias, running_var, training, eps)
    y, squares = _new(v), _sums_of_rows(x, emits_squares)
    _op("normalize")(
        y, None, _present(squares), v, None, _as_images(residual), factors, 1, activation == "relu"
    )  # fmt: skip
    return _of_shape(y, x), mean, var, squares


def batch_norm_uncentered_backward(
    dy, x, y, weight, bias, mean, var, training, eps, activation, detach, need_dx, need_dweight, need_dbias,
    need_dresidual,
):  # fmt: skip
    """Gradients (dx, dweight, dbias, dresidual); y is read for the ReLU's mask (None: the mask comes from x)."""
    _check("batch_norm_uncentered", x)
    mask = _as_images(y) if activation == "relu" else None
    gradients = _normalized_backward(
        _as_images(dy), _as_images(x), mask, None, weight, bias, mean, var, training, eps, activation, detach, 1,
        need_dx, False, need_dweight, need_dbias, need_dresidual,
    )  # fmt: skip
    dx, _, dweight, dbias, dresidual = gradients
    return _of_shape(dx, x), dweight, dbias, _of_shape(dresidual, x)


def _normalized_backward(
    dz, v, z, n, weight, bias, mean, var, training, eps, activation, detach, groups, need_dv, need_q, need_dweight,
    need_dbias, need_dresidual,
):  # fmt: skip
    """(∂L/∂v, or with norms n ∂L/∂a of v = a; q; dweight; dbias; dresidual) of a normalisation."""
    channels = v.shape[1]
    factors = v.new_empty((2, channels), dtype=torch.float32)
    _op("factors")(factors, _floats(weight), _floats(bias), var, eps)
    through_variance = training and not detach and need_dv
    dweight, dbias, factor = (
        v.new_empty((channels,), dtype=torch.float32) if needed else None
        for needed in (need_dweight, need_dbias, through_variance)
    )
    relu = activation == "relu"
    if need_dweight or need_dbias or through_variance:
        _op("normalize_sums")(dweight, dbias, factor, dz, v, z, n, factors, var, eps, groups, relu)
    dv = _new(v) if need_dv else None
    dresidual = _new(v) if need_dresidual else None
    q = _new(n) if need_q else None
    if need_dv or need_dresidual:
        mean = mean if through_variance else None
        _op("normalize_backward")(
            dv, q, dresidual, dz, v, z, None, n, factors, factor, mean, groups, relu, detach
        )  # fmt: skip
    dweight = None if dweight is None else dweight.to(weight.dtype)
    return dv, q, dweight, None if dbias is None else dbias.to(bias.dtype), dresidual


def _matrix(t: Tensor, dims: int) -> Tensor:
    """(rows, features): the last ``dims`` dimensions are the features."""
    features = t.shape[t.dim() - dims :].numel()
    return t.contiguous().view(t.numel() // max(features, 1), features)


def layer_norm_forward(x, dims, weight, bias, eps, emits_squares):
    """(y, mean, 1/√(var + eps), Σ y² per row) of x (..., features of ``dims`` dimensions)."""
    _check("layer_norm", x)
    shape = x.shape[: x.dim() - dims]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    squares = torch.empty(shape if emits_squares else (0,), dtype=torch.float32, device=x.device)
    if not x.numel():
        return y, mean.fill_(float("nan")), rstd.fill_(float("nan")), squares.zero_()
    v = _matrix(x, dims)
    vectors = (None if t is None else _floats(t).view(-1) for t in (weight, bias))
    emitted = squares.view(-1) if emits_squares else None
    _op("layer_norm")(y.view(v.shape), mean.view(-1), rstd.view(-1), emitted, v, *vectors, eps)
    return y, mean, rstd, squares


def layer_norm_backward(dy, x, dims, weight, bias, mean, rstd, detach, need_dx, need_dweight, need_dbias):
    """Gradients (dx, dweight, dbias)."""
    _check("layer_norm", x)
    v = _matrix(x, dims)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else None
    dweight, dbias = (
        v.new_zeros((v.shape[1],), dtype=torch.float32) if needed else None for needed in (need_dweight, need_dbias)
    )
    if x.numel():
        scale = None if weight is None else _floats(weight).view(-1)
        statistics = (t.contiguous().view(-1) for t in (mean, rstd))
        of_rows = None if dx is None else dx.view(v.shape)
        _op("layer_norm_backward")(of_rows, dweight, dbias, _matrix(dy, dims), v, scale, *statistics, detach)
    dweight = None if dweight is None else dweight.view(weight.shape).to(weight.dtype)
    return dx, dweight, None if dbias is None else dbias.view(bias.shape).to(bias.dtype)


def _here(launcher: str):
    return globals()[launcher]


def conv2d_batch_norm_forward(
    x, weight, bias, norm_weight, norm_bias, residual, running_var, squares, stride, padding, dilation, groups, b,
    b_tensor, normalize_weight, max_out, training, eps, activation, keep, detach, emits_squares,
):  # fmt: skip
    """(z, Σ_c z², a, n, nothing, nothing, mean, var): a in the place of y; with known statistics in explanation mode
    the slope."""
    _check("conv2d_batch_norm", x)
    if not composed.keeps_pre_scale("cuda", x.dtype, b, b_tensor, max_out):
        return composed.conv2d_batch_norm_forward(
            _here, x, weight, bias, norm_weight, norm_bias, residual, running_var, squares, stride, padding, dilation,
            groups, b, b_tensor, normalize_weight, max_out, training, eps, activation, keep, detach, emits_squares,
        )  # fmt: skip
    layer = _Layer(x, weight, bias, normalize_weight, (stride, padding, dilation, groups))
    a = layer.product()
    n = layer.norms(squares)
    mean, var, factors = _statistics(a, n, norm_weight, norm_bias, running_var, training, eps, groups)
    keeps_slope = keep and detach and not training
    z = _new(a) if keep else a
    emitted = _sums_of_rows(a, emits_squares)
    _op("normalize")(
        z, a if keeps_slope else None, _present(emitted), a, n, _rows(residual), factors, groups, activation == "relu"
    )  # fmt: skip
    nothing, no_index = _nothing(a), _nothing(a, torch.uint8)
    a, n, _, _ = _announced(a if keep else nothing, n, nothing, no_index, x, weight, groups)
    return with_layout(z, memory_format(x, weight)), emitted, a, n, nothing, no_index, mean, var


def conv2d_batch_norm_backward(
    dz, x, weight, bias, norm_weight, norm_bias, z, y, n, a, index, mean, var, stride, padding, dilation, groups, b,
    b_tensor, normalize_weight, max_out, training, eps, activation, detach, need_dx, need_dw, need_dbias, need_db,
    need_dnorm_weight, need_dnorm_bias, need_dresidual,
):  # fmt: skip
    """Gradients (dx, dw, dbias, db, dnorm_weight, dnorm_bias, dresidual) from what the forward kept in the place of y:
    a, or the slope."""
    _check("conv2d_batch_norm", x)
    needs = (need_dx, need_dw, need_dbias, need_db, need_dnorm_weight, need_dnorm_bias, need_dresidual)
    if not composed.keeps_pre_scale("cuda", x.dtype, b, b_tensor, max_out):
        return composed.conv2d_batch_norm_backward(
            _here, dz, x, weight, bias, norm_weight, norm_bias, z, y, n, a, index, mean, var, stride, padding, dilation,
            groups, b, b_tensor, normalize_weight, max_out, training, eps, activation, detach, *needs,
        )  # fmt: skip
    layer = _Layer(x, weight, bias, normalize_weight, (stride, padding, dilation, groups))
    dz, z = _rows(dz), _rows(z)
    inside = need_dx or need_dw or need_dbias
    from_slope = detach and not training and y.numel() > 0
    if from_slope and not (need_dnorm_weight or need_dnorm_bias):
        da = _new(dz) if inside else None
        dresidual = _new(dz) if need_dresidual else None
        if inside or need_dresidual:
            relu = activation == "relu"
            _op("normalize_backward")(
                da, None, dresidual, dz, None, z, _rows(y), None, None, None, None, 1, relu, True
            )  # fmt: skip
        q = dnorm_weight = dnorm_bias = None
    else:
        pre_scale = layer.product() if from_slope or not y.numel() else _rows(y)
        norms = _rows(n) if n.numel() else layer.norms()
        da, q, dnorm_weight, dnorm_bias, dresidual = _normalized_backward(
            dz, pre_scale, z if activation == "relu" else None, norms, norm_weight, norm_bias, mean, var, training, eps,
            activation, detach, groups, inside, need_dx and not detach, need_dnorm_weight, need_dnorm_bias,
            need_dresidual,
        )  # fmt: skip
    dx, dw, dbias = layer.gradients(da, q, need_dx, need_dw, need_dbias) if inside else (None, None, None)
    format_ = memory_format(x, weight)
    return (
        _in_layout(dx, format_), _in_layout(dw, own_format(weight)), dbias, None, dnorm_weight, dnorm_bias,
        _in_layout(dresidual, format_),
    )  # fmt: skip


def linear_gelu_forward(x, weight, bias, squares, b, b_tensor, normalize_weight, max_out, keep, emits_squares):
    """(h, Σ h² per row, a, n, nothing, nothing): a in the place of y."""
    _check("linear_gelu", x)
    if not composed.keeps_pre_scale("cuda", x.dtype, b, b_tensor, max_out):
        return composed.linear_gelu_forward(
            _here, x, weight, bias, squares, b, b_tensor, normalize_weight, max_out, keep, emits_squares
        )
    layer = _Layer(x, weight, bias, normalize_weight)
    a, n = layer.product(), layer.norms(squares)
    h, emitted = _new(a) if keep else a, _sums_of_rows(a, emits_squares)
    _op("scale_gelu")(h, _present(emitted), a, n)
    nothing = _nothing(a)
    return h, emitted, a if keep else nothing, n, nothing, _nothing(a, torch.uint8)


def linear_gelu_again(y, n, plain):
    """h of the a, in the place of y, and n that the forward kept, to the same bits."""
    if not plain or y.dtype == torch.float16:
        return composed.linear_gelu_again(y, n, plain)
    h = _new(y)
    _op("scale_gelu")(h, None, y, n)
    return h


def linear_gelu_backward(
    dh, x, weight, bias, y, n, a, index, b, b_tensor, normalize_weight, max_out, detach,
    need_dx, need_dw, need_dbias, need_db,
):  # fmt: skip
    """Gradients (dx, dw, dbias, db) from a, which lies in the place of y, and n."""
    _check("linear_gelu", x)
    needs = (need_dx, need_dw, need_dbias, need_db)
    if not composed.keeps_pre_scale("cuda", x.dtype, b, b_tensor, max_out):
        return composed.linear_gelu_backward(
            _here, dh, x, weight, bias, y, n, a, index, b, b_tensor, normalize_weight, max_out, detach, *needs
        )
    layer = _Layer(x, weight, bias, normalize_weight)
    pre_scale, norms = (y if y.numel() or not dh.numel() else layer.product()), n if n.numel() else layer.norms()
    da, q = _new(pre_scale), _new(norms) if need_dx and not detach else None
    _op("scale_gelu_backward")(da, q, _rows(dh), _rows(pre_scale), norms.contiguous(), detach)
    return *layer.gradients(da, q, need_dx, need_dw, need_dbias), None
