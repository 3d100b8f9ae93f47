"""Rules for timm's attention layers (see timm_layers.py).

Projections to q, k and v stay linear, as everywhere here; q and k are constants in explanation mode, and with them the
attention matrix, whatever is computed from them; the output projection becomes B-cos.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcosification import nn as bnn
from bcosification.convert import rules
from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.rules import NoRule, Options, rule
from bcosification.convert.timm_layers import convert_children, converted, held
from bcosification.nn.modes import per_sample


class HeldChannels2d(ChangedForward, bnn.DetachableModule):
    """A convolution whose first ``held_channels`` outputs (queries, keys) are constants in explanation mode."""

    held_channels: int

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.constant_gain is not None and self.bias is not None:
            gain = per_sample(self.constant_gain, x.shape[0], 4, "attention") - 1
            y = y + (self.bias.view(-1, 1, 1) * gain).to(y.dtype)
        return torch.cat([y[:, : self.held_channels].detach(), y[:, self.held_channels :]], 1) if self.detach else y


def hold_channels(conv: nn.Conv2d, count: int) -> None:
    """The first ``count`` outputs of a convolution become constants of explanations, in place; it stays plain."""
    change_class(conv, HeldChannels2d).held_channels = count


_CONSTANT = (
    "q_norm", "k_norm", "q_proj", "k_proj", "q", "k", "gate", "rel_pos", "cpb_mlp", "meta_mlp", "proj_l", "proj_w",
)  # fmt: skip
"""Children of attention layers, where there are such, that make nothing but the attention matrix or a gate."""


def _attention(layer: nn.Module, options: Options, *, linear: tuple[str, ...] = (), key_bias: bool = True) -> nn.Module:
    """Attention of any kind: q and k are held where they are made, the children named in ``linear`` stay linear."""
    convert_children(layer, options, keep=(*linear, "qkv", "v_proj", "softmax", *_CONSTANT))
    if layer._modules.get("qkv") is not None:
        layer.qkv = rules.qkv_linear(layer.qkv, options, key_bias=key_bias)
    elif not linear:
        held(layer, "q_proj", "k_proj", "q", "k")
    else:  # q and k come out of a projection with something else, and go through these
        held(layer, "q_norm", "k_norm")
    held(layer, "gate")
    if layer._modules.get("rel_pos") is not None:
        layer.rel_pos = converted(layer.rel_pos, options)
    layer.constant_children = tuple(name for name in _CONSTANT if layer._modules.get(name) is not None)
    return layer


@rule(
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.layers.diff_attention.DiffAttention",
    "timm.models.cait.TalkingHeadAttn",
    "timm.models.edgenext.CrossCovarianceAttn",
    "timm.models.metaformer.Attention",
    "timm.models.swin_transformer.WindowAttention",
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention",
    "timm.models.vision_transformer_relpos.RelPosAttention",
)
def attention(layer: nn.Module, options: Options) -> nn.Module:
    """Attention: q, k, v projections stay linear, q and k (and an output gate) are held, proj becomes B-cos."""
    return _attention(layer, options)


@rule(
    "timm.models.beit.Attention",
    "timm.models.eva.EvaAttention",
    "timm.models.swin_transformer_v2.WindowAttention",
)
def attention_without_key_bias(layer: nn.Module, options: Options) -> nn.Module:
    """Attention with biases of q and v apart, as ``attention``: they become those of the qkv layer, k's stays 0."""
    separate = layer.q_bias is not None
    if separate:
        _give_bias(layer.qkv, torch.cat([layer.q_bias, layer.k_bias, layer.v_bias]), layer.q_bias.requires_grad)
        layer.q_bias = layer.k_bias = layer.v_bias = None
    return _attention(layer, options, key_bias=not separate)


def _give_bias(linear: nn.Linear, bias: Tensor, trained: bool) -> None:
    linear.bias = nn.Parameter(bias.detach().to(linear.weight.dtype), requires_grad=trained)


