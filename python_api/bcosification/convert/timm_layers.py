"""Rules for timm's layer types, and what is known of the forwards of its blocks.

timm's own forwards run, with other layers inside; where that does not suffice a mixin has the forward. In gated linear
units the gate is a constant in explanation mode. Norms are in timm_norms.py, attention in timm_attention.py, what only
one family has in that family's file.

``KNOWN_FORWARDS`` names the composite classes of timm whose forwards only call their children, add, scale by
parameters, reshape, pad and concatenate. A timm class with children that has neither a rule nor an entry there may
compute what replacing layers cannot see, so the conversion refuses it (rules.py, ``UNREAD``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bcosification import nn as bnn
from bcosification.convert import rules
from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.rules import NoRule, Options, find_rule, rule, type_name

KNOWN_FORWARDS = {
    "timm.layers.classifier.ClassifierHead",
    "timm.layers.classifier.NormMlpClassifierHead",
    "timm.layers.conv_bn_act.ConvNormAct",
    "timm.layers.hybrid_embed.HybridEmbed",
    "timm.layers.mlp.ConvMlp",
    "timm.layers.mlp.GlobalResponseNormMlp",
    "timm.layers.mixed_conv2d.MixedConv2d",
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
    "timm.models.byobnet.MobileOneBlock",
    "timm.models.byobnet.RepVggBlock",
    "timm.models.byobnet.Stem",
    "timm.models.convnext.ConvNeXtBlock",
    "timm.models.convnext.ConvNeXtStage",
    "timm.models.convnext.Downsample",
    "timm.models.eva.EvaBlock",
    "timm.models.eva.EvaBlockPostNorm",
    "timm.models.mlp_mixer.MixerBlock",
    "timm.models.resnet.BasicBlock",
    "timm.models.res2net.Bottle2neck",
    "timm.models.resnest.ResNestBottleneck",
    "timm.models.resnet.Bottleneck",
    "timm.models.resnetv2.Bottleneck",
    "timm.models.resnetv2.DownsampleAvg",
    "timm.models.resnetv2.DownsampleConv",
    "timm.models.resnetv2.PreActBasic",
    "timm.models.resnetv2.PreActBottleneck",
    "timm.models.resnetv2.ResNetStage",
    "timm.models.sknet.SelectiveKernelBasic",
    "timm.models.sknet.SelectiveKernelBottleneck",
    "timm.models.swin_transformer.PatchMerging",
    "timm.models.swin_transformer.SwinTransformerBlock",
    "timm.models.swin_transformer.SwinTransformerStage",
    "timm.models.swin_transformer_v2.PatchMerging",
    "timm.models.swin_transformer_v2.SwinTransformerV2Block",
    "timm.models.swin_transformer_v2.SwinTransformerV2Stage",
    "timm.models.swin_transformer_v2_cr.PatchEmbed",
    "timm.models.swin_transformer_v2_cr.PatchMerging",
    "timm.models.swin_transformer_v2_cr.SwinTransformerV2CrBlock",
    "timm.models.swin_transformer_v2_cr.SwinTransformerV2CrStage",
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
rules.GATED["timm.layers.activations.Tanh"] = bnn.Tanh
rule("timm.layers.activations.QuickGELU", "timm.layers.activations.Tanh")(rules.gated_activation)


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
    """A (Scaled)StdConv2d(Same) as the plain convolution that it is: its weight, standardised and scaled once.

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
    if hasattr(layer, "gain"):
        standard = standard * layer.gain.detach() * layer.scale
    new.weight = nn.Parameter(standard, requires_grad=layer.weight.requires_grad)
    new.register_parameter("bias", layer.bias)
    if getattr(layer, "same_pad", False):
        from timm.layers.conv2d_same import Conv2dSame

        new.__class__ = Conv2dSame
    return new.train(layer.training)


@rule(
    "timm.layers.std_conv.StdConv2d",
    "timm.layers.std_conv.StdConv2dSame",
    "timm.layers.std_conv.ScaledStdConv2d",
    "timm.layers.std_conv.ScaledStdConv2dSame",
)
def std_conv2d(layer: nn.Conv2d, options: Options) -> nn.Module:
    """StdConv2d -> a B-cos convolution whose weight is the standardised one."""
    return converted(unstandardized(layer), options)


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


@rule("timm.layers.global_context.GlobalContext")
def global_context(layer: nn.Module, options: Options) -> nn.Module:
    """GlobalContext: the shares of positions in the context and gates made of it are held, mlp_add becomes B-cos."""
    shares = ("conv_attn", "mlp_scale", "gate")
    convert_children(layer, options, keep=shares)
    held(layer, "conv_attn", "gate")
    layer.constant_children = tuple(name for name in shares if layer._modules.get(name) is not None)
    return layer


@rule("timm.layers.split_attn.SplitAttn")
def split_attention(layer: nn.Module, options: Options) -> nn.Module:
    """SplitAttn: the convolution of all splits becomes B-cos; the shares that they are added up with are held."""
    shares = ("fc1", "bn1", "act1", "fc2", "rsoftmax")
    convert_children(layer, options, keep=shares)
    held(layer, "rsoftmax")
    layer.constant_children = shares
    return layer


@rule("timm.layers.selective_kernel.SelectiveKernel")
def selective_kernel(layer: nn.Module, options: Options) -> nn.Module:
    """SelectiveKernel: the paths become B-cos; the shares that they are added up with are held."""
    convert_children(layer, options, keep=("attn",))
    held(layer, "attn")
    layer.constant_children = ("attn",)
    return layer


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
