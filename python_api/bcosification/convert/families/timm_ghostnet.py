"""timm's GhostNets, V1 to V3."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bcosification.convert.class_change import change_class
from bcosification.convert.families.base import HeadBeforePool, register
from bcosification.convert.families.timm_family import TimmFamily, averages
from bcosification.convert.rules import Options, rule
from bcosification.convert.timm_layers import KNOWN_FORWARDS, convert_children, held

KNOWN_FORWARDS |= {f"timm.models.ghostnet.{name}" for name in ("GhostBottleneck", "GhostBottleneckV3", "GhostModule")}


@rule("timm.models.ghostnet.GhostModuleV2", "timm.models.ghostnet.GhostModuleV3")
def gated_ghost_module(layer: nn.Module, options: Options) -> nn.Module:
    """GhostModules whose output is scaled by a map of gates, made by short_conv of the input: the gates are held."""
    convert_children(layer, options, keep=("short_conv", "gate_fn"))
    held(layer, "gate_fn")
    layer.constant_children = tuple(name for name in ("short_conv", "gate_fn") if name in layer._modules)
    return layer


class HeadBeforePoolGhostNet(HeadBeforePool):
    """The head's convolution and activation and the classifier at every position, before the global pooling."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits:
            return super().forward_head(x, pre_logits=True)
        x = F.dropout(self.act2(self.conv_head(x)), self.drop_rate, self.training)
        return self.global_pool(self.classifier(x)).flatten(1)


@register("timm.models.ghostnet.GhostNet")
class TimmGhostNet(TimmFamily):
    """conv_stem, bn1, act1, blocks, global_pool, conv_head, act2, flatten, classifier."""

    name = "timm_ghostnet"
    title = "timm GhostNet (V1 to V3)"
    example_options = {"mean": 0.5, "std": 0.25}
    example_size = (64, 64)
    converts = "convolutions, BatchNorms; the classifier before the pooling"
    keeps = "ReLUs, squeeze-and-excitation and the gates of GhostNet V2 and V3, whose outputs are constants"
    cannot = "be exact at B = 1 with the head before the pooling: an activation comes first (head='keep' is)"
    head_name = "classifier"

    def example(self) -> nn.Module:
        from timm.models.ghostnet import GhostNet  # create_model takes no width

        # kernel, expanded and output channels, squeeze-and-excitation, stride of each block of each stage
        stages = [[[3, 8, 8, 0, 1]], [[3, 16, 8, 0.25, 2]], [[3, 16, 8, 0, 1], [5, 16, 12, 0.25, 2]]]
        return GhostNet(stages, num_classes=5, version="v2")

    def moves_head(self, model: nn.Module) -> bool:
        return averages(model.global_pool)

    def head_move_changes(self, model: nn.Module) -> str | None:
        return "the mean over positions is taken after the head's activation, not before"

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        model = super().prepare(model, options, head_moves)
        return change_class(model, HeadBeforePoolGhostNet) if head_moves else model
