"""timm's InceptionNeXt."""

from __future__ import annotations

from torch import Tensor, nn

from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import TimmFamily, averages
from bcosification.convert.rules import FACTORS, Options
from bcosification.convert.timm_layers import KNOWN_FORWARDS

_BLOCKS = ("ConvMlp", "InceptionDWConv2d", "MetaNeXtBlock", "MetaNeXtStage", "MlpClassifierHead")
KNOWN_FORWARDS |= {f"timm.models.inception_next.{name}" for name in _BLOCKS}
FACTORS["timm.models.inception_next.MetaNeXtBlock"] = ("gamma",)


class HeadBeforePoolMlpHead(ChangedForward):
    """The head's MLP at every position, before the global pooling."""

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits:
            return super().forward(x, pre_logits=True)
        x = self.norm(self.act(self.fc1(x.permute(0, 2, 3, 1))))
        return self.global_pool(self.fc2(self.drop(x)).permute(0, 3, 1, 2)).flatten(1)


@register("timm.models.inception_next.MetaNeXt")
class TimmInceptionNeXt(TimmFamily):
    """stem, stages of blocks that split channels among depthwise convolutions, head (an MLP behind the pooling)."""

    name = "timm_inception_next"
    title = "timm InceptionNeXt"
    example_name = "inception_next_atto"
    example_arguments = {"depths": (1, 1, 1, 1), "dims": (16, 16, 24, 24)}
    example_size = (64, 64)
    converts = "convolutions, linear layers, norms, GELUs; the head before the pooling"
    keeps = "layer scales"
    cannot = "be exact at B = 1 with the head before the pooling, whose norm then comes first (head='keep' is)"
    head_name = "head.fc2"

    def moves_head(self, model: nn.Module) -> bool:
        return averages(model.head.global_pool)

    def moved_head_is_convolution(self, model: nn.Module) -> bool:
        return False

    def head_move_changes(self, model: nn.Module) -> str | None:
        return "the mean over positions is taken after the head's MLP, not before"

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        if head_moves:
            change_class(model.head, HeadBeforePoolMlpHead)
        return super().prepare(model, options, head_moves)
