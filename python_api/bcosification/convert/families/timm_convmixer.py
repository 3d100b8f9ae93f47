"""timm's ConvMixer."""

from __future__ import annotations

from torch import nn

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import PooledHeadFamily
from bcosification.convert.timm_layers import KNOWN_FORWARDS

KNOWN_FORWARDS |= {"timm.models.convmixer.Residual"}


@register("timm.models.convmixer.ConvMixer")
class TimmConvMixer(PooledHeadFamily):
    """stem, blocks (convolution, activation, norm), global_pool, head."""

    name = "timm_convmixer"
    title = "timm ConvMixer"
    example_name = "convmixer_768_32"
    example_options = {"mean": 0.5, "std": 0.25}
    example_size = (32, 32)
    converts = "convolutions, BatchNorms, GELUs; the classifier before the pooling"
    keeps = "ReLUs"

    def example(self) -> nn.Module:
        from timm.models.convmixer import ConvMixer  # create_model takes no width

        return ConvMixer(dim=8, depth=2, kernel_size=3, patch_size=4, num_classes=5)
