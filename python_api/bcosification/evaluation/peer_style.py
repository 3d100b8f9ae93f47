"""A B-cosified model with layers as the package ``bcos`` (B-cos v2) and B-cosification's code write them.

They compute a layer by eager formulas, one pass over an activation after the other: the linear map, the squared input,
its sum over the channels, the box filter, the square root, the absolute value, the division, the product. What our
kernels are compared with in speed, and checked against; written here anew, so that the comparison needs no package.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcosification.convert.peers import unfuse
from bcosification.nn import BatchNormUncentered2d, BcosConv2d, BcosLinear, LayerNorm, LayerNorm2d
from bcosification.nn.modes import DetachableModule

__all__ = [
    "EagerBatchNormUncentered2d",
    "EagerBcosConv2d",
    "EagerBcosLinear",
    "EagerLayerNorm",
    "EagerLayerNorm2d",
    "peer_style",
]


def _unit(weight: Tensor) -> Tensor:
    dims = tuple(range(1, weight.dim()))
    return weight / torch.linalg.vector_norm(weight, dim=dims, keepdim=True)


class _EagerLayer(DetachableModule):
    """What the two layers share. Instances are made by `peer_style` out of ours: same attributes, same parameters."""

    _unit_dim = -1

    def _linear_map(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__}: expected a layer that defines _linear_map")

    def _norm(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__}: expected a layer that defines _norm")

    def forward(self, x: Tensor) -> Tensor:
        out = self._linear_map(x, _unit(self.weight) if self.normalize_weight else self.weight)
        if self.max_out > 1:
            out = out.unflatten(self._unit_dim, (-1, self.max_out)).max(dim=self._unit_dim).values
        b = self.b.clamp(min=1) if isinstance(self.b, nn.Parameter) else self.b
        if not isinstance(b, Tensor) and b == 1:
            return out
        norm, scale = self._norm(x), out
        if self.detach:
            norm, scale = norm.detach(), out.detach()
        if not isinstance(b, Tensor) and b == 2:
            return scale.abs() / norm * out
        return ((scale / norm).abs() + 1e-6).pow(b - 1) * out


class EagerBcosLinear(_EagerLayer):
    """The peer's linear layer; x (..., in_features) → (..., out_features)."""

    def _linear_map(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)

    def _norm(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-12


class EagerBcosConv2d(_EagerLayer):
    """The peer's convolution; x (N, C, H, W) → (N, O, P, Q).

    The norm is that of the truly padded patch, as ours (the peer takes the zero-padded one with every padding mode);
    with dilation it is a convolution of the one-channel map (the peer's own is of all channels, and slower still).
    """

    _unit_dim = -3

    def forward(self, x: Tensor) -> Tensor:
        if self.padding_mode != "zeros" and self.padding != "valid":
            x = F.pad(x, self._sides(), mode=self.padding_mode)
        return super().forward(x)

    def _sides(self) -> tuple[int, ...]:
        """Padding (left, right, top, bottom)."""
        if self.padding == "same":
            reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return (reach[1] // 2, reach[1] - reach[1] // 2, reach[0] // 2, reach[0] - reach[0] // 2)
        vertical, horizontal = self.padding
        return (horizontal, horizontal, vertical, vertical)

    def _zero_padding(self) -> tuple[int, int] | str:
        return self.padding if self.padding_mode == "zeros" else (0, 0)

    def _linear_map(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias, self.stride, self._zero_padding(), self.dilation, self.groups)

    def _norm(self, x: Tensor) -> Tensor:
        squares, padding = x**2, self._zero_padding()
        groups, kernel = self.groups, self.kernel_size
        squares = squares.sum(1, keepdim=True) if groups == 1 else squares.unflatten(1, (groups, -1)).sum(2)
        if self.dilation == (1, 1) and not isinstance(padding, str) and all(2 * p <= k for p, k in zip(
                padding, kernel, strict=True)):  # fmt: skip
            norm = F.avg_pool2d(squares, kernel, self.stride, padding) * (kernel[0] * kernel[1])
        else:
            box = squares.new_ones(groups, 1, *kernel)
            norm = F.conv2d(squares, box, None, self.stride, padding, self.dilation, groups)
        norm = (norm + 1e-6).sqrt_()
        return norm if groups == 1 else norm.repeat_interleave(self.out_channels // groups, dim=1)


class EagerBatchNormUncentered2d(DetachableModule):
    """The peer's uncentered BatchNorm; x (N, C, H, W). `residual` and `activation` of ours are passes after it."""

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        momentum = self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if momentum is None else momentum
        var = self.running_var
        if self.training or var is None:
            var = (x.detach() if self.detach else x).var(dim=(0, 2, 3), unbiased=False)
            if self.running_var is not None and self.track_running_stats:
                self.running_var.copy_((1 - momentum) * self.running_var + momentum * var.detach())
        result = x / (var + self.eps).sqrt()[None, :, None, None]
        if self.weight is not None:
            result = self.weight[None, :, None, None] * result
        if self.bias is not None:
            result = result + self.bias[None, :, None, None]
        if residual is not None:
            result = result + residual
        return result if activation is None else F.relu(result)


class EagerLayerNorm(DetachableModule, nn.LayerNorm):
    """The peer's LayerNorm, torch's own but in explanation mode; x (..., *normalized_shape)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.detach:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        dims = tuple(range(-len(self.normalized_shape), 0))
        var, mean = torch.var_mean(x, dim=dims, unbiased=False, keepdim=True)
        result = (x - mean) / (var.detach() + self.eps).sqrt_()
        if self.weight is not None:
            result = self.weight * result
        return result if self.bias is None else result + self.bias


class EagerLayerNorm2d(EagerLayerNorm):
    """The same over the channels of x (N, C, H, W)."""

    channels_first = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


_EAGER = {
    BcosConv2d: EagerBcosConv2d,
    BcosLinear: EagerBcosLinear,
    BatchNormUncentered2d: EagerBatchNormUncentered2d,
    LayerNorm2d: EagerLayerNorm2d,
    LayerNorm: EagerLayerNorm,
}


def peer_style(model: nn.Module) -> nn.Module:
    """A copy of a B-cosified model whose B-cos layers, uncentered BatchNorms and LayerNorms run by the peers' eager
    formulas.

    Same function, same parameters and keys, same explanation mode. GroupNorm, GELU and attention stay: in training they
    are torch's own operations, here as in the peers' code.

    Args:
        model: a model made by `bcosify`, or of this package's layers.

    Returns:
        The copy. It cannot be explained by `explain`, which needs every constant that a layer adds; its W(x) is the
        gradient of a logit in `explanation_mode`.
    """
    model = unfuse(copy.deepcopy(model))
    for module in model.modules():
        # None of the new classes is a subclass of ours: blocks that fuse what is ours leave them alone.
        for ours, eager in _EAGER.items():
            if isinstance(module, ours):
                module.__class__ = eager
    return model
