"""timm's Dual Path Networks."""

from __future__ import annotations

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import PooledHeadFamily
from bcosification.convert.timm_layers import KNOWN_FORWARDS

KNOWN_FORWARDS |= {"timm.models.dpn.BnAct", "timm.models.dpn.BnActConv2d", "timm.models.dpn.DualPathBlock"}


@register("timm.models.dpn.DPN")
class TimmDPN(PooledHeadFamily):
    """features: a first convolution, blocks with an added and a concatenated path, norms first; classifier."""

    name = "timm_dpn"
    title = "timm DPN"
    example_name = "dpn68"
    example_arguments = {
        "k_sec": (1, 1, 1, 1), "inc_sec": (4, 4, 4, 4), "k_r": 16, "groups": 4, "num_init_features": 8,
    }  # fmt: skip
    example_size = (64, 64)
    converts = "convolutions, BatchNorms, max pooling; the classifier before the pooling"
    keeps = "ReLUs"
    head_name = "classifier"
