"""B-cos layers, norms and attentions of ours and of the peers, frozen for the explanation oracle (frozen_replay.py).

Every handler takes a module, the tape and the arguments of the module's forward, and stands for that forward. It is
made of plain torch operations on the module's parameters, and of the frozen functions (frozen_functions.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcosification.convert import frozen_functions as frozen
from bcosification.convert.frozen_functions import Tape

# --- B-cos layers -----------------------------------------------------------------------------------------------------


def _scaled(tape: Tape, a: Tensor, norm: Callable[[], Tensor], b: float | Tensor, special: bool) -> Tensor:
    """a * s with s recorded; `special` tells whether B = 1 and B = 2 take their own forms."""
    if special and float(b) == 1:
        return a

    def scale() -> Tensor:
        cosine = a.abs() / norm()
        return cosine if special and float(b) == 2 else (cosine + 1e-6) ** (b - 1)

    return a * tape.constant("scale", scale)


def _winner(tape: Tape, a: Tensor, max_out: int, dim: int) -> Tensor:
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
    module: nn.Module, tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None, b: Any, special: bool, own: bool
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
    module: nn.Module, tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None, b: Any, special: bool
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


def _own_conv2d(module: nn.Module, tape: Tape, x: Tensor) -> Tensor:
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


def _own_conv2d_same(module: nn.Module, tape: Tape, x: Tensor) -> Tensor:
    return _own_conv2d(module, tape, F.pad(x, _same_sides(module, x)))


def _own_cond_conv2d(module: nn.Module, tape: Tape, x: Tensor, routing: Tensor) -> Tensor:
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


def _own_linear(module: nn.Module, tape: Tape, x: Tensor) -> Tensor:
    weight = _unit_rows(module.weight) if module.normalize_weight else module.weight
    return _dense(module, tape, x, weight, module.bias, *_own_exponent(module))


def _peer_weight(module: nn.Module) -> Tensor:
    normed = type(module.linear).__name__.startswith("Normed")
    return _unit_rows(module.linear.weight) if normed else module.linear.weight


def _peer_conv2d(module: nn.Module, tape: Tape, x: Tensor) -> Tensor:
    weight, bias = _peer_weight(module), module.linear.bias
    return _conv(module, tape, x, weight, bias, *_peer_exponent(module), own=False)


def _peer_conv2d_with_scale(module: nn.Module, tape: Tape, x: Tensor) -> Tensor:
    return _peer_conv2d(module, tape, x) / module.scale


def _peer_linear(module: nn.Module, tape: Tape, x: Tensor) -> Tensor:
    return _dense(module, tape, x, _peer_weight(module), module.linear.bias, *_peer_exponent(module))


# --- norms, gates, attention ------------------------------------------------------------------------------------------


def _own_gated(activation: Callable) -> Callable:
    return lambda module, tape, x: activation(tape, x, inplace=module.inplace)


def _other_gated(module: nn.Module, tape: Tape, x: Tensor) -> Tensor:
    """Activations that were added to this package's: their own gate is recorded."""
    return frozen.gated(module.gate)(tape, x, inplace=module.inplace)


def _own_scaling_gate(module: nn.Module, tape: Tape, x: Tensor) -> Tensor:
    return x * tape.constant("gate", lambda: module.scale(x))


