"""timm's Vision Transformers (ViT, DeiT, SigLIP, DINO, hybrids), those with rotary and with relative positions."""

from __future__ import annotations

from torch import nn

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import TokenFamily

_CONVERTS = "patch embedding, MLPs, output projections, LayerNorms, GELUs; the head on the class token or every token"
_KEEPS = "q, k, v projections, gates of SwiGLU, layer scales; q, k and gates constant"
_CANNOT = "be exact at B = 1 with the head before a pooling that fc_norm follows (head='keep' is)"
_SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


@register("timm.models.vision_transformer.VisionTransformer")
class TimmViT(TokenFamily):
    """patch_embed (convolution or hybrid), cls_token, reg_token, pos_embed, blocks, norm, attn_pool, fc_norm, head."""

    name = "timm_vit"
    title = "timm Vision Transformer (ViT, DeiT, SigLIP, DINOv2, hybrids)"
    example_name = "vit_tiny_patch16_224"
    example_arguments = _SMALL
    converts, keeps, cannot = _CONVERTS, _KEEPS, _CANNOT


@register("timm.models.deit.VisionTransformerDistilled")
class TimmDistilledViT(TokenFamily):
    """As ViT, with a distillation token and its head; the logits are the mean of both heads'."""

    name = "timm_deit_distilled"
    title = "timm DeiT with distillation token"
    example_name = "deit_tiny_distilled_patch16_224"
    example_arguments = _SMALL
    converts, keeps = "as Vision Transformers; both heads, on their tokens", _KEEPS
    cannot = "train both heads apart (distilled_training)"

    def moves_head(self, model: nn.Module) -> bool:
        return False

    def other_heads(self, model: nn.Module) -> list[str]:
        return ["head_dist"] if isinstance(model.head_dist, nn.Linear) else []


@register("timm.models.eva.Eva")
class TimmEva(TokenFamily):
    """As ViT, with rotary positions, which turn q and k only."""

    name = "timm_eva"
    title = "timm EVA (ViTs with rotary positions, DINOv3)"
    example_name = "vit_small_patch16_dinov3_qkvb"
    example_arguments = {**_SMALL, "num_heads": 1}
    converts, keeps, cannot = _CONVERTS, _KEEPS, _CANNOT


@register("timm.models.vision_transformer_relpos.VisionTransformerRelPos")
class TimmRelativeViT(TokenFamily):
    """As ViT, with relative positions, which are a bias of the attention matrix only."""

    name = "timm_vit_relpos"
    title = "timm Vision Transformer with relative positions"
    example_name = "vit_relpos_small_patch16_224"
    example_arguments = {**_SMALL, "rel_pos_dim": 8}
    converts, keeps, cannot = _CONVERTS, f"{_KEEPS}; the networks of the position bias", _CANNOT
