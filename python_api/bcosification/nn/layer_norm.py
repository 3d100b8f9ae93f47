"""LayerNorm whose variance is a constant in explanation mode."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modes import DetachableModule, per_sample

__all__ = ["LayerNorm"]


class LayerNorm(DetachableModule, nn.LayerNorm):
    """nn.LayerNorm; in explanation mode the variance, but not the mean, is a constant for the gradient.

        var, mean = torch.var_mean(x, dims, unbiased=False, keepdim=True)
        y = (x - mean) / (var.detach() + eps).sqrt() * weight + bias          # explanation mode

    Arguments, shapes and keys are nn.LayerNorm's: LayerNorm(normalized_shape, eps=1e-5, elementwise_affine=True,
    bias=True, device=None, dtype=None); x (..., *normalized_shape).

    Source: B-cos networks v2, arXiv:2306.10898, appendix; arXiv:1607.06450.

    Example:
        >>> LayerNorm(16)(torch.rand(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def forward(self, x: Tensor) -> Tensor:
        gain = self.constant_gain if self.bias is not None else None
        if not self.detach and gain is None:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        # Half precision keeps fp32 statistics, as F.layer_norm does.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = tuple(range(-len(self.normalized_shape), 0))
        var, mean = torch.var_mean(wide, dim=dims, unbiased=False, keepdim=True)
        if self.detach:
            var = var.detach()
        y = (wide - mean) * (var + self.eps).rsqrt()
        if self.weight is not None:
            y = y * self.weight
        if self.bias is not None:
            bias = self.bias
            if gain is not None:
                bias = bias * per_sample(gain, x.shape[0], x.dim(), type(self).__name__)
            y = y + bias
        return y.to(x.dtype)
