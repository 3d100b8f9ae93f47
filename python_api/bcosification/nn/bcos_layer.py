"""What B-cos convolutions and linear layers share: the exponent, the peers' keys, the effect of a kept bias."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .modes import DetachableModule, per_sample

__all__ = ["BcosLayer"]

_RENAMED = {"linear.weight": "weight", "linear.bias": "bias"}


class LinearView:
    """What the peers call ``layer.linear``: reads and writes the layer's own weight and bias. Not a submodule."""

    __slots__ = ("_layer",)

    def __init__(self, layer: nn.Module) -> None:
        object.__setattr__(self, "_layer", layer)

    @property
    def weight(self) -> Tensor:
        return self._layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self._layer.bias

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("weight", "bias"):
            raise AttributeError(f"a B-cos layer's .linear has weight and bias, not {name!r}")
        setattr(self._layer, name, value)

    def __repr__(self) -> str:
        return f"LinearView(weight={tuple(self.weight.shape)}, bias={self.bias is not None})"


class BcosLayer(DetachableModule):
    """Base of `BcosConv2d` and `BcosLinear`; subclasses define ``transform``.

    ``b`` is a float, a Parameter (learnable, clamped to ≥ 1 on use) or a 0-dim buffer that state_dict leaves out (a
    schedule's). Numbers 1 and 2 take the special forms of the transform, tensors always the general one.
    """

    weight: Tensor
    bias: Tensor | None
    b: float | Tensor
    max_out: int
    normalize_weight: bool

    @property
    def linear(self) -> Any:
        """The peers' name for the holder of ``weight`` and ``bias`` (a view: state_dict knows ``weight`` alone)."""
        return LinearView(self)

    def set_b(self, value: float | Tensor, *, buffer: bool | None = None) -> None:
        """Set the exponent.

        Args:
            value: a number ≥ 1, a Parameter (becomes the layer's learnable exponent) or a 0-dim tensor.
            buffer: True holds it in a 0-dim buffer, whose later changes need no recompilation; False as a Python
                number, which has the fast forms of B = 1 and B = 2; None (default) leaves the kind of holder as it
                is: a number given to a layer with a tensor is written into that tensor.

        Raises:
            ValueError: for a number below 1 or not finite, or a tensor that is not 0-dim.
            TypeError: for anything else.
        """
        value = check_exponent(type(self).__name__, value)
        held = self.__dict__.get("_parameters", {}).get("b")
        if held is None:
            held = self.__dict__.get("_buffers", {}).get("b")
        if buffer is None and held is not None and not isinstance(value, nn.Parameter):
            with torch.no_grad():
                if isinstance(value, Tensor):
                    held.copy_(value)
                else:
                    held.fill_(value)
            return
        for place in (self.__dict__, self._parameters, self._buffers):
            place.pop("b", None)
        self._non_persistent_buffers_set.discard("b")
        if isinstance(value, nn.Parameter):
            self.register_parameter("b", value)
        elif buffer or (buffer is None and isinstance(value, Tensor)):
            # At least float32: an exponent of 1.7 in bfloat16 is 1.703.
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            held = torch.empty((), dtype=dtype, device=self.weight.device)
            with torch.no_grad():
                if isinstance(value, Tensor):
                    held.copy_(value)
                else:
                    held.fill_(value)
            self.register_buffer("b", held, persistent=False)
        else:
            self.b = check_exponent(type(self).__name__, float(value))

    def exponent(self) -> float | Tensor:
        """The exponent that the forward uses: a learnable one is clamped to ≥ 1, its value never read on the host."""
        b = self.b
        return b.clamp(min=1) if isinstance(b, nn.Parameter) else b

    def transform(self, x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__}: a B-cos layer has to define transform")

    def _unit_dim(self) -> int:
        return -1

    def forward(self, x: Tensor) -> Tensor:
        if self.constant_gain is not None and self.bias is not None:
            return self._forward_with_gain(x)
        return self.transform(
            x,
            self.weight,
            self.bias,
            b=self.exponent(),
            max_out=self.max_out,
            normalize_weight=self.normalize_weight,
            detach=self.detach,
        )

    def _forward_with_gain(self, x: Tensor) -> Tensor:
        """y = s·(ŵ·p + β·gain): s·β·(gain − 1) is added to y, with s, a constant, as y/a."""
        weight, bias, dim = self.weight, self.bias, self._unit_dim()
        b, normalize = self.exponent(), self.normalize_weight
        y = self.transform(x, weight, bias, b=b, max_out=self.max_out, normalize_weight=normalize, detach=self.detach)
        with torch.no_grad():
            a = self.transform(x, weight, bias, b=1, max_out=1, normalize_weight=normalize, detach=False)
            beta = bias.detach().to(a.dtype).view(-1, *([1] * (-dim - 1)))
            if self.max_out > 1:
                a = a.unflatten(dim, (a.shape[dim] // self.max_out, self.max_out))
                unit = a.argmax(dim, keepdim=True)
                beta = beta.view(-1, self.max_out, *([1] * (-dim - 1))).expand_as(a)
                a, beta = a.gather(dim, unit).squeeze(dim), beta.gather(dim, unit).squeeze(dim)
            scale = torch.where(a == 0, torch.zeros_like(a), y.detach() / a)
            scaled = scale * beta
        batched = x.dim() > -dim  # (C, H, W) and (K,) are one sample
        gain = per_sample(self.constant_gain, y.shape[0] if batched else 1, y.dim(), type(self).__name__)
        return y + scaled * (gain - 1)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        for theirs, ours in _RENAMED.items():
            if prefix + theirs in state_dict and prefix + ours not in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _describe_exponent(self) -> str:
        b = self.b
        if isinstance(b, nn.Parameter):
            text = "b=learnable"
        elif isinstance(b, Tensor):
            text = "b=buffer"
        else:
            text = f"b={b:g}"
        if self.max_out > 1:
            text += f", max_out={self.max_out}"
        return text + f", normalize_weight={self.normalize_weight}"


def check_exponent(name: str, b: float | Tensor) -> float | Tensor:
    """``b`` unchanged if it can be an exponent: a finite number ≥ 1 or a 0-dim tensor (not read)."""
    if isinstance(b, Tensor):
        if b.dim() != 0 or not b.is_floating_point():
            raise ValueError(f"{name}: expected b to be a 0-dim float tensor, got {b.dtype} of shape {tuple(b.shape)}")
        return b
    if isinstance(b, bool) or not isinstance(b, Real):
        raise TypeError(f"{name}: expected b to be a number or a 0-dim tensor, got {type(b).__name__} {b!r}")
    if not b >= 1 or math.isinf(b):
        raise ValueError(f"{name}: expected b >= 1 and finite, got {b}")
    return b


def check_max_out(name: str, max_out: int) -> int:
    if isinstance(max_out, bool) or not isinstance(max_out, int) or max_out < 1:
        raise ValueError(f"{name}: expected max_out to be an int >= 1, got {max_out!r}")
    return max_out


def init_like_torch(weight: Tensor, bias: Tensor | None) -> None:
    """The initialisation of nn.Conv2d and nn.Linear: uniform in ±1/√fan_in (Kaiming's with a = √5)."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    if bias is not None:
        fan_in = weight[0].numel() if weight.shape[0] else 0
        bound = 1 / math.sqrt(fan_in) if fan_in > 0 else 0
        nn.init.uniform_(bias, -bound, bound)
