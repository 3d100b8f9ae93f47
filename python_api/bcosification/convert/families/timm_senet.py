"""timm's first SENets (legacy_*)."""

from __future__ import annotations

from torch import Tensor, nn

from bcosification import nn as bnn
from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import PooledHeadFamily, narrowed
from bcosification.convert.rules import Options, rule
from bcosification.convert.timm_layers import KNOWN_FORWARDS

_BLOCKS = ("SEBottleneck", "SEResNetBlock", "SEResNetBottleneck", "SEResNeXtBottleneck")
KNOWN_FORWARDS |= {f"timm.models.senet.{name}" for name in _BLOCKS}


class HeldSENetModule(ChangedForward, bnn.ScalingGate):
    """senet.py's SEModule with scales that are constants in explanation mode."""

    def scale(self, x: Tensor) -> Tensor:
        return self.sigmoid(self.fc2(self.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


@rule("timm.models.senet.SEModule")
def squeeze_excite(layer: nn.Module, options: Options) -> nn.Module:
    """SEModule -> the same with constant scales; the layers inside stay what they are."""
    return change_class(layer, HeldSENetModule)


@register("timm.models.senet.SENet")
class TimmSENet(PooledHeadFamily):
    """layer0 (the stem), pool0, layer1 to layer4, global_pool, last_linear."""

    name = "timm_senet"
    title = "timm SENet (legacy SE-ResNet, SE-ResNeXt)"
    example_name = "legacy_seresnext26_32x4d"
    example_size = (64, 64)
    converts = "convolutions, BatchNorms, max pooling; the classifier before the pooling"
    keeps = "ReLUs, squeeze-and-excitation, whose scales are constants"
    head_name = "last_linear"

    def example(self) -> nn.Module:
        return narrowed(super().example(), 16)
