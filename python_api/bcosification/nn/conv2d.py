"""The B-cos convolution as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import bcos_kernels

from .bcos_layer import BcosLayer, check_exponent, check_max_out, init_like_torch

__all__ = ["BcosConv2d"]

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def _pair(name: str, value: int | tuple[int, int], minimum: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) == 1:
        pair = pair * 2
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, int) for v in pair) or min(pair) < minimum:
        raise ValueError(f"BcosConv2d: expected {name} to be an int or a pair of ints >= {minimum}, got {value!r}")
    return pair


class BcosConv2d(BcosLayer):
    """B-cos convolution: y = a·(|a|/‖p‖)^(b−1) with a = ŵ·p for every patch p, fused. Drop-in for ``bcos``'s.

        a = F.conv2d(x, w / w.flatten(1).norm(dim=1).view(-1, 1, 1, 1), None, stride, padding, dilation, groups)
        n = (F.conv2d(x.square(), torch.ones_like(w[:1])) + 1e-6).sqrt()     # groups = 1
        y = a * (a / n).abs()                                                 # b = 2

    Differs from the peer where the padding mode is not zeros (p is the padded patch; the peer's norm ignores that)
    and for weight rows of norm zero (output 0 and gradient 0; the peer gives NaN).

    Args:
        in_channels, out_channels, kernel_size (default 1), stride (1), padding (0; also "same", "valid"), dilation (1),
            groups (1), padding_mode ("zeros", "reflect", "replicate", "circular"), device, dtype: as nn.Conv2d's.
        b: exponent B ≥ 1, default 2; a number, a Parameter (learnable, clamped to ≥ 1) or a 0-dim tensor.
        max_out: units per output channel of which the largest counts, default 1.
        bias: adds a bias before the scale: y = s·(ŵ·p + β). Default False; B-cos layers have none.
        normalize_weight: divide the weight of every unit by its norm (B-cos v2, default True) or not (B-cosification).

    Shapes: x (N, in_channels, H, W) or (in_channels, H, W); weight (out_channels · max_out, in_channels / groups, kh,
    kw), initialised as nn.Conv2d's; bias (out_channels · max_out,) or None; y (N, out_channels, P, Q).

    Raises:
        ValueError: b < 1, channels that groups do not divide, an unknown padding or padding mode.

    Source: B-cos networks v2, arXiv:2306.10898, equation 1 and section 3.

    Example:
        >>> layer = BcosConv2d(6, 64, kernel_size=7, stride=2, padding=3)
        >>> layer(torch.rand(1, 6, 32, 32)).shape
        torch.Size([1, 64, 16, 16])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        b: float | Tensor = 2,
        max_out: int = 1,
        *,
        bias: bool = False,
        normalize_weight: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
            raise ValueError(f"{name}: expected groups to be an int >= 1, got {groups!r}")
        for label, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(f"{name}: expected {label} divisible by groups, got {channels} and {groups}")
        if padding_mode not in PADDING_MODES:
            raise ValueError(
                f"{name}: expected padding_mode to be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}"
            )
        check_exponent(name, b)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride = _pair("stride", stride, 1)
        self.dilation = _pair("dilation", dilation, 1)
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f"{name}: expected padding to be ints, 'same' or 'valid', got {padding!r}")
            if padding == "same" and self.stride != (1, 1):
                raise ValueError(f"{name}: expected stride 1 with padding='same', got {self.stride}")
            self.padding: tuple[int, int] | str = padding
        else:
            self.padding = _pair("padding", padding, 0)
        self.padding_mode = padding_mode
        self.max_out = check_max_out(name, max_out)
        self.normalize_weight = bool(normalize_weight)
        units = out_channels * max_out
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(units, in_channels // groups, *self.kernel_size, **factory))
        self.register_parameter("bias", nn.Parameter(torch.empty(units, **factory)) if bias else None)
        self.set_b(b)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias anew, as nn.Conv2d does."""
        init_like_torch(self.weight, self.bias)

    def _unit_dim(self) -> int:
        return -3

    def padded(self, x: Tensor) -> Tensor:
        """What the op is given for x: x itself; more where ``padding`` cannot say how a subclass pads."""
        return x

    def output_shape(self, padded: Tensor) -> torch.Size:
        """Shape of the output for what `padded` gives, (..., C, H, W)."""
        sizes = list(padded.shape[-2:])
        if self.padding != "same":
            padding = 0 if self.padding == "valid" else self.padding
            # of a peer's layer that `fuse` took over they may be ints
            pairs = (pair if isinstance(pair, (tuple, list)) else (pair, pair)
                     for pair in (self.kernel_size, self.stride, padding, self.dilation))  # fmt: skip
            sizes = [
                (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
                for size, kernel, stride, pad, dilation in zip(sizes, *pairs, strict=True)
            ]
        return torch.Size((*padded.shape[:-3], self.out_channels, *sizes))

    def transform(self, x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        return bcos_kernels.conv2d(
            self.padded(x),
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            padding_mode=self.padding_mode,
            **options,
        )

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding not in (0, (0, 0)):
            text += f", padding={self.padding!r}"
        if self.dilation not in (1, (1, 1)):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        if self.bias is not None:
            text += ", bias=True"
        return f"{text}, {self._describe_exponent()}"