@rule(
    "timm.models.vision_transformer.ParallelScalingBlock",
    "timm.models.vision_transformer.DiffParallelScalingBlock",
)
def parallel_scaling_block(layer: nn.Module, options: Options) -> nn.Module:
    """ParallelScalingBlock: in_proj, which makes q, k, v and the MLP's hidden features, stays linear; the rest as ever.

    ``mlp_bias`` becomes the part of in_proj's bias that it is.
    """
    if layer.mlp_bias is not None:
        linear = layer.in_proj
        rest = layer.mlp_bias.new_zeros(linear.out_features - layer.mlp_bias.numel())
        _give_bias(linear, torch.cat([layer.mlp_bias, rest]), layer.mlp_bias.requires_grad)
        layer.mlp_bias = None
    return _attention(layer, options, linear=("in_proj",))


@rule("timm.models.cait.ClassAttn")
def class_attention(layer: nn.Module, options: Options) -> nn.Module:
    """ClassAttn: q, of the class token, and k are held, v stays linear, proj becomes B-cos."""
    convert_children(layer, options, keep=("q", "k", "v"))
    held(layer, "q", "k")
    layer.constant_children = ("q", "k")
    return layer


@rule("timm.layers.attention_pool.AttentionPoolLatent")
def attention_pool_latent(layer: nn.Module, options: Options) -> nn.Module:
    """AttentionPoolLatent: the learned query and the keys are held, kv stays linear, proj and mlp become B-cos."""
    if layer.pos_embed is not None:
        raise NoRule("it adds positions of its own to the tokens")
    return _attention(layer, options, linear=("kv",))


@rule(
    "timm.layers.pos_embed_rel.RelPosMlp",
    "timm.layers.pos_embed_rel.RelPosBias",
    "timm.layers.pos_embed_rel.RelPosBiasTf",
    "timm.models.beit.RelativePositionBias",
)
def relative_position(layer: nn.Module, options: Options) -> nn.Module:
    """Position bias of the attention matrix: made of the positions alone, so it is no part of an explanation; kept."""
    layer.constant_children = tuple(layer._modules)
    return layer


class GainedAttentionPool2d(ChangedForward, bnn.DetachableModule):
    """AttentionPool2d whose positions (and class token) count as the constants that they are."""

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        from timm.layers.pos_embed import resample_abs_pos_embed

        n, _, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        positions = resample_abs_pos_embed(
            self.pos_embed.unsqueeze(0), (height, width), old_size=self.feat_size, num_prefix_tokens=1
        )
        first = tokens.mean(1, keepdim=True)
        if self.cls_token is not None:
            first = self._constant(self.cls_token.unsqueeze(0), n).expand(n, -1, -1)
        tokens = torch.cat([first, tokens], dim=1) + self._constant(positions, n)
        parts = (self.q, self.k, self.v)
        qkv = [part(tokens) for part in parts] if self.qkv is None else self.qkv(tokens).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in qkv)
        heads = F.scaled_dot_product_attention(q, k, v)
        tokens = self.drop(heads.transpose(1, 2).flatten(2))
        return self._pool(tokens if pre_logits else self.proj(tokens), height, width)

    def _constant(self, added: Tensor, n: int) -> Tensor:
        if self.constant_gain is None:
            return added
        return added * per_sample(self.constant_gain, n, 3, "AttentionPool2d").to(added.dtype)


@rule("timm.layers.attention_pool2d.AttentionPool2d")
def attention_pool2d(layer: nn.Module, options: Options) -> nn.Module:
    """AttentionPool2d: q, k, v projections stay linear, q and k are held, proj (the classifier) becomes B-cos."""
    convert_children(layer, options, keep=("q", "k", "v", "qkv"))
    if layer.qkv is not None:
        layer.qkv = rules.qkv_linear(layer.qkv, options)
    held(layer, "q", "k")
    layer.constant_children = tuple(name for name in ("q", "k") if layer._modules.get(name) is not None)
    return change_class(layer, GainedAttentionPool2d)
