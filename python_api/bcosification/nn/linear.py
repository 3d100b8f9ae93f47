"""The B-cos linear layer as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import bcos_kernels

from .bcos_layer import BcosLayer, check_exponent, check_max_out, init_like_torch

__all__ = ["BcosLinear"]


class BcosLinear(BcosLayer):
    """B-cos linear layer: y = a·(|a|/‖x‖)^(b−1) with a = ŵ·x, fused. Drop-in for ``bcos``'s.

        a = F.linear(x, w / w.norm(dim=1, keepdim=True))
        y = a * (a / (x.norm(dim=-1, keepdim=True) + 1e-12)).abs()            # b = 2

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        bias: adds a bias before the scale: y = s·(ŵ·x + β). Default False; B-cos layers have none.
        device, dtype: of the parameters.
        b: exponent B ≥ 1, default 2; a number, a Parameter (learnable, clamped to ≥ 1) or a 0-dim tensor.
        max_out: units per output of which the largest counts, default 1.
        normalize_weight: divide every weight row by its norm (B-cos v2, default True) or not (B-cosification).

    Shapes: x (..., in_features); weight (out_features · max_out, in_features), initialised as nn.Linear's; bias
    (out_features · max_out,) or None; y (..., out_features).

    Raises:
        ValueError: b < 1, max_out < 1.

    Source: B-cos networks v2, arXiv:2306.10898, equation 1.

    Example:
        >>> BcosLinear(384, 10, b=1.5)(torch.rand(4, 384)).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        b: float | Tensor = 2,
        max_out: int = 1,
        *,
        normalize_weight: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_exponent(name, b)
        self.in_features, self.out_features = in_features, out_features
        self.max_out = check_max_out(name, max_out)
        self.normalize_weight = bool(normalize_weight)
        units = out_features * max_out
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(units, in_features, **factory))
        self.register_parameter("bias", nn.Parameter(torch.empty(units, **factory)) if bias else None)
        self.set_b(b)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew, as nn.Linear does."""
        init_like_torch(self.weight, self.bias)

    def transform(self, x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        return bcos_kernels.linear(x, weight, bias, **options)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        if self.bias is not None:
            text += ", bias=True"
        return f"{text}, {self._describe_exponent()}"
