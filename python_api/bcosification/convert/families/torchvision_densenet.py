"""torchvision's DenseNet."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bcosification.convert.class_change import change_class
from bcosification.convert.families.base import Family, HeadBeforePool, register
from bcosification.convert.rules import Options


class ConvertedDenseNet(HeadBeforePool):
    """The forward with its last ReLU as a layer, ``features.relu5``, and the head where the conversion puts it.

    torchvision calls that ReLU and the pooling as functions, which replacing layers cannot reach.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        if self.head_before_pool:
            return torch.flatten(functional.adaptive_avg_pool2d(self.classifier(x), (1, 1)), 1)
        return self.classifier(torch.flatten(functional.adaptive_avg_pool2d(x, (1, 1)), 1))


@register("torchvision.models.densenet.DenseNet")
class TorchvisionDenseNet(Family):
    """features (conv0, norm0, relu0, pool0, dense blocks, transitions, norm5), ReLU, pooling, classifier."""

    name = "torchvision_densenet"
    title = "torchvision DenseNet"
    converts = "convolutions, BatchNorms, max pooling; the classifier before the pooling"
    keeps = "ReLUs"
    preprocessing = "imagenet"

    def input_layer(self, model: nn.Module) -> str:
        return "features.conv0"

    def head(self, model: nn.Module) -> str:
        return "classifier"

    def moves_head(self, model: nn.Module) -> bool:
        return True

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        model.features.add_module("relu5", nn.ReLU(inplace=True).train(model.training))
        model.head_before_pool = head_moves
        return change_class(model, ConvertedDenseNet)

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        features = model.features
        blocks = [module for name, module in features.named_children() if name.startswith("denseblock")]
        first = blocks[0].denselayer1
        growth = first.conv2.out_channels
        return {
            "growth_rate": growth,
            "block_config": [len(block) for block in blocks],
            "num_init_features": features.conv0.out_channels,
            "bn_size": first.conv1.out_channels // growth,
            "drop_rate": first.drop_rate,
            "num_classes": model.classifier.out_features,
            "memory_efficient": first.memory_efficient,
        }

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        from torchvision.models.densenet import DenseNet

        return DenseNet(**architecture)

    def example(self) -> nn.Module:
        from torchvision.models.densenet import DenseNet

        return DenseNet(growth_rate=8, block_config=(2, 1, 2, 1), num_init_features=12, bn_size=2, num_classes=5)
