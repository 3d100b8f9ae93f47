"""B-cos v2's VGG and ConvNeXt, as bcosification.models.fully_convolutional has their structures."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bcosification.convert.class_change import change_class
from bcosification.convert.families.base import Family, HeadBeforePool, register
from bcosification.convert.rules import FACTORS, Options
from bcosification.models.fully_convolutional import FullyConvolutionalConvNeXt, FullyConvolutionalVGG

FACTORS["bcosification.models.fully_convolutional.ConvNeXtBlock"] = ("layer_scale",)


class ClassifierBeforePool(HeadBeforePool):
    """The whole classifier at every position before the global pooling."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.flatten(self.avgpool(self.classifier(self.features(x))), 1)


class FullyConvolutionalFamily(Family):
    """features, classifier (its last layer linear), avgpool."""

    preprocessing = "imagenet"

    def input_layer(self, model: nn.Module) -> str:
        return "features.0"

    def head(self, model: nn.Module) -> str:
        return f"classifier.{len(model.classifier) - 1}"

    def moves_head(self, model: nn.Module) -> bool:
        return True

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        return change_class(model, ClassifierBeforePool) if head_moves else model


@register("bcosification.models.fully_convolutional.FullyConvolutionalVGG")
class FullyConvolutionalVGGFamily(FullyConvolutionalFamily):
    """VGG: convolutions, BatchNorms and pooling; a 7×7, a 1×1 convolution and the classifier."""

    name = "fully_convolutional_vgg"

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        head = model.classifier[-1]
        return {"layers": model.layers, "num_classes": head.out_features, "hidden": model.hidden}

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        return FullyConvolutionalVGG(**architecture)


@register("bcosification.models.fully_convolutional.FullyConvolutionalConvNeXt")
class FullyConvolutionalConvNeXtFamily(FullyConvolutionalFamily):
    """ConvNeXt: stem, stages and downsampling; norm and classifier."""

    name = "fully_convolutional_convnext"

    def head_move_changes(self, model: nn.Module) -> str | None:
        if model.norm == "batch":
            return None
        return "the mean over positions is taken after the classifier's LayerNorm, not before"

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        return {
            "stages": model.stages,
            "num_classes": model.classifier[-1].out_features,
            "norm": model.norm,
            "stochastic_depth_prob": model.stochastic_depth_prob,
        }

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        return FullyConvolutionalConvNeXt(**architecture)
