"""The structures of B-cos v2's VGG and ConvNeXt, which torchvision's networks of these names do not have.

Both are convolutional to the end: VGG's first classifier layer is a padded 7×7 convolution at every position instead of
a linear layer on all of them, ConvNeXt's pointwise layers are 1×1 convolutions. Between the layers stands nothing
nonlinear, as the B-cos transform itself is that: only converted (B > 1) are these networks of use, and B-cos v2's
weights are what there is for them. Parameter names are B-cos v2's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["FullyConvolutionalConvNeXt", "FullyConvolutionalVGG"]


class FullyConvolutionalVGG(nn.Module):
    """VGG: 3×3 convolutions with BatchNorms and pooling, a 7×7 and 1×1 convolutions, global pooling, linear classifier.

    Args:
        layers: output channels of the convolutions, and "M" for a 2×2 average pooling.
        num_classes: default 1000.
        hidden: channels of the two convolutions before the classifier, default 4096.

    Shapes: (N, 3, H, W) → (N, num_classes).

    Source: arXiv:1409.1556; B-cos networks v2, arXiv:2306.10898.
    """

    def __init__(self, layers: Sequence[int | str], num_classes: int = 1000, hidden: int = 4096) -> None:
        super().__init__()
        self.layers, self.hidden = list(layers), hidden
        features: list[nn.Module] = []
        channels = 3
        for entry in self.layers:
            if entry == "M":
                features.append(nn.AvgPool2d(2))
                continue
            features += [nn.Conv2d(channels, entry, 3, padding=1, bias=False), nn.BatchNorm2d(entry)]
            channels = entry
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(
            nn.Conv2d(channels, hidden, 7, padding=3, bias=False),
            nn.Conv2d(hidden, hidden, 1, bias=False),
            nn.Linear(hidden, num_classes),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        *convolutions, head = self.classifier
        x = self.features(x)
        for layer in convolutions:
            x = layer(x)
        return head(torch.flatten(self.avgpool(x), 1))


class ConvNeXtBlock(nn.Module):
    """x + layer_scale · (7×7 depthwise, norm, 1×1 to four times the channels, 1×1 back)(x)."""

    def __init__(self, channels: int, stochastic_depth_prob: float, norm: str) -> None:
        from torchvision.ops import StochasticDepth

        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels, bias=False),
            _norm(norm, channels),
            nn.Conv2d(channels, 4 * channels, 1, bias=False),
            nn.Conv2d(4 * channels, channels, 1, bias=False),
        )
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), 1e-6))
        self.stochastic_depth = StochasticDepth(stochastic_depth_prob, "row")

    def forward(self, x: Tensor) -> Tensor:
        return self.stochastic_depth(self.layer_scale * self.block(x)) + x


def _norm(kind: str, channels: int) -> nn.Module:
    from torchvision.models.convnext import LayerNorm2d

    return LayerNorm2d(channels, eps=1e-6) if kind == "layer" else nn.BatchNorm2d(channels)


class FullyConvolutionalConvNeXt(nn.Module):
    """ConvNeXt of convolutions: stem of 4×4 patches, stages of blocks with downsampling between, norm, classifier.

    Args:
        stages: (channels, blocks) of each.
        num_classes: default 1000.
        norm: "layer", over the channels at every position (B-cos v2's "pn", default), or "batch" (its "bnu").
        stochastic_depth_prob: of the last block, rising from 0; default 0.1.

    Shapes: (N, 3, H, W) → (N, num_classes).

    Raises:
        ValueError: an unknown norm.

    Source: A ConvNet for the 2020s, arXiv:2201.03545; B-cos networks v2, arXiv:2306.10898.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        num_classes: int = 1000,
        norm: str = "layer",
        stochastic_depth_prob: float = 0.1,
    ) -> None:
        super().__init__()
        if norm not in ("layer", "batch"):
            raise ValueError(f"FullyConvolutionalConvNeXt: expected norm to be 'layer' or 'batch', got {norm!r}")
        self.stages, self.norm = [list(stage) for stage in stages], norm
        self.stochastic_depth_prob = stochastic_depth_prob
        total, done = sum(blocks for _, blocks in self.stages), 0
        before = self.stages[0][0]
        features: list[nn.Module] = [nn.Conv2d(3, before, 4, 4, bias=False), _norm(norm, before)]
        for i, (channels, blocks) in enumerate(self.stages):
            if i:
                features.append(nn.Sequential(_norm(norm, before), nn.Conv2d(before, channels, 2, 2, bias=False)))
            probabilities = [stochastic_depth_prob * (done + j) / max(total - 1, 1) for j in range(blocks)]
            features.append(nn.Sequential(*(ConvNeXtBlock(channels, p, norm) for p in probabilities)))
            before, done = channels, done + blocks
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(_norm(norm, before), nn.Linear(before, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        norm, head = self.classifier
        return head(torch.flatten(norm(self.avgpool(self.features(x))), 1))
