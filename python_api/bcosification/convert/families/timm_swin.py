"""timm's Swin Transformers: V1, V2, and V2 as Christoph Reich wrote it ("cr")."""

from __future__ import annotations

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import ClassifierHeadFamily

_CONVERTS = "patch embedding and merging, MLPs, output projections, LayerNorms, GELUs; the head before the mean"
_SMALL = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2)}


@register("timm.models.swin_transformer.SwinTransformer")
class TimmSwin(ClassifierHeadFamily):
    """patch_embed, layers of blocks on (N, H, W, C) with shifted windows, norm, a ClassifierHead (channels last)."""

    name = "timm_swin"
    title = "timm Swin Transformer"
    example_name = "swin_tiny_patch4_window7_224"
    example_arguments = _SMALL
    converts = _CONVERTS
    keeps = "q, k, v projections, position biases; q and k constant"


@register("timm.models.swin_transformer_v2.SwinTransformerV2")
class TimmSwinV2(ClassifierHeadFamily):
    """As Swin, with norms behind attention and MLP, cosines with a learnt scale for the attention, and position biases
    that a small network makes of distances; both are part of the attention matrix alone."""

    name = "timm_swin_v2"
    title = "timm Swin Transformer V2"
    example_name = "swinv2_tiny_window8_256"
    example_arguments = _SMALL
    converts = _CONVERTS
    keeps = "q, k, v projections, the networks of the position bias; q and k constant"


@register("timm.models.swin_transformer_v2_cr.SwinTransformerV2Cr")
class TimmSwinV2Cr(ClassifierHeadFamily):
    """As Swin V2, on (N, C, H, W) between stages, with further norms on the main branch."""

    name = "timm_swin_v2_cr"
    title = "timm Swin Transformer V2 (cr)"
    example_name = "swinv2_cr_tiny_ns_224"
    example_arguments = _SMALL
    converts = _CONVERTS
    keeps = "q, k, v projections, the networks of the position bias; q and k constant"
