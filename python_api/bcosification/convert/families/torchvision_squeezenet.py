"""torchvision's SqueezeNet: its classifier is a 1x1 convolution before the global pooling already."""

from __future__ import annotations

from typing import Any

from torch import nn

from bcosification.convert.families.base import Family, enlarged, register


@register("torchvision.models.squeezenet.SqueezeNet")
class TorchvisionSqueezeNet(Family):
    """features (stem, Fire modules, max pooling), classifier (dropout, convolution, ReLU, pooling).

    The ReLU behind the classifier stays: logits of images are sums of what is not negative, plus the logit bias.
    """

    name = "torchvision_squeezenet"
    title = "torchvision SqueezeNet"
    example_size = (40, 40)
    converts = "convolutions, max pooling"
    keeps = "the place of the classifier, before the pooling already; ReLUs, that behind it too"
    preprocessing = "imagenet"

    def input_layer(self, model: nn.Module) -> str:
        return "features.0"

    def head(self, model: nn.Module) -> str | None:
        for name, layer in model.classifier.named_children():
            if isinstance(layer, nn.Conv2d):
                return f"classifier.{name}"
        return None  # taken off, to use the features

    def moves_head(self, model: nn.Module) -> bool:
        return False

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        return {
            "version": "1_0" if model.features[0].kernel_size == (7, 7) else "1_1",
            "num_classes": model.classifier[1].out_channels,
            "dropout": model.classifier[0].p,
        }

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        from torchvision.models.squeezenet import SqueezeNet

        return SqueezeNet(**architecture)

    def example(self) -> nn.Module:
        return enlarged(self.build({"version": "1_1", "num_classes": 5}))
