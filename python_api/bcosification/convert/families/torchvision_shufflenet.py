"""torchvision's ShuffleNetV2."""

from __future__ import annotations

from typing import Any

from torch import nn

from bcosification.convert.families.base import register
from bcosification.convert.families.positionwise_head import PositionwiseHead, PositionwiseHeadFamily


class HeadBeforePoolShuffleNet(PositionwiseHead):
    """The classifier, a 1x1 convolution, at every position, then the mean over them."""

    trunk = ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5")
    classifiers = ("fc",)
    pooling = ()


@register("torchvision.models.shufflenetv2.ShuffleNetV2")
class TorchvisionShuffleNet(PositionwiseHeadFamily):
    """conv1, maxpool, stage2 to stage4, conv5, mean, fc. Splitting and shuffling channels is linear."""

    name = "torchvision_shufflenet"
    title = "torchvision ShuffleNetV2"
    example_size = (48, 48)
    converts = "convolutions, BatchNorms, max pooling; the classifier before the pooling"
    keeps = "ReLUs, channel shuffles"
    reader = "conv1.0"
    mixin = HeadBeforePoolShuffleNet

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        return {
            "stages_repeats": [len(stage) for stage in (model.stage2, model.stage3, model.stage4)],
            "stages_out_channels": list(model._stage_out_channels),
            "num_classes": model.fc.out_features,
        }

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        from torchvision.models.shufflenetv2 import ShuffleNetV2

        return ShuffleNetV2(**architecture)

    def example(self) -> nn.Module:
        return self.build({"stages_repeats": [1, 2, 1], "stages_out_channels": [8, 16, 24, 32, 40], "num_classes": 5})
