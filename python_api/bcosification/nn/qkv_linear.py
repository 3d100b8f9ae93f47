"""The joint projection to q, k and v of self-attention, with q and k constant in explanation mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modes import DetachableModule, per_sample

__all__ = ["QKVLinear"]


class QKVLinear(DetachableModule, nn.Linear):
    """nn.Linear to q, k and v, the thirds of its output in this order; in explanation mode q and k are constants.

        q, k, v = F.linear(x, weight, bias).chunk(3, dim=-1)
        y = torch.cat([q.detach(), k.detach(), v], dim=-1)                    # explanation mode

    Put in the place of such a projection it makes the attention matrix, whatever is computed from q and k, a constant:
    the attention's own forward stays as it is, if it calls the projection as a module.

    Args:
        in_features, out_features, bias, device, dtype: nn.Linear's; 3 divides out_features.
        key_bias: False leaves k without a bias (SwinV2's attention: its part of ``bias`` is taken for zeros).

    Shapes: x (N, ..., in_features), dimension 0 the batch or windows of it; y (N, ..., out_features).

    Raises:
        ValueError: if 3 does not divide out_features.

    Source: B-cos networks v2, arXiv:2306.10898, section 3.3; B-cosification, arXiv:2411.00715.

    Example:
        >>> QKVLinear(8, 24)(torch.rand(2, 5, 8)).shape
        torch.Size([2, 5, 24])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        key_bias: bool = True,
    ) -> None:
        if out_features % 3:
            raise ValueError(f"QKVLinear: expected out_features to be a multiple of 3, got {out_features}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.key_bias = bool(key_bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        if bias is not None and not self.key_bias:
            of_q, of_k, of_v = bias.chunk(3)
            bias = torch.cat([of_q, torch.zeros_like(of_k), of_v])
        y = F.linear(x, self.weight, bias)
        gain = self.constant_gain if bias is not None else None
        if not self.detach and gain is None:
            return y
        q, k, v = y.chunk(3, dim=-1)
        if self.detach:
            q, k = q.detach(), k.detach()
        if gain is not None:
            v = v + bias.chunk(3)[2] * (per_sample(gain, x.shape[0], x.dim(), "QKVLinear") - 1).to(y.dtype)
        return torch.cat([q, k, v], dim=-1)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.key_bias else ", key_bias=False")
