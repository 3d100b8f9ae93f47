"""Checks of the public functions' arguments: every message names the op, what was expected and what came."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: expected {name} to be a tensor, got {type(value).__name__}")


def check_floating(op: str, name: str, value: Tensor) -> None:
    if value.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{op}: expected {name}.dtype to be one of {names}, got {value.dtype}")


def check_same(op: str, name: str, value: Tensor, x: Tensor, *, dtype: bool = True) -> None:
    check_tensor(op, name, value)
    if dtype and value.dtype != x.dtype:
        raise TypeError(f"{op}: expected {name}.dtype == x.dtype ({x.dtype}), got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{op}: expected {name} on x's device ({x.device}), got {value.device}")


def check_int(op: str, name: str, value: object, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: expected {name} to be an int, got {type(value).__name__} {value!r}")
    if value < minimum:
        raise ValueError(f"{op}: expected {name} >= {minimum}, got {value}")
    return value


def check_pair(op: str, name: str, value: object, minimum: int) -> tuple[int, int]:
    if isinstance(value, (tuple, list)):
        if len(value) == 1:
            value = (value[0], value[0])
        if len(value) != 2:
            raise ValueError(f"{op}: expected {name} to be an int or a pair of ints, got {tuple(value)}")
        return check_int(op, name, value[0], minimum), check_int(op, name, value[1], minimum)
    value = check_int(op, name, value, minimum)
    return value, value


def check_b(op: str, b: object, x: Tensor) -> tuple[float, Tensor | None]:
    """The exponent as (number, None) or, for a tensor, (0.0, tensor); a tensor's value is never read."""
    if isinstance(b, Tensor):
        if b.dim() != 0:
            raise ValueError(f"{op}: expected b to be a number or a 0-dim tensor, got shape {tuple(b.shape)}")
        check_floating(op, "b", b)
        if b.device != x.device and b.device.type != "cpu":
            raise ValueError(f"{op}: expected b on x's device ({x.device}), got {b.device}")
        return 0.0, b if b.device == x.device else b.to(x.device)
    if isinstance(b, bool) or not isinstance(b, (Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: expected b to be a number or a 0-dim tensor, got {type(b).__name__} {b!r}")
    if not 1 <= b < math.inf:  # of a symbolic number too
        raise ValueError(f"{op}: expected b >= 1 and finite, got {b}")
    return float(b), None


def check_weight_units(op: str, weight: Tensor, max_out: int) -> None:
    check_int(op, "max_out", max_out, 1)
    if max_out > 256:
        raise ValueError(f"{op}: expected max_out <= 256, got {max_out}")
    if weight.shape[0] % max_out:
        raise ValueError(f"{op}: expected weight.size(0) divisible by max_out, got {weight.shape[0]} and {max_out}")


def check_bias(op: str, bias: Tensor | None, weight: Tensor, x: Tensor) -> None:
    if bias is None:
        return
    check_same(op, "bias", bias, x)
    if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
        raise ValueError(f"{op}: expected bias of shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def check_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, max_out: int) -> None:
    check_tensor(op, "x", x)
    check_floating(op, "x", x)
    check_same(op, "weight", weight, x)
    if weight.dim() != 2:
        expected = "(out_features * max_out, in_features)"
        raise ValueError(f"{op}: expected weight of shape {expected}, got {tuple(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: expected x.size(-1) == weight.size(1) ({weight.shape[1]}), got shape {tuple(x.shape)}")
    check_weight_units(op, weight, max_out)
    check_bias(op, bias, weight, x)


def check_conv2d(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    padding: object,
    padding_mode: str,
    max_out: int,
) -> None:
    check_tensor(op, "x", x)
    check_floating(op, "x", x)
    check_same(op, "weight", weight, x)
    if weight.dim() != 4:
        raise ValueError(
            f"{op}: expected weight of shape (out_channels * max_out, in_channels // groups, kh, kw), "
            f"got {tuple(weight.shape)}"
        )
    if x.dim() not in (3, 4):
        raise ValueError(f"{op}: expected x of shape (N, C, H, W) or (C, H, W), got {tuple(x.shape)}")
    check_int(op, "groups", groups, 1)
    if weight.shape[1] * groups != x.shape[-3]:
        raise ValueError(
            f"{op}: expected weight.size(1) * groups == in_channels of x, "
            f"got {weight.shape[1]} * {groups} and {x.shape[-3]}"
        )
    check_weight_units(op, weight, max_out)
    units = weight.shape[0] // max_out
    if units % groups:
        raise ValueError(f"{op}: expected out_channels divisible by groups, got {units} and {groups}")
    if weight.shape[2] < 1 or weight.shape[3] < 1:
        raise ValueError(f"{op}: expected a kernel of at least 1x1, got {tuple(weight.shape[2:])}")
    check_bias(op, bias, weight, x)
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"{op}: expected padding_mode to be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
    if isinstance(padding, str) and padding not in ("same", "valid"):
        raise ValueError(f"{op}: expected padding to be ints, 'same' or 'valid', got {padding!r}")


def check_layer_norm(x, normalized_shape, weight, bias, eps, channels_first) -> int:
    """The number of dimensions that are normalised."""
    op = "layer_norm"
    check_tensor(op, "x", x)
    check_floating(op, "x", x)
    if isinstance(normalized_shape, (tuple, list)):
        shape = tuple(normalized_shape)
    else:
        shape = (check_int(op, "normalized_shape", normalized_shape, 0),)
    dims = len(shape)
    if channels_first:
        if dims != 1 or x.dim() < 2 or x.shape[1] != shape[0]:
            expected = "x of shape (N, channels, ...) and normalized_shape (channels,) with channels_first"
            raise ValueError(f"{op}: expected {expected}, got {tuple(x.shape)} and {shape}")
    elif not dims or dims > x.dim() or x.shape[x.dim() - dims :] != shape:
        raise ValueError(f"{op}: expected x of shape (..., *normalized_shape), got {tuple(x.shape)} and {shape}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        check_same(op, name, t, x, dtype=False)
        check_floating(op, name, t)
        if t.shape != shape:
            raise ValueError(f"{op}: expected {name} of shape {shape} (normalized_shape), got {tuple(t.shape)}")
    if isinstance(eps, bool) or not isinstance(eps, (Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: expected eps to be a number, got {type(eps).__name__} {eps!r}")
    if not eps >= 0:
        raise ValueError(f"{op}: expected eps >= 0, got {eps}")
    return dims


def check_batch_norm(x, running_var, weight, bias, training, momentum, eps, activation, residual) -> None:
    op = "batch_norm_uncentered"
    check_tensor(op, "x", x)
    check_floating(op, "x", x)
    if x.dim() < 2:
        raise ValueError(f"{op}: expected x of shape (N, C, ...), got {tuple(x.shape)}")
    vectors = {"running_var": running_var, "weight": weight, "bias": bias}
    check_normalization(op, x, x.shape, "x's shape", vectors, training, momentum, eps, activation, residual)


def check_normalization(
    op: str,
    x: Tensor,
    shape: tuple[int, ...],
    whose: str,
    vectors: dict[str, Tensor | None],
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> None:
    """What normalises an activation of ``shape``, with x's type and device; ``whose`` names that shape."""
    for name, vector in vectors.items():
        if vector is None:
            continue
        check_same(op, name, vector, x, dtype=False)
        check_floating(op, name, vector)
        if vector.dim() != 1 or vector.shape[0] != shape[1]:
            raise ValueError(f"{op}: expected {name} of shape ({shape[1]},), got {tuple(vector.shape)}")
    if not training and vectors["running_var"] is None:
        raise ValueError(f"{op}: expected running_var in eval mode (training=False), got None")
    if activation not in (None, "relu"):
        raise ValueError(f"{op}: expected activation to be None or 'relu', got {activation!r}")
    if residual is not None:
        check_same(op, "residual", residual, x)
        if residual.shape != torch.Size(shape):
            raise ValueError(f"{op}: expected residual of {whose} {tuple(shape)}, got {tuple(residual.shape)}")
    for name, number in (("eps", eps), ("momentum", momentum)):
        if isinstance(number, bool) or not isinstance(number, (Real, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"{op}: expected {name} to be a number, got {type(number).__name__} {number!r}")
    if not eps >= 0:
        raise ValueError(f"{op}: expected eps >= 0, got {eps}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"{op}: expected momentum in [0, 1], got {momentum}")
