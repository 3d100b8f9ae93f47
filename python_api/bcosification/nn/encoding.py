"""What happens to an image before the first layer: [x, 1 − x] and the normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .modes import DetachableModule, per_sample

__all__ = ["AddInverse", "Normalize"]


class AddInverse(DetachableModule):
    """Encode an image x in [0, 1] as [x, 1 − x] along the channels: torch.cat([x, 1 - x], dim).

    Args:
        dim: the channel dimension, default −3.

    Shapes: (..., C, H, W) → (..., 2C, H, W).

    Explanation mode changes nothing: explanations are maps of the encoded image.

    Source: B-cos networks, arXiv:2205.10268, section 3.

    Example:
        >>> AddInverse()(torch.rand(1, 3, 4, 4)).shape
        torch.Size([1, 6, 4, 4])
    """

    def __init__(self, dim: int = -3) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, 1 - x], dim=self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Normalize(DetachableModule):
    """(x − mean)/std per channel, as the first layer of a model. The mean is a constant that counts as such.

        y = (x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)

    Args:
        mean, std: one number per channel of x; std positive.
        inverse: True for numbers of C channels and an input encoded as [x, 1 − x]: mean (μ, 1 − μ), std (σ, σ).
            Default False.

    Shapes: (N, C, H, W) or (C, H, W), kept. Mean and std are buffers that state_dict leaves out.

    Raises:
        ValueError: if the lengths differ, a std is not positive, or x has another number of channels.

    Source: B-cosification, arXiv:2411.00715, section 3.1.

    Example:
        >>> Normalize((0.5,), (0.25,), inverse=True)(torch.ones(1, 2, 1, 1)).flatten().tolist()
        [2.0, 2.0]
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, inverse: bool = False) -> None:
        super().__init__()
        mean, std = [float(v) for v in mean], [float(v) for v in std]
        if not mean or len(mean) != len(std):
            raise ValueError(f"Normalize: expected mean and std of the same length, got {len(mean)} and {len(std)}")
        if not all(v > 0 for v in std):
            raise ValueError(f"Normalize: expected every std > 0, got {std}")
        if inverse:
            mean, std = mean + [1 - v for v in mean], std * 2
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = self.mean.numel()
        if x.dim() not in (3, 4) or x.shape[-3] != channels:
            raise ValueError(f"Normalize: expected x of shape (N, {channels}, H, W), got {tuple(x.shape)}")
        mean, std = self.mean.to(x.dtype).view(-1, 1, 1), self.std.to(x.dtype).view(-1, 1, 1)
        if self.constant_gain is not None:
            batch = x.shape[0] if x.dim() == 4 else 1
            mean = mean * per_sample(self.constant_gain, batch, 4, "Normalize").to(x.dtype)
            mean = mean if x.dim() == 4 else mean[0]
        return (x - mean) / std

    def extra_repr(self) -> str:
        return f"mean={[round(v, 6) for v in self.mean.tolist()]}, std={[round(v, 6) for v in self.std.tolist()]}"
