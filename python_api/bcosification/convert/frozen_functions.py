"""Torch's dynamic functions, frozen for the explanation oracle (frozen_replay.py), and the tape of what was recorded.

Every function here takes the tape first and gives what torch's function of its name gives, with everything that depends
on its input, beyond an affine map, taken from the tape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Tape:
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


def relu(tape: Tape, x: Tensor, inplace: bool = False) -> Tensor:
    mask = tape.constant("relu", lambda: (x > 0).to(x.dtype))
    return x.mul_(mask) if inplace else x * mask  # in place: a later reader of x sees the result, as in the original


def gelu(tape: Tape, x: Tensor, approximate: str = "none") -> Tensor:
    def gate() -> Tensor:
        if approximate == "tanh":
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    return x * tape.constant("gelu", gate)


def gated(gate: Callable[..., Tensor]) -> Callable:
    """The frozen form of an activation x·gate(x, ...)."""

    def activation(tape: Tape, x: Tensor, *args: Any, inplace: bool = False, **kwargs: Any) -> Tensor:
        factor = tape.constant("gate", lambda: gate(x, *args, **kwargs))
        return x.mul_(factor) if inplace else x * factor

    return activation


def _slope(x: Tensor, below: float | Tensor = 0.01) -> Tensor:
    if isinstance(below, Tensor) and below.numel() > 1:
        below = per_channel(below, x)
    return torch.where(x > 0, torch.ones_like(x), torch.zeros_like(x) + below)


def _clamped(x: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    ratio = x.clamp(min_val, max_val) / torch.where(x == 0, torch.ones_like(x), x)
    return torch.where(x == 0, torch.full_like(x, float(min_val < 0)), ratio)


silu = gated(lambda x: 1 / (1 + torch.exp(-x)))
quick_gelu = gated(lambda x: 1 / (1 + torch.exp(-1.702 * x)))
hardswish = gated(lambda x: (x + 3).clamp(0, 6) / 6)
mish = gated(lambda x: 1 - 2 / ((1 + torch.exp(x)) ** 2 + 1))  # tanh(log(1 + e^x)), written out
tanh = gated(lambda x: torch.where(x == 0, torch.ones_like(x), x.sinh() / x.cosh() / x))
hardtanh = gated(_clamped)
relu6 = gated(lambda x: _clamped(x, 0, 6))
leaky_relu = gated(lambda x, negative_slope=0.01: _slope(x, negative_slope))
prelu = gated(_slope)


def softmax(tape: Tape, x: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Tensor:
    return tape.constant("attention", lambda: x.softmax(dim))


def scaled_dot_product_attention(
    tape: Tape,
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
        return masked(scores, attn_mask).softmax(-1)

    return tape.constant("attention", attention) @ value


def masked(scores: Tensor, keep_or_add: Tensor | None) -> Tensor:
    if keep_or_add is None:
        return scores
    if keep_or_add.dtype == torch.bool:
        return scores.masked_fill(~keep_or_add, -math.inf)
    return scores + keep_or_add


def per_channel(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.view(-1, *[1] * (x.dim() - 2))


def layer_norm(
    tape: Tape,
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


def group_norm(
    tape: Tape, x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    grouped = x.reshape(x.size(0), num_groups, -1)
    std = tape.constant("variance", lambda: (grouped.var(dim=2, unbiased=False, keepdim=True) + eps).sqrt())
    y = ((grouped - grouped.mean(dim=2, keepdim=True)) / std).view_as(x)
    y = y if weight is None else y * per_channel(weight, x)
    return y if bias is None else y + per_channel(bias, x)


def max_pool2d(
    tape: Tape,
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


def _var(tape: Tape, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return tape.constant("variance", lambda: torch.var(x, *args, **kwargs))


FUNCTIONS: dict[Callable, Callable] = {
    F.relu: relu,
    torch.relu: relu,
    Tensor.relu: relu,
    F.relu_: lambda tape, x: relu(tape, x, inplace=True),
    Tensor.relu_: lambda tape, x: relu(tape, x, inplace=True),
    F.gelu: gelu,
    F.silu: silu,
    F.hardswish: hardswish,
    F.mish: mish,
    F.hardtanh: hardtanh,
    F.relu6: relu6,
    F.leaky_relu: leaky_relu,
    F.prelu: prelu,
    F.softmax: softmax,
    torch.softmax: softmax,
    Tensor.softmax: softmax,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.max_pool2d: max_pool2d,
    torch.max_pool2d: max_pool2d,
    F.max_pool2d_with_indices: max_pool2d,
    torch.var: _var,
    Tensor.var: _var,
}


class FrozenFunctions(TorchFunctionMode):
    """Sends the torch functions that are dynamic to their frozen forms, wherever a forward pass calls them."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        frozen = None if self.tape.busy else FUNCTIONS.get(func)
        if frozen is None:
            return func(*args, **(kwargs or {}))
        return frozen(self.tape, *args, **(kwargs or {}))
