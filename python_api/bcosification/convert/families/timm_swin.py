"""timm's Swin Transformer."""

from __future__ import annotations

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import ClassifierHeadFamily


@register("timm.models.swin_transformer.SwinTransformer")
class TimmSwin(ClassifierHeadFamily):
    """patch_embed, layers of blocks on (N, H, W, C) with shifted windows, norm, a ClassifierHead (channels last)."""

    name = "timm_swin"
    title = "timm Swin Transformer"
    example_name = "swin_tiny_patch4_window7_224"
    example_arguments = {
        "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2),
    }  # fmt: skip
    converts = "patch embedding and merging, MLPs, output projections, LayerNorms, GELUs; the head before the mean"
    keeps = "q, k, v projections, position biases; q and k constant"
    cannot = "convert Swin V2 (cosine attention)"
