"""torchvision's ResNet, ResNeXt and Wide ResNet (one class)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bcosification.convert.blocks import recomputes
from bcosification.convert.chains import convolution_norm_activation
from bcosification.convert.class_change import change_class
from bcosification.convert.families.base import Family, HeadBeforePool, register
from bcosification.convert.rules import Options


class HeadBeforePoolResNet(HeadBeforePool):
    """The classifier, a 1x1 convolution, before the global pooling."""

    fused_chains = (("conv1", "bn1"),)

    def _forward_impl(self, x: torch.Tensor) -> torch.Tensor:
        x = convolution_norm_activation(self.conv1, self.bn1, self.relu, x, recompute=recomputes(self))
        x = self.maxpool(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(self.avgpool(self.fc(x)), 1)


@register("torchvision.models.resnet.ResNet")
class TorchvisionResNet(Family):
    """conv1, bn1, relu, maxpool, layer1 to layer4, avgpool, fc."""

    name = "torchvision_resnet"
    title = "torchvision ResNet, ResNeXt, Wide ResNet"
    converts = "convolutions, BatchNorms, max pooling; the classifier before the pooling"
    keeps = "ReLUs"
    preprocessing = "imagenet"

    def input_layer(self, model: nn.Module) -> str:
        return "conv1"

    def head(self, model: nn.Module) -> str:
        return "fc"

    def moves_head(self, model: nn.Module) -> bool:
        return True

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        return change_class(model, HeadBeforePoolResNet) if head_moves else model

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        stages = [model.layer1, model.layer2, model.layer3, model.layer4]
        # A stage whose first block does not stride was dilated instead (replace_stride_with_dilation).
        dilated = [stage[0].stride == 1 for stage in stages[1:]]
        return {
            "block": type(model.layer1[0]).__name__,
            "layers": [len(stage) for stage in stages],
            "num_classes": model.fc.out_features,
            "groups": model.groups,
            "width_per_group": model.base_width,
            "replace_stride_with_dilation": dilated,
        }

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        from torchvision.models import resnet

        arguments = dict(architecture)
        blocks = {"BasicBlock": resnet.BasicBlock, "Bottleneck": resnet.Bottleneck}
        return resnet.ResNet(blocks[arguments.pop("block")], arguments.pop("layers"), **arguments)

    def example(self) -> nn.Module:
        from torchvision.models.resnet import Bottleneck, ResNet

        return ResNet(Bottleneck, [1, 2, 1, 1], num_classes=5, groups=2, width_per_group=16)
