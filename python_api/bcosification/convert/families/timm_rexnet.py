"""timm's ReXNet."""

from __future__ import annotations

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import ClassifierHeadFamily
from bcosification.convert.timm_layers import KNOWN_FORWARDS

KNOWN_FORWARDS |= {"timm.models.rexnet.LinearBottleneck"}


@register("timm.models.rexnet.RexNet")
class TimmRexNet(ClassifierHeadFamily):
    """stem, features (bottlenecks, whose input is added to the first of their channels), a ClassifierHead."""

    name = "timm_rexnet"
    title = "timm ReXNet"
    example_name = "rexnet_100"
    example_arguments = {"width_mult": 0.25, "depth_mult": 0.3}  # deeper ones turn rounding into 2e-12
    example_size = (64, 64)
    converts = "convolutions, BatchNorms, SiLUs, ReLU6; the classifier before the pooling"
    keeps = "squeeze-and-excitation, whose scales are constants"