def _multi_head_attention(
    module: nn.Module,
    tape: Tape,
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
            scores = frozen.masked(scores, ~mask if mask.dtype == torch.bool else mask)
        return scores.softmax(-1)

    matrices = tape.constant("attention", attention)
    out = module.out_proj((matrices @ v).transpose(1, 2).flatten(2))
    if unbatched:
        out = out.squeeze(0)
    elif not module.batch_first:
        out = out.transpose(0, 1)
    return out, (matrices.mean(1) if average_attn_weights else matrices) if need_weights else None


def _own_attention_pool2d(module: nn.Module, tape: Tape, x: Tensor) -> Tensor:
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


def _own_l2_norm(module: nn.Module, tape: Tape, x: Tensor) -> Tensor:
    return x / tape.constant("norm", lambda: (x**2).sum(-1, keepdim=True).sqrt().clamp_min(module.eps))


def _own_position_mean(module: nn.Module, tape: Tape, cosines: Tensor) -> Tensor:
    return (cosines * tape.constant("scale", lambda: cosines.abs() ** (module.p - 1))).mean(1)


def _own_batch_norm(
    module: nn.Module, tape: Tape, x: Tensor, residual: Tensor | None = None, activation: str | None = None
) -> Tensor:
    var = module.running_var
    if var is None:
        var = tape.constant("variance", lambda: x.var(dim=[0, *range(2, x.dim())], unbiased=False))
    y = x / (frozen.per_channel(var, x) + module.eps).sqrt()
    if module.weight is not None:
        y = y * frozen.per_channel(module.weight, x)
    if module.bias is not None:
        y = y + frozen.per_channel(module.bias, x)
    if residual is not None:
        y = y + residual
    return frozen.relu(tape, y) if activation == "relu" else y


def _own_layer_norm(module: nn.Module, tape: Tape, x: Tensor) -> Tensor:
    return frozen.layer_norm(tape, x, module.normalized_shape, module.weight, module.bias, module.eps)


def _own_layer_norm2d(module: nn.Module, tape: Tape, x: Tensor) -> Tensor:
    variance = tape.constant("variance", lambda: x.var(dim=1, unbiased=False, keepdim=True))
    y = (x - x.mean(dim=1, keepdim=True)) / (variance + module.eps).sqrt()
    y = y if module.weight is None else y * frozen.per_channel(module.weight, x)
    return y if module.bias is None else y + frozen.per_channel(module.bias, x)


def _own_group_norm(module: nn.Module, tape: Tape, x: Tensor) -> Tensor:
    return frozen.group_norm(tape, x, module.num_groups, module.weight, module.bias, module.eps)


def _own_norm_act(norm: Callable) -> Callable:
    """A norm with drop and act behind it; what a fused chain adds comes after both."""

    def handler(
        module: nn.Module, tape: Tape, x: Tensor, residual: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        y = module.act(module.drop(norm(module, tape, x)))
        y = y if residual is None else y + residual
        return frozen.relu(tape, y) if activation == "relu" else y

    return handler


def _own_scale_and_shift(module: nn.Module, tape: Tape, x: Tensor) -> Tensor:
    y = _own_scaling_gate(module, tape, x)
    if module.bias is None:
        return y
    return y + (module.bias if module.channel_dim == -1 else frozen.per_channel(module.bias, x))


def _own_held_output(module: nn.Module, tape: Tape, *args: Any, **kwargs: Any) -> Tensor:
    return tape.constant("held", lambda: type(module).forward(module, *args, **kwargs))


def _own_gelu(module: nn.Module, tape: Tape, x: Tensor) -> Tensor:
    return frozen.gelu(tape, x, getattr(module, "approximate", "none"))


# --- which module has which handler -----------------------------------------------------------------------------------


def own_handlers() -> dict[type, Callable]:
    """Class of this package's (or torch's) -> its handler."""
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
        layers.SiLU: _own_gated(frozen.silu),
        layers.Hardswish: _own_gated(frozen.hardswish),
        layers.Mish: _own_gated(frozen.mish),
        layers.QuickGELU: _own_gated(frozen.quick_gelu),
        layers.ReLU6: _own_gated(frozen.relu6),
        layers.Tanh: _own_gated(frozen.tanh),
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
    "MyGELU": lambda module, tape, x: frozen.gelu(tape, x),  # B-cosification's, written with torch.erf
}


def handler_of(module: nn.Module, own: dict[type, Callable]) -> Callable | None:
    """The handler of a module, by its class or that of its nearest base; None: its own forward runs."""
    for cls in type(module).__mro__:
        if cls in own:
            return own[cls]
        if cls.__name__ in _PEER_HANDLERS and (hasattr(module, "linear") or cls.__name__ == "MyGELU"):
            return _PEER_HANDLERS[cls.__name__]
    return None
