"""GELU whose gate is a constant in explanation mode."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bcos_kernels

from .gates import GatedActivation
from .linear import BcosLinear

__all__ = ["GELU"]


class GELU(GatedActivation, nn.GELU):
    """nn.GELU, x·Φ(x); in explanation mode the gate Φ(x) is a constant for the gradient.

        y = x * (0.5 * (1 + torch.erf(x / 2**0.5))).detach()                  # explanation mode

    Args:
        approximate: "none" (default) for the exact gate, "tanh" for 0.5·(1 + tanh(√(2/π)·(x + 0.044715·x³))).

    Shapes: any, kept.

    Raises:
        ValueError: for another ``approximate``.

    Source: B-cosification, arXiv:2411.00715, section 3; arXiv:1606.08415.

    Example:
        >>> GELU()(torch.zeros(3))
        tensor([0., 0., 0.])
    """

    approximate: str = "none"

    def __init__(self, approximate: str = "none") -> None:
        if approximate not in ("none", "tanh"):
            raise ValueError(f"GELU: expected approximate to be 'none' or 'tanh', got {approximate!r}")
        super().__init__(approximate)

    def behind(self, linear: BcosLinear, x: Tensor) -> Tensor:
        """self(linear(x)) as one op; where it cannot be one, the two are called in turn. No hooks are called."""
        constant = linear.constant_gain is not None and linear.bias is not None
        if constant or self.approximate != "none" or linear.detach != self.detach:
            return self.forward(linear.forward(x))
        return bcos_kernels.linear_gelu(
            x,
            linear.weight,
            linear.bias,
            b=linear.exponent(),
            normalize_weight=linear.normalize_weight,
            max_out=linear.max_out,
            detach=self.detach,
        )

    def gate(self, x: Tensor) -> Tensor:
        if self.approximate == "tanh":
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))

    def activate(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate=self.approximate)
