"""torchvision's ConvNeXt."""

from __future__ import annotations

from typing import Any

from torch import nn

from bcosification.convert.families.base import register
from bcosification.convert.families.positionwise_head import (
    PositionwiseHead,
    PositionwiseHeadFamily,
    largest_probability,
)


class HeadBeforePoolConvNeXt(PositionwiseHead):
    """The classifier, its LayerNorm2d and its 1x1 convolution, at every position before the global pooling."""


@register("torchvision.models.convnext.ConvNeXt")
class TorchvisionConvNeXt(PositionwiseHeadFamily):
    """features (stem, stages of CNBlocks, downsampling), avgpool, classifier (LayerNorm2d, Flatten, Linear).

    The stem is a convolution of 4x4 patches. A block's layer_scale is a linear factor and its stochastic depth the
    identity in eval mode: both stay. head="keep" is exact at B = 1. head="before_pool" is not, as with every average of
    tokens after a LayerNorm: the classifier normalises each position, where the original normalises their mean.
    """

    name = "torchvision_convnext"
    title = "torchvision ConvNeXt"
    converts = "convolutions, linear layers, LayerNorms, GELUs; the classifier before the pooling"
    keeps = "layer scales, stochastic depth"
    cannot = "be exact at B = 1 with the head before the pooling: its LayerNorm comes first (head='keep' is)"

    reader = "features.0.0"
    mixin = HeadBeforePoolConvNeXt

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        layers = [*list(model.features)[1:], None]
        blocks, probabilities = [], []
        for stage, following in zip(layers, layers[1:], strict=False):
            if not _downsamples(stage):
                outputs = following[-1].out_channels if _downsamples(following) else None
                blocks.append([stage[0].block[0].in_channels, outputs, len(stage)])
                probabilities += [block.stochastic_depth.p for block in stage]
        return {
            "block_setting": blocks,
            "stochastic_depth_prob": largest_probability(probabilities, len(probabilities) - 1),
            "num_classes": model.classifier[-1].out_features,
        }

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        from torchvision.models.convnext import CNBlockConfig, ConvNeXt

        arguments = dict(architecture)
        blocks = [CNBlockConfig(*setting) for setting in arguments.pop("block_setting")]
        return ConvNeXt(blocks, **arguments)

    def example(self) -> nn.Module:
        from torchvision.models.convnext import CNBlockConfig, ConvNeXt

        return ConvNeXt([CNBlockConfig(8, 12, 2), CNBlockConfig(12, None, 1)], num_classes=5)


def _downsamples(layer: nn.Module | None) -> bool:
    """Whether an entry of features is LayerNorm2d and convolution, which follow a stage that changes its channels."""
    return type(layer) is nn.Sequential and len(layer) == 2 and type(layer[-1]) is nn.Conv2d
