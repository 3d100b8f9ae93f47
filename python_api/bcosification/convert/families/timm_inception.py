"""timm's Inception v3, v4 and Inception-ResNet v2."""

from __future__ import annotations

from typing import Any

from torch import nn

from bcosification.convert.class_change import change_class
from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import PooledHeadFamily, narrowed
from bcosification.convert.families.torchvision_inception import PooledInceptionB, PooledInceptionD
from bcosification.convert.rules import Options
from bcosification.convert.timm_layers import KNOWN_FORWARDS

_V3 = ("InceptionA", "InceptionB", "InceptionC", "InceptionD", "InceptionE")
_V4 = ("Mixed3a", "Mixed4a", "Mixed5a", "InceptionA", "ReductionA", "InceptionB", "ReductionB", "InceptionC")
_RESNET = ("Mixed_5b", "Block35", "Mixed_6a", "Block17", "Mixed_7a", "Block8")
KNOWN_FORWARDS |= {f"timm.models.inception_v3.{name}" for name in _V3}
KNOWN_FORWARDS |= {f"timm.models.inception_v4.{name}" for name in _V4}
KNOWN_FORWARDS |= {f"timm.models.inception_resnet_v2.{name}" for name in _RESNET}
_CONVERTS = "convolutions, BatchNorms, max pooling; the classifier before the pooling"


@register("timm.models.inception_v3.InceptionV3")
class TimmInceptionV3(PooledHeadFamily):
    """Conv2d_1a_3x3 to Mixed_7c, global_pool, fc. The auxiliary classifier, which helps to train from nothing, goes."""

    name = "timm_inception_v3"
    title = "timm Inception v3"
    example_name = "inception_v3"
    example_size = (96, 96)
    converts = "convolutions, BatchNorms, max pooling, also where it is a function; the classifier before the pooling"
    keeps = "ReLUs"
    cannot = "keep the auxiliary classifier"
    head_name = "fc"

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        model.aux_logits, model.AuxLogits = False, None
        for module in model.modules():
            if type(module).__name__ in ("InceptionB", "InceptionD"):
                module.pool = nn.MaxPool2d(3, stride=2)
                change_class(module, PooledInceptionB if type(module).__name__ == "InceptionB" else PooledInceptionD)
        return super().prepare(model, options, head_moves)

    def output(self, value: Any) -> Any:
        return value[0] if isinstance(value, tuple) else value

    def example(self) -> nn.Module:
        return narrowed(super().example(), 16)


@register("timm.models.inception_v4.InceptionV4")
class TimmInceptionV4(PooledHeadFamily):
    """features, global_pool, last_linear."""

    name = "timm_inception_v4"
    title = "timm Inception v4"
    example_name = "inception_v4"
    example_size = (96, 96)
    converts, keeps = _CONVERTS, "ReLUs"
    head_name = "last_linear"

    def example(self) -> nn.Module:
        return narrowed(super().example(), 32)


@register("timm.models.inception_resnet_v2.InceptionResnetV2")
class TimmInceptionResNetV2(PooledHeadFamily):
    """conv2d_1a to conv2d_7b with blocks that add what they compute, scaled by a number; global_pool, classif."""

    name = "timm_inception_resnet_v2"
    title = "timm Inception-ResNet v2"
    example_name = "inception_resnet_v2"
    example_size = (96, 96)
    converts, keeps = _CONVERTS, "ReLUs"
    head_name = "classif"

    def example(self) -> nn.Module:
        return narrowed(super().example(), 16)
