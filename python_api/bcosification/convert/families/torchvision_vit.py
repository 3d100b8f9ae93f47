"""torchvision's VisionTransformer: a class token, so the head stays on the token."""

from __future__ import annotations

from typing import Any

from torch import nn

from bcosification.convert.families.base import Family, register


@register("torchvision.models.vision_transformer.VisionTransformer")
class TorchvisionViT(Family):
    """conv_proj, class_token, encoder (pos_embedding, layers, ln), heads.head."""

    name = "torchvision_vit"
    title = "torchvision Vision Transformer"
    converts = "patch embedding, MLPs, output projections, LayerNorms, GELUs; the head on the class token"
    keeps = "q, k, v projections; q and k constant"
    cannot = "build a model with a convolutional stem from its description (load needs model=)"
    preprocessing = "imagenet"

    def input_layer(self, model: nn.Module) -> str | None:
        if isinstance(model.conv_proj, nn.Conv2d):
            return "conv_proj"
        stem = [name for name, module in model.conv_proj.named_modules() if isinstance(module, nn.Conv2d)]
        return f"conv_proj.{stem[0]}"

    def head(self, model: nn.Module) -> str:
        return "heads.head"

    def moves_head(self, model: nn.Module) -> bool:
        return False

    def additive_parameters(self, model: nn.Module) -> list[str]:
        return ["class_token", "encoder.pos_embedding"]

    def input_size(self, model: nn.Module) -> tuple[int, int]:
        return model.image_size, model.image_size

    def architecture(self, model: nn.Module) -> dict[str, Any] | None:
        if not isinstance(model.conv_proj, nn.Conv2d):
            return None
        attention = model.encoder.layers[0].self_attention
        return {
            "image_size": model.image_size,
            "patch_size": model.patch_size,
            "num_layers": len(model.encoder.layers),
            "num_heads": attention.num_heads,
            "hidden_dim": model.hidden_dim,
            "mlp_dim": model.mlp_dim,
            "dropout": model.dropout,
            "attention_dropout": model.attention_dropout,
            "num_classes": model.heads.head.out_features,
            "representation_size": model.representation_size,
        }

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        from torchvision.models.vision_transformer import VisionTransformer

        return VisionTransformer(**architecture)

    def example(self) -> nn.Module:
        from torchvision.models.vision_transformer import VisionTransformer

        return VisionTransformer(16, 4, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=24, num_classes=5)
