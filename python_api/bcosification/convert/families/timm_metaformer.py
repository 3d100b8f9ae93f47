"""timm's MetaFormers: PoolFormer (V1, V2), ConvFormer, CAFormer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bcosification import nn as bnn
from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.families.base import HeadBeforePool, register
from bcosification.convert.families.timm_family import TimmFamily, averages
from bcosification.convert.rules import Options, group_norm, layer_norm, layer_norm2d, linear_as_it_is, rule
from bcosification.convert.timm_layers import KNOWN_FORWARDS

_BLOCKS = ("Downsampling", "MetaFormerBlock", "MetaFormerStage", "MlpHead", "Pooling", "SepConv", "Stem")
KNOWN_FORWARDS |= {f"timm.models.metaformer.{name}" for name in _BLOCKS}
rule("timm.models.metaformer.LayerNormNoBias")(layer_norm)
rule("timm.models.metaformer.LayerNorm2dNoBias")(layer_norm2d)
rule("timm.models.metaformer.GroupNorm1NoBias")(group_norm)
rule("timm.models.metaformer.Scale")(linear_as_it_is)


class HeldSquaredReLU(ChangedForward, bnn.ScalingGate):
    """relu(x)², as x times relu(x), which explanations hold."""

    def scale(self, x: Tensor) -> Tensor:
        return F.relu(x)


class HeldStarReLU(ChangedForward, bnn.ScaleAndShift):
    """scale · relu(x)² + bias, as x times scale · relu(x), which explanations hold, plus a constant."""

    def scale(self, x: Tensor) -> Tensor:
        return self._parameters["scale"] * F.relu(x)  # the method hides the parameter's name


@rule("timm.models.metaformer.SquaredReLU", "timm.models.metaformer.StarReLU")
def squared_relu(layer: nn.Module, options: Options) -> nn.Module:
    """SquaredReLU and StarReLU -> the same with a factor that is a constant in explanation mode, or nothing."""
    if options.activation == "remove":
        return nn.Identity().train(layer.training)
    return change_class(layer, HeldStarReLU if type(layer).__name__ == "StarReLU" else HeldSquaredReLU)


class HeadBeforePoolMetaFormer(HeadBeforePool):
    """The head's norm, MLP and classifier at every position, before the global pooling."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits:
            return super().forward_head(x, pre_logits=True)
        x = self.head.norm(x).permute(0, 2, 3, 1)  # what follows is linear over the last dimension
        x = self.head.fc(self.head.drop(x)).permute(0, 3, 1, 2)
        return self.head.flatten(self.head.global_pool(x))


@register("timm.models.metaformer.MetaFormer")
class TimmMetaFormer(TimmFamily):
    """stem, stages of blocks (a token mixer, an MLP), head: global_pool, norm, flatten, drop, fc (or an MLP)."""

    name = "timm_metaformer"
    title = "timm PoolFormer, ConvFormer, CAFormer"
    example_options = {"mean": 0.5, "std": 0.25}
    example_size = (64, 64)
    converts = "convolutions, MLPs, output projections, norms, GELUs, StarReLUs; the head before the pooling"
    keeps = "average pooling, q, k, v projections, layer scales; q and k constant"
    cannot = "be exact at B = 1 with the head before the pooling, whose norm then comes first (head='keep' is)"

    def example(self) -> nn.Module:
        from timm.models import metaformer  # create_model takes no widths

        norms = [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2
        mixers = [metaformer.Pooling, metaformer.SepConv, metaformer.Attention, metaformer.Attention]
        return metaformer.MetaFormer(
            num_classes=5, depths=(1, 1, 1, 1), dims=(32, 32, 32, 32), token_mixers=mixers, norm_layers=norms
        )

    def head(self, model: nn.Module) -> str | None:
        name = "head.fc.fc2" if hasattr(model.head.fc, "fc2") else "head.fc"
        return name if isinstance(model.get_submodule(name), nn.Linear) else None

    def moves_head(self, model: nn.Module) -> bool:
        return averages(model.head.global_pool)

    def moved_head_is_convolution(self, model: nn.Module) -> bool:
        return False

    def head_move_changes(self, model: nn.Module) -> str | None:
        return "the mean over positions is taken after the head's norm (and MLP), not before"

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        model = super().prepare(model, options, head_moves)
        return change_class(model, HeadBeforePoolMetaFormer) if head_moves else model
