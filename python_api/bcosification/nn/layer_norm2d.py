"""Channels-first LayerNorm whose variance is a constant in explanation mode."""

from __future__ import annotations

from torch import Tensor

from .layer_norm import LayerNorm

__all__ = ["LayerNorm2d"]


class LayerNorm2d(LayerNorm):
    """LayerNorm over the channels at every position; in explanation mode the variance, but not the mean, is a constant.

        var, mean = torch.var_mean(x, 1, unbiased=False, keepdim=True)
        y = (x - mean) / (var.detach() + eps).sqrt()                          # explanation mode
        y = y * weight[:, None, None] + bias[:, None, None]

    Arguments and keys are nn.LayerNorm's, so torchvision's LayerNorm2d's: LayerNorm2d(channels, eps=1e-5,
    elementwise_affine=True, bias=True, device=None, dtype=None). Shapes: x (N, C, H, W), kept; channels_last input is
    read in place and gives channels_last output.

    Raises:
        ValueError: if x is not four-dimensional.

    Source: B-cos networks v2, arXiv:2306.10898, appendix; A ConvNet for the 2020s, arXiv:2201.03545.

    Example:
        >>> LayerNorm2d(8)(torch.rand(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    channels_first = True

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"LayerNorm2d: expected x of shape (N, C, H, W), got {tuple(x.shape)}")
        return super().forward(x)
