"""timm's FastViT: blocks that add branches of convolution and BatchNorm (MobileOne, RepMixer), later with attention."""

from __future__ import annotations

from torch import nn

from bcosification.convert import timm_attention, timm_layers
from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import ClassifierHeadFamily
from bcosification.convert.rules import linear_as_it_is, rule

timm_layers.KNOWN_FORWARDS |= {
    "timm.models.fastvit.AttentionBlock",
    "timm.models.fastvit.ConvMlp",
    "timm.models.fastvit.FastVitStage",
    "timm.models.fastvit.MobileOneBlock",
    "timm.models.fastvit.PatchEmbed",
    "timm.models.fastvit.RepConditionalPosEnc",
    "timm.models.fastvit.RepMixer",
    "timm.models.fastvit.RepMixerBlock",
    "timm.models.fastvit.ReparamLargeKernelConv",
}
rule("timm.models.fastvit.Attention")(timm_attention.attention)
rule("timm.models.fastvit.LayerScale2d")(linear_as_it_is)


@register("timm.models.fastvit.FastVit")
class TimmFastViT(ClassifierHeadFamily):
    """stem, stages (downsampling, positions by a convolution, blocks), final_conv, head (ClassifierHead).

    Branches stay branches, each a B-cos convolution with its norm (or a norm alone), and are added. Two branches of the
    stem read the image.
    """

    name = "timm_fastvit"
    title = "timm FastViT (MobileCLIP-S)"
    example_name = "fastvit_mci0"
    example_arguments = {"layers": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 32)}
    example_size = (64, 64)
    converts = "convolutions of every branch, norms, GELUs, output projections; the classifier before the pooling"
    keeps = "layer scales, squeeze-and-excitation, q, k, v projections; q and k constant"
    cannot = "fold the branches into one convolution (before: timm's reparameterize_model)"

    def _readers(self, model: nn.Module) -> list[str]:
        readers, second = super()._readers(model), "stem.0.conv_scale.conv"  # which timm does not name of every model
        has = getattr(model.stem[0], "conv_scale", None) is not None and second not in readers
        return [*readers, second] if has else readers
