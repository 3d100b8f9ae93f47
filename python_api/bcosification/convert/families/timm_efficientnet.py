"""timm's EfficientNet and MobileNetV3."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bcosification.convert.blocks import recomputes
from bcosification.convert.chains import convolution_norm_activation
from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.families.base import HeadBeforePool, register
from bcosification.convert.families.timm_family import TimmFamily, averages
from bcosification.convert.rules import Options

_CONVERTS = "convolutions, BatchNorms, SiLUs and Hardswishes; the classifier before the pooling"
_KEEPS = "squeeze-and-excitation and the routing of conditional convolutions, whose outputs are constants"


class FusedEfficientNet(ChangedForward):
    """The first and the last convolution with the norms behind them as one op each."""

    fused_chains = (("conv_stem", "bn1"), ("conv_head", "bn2"))

    def forward_features(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing:
            return super().forward_features(x)
        low = recomputes(self)
        x = self.blocks(convolution_norm_activation(self.conv_stem, self.bn1, None, x, recompute=low))
        return convolution_norm_activation(self.conv_head, self.bn2, None, x, recompute=low)


class HeadBeforePoolEfficientNet(FusedEfficientNet, HeadBeforePool):
    """Besides, the classifier, a 1x1 convolution, before the global pooling."""

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
    mixins: tuple[type[ChangedForward], type[HeadBeforePool]] = (FusedEfficientNet, HeadBeforePoolEfficientNet)
    """Of models whose head stays where it is, and of those whose head moves."""

    def moves_head(self, model: nn.Module) -> bool:
        return averages(model.global_pool)

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        model = super().prepare(model, options, head_moves)
        return change_class(model, self.mixins[head_moves])


class FusedMobileNetV3(ChangedForward):
    """The first convolution with the norm behind it as one op."""

    fused_chains = (("conv_stem", "bn1"),)

    def forward_features(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing:
            return super().forward_features(x)
        return self.blocks(convolution_norm_activation(self.conv_stem, self.bn1, None, x, recompute=recomputes(self)))


class HeadBeforePoolMobileNetV3(FusedMobileNetV3, HeadBeforePool):
    """The head's convolution, norm and activation and the classifier at every position, before the global pooling."""

    fused_chains = (*FusedMobileNetV3.fused_chains, ("conv_head", "norm_head"))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits:
            return super().forward_head(x, pre_logits=True)
        x = convolution_norm_activation(self.conv_head, self.norm_head, self.act2, x, recompute=recomputes(self))
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
    mixins = (FusedMobileNetV3, HeadBeforePoolMobileNetV3)

    def head_move_changes(self, model: nn.Module) -> str | None:
        if isinstance(model.act2, nn.Identity) and isinstance(model.norm_head, nn.Identity):
            return None
        return "the mean over positions is taken after the head's activation, not before"
