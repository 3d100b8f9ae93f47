"""timm's networks without norms: NFNet, NF-RegNet, NF-ResNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bcosification import nn as bnn
from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import ClassifierHeadFamily
from bcosification.convert.rules import FACTORS, NoRule, Options, rule
from bcosification.convert.timm_layers import KNOWN_FORWARDS

KNOWN_FORWARDS |= {"timm.models.nfnet.DownsampleAvg", "timm.models.nfnet.NormFreeBlock"}
FACTORS["timm.models.nfnet.NormFreeBlock"] = ("skipinit_gain",)

_GATES = {
    "silu": torch.sigmoid,
    "gelu": lambda x: 0.5 * (1 + torch.erf(x * 0.5**0.5)),
    "relu": lambda x: (x > 0).to(x.dtype),
}
"""Name of torch's function x·g(x) -> g."""


class HeldGammaAct(ChangedForward, bnn.ScalingGate):
    """GammaAct, an activation x·g(x) times a number, with a gate that is a constant in explanation mode."""

    def scale(self, x: Tensor) -> Tensor:
        return _GATES[self.act_fn.__name__](x) * self.gamma


@rule("timm.models.nfnet.GammaAct")
def gamma_act(layer: nn.Module, options: Options) -> nn.Module:
    """GammaAct -> the same with a constant gate; where activations go, the number goes with it."""
    if layer.act_fn.__name__ not in _GATES:
        raise NoRule(f"its activation is {layer.act_fn.__name__}: expected one of {', '.join(_GATES)}")
    if options.activation == "remove":
        return nn.Identity().train(layer.training)
    return change_class(layer, HeldGammaAct)


@register("timm.models.nfnet.NormFreeNet")
class TimmNFNet(ClassifierHeadFamily):
    """stem, stages of blocks that scale their branches by fixed numbers, final_conv, final_act, a ClassifierHead."""

    name = "timm_nfnet"
    title = "timm NFNet, NF-RegNet, NF-ResNet"
    example_options = {"mean": 0.5, "std": 0.25}
    example_size = (64, 64)
    converts = (
        "convolutions (of weights standardised once), activations, max pooling; the head before the pooling"
    )
    keeps = "channel attention, whose scales are constants; gains and the numbers that scale branches"
    cannot = "keep standardising weights (they are standardised once)"

    def example(self) -> nn.Module:
        from timm.models.nfnet import NfCfg, NormFreeNet  # create_model takes no configuration

        config = NfCfg(
            depths=(1, 1, 1, 1), channels=(16, 16, 24, 24), stem_type="deep_quad", stem_chs=16, group_size=8,
            bottle_ratio=0.5, extra_conv=True, num_features=32, act_layer="silu", gamma_in_act=True, skipinit=True,
            attn_layer="eca", attn_kwargs={},
        )  # fmt: skip
        model = NormFreeNet(config, num_classes=5)
        for module in model.modules():
            if getattr(module, "skipinit_gain", None) is not None:
                nn.init.ones_(module.skipinit_gain)
            if isinstance(module, nn.Conv2d) and hasattr(module, "gain"):  # as `enlarged` makes weights
                nn.init.constant_(module.gain, module.weight[0].numel() ** 0.25)
        return model
