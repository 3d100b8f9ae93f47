"""timm's ResNets: ResNet (with ResNeXt, ResNet-D, -T, -S, -RS, ECA, blur pooling), pre-activation ones, BYOB ones."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bcosification.convert.blocks import recomputes
from bcosification.convert.chains import stem_norm_activation
from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.families.base import HeadBeforePool, register
from bcosification.convert.families.timm_family import ClassifierHeadFamily, TimmFamily, averages
from bcosification.convert.rules import Options

_CONVERTS = "convolutions (also standardised ones), norms, SiLUs, max pooling; the classifier before the pooling"
_KEEPS = "ReLUs, blur and average pooling, squeeze-and-excitation, whose scales are constants"


class FusedStemResNet(ChangedForward):
    """The stem's last convolution, norm and activation as one op."""

    fused_chains = (("conv1", "bn1"),)

    def forward_features(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing:
            return super().forward_features(x)
        x = stem_norm_activation(self.conv1, self.bn1, self.act1, x, recompute=recomputes(self))
        return self.layer4(self.layer3(self.layer2(self.layer1(self.maxpool(x)))))


class HeadBeforePoolTimmResNet(FusedStemResNet, HeadBeforePool):
    """Besides, the classifier, a 1x1 convolution, before the global pooling."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits:
            return super().forward_head(x, pre_logits=True)
        x = F.dropout(x, float(self.drop_rate), self.training) if self.drop_rate else x
        return self.global_pool(self.fc(x))


@register("timm.models.resnet.ResNet")
class TimmResNet(TimmFamily):
    """conv1 (one or three convolutions), bn1, act1, maxpool, layer1 to layer4, global_pool, fc."""

    name = "timm_resnet"
    title = "timm ResNet, ResNeXt, ResNet-D/-T/-RS"
    example_name = "resnext50d_32x4d"
    example_arguments = {
        "layers": (1, 1, 1, 1), "channels": (4, 8, 8, 8), "stem_width": 8, "cardinality": 2, "base_width": 32,
        "block_args": {"attn_layer": "se"},
    }  # fmt: skip
    example_size = (64, 64)
    converts, keeps = _CONVERTS, _KEEPS
    head_name = "fc"

    def moves_head(self, model: nn.Module) -> bool:
        return averages(model.global_pool)

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        model = super().prepare(model, options, head_moves)
        return change_class(model, HeadBeforePoolTimmResNet if head_moves else FusedStemResNet)


@register("timm.models.resnetv2.ResNetV2")
class TimmResNetV2(ClassifierHeadFamily):
    """stem, stages of blocks with the norms before the convolutions (or not), norm, head (ClassifierHead)."""

    name = "timm_resnetv2"
    title = "timm ResNet V2 (pre-activation, BiT)"
    example_name = "resnetv2_50"
    example_arguments = {"layers": (1, 1, 1, 1), "channels": (32, 64, 64, 64), "stem_chs": 32}
    example_size = (64, 64)
    converts, keeps = _CONVERTS, _KEEPS
    cannot = "keep standardising weights (they are standardised once)"


@register("timm.models.byobnet.ByobNet")
class TimmByobNet(ClassifierHeadFamily):
    """stem, stages, final_conv, head: a ClassifierHead, a NormMlpClassifierHead, or CLIP's attention pooling."""

    name = "timm_byobnet"
    title = "timm ByobNet (ResNet-TS, ResNets of CLIP, RepVGG, MobileOne)"
    example_name = "resnet33ts"
    example_arguments = {"width_factor": 1 / 16, "num_features": 640}
    example_size = (64, 64)
    converts = "convolutions, norms, SiLUs; the classifier before the pooling, or attention pooling's projection"
    keeps = "ReLUs, average pooling, squeeze-and-excitation; q, k, v projections of attention pooling, q and k constant"
    cannot = "convert blocks with self-attention; join the branches of RepVGG and MobileOne afterwards"

    def _readers(self, model: nn.Module) -> list[str]:
        if type(model.stem).__name__ not in ("MobileOneBlock", "RepVggBlock"):
            return super()._readers(model)
        branches = [name for name, part in model.stem.named_modules() if isinstance(part, nn.Conv2d)]
        return [f"stem.{name}" for name in branches]  # timm names the first of each kind

    def head(self, model: nn.Module) -> str | None:
        self_attention = isinstance(getattr(model.head, "proj", None), nn.Linear)
        return "head.proj" if self_attention else super().head(model)
