"""timm's MLP-Mixer."""

from __future__ import annotations

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import TokenFamily


@register("timm.models.mlp_mixer.MlpMixer")
class TimmMixer(TokenFamily):
    """stem (PatchEmbed), blocks, norm, mean over the tokens, head. The MLPs over tokens become B-cos as those over
    channels do: each unit of their first layer is a weighted sum of all positions of one channel."""

    name = "timm_mixer"
    title = "timm MLP-Mixer"
    example_name = "mixer_s32_224"
    example_arguments = {"img_size": 32}
    converts = "patch embedding, both kinds of MLPs, LayerNorms, GELUs; the head on every token, before their mean"
    keeps = "nothing but reshapes"
