"""The B-cos convolution with TensorFlow's "SAME" padding, which depends on the size of the image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .conv2d import BcosConv2d

__all__ = ["BcosConv2dSame", "pad_same"]


def pad_same(
    x: Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int] = (1, 1)
) -> Tensor:
    """x (..., H, W) with zeros around it, so that a window without padding gives ⌈H / stride⌉ × ⌈W / stride⌉ outputs.

    Of an odd number of rows or columns the larger half goes to the bottom and to the right.
    """
    sides: list[int] = []
    for size, kernel, step, spread in zip(x.shape[-2:], kernel_size, stride, dilation, strict=True):
        total = max((-(-size // step) - 1) * step + (kernel - 1) * spread + 1 - size, 0)
        sides = [total // 2, total - total // 2, *sides]
    return F.pad(x, sides) if any(sides) else x


class BcosConv2dSame(BcosConv2d):
    """`BcosConv2d` on an image padded by zeros to ⌈H / stride⌉ × ⌈W / stride⌉ outputs, as TensorFlow's "SAME" does.

        y = BcosConv2d(..., padding=0)(pad_same(x, kernel_size, stride, dilation))

    Arguments and keys are BcosConv2d's; ``padding`` has to be 0. The norm is that of the padded patch.

    Example:
        >>> BcosConv2dSame(3, 8, 3, stride=2)(torch.rand(1, 3, 8, 8)).shape
        torch.Size([1, 8, 4, 4])
    """

    def padded(self, x: Tensor) -> Tensor:
        return pad_same(x, self.kernel_size, self.stride, self.dilation)
