"""timm's SelecSLS."""

from __future__ import annotations

from torch import nn

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import PooledHeadFamily, narrowed
from bcosification.convert.rules import linear_as_it_is, rule
from bcosification.convert.timm_layers import KNOWN_FORWARDS

KNOWN_FORWARDS |= {f"timm.models.selecsls.{name}" for name in ("SelecSlsBlock", "SequentialList")}
rule("timm.models.selecsls.SelectSeq")(linear_as_it_is)


@register("timm.models.selecsls.SelecSls")
class TimmSelecSLS(PooledHeadFamily):
    """stem, features (blocks that pass on their own output and the first one's), head, global_pool, fc."""

    name = "timm_selecsls"
    title = "timm SelecSLS"
    example_name = "selecsls42"
    example_size = (64, 64)
    converts = "convolutions, BatchNorms; the classifier before the pooling"
    keeps = "ReLUs"
    head_name = "fc"

    def example(self) -> nn.Module:
        return narrowed(super().example(), 8)
