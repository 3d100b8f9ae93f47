"""The public functions: arguments checked, shapes brought to the ops' form, autocast, running statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import (
    autograd,
    autograd_conv2d_batch_norm,
    autograd_layer_norm,
    autograd_linear_gelu,
    dispatch,
    ops,
    reference,
    squares,
    validation,
)
from .recompute import viewed


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that autocast would cast x to, or None where autocast leaves x alone (float64 stays as it is)."""
    if x.dtype == torch.float64 or not x.is_floating_point() or not dispatch.autocast_enabled(x.device):
        return None
    return torch.get_autocast_dtype(x.device.type)


def _cast(dtype: torch.dtype | None, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tensors if dtype is None else tuple(None if t is None else t.to(dtype) for t in tensors)


def _differentiates(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


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
    """B-cos linear transform: the linear output scaled by |cos(x, w)|^(b−1), in one pass where a kernel does it.

    For b = 2 equivalent to::

        a = torch.nn.functional.linear(x, weight, bias)
        n = torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-12
        y = a * (a.abs() / n)                       # general b: a * (a.abs() / n + 1e-6) ** (b - 1)

    Args:
        x: (..., in_features), float32, float64, bfloat16 or float16, any layout.
        weight: (out_features * max_out, in_features), x's dtype and device.
        bias: (out_features * max_out,) or None; added before the scaling. B-cos layers have one only while it decays.
        b: the exponent B: a number >= 1 (1: the plain linear layer; 2: the fast form) or a 0-dim tensor, which may
            require a gradient and whose value is never read on the host (so its range is not checked). Default 2.
        normalize_weight: divide every row of the weight by its norm first (B-cos v2). A row of norm 0 gives 0.
        max_out: number of consecutive units of the weight of which the largest is the output; ties go to the first.
        detach: explanation mode: the scale is a constant at every order, nothing flows through the norm or b.
            (The package ``bcos`` lets a learnable B have a gradient there.)

    Returns:
        (..., out_features), x's dtype (under autocast: autocast's).

    Raises:
        ValueError, TypeError: shapes, values, dtypes that do not fit. NotImplementedError: inside `backend(name)`, a
        combination that this backend does not build.

    Source: B-cos networks, https://arxiv.org/abs/2306.10898, eq. 3 and 12.

    >>> import torch, bcos_kernels
    >>> bcos_kernels.linear(torch.ones(2, 4), torch.ones(3, 4)).shape
    torch.Size([2, 3])
    """
    dtype = _autocast_dtype(x) if isinstance(x, Tensor) else None
    if dtype is not None:
        x, weight, bias = _cast(dtype, x, weight, bias)
    validation.check_linear("linear", x, weight, bias, max_out)
    exponent, b_tensor = validation.check_b("linear", b, x)
    rows = viewed(x.reshape(-1, x.shape[-1]), x) if x.dim() != 2 else x
    options = (exponent, normalize_weight, max_out)
    y = _apply(
        autograd.Linear,
        "linear",
        rows,
        weight,
        bias,
        b_tensor,
        options,
        detach,
        squares.squares_of(x, squares.FEATURES),
    )
    return y if x.dim() == 2 else y.view(x.shape[:-1] + y.shape[-1:])


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    b: float | Tensor = 2.0,
    normalize_weight: bool = False,
    max_out: int = 1,
    detach: bool = False,
    recompute: str | None = None,
) -> Tensor:
    """B-cos linear transform with a GELU behind it, as one op where a backend fuses them.

    Equivalent to::

        y = linear(x, weight, bias, b=b, normalize_weight=normalize_weight, max_out=max_out)
        h = torch.nn.functional.gelu(y)             # detach: y * Phi(y).detach()

    Nothing is seen of y: scaling and GELU are one pass, and so are their gradients. Fused on CPUs for b = 2, float32,
    bfloat16 and float64; everything else runs as the two ops.

    Args:
        x, weight, bias, b, normalize_weight, max_out: as in `linear`.
        detach: explanation mode of both: scale and gate are constants.
        recompute: what the backward computes again instead of its being kept for the layer behind, as with
            `recomputed`: "output", h, a pass over y; None (default) for nothing.

    Returns:
        (..., out_features), x's dtype (under autocast: autocast's).

    Raises:
        ValueError, TypeError, NotImplementedError: as `linear`; for another ``recompute``.

    Source: B-cosification, https://arxiv.org/abs/2411.00715, section 3; GELU, https://arxiv.org/abs/1606.08415.

    >>> import torch, bcos_kernels
    >>> bcos_kernels.linear_gelu(torch.ones(2, 4), torch.ones(3, 4)).shape
    torch.Size([2, 3])
    """
    dtype = _autocast_dtype(x) if isinstance(x, Tensor) else None
    if dtype is not None:
        x, weight, bias = _cast(dtype, x, weight, bias)
    validation.check_linear("linear_gelu", x, weight, bias, max_out)
    exponent, b_tensor = validation.check_b("linear_gelu", b, x)
    if detach and b_tensor is not None:
        b_tensor = b_tensor.detach()
    if recompute not in autograd_linear_gelu.RECOMPUTES:
        raise ValueError(f"linear_gelu: expected recompute to be None or 'output', got {recompute!r}")
    rows = viewed(x.reshape(-1, x.shape[-1]), x) if x.dim() != 2 else x
    differentiates = _differentiates(x, weight, bias, b_tensor)
    arguments = (
        rows, weight, bias, b_tensor, squares.squares_of(x, squares.FEATURES), exponent, normalize_weight, max_out,
        differentiates, detach, squares.wanted(x),
    )  # fmt: skip
    if _op_alone(differentiates):
        h, emitted, *_ = ops.run("linear_gelu", *arguments)
    else:
        h, emitted, *_ = autograd.apply(autograd_linear_gelu.LinearGelu, *arguments, recompute)
    h = h if x.dim() == 2 else viewed(h.view(x.shape[:-1] + h.shape[-1:]), h)
    return squares.declare(h, emitted, squares.FEATURES)


def _op_alone(differentiates: bool) -> bool:
    """Whether the op is called itself: nothing is differentiated or transformed, or the graph being made is an exported
    program's. There the op is differentiable all the same, and keeps what that takes when it is; of a Function, strict
    export would put the forward into a graph without gradients."""
    if torch.compiler.is_exporting():
        return True
    return not (differentiates or ops.functorch_active() or ops.forward_mode())


def _apply(function, op: str, x, weight, bias, b_tensor, options: tuple, detach: bool, squares_of_x) -> Tensor:
    """The op alone where nothing is differentiated or transformed, else its autograd Function."""
    if detach and b_tensor is not None:
        b_tensor = b_tensor.detach()
    keep = _differentiates(x, weight, bias, b_tensor)
    if _op_alone(keep):
        return ops.run(op, x, weight, bias, b_tensor, *options, False, detach, squares_of_x)[0]
    return autograd.apply_layer(function, x, weight, bias, b_tensor, *options, detach, keep, squares_of_x)


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
    """B-cos convolution: the convolution scaled by |cos(patch, w)|^(b−1), in one pass where a kernel does it.

    For b = 2, groups = 1 equivalent to::

        a = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation)
        n = torch.nn.functional.conv2d(x.square().sum(1, keepdim=True), ones_1_1_kh_kw, None, stride, padding, dilation)
        y = a * (a.abs() / (n + 1e-6).sqrt())       # general b: a * (a.abs() / (n + 1e-6).sqrt() + 1e-6) ** (b - 1)

    Args:
        x: (N, in_channels, H, W) or (in_channels, H, W), float32, float64, bfloat16 or float16, any layout;
            channels_last is native.
        weight: (out_channels * max_out, in_channels // groups, kh, kw), x's dtype and device.
        bias: (out_channels * max_out,) or None; added before the scaling.
        stride, dilation: int or pair.
        padding: int, pair, "same" (stride 1 only) or "valid".
        groups: number of groups of channels; each has its own norm.
        b, normalize_weight, max_out, detach: as in `linear`.
        padding_mode: "zeros", "reflect", "replicate" or "circular". The norm is that of the truly padded patch (the
            package ``bcos`` always takes the norm of the zero-padded one).

    Returns:
        (N, out_channels, P, Q) or (out_channels, P, Q), x's dtype (under autocast: autocast's); channels_last if x or
        weight is.

    Raises:
        ValueError, TypeError, NotImplementedError: as `linear`.

    Source: B-cos networks, https://arxiv.org/abs/2306.10898, section 3.

    >>> import torch, bcos_kernels
    >>> bcos_kernels.conv2d(torch.ones(1, 6, 8, 8), torch.ones(4, 6, 3, 3), padding=1).shape
    torch.Size([1, 4, 8, 8])
    """
    dtype = _autocast_dtype(x) if isinstance(x, Tensor) else None
    if dtype is not None:
        x, weight, bias = _cast(dtype, x, weight, bias)
    batched, b_tensor, options = _convolution(
        "conv2d", x, weight, bias, stride, padding, dilation, groups, b, padding_mode, normalize_weight, max_out
    )
    squares_of_x = squares.squares_of(batched, squares.CHANNELS)
    y = _apply(autograd.Conv2d, "conv2d", batched, weight, bias, b_tensor, options, detach, squares_of_x)
    return y if x.dim() == 4 else y.squeeze(0)


def _convolution(
    op: str, x, weight, bias, stride, padding, dilation, groups, b, padding_mode, normalize_weight, max_out
) -> tuple[Tensor, Tensor | None, tuple]:
    """Checked: x with a batch, and padded where the op does not pad itself; a tensor exponent; the op's options."""
    validation.check_conv2d(op, x, weight, bias, groups, padding, padding_mode, max_out)
    exponent, b_tensor = validation.check_b(op, b, x)
    stride = validation.check_pair(op, "stride", stride, 1)
    dilation = validation.check_pair(op, "dilation", dilation, 1)
    kernel = (weight.shape[2], weight.shape[3])
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    batched, padding = _padded(op, batched, kernel, stride, padding, dilation, padding_mode)
    for i, name in enumerate(("height", "width")):
        size, reach = batched.shape[2 + i] + 2 * padding[i], dilation[i] * (kernel[i] - 1) + 1
        if size < reach:
            raise ValueError(f"{op}: expected padded {name} >= the dilated kernel's {reach}, got {size}")
    return batched, b_tensor, (stride, padding, dilation, groups, exponent, normalize_weight, max_out)


def _padded(op: str, x, kernel, stride, padding, dilation, padding_mode) -> tuple[Tensor, tuple[int, int]]:
    """x, padded where the ops' symmetric zero padding does not serve, and the padding left to the op."""
    if padding == "valid":
        return x, (0, 0)
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"{op}: expected stride 1 with padding 'same', got {stride}")
        left, right, top, bottom = reference.same_padding(kernel, dilation)
    else:
        top, left = validation.check_pair(op, "padding", padding, 0)
        bottom, right = top, left
    if padding_mode == "zeros" and left == right and top == bottom:
        return x, (top, left)
    if not (left or right or top or bottom):
        return x, (0, 0)
    mode = "constant" if padding_mode == "zeros" else padding_mode
    if mode in ("reflect", "circular"):
        limit = (x.shape[2], x.shape[3]) if mode == "circular" else (x.shape[2] - 1, x.shape[3] - 1)
        if max(top, bottom) > limit[0] or max(left, right) > limit[1]:
            raise ValueError(f"{op}: expected {mode} padding of at most {limit}, got {(bottom, right)}")
    with autograd.no_autocast(x.device):  # on CPUs it would pad in float32, and return that
        return F.pad(x, (left, right, top, bottom), mode=mode), (0, 0)


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
    """Batch normalisation that divides by the standard deviation without centring, with residual and ReLU in one pass.

    Equivalent to::

        var = x.var(dim=(0, 2, 3), unbiased=False) if training else running_var
        y = x / (var + eps).sqrt()[:, None, None] * weight[:, None, None] + bias[:, None, None] + residual
        y = y.relu()                                # activation="relu"

    Args:
        x: (N, C, ...), any layout; at least 2 dimensions.
        running_var: (C,), updated in place with the *biased* batch variance in training:
            (1 − momentum) · running_var + momentum · var. Read in eval mode, where it is required.
        weight, bias: (C,) or None (no scaling, no shift).
        training: normalise by the batch's variance instead of running_var.
        momentum: weight of the new variance, default 0.1. eps: added to the variance, default 1e-5.
        activation: None or "relu", applied last.
        residual: of x's shape, added before the activation, or None.
        detach: explanation mode: the variance is a constant.

    Returns:
        Of x's shape and dtype; channels_last if x is. Statistics are float32 (float64 for float64). Autocast casts x
        and residual only.

    Raises:
        ValueError, TypeError: shapes, values, dtypes that do not fit.

    Source: B-cos networks v2, https://arxiv.org/abs/2306.10898, section 4.2; B-cosification, section 3.

    >>> import torch, bcos_kernels
    >>> bcos_kernels.batch_norm_uncentered(torch.randn(2, 3, 4, 4), torch.ones(3), training=True).shape
    torch.Size([2, 3, 4, 4])
    """
    dtype = _autocast_dtype(x) if isinstance(x, Tensor) else None
    if dtype is not None:
        x, residual = _cast(dtype, x, residual)
    validation.check_batch_norm(x, running_var, weight, bias, training, momentum, eps, activation, residual)
    statistics = None if training else running_var.detach()
    options = (training, eps, activation, detach, x.dim() == 4 and squares.wanted(x))
    if _op_alone(_differentiates(x, weight, bias, residual)):
        y, _, var, emitted = ops.run("batch_norm_uncentered", x, weight, bias, residual, statistics, *options)
    else:
        y, _, var, emitted = autograd.apply(
            autograd.BatchNormUncentered, x, weight, bias, residual, statistics, *options
        )
    if training and x.numel():
        _update(running_var, var, momentum)
    return squares.declare(y, emitted, squares.CHANNELS)


