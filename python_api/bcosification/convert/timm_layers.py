"""Rules for timm's layer types, and what is known of the forwards of its blocks.

Attention keeps q, k and v projections linear, as everywhere here; q and k are constants in explanation mode, and the
output projection becomes B-cos. In gated linear units the gate is such a constant. timm's own forwards run, with other
layers inside; where that does not suffice a mixin below has the forward.

``KNOWN_FORWARDS`` names the composite classes of timm whose forwards only call their children, add, scale by
parameters, reshape, pad and concatenate. A timm class with children that has neither a rule nor an entry there may
compute what replacing layers cannot see, so the conversion refuses it (rules.py, ``UNREAD``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcosification import nn as bnn
from bcosification.convert import rules
from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.rules import NoRule, Options, find_rule, rule, type_name
from bcosification.nn.modes import per_sample

KNOWN_FORWARDS = {
    "timm.layers.classifier.ClassifierHead",
    "timm.layers.classifier.NormMlpClassifierHead",
    "timm.layers.conv_bn_act.ConvNormAct",
    "timm.layers.hybrid_embed.HybridEmbed",
    "timm.layers.mlp.ConvMlp",
    "timm.layers.mlp.GlobalResponseNormMlp",
    "timm.layers.mlp.Mlp",
    "timm.layers.patch_embed.PatchEmbed",
    "timm.models._efficientnet_blocks.ConvBnAct",
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv",
    "timm.models._efficientnet_blocks.EdgeResidual",
    "timm.models._efficientnet_blocks.InvertedResidual",
    "timm.models._efficientnet_blocks.UniversalInvertedResidual",
    "timm.models._features.FeatureListNet",
    "timm.models.byobnet.BasicBlock",
    "timm.models.byobnet.BottleneckBlock",
    "timm.models.byobnet.DarkBlock",
    "timm.models.byobnet.DownsampleAvg",
    "timm.models.byobnet.EdgeBlock",
    "timm.models.byobnet.Stem",
    "timm.models.convnext.ConvNeXtBlock",
    "timm.models.convnext.ConvNeXtStage",
    "timm.models.convnext.Downsample",
    "timm.models.eva.EvaBlock",
    "timm.models.eva.EvaBlockPostNorm",
    "timm.models.mlp_mixer.MixerBlock",
    "timm.models.resnet.BasicBlock",
    "timm.models.resnet.Bottleneck",
    "timm.models.resnetv2.Bottleneck",
    "timm.models.resnetv2.DownsampleAvg",
    "timm.models.resnetv2.DownsampleConv",
    "timm.models.resnetv2.PreActBasic",
    "timm.models.resnetv2.PreActBottleneck",
    "timm.models.resnetv2.ResNetStage",
    "timm.models.swin_transformer.PatchMerging",
    "timm.models.swin_transformer.SwinTransformerBlock",
    "timm.models.swin_transformer.SwinTransformerStage",
    "timm.models.vision_transformer.Block",
    "timm.models.vision_transformer.ParallelThingsBlock",
    "timm.models.vision_transformer.ResPostBlock",
    "timm.models.vision_transformer_hybrid.ConvStem",
    "timm.models.vision_transformer_relpos.RelPosBlock",
    "timm.models.vision_transformer_relpos.ResPostRelPosBlock",
}

rules.UNREAD["timm."] = KNOWN_FORWARDS

rules.FACTORS |= {
    "timm.models.convnext.ConvNeXtBlock": ("gamma",),
    "timm.models.eva.EvaBlock": ("gamma_1", "gamma_2"),
}

rules.COMPOSITES |= {
    "timm.layers.filter_response_norm.FilterResponseNormTlu2d": "it ends in max(y, τ): where τ is larger the output is "
    "a constant that no input contributes to",
}


class Held(ChangedForward, bnn.HeldOutput):
    """`HeldOutput` for any module, by ``change_class``."""


def held(layer: nn.Module, *names: str) -> None:
    """The named children of ``layer``, where there are such, become constants of explanations, in place."""
    for name in names:
        if layer._modules.get(name) is not None:
            change_class(layer._modules[name], Held)


def converted(layer: nn.Module, options: Options) -> nn.Module:
    """A layer by its rule; a container or a block of known forward child by child. NoRule where there is no rule."""
    kind = type_name(type(layer))
    found = find_rule(layer)
    if found is not None:
        rules.check_hooks(layer, f"its {kind} ")
        return found(layer, options)
    if kind not in KNOWN_FORWARDS and not isinstance(layer, (nn.Sequential, nn.ModuleList)):
        raise NoRule(f"it holds a {kind}, for which there is no rule")
    convert_children(layer, options)
    return layer


def convert_children(layer: nn.Module, options: Options, keep: tuple[str, ...] = ()) -> None:
    """Replace the children of ``layer``, except those in ``keep``, by their rules, in place."""
    for name, child in layer._modules.items():
        if child is not None and name not in keep:
            layer._modules[name] = converted(child, options)


# --- layers with a counterpart --------------------------------------------------------------------------------------

rule("timm.layers.linear.Linear")(rules.linear)
rule("timm.layers.norm.LayerNorm", "timm.layers.norm.LayerNormFp32")(rules.layer_norm)
rule("timm.layers.norm.LayerNorm2d", "timm.layers.norm.LayerNorm2dFp32")(rules.layer_norm2d)
rule("timm.layers.norm.GroupNorm", "timm.layers.norm.GroupNorm1")(rules.group_norm)
rule(
    "timm.layers.layer_scale.LayerScale",
    "timm.layers.layer_scale.LayerScale2d",
    "timm.layers.drop.DropPath",
    "timm.layers.drop.DropBlock2d",
    "timm.layers.patch_dropout.PatchDropout",
    "timm.layers.patch_dropout.PatchDropoutWithIndices",
    "timm.layers.blur_pool.BlurPool2d",
    "timm.layers.pool2d_same.AvgPool2dSame",
    "timm.layers.adaptive_avgmax_pool.FastAdaptiveAvgPool",
    "timm.layers.pos_embed_sincos.RotaryEmbeddingCat",
    "timm.layers.pos_embed_sincos.RotaryEmbeddingDinoV3",
    "timm.layers.pos_embed_sincos.RotaryEmbeddingMixed",
)(rules.linear_as_it_is)


@rule("timm.layers.activations.GELU", "timm.layers.activations.GELUTanh")
def gelu(layer: nn.Module, options: Options) -> nn.Module:
    """timm's GELU -> torch's, by its rule."""
    approximate = "tanh" if type(layer).__name__ == "GELUTanh" else "none"
    return rules.gelu(nn.GELU(approximate).train(layer.training), options)


rules.GATED["timm.layers.activations.QuickGELU"] = bnn.QuickGELU
rule("timm.layers.activations.QuickGELU")(rules.gated_activation)


@rule("timm.layers.conv2d_same.Conv2dSame")
def conv2d_same(layer: nn.Conv2d, options: Options) -> nn.Module:
    """Conv2dSame -> BcosConv2dSame with the same weight and bias."""
    new = rules.conv2d(layer, options)
    new.__class__ = bnn.BcosConv2dSame
    return new


@rule("timm.layers.cond_conv2d.CondConv2d")
def cond_conv2d(layer: nn.Module, options: Options) -> nn.Module:
    """CondConv2d -> BcosCondConv2d of the same experts."""
    if layer.bias is not None:
        raise NoRule("its experts have biases")
    new = bnn.BcosCondConv2d(
        layer.in_channels,
        layer.out_channels,
        tuple(layer.kernel_size),
        tuple(layer.stride),
        "same" if layer.dynamic_padding else tuple(layer.padding),
        tuple(layer.dilation),
        layer.groups,
        layer.num_experts,
        device="meta",
        dtype=layer.weight.dtype,
        b=options.b,
        normalize_weight=options.normalize_weight,
    )
    new.register_parameter("weight", layer.weight)
    return new.train(layer.training)


@rule("timm.models._efficientnet_blocks.CondConvResidual")
def cond_conv_residual(layer: nn.Module, options: Options) -> nn.Module:
    """CondConvResidual: the routing, made by a layer that stays linear, is held; the rest child by child."""
    convert_children(layer, options, keep=("routing_fn",))
    held(layer, "routing_fn")
    layer.constant_children = ("routing_fn",)
    return layer


def unstandardized(layer: nn.Conv2d) -> nn.Conv2d:
    """A StdConv2d or StdConv2dSame as the plain convolution that it is: its weight, standardised once.

    Training moves the weight itself from then on, not one that is standardised at every step.
    """
    weight = layer.weight.detach()
    flat = weight.flatten(1)
    var, mean = torch.var_mean(flat, dim=1, unbiased=False, keepdim=True)
    new = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        bias=layer.bias is not None,
        device="meta",
        dtype=weight.dtype,
    )
    standard = ((flat - mean) * (var + layer.eps).rsqrt()).view_as(weight)
    new.weight = nn.Parameter(standard, requires_grad=layer.weight.requires_grad)
    new.register_parameter("bias", layer.bias)
    if getattr(layer, "same_pad", False):
        from timm.layers.conv2d_same import Conv2dSame

        new.__class__ = Conv2dSame
    return new.train(layer.training)


@rule("timm.layers.std_conv.StdConv2d", "timm.layers.std_conv.StdConv2dSame")
def std_conv2d(layer: nn.Conv2d, options: Options) -> nn.Module:
    """StdConv2d -> a B-cos convolution whose weight is the standardised one."""
    return converted(unstandardized(layer), options)


@rule("timm.layers.norm_act.BatchNormAct2d")
def batch_norm_act2d(layer: nn.Module, options: Options) -> nn.Module:
    """BatchNormAct2d -> the uncentered norm with the converted activation behind it."""
    return _with_act(layer, rules.batch_norm2d(layer, options), bnn.BatchNormAct2d, options)


@rule("timm.layers.norm_act.GroupNormAct", "timm.layers.norm_act.GroupNorm1Act")
def group_norm_act(layer: nn.Module, options: Options) -> nn.Module:
    """GroupNormAct -> GroupNorm of constant variance with the converted activation behind it."""
    return _with_act(layer, rules.group_norm(layer, options), bnn.GroupNormAct, options)


@rule("timm.layers.norm_act.LayerNormAct")
def layer_norm_act(layer: nn.Module, options: Options) -> nn.Module:
    """LayerNormAct -> LayerNorm of constant variance with the converted activation behind it."""
    return _with_act(layer, rules.layer_norm(layer, options), bnn.LayerNormAct, options)


@rule("timm.layers.norm_act.LayerNormAct2d")
def layer_norm_act2d(layer: nn.Module, options: Options) -> nn.Module:
    """LayerNormAct2d -> LayerNorm2d of constant variance with the converted activation behind it."""
    return _with_act(layer, rules.layer_norm2d(layer, options), bnn.LayerNormAct2d, options)


def _with_act(layer: nn.Module, norm: nn.Module, kind: type[nn.Module], options: Options) -> nn.Module:
    norm.__class__ = kind
    norm.drop, norm.act = converted(layer.drop, options), converted(layer.act, options)
    return norm


@rule(nn.RMSNorm, "timm.layers.norm.RmsNorm", "timm.layers.norm.RmsNorm2d")
def rms_norm(layer: nn.Module, options: Options) -> nn.Module:
    """RMSNorm, timm's RmsNorm and RmsNorm2d -> the same with a scale that is a constant in explanation mode."""
    kind = bnn.RMSNorm2d if type(layer).__name__.endswith("2d") else bnn.RMSNorm
    new = kind(layer.normalized_shape, layer.eps, layer.weight is not None, device="meta")
    new.register_parameter("weight", layer.weight)
    return new.train(layer.training)


