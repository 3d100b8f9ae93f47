"""The explanation oracle: replay a forward pass with everything dynamic frozen.

A B-cos network is y = W(x) x + c(x). Explanation mode claims that autograd returns W(x), because every scale, gate,
variance and attention matrix is detached. This file finds W(x) by another road, which uses neither that mode nor any
kernel of ours: a float64 copy of the model runs once with plain torch operations and records, at x,

    scale       s of every B-cos layer (|a|/n for B = 2, else (|a|/n + 1e-6)^(B-1)) and the winner of a max-out
    gate        ReLU's mask, GELU's Phi(x), the factors of SiLU and its like and of squeeze-and-excitation
    variance    of LayerNorm, GroupNorm and every other norm that takes it from the sample
    attention   the softmax matrices
    held        queries and keys, and the gates of gated linear units, whole
    pooling     the winners of max pooling
    norm        the lengths of embeddings

and every later run takes these from the record. What is left has to be an affine function of the image, whose gradient
is W(x) and whose value at the zero image is c(x). A detach that is missing anywhere makes `weights` differ from that
gradient, elementwise. Anything dynamic that this file does not know stays dynamic, and `is_affine` then says False: the
oracle does not pass what it did not understand.

Source: the definition of W(x), B-cos Networks (Boehle, Fritz, Schiele, 2022), equations 10 to 13; B-cosification
(Arya, Rao, Boehle, Schiele, 2024), section 3.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["FrozenReplay", "frozen_replay"]


class _Tape:
    """The frozen values in the order in which the forward pass asks for them.

    A module can run several times in one forward pass (torchvision's blocks share one ReLU), so values are kept in
    order and not by module.
    """

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.kinds: list[str] = []
        self.position = 0
        self.recording = True
        self.busy = False  # inside compute(): torch functions there belong to the value and are not frozen themselves

    def rewind(self) -> None:
        self.recording = False
        self.position = 0

    def constant(self, kind: str, compute: Callable[[], Tensor]) -> Tensor:
        """The value of `compute()` at the recorded image, as a constant."""
        if self.busy:  # inside of what is recorded whole
            return compute()
        if self.recording:
            self.busy = True
            try:
                with torch.no_grad():
                    value = compute().detach().clone()
            finally:
                self.busy = False
            self.values.append(value)
            self.kinds.append(kind)
            return value
        if self.position >= len(self.values) or self.kinds[self.position] != kind:
            raise RuntimeError(
                f"frozen_replay: expected the recorded order of operations, got a {kind} as number {self.position + 1} "
                f"of {len(self.values)} (the forward pass depends on the values of its input)"
            )
        value = self.values[self.position]
        self.position += 1
        return value


# --- B-cos layers -----------------------------------------------------------------------------------------------------


def _scaled(tape: _Tape, a: Tensor, norm: Callable[[], Tensor], b: float | Tensor, special: bool) -> Tensor:
    """a * s with s recorded; `special` tells whether B = 1 and B = 2 take their own forms."""
    if special and float(b) == 1:
        return a

    def scale() -> Tensor:
        cosine = a.abs() / norm()
        return cosine if special and float(b) == 2 else (cosine + 1e-6) ** (b - 1)

    return a * tape.constant("scale", scale)


def _winner(tape: _Tape, a: Tensor, max_out: int, dim: int) -> Tensor:
    """Max-out over consecutive units; the recorded unit stays the winner."""
    if max_out == 1:
        return a
    units = a.unflatten(dim, (a.size(dim) // max_out, max_out))
    dim = dim + 1 if dim >= 0 else dim
    index = tape.constant("max_out", lambda: units.argmax(dim, keepdim=True))
    return units.gather(dim, index).squeeze(dim)


def _unit_rows(weight: Tensor) -> Tensor:
    """w / ||w|| per output unit; a row of norm zero gives zero."""
    norm = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.dim() - 1))
    return torch.where(norm > 0, weight / norm.where(norm > 0, 1), 0)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _pad(x: Tensor, module: nn.Module, kernel: tuple[int, int], padding_mode: str) -> Tensor:
    """The truly padded image, so that the convolution itself needs no padding."""
    padding, dilation = module.padding, _pair(module.dilation)
    if padding == "valid":
        sides = (0, 0, 0, 0)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)
    else:
        rows, columns = _pair(padding)
        sides = (columns, columns, rows, rows)
    if not any(sides):
        return x
    return F.pad(x, sides) if padding_mode == "zeros" else F.pad(x, sides, mode=padding_mode)


def _conv(
    module: nn.Module, tape: _Tape, x: Tensor, weight: Tensor, bias: Tensor | None, b: Any, special: bool, own: bool
):
    """A B-cos convolution. `own`: the norm is that of the truly padded patch (the peer pads with zeros always)."""
    unbatched = x.dim() == 3
    x = x.unsqueeze(0) if unbatched else x
    kernel, groups = tuple(weight.shape[2:]), module.groups
    window = {"stride": _pair(module.stride), "dilation": _pair(module.dilation), "groups": groups}
    padded = _pad(x, module, kernel, module.padding_mode)
    a = _winner(tape, F.conv2d(padded, weight, bias, **window), module.max_out, 1)

    def norm() -> Tensor:
        squares = (padded if own else _pad(x, module, kernel, "zeros")) ** 2
        ones = squares.new_ones(groups, weight.size(1), *kernel)
        per_group = (F.conv2d(squares, ones, **window) + 1e-6).sqrt()
        return per_group.repeat_interleave(a.size(1) // groups, dim=1)

    y = _scaled(tape, a, norm, b, special)
    return y.squeeze(0) if unbatched else y


def _dense(
    module: nn.Module, tape: _Tape, x: Tensor, weight: Tensor, bias: Tensor | None, b: Any, special: bool
) -> Tensor:
    a = _winner(tape, F.linear(x, weight, bias), module.max_out, -1)
    return _scaled(tape, a, lambda: x.norm(dim=-1, keepdim=True) + 1e-12, b, special)


def _own_exponent(module: nn.Module) -> tuple[Any, bool]:
    """(b, special): a number takes the special forms of B = 1 and 2, a tensor (clamped to >= 1) never does.

    b_loss, clamping and scale are what fused layers of the peers keep.
    """
    if getattr(module, "b_loss", False):
        return module.b + 2, False
    least = 1 + 1e-6 if getattr(module, "clamping", False) else 1
    if isinstance(module.b, Tensor):
        return module.b.clamp(min=least), False
    return max(module.b, least), True


def _peer_exponent(module: nn.Module) -> tuple[Any, bool]:
    """The peers compare b's value; B-cosification's layers clamp it or add 2 where asked."""
    if getattr(module, "b_loss", False):
        return module.b + 2, False
    if getattr(module, "clamping", False) and float(module.b) not in (1, 2):
        return module.b.clamp(1 + 1e-6), False
    return module.b, True


def _own_conv2d(module: nn.Module, tape: _Tape, x: Tensor) -> Tensor:
    weight = _unit_rows(module.weight) if module.normalize_weight else module.weight
    return _conv(module, tape, x, weight, module.bias, *_own_exponent(module), own=True) / getattr(module, "scale", 1)


def _same_sides(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """TensorFlow's "SAME" padding, as F.pad takes it."""
    sides = []
    for size, kernel, stride, dilation in zip(
        x.shape[-2:], module.kernel_size, module.stride, module.dilation, strict=True
    ):
        reach = (math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1
        missing = max(reach - size, 0)
        sides.append((missing // 2, missing - missing // 2))
    return (*sides[1], *sides[0])


def _own_conv2d_same(module: nn.Module, tape: _Tape, x: Tensor) -> Tensor:
    return _own_conv2d(module, tape, F.pad(x, _same_sides(module, x)))


def _own_cond_conv2d(module: nn.Module, tape: _Tape, x: Tensor, routing: Tensor) -> Tensor:
    """Image by image, each with its own weight."""
    shape, (rows, columns) = module.weight_shape, (0, 0) if module.padding == "same" else module.padding
    outputs = []
    for image, shares in zip(x.split(1), routing, strict=True):
        weight = sum(share * expert.view(shape) for share, expert in zip(shares, module.weight, strict=True))
        weight = _unit_rows(weight) if module.normalize_weight else weight
        sides = _same_sides(module, image) if module.padding == "same" else (columns, columns, rows, rows)
        padded = F.pad(image, sides)
        a = F.conv2d(padded, weight, None, module.stride, 0, module.dilation, module.groups)

        def norm(padded: Tensor = padded, a: Tensor = a) -> Tensor:
            ones = padded.new_ones(module.groups, *shape[1:])
            squares = F.conv2d(padded**2, ones, None, module.stride, 0, module.dilation, module.groups)
            return (squares + 1e-6).sqrt().repeat_interleave(a.size(1) // module.groups, dim=1)

        outputs.append(_scaled(tape, a, norm, *_own_exponent(module)))
    return torch.cat(outputs)


def _own_linear(module: nn.Module, tape: _Tape, x: Tensor) -> Tensor:
    weight = _unit_rows(module.weight) if module.normalize_weight else module.weight
    return _dense(module, tape, x, weight, module.bias, *_own_exponent(module))


def _peer_weight(module: nn.Module) -> Tensor:
    normed = type(module.linear).__name__.startswith("Normed")
    return _unit_rows(module.linear.weight) if normed else module.linear.weight


def _peer_conv2d(module: nn.Module, tape: _Tape, x: Tensor) -> Tensor:
    weight, bias = _peer_weight(module), module.linear.bias
    return _conv(module, tape, x, weight, bias, *_peer_exponent(module), own=False)


def _peer_conv2d_with_scale(module: nn.Module, tape: _Tape, x: Tensor) -> Tensor:
    return _peer_conv2d(module, tape, x) / module.scale


def _peer_linear(module: nn.Module, tape: _Tape, x: Tensor) -> Tensor:
    return _dense(module, tape, x, _peer_weight(module), module.linear.bias, *_peer_exponent(module))


# --- norms, gates, attention ------------------------------------------------------------------------------------------


def _relu(tape: _Tape, x: Tensor, inplace: bool = False) -> Tensor:
    mask = tape.constant("relu", lambda: (x > 0).to(x.dtype))
    return x.mul_(mask) if inplace else x * mask  # in place: a later reader of x sees the result, as in the original


def _gelu(tape: _Tape, x: Tensor, approximate: str = "none") -> Tensor:
    def gate() -> Tensor:
        if approximate == "tanh":
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    return x * tape.constant("gelu", gate)


def _gated(gate: Callable[..., Tensor]) -> Callable:
    """The frozen form of an activation x·gate(x, ...)."""

    def activation(tape: _Tape, x: Tensor, *args: Any, inplace: bool = False, **kwargs: Any) -> Tensor:
        factor = tape.constant("gate", lambda: gate(x, *args, **kwargs))
        return x.mul_(factor) if inplace else x * factor

    return activation


def _slope(x: Tensor, below: float | Tensor = 0.01) -> Tensor:
    if isinstance(below, Tensor) and below.numel() > 1:
        below = _per_channel(below, x)
    return torch.where(x > 0, torch.ones_like(x), torch.zeros_like(x) + below)


def _clamped(x: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    ratio = x.clamp(min_val, max_val) / torch.where(x == 0, torch.ones_like(x), x)
    return torch.where(x == 0, torch.full_like(x, float(min_val < 0)), ratio)


_silu = _gated(lambda x: 1 / (1 + torch.exp(-x)))
_quick_gelu = _gated(lambda x: 1 / (1 + torch.exp(-1.702 * x)))
_hardswish = _gated(lambda x: (x + 3).clamp(0, 6) / 6)
_mish = _gated(lambda x: 1 - 2 / ((1 + torch.exp(x)) ** 2 + 1))  # tanh(log(1 + e^x)), written out
_tanh = _gated(lambda x: torch.where(x == 0, torch.ones_like(x), x.sinh() / x.cosh() / x))
_hardtanh = _gated(_clamped)
_relu6 = _gated(lambda x: _clamped(x, 0, 6))
_leaky_relu = _gated(lambda x, negative_slope=0.01: _slope(x, negative_slope))
_prelu = _gated(_slope)


def _own_gated(activation: Callable) -> Callable:
    return lambda module, tape, x: activation(tape, x, inplace=module.inplace)


def _other_gated(module: nn.Module, tape: _Tape, x: Tensor) -> Tensor:
    """Activations that were added to this package's: their own gate is recorded."""
    return _gated(module.gate)(tape, x, inplace=module.inplace)


def _own_scaling_gate(module: nn.Module, tape: _Tape, x: Tensor) -> Tensor:
    return x * tape.constant("gate", lambda: module.scale(x))


def _softmax(tape: _Tape, x: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Tensor:
    return tape.constant("attention", lambda: x.softmax(dim))


def _scaled_dot_product_attention(
    tape: _Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        raise NotImplementedError("frozen_replay: expected attention with as many keys as queries, got enable_gqa=True")

    def attention() -> Tensor:
        scores = query @ key.transpose(-1, -2) * (scale if scale is not None else query.size(-1) ** -0.5)
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).tril().logical_not(), -math.inf)
        return _masked(scores, attn_mask).softmax(-1)

    return tape.constant("attention", attention) @ value


def _masked(scores: Tensor, keep_or_add: Tensor | None) -> Tensor:
    if keep_or_add is None:
        return scores
    if keep_or_add.dtype == torch.bool:
        return scores.masked_fill(~keep_or_add, -math.inf)
    return scores + keep_or_add


def _multi_head_attention(
    module: nn.Module,
    tape: _Tape,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """nn.MultiheadAttention and ours, from their parameters (bias_k, bias_v and add_zero_attn apart)."""
    if module.bias_k is not None or module.add_zero_attn:
        raise NotImplementedError("frozen_replay: expected attention without add_bias_kv and add_zero_attn, got one")
    key = query if key is None else key
    value = key if value is None else value
    unbatched = query.dim() == 2
    if unbatched:
        query, key, value = (t.unsqueeze(0) for t in (query, key, value))
    elif not module.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    weights = (
        module.in_proj_weight.chunk(3)
        if module.in_proj_weight is not None
        else (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    )
    biases = module.in_proj_bias.chunk(3) if module.in_proj_bias is not None else (None, None, None)
    q, k, v = (
        F.linear(t, w, bias).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for t, w, bias in zip((query, key, value), weights, biases, strict=True)
    )

    def attention() -> Tensor:
        scores = q @ k.transpose(-1, -2) * q.size(-1) ** -0.5
        masks = []
        if attn_mask is not None:
            masks.append(attn_mask.unflatten(0, (-1, module.num_heads)) if attn_mask.dim() == 3 else attn_mask)
        if key_padding_mask is not None:
            masks.append(key_padding_mask.view(k.size(0), 1, 1, k.size(2)))
        for mask in masks:  # a boolean mask bars where it is True, other than that of scaled_dot_product_attention
            scores = _masked(scores, ~mask if mask.dtype == torch.bool else mask)
        return scores.softmax(-1)

    matrices = tape.constant("attention", attention)
    out = module.out_proj((matrices @ v).transpose(1, 2).flatten(2))
    if unbatched:
        out = out.squeeze(0)
    elif not module.batch_first:
        out = out.transpose(0, 1)
    return out, (matrices.mean(1) if average_attn_weights else matrices) if need_weights else None


def _own_attention_pool2d(module: nn.Module, tape: _Tape, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    if module.mode == "unpool":
        return module.norm(module.c_proj(module.v_proj(tokens)))
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)

    def attention() -> Tensor:
        q, k = heads(module.q_proj(tokens[:, :1])), heads(module.k_proj(tokens))
        return (q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))).softmax(-1)

    values = tape.constant("attention", attention) @ heads(module.v_proj(tokens))
    weight = module.c_proj.weight
    weight = _unit_rows(weight) if module.c_proj.normalize_weight else weight
    return F.linear(values.transpose(1, 2).flatten(1), weight)


def _own_l2_norm(module: nn.Module, tape: _Tape, x: Tensor) -> Tensor:
    return x / tape.constant("norm", lambda: (x**2).sum(-1, keepdim=True).sqrt().clamp_min(module.eps))


def _own_position_mean(module: nn.Module, tape: _Tape, cosines: Tensor) -> Tensor:
    return (cosines * tape.constant("scale", lambda: cosines.abs() ** (module.p - 1))).mean(1)


def _per_channel(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.view(-1, *[1] * (x.dim() - 2))


def _own_batch_norm(
    module: nn.Module, tape: _Tape, x: Tensor, residual: Tensor | None = None, activation: str | None = None
) -> Tensor:
    var = module.running_var
    if var is None:
        var = tape.constant("variance", lambda: x.var(dim=[0, *range(2, x.dim())], unbiased=False))
    y = x / (_per_channel(var, x) + module.eps).sqrt()
    if module.weight is not None:
        y = y * _per_channel(module.weight, x)
    if module.bias is not None:
        y = y + _per_channel(module.bias, x)
    if residual is not None:
        y = y + residual
    return _relu(tape, y) if activation == "relu" else y


def _layer_norm(
    tape: _Tape,
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    dims = list(range(-len(shape), 0))
    std = tape.constant("variance", lambda: (x.var(dim=dims, unbiased=False, keepdim=True) + eps).sqrt())
    y = (x - x.mean(dim=dims, keepdim=True)) / std
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _group_norm(
    tape: _Tape, x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    grouped = x.reshape(x.size(0), num_groups, -1)
    std = tape.constant("variance", lambda: (grouped.var(dim=2, unbiased=False, keepdim=True) + eps).sqrt())
    y = ((grouped - grouped.mean(dim=2, keepdim=True)) / std).view_as(x)
    y = y if weight is None else y * _per_channel(weight, x)
    return y if bias is None else y + _per_channel(bias, x)


def _own_layer_norm(module: nn.Module, tape: _Tape, x: Tensor) -> Tensor:
    return _layer_norm(tape, x, module.normalized_shape, module.weight, module.bias, module.eps)


def _own_layer_norm2d(module: nn.Module, tape: _Tape, x: Tensor) -> Tensor:
    variance = tape.constant("variance", lambda: x.var(dim=1, unbiased=False, keepdim=True))
    y = (x - x.mean(dim=1, keepdim=True)) / (variance + module.eps).sqrt()
    y = y if module.weight is None else y * _per_channel(module.weight, x)
    return y if module.bias is None else y + _per_channel(module.bias, x)


def _own_group_norm(module: nn.Module, tape: _Tape, x: Tensor) -> Tensor:
    return _group_norm(tape, x, module.num_groups, module.weight, module.bias, module.eps)


def _own_norm_act(norm: Callable) -> Callable:
    """A norm with drop and act behind it; what a fused chain adds comes after both."""

    def handler(
        module: nn.Module, tape: _Tape, x: Tensor, residual: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        y = module.act(module.drop(norm(module, tape, x)))
        y = y if residual is None else y + residual
        return _relu(tape, y) if activation == "relu" else y

    return handler


def _own_scale_and_shift(module: nn.Module, tape: _Tape, x: Tensor) -> Tensor:
    y = _own_scaling_gate(module, tape, x)
    if module.bias is None:
        return y
    return y + (module.bias if module.channel_dim == -1 else _per_channel(module.bias, x))


def _own_held_output(module: nn.Module, tape: _Tape, *args: Any, **kwargs: Any) -> Tensor:
    return tape.constant("held", lambda: type(module).forward(module, *args, **kwargs))


def _own_gelu(module: nn.Module, tape: _Tape, x: Tensor) -> Tensor:
    return _gelu(tape, x, getattr(module, "approximate", "none"))


def _max_pool2d(
    tape: _Tape,
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    if return_indices:
        raise NotImplementedError("frozen_replay: expected max pooling without return_indices, got return_indices=True")
    index = tape.constant(
        "pooling",
        lambda: F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)[1],
    )
    return x.flatten(-2).gather(-1, index.flatten(-2)).view(index.shape)


def _var(tape: _Tape, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tape.constant("variance", lambda: torch.var(x, *args, **kwargs))


_FUNCTIONS: dict[Callable, Callable] = {
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    F.relu_: lambda tape, x: _relu(tape, x, inplace=True),
    Tensor.relu_: lambda tape, x: _relu(tape, x, inplace=True),
    F.gelu: _gelu,
    F.silu: _silu,
    F.hardswish: _hardswish,
    F.mish: _mish,
    F.hardtanh: _hardtanh,
    F.relu6: _relu6,
    F.leaky_relu: _leaky_relu,
    F.prelu: _prelu,
    F.softmax: _softmax,
    torch.softmax: _softmax,
    Tensor.softmax: _softmax,
    F.scaled_dot_product_attention: _scaled_dot_product_attention,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    F.max_pool2d_with_indices: _max_pool2d,
    torch.var: _var,
    Tensor.var: _var,
}


class _FrozenFunctions(TorchFunctionMode):
    """Sends the torch functions that are dynamic to their frozen forms, wherever a forward pass calls them."""

    def __init__(self, tape: _Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        frozen = None if self.tape.busy else _FUNCTIONS.get(func)
        if frozen is None:
            return func(*args, **(kwargs or {}))
        return frozen(self.tape, *args, **(kwargs or {}))


def _own_handlers() -> dict[type, Callable]:
    from bcosification import nn as layers

    return {
        layers.BcosConv2d: _own_conv2d,
        layers.BcosConv2dSame: _own_conv2d_same,
        layers.BcosCondConv2d: _own_cond_conv2d,
        layers.BcosLinear: _own_linear,
        layers.BatchNormUncentered2d: _own_batch_norm,
        layers.LayerNorm: _own_layer_norm,
        layers.LayerNorm2d: _own_layer_norm2d,
        layers.GroupNorm: _own_group_norm,
        layers.BatchNormAct2d: _own_norm_act(_own_batch_norm),
        layers.LayerNormAct: _own_norm_act(_own_layer_norm),
        layers.LayerNormAct2d: _own_norm_act(_own_layer_norm2d),
        layers.GroupNormAct: _own_norm_act(_own_group_norm),
        layers.HeldOutput: _own_held_output,
        layers.GELU: _own_gelu,
        layers.SiLU: _own_gated(_silu),
        layers.Hardswish: _own_gated(_hardswish),
        layers.Mish: _own_gated(_mish),
        layers.QuickGELU: _own_gated(_quick_gelu),
        layers.ReLU6: _own_gated(_relu6),
        layers.Tanh: _own_gated(_tanh),
        layers.GatedActivation: _other_gated,
        layers.ScalingGate: _own_scaling_gate,
        layers.ScaleAndShift: _own_scale_and_shift,
        layers.MultiheadAttention: _multi_head_attention,
        layers.AttentionPool2d: _own_attention_pool2d,
        layers.L2Norm: _own_l2_norm,
        layers.PositionMean: _own_position_mean,
        nn.MultiheadAttention: _multi_head_attention,
    }


# By name, since neither peer is a dependency; their norms are made of torch functions that are frozen as such.
_PEER_HANDLERS: dict[str, Callable] = {
    "BcosConv2d": _peer_conv2d,
    "BcosConv2dWithScale": _peer_conv2d_with_scale,
    "BcosLinear": _peer_linear,
    "MyGELU": lambda module, tape, x: _gelu(tape, x),  # B-cosification's, written with torch.erf
}


def _handler(module: nn.Module, own: dict[type, Callable]) -> Callable | None:
    for cls in type(module).__mro__:
        if cls in own:
            return own[cls]
        if cls.__name__ in _PEER_HANDLERS and (hasattr(module, "linear") or cls.__name__ == "MyGELU"):
            return _PEER_HANDLERS[cls.__name__]
    return None


class FrozenReplay:
    """A model frozen at one batch of images: an affine function, in float64. Made by `frozen_replay`.

    Attributes:
        model: The float64 copy that is replayed.
        images: The recorded images (N, C, H, W), float64.
        recorded: How many values of each kind were recorded: scale, max_out, relu, gelu, gate, variance, attention,
            held, pooling, norm.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        if images.dim() != getattr(model, "input_dims", 4):  # of texts: embeddings (N, T, D)
            raise ValueError(f"frozen_replay: expected images of shape (N, C, H, W), got {tuple(images.shape)}")
        self.model = copy.deepcopy(model).double().eval().requires_grad_(False)
        self.images = images.detach().clone().double()
        own = _own_handlers()
        self._tape = _Tape()
        for module in self.model.modules():
            if hasattr(module, "set_explanation_mode"):
                module.set_explanation_mode(False)  # the copy may have been made inside explanation mode
            if getattr(module, "memory_efficient", False):
                module.memory_efficient = False  # DenseNet's checkpoints would run parts a second time, out of order
            handler = _handler(module, own)
            if handler is not None:
                module.forward = _bound(handler, module, self._tape)
        self._recorded_logits = self._run(self.images).detach()
        self.recorded = Counter(self._tape.kinds)

    def _run(self, images: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # x + delta and alpha * x leave [0, 1] on purpose
            with _FrozenFunctions(self._tape):
                return self.model(images * 1)  # not a leaf, so that a first layer may work in place

    def logits(self, images: Tensor | None = None) -> Tensor:
        """The frozen function of `images` (N, C, H, W): logits (N, classes), float64.

        Without images: the logits of the recording itself, in which nothing is frozen.
        """
        if images is None:
            return self._recorded_logits
        if images.shape != self.images.shape:
            raise ValueError(
                f"frozen_replay: expected images of the recorded shape {tuple(self.images.shape)}, got "
                f"{tuple(images.shape)}"
            )
        self._tape.rewind()
        logits = self._run(images.double())
        if self._tape.position != len(self._tape.values):
            raise RuntimeError(
                f"frozen_replay: expected all {len(self._tape.values)} recorded values to be used, got "
                f"{self._tape.position} (the forward pass depends on the values of its input)"
            )
        return logits

    def gradient(self, targets: Tensor | list[int] | int) -> Tensor:
        """W(x), which `explain(...).weights` must equal: each image's gradient of its target logit, (N, C, H, W)."""
        x = self.images.clone().requires_grad_()
        with torch.enable_grad():
            logits = self.logits(x)
            (gradient,) = torch.autograd.grad(logits.gather(1, self._column(targets, logits)).sum(), x)
        return gradient

    def constant(self, targets: Tensor | list[int] | int) -> Tensor:
        """The frozen function at the zero image, (N,): all that adds to the logit besides the image."""
        with torch.no_grad():
            logits = self.logits(torch.zeros_like(self.images))
        return logits.gather(1, self._column(targets, logits)).squeeze(1)

    def is_affine(self, tolerance: float = 1e-9) -> bool:
        """Whether f(x) is the model's own output and f an affine function, at x + delta, x - delta and alpha x.

        Args:
            tolerance: Largest error allowed, relative to the largest logit (default 1e-9; everything is float64).
        """
        x = self.images
        delta = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x.device)
        with torch.no_grad():
            at_x, at_zero = self.logits(x), self.logits(torch.zeros_like(x))
            forward, backward = self.logits(x + delta), self.logits(x - delta)
            pairs = [(at_x, self._recorded_logits), (forward + backward, 2 * at_x)]
            pairs += [(self.logits(alpha * x), alpha * at_x + (1 - alpha) * at_zero) for alpha in (0.3, -1.0, 2.0)]
        size = max(1e-12, *(float(t.abs().max()) for t in (at_x, at_zero, forward, backward)))
        return all(bool(((got - expected).abs().max() <= tolerance * size).item()) for got, expected in pairs)

    def _column(self, targets: Tensor | list[int] | int, logits: Tensor) -> Tensor:
        return torch.as_tensor(targets, device=logits.device).long().reshape(-1, 1).expand(logits.size(0), 1)


def _bound(handler: Callable, module: nn.Module, tape: _Tape) -> Callable:
    return lambda *args, **kwargs: handler(module, tape, *args, **kwargs)


def frozen_replay(model: nn.Module, x6: Tensor) -> FrozenReplay:
    """Record everything dynamic of `model` at the encoded images `x6` and freeze it.

    Args:
        model: A B-cos model: converted by `bcosify`, made of the peers' layers, or fused. It is copied, not changed.
        x6: Images as the model reads them, [x, 1 - x], (N, 6, H, W), in [0, 1]; of a model with ``input_dims`` (that of
            texts, a function of embeddings (N, T, D)) a tensor of so many dimensions.

    Returns:
        A `FrozenReplay`, with `.logits(x6)`, `.gradient(targets)`, `.constant(targets)` and `.is_affine()`.

    Raises:
        ValueError: x6 is not four-dimensional (or of ``input_dims``).
        NotImplementedError: attention or pooling with an option that nobody wrote the frozen form of.

    Example:
        >>> replay = frozen_replay(model, x6)
        >>> replay.is_affine()
        True
        >>> torch.testing.assert_close(explain(model, x6, 3).weights.double(), replay.gradient(3), rtol=1e-4, atol=1e-6)
    """
    return FrozenReplay(model, x6)
