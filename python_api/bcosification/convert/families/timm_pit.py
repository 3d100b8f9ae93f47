"""timm's PiT."""

from __future__ import annotations

from torch import nn

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import TokenFamily
from bcosification.convert.timm_layers import KNOWN_FORWARDS

KNOWN_FORWARDS |= {f"timm.models.pit.{name}" for name in ("ConvEmbedding", "Pooling", "SequentialTuple", "Transformer")}


@register("timm.models.pit.PoolingVisionTransformer")
class TimmPit(TokenFamily):
    """patch_embed, pos_embed (a map), cls_token (one or two), transformers with pooling between them, norm, head."""

    name = "timm_pit"
    title = "timm PiT"
    example_name = "pit_ti_distilled_224"
    example_arguments = {"img_size": 32, "patch_size": 8, "stride": 4, "base_dims": [8, 8, 8], "depth": [1, 1, 1],
                         "heads": [1, 2, 4]}  # fmt: skip
    converts = "patch embedding, pooling, MLPs, output projections, LayerNorms, GELUs; the heads on their tokens"
    keeps = "q, k, v projections; q and k constant"
    cannot = "train both heads apart (distilled_training)"

    def moves_head(self, model: nn.Module) -> bool:
        return False

    def other_heads(self, model: nn.Module) -> list[str]:
        return ["head_dist"] if isinstance(model.head_dist, nn.Linear) else []
