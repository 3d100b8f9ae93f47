"""timm's CaiT."""

from __future__ import annotations

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import TokenFamily
from bcosification.convert.rules import FACTORS
from bcosification.convert.timm_layers import KNOWN_FORWARDS

for _block in ("LayerScaleBlock", "LayerScaleBlockClassAttn"):
    KNOWN_FORWARDS.add(f"timm.models.cait.{_block}")
    FACTORS[f"timm.models.cait.{_block}"] = ("gamma_1", "gamma_2")


@register("timm.models.cait.Cait")
class TimmCait(TokenFamily):
    """patch_embed, pos_embed, blocks (with talking heads), blocks_token_only (only the class token attends), head."""

    name = "timm_cait"
    title = "timm CaiT"
    example_name = "cait_xxs24_224"
    example_arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    converts = "patch embedding, MLPs, output projections, LayerNorms, GELUs; the head on the class token"
    keeps = "q, k, v projections, those between heads, layer scales; q, k and attention constant"
