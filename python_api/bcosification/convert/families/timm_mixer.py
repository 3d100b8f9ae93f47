"""timm's MLP-Mixer."""

from __future__ import annotations

from torch import nn

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import TokenFamily


@register("timm.models.mlp_mixer.MlpMixer")
class TimmMixer(TokenFamily):
    """stem (PatchEmbed), blocks, norm, mean over the tokens, head. The MLPs over tokens become B-cos as those over
    channels do: each unit of their first layer is a weighted sum of all positions of one channel."""

    name = "timm_mixer"
    title = "timm MLP-Mixer"
    example_options = {"mean": 0.5, "std": 0.5}
    example_size = (16, 16)
    converts = "patch embedding, both kinds of MLPs, LayerNorms, GELUs; the head on every token, before their mean"
    keeps = "nothing but reshapes"

    def example(self) -> nn.Module:
        from timm.models.mlp_mixer import MlpMixer  # create_model takes no width

        return MlpMixer(num_classes=5, img_size=16, patch_size=4, num_blocks=2, embed_dim=12)
