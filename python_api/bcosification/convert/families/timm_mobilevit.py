"""timm's MobileViT blocks, V1 and V2, which its ByobNets are built of."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.rules import Options, rule
from bcosification.convert.timm_layers import KNOWN_FORWARDS, convert_children, held

_BLOCKS = ("LinearTransformerBlock", "MobileVitBlock", "MobileVitV2Block")
KNOWN_FORWARDS |= {f"timm.models.mobilevit.{name}" for name in _BLOCKS}


class HeldContextAttention(ChangedForward):
    """LinearSelfAttention, y = out_proj(relu(v) · context), with a context, made of q and k, that explanations hold."""

    def forward(self, x: Tensor, x_prev: Tensor | None = None) -> Tensor:
        if x_prev is not None:
            raise NotImplementedError("bcosify: expected LinearSelfAttention without x_prev (cross-attention), got one")
        query, key, value = self.qkv_proj(x).split([1, self.embed_dim, self.embed_dim], dim=1)
        shares = self.attn_drop(F.softmax(query, dim=-1))
        context = self.context((key * shares).sum(-1, keepdim=True))
        return self.out_drop(self.out_proj(F.relu(value) * context))


@rule("timm.models.mobilevit.LinearSelfAttention")
def linear_self_attention(layer: nn.Module, options: Options) -> nn.Module:
    """LinearSelfAttention: qkv_proj stays linear, the vector made of q and k is held, out_proj becomes B-cos."""
    convert_children(layer, options, keep=("qkv_proj",))
    layer.context = nn.Identity()
    held(layer, "context")
    return change_class(layer, HeldContextAttention)
