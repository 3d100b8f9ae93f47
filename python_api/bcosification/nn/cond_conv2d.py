"""The B-cos convolution whose weights are mixed of several experts' for every image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import bcos_kernels

from .bcos_layer import BcosLayer, check_exponent, init_like_torch
from .conv2d_same import pad_same

__all__ = ["BcosCondConv2d"]


class BcosCondConv2d(BcosLayer):
    """Conditionally parametrised B-cos convolution: every image has its own weight, Σ routing·(experts' weights).

        weight = (routing @ self.weight).view(N, out_channels, in_channels // groups, *kernel_size)
        y = torch.cat([bcos_conv2d(x[i : i + 1], weight[i]) for i in range(N)])

    run as one convolution with N times the groups. What makes the routing has to hold it in explanation mode.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: nn.Conv2d's, sizes as pairs;
            padding="same" pads to ⌈size / stride⌉ outputs (TensorFlow's).
        num_experts: weights that are mixed.
        device, dtype: of the weight.
        b, normalize_weight: exponent (default 2) and weight normalisation (default False), of the mixed weight.

    Shapes: x (N, in_channels, H, W), routing (N, num_experts); weight (num_experts, out_channels · in_channels / groups
    · kernel elements), timm's; y (N, out_channels, P, Q).

    Source: CondConv, arXiv:1904.04971; B-cos networks v2, arXiv:2306.10898, equation 1.

    Example:
        >>> layer = BcosCondConv2d(4, 8, (3, 3), padding=(1, 1), num_experts=2)
        >>> layer(torch.rand(2, 4, 5, 5), torch.rand(2, 2)).shape
        torch.Size([2, 8, 5, 5])
    """

    max_out = 1
    bias = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        num_experts: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        b: float | Tensor = 2,
        normalize_weight: bool = False,
    ) -> None:
        super().__init__()
        check_exponent(type(self).__name__, b)
        self.in_channels, self.out_channels, self.num_experts = in_channels, out_channels, num_experts
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.groups, self.normalize_weight = groups, bool(normalize_weight)
        self.weight_shape = (out_channels, in_channels // groups, *kernel_size)
        elements = torch.Size(self.weight_shape).numel()
        self.weight = nn.Parameter(torch.empty(num_experts, elements, device=device, dtype=dtype))
        self.set_b(b)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every expert's weight as nn.Conv2d does."""
        for expert in self.weight.detach():
            init_like_torch(expert.view(self.weight_shape), None)

    def mixed(self, routing: Tensor) -> Tensor:
        """The weight of every image, (N, out_channels, in_channels / groups, kh, kw)."""
        return (routing @ self.weight).view(-1, *self.weight_shape)

    def forward(self, x: Tensor, routing: Tensor) -> Tensor:
        images, padding = x.shape[0], self.padding
        if padding == "same":
            x, padding = pad_same(x, self.kernel_size, self.stride, self.dilation), (0, 0)
        y = bcos_kernels.conv2d(
            x.reshape(1, -1, *x.shape[2:]),
            self.mixed(routing).flatten(0, 1),
            None,
            self.stride,
            padding,
            self.dilation,
            self.groups * images,
            b=self.exponent(),
            normalize_weight=self.normalize_weight,
            detach=self.detach,
        )
        return y.view(images, self.out_channels, *y.shape[2:])

    def transform(self, x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        raise NotImplementedError("BcosCondConv2d: its forward takes the routing, and needs no transform")

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}, groups={self.groups}, num_experts={self.num_experts}"
        return f"{text}, {self._describe_exponent()}"
