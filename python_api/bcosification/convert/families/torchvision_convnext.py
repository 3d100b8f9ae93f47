"""torchvision's ConvNeXt."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bcosification.convert.class_change import change_class
from bcosification.convert.families.base import Family, HeadBeforePool, register
from bcosification.convert.rules import Options, type_name

_LAYER_NORM = "torchvision.models.convnext.LayerNorm2d"


class HeadBeforePoolConvNeXt(HeadBeforePool):
    """The classifier, its LayerNorm2d and its 1x1 convolution, at every position before the global pooling."""

    def _forward_impl(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        flattens = [layer for layer in self.classifier if isinstance(layer, nn.Flatten)]
        for layer in self.classifier:
            if not isinstance(layer, nn.Flatten):
                x = layer(x)
        x = self.avgpool(x)
        for flatten in flattens:
            x = flatten(x)
        return x


@register("torchvision.models.convnext.ConvNeXt")
class TorchvisionConvNeXt(Family):
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
    preprocessing = "imagenet"

    def input_layer(self, model: nn.Module) -> str:
        return "features.0.0"

    def head(self, model: nn.Module) -> str | None:
        if not isinstance(model.classifier, nn.Sequential) or not len(model.classifier):
            return None  # taken off, to use the features
        return f"classifier.{list(model.classifier._modules)[-1]}"

    def moves_head(self, model: nn.Module) -> bool:
        for name, layer in list(model.classifier.named_children())[:-1]:
            # nn.Flatten is put after the pooling, so it has to be what torchvision uses: (N, C, 1, 1) -> (N, C).
            per_position = type_name(type(layer)) == _LAYER_NORM or isinstance(layer, (nn.Dropout, nn.Identity))
            flattens = type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)
            if not (per_position or flattens):
                raise ValueError(
                    "bcosify: expected ConvNeXt's classifier to be LayerNorm2d, Flatten, Linear to move it before the "
                    f"global pooling, got {layer} as 'classifier.{name}'; head='keep' leaves it where it is"
                )
        return True

    def head_move_changes(self, model: nn.Module) -> str | None:
        return "the mean over positions is taken after the classifier's LayerNorm, not before"

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        return change_class(model, HeadBeforePoolConvNeXt) if head_moves else model

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
            "stochastic_depth_prob": _largest_probability(probabilities),
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


def _largest_probability(probabilities: list[float]) -> float:
    """The stochastic_depth_prob that gave block i of n the probability prob * i / (n - 1), to the last bit."""
    count = len(probabilities)
    last = probabilities[-1]
    for candidate in (round(last, 12), last):
        if all(p == candidate * i / (count - 1.0) for i, p in enumerate(probabilities)):
            return candidate
    return last
