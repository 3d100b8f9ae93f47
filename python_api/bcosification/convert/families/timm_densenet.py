"""timm's DenseNet."""

from __future__ import annotations

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import PooledHeadFamily
from bcosification.convert.timm_layers import KNOWN_FORWARDS

KNOWN_FORWARDS |= {f"timm.models.densenet.{name}" for name in ("DenseBlock", "DenseLayer", "DenseTransition")}


@register("timm.models.densenet.DenseNet")
class TimmDenseNet(PooledHeadFamily):
    """features (stem, blocks of layers on all that came before, transitions, norm), global_pool, classifier."""

    name = "timm_densenet"
    title = "timm DenseNet"
    example_name = "densenet121"
    example_arguments = {"growth_rate": 4, "block_config": (2, 2, 2, 2)}
    example_size = (64, 64)
    converts = "convolutions, BatchNorms, max pooling; the classifier before the pooling"
    keeps = "ReLUs"
    head_name = "classifier"
