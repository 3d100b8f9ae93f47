"""timm's Deep Layer Aggregation."""

from __future__ import annotations

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import PooledHeadFamily
from bcosification.convert.timm_layers import KNOWN_FORWARDS

_BLOCKS = ("DlaBasic", "DlaBottleneck", "DlaBottle2neck", "DlaRoot", "DlaTree")
KNOWN_FORWARDS |= {f"timm.models.dla.{name}" for name in _BLOCKS}


@register("timm.models.dla.DLA")
class TimmDLA(PooledHeadFamily):
    """base_layer, level0 to level5 (trees of blocks, whose outputs roots join), global_pool, fc (a convolution)."""

    name = "timm_dla"
    title = "timm DLA"
    example_name = "dla34"
    example_arguments = {"levels": [1, 1, 1, 2, 2, 1], "channels": [8, 8, 8, 16, 16, 16]}
    example_size = (64, 64)
    converts = "convolutions, BatchNorms, max pooling; the classifier before the pooling"
    keeps = "ReLUs"
    head_name = "fc"