def _update(running_var: Tensor | None, var: Tensor, momentum: float) -> None:
    if running_var is not None:
        with torch.no_grad():
            running_var.mul_(1 - momentum).add_(var.to(running_var.dtype), alpha=momentum)


def conv2d_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    running_var: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    b: float | Tensor = 2.0,
    padding_mode: str = "zeros",
    normalize_weight: bool = False,
    max_out: int = 1,
    detach: bool = False,
    recompute: str | None = None,
) -> Tensor:
    """B-cos convolution with an uncentered batch normalisation behind it, as one op where a backend fuses them.

    Equivalent to::

        y = conv2d(x, weight, bias, stride, padding, dilation, groups, b=b, normalize_weight=normalize_weight)
        z = batch_norm_uncentered(y, running_var, norm_weight, norm_bias, training=training, activation=activation,
                                  residual=residual)

    Between the two nothing is seen of y, so its moments are taken while it is in the cache, with known statistics it is
    never written, and the backward goes from ∂L/∂z to the gradient of the convolution's product in one pass. Fused on
    CPUs for b = 2, channels_last, float32, bfloat16 and float64; everything else runs as the two ops.

    Args:
        x: (N, in_channels, H, W). weight, bias, stride, padding, dilation, groups, b, padding_mode, normalize_weight,
            max_out: as in `conv2d`.
        running_var, training, momentum, eps, activation: as in `batch_norm_uncentered`.
        norm_weight, norm_bias: (out_channels,) or None, the normalisation's.
        residual: (N, out_channels, P, Q) or None, added before the activation.
        detach: explanation mode, of both.
        recompute: what the backward computes again instead of its being kept, as with `recomputed`: "output", z, a pass
            over y (not with a residual); "inner", y, the convolution once more; "both"; None (default) for neither.

    Returns:
        z (N, out_channels, P, Q), as `conv2d` and `batch_norm_uncentered` return theirs.

    Raises:
        ValueError, TypeError, NotImplementedError: as these two.

    Source: B-cos networks v2, https://arxiv.org/abs/2306.10898, sections 3 and 4.2.

    >>> import torch, bcos_kernels
    >>> x, w = torch.randn(2, 6, 8, 8), torch.randn(4, 6, 3, 3)
    >>> bcos_kernels.conv2d_batch_norm(x, w, running_var=torch.ones(4), training=True, activation="relu").shape
    torch.Size([2, 4, 6, 6])
    """
    op = "conv2d_batch_norm"
    dtype = _autocast_dtype(x) if isinstance(x, Tensor) else None
    if dtype is not None:
        x, weight, bias, residual = _cast(dtype, x, weight, bias, residual)
    batched, b_tensor, options = _convolution(
        op, x, weight, bias, stride, padding, dilation, groups, b, padding_mode, normalize_weight, max_out
    )
    if x.dim() != 4:
        raise ValueError(f"{op}: expected x of shape (N, C, H, W), got {tuple(x.shape)}")
    size = [
        (batched.shape[2 + i] + 2 * options[1][i] - options[2][i] * (weight.shape[2 + i] - 1) - 1) // options[0][i] + 1
        for i in (0, 1)
    ]
    like_y = (x.shape[0], weight.shape[0] // max_out, *size)
    vectors = {"running_var": running_var, "norm_weight": norm_weight, "norm_bias": norm_bias}
    validation.check_normalization(
        op, x, like_y, "the output's shape", vectors, training, momentum, eps, activation, residual
    )
    if recompute not in autograd_conv2d_batch_norm.RECOMPUTES or (
        residual is not None and recompute in ("output", "both")
    ):
        allowed = "None, 'inner'" + ("" if residual is not None else ", 'output' or 'both'")
        raise ValueError(f"{op}: expected recompute to be {allowed}, got {recompute!r}")
    if detach and b_tensor is not None:
        b_tensor = b_tensor.detach()
    differentiates = _differentiates(x, weight, bias, b_tensor, norm_weight, norm_bias, residual)
    arguments = (
        batched, weight, bias, b_tensor, norm_weight, norm_bias, residual, None if training else running_var.detach(),
        squares.squares_of(batched, squares.CHANNELS), *options, training, eps, activation, differentiates, detach,
        squares.wanted(x),
    )  # fmt: skip
    if _op_alone(differentiates):
        z, emitted, *_, var = ops.run("conv2d_batch_norm", *arguments)
    else:
        z, emitted, *_, var = autograd.apply(autograd_conv2d_batch_norm.Conv2dBatchNorm, *arguments, recompute)
    if training and z.numel():
        _update(running_var, var, momentum)
    return squares.declare(z, emitted, squares.CHANNELS)


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
    """Layer normalisation, torch.nn.functional.layer_norm, with an explanation mode; it leaves the norms of its rows to
    the B-cos layer that reads them.

    Equivalent to::

        centred = x - x.mean(-1, keepdim=True)          # over all of normalized_shape's dimensions
        var = centred.square().mean(-1, keepdim=True)   # detach: of centred.detach()
        y = centred / (var + eps).sqrt() * weight + bias

    Args:
        x: (..., *normalized_shape), float32, float64, bfloat16 or float16, any layout.
        normalized_shape: an int or a sequence of ints, the last dimensions of x; what they hold is normalised together.
        weight, bias: of shape normalized_shape, any floating type, or None (no scaling, no shift).
        eps: added to the variance, default 1e-5.
        channels_first: x is (N, C, ...) and normalised over its C channels at every position; normalized_shape is (C,).
            channels_last x is read in place.
        detach: explanation mode: the variance is a constant at every order, the mean is not.

    Returns:
        Of x's shape and dtype, contiguous; channels_last with channels_first. Statistics are float32 (float64 for
        float64). Under autocast as torch's: on CPUs in x's dtype, elsewhere in float32, which is returned.

    Raises:
        ValueError, TypeError: shapes, values, dtypes that do not fit.

    Source: https://arxiv.org/abs/1607.06450; explanation mode: B-cos networks v2, https://arxiv.org/abs/2306.10898.

    >>> import torch, bcos_kernels
    >>> bcos_kernels.layer_norm(torch.randn(2, 5, 16), (16,)).shape
    torch.Size([2, 5, 16])
    """
    if isinstance(x, Tensor) and x.device.type != "cpu" and _autocast_dtype(x) is not None:
        x = x.float()
    dims = validation.check_layer_norm(x, normalized_shape, weight, bias, eps, channels_first)
    rows = x.movedim(1, -1) if channels_first else x
    emits = dims == 1 and x.dim() >= 2 and (x.dim() == 4 or not channels_first) and squares.wanted(x)
    if _op_alone(_differentiates(x, weight, bias)):
        y, _, _, emitted = ops.run("layer_norm", rows, dims, weight, bias, eps, detach, emits)
    else:
        y, _, _, emitted = autograd.apply(autograd_layer_norm.LayerNorm, rows, weight, bias, dims, eps, detach, emits)
    if channels_first:
        return squares.declare(y.movedim(-1, 1), emitted, squares.CHANNELS)
    return squares.declare(y, emitted if emitted.dim() == 1 else emitted.flatten(), squares.FEATURES)
