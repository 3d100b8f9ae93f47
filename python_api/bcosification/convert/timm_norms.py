"""Rules for timm's norms, those with an activation behind them included (see timm_layers.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcosification import nn as bnn
from bcosification.convert import rules
from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.rules import Options, rule
from bcosification.convert.timm_layers import converted
from bcosification.nn.modes import per_sample

rule("timm.layers.norm.LayerNorm", "timm.layers.norm.LayerNormFp32")(rules.layer_norm)
rule("timm.layers.norm.LayerNorm2d", "timm.layers.norm.LayerNorm2dFp32")(rules.layer_norm2d)
rule("timm.layers.norm.GroupNorm", "timm.layers.norm.GroupNorm1")(rules.group_norm)


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

    always_divides = False
    """Whether x is divided where there is no v, too."""

    def scale(self, x: Tensor) -> Tensor:
        from timm.layers.evo_norm import group_std

        scale = self.weight.view(-1, 1, 1).to(x.dtype)
        if self.v is not None:
            scale = scale * torch.sigmoid(x * self.v.view(-1, 1, 1).to(x.dtype))
        return scale / group_std(x, self.groups, self.eps) if self.always_divides or self.v is not None else scale


class HeldEvoNorm2dS0a(HeldEvoNorm2dS0):
    """timm's EvoNorm2dS0a, which divides by the deviation without v, too."""

    always_divides = True


@rule("timm.layers.evo_norm.EvoNorm2dS0", "timm.layers.evo_norm.EvoNorm2dS0a")
def evo_norm2d_s0(layer: nn.Module, options: Options) -> nn.Module:
    """EvoNorm2dS0 and -S0a -> the same with gate and deviation constant in explanation mode."""
    return change_class(layer, HeldEvoNorm2dS0a if type(layer).__name__ == "EvoNorm2dS0a" else HeldEvoNorm2dS0)


class _InstanceRMS(bnn.ScalingGate):
    """x divided by the root mean square of its channel, which explanations hold."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def scale(self, x: Tensor) -> Tensor:
        from timm.layers.filter_response_norm import inv_instance_rms

        return inv_instance_rms(x, self.eps)


def _constant(added: Tensor, x: Tensor, gain: Tensor | None, name: str) -> Tensor:
    """A constant per channel as it is added to x (N, C, H, W), times an explanation's gain."""
    added = added.view(-1, 1, 1).to(x.dtype)
    return added if gain is None else added * per_sample(gain, x.shape[0], 4, name).to(x.dtype)


class _ThresholdedReLU(bnn.DetachableModule):
    """max(x, bias), as relu(x - bias) + bias: where it rectifies, the output is a constant, which counts as one.

    Without the bias it is a ReLU.
    """

    def __init__(self, bias: nn.Parameter) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return F.relu(x)
        bias = _constant(self.bias, x, self.constant_gain, "FilterResponseNormTlu2d")
        return F.relu(x - bias) + bias


class HeldFilterResponseNorm(ChangedForward, bnn.DetachableModule):
    """timm's FilterResponseNormTlu2d and -Act2d, y = act(x / rms · weight + bias): explanations hold the rms."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.divided(x) * self.weight.view(-1, 1, 1).to(x.dtype)
        if self.bias is not None:
            y = y + _constant(self.bias, x, self.constant_gain, "FilterResponseNorm")
        return self.act(y)


@rule(
    "timm.layers.filter_response_norm.FilterResponseNormTlu2d",
    "timm.layers.filter_response_norm.FilterResponseNormAct2d",
)
def filter_response_norm(layer: nn.Module, options: Options) -> nn.Module:
    """FilterResponseNorm -> the same with a constant scale; τ of its unit max(y, τ) becomes a bias, ``act.bias``."""
    if hasattr(layer, "act"):
        layer.act = converted(layer.act, options)
    elif layer.tau is None or options.activation == "remove":
        layer.act = nn.Identity()
    else:
        layer.act = _ThresholdedReLU(layer.tau)
    layer.divided, layer.tau = _InstanceRMS(layer.eps), None
    return change_class(layer.train(layer.training), HeldFilterResponseNorm)


@rule("timm.layers.grn.GlobalResponseNorm")
def global_response_norm(layer: nn.Module, options: Options) -> nn.Module:
    """GlobalResponseNorm -> the same with factors that are constants in explanation mode."""
    new = bnn.GlobalResponseNorm(layer.weight.shape[0], layer.eps, layer.channel_dim == -1, device="meta")
    new.register_parameter("weight", layer.weight)
    new.register_parameter("bias", layer.bias)
    return new.train(layer.training)
