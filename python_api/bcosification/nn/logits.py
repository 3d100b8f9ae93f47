"""What happens to the logits after the last layer."""

from __future__ import annotations

import math

from torch import Tensor

from .modes import DetachableModule, per_sample

__all__ = ["LogitBias"]


class LogitBias(DetachableModule):
    """logits / temperature + bias, constants both: y = x / (temperature or 1) + (bias or 0).

    Args:
        bias: a number, None (default) for none, or "auto" for −log(num_classes − 1), at which zero logits are the prior
            of one class in num_classes under a sigmoid.
        temperature: a positive number the logits are divided by, None (default) for none.
        num_classes: needed for "auto", at least 2.

    The numbers are kept as ``logit_bias`` and ``logit_temperature``, the peer's names; they are no parameters, and
    state_dict does not have them.

    Shapes: any with the batch in dimension 0, kept.

    Raises:
        ValueError: an unknown ``bias``, "auto" without at least two classes, a temperature that is not positive.

    Source: B-cos networks v2, arXiv:2306.10898, section 4; B-cosification, arXiv:2411.00715.

    Example:
        >>> round(LogitBias("auto", num_classes=1000).logit_bias, 4)
        -6.9068
    """

    logit_bias: float | None
    logit_temperature: float | None

    def __init__(
        self,
        bias: float | str | None = None,
        temperature: float | None = None,
        *,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(bias, str):
            if bias != "auto":
                raise ValueError(f"LogitBias: expected bias to be a number, None or 'auto', got {bias!r}")
            if num_classes is None or num_classes < 2:
                raise ValueError(f"LogitBias: expected num_classes >= 2 with bias='auto', got {num_classes}")
            bias = -math.log(num_classes - 1)
        if temperature is not None and not temperature > 0:
            raise ValueError(f"LogitBias: expected temperature > 0, got {temperature}")
        self.logit_bias = None if bias is None else float(bias)
        self.logit_temperature = None if temperature is None else float(temperature)

    def forward(self, x: Tensor) -> Tensor:
        if self.logit_temperature is not None:
            x = x / self.logit_temperature
        if self.logit_bias is not None:
            bias = self.logit_bias
            if self.constant_gain is not None:
                bias = bias * per_sample(self.constant_gain, x.shape[0], x.dim(), "LogitBias").to(x.dtype)
            x = x + bias
        return x

    def extra_repr(self) -> str:
        return f"bias={self.logit_bias}, temperature={self.logit_temperature}"
