"""LayerNorm whose variance is a constant in explanation mode."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

import bcos_kernels

from .modes import DetachableModule, per_sample

__all__ = ["LayerNorm"]


class LayerNorm(DetachableModule, nn.LayerNorm):
    """nn.LayerNorm; in explanation mode the variance, but not the mean, is a constant for the gradient.

        var, mean = torch.var_mean(x, dims, unbiased=False, keepdim=True)
        y = (x - mean) / (var.detach() + eps).sqrt() * weight + bias          # explanation mode

    One op (`bcos_kernels.layer_norm`), which leaves the norms of its rows to a B-cos linear layer behind it.

    Arguments, shapes and keys are nn.LayerNorm's: LayerNorm(normalized_shape, eps=1e-5, elementwise_affine=True,
    bias=True, device=None, dtype=None); x (..., *normalized_shape).

    Source: B-cos networks v2, arXiv:2306.10898, appendix; arXiv:1607.06450.

    Example:
        >>> LayerNorm(16)(torch.rand(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    channels_first: bool = False
    recompute: bool = False
    """Whether a B-cos layer behind it keeps no output but has it computed again in the backward (``fuse`` sets it)."""

    def forward(self, x: Tensor) -> Tensor:
        gain = self.constant_gain if self.bias is not None else None
        # Where the bias is added apart, half precision is rounded once all the same.
        wide = x if gain is None else x.to(torch.promote_types(x.dtype, torch.float32))
        parameters = {"weight": self.weight, "bias": self.bias if gain is None else None}
        given = {name: parameter for name, parameter in parameters.items() if parameter is not None}
        normalized = partial(
            _normalized, tuple(given), self.normalized_shape, self.eps, self.channels_first, self.detach
        )
        y = normalized(wide, *given.values())
        if gain is None:
            return bcos_kernels.recomputed(y, normalized, wide, *given.values()) if self.recompute else y
        bias = self.bias.view(-1, *(1,) * (x.dim() - 2)) if self.channels_first else self.bias
        return (y + bias * per_sample(gain, x.shape[0], x.dim(), type(self).__name__)).to(x.dtype)


def _normalized(
    names: tuple[str, ...],
    shape: tuple[int, ...],
    eps: float,
    channels_first: bool,
    detach: bool,
    x: Tensor,
    *parameters: Tensor,
) -> Tensor:
    """`bcos_kernels.layer_norm` with the parameters under their names: what is computed again must hold no tensor."""
    given = dict(zip(names, parameters, strict=True))
    return bcos_kernels.layer_norm(x, shape, **given, eps=eps, channels_first=channels_first, detach=detach)
