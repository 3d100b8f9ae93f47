"""timm's BEiT and BEiT V2."""

from __future__ import annotations

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import TokenFamily
from bcosification.convert.rules import FACTORS
from bcosification.convert.timm_layers import KNOWN_FORWARDS

KNOWN_FORWARDS |= {"timm.models.beit.Block"}
FACTORS["timm.models.beit.Block"] = ("gamma_1", "gamma_2")


@register("timm.models.beit.Beit")
class TimmBeit(TokenFamily):
    """patch_embed, cls_token, pos_embed or relative positions, blocks, norm, fc_norm, head."""

    name = "timm_beit"
    title = "timm BEiT (V1 and V2)"
    example_name = "beit_base_patch16_224"
    example_arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    converts = "patch embedding, MLPs, output projections, LayerNorms, GELUs; the head on every token"
    keeps = "q, k, v projections, position biases, layer scales; q and k constant"
    cannot = "be exact at B = 1 with the head before a pooling that fc_norm follows (head='keep' is)"
