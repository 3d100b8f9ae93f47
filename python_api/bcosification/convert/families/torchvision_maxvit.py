"""torchvision's MaxViT."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from bcosification.convert.families.base import register
from bcosification.convert.families.positionwise_head import PositionwiseHead, PositionwiseHeadFamily, norm_options


class HeadBeforePoolMaxViT(PositionwiseHead):
    """The classifier, LayerNorm, linear, tanh, linear, at every position before its own pooling."""

    trunk = ("stem", "blocks")
    pooling = ()


@register("torchvision.models.maxvit.MaxVit")
class TorchvisionMaxViT(PositionwiseHeadFamily):
    """stem, blocks (MBConv, attention in windows, attention in a grid), classifier.

    The classifier is pooling, flattening, LayerNorm, linear, tanh, linear. Tanh is x times a gate like the others.
    head="keep" is exact at B = 1; head="before_pool" takes the mean after the LayerNorm and the tanh, not before.
    """

    name = "torchvision_maxvit"
    title = "torchvision MaxViT"
    converts = "convolutions, linear layers, norms, GELUs, tanh, squeeze-and-excitation; the classifier before pooling"
    keeps = "q, k, v projections, position biases, the layers inside squeeze-and-excitation; q and k constant"
    cannot = "be exact at B = 1 with the head before the pooling: its LayerNorm and tanh come first (head='keep' is)"
    reader = "stem.0.0"
    mixin = HeadBeforePoolMaxViT

    def input_size(self, model: nn.Module) -> tuple[int, int]:
        # Two strides of 2, each to half of it rounded up, lead to the first block's grid.
        height, width = model.blocks[0].grid_size
        return 4 * height, 4 * width

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        layers = [layer for block in model.blocks for layer in block.layers]
        first = layers[0].layers
        convolutions, attention = first.MBconv.layers, first.window_attention
        channels = attention.attn_layer[0].normalized_shape[0]
        last = layers[-1].layers.window_attention.stochastic_dropout.p
        return {
            "input_size": list(self.input_size(model)),
            "stem_channels": model.stem[0][0].out_channels,
            "partition_size": model.partition_size,
            "block_channels": [b.layers[0].layers.MBconv.layers.conv_c.out_channels for b in model.blocks],
            "block_layers": [len(block.layers) for block in model.blocks],
            "head_dim": attention.head_dim,
            "stochastic_depth_prob": last,
            "activation": type(model.stem[0][-1]).__name__,
            "squeeze_ratio": convolutions.squeeze_excitation.fc1.out_channels / channels,
            "expansion_ratio": convolutions.conv_a[0].out_channels / channels,
            "mlp_ratio": attention.mlp_layer[1].out_features // channels,
            "mlp_dropout": attention.mlp_layer[-1].p,
            "attention_dropout": attention.attn_layer[-1].p,
            "num_classes": model.classifier[-1].out_features,
            "norm": norm_options(model),
        }

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        from torchvision.models.maxvit import MaxVit

        arguments = dict(architecture)
        norm = partial(nn.BatchNorm2d, **arguments.pop("norm"))
        return MaxVit(norm_layer=norm, activation_layer=getattr(nn, arguments.pop("activation")), **arguments)

    def example(self) -> nn.Module:
        from torchvision.models.maxvit import MaxVit

        return MaxVit((32, 32), 8, 2, [8, 16], [1, 1], 4, 0.1, mlp_ratio=2, num_classes=5, expansion_ratio=2)