class HeldSimpleNorm2d(ChangedForward, bnn.ScalingGate):
    """timm's SimpleNorm2d, x / std over the channels (the mean stays in x), with a scale that explanations hold."""

    def scale(self, x: Tensor) -> Tensor:
        root = (x.var(dim=1, keepdim=True) + self.eps).rsqrt()
        return root if self.weight is None else root * self.weight.view(-1, 1, 1)


@rule("timm.layers.norm.SimpleNorm2d")
def simple_norm2d(layer: nn.Module, options: Options) -> nn.Module:
    """SimpleNorm2d -> the same with a scale that is a constant in explanation mode."""
    return change_class(layer, HeldSimpleNorm2d)


class HeldEvoNorm2dS0(ChangedForward, bnn.ScaleAndShift):
    """timm's EvoNorm2dS0, x·sigmoid(v·x) / std of the group, times weight, plus bias: all but x and bias held."""

    def scale(self, x: Tensor) -> Tensor:
        weight = self.weight.view(-1, 1, 1)
        if self.v is None:
            return weight
        grouped = x.unflatten(1, (self.groups, x.shape[1] // self.groups))
        std = (grouped.var(dim=(2, 3, 4), unbiased=False, keepdim=True) + self.eps).sqrt()
        gate = torch.sigmoid(x * self.v.view(-1, 1, 1)).unflatten(1, grouped.shape[1:3])
        return (gate / std).flatten(1, 2) * weight


@rule("timm.layers.evo_norm.EvoNorm2dS0")
def evo_norm2d_s0(layer: nn.Module, options: Options) -> nn.Module:
    """EvoNorm2dS0 -> the same with gate and deviation constant in explanation mode."""
    return change_class(layer, HeldEvoNorm2dS0)


@rule("timm.layers.grn.GlobalResponseNorm")
def global_response_norm(layer: nn.Module, options: Options) -> nn.Module:
    """GlobalResponseNorm -> the same with factors that are constants in explanation mode."""
    new = bnn.GlobalResponseNorm(layer.weight.shape[0], layer.eps, layer.channel_dim == -1, device="meta")
    new.register_parameter("weight", layer.weight)
    new.register_parameter("bias", layer.bias)
    return new.train(layer.training)


# --- pooling, padding -----------------------------------------------------------------------------------------------


@rule("timm.layers.adaptive_avgmax_pool.SelectAdaptivePool2d")
def select_adaptive_pool2d(layer: nn.Module, options: Options) -> nn.Module:
    """SelectAdaptivePool2d that averages, or does nothing: kept."""
    if "max" in layer.pool_type.lower():
        raise NoRule(f"pool_type={layer.pool_type!r}: global pooling by a maximum has no counterpart")
    return layer


@rule("timm.layers.pool2d_same.MaxPool2dSame")
def max_pool2d_same(layer: nn.MaxPool2d, options: Options) -> nn.Module:
    """MaxPool2dSame -> AvgPool2dSame of the same kernel and stride; or kept."""
    if options.pool == "keep":
        return layer
    from timm.layers.pool2d_same import AvgPool2dSame

    if tuple(layer.dilation) != (1, 1):
        raise NoRule(f"dilation {layer.dilation}: average pooling has none; pool='keep' keeps it")
    new = AvgPool2dSame(layer.kernel_size, stride=layer.stride, ceil_mode=layer.ceil_mode)
    return new.train(layer.training)


@rule(nn.ConstantPad2d)
def constant_pad2d(layer: nn.ConstantPad2d, options: Options) -> nn.Module:
    """ConstantPad2d of zeros: kept."""
    if layer.value != 0:
        raise NoRule(f"it pads with {layer.value}: expected 0")
    return layer


# --- gates ----------------------------------------------------------------------------------------------------------


class HeldSqueezeExcite(ChangedForward, bnn.ScalingGate):
    """EfficientNet's SqueezeExcite with scales that are constants in explanation mode."""

    def scale(self, x: Tensor) -> Tensor:
        return self.gate(self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True)))))


