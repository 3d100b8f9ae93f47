"""A module whose whole output is a constant in explanation mode."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .modes import DetachableModule

__all__ = ["HeldOutput"]


class HeldOutput(DetachableModule):
    """Mixin that makes the output of the module behind it a constant for the gradient in explanation mode.

        y = module(x).detach()                                                # explanation mode

    For what only makes dynamic weights: queries and keys, the gate of a gated linear unit. It is put before another
    class, as in ``class HeldSiLU(HeldOutput, nn.SiLU)``.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(*args, **kwargs)
        return y.detach() if self.detach else y
