"""ConvNeXt V2's global response normalisation, whose factors are constants in explanation mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .gates import ScalingGate
from .modes import per_sample

__all__ = ["GlobalResponseNorm", "ScaleAndShift"]


class ScaleAndShift(ScalingGate):
    """Base of layers y = x·scale(x) + bias; in explanation mode the scale is a constant, and the bias counts as one.

    A subclass defines ``scale`` and ``bias``, a Parameter (C,) or None, and sets ``channel_dim``, the dimension of x
    that the bias lies along (default 1).
    """

    channel_dim: int = 1
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.bias is None:
            return y
        shape = [1] * x.dim()
        shape[self.channel_dim] = -1
        bias = self.bias.to(x.dtype).view(shape)
        if self.constant_gain is not None:
            bias = bias * per_sample(self.constant_gain, x.shape[0], x.dim(), type(self).__name__).to(bias.dtype)
        return y + bias


class GlobalResponseNorm(ScaleAndShift):
    """x scaled per channel by how strong the channel is, over the image, against the others; plus x itself.

        strength = x.norm(dim=(1, 2), keepdim=True)                           # channels_last: x (N, H, W, C)
        y = x * (1 + weight * strength / (strength.mean(-1, keepdim=True) + eps)) + bias

    In explanation mode the bracket is a constant for the gradient.

    Args:
        dim: channels C. eps: added to the mean strength, default 1e-6.
        channels_last: x is (N, H, W, C) (default), else (N, C, H, W).
        device, dtype: of weight and bias, which start at 0.

    Shapes: x, kept. The keys are timm's.

    Source: ConvNeXt V2, arXiv:2301.00808; gates as constants: B-cosification, arXiv:2411.00715, section 3.

    Example:
        >>> GlobalResponseNorm(8)(torch.rand(2, 5, 5, 8)).shape
        torch.Size([2, 5, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        channels_last: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.channel_dim = -1 if channels_last else 1
        self.spatial_dim = (1, 2) if channels_last else (2, 3)
        self.weight = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def scale(self, x: Tensor) -> Tensor:
        strength = x.norm(p=2, dim=self.spatial_dim, keepdim=True)
        relative = strength / (strength.mean(dim=self.channel_dim, keepdim=True) + self.eps)
        weight = self.weight if self.channel_dim == -1 else self.weight.view(-1, 1, 1)
        return 1 + weight * relative

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, channels_last={self.channel_dim == -1}"
