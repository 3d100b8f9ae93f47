"""torchvision's RegNet, X (without) and Y (with squeeze-and-excitation)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from bcosification.convert.families.base import register
from bcosification.convert.families.positionwise_head import PositionwiseHead, PositionwiseHeadFamily, norm_options


class HeadBeforePoolRegNet(PositionwiseHead):
    """The classifier, a 1x1 convolution, before the global pooling."""

    trunk = ("stem", "trunk_output")
    classifiers = ("fc",)


@register("torchvision.models.regnet.RegNet")
class TorchvisionRegNet(PositionwiseHeadFamily):
    """stem, trunk_output (stages of residual bottlenecks), avgpool, fc."""

    name = "torchvision_regnet"
    title = "torchvision RegNet"
    converts = "convolutions, BatchNorms, squeeze-and-excitation; the classifier before the pooling"
    keeps = "ReLUs, the layers inside squeeze-and-excitation"
    reader = "stem.0"
    mixin = HeadBeforePoolRegNet

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        firsts = [stage[0] for stage in model.trunk_output]
        transforms = [block.f for block in firsts]
        widths = [f.c[0].out_channels for f in transforms]
        inner = [f.b[0].out_channels for f in transforms]
        ratios = [f.se.fc1.out_channels / f.a[0].in_channels for f in transforms if hasattr(f, "se")]
        return {
            "depths": [len(stage) for stage in model.trunk_output],
            "widths": widths,
            "group_widths": [f.b[0].out_channels // f.b[0].groups for f in transforms],
            "bottleneck_multipliers": [w_b / width for w_b, width in zip(inner, widths, strict=True)],
            "strides": [f.b[0].stride[0] for f in transforms],
            "se_ratio": _common_ratio(transforms) if ratios else None,
            "stem_width": model.stem[0].out_channels,
            "activation": type(firsts[0].activation).__name__,
            "num_classes": model.fc.out_features,
            "norm": norm_options(model),
        }

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        from torchvision.models.regnet import BlockParams, RegNet

        arguments = dict(architecture)
        names = ("depths", "widths", "group_widths", "bottleneck_multipliers", "strides", "se_ratio")
        blocks = BlockParams(*(arguments.pop(name) for name in names))
        activation = getattr(nn, arguments.pop("activation"))
        norm = partial(nn.BatchNorm2d, **arguments.pop("norm"))
        return RegNet(blocks, activation=activation, norm_layer=norm, **arguments)

    def example(self) -> nn.Module:
        from torchvision.models.regnet import BlockParams, RegNet

        return RegNet(BlockParams([1, 2], [16, 24], [8, 8], [1.0, 1.0], [2, 2], 0.25), 5, stem_width=8)


def _common_ratio(transforms: list[nn.Module]) -> float:
    """The se_ratio that gives every block its number of squeeze channels, round(se_ratio * input channels)."""
    pairs = [(f.se.fc1.out_channels, f.a[0].in_channels) for f in transforms]
    widest = max(pairs, key=lambda pair: pair[1])
    for ratio in (0.25, *(squeezed / inputs for squeezed, inputs in pairs)):
        if all(round(ratio * inputs) == squeezed for squeezed, inputs in pairs):
            return ratio
    return widest[0] / widest[1]
