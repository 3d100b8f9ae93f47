"""timm's cross-stage partial networks and DarkNets."""

from __future__ import annotations

from torch import nn

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import ClassifierHeadFamily, narrowed
from bcosification.convert.timm_layers import KNOWN_FORWARDS

_BLOCKS = ("BottleneckBlock", "CrossStage", "CrossStage3", "DarkBlock", "DarkStage", "EdgeBlock")
KNOWN_FORWARDS |= {f"timm.models.cspnet.{name}" for name in _BLOCKS}


@register("timm.models.cspnet.CspNet")
class TimmCspNet(ClassifierHeadFamily):
    """stem, stages of which a part of the channels goes around the blocks, a ClassifierHead."""

    name = "timm_cspnet"
    title = "timm CSPNet, CS3, DarkNet"
    example_name = "cs3sedarknet_l"
    example_size = (64, 64)
    converts = "convolutions, BatchNorms, SiLUs, max pooling; the classifier before the pooling"
    keeps = "ReLUs, leaky ones, squeeze-and-excitation, whose scales are constants"

    def example(self) -> nn.Module:
        return narrowed(super().example(), 8)
