"""torchvision's MobileNetV2, MobileNetV3 and MNASNet."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.families.base import register
from bcosification.convert.families.positionwise_head import (
    PositionwiseHead,
    PositionwiseHeadFamily,
    dropout_of,
    norm_options,
)
from bcosification.convert.rules import Options


class HeadBeforePoolMobileNetV2(PositionwiseHead):
    """The classifier at every position, then the mean over them, which torchvision calls as a function."""

    pooling = ()


@register("torchvision.models.mobilenetv2.MobileNetV2")
class TorchvisionMobileNetV2(PositionwiseHeadFamily):
    """features (stem, inverted residuals, last convolution), mean, classifier (dropout, linear)."""

    name = "torchvision_mobilenet_v2"
    title = "torchvision MobileNetV2"
    converts = "convolutions, BatchNorms, ReLU6s; the classifier before the pooling"
    keeps = "the linear bottlenecks, which have no activation"
    reader = "features.0.0"
    mixin = HeadBeforePoolMobileNetV2

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        rows = []
        for block in list(model.features)[1:-1]:
            *expansion, depthwise, project, _ = block.conv
            inputs = expansion[0][0].in_channels if expansion else depthwise[0].in_channels
            ratio = depthwise[0].in_channels / inputs if expansion else 1
            rows.append([int(ratio) if ratio == int(ratio) else ratio, project.out_channels, 1, block.stride])
        return {
            "stem": model.features[0][0].out_channels,
            "blocks": rows,
            "last_channel": model.last_channel,
            "dropout": dropout_of(model.classifier),
            "num_classes": model.classifier[-1].out_features,
            "norm": norm_options(model),
        }

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        from torchvision.models.mobilenetv2 import MobileNetV2
        from torchvision.ops.misc import Conv2dNormActivation

        width = architecture["stem"] / 32
        norm = partial(nn.BatchNorm2d, **architecture["norm"])
        # Numbers of channels are given as fractions of the stem's width and rounded to whole ones.
        rows = [[ratio, channels / width, *rest] for ratio, channels, *rest in architecture["blocks"]]
        model = MobileNetV2(
            architecture["num_classes"], width, rows, 1, norm_layer=norm, dropout=architecture["dropout"]
        )
        last = architecture["last_channel"]
        if last != model.last_channel:  # a width between two multiples of 8
            inputs = model.features[-1][0].in_channels
            model.features[-1] = Conv2dNormActivation(inputs, last, 1, norm_layer=norm, activation_layer=nn.ReLU6)
            model.classifier[-1] = nn.Linear(last, architecture["num_classes"])
            model.last_channel = last
        return model

    def example(self) -> nn.Module:
        from torchvision.models.mobilenetv2 import MobileNetV2

        return MobileNetV2(5, 0.25, [[1, 16, 1, 1], [3, 24, 2, 2], [2.5, 32, 1, 1]])


class HeadBeforePoolMobileNetV3(PositionwiseHead):
    """Both layers of the classifier at every position."""


@register("torchvision.models.mobilenetv3.MobileNetV3")
class TorchvisionMobileNetV3(PositionwiseHeadFamily):
    """features (stem, inverted residuals, last convolution), avgpool, classifier (linear, hardswish, dropout, linear).

    head="keep" is exact at B = 1. head="before_pool" takes the mean after the classifier's hardswish, not before.
    """

    name = "torchvision_mobilenet_v3"
    title = "torchvision MobileNetV3"
    converts = "convolutions, BatchNorms, hardswish, squeeze-and-excitation; both classifier layers before the pooling"
    keeps = "ReLUs, the layers inside squeeze-and-excitation"
    cannot = "be exact at B = 1 with the head before the pooling: its hardswish comes first (head='keep' is)"
    reader = "features.0.0"
    mixin = HeadBeforePoolMobileNetV3

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        return {
            "blocks": [_v3_row(block) for block in list(model.features)[1:-1]],
            "last_channel": model.classifier[0].out_features,
            "dropout": dropout_of(model.classifier),
            "num_classes": model.classifier[-1].out_features,
            "norm": norm_options(model),
        }

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

        arguments = dict(architecture)
        rows = [InvertedResidualConfig(*row, width_mult=1.0) for row in arguments.pop("blocks")]
        return MobileNetV3(rows, norm_layer=partial(nn.BatchNorm2d, **arguments.pop("norm")), **arguments)

    def example(self) -> nn.Module:
        from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

        rows = [
            (8, 3, 8, 8, True, "RE", 2, 1),
            (8, 5, 16, 16, False, "RE", 1, 1),
            (16, 3, 24, 16, True, "HS", 1, 2),
        ]
        return MobileNetV3([InvertedResidualConfig(*row, 1.0) for row in rows], 24, 5)


def _v3_row(block: nn.Module) -> list[Any]:
    """The arguments of a block's InvertedResidualConfig, without the width factor."""
    *expansion, depthwise = [layer for layer in block.block if isinstance(layer, nn.Sequential)][:-1]
    convolution, _, activation = depthwise
    inputs = expansion[0][0].in_channels if expansion else convolution.in_channels
    squeezes = any(type(layer).__name__ == "SqueezeExcitation" for layer in block.block)
    kind = "HS" if type(activation) is nn.Hardswish else "RE"
    stride = 2 if block._is_cn else 1  # a dilated block does not stride where it was meant to
    return [
        inputs,
        convolution.kernel_size[0],
        convolution.out_channels,
        block.out_channels,
        squeezes,
        kind,
        stride,
        convolution.dilation[0],
    ]


class ConvertedMNASNet(ChangedForward):
    """A state dict without version numbers, as safetensors keep it, is one of the class as it is."""

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, {"version": self._version, **local_metadata}, *rest)


class HeadBeforePoolMNASNet(ConvertedMNASNet, PositionwiseHead):
    """The classifier at every position, then the mean over them."""

    trunk = ("layers",)
    pooling = ()


@register("torchvision.models.mnasnet.MNASNet")
class TorchvisionMNASNet(PositionwiseHeadFamily):
    """layers (stem, inverted residuals, last convolution), mean, classifier (dropout, linear)."""

    name = "torchvision_mnasnet"
    title = "torchvision MNASNet"
    example_size = (40, 40)
    converts = "convolutions, BatchNorms; the classifier before the pooling"
    keeps = "ReLUs"
    reader = "layers.0"
    mixin = HeadBeforePoolMNASNet

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        return super().prepare(model, options, True) if head_moves else change_class(model, ConvertedMNASNet)

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        return {
            "alpha": model.alpha,
            "num_classes": model.classifier[-1].out_features,
            "dropout": dropout_of(model.classifier),
        }

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        from torchvision.models.mnasnet import MNASNet

        return MNASNet(**architecture)

    def example(self) -> nn.Module:
        return self.build({"alpha": 0.2, "num_classes": 5})
