"""timm's RegNets (X, Y, Z, V)."""

from __future__ import annotations

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import ClassifierHeadFamily
from bcosification.convert.timm_layers import KNOWN_FORWARDS

KNOWN_FORWARDS |= {
    "timm.models.regnet.Bottleneck",
    "timm.models.regnet.PreBottleneck",
    "timm.models.regnet.RegStage",
}


@register("timm.models.regnet.RegNet")
class TimmRegNet(ClassifierHeadFamily):
    """stem, stages s1 to s4 of bottlenecks, final_conv, a ClassifierHead."""

    name = "timm_regnet"
    title = "timm RegNet (X, Y, Z, V)"
    example_name = "regnety_002"
    example_arguments = {"w0": 8, "wa": 8.0, "wm": 1.6, "depth": 5, "group_size": 4, "stem_width": 8}
    example_size = (64, 64)
    converts = "convolutions, norms, SiLUs; the classifier before the pooling"
    keeps = "ReLUs, squeeze-and-excitation, whose scales are constants"
