"""Hugging Face's CLIPVisionModelWithProjection (package transformers), CLIP's ViT image tower."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bcosification import nn as bnn
from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.families.base import SIBLINGS, Family, register
from bcosification.convert.rules import NoRule, Options, gelu, linear, rule

SIBLINGS["transformers.models.clip."] = (
    "CLIP's image tower with its projection, CLIPVisionModelWithProjection (whose from_pretrained reads it from a "
    "CLIPModel's files, too, as resolve does of transformers:NAME)"
)


class ConvertedCLIPVision(ChangedForward):
    """The forward on tensors: images (N, C, H, W) -> embeddings (N, D), positions added as a parameter."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        tower = self.vision_model
        embeddings = tower.embeddings
        x = embeddings.patch_embedding(pixel_values).flatten(2).mT
        x = torch.cat([embeddings.class_embedding.expand(x.shape[0], -1, -1), x], dim=1)
        x = tower.pre_layrnorm(x + embeddings.position_embedding)
        for layer in tower.encoder.layers:
            y = layer.layer_norm1(x)
            x = x + layer.self_attn(y, y, y, need_weights=False)[0]
            x = x + layer.mlp(layer.layer_norm2(x))
        return self.visual_projection(tower.post_layernorm(x[:, 0]))


@register("transformers.models.clip.modeling_clip.CLIPVisionModelWithProjection")
class HuggingFaceCLIP(Family):
    """vision_model (embeddings, pre_layrnorm, encoder.layers, post_layernorm), visual_projection on the class token."""

    name = "huggingface_clip"
    title = "Hugging Face CLIPVisionModelWithProjection"
    converts = "patch embedding, MLPs, output projections, LayerNorms, GELUs; the projection on the class token"
    keeps = "q, k, v projections; q and k constant"
    preprocessing = "openai"
    embeds = True

    def input_layer(self, model: nn.Module) -> str:
        return "vision_model.embeddings.patch_embedding"

    def head(self, model: nn.Module) -> None:
        return None

    def moves_head(self, model: nn.Module) -> bool:
        return False

    def additive_parameters(self, model: nn.Module) -> list[str]:
        return [f"vision_model.embeddings.{name}" for name in ("class_embedding", "position_embedding")]

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        embeddings = model.vision_model.embeddings
        positions = embeddings.position_embedding.weight
        del embeddings.position_embedding
        for name, old in (("class_embedding", embeddings.class_embedding[None]), ("position_embedding", positions)):
            setattr(embeddings, name, nn.Parameter(old.detach()[None], requires_grad=old.requires_grad))
        return change_class(model, ConvertedCLIPVision)

    def output(self, value: Any) -> torch.Tensor:
        return value.image_embeds

    def input_size(self, model: nn.Module) -> tuple[int, int]:
        return model.config.image_size, model.config.image_size

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        told = model.config.to_diff_dict()
        return {name: value for name, value in told.items() if isinstance(value, (int, float, str))
                and name not in ("transformers_version", "model_type", "dtype", "_name_or_path")}  # fmt: skip

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        return CLIPVisionModelWithProjection(CLIPVisionConfig(**architecture))

    def example(self) -> nn.Module:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return self.build({**sizes, "image_size": 32, "patch_size": 8, "projection_dim": 12})


@rule("transformers.models.clip.modeling_clip.CLIPAttention")
def clip_attention(layer: nn.Module, options: Options) -> nn.Module:
    """CLIPAttention, replaced whole: its projections packed into bnn.MultiheadAttention's."""
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    if any(projection.bias is None for projection in projections):
        raise NoRule("its q, k and v projections have no biases, which CLIP's have")
    new = bnn.MultiheadAttention(
        layer.embed_dim, layer.num_heads, dropout=layer.dropout, batch_first=True, device="meta",
        dtype=layer.out_proj.weight.dtype, b=options.b, normalize_weight=options.normalize_weight,
    )  # fmt: skip
    trained = layer.q_proj.weight.requires_grad
    for name in ("weight", "bias"):
        packed = torch.cat([getattr(projection, name).detach() for projection in projections])
        new.register_parameter(f"in_proj_{name}", nn.Parameter(packed, requires_grad=trained))
    new.out_proj = linear(layer.out_proj, options)
    return new.train(layer.training)


@rule("transformers.activations.QuickGELUActivation")
def quick_gelu_activation(layer: nn.Module, options: Options) -> nn.Module:
    """Hugging Face's QuickGELU -> x times a gate that is a constant in explanation mode, or nothing."""
    new = nn.Identity() if options.activation == "remove" else bnn.QuickGELU()
    return new.train(layer.training)


@rule("transformers.activations.GELUActivation")
def gelu_activation(layer: nn.Module, options: Options) -> nn.Module:
    """Hugging Face's GELU -> x times a gate that is a constant in explanation mode, or nothing."""
    return gelu(nn.GELU().train(layer.training), options)
