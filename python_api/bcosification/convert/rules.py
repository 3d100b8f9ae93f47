"""The table of conversion rules: one entry per layer type, from the standard layer to its B-cos counterpart.

A rule takes a layer and the options of the conversion and returns the layer that replaces it, which may be the same
one. It is called on a private copy of the model, so it takes parameters over instead of copying them. Every rule is
exact at B = 1 with biases and max pooling kept; biases are removed afterwards, by ``remove_biases``.

Keys are exact types: a subclass may compute something else, so it needs an entry of its own. Types of optional
libraries are registered under their dotted name, which needs no import::

    @rule("torchvision.ops.misc.FrozenBatchNorm2d")
    def frozen_batch_norm(layer, options): ...

A key may also name a child of a class, whose rule then comes before that of its own type: "my.Attention.qkv".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bcosification import nn as bnn
from bcosification.nn.modes import constant_modules


class NoRule(Exception):
    """Raised by a rule that cannot convert this very layer; the message says why."""


@dataclass(frozen=True)
class Options:
    """The options of ``bcosify``, in the order of its signature; see there for what each means."""

    b: float = 2.0
    bias: str = "remove"
    pool: str = "average"
    head: str = "before_pool"
    activation: str = "keep"
    normalize_weight: bool = False
    inverse: bool = True
    normalize_input: bool = True
    logit_bias: str | float | None = "auto"
    on_unknown: str = "error"


Rule = Callable[[nn.Module, Options], nn.Module]

RULES: dict[str, Rule] = {}
"""Dotted type name -> rule."""

COMPOSITES: dict[str, str] = {
    "torch.nn.modules.transformer.TransformerEncoderLayer": "its fast path reads its projections' weights directly",
    "torch.nn.modules.transformer.TransformerDecoderLayer": "it has no B-cos counterpart",
    "torch.nn.modules.transformer.TransformerEncoder": "its fast path reads its layers' weights directly",
    "torch.nn.modules.transformer.TransformerDecoder": "it has no B-cos counterpart",
    "torch.nn.modules.transformer.Transformer": "its fast path reads its layers' weights directly",
}
"""Modules with children that replacing the children one by one would break, and why."""


FACTORS: dict[str, tuple[str, ...]] = {
    "torchvision.models.convnext.CNBlock": ("layer_scale",),
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": ("relative_position_bias_table",),
}
"""Modules with children -> names of their own parameters that only multiply activations or are part of an attention
matrix: they add no constant, so they stay."""


UNREAD: dict[str, set[str]] = {}
"""Beginning of dotted type names (a library's) -> its classes with children whose forwards are known. Replacing layers
cannot see what a forward computes by itself, so other classes of these libraries are not converted unasked."""


LINEAR: set[str] = {"torch.nn.modules.linear.Linear", "timm.layers.linear.Linear"}
"""Types that are a plain linear layer, which a classifier has to be."""


def type_name(kind: type) -> str:
    """The dotted name of a class, as the tables of rules and families write it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def rule(*kinds: type | str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of one or more layer types (classes or dotted names, or children of classes)."""

    def register(function: Rule) -> Rule:
        for kind in kinds:
            RULES[kind if isinstance(kind, str) else type_name(kind)] = function
        return function

    return register


def find_rule(layer: nn.Module, place: str | None = None) -> Rule | None:
    """The rule for this layer's place ("class of its parent.name in it") or else for its exact type, or None."""
    return RULES.get(place) or RULES.get(type_name(type(layer)))


def check_hooks(layer: nn.Module, name: str = "it ") -> None:
    """NoRule for a layer with hooks, which the one that replaces it would not have."""
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        raise NoRule(f"{name}has hooks (weight_norm and spectral_norm are such), which a new layer would lose")


def _moved(old: nn.Module, new: nn.Module) -> nn.Module:
    new.train(old.training)
    return new


def _take_over(new: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Make ``parameter`` (None: nothing) the parameter ``name`` of ``new``."""
    new.register_parameter(name, parameter)


def _channels_last(weight: nn.Parameter) -> nn.Parameter:
    """The same parameter stored channels_last, which the convolutions of this package run fastest in."""
    if weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    return nn.Parameter(weight.detach().to(memory_format=torch.channels_last), requires_grad=weight.requires_grad)


@rule(nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
def linear(layer: nn.Linear, options: Options) -> nn.Module:
    """Linear -> BcosLinear with the same weight and bias."""
    new = bnn.BcosLinear(
        layer.in_features,
        layer.out_features,
        device="meta",
        dtype=layer.weight.dtype,
        b=options.b,
        normalize_weight=options.normalize_weight,
    )
    _take_over(new, "weight", layer.weight)
    _take_over(new, "bias", layer.bias)
    return _moved(layer, new)


@rule(nn.Conv2d)
def conv2d(layer: nn.Conv2d, options: Options) -> nn.Module:
    """Conv2d -> BcosConv2d with the same weight (stored channels_last) and bias."""
    new = bnn.BcosConv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.padding_mode,
        device="meta",
        dtype=layer.weight.dtype,
        b=options.b,
        normalize_weight=options.normalize_weight,
    )
    _take_over(new, "weight", _channels_last(layer.weight))
    _take_over(new, "bias", layer.bias)
    return _moved(layer, new)


@rule(nn.BatchNorm2d)
def batch_norm2d(layer: nn.BatchNorm2d, options: Options) -> nn.Module:
    """BatchNorm2d -> BatchNormUncentered2d with bias - running_mean / sqrt(running_var + eps) * weight as its bias.

    In eval mode the output is the same. running_mean is kept as a buffer and no longer used. Without affine parameters
    the new layer has no weight, and a bias only while biases are kept.
    """
    if layer.running_mean is None or layer.running_var is None:
        raise NoRule("it has no running statistics (track_running_stats=False), which its new bias is made of")
    new = bnn.BatchNormUncentered2d(
        layer.num_features, eps=layer.eps, momentum=layer.momentum, device="meta", dtype=layer.running_var.dtype
    )
    work = torch.promote_types(layer.running_var.dtype, torch.float32)
    with torch.no_grad():
        bias = -layer.running_mean.to(work) / torch.sqrt(layer.running_var.to(work) + layer.eps)
        if layer.weight is not None:
            bias = bias * layer.weight.to(work)
        if layer.bias is not None:
            bias = bias + layer.bias.to(work)
        bias = bias.to(layer.running_var.dtype if layer.bias is None else layer.bias.dtype)
    trained = layer.bias is None or layer.bias.requires_grad
    _take_over(new, "weight", layer.weight)
    _take_over(new, "bias", nn.Parameter(bias, requires_grad=trained))
    for name, buffer in layer.named_buffers(recurse=False):
        new.register_buffer(name, buffer)
    return _moved(layer, new)


@rule(nn.SyncBatchNorm)
def sync_batch_norm(layer: nn.SyncBatchNorm, options: Options) -> nn.Module:
    """SyncBatchNorm -> SyncBatchNormUncentered2d, as ``batch_norm2d``, in the same process group."""
    return bnn.SyncBatchNormUncentered2d.convert_sync_batchnorm(batch_norm2d(layer, options), layer.process_group)


@rule(nn.LayerNorm, "open_clip.transformer.LayerNorm", "open_clip.transformer.LayerNormFp32")
def layer_norm(layer: nn.LayerNorm, options: Options) -> nn.Module:
    """LayerNorm -> LayerNorm whose variance is a constant in explanation mode."""
    new = bnn.LayerNorm(layer.normalized_shape, eps=layer.eps, device="meta")
    _take_over(new, "weight", layer.weight)
    _take_over(new, "bias", layer.bias)
    return _moved(layer, new)


@rule("torchvision.models.convnext.LayerNorm2d")
def layer_norm2d(layer: nn.LayerNorm, options: Options) -> nn.Module:
    """LayerNorm2d, over the channels at every position -> the same whose variance is a constant when explaining."""
    new = bnn.LayerNorm2d(layer.normalized_shape, eps=layer.eps, device="meta")
    _take_over(new, "weight", layer.weight)
    _take_over(new, "bias", layer.bias)
    return _moved(layer, new)


@rule(nn.GroupNorm)
def group_norm(layer: nn.GroupNorm, options: Options) -> nn.Module:
    """GroupNorm -> GroupNorm whose variance is a constant in explanation mode."""
    new = bnn.GroupNorm(layer.num_groups, layer.num_channels, eps=layer.eps, device="meta")
    _take_over(new, "weight", layer.weight)
    _take_over(new, "bias", layer.bias)
    return _moved(layer, new)


@rule(nn.MultiheadAttention)
def multihead_attention(layer: nn.MultiheadAttention, options: Options) -> nn.Module:
    """MultiheadAttention, replaced whole: q, k and v projections stay linear, the output projection is a BcosLinear."""
    if layer.bias_k is not None or layer.bias_v is not None or layer.add_zero_attn:
        raise NoRule("add_bias_kv and add_zero_attn add keys and values that do not come from the image")
    new = bnn.MultiheadAttention(
        layer.embed_dim,
        layer.num_heads,
        dropout=layer.dropout,
        bias=True,
        kdim=layer.kdim,
        vdim=layer.vdim,
        batch_first=layer.batch_first,
        device="meta",
        dtype=layer.out_proj.weight.dtype,
        b=options.b,
        normalize_weight=options.normalize_weight,
    )
    for name, parameter in layer._parameters.items():
        _take_over(new, name, parameter)
    new.out_proj = linear(layer.out_proj, options)
    return _moved(layer, new)


@rule("torchvision.models.maxvit.RelativePositionalMultiHeadAttention.to_qkv")
def qkv_linear(layer: nn.Module, options: Options, *, key_bias: bool = True) -> nn.Module:
    """The joint projection of an attention to q, k, v stays linear, q and k being constants in explanation mode."""
    if type(layer) is not nn.Linear:
        raise NoRule("it projects to q, k and v: expected an nn.Linear")
    new = bnn.QKVLinear(layer.in_features, layer.out_features, device="meta", key_bias=key_bias)
    _take_over(new, "weight", layer.weight)
    _take_over(new, "bias", layer.bias)
    return _moved(layer, new)


@rule("open_clip.modified_resnet.AttentionPool2d")
def attention_pool2d(layer: nn.Module, options: Options) -> nn.Module:
    """CLIP's AttentionPool2d, replaced whole: without positional embedding and biases (of any ``bias`` option)."""
    new = bnn.AttentionPool2d(
        layer.q_proj.in_features,
        layer.num_heads,
        layer.c_proj.out_features,
        device="meta",
        dtype=layer.c_proj.weight.dtype,
        b=options.b,
        normalize_weight=options.normalize_weight,
    )
    for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
        _take_over(getattr(new, name), "weight", getattr(layer, name).weight)
    return _moved(layer, new)


@rule(nn.GELU)
def gelu(layer: nn.GELU, options: Options) -> nn.Module:
    """GELU -> x times a gate that is a constant in explanation mode, or nothing when activations are removed."""
    if options.activation == "remove":
        return _moved(layer, nn.Identity())
    return _moved(layer, bnn.GELU(approximate=layer.approximate))


GATED: dict[str, type[bnn.GatedActivation]] = {
    "torch.nn.modules.activation.SiLU": bnn.SiLU,
    "torch.nn.modules.activation.Hardswish": bnn.Hardswish,
    "torch.nn.modules.activation.Mish": bnn.Mish,
    "torch.nn.modules.activation.ReLU6": bnn.ReLU6,
    "torch.nn.modules.activation.Tanh": bnn.Tanh,
    "open_clip.transformer.QuickGELU": bnn.QuickGELU,
}
"""Activations x·g(x) without parameters -> the same with a gate that is a constant in explanation mode."""


@rule(*GATED)
def gated_activation(layer: nn.Module, options: Options) -> nn.Module:
    """SiLU, Hardswish, ReLU6, Tanh and others -> the same with a constant gate, or nothing when activations go."""
    if options.activation == "remove":
        return _moved(layer, nn.Identity())
    new = GATED[type_name(type(layer))]()
    new.inplace = getattr(layer, "inplace", False)
    return _moved(layer, new)


@rule("torchvision.ops.misc.SqueezeExcitation")
def squeeze_excitation(layer: nn.Module, options: Options) -> nn.Module:
    """SqueezeExcitation -> the same with scales that are constants in explanation mode; its layers stay what they are.

    They compute the scale and are no part of the linear map, so they stay plain, with their biases and activations.
    """
    new = bnn.SqueezeExcitation(1, 1)
    for name in new._modules:
        setattr(new, name, getattr(layer, name))
    return _moved(layer, new)


@rule(nn.ReLU, nn.LeakyReLU, nn.PReLU)
def piecewise_linear(layer: nn.Module, options: Options) -> nn.Module:
    """ReLU stays (its gate is a constant to autograd anyway), or goes when activations are removed."""
    return _moved(layer, nn.Identity()) if options.activation == "remove" else layer


@rule(nn.MaxPool2d)
def max_pool2d(layer: nn.MaxPool2d, options: Options) -> nn.Module:
    """MaxPool2d -> AvgPool2d of the same kernel, stride, padding and ceil_mode, padding counted; or kept."""
    if options.pool == "keep":
        return layer
    if layer.dilation not in (1, (1, 1)):
        raise NoRule(f"dilation {layer.dilation}: average pooling has none; pool='keep' keeps it")
    if layer.return_indices:
        raise NoRule("return_indices=True: average pooling has no indices; pool='keep' keeps it")
    return _moved(
        layer, nn.AvgPool2d(layer.kernel_size, stride=layer.stride, padding=layer.padding, ceil_mode=layer.ceil_mode)
    )


@rule(
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
    nn.Unflatten,
    nn.ZeroPad2d,
    nn.ReflectionPad2d,
    nn.ReplicationPad2d,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    "torchvision.ops.stochastic_depth.StochasticDepth",
    "torchvision.ops.misc.Permute",
    "torchvision.models.maxvit.SwapAxes",
    "torchvision.models.maxvit.WindowPartition",
    "torchvision.models.maxvit.WindowDepartition",
    "open_clip.transformer.LayerScale",
    "open_clip.transformer.PatchDropout",
)
def linear_as_it_is(layer: nn.Module, options: Options) -> nn.Module:
    """Already linear, without constant, in eval mode: kept."""
    return layer


@rule(bnn.Normalize)
def normalize(layer: bnn.Normalize, options: Options) -> nn.Module:
    """Ours already (families put it where a network normalises its input once more): kept."""
    return layer


def as_convolution(layer: nn.Linear, kernel: tuple[int, int] = (1, 1)) -> nn.Conv2d:
    """The convolution that computes at every position what ``layer`` computes of flattened (C, *kernel) values.

    Not a copy: it takes the parameters over.
    """
    weight = layer.weight.detach().unflatten(1, (-1, *kernel))
    convolution = nn.Conv2d(
        weight.shape[1], layer.out_features, kernel, bias=layer.bias is not None, device="meta", dtype=weight.dtype
    )
    convolution.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    convolution.bias = layer.bias
    return convolution.train(layer.training)


def double_input_channels(layer: nn.Module, *, innermost: int | None = None) -> None:
    """Make a layer on C channels one on 2C: [W, -W] / 2, which on [z, -z] gives W z.

    With the image encoded as [x, 1 - x] and normalised by (mean, 1 - mean) and (std, std), the second half is the
    negative of the first, zero padding included. ``layer`` is a Conv2d, or a Linear on pixels with channels outermost,
    or with ``innermost`` channels innermost: then every pixel's weights are paired. It is changed in place.
    """
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1:
            raise NoRule(f"the first convolution has {layer.groups} groups: expected 1 to double its input channels")
        layer.in_channels *= 2
    else:
        layer.in_features *= 2
    weight = layer.weight.detach()
    if innermost is not None and isinstance(layer, nn.Linear):
        weight = weight.unflatten(1, (-1, innermost))
        doubled = torch.cat([weight, -weight], dim=2).flatten(1) / 2
    else:
        doubled = torch.cat([weight, -weight], dim=1) / 2
    layer.weight = nn.Parameter(doubled, requires_grad=layer.weight.requires_grad)


def biases(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every bias that adds to what a layer of ``model`` returns, by its name; not those inside gates."""
    found = {}
    inside_gates = constant_modules(model)
    for prefix, module in model.named_modules():
        for name in ("bias", "in_proj_bias"):
            if module._parameters.get(name) is not None and module not in inside_gates:
                found[f"{prefix}.{name}" if prefix else name] = module._parameters[name]
    return found


def remove_biases(model: nn.Module) -> list[str]:
    """Set every bias of ``biases(model)`` to None, in place; returns their names."""
    removed = list(biases(model))
    for full in removed:
        prefix, _, name = full.rpartition(".")
        model.get_submodule(prefix)._parameters[name] = None
    return removed
