"""timm's MobileViT blocks, V1 and V2, which its ByobNets are built of."""

from __future__ import annotations

from torch import nn

from bcosification.convert.rules import Options, rule
from bcosification.convert.timm_attention import hold_channels
from bcosification.convert.timm_layers import KNOWN_FORWARDS, convert_children

_BLOCKS = ("LinearTransformerBlock", "MobileVitBlock", "MobileVitV2Block")
KNOWN_FORWARDS |= {f"timm.models.mobilevit.{name}" for name in _BLOCKS}


@rule("timm.models.mobilevit.LinearSelfAttention")
def linear_self_attention(layer: nn.Module, options: Options) -> nn.Module:
    """LinearSelfAttention, which scales rectified values by a vector made of keys: q and k are held, qkv stays linear,
    out_proj becomes B-cos."""
    convert_children(layer, options, keep=("qkv_proj",))
    hold_channels(layer.qkv_proj, 1 + layer.embed_dim)
    return layer