class HeldSEModule(ChangedForward, bnn.ScalingGate):
    """SEModule with scales that are constants in explanation mode."""

    def scale(self, x: Tensor) -> Tensor:
        return self.gate(self.fc2(self.act(self.bn(self.fc1(_squeezed(self, x))))))


class HeldEffectiveSEModule(ChangedForward, bnn.ScalingGate):
    """EffectiveSEModule with scales that are constants in explanation mode."""

    def scale(self, x: Tensor) -> Tensor:
        return self.gate(self.fc(_squeezed(self, x)))


class HeldEcaModule(ChangedForward, bnn.ScalingGate):
    """EcaModule with scales that are constants in explanation mode."""

    def scale(self, x: Tensor) -> Tensor:
        y = self.conv(x.mean((2, 3)).unsqueeze(1))
        if self.conv2 is not None:
            y = self.conv2(self.act(y))
        return self.gate(y).view(x.shape[0], -1, 1, 1)


def _squeezed(layer: nn.Module, x: Tensor) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return 0.5 * mean + 0.5 * x.amax((2, 3), keepdim=True) if layer.add_maxpool else mean


_GATES: dict[str, type[ChangedForward]] = {
    "timm.models._efficientnet_blocks.SqueezeExcite": HeldSqueezeExcite,
    "timm.layers.squeeze_excite.SEModule": HeldSEModule,
    "timm.layers.squeeze_excite.EffectiveSEModule": HeldEffectiveSEModule,
    "timm.layers.eca.EcaModule": HeldEcaModule,
}


