"""GroupNorm whose variance is a constant in explanation mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modes import DetachableModule, per_sample

__all__ = ["GroupNorm"]


class GroupNorm(DetachableModule, nn.GroupNorm):
    """nn.GroupNorm; in explanation mode the variance, but not the mean, is a constant for the gradient.

        g = x.unflatten(1, (num_groups, -1))
        var, mean = torch.var_mean(g, dims of all but (N, num_groups), unbiased=False, keepdim=True)
        y = ((g - mean) / (var.detach() + eps).sqrt()).view_as(x) * weight + bias   # explanation mode

    Arguments, shapes and keys are nn.GroupNorm's: GroupNorm(num_groups, num_channels, eps=1e-5, affine=True,
    device=None, dtype=None); x (N, C, ...).

    Raises:
        ValueError: if num_groups does not divide num_channels.

    Source: B-cos networks v2, arXiv:2306.10898, appendix; arXiv:1803.08494.

    Example:
        >>> GroupNorm(2, 8)(torch.rand(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def forward(self, x: Tensor) -> Tensor:
        gain = self.constant_gain if self.bias is not None else None
        if not self.detach and gain is None:
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        grouped = wide.unflatten(1, (self.num_groups, x.shape[1] // self.num_groups))
        dims = tuple(range(2, grouped.dim()))
        var, mean = torch.var_mean(grouped, dim=dims, unbiased=False, keepdim=True)
        if self.detach:
            var = var.detach()
        y = ((grouped - mean) * (var + self.eps).rsqrt()).flatten(1, 2)
        channels = (1, -1) + (1,) * (x.dim() - 2)
        if self.weight is not None:
            y = y * self.weight.view(channels)
        if self.bias is not None:
            bias = self.bias.view(channels)
            if gain is not None:
                bias = bias * per_sample(gain, x.shape[0], x.dim(), type(self).__name__)
            y = y + bias
        return y.to(x.dtype)
