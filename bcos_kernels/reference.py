"""The definition of every op in plain PyTorch: every test's oracle, and the backend for every device and dtype.

Two forms of each op live here:

* ``linear``, ``conv2d``, ``batch_norm_uncentered``, ``layer_norm``: the definition, differentiable to any order by
  autograd;
* ``*_forward`` / ``*_backward``: the same mathematics with its gradient written out, in the form that every backend has
  (autograd cannot run inside an opaque op). The tests hold the two against each other.

Statistics and norms are computed in float32 (float64 for float64) whatever the input type, as every backend does.

Sources: B-cos networks (https://arxiv.org/abs/2306.10898), B-cosification (https://arxiv.org/abs/2411.00715); the
epsilons are those of the package ``bcos`` 0.1.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CONV_NORM_EPS = 1e-6  # under the root, convolutions
LINEAR_NORM_EPS = 1e-12  # added to the norm, linear layers
COSINE_EPS = 1e-6  # added to |cos| before the power, general B only


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _safe_norm(sum_of_squares: Tensor) -> Tensor:
    """sqrt with value and derivatives of every order 0 at 0 (sqrt'(0) is infinite)."""
    positive = sum_of_squares != 0  # NaN counts as nonzero and stays NaN
    root = torch.where(positive, sum_of_squares, torch.ones_like(sum_of_squares)).sqrt()
    return torch.where(positive, root, torch.zeros_like(root))


def normalized_weight(weight: Tensor) -> Tensor:
    """w / ‖w‖ per output unit; a row of norm zero gives zero and no gradient."""
    wide = weight.to(statistics_dtype(weight.dtype))
    norm = _safe_norm(wide.square().sum(dim=tuple(range(1, weight.dim())), keepdim=True))
    nonzero = norm != 0
    return torch.where(nonzero, wide / torch.where(nonzero, norm, torch.ones_like(norm)), 0.0).to(weight.dtype)


def _first_max(a: Tensor, dim: int, max_out: int) -> tuple[Tensor, Tensor]:
    """Maximum over consecutive units of ``dim``, ties to the first unit: the values and the winning units."""
    dim = dim % a.dim()
    grouped = a.unflatten(dim, (a.shape[dim] // max_out, max_out))
    if grouped.numel() == 0:
        empty = grouped.select(dim + 1, 0)
        return empty, torch.zeros_like(empty, dtype=torch.int64)
    index = grouped.argmax(dim + 1, keepdim=True)
    return grouped.gather(dim + 1, index).squeeze(dim + 1), index.squeeze(dim + 1)


def _apply_scale(a: Tensor, n: Tensor | None, b: float | Tensor, detach: bool) -> Tensor:
    """y from the pre-scale output a and the (broadcastable) norm n: section "transform" of the module docstring."""
    is_number = not isinstance(b, Tensor)
    if is_number and b == 1:
        return a
    wide = a.to(n.dtype)
    magnitude = wide.detach() if detach else wide
    if detach:
        n = n.detach()
        b = b if is_number else b.detach()
    if is_number and b == 2:
        scale = magnitude.abs() / n
    else:
        exponent = b - 1 if is_number else b.to(n.dtype) - 1
        scale = (magnitude.abs() / n + COSINE_EPS) ** exponent
    return (wide * scale).to(a.dtype)


def linear_norm(x: Tensor) -> Tensor:
    """‖x‖ + 1e-12 over the last dimension, (..., K) → (..., 1), in the statistics dtype."""
    return _safe_norm(x.to(statistics_dtype(x.dtype)).square().sum(-1, keepdim=True)) + LINEAR_NORM_EPS


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    b: float | Tensor = 2.0,
    normalize_weight: bool = False,
    max_out: int = 1,
    detach: bool = False,
) -> Tensor:
    """B-cos linear transform, the definition. Shapes as `bcos_kernels.linear`."""
    w = normalized_weight(weight) if normalize_weight else weight
    a = F.linear(x, w, bias)
    if max_out > 1:
        a, _ = _first_max(a, -1, max_out)
    n = None if _is_one(b) else linear_norm(x)
    return _apply_scale(a, n, b, detach)


def gelu(y: Tensor, *, detach: bool = False) -> Tensor:
    """y·Φ(y); with ``detach`` the gate Φ(y) is a constant."""
    if not detach:
        return F.gelu(y)
    gate = y.detach().to(statistics_dtype(y.dtype))
    return y * (0.5 * (1 + torch.erf(gate * 0.5**0.5))).to(y.dtype)


def _is_one(b: float | Tensor) -> bool:
    return not isinstance(b, Tensor) and b == 1


def _window_sum(
    q: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """Box filter (N, G, H, W) → (N, G, P, Q): rows, then columns, as sums of shifted views."""
    if padding != (0, 0):
        q = F.pad(q, (padding[1], padding[1], padding[0], padding[0]))
    for axis in (0, 1):
        size = q.shape[2 + axis]
        out = (size - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        span = (out - 1) * stride[axis] + 1
        total = None
        for tap in range(kernel[axis]):
            view = q.narrow(2 + axis, tap * dilation[axis], span)
            view = view[:, :, :: stride[axis]] if axis == 0 else view[:, :, :, :: stride[axis]]
            total = view if total is None else total + view
        q = total
    return q


def conv2d_norm(
    x: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """sqrt(Σ p² + 1e-6) of every patch: (N, C, H, W) → (N, groups, P, Q), zero padding, in the statistics dtype."""
    squares = x.to(statistics_dtype(x.dtype)).square()
    per_pixel = squares.unflatten(1, (groups, x.shape[1] // groups)).sum(2)
    return (_window_sum(per_pixel, kernel, stride, padding, dilation) + CONV_NORM_EPS).sqrt()


def _per_output(n: Tensor, channels: int) -> Tensor:
    """(N, G, P, Q) → broadcastable over (N, channels, P, Q)."""
    groups = n.shape[1]
    return n if groups == 1 else n.repeat_interleave(channels // groups, dim=1)


def same_padding(kernel: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) zeros of padding="same", the extra one on the right and bottom as in torch."""
    total = [dilation[i] * (kernel[i] - 1) for i in (0, 1)]
    return (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    b: float | Tensor = 2.0,
    padding_mode: str = "zeros",
    normalize_weight: bool = False,
    max_out: int = 1,
    detach: bool = False,
) -> Tensor:
    """B-cos convolution, the definition. Shapes as `bcos_kernels.conv2d`."""
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    stride, dilation = _pair(stride), _pair(dilation)
    kernel = (weight.shape[2], weight.shape[3])
    if padding == "valid":
        sides = (0, 0, 0, 0)
    elif padding == "same":
        sides = same_padding(kernel, dilation)
    else:
        rows, columns = _pair(padding)
        sides = (columns, columns, rows, rows)
    if any(sides):
        batched = F.pad(batched, sides, mode="constant" if padding_mode == "zeros" else padding_mode)
    w = normalized_weight(weight) if normalize_weight else weight
    a = F.conv2d(batched, w, bias, stride, 0, dilation, groups)
    if max_out > 1:
        a, _ = _first_max(a, 1, max_out)
    n = None
    if not _is_one(b):
        n = _per_output(conv2d_norm(batched, kernel, stride, (0, 0), dilation, groups), a.shape[1])
    y = _apply_scale(a, n, b, detach)
    return y if x.dim() == 4 else y.squeeze(0)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def batch_norm_uncentered(
    x: Tensor,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    detach: bool = False,
) -> Tensor:
    """Uncentered batch normalisation, the definition; updates ``running_var`` as the public function does."""
    wide = x.to(statistics_dtype(x.dtype))
    if training:
        dims = [d for d in range(x.dim()) if d != 1]
        var = (wide.detach() if detach else wide).var(dim=dims, unbiased=False)
        if running_var is not None:
            with torch.no_grad():
                running_var.mul_(1 - momentum).add_(var.to(running_var.dtype), alpha=momentum)
    else:
        var = running_var.to(wide.dtype)
    y = wide / _channels(var + eps, x).sqrt()
    if weight is not None:
        y = y * _channels(weight.to(wide.dtype), x)
    if bias is not None:
        y = y + _channels(bias.to(wide.dtype), x)
    if residual is not None:
        y = y + residual.to(wide.dtype)
    if activation == "relu":
        y = F.relu(y)
    return y.to(x.dtype)


def _channels(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view((1, -1) + (1,) * (x.dim() - 2))


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    channels_first: bool = False,
    detach: bool = False,
) -> Tensor:
    """Layer normalisation, the definition; with ``detach`` the variance, but not the mean, is a constant."""
    if channels_first:
        y = layer_norm(x.movedim(1, -1), normalized_shape, weight, bias, eps, detach=detach)
        return y.movedim(-1, 1)
    dims = tuple(range(-1 if isinstance(normalized_shape, int) else -len(normalized_shape), 0))
    wide = x.to(statistics_dtype(x.dtype))
    centred = wide - wide.mean(dims, keepdim=True)
    var = (centred.detach() if detach else centred).square().mean(dims, keepdim=True)
    y = centred * (var + eps).rsqrt()
    if weight is not None:
        y = y * weight.to(wide.dtype)
    if bias is not None:
        y = y + bias.to(wide.dtype)
    return y.to(x.dtype)


# The same mathematics in a backend's form: forward and backward of opaque ops, no autograd inside.


def _nothing(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty((0,), dtype=dtype or x.dtype)


def keeps_pre_scale(dtype: torch.dtype, b: float, b_tensor: Tensor | None) -> bool:
    """Whether the backward needs a itself: y and n suffice for B = 1 and 2, but not in fp16, where y underflows."""
    return b_tensor is not None or b not in (1, 2) or (b == 2 and dtype == torch.float16)


def linear_forward(x, weight, bias, b, b_tensor, normalize_weight, max_out, keep):
    """Backend form of `linear`: x (M, K) → y (M, N), n (M,), a (M, N) and winning units where kept."""
    w = normalized_weight(weight) if normalize_weight else weight
    a, index = F.linear(x, w, bias), None
    if max_out > 1:
        a, index = _first_max(a, -1, max_out)
    exponent = b if b_tensor is None else b_tensor
    n = None if _is_one(exponent) else linear_norm(x)
    y = _apply_scale(a, n, exponent, False)
    return _forward_results(x, y, None if n is None else n.squeeze(-1), a, index, b, b_tensor, keep)


def _forward_results(x, y, n, a, index, b, b_tensor, keep):
    if n is None:
        n = _nothing(x, statistics_dtype(x.dtype))
    a = a if keep and keeps_pre_scale(x.dtype, b, b_tensor) else _nothing(x)
    index = index.to(torch.uint8) if keep and index is not None else _nothing(x, torch.uint8)
    return y, n, a, index


def _scale_gradients(dy, y, n, a, b, b_tensor, detach, need_db):
    """From dy, n (broadcastable) and y or a: (∂L/∂a, Σ-ready g·∂y/∂n or None, ∂L/∂B or None), wide dtype."""
    if b_tensor is None and b == 1:
        return dy, None, None
    g = dy.to(n.dtype)
    if b_tensor is None and b == 2:
        ratio = (y.to(n.dtype).abs() / n).sqrt() if a is None else a.to(n.dtype).abs() / n
        if detach:
            return g * ratio, None, None
        output = y.to(n.dtype) if a is None else a.to(n.dtype) * ratio
        return 2 * g * ratio, -g * output / n, None
    a = a.to(n.dtype)
    exponent = (b if b_tensor is None else b_tensor.to(n.dtype)) - 1
    ratio = a.abs() / n
    c = ratio + COSINE_EPS
    scale = c**exponent
    if detach:
        return g * scale, None, (torch.zeros((), dtype=n.dtype, device=n.device) if need_db else None)
    slope = exponent * c ** (exponent - 1)
    db = (g * a * scale * c.log()).sum() if need_db else None
    return g * (scale + slope * ratio), -g * a * slope * ratio / n, db


def _spread_to_units(da: Tensor, index: Tensor, dim: int, max_out: int) -> Tensor:
    """Gradient of the maximum: da at the winning unit, zero at the others."""
    dim = dim % da.dim()
    spread = da.new_zeros(da.shape[: dim + 1] + (max_out,) + da.shape[dim + 1 :])
    spread.scatter_(dim + 1, index.to(torch.int64).unsqueeze(dim + 1), da.unsqueeze(dim + 1))
    return spread.flatten(dim, dim + 1)


def _through_weight_norm(dw_hat: Tensor, weight: Tensor) -> Tensor:
    """∂L/∂w = (dŵ − ŵ(ŵ·dŵ)) / ‖w‖; a row of norm zero gets zero."""
    wide = weight.to(statistics_dtype(weight.dtype))
    dims = tuple(range(1, weight.dim()))
    norm = wide.square().sum(dim=dims, keepdim=True).sqrt()
    nonzero = norm != 0
    reciprocal = torch.where(nonzero, 1 / torch.where(nonzero, norm, torch.ones_like(norm)), 0.0)
    w_hat = wide * reciprocal
    dw_hat = dw_hat.to(wide.dtype)
    return ((dw_hat - w_hat * (w_hat * dw_hat).sum(dim=dims, keepdim=True)) * reciprocal).to(weight.dtype)


def linear_backward(
    dy, x, weight, bias, b, b_tensor, y, n, a, index, normalize_weight, max_out, detach, need_dx, need_dw, need_dbias,
    need_db,
):  # fmt: skip
    """Backend form of the gradient of `linear`; y None: the output is recomputed from x and weight."""
    w = normalized_weight(weight) if normalize_weight else weight
    a = a if a.numel() else None
    if a is None and y is None and not (b_tensor is None and b == 1):
        a = F.linear(x, w, bias)
        if max_out > 1:
            a = a.unflatten(-1, (-1, max_out)).gather(-1, index.to(torch.int64).unsqueeze(-1)).squeeze(-1)
    n = n.unsqueeze(-1) if n.numel() or not x.shape[0] else linear_norm(x)
    da, dn, db = _scale_gradients(dy, y, n, a, b, b_tensor, detach, need_db)
    da = da.to(x.dtype)
    if max_out > 1:
        da = _spread_to_units(da, index, -1, max_out)
    dx = dw = dbias = None
    if need_dx:
        dx = da @ w
        if dn is not None:
            norm = n - LINEAR_NORM_EPS  # ∂n/∂p = p/‖p‖, and 0 at p = 0
            nonzero = norm != 0
            q = torch.where(nonzero, dn.sum(-1, keepdim=True) / torch.where(nonzero, norm, torch.ones_like(norm)), 0.0)
            dx = (dx.to(n.dtype) + x.to(n.dtype) * q).to(x.dtype)
    if need_dw:
        dw = da.t() @ x
        dw = _through_weight_norm(dw, weight) if normalize_weight else dw
    if need_dbias:
        dbias = da.to(statistics_dtype(x.dtype)).sum(0).to(bias.dtype)
    return dx, dw, dbias, db


def conv2d_forward(x, weight, bias, stride, padding, dilation, groups, b, b_tensor, normalize_weight, max_out, keep):
    """Backend form of `conv2d` (zero padding, pairs): y (N, O, P, Q), n (N, G, P, Q); a, winning units where kept."""
    w = normalized_weight(weight) if normalize_weight else weight
    a, index = F.conv2d(x, w, bias, stride, padding, dilation, groups), None
    if max_out > 1:
        a, index = _first_max(a, 1, max_out)
    exponent = b if b_tensor is None else b_tensor
    n = None
    if not _is_one(exponent):
        n = conv2d_norm(x, tuple(weight.shape[2:]), stride, padding, dilation, groups).contiguous()
    y = _apply_scale(a, None if n is None else _per_output(n, a.shape[1]), exponent, False)
    return _forward_results(x, y, n, a, index, b, b_tensor, keep)


def conv2d_backward(
    dy, x, weight, bias, stride, padding, dilation, groups, b, b_tensor, y, n, a, index, normalize_weight, max_out,
    detach, need_dx, need_dw, need_dbias, need_db,
):  # fmt: skip
    """Backend form of the gradient of `conv2d`; y None: the output is recomputed from x and weight."""
    w = normalized_weight(weight) if normalize_weight else weight
    kernel = tuple(weight.shape[2:])
    is_one = b_tensor is None and b == 1
    a = a if a.numel() else None
    if a is None and y is None and not is_one:
        a = F.conv2d(x, w, bias, stride, padding, dilation, groups)
        if max_out > 1:
            a = a.unflatten(1, (-1, max_out)).gather(2, index.to(torch.int64).unsqueeze(2)).squeeze(2)
    if not is_one and not n.numel():
        n = conv2d_norm(x, kernel, stride, padding, dilation, groups)
    expanded = None if is_one else _per_output(n, dy.shape[1])
    da, dn, db = _scale_gradients(dy, y, expanded, a, b, b_tensor, detach, need_db)
    da = da.to(x.dtype)
    if max_out > 1:
        da = _spread_to_units(da, index, 1, max_out)
    wants = [need_dx, need_dw, False]
    dx, dw, _ = torch.ops.aten.convolution_backward(
        da, x, w, None, stride, padding, dilation, False, (0, 0), groups, wants
    )
    if need_dx and dn is not None:
        q = dn.unflatten(1, (groups, -1)).sum(2) / n
        per_pixel = _window_sum_transposed(q, x.shape[2:], kernel, stride, padding, dilation)
        dx = (dx.to(n.dtype) + x.to(n.dtype) * _per_output(per_pixel, x.shape[1])).to(x.dtype)
    if need_dw and normalize_weight:
        dw = _through_weight_norm(dw, weight)
    dbias = None
    if need_dbias:
        dbias = da.to(statistics_dtype(x.dtype)).sum((0, 2, 3)).to(bias.dtype)
    return dx if need_dx else None, dw if need_dw else None, dbias, db


def _window_sum_transposed(q, size, kernel, stride, padding, dilation):
    """Transposed box filter (N, G, P, Q) → (N, G, H, W): every window value added to the pixels under the window."""
    for axis in (1, 0):
        out = q.shape[2 + axis]
        shape = list(q.shape)
        shape[2 + axis] = size[axis] + 2 * padding[axis]
        spread = q.new_zeros(shape)
        span = (out - 1) * stride[axis] + 1
        for tap in range(kernel[axis] if out else 0):
            view = spread.narrow(2 + axis, tap * dilation[axis], span)
            view = view[:, :, :: stride[axis]] if axis == 0 else view[:, :, :, :: stride[axis]]
            view += q
        q = spread.narrow(2 + axis, padding[axis], size[axis])
    return q


def batch_norm_uncentered_forward(x, weight, bias, residual, running_var, training, eps, activation):
    """Backend form of `batch_norm_uncentered`: (y, mean, var); mean is empty in eval mode."""
    wide = x.to(statistics_dtype(x.dtype))
    if training:
        dims = [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(wide, dim=dims, unbiased=False)
    else:
        # a copy: an op may not return one of its inputs
        var, mean = running_var.to(wide.dtype, copy=True), wide.new_empty((0,))
    y = batch_norm_uncentered(
        x, var, weight, bias, training=False, eps=eps, activation=activation, residual=residual
    )  # fmt: skip
    return y, mean, var


def batch_norm_uncentered_backward(
    dy, x, y, weight, bias, mean, var, training, eps, activation, detach, need_dx, need_dweight, need_dbias,
    need_dresidual,
):  # fmt: skip
    """Backend form of the gradient of `batch_norm_uncentered`; y is the output, read for the ReLU mask only
    (None where there was no residual: it is computed again)."""
    dtype = statistics_dtype(x.dtype)
    dims = [d for d in range(x.dim()) if d != 1]
    g, wide = dy.to(dtype), x.to(dtype)
    if activation == "relu":
        if y is None:  # there was no residual
            statistics = var.to(dtype)
            y = batch_norm_uncentered(x, statistics, weight, bias, training=False, eps=eps)
        # as torch's own ReLU: a NaN output lets the gradient pass
        g = torch.where(y <= 0, torch.zeros_like(g), g)
    inverse_std = (var.to(dtype) + eps).rsqrt()
    scale = inverse_std if weight is None else inverse_std * weight.to(dtype)
    dx = dweight = dbias = None
    needs_var_term = training and not detach and need_dx
    gx = (g * wide).sum(dims) if need_dweight or needs_var_term else None
    if need_dx:
        dx = g * _channels(scale, x)
        if needs_var_term and x.numel():
            count = x.numel() // x.shape[1]
            factor = -gx * scale * inverse_std.square() / count
            dx = dx + _channels(factor, x) * (wide - _channels(mean.to(dtype), x))
        dx = dx.to(x.dtype)
    if need_dweight:
        # of an empty batch the variance is NaN, and the sum over it 0
        dweight = (gx * inverse_std if x.numel() else gx).to(weight.dtype)
    if need_dbias:
        dbias = g.sum(dims).to(bias.dtype)
    # a copy: an op may not return one of its inputs
    return dx, dweight, dbias, g.to(x.dtype, copy=True) if need_dresidual else None


def _library_normalizes(x: Tensor, features: int, *parameters: Tensor | None) -> bool:
    """Whether torch's own kernels serve: on GPUs, where eager passes would be ten, and not of a single feature, whose
    gradient would be what rounding leaves. On CPUs they keep statistics in 16 bits and lose digits to a large mean."""
    return x.is_cuda and x.numel() > 0 and features > 1 and all(t is None or t.dtype == x.dtype for t in parameters)


def layer_norm_forward(x, dims, weight, bias, eps):
    """Backend form of `layer_norm` over the last ``dims`` dimensions: (y, mean, 1/√(var + eps)), the statistics of the
    shape of the other dimensions; by the library's kernel where that serves."""
    shape, rest = x.shape[x.dim() - dims :], x.shape[: x.dim() - dims]
    if _library_normalizes(x, x.shape[x.dim() - dims :].numel(), weight, bias):
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        return y, mean.view(rest), rstd.view(rest)
    over = tuple(range(-dims, 0))
    wide = x.to(statistics_dtype(x.dtype))
    mean = wide.mean(over)
    var = (wide - mean.view(mean.shape + (1,) * dims)).square().mean(over)
    return layer_norm(x, shape, weight, bias, eps), mean, (var + eps).rsqrt()


def layer_norm_backward(dy, x, dims, weight, bias, mean, rstd, detach, need_dx, need_dweight, need_dbias):
    """Backend form of the gradient of `layer_norm`: with g = w·∂L/∂y and x̂ = (x − mean)·rstd,
    ∂L/∂x = rstd·(g − mean of g − x̂·mean of g·x̂), the last term not with ``detach``."""
    dtype = statistics_dtype(x.dtype)
    over, rest = tuple(range(-dims, 0)), tuple(range(x.dim() - dims))
    mean, rstd = (t.to(dtype).view(t.shape + (1,) * dims) for t in (mean, rstd))
    if not detach and _library_normalizes(x, x.shape[x.dim() - dims :].numel(), weight, bias):
        shape, mask = x.shape[x.dim() - dims :], [need_dx, need_dweight, need_dbias]
        return torch.ops.aten.native_layer_norm_backward(dy, x, shape, mean, rstd, weight, bias, mask)
    dy = dy.to(dtype)
    x_hat = (x.to(dtype) - mean) * rstd
    dx = dweight = dbias = None
    if need_dx:
        g = dy if weight is None else dy * weight.to(dtype)
        dx = g - g.mean(over, keepdim=True)
        if not detach:
            dx = dx - x_hat * (g * x_hat).mean(over, keepdim=True)
        dx = (dx * rstd).to(x.dtype)
    if need_dweight:
        dweight = ((dy * x_hat).sum(rest) if rest else dy * x_hat).to(weight.dtype)
    if need_dbias:
        dbias = (dy.sum(rest) if rest else dy).to(bias.dtype)
    return dx, dweight, dbias
