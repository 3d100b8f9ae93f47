"""torchvision's EfficientNet and EfficientNetV2 (one class)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from bcosification.convert.families.base import register
from bcosification.convert.families.positionwise_head import (
    PositionwiseHead,
    PositionwiseHeadFamily,
    dropout_of,
    largest_probability,
    norm_options,
)


class HeadBeforePoolEfficientNet(PositionwiseHead):
    """The classifier, dropout and a 1x1 convolution, before the global pooling."""


@register("torchvision.models.efficientnet.EfficientNet")
class TorchvisionEfficientNet(PositionwiseHeadFamily):
    """features (stem, stages of MBConv or FusedMBConv, last convolution), avgpool, classifier (dropout, linear)."""

    name = "torchvision_efficientnet"
    title = "torchvision EfficientNet, EfficientNetV2"
    converts = "convolutions, BatchNorms, SiLUs, squeeze-and-excitation; the classifier before the pooling"
    keeps = "the layers inside squeeze-and-excitation, stochastic depth"
    reader = "features.0.0"
    mixin = HeadBeforePoolEfficientNet

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        stages = list(model.features)[1:-1]
        probabilities = [block.stochastic_depth.p for stage in stages for block in stage]
        return {
            "stages": [_stage(stage) for stage in stages],
            "last_channel": model.features[-1][0].out_channels,
            "stochastic_depth_prob": largest_probability(probabilities, len(probabilities)),
            "dropout": dropout_of(model.classifier),
            "num_classes": model.classifier[-1].out_features,
            "norm": norm_options(model),
        }

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

        arguments = dict(architecture)
        kinds = {"MBConv": MBConvConfig, "FusedMBConv": FusedMBConvConfig}
        stages = [kinds[kind](*numbers) for kind, *numbers in arguments.pop("stages")]
        return EfficientNet(stages, norm_layer=partial(nn.BatchNorm2d, **arguments.pop("norm")), **arguments)

    def example(self) -> nn.Module:
        from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig

        stages = [
            FusedMBConvConfig(1, 3, 1, 8, 8, 1),
            FusedMBConvConfig(3, 3, 2, 8, 16, 2),
            MBConvConfig(2, 5, 2, 16, 24, 1),
        ]
        norm = partial(nn.BatchNorm2d, eps=1e-3)
        return EfficientNet(stages, 0.3, 0.2, 5, norm_layer=norm, last_channel=40)


def _stage(stage: nn.Sequential) -> list[Any]:
    """Kind of block, expansion, kernel, stride, input and output channels, number of blocks."""
    first = stage[0]
    layers = [layer for layer in first.block if isinstance(layer, nn.Sequential)]  # without squeeze-and-excitation
    inputs = layers[0][0].in_channels
    if type(first).__name__ == "MBConv":
        spatial = layers[-2][0]  # depthwise, before the projection
        expanded = spatial.in_channels
    else:
        spatial = layers[0][0]  # expands, where there is a projection behind it
        expanded = spatial.out_channels if len(layers) > 1 else inputs
    ratio = expanded / inputs
    return [
        type(first).__name__,
        int(ratio) if ratio == int(ratio) else ratio,
        spatial.kernel_size[0],
        spatial.stride[0],
        inputs,
        first.out_channels,
        len(stage),
    ]
