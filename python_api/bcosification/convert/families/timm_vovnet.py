"""timm's VoVNet."""

from __future__ import annotations

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import ClassifierHeadFamily
from bcosification.convert.timm_layers import KNOWN_FORWARDS

KNOWN_FORWARDS |= {
    "timm.layers.separable_conv.SeparableConvNormAct",
    "timm.models.vovnet.OsaBlock",
    "timm.models.vovnet.OsaStage",
    "timm.models.vovnet.SequentialAppendList",
}


@register("timm.models.vovnet.VovNet")
class TimmVoVNet(ClassifierHeadFamily):
    """stem, stages of blocks that concatenate what each of their layers gave, a ClassifierHead."""

    name = "timm_vovnet"
    title = "timm VoVNet (V1, ESE, ECA)"
    example_name = "ese_vovnet19b_slim_dw"
    example_arguments = {
        "stem_chs": (8, 8, 8), "stage_conv_chs": (8, 8, 12, 12), "stage_out_chs": (8, 12, 12, 16),
    }  # fmt: skip
    example_size = (64, 64)
    converts = "convolutions, BatchNorms, max pooling; the classifier before the pooling"
    keeps = "ReLUs, squeeze-and-excitation, whose scales are constants"
