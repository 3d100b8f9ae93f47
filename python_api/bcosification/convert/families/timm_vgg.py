"""timm's VGG."""

from __future__ import annotations

from torch import nn

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import ClassifierHeadFamily, narrowed
from bcosification.convert.timm_layers import KNOWN_FORWARDS

KNOWN_FORWARDS |= {"timm.models.vgg.ConvMlp"}


@register("timm.models.vgg.VGG")
class TimmVGG(ClassifierHeadFamily):
    """features, pre_logits (the fully connected layers, as convolutions), a ClassifierHead. Images that leave less than
    7x7 features have these averaged up to that size, as timm does it."""

    name = "timm_vgg"
    title = "timm VGG"
    example_name = "vgg11_bn"
    example_size = (64, 64)
    converts = "convolutions, BatchNorms, max pooling; the classifier before the pooling"
    keeps = "ReLUs"

    def example(self) -> nn.Module:
        return narrowed(super().example(), 8)
