"""open_clip's VisionTransformer, the image tower of CLIP's ViTs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.families.base import Family, register
from bcosification.convert.rules import Options, layer_norm, multihead_attention, rule, type_name


class ConvertedVisionTransformer(ChangedForward):
    """The forward with its projection as a layer: on the class token, or on every token before they are averaged."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)
        x = self.ln_pre(self.patch_dropout(x + self.positional_embedding.to(x.dtype)))
        x = self.transformer(x)
        x = x if self.attn_pool is None else self.attn_pool(x)
        norm_after_pool = self.final_ln_after_pool and self.attn_pool is None
        x = x if norm_after_pool else self.ln_post(x)
        if self.pool_type == "avg" and self.head_before_pool and not norm_after_pool:
            return self.proj(x[:, 1:]).mean(1)
        x = x[:, 0] if self.pool_type == "tok" else x[:, 1:].mean(1)
        return self.proj(self.ln_post(x) if norm_after_pool else x)


@register("open_clip.transformer.VisionTransformer")
class OpenClipViT(Family):
    """conv1 (the patches), class_embedding, positional_embedding, ln_pre, transformer, ln_post, proj.

    ``proj``, a bare matrix, becomes a B-cos layer on the class token; in towers that average tokens, on every token
    (head="before_pool", the same function at B = 1) or on their mean (head="keep"). CoCa's attentional pooling makes
    tokens of its own out of all tokens, of which the first takes the class token's part.
    """

    name = "open_clip_vit"
    title = "open_clip VisionTransformer (CLIP ViT, CoCa)"
    converts = "patch embedding, MLPs, output projections, LayerNorms, GELUs; the projection on the class token"
    keeps = "q, k, v projections; q and k constant, those of the attentional pooling's queries too"
    cannot = "convert two attentional poolings (parallel, cascade) and open_clip's own attention blocks"
    preprocessing = "openai"
    embeds = True

    def input_layer(self, model: nn.Module) -> str:
        return "conv1"

    def head(self, model: nn.Module) -> None:
        return None

    def moves_head(self, model: nn.Module) -> bool:
        return False

    def additive_parameters(self, model: nn.Module) -> list[str]:
        return ["class_embedding", "positional_embedding"]

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        if model.pool_type not in ("tok", "avg"):
            two = getattr(model, "attn_pool_contrastive", None) is not None
            raise ValueError(
                "bcosify: expected an open_clip VisionTransformer that takes its class token or the mean of its "
                f"tokens, got one with {'two attentional poolings' if two else 'no pooling'}"
            )
        positions = model.positional_embedding
        for name, old in (("class_embedding", model.class_embedding[None]), ("positional_embedding", positions)):
            setattr(model, name, nn.Parameter(old.detach()[None], requires_grad=old.requires_grad))
        matrix = model.proj
        del model.proj
        if matrix is None:
            model.proj = nn.Identity()
        else:
            model.proj = nn.Linear(*matrix.shape, bias=False, device="meta", dtype=matrix.dtype).train(model.training)
            weight = matrix.detach().T.contiguous()
            model.proj.weight = nn.Parameter(weight, requires_grad=matrix.requires_grad)
        model.head_before_pool = options.head == "before_pool"
        return change_class(model, ConvertedVisionTransformer)

    def output(self, value: Any) -> torch.Tensor:
        return value[0] if isinstance(value, tuple) else value  # CoCa's tower gives its tokens besides

    def input_size(self, model: nn.Module) -> tuple[int, int]:
        return tuple(model.image_size)

    def architecture(self, model: nn.Module) -> dict[str, Any] | None:
        blocks = model.transformer.resblocks
        first = blocks[0]
        scaled = type_name(type(first.ls_1)) == "open_clip.transformer.LayerScale"
        pooler = model.attn_pool
        pooling = {} if pooler is None else {
            "attentional_pool": True,
            "attn_pooler_queries": pooler.query.shape[0],
            "attn_pooler_heads": pooler.attn.num_heads,
        }  # fmt: skip
        return {
            **pooling,
            "output_tokens": model.output_tokens,
            "image_size": list(model.image_size),
            "patch_size": list(model.patch_size),
            "width": model.conv1.out_channels,
            "layers": len(blocks),
            "heads": first.attn.num_heads,
            "mlp_ratio": first.mlp.c_fc.out_features / model.conv1.out_channels,
            "ls_init_value": 1.0 if scaled else None,
            "output_dim": model.output_dim,
            "patch_dropout": getattr(model.patch_dropout, "prob", 0.0),
            "no_ln_pre": isinstance(model.ln_pre, nn.Identity),
            "pool_type": model.pool_type,
            "final_ln_after_pool": model.final_ln_after_pool,
            "activation": type_name(type(first.mlp.gelu)),
            "norm": type_name(type(model.ln_post)),
            "norm_eps": model.ln_post.eps,
        }

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        from open_clip.transformer import VisionTransformer

        arguments = dict(architecture)
        activation, norm = (_layers()[arguments.pop(name)] for name in ("activation", "norm"))
        eps = arguments.pop("norm_eps")
        for name in ("image_size", "patch_size"):
            arguments[name] = tuple(arguments[name])
        return VisionTransformer(act_layer=activation, norm_layer=partial(norm, eps=eps), **arguments)

    def example(self) -> nn.Module:
        from open_clip.transformer import QuickGELU, VisionTransformer

        return VisionTransformer(
            32, 8, 16, 2, 2, 2.0, attentional_pool=True, attn_pooler_queries=3, attn_pooler_heads=2, output_dim=12,
            act_layer=QuickGELU, output_tokens=True,
        )  # fmt: skip


@rule("open_clip.transformer.AttentionalPooler")
def attentional_pooler(layer: nn.Module, options: Options) -> nn.Module:
    """AttentionalPooler: learnt queries, which are no part of W(x), ask all tokens; the attention as everywhere."""
    layer.attn, layer.ln_k = multihead_attention(layer.attn, options), layer_norm(layer.ln_k, options)
    layer.constant_children = ("ln_q",)
    return layer


def _layers() -> dict[str, type[nn.Module]]:
    """Activations and norms that a tower can be built with."""
    from open_clip.transformer import LayerNorm, LayerNormFp32, QuickGELU

    return {type_name(kind): kind for kind in (nn.GELU, QuickGELU, LayerNorm, LayerNormFp32)}
