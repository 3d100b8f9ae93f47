"""torchvision's VGG, with and without BatchNorm, and AlexNet: fully connected layers on a pooled feature map."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bcosification.convert.class_change import change_class
from bcosification.convert.families.base import Family, HeadBeforePool, enlarged, register
from bcosification.convert.rules import Options, as_convolution


class FullyConvolutional(HeadBeforePool):
    """The fully connected layers as convolutions, the first of the pooled map's size: the logits' mean over positions.

    Maps that are no larger than the one the layers were made for are pooled (spread) to its size, as in the original.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.features(x)
        height, width = self.avgpool.output_size
        if x.shape[-2] <= height and x.shape[-1] <= width:
            x = self.avgpool(x)
        elif x.shape[-2] < height or x.shape[-1] < width:
            x = nn.functional.adaptive_avg_pool2d(x, (max(x.shape[-2], height), max(x.shape[-1], width)))
        return self.classifier(x).mean((2, 3))


class FullyConnectedFamily(Family):
    """features, avgpool to a few positions, classifier of linear layers, ReLUs and dropout.

    head="before_pool" makes convolutions of the linear layers, the first one over as many positions as the pooling
    left (7x7 in a VGG, 6x6 in an AlexNet, without padding), and takes the mean of the logits over all places where it
    fits, as VGG's authors did to classify images of any size. At the resolution of training there is one such place,
    and the network is the original. head="keep" pools larger maps instead, as torchvision does.
    """

    converts = "convolutions, BatchNorms, max pooling; the fully connected layers as convolutions before the pooling"
    keeps = "ReLUs"
    cannot = "be exact at B = 1 for larger images with the head before the pooling (head='keep' is)"
    preprocessing = "imagenet"

    def input_layer(self, model: nn.Module) -> str:
        return "features.0"

    def head(self, model: nn.Module) -> str | None:
        if not isinstance(model.classifier, nn.Sequential) or not len(model.classifier):
            return None  # taken off, to use the features
        return f"classifier.{list(model.classifier._modules)[-1]}"

    def moves_head(self, model: nn.Module) -> bool:
        layers = list(model.classifier.named_children())
        for name, layer in layers[:-1]:
            if type(layer) not in (nn.Linear, nn.ReLU, nn.Dropout):
                raise ValueError(
                    f"bcosify: expected the classifier of {type(model).__name__} to consist of linear layers, ReLUs "
                    f"and dropout to make convolutions of it, got {layer} as 'classifier.{name}'; head='keep' leaves "
                    "it as it is"
                )
        linear = [layer for _, layer in layers if type(layer) is nn.Linear]
        return len(linear) > 1  # one linear layer alone would have to be the convolution over the whole map

    def head_move_changes(self, model: nn.Module) -> str:
        return "images larger than those of training are classified at every position, where the original pools first"

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        if not head_moves:
            return model
        kernel = tuple(model.avgpool.output_size)
        for name, layer in list(model.classifier.named_children())[:-1]:
            if type(layer) is nn.Linear:
                model.classifier._modules[name] = as_convolution(layer, kernel)
                kernel = (1, 1)
        return change_class(model, FullyConvolutional)


@register("torchvision.models.vgg.VGG")
class TorchvisionVGG(FullyConnectedFamily):
    """Convolutions of 3x3, pooling to 7x7, three fully connected layers."""

    name = "torchvision_vgg"
    title = "torchvision VGG"

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        convolutions = [
            "M" if isinstance(layer, nn.MaxPool2d) else layer.out_channels
            for layer in model.features
            if isinstance(layer, (nn.Conv2d, nn.MaxPool2d))
        ]
        linear = [layer for layer in model.classifier if isinstance(layer, nn.Linear)]
        return {
            "features": convolutions,
            "batch_norm": any(isinstance(layer, nn.BatchNorm2d) for layer in model.features),
            "classifier": [linear[0].in_features, *(layer.out_features for layer in linear)],
            "dropout": next(layer.p for layer in model.classifier if isinstance(layer, nn.Dropout)),
        }

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        from torchvision.models.vgg import VGG, make_layers

        features = make_layers(architecture["features"], architecture["batch_norm"])
        with torch.device("meta"):  # its classifier, 120 million weights, is made below as wide as it has to be
            model = VGG(nn.Sequential(), init_weights=False, dropout=architecture["dropout"])
        model.features = features
        widths = architecture["classifier"]
        places = [name for name, layer in model.classifier.named_children() if isinstance(layer, nn.Linear)]
        for name, inputs, outputs in zip(places, widths[:-1], widths[1:], strict=True):
            model.classifier._modules[name] = nn.Linear(inputs, outputs)
        return model

    def example(self) -> nn.Module:
        features = [8, "M", 8, "M", 12]
        return self.build({"features": features, "batch_norm": True, "classifier": [12 * 49, 10, 9, 5], "dropout": 0.5})


@register("torchvision.models.alexnet.AlexNet")
class TorchvisionAlexNet(FullyConnectedFamily):
    """Five convolutions, pooling to 6x6, three fully connected layers."""

    name = "torchvision_alexnet"
    title = "torchvision AlexNet"
    example_size = (223, 223)

    def input_size(self, model: nn.Module) -> tuple[int, int]:
        return 224, 224

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        return {"num_classes": model.classifier[-1].out_features, "dropout": model.classifier[0].p}

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        from torchvision.models.alexnet import AlexNet

        return AlexNet(**architecture)

    def example(self) -> nn.Module:
        from torchvision.models.alexnet import AlexNet

        with torch.device("meta"):  # 60 million weights, made narrower below
            model = AlexNet()
        widths = [3, 8, 8, 9, 10, 10]
        convolutions = [name for name, layer in model.features.named_children() if isinstance(layer, nn.Conv2d)]
        for name, inputs, outputs in zip(convolutions, widths[:-1], widths[1:], strict=True):
            wide = model.features._modules[name]
            model.features._modules[name] = nn.Conv2d(inputs, outputs, wide.kernel_size, wide.stride, wide.padding)
        for name, inputs, outputs in (("1", 10 * 36, 12), ("4", 12, 9), ("6", 9, 5)):
            model.classifier._modules[name] = nn.Linear(inputs, outputs)
        return enlarged(model)
