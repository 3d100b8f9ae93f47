"""timm's HRNet."""

from __future__ import annotations

from torch import nn

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import PooledHeadFamily, narrowed
from bcosification.convert.rules import Options, rule
from bcosification.convert.timm_layers import KNOWN_FORWARDS

KNOWN_FORWARDS |= {"timm.models.hrnet.HighResolutionModule", "timm.models.hrnet.SequentialList"}


@rule(nn.Upsample)
def upsample(layer: nn.Upsample, options: Options) -> nn.Module:
    """Upsample: linear in the image whatever its mode is, so kept."""
    return layer


@register("timm.models.hrnet.HighResolutionNet")
class TimmHRNet(PooledHeadFamily):
    """conv1, conv2, layer1, stages of branches of four resolutions, which are added up, incre_modules, classifier."""

    name = "timm_hrnet"
    title = "timm HRNet"
    example_name = "hrnet_w18_small"
    example_size = (64, 64)
    converts = "convolutions, BatchNorms; the classifier before the pooling"
    keeps = "ReLUs, upsampling"
    head_name = "classifier"

    def example(self) -> nn.Module:
        return narrowed(super().example(), 2)
