"""timm's EfficientNet and MobileNetV3."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bcosification.convert.class_change import change_class
from bcosification.convert.families.base import HeadBeforePool, register
from bcosification.convert.families.timm_family import TimmFamily, averages
from bcosification.convert.rules import Options

_CONVERTS = "convolutions, BatchNorms, SiLUs and Hardswishes; the classifier before the pooling"
_KEEPS = "squeeze-and-excitation and the routing of conditional convolutions, whose outputs are constants"


class HeadBeforePoolEfficientNet(HeadBeforePool):
    """The classifier, a 1x1 convolution, before the global pooling."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits:
            return super().forward_head(x, pre_logits=True)
        return self.global_pool(self.classifier(F.dropout(x, self.drop_rate, self.training)))


@register("timm.models.efficientnet.EfficientNet")
class TimmEfficientNet(TimmFamily):
    """conv_stem, bn1, blocks, conv_head, bn2, global_pool, classifier."""

    name = "timm_efficientnet"
    title = "timm EfficientNet (also V2, Lite, EdgeTPU, pruned)"
    example_name = "test_efficientnet"
    example_size = (64, 64)
    converts, keeps = _CONVERTS, _KEEPS
    head_name = "classifier"
    mixin: type[HeadBeforePool] = HeadBeforePoolEfficientNet

    def moves_head(self, model: nn.Module) -> bool:
        return averages(model.global_pool)

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        model = super().prepare(model, options, head_moves)
        return change_class(model, self.mixin) if head_moves else model


class HeadBeforePoolMobileNetV3(HeadBeforePool):
    """The head's convolution, norm and activation and the classifier at every position, before the global pooling."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits:
            return super().forward_head(x, pre_logits=True)
        x = self.act2(self.norm_head(self.conv_head(x)))
        x = self.classifier(F.dropout(x, self.drop_rate, self.training))
        return self.flatten(self.global_pool(x))


@register("timm.models.mobilenetv3.MobileNetV3")
class TimmMobileNetV3(TimmEfficientNet):
    """conv_stem, bn1, blocks, global_pool, conv_head, norm_head, act2, flatten, classifier."""

    name = "timm_mobilenetv3"
    title = "timm MobileNetV3"
    example_name = "mobilenetv3_small_050"
    converts, keeps = _CONVERTS, _KEEPS
    cannot = "be exact at B = 1 with the head before the pooling: an activation comes first (head='keep' is)"
    mixin = HeadBeforePoolMobileNetV3

    def head_move_changes(self, model: nn.Module) -> str | None:
        if isinstance(model.act2, nn.Identity) and isinstance(model.norm_head, nn.Identity):
            return None
        return "the mean over positions is taken after the head's activation, not before"
