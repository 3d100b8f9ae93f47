"""timm's EdgeNeXt."""

from __future__ import annotations

from torch import Tensor, nn

from bcosification import nn as bnn
from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import ClassifierHeadFamily
from bcosification.convert.rules import FACTORS, Options, rule
from bcosification.convert.timm_layers import KNOWN_FORWARDS
from bcosification.nn.modes import per_sample

_BLOCKS = ("ConvBlock", "EdgeNeXtStage", "SplitTransposeBlock")
KNOWN_FORWARDS |= {f"timm.models.edgenext.{name}" for name in _BLOCKS}
FACTORS["timm.models.edgenext.ConvBlock"] = ("gamma",)
FACTORS["timm.models.edgenext.SplitTransposeBlock"] = ("gamma", "gamma_xca")


class GainedFourierPositions(ChangedForward, bnn.DetachableModule):
    """Positions that a convolution makes of sines: they are added to the tokens and count as the constant they are."""

    constant_children = ("token_projection",)

    def forward(self, shape: tuple[int, int, int]) -> Tensor:
        positions = super().forward(shape)
        if self.constant_gain is None:
            return positions
        return positions * per_sample(self.constant_gain, shape[0], 4, "positions").to(positions.dtype)


@rule("timm.models.edgenext.PositionalEncodingFourier", "timm.models.xcit.PositionalEncodingFourier")
def fourier_positions(layer: nn.Module, options: Options) -> nn.Module:
    """PositionalEncodingFourier: made of the image's size alone; kept, and counted as a constant."""
    return change_class(layer, GainedFourierPositions)


@register("timm.models.edgenext.EdgeNeXt")
class TimmEdgeNeXt(ClassifierHeadFamily):
    """stem, stages of convolutional blocks and of attention between channels, norm_pre, a NormMlpClassifierHead."""

    name = "timm_edgenext"
    title = "timm EdgeNeXt"
    example_name = "edgenext_xx_small"
    example_arguments = {"depths": (1, 1, 2, 2), "dims": (8, 16, 16, 24), "heads": (2, 2, 2, 2)}
    example_size = (64, 64)
    converts = "convolutions, MLPs, output projections, LayerNorms, GELUs; the head before the pooling"
    keeps = "q, k, v projections, layer scales; q and k constant"
    cannot = "be exact at B = 1 with the head before the pooling, whose norm then comes first (head='keep' is)"
