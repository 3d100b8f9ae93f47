"""timm's ConvNeXt and ConvNeXt V2."""

from __future__ import annotations

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import ClassifierHeadFamily


@register("timm.models.convnext.ConvNeXt")
class TimmConvNeXt(ClassifierHeadFamily):
    """stem, stages (downsampling, blocks), norm_pre, head: pooling, norm (or norm before it), MLP or none, classifier.

    A block's gamma is a linear factor; ConvNeXt V2's global response norm scales by factors that are constants in
    explanation mode. head="keep" is exact at B = 1; head="before_pool" is where no norm follows the pooling.
    """

    name = "timm_convnext"
    title = "timm ConvNeXt and ConvNeXt V2"
    example_name = "convnextv2_atto"
    example_arguments = {"depths": (1, 1, 1, 1), "dims": (8, 8, 12, 12)}
    example_size = (64, 64)
    converts = "convolutions, linear layers, LayerNorms, RmsNorms, GELUs; the head's norm and classifier per position"
    keeps = "layer scales; the factors of global response norms, which are constants"
    cannot = "be exact at B = 1 with the head before the pooling, whose norm then comes first (head='keep' is)"