@rule(*_GATES)
def squeeze_excite(layer: nn.Module, options: Options) -> nn.Module:
    """Squeeze-and-excitation of all kinds -> the same with constant scales; the layers inside stay what they are."""
    return change_class(layer, _GATES[type_name(type(layer))])


@rule("timm.layers.mlp.GluMlp")
def glu_mlp(layer: nn.Module, options: Options) -> nn.Module:
    """GluMlp: fc1, which makes value and gate in one product, and fc2 become B-cos; the activated gate is held."""
    convert_children(layer, options, keep=("act",))
    held(layer, "act")
    layer.constant_children = ("act",)
    return layer


@rule("timm.layers.mlp.SwiGLU")
def swiglu(layer: nn.Module, options: Options) -> nn.Module:
    """SwiGLU: fc1_x and fc2 become B-cos; the gate, made by fc1_g, which stays linear, is held."""
    convert_children(layer, options, keep=("act", "fc1_g"))
    held(layer, "act")
    layer.constant_children = ("act", "fc1_g")
    return layer


# --- attention ------------------------------------------------------------------------------------------------------

_CONSTANT = ("q_norm", "k_norm", "q_proj", "k_proj", "q", "k", "gate", "rel_pos")
"""Children of attention layers, where there are such, that make nothing but the attention matrix or a gate."""


