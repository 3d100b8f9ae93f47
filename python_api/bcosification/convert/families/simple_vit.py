"""SimpleViT and ViT_c of bcosification.models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bcosification.convert.class_change import change_class
from bcosification.convert.families.base import Family, HeadBeforePool, register
from bcosification.convert.rules import RULES, Options, layer_norm, linear, linear_as_it_is, rule
from bcosification.models.simple_vit import Attention, SimpleViT
from bcosification.nn import DetachableModule

RULES["bcosification.models.simple_vit.Patches"] = linear_as_it_is
# What it returns is added to the tokens: a constant, which explanations count as such (linear_map.py knows the class).
RULES["bcosification.models.simple_vit.PosEmbSinCos2d"] = linear_as_it_is


class BcosAttention(DetachableModule, Attention):
    """SimpleViT's attention: q, k and v linear, q and k constant in explanation mode, the output projection B-cos."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.detach:
            q, k = q.detach(), k.detach()
        return super().attend(q, k, v)


@rule("bcosification.models.simple_vit.Attention")
def attention(layer: Attention, options: Options) -> nn.Module:
    """Attention -> the same with a B-cos output projection, constant q and k when explaining; to_qkv stays linear."""
    layer.__class__ = BcosAttention
    layer.norm = layer_norm(layer.norm, options)
    layer.to_out = linear(layer.to_out, options)
    return layer


class HeadBeforePoolSimpleViT(HeadBeforePool):
    """The classifier, its LayerNorm and its linear layer, on every token before their mean."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear_head(self.forward_tokens(images)).mean(dim=1)


@register("bcosification.models.simple_vit.SimpleViT")
class SimpleViTFamily(Family):
    """to_patch_embedding (conv_stem, patches, linear), positional_embedding, transformer, mean, linear_head.

    Without a stem the image is read by a linear layer over the pixels of a patch, channels innermost. head="keep" is
    exact at B = 1; head="before_pool" is not: the classifier's LayerNorm normalises every token, where the original
    normalises their mean.
    """

    name = "simple_vit"
    title = "SimpleViT, ViT_c (bcosification.models)"
    converts = "patches, MLPs, output projections, LayerNorms, GELUs, the convolutional stem; the head before the mean"
    keeps = "q, k, v projections; q and k constant"
    cannot = "be exact at B = 1 with the head before the mean: its LayerNorm comes first (head='keep' is)"
    preprocessing = "imagenet"

    def input_layer(self, model: nn.Module) -> str:
        has_stem = "conv_stem" in model.to_patch_embedding._modules
        return "to_patch_embedding.conv_stem.0" if has_stem else "to_patch_embedding.linear"

    def channels_innermost(self, model: nn.Module) -> bool:
        return True

    def head(self, model: nn.Module) -> str:
        return "linear_head.linear"

    def moved_head_is_convolution(self, model: nn.Module) -> bool:
        return False  # it reads tokens

    def moves_head(self, model: nn.Module) -> bool:
        return True

    def head_move_changes(self, model: nn.Module) -> str | None:
        return "the mean over tokens is taken after the classifier's LayerNorm, not before"

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        return change_class(model, HeadBeforePoolSimpleViT) if head_moves else model

    def input_size(self, model: nn.Module) -> tuple[int, int]:
        return model.image_size, model.image_size

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        return {
            "image_size": model.image_size,
            "patch_size": model.patch_size,
            "num_classes": model.linear_head.linear.out_features,
            "dim": model.dim,
            "depth": len(model.transformer),
            "heads": model.heads,
            "mlp_dim": model.mlp_dim,
            "channels": model.channels,
            "conv_stem": model.stem_channels,
        }

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        return SimpleViT(**architecture)

    def example(self) -> nn.Module:
        return SimpleViT(image_size=16, patch_size=4, num_classes=5, dim=16, depth=2, heads=2, mlp_dim=24)