def _attention(layer: nn.Module, options: Options, *, linear: tuple[str, ...] = ()) -> nn.Module:
    """Attention of any kind: q and k are held where they are made, the children named in ``linear`` stay linear."""
    convert_children(layer, options, keep=(*linear, "qkv", "v_proj", "softmax", *_CONSTANT))
    if layer._modules.get("qkv") is not None:
        layer.qkv = rules.qkv_linear(layer.qkv, options)
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
    "timm.models.swin_transformer.WindowAttention",
    "timm.models.vision_transformer_relpos.RelPosAttention",
)
def attention(layer: nn.Module, options: Options) -> nn.Module:
    """Attention: q, k, v projections stay linear, q and k (and an output gate) are held, proj becomes B-cos."""
    return _attention(layer, options)


@rule("timm.models.eva.EvaAttention")
def eva_attention(layer: nn.Module, options: Options) -> nn.Module:
    """EvaAttention, as ``attention``; the biases of q and v become those of the qkv layer, k's is 0."""
    if layer.q_bias is not None:
        _give_bias(layer.qkv, torch.cat([layer.q_bias, layer.k_bias, layer.v_bias]), layer.q_bias.requires_grad)
        layer.q_bias = layer.k_bias = layer.v_bias = None
    return _attention(layer, options)


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


@rule("timm.layers.attention_pool.AttentionPoolLatent")
def attention_pool_latent(layer: nn.Module, options: Options) -> nn.Module:
    """AttentionPoolLatent: the learned query and the keys are held, kv stays linear, proj and mlp become B-cos."""
    if layer.pos_embed is not None:
        raise NoRule("it adds positions of its own to the tokens")
    return _attention(layer, options, linear=("kv",))


@rule("timm.layers.pos_embed_rel.RelPosMlp", "timm.layers.pos_embed_rel.RelPosBias")
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
