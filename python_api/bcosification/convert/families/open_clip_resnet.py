"""open_clip's ModifiedResNet, the image tower of CLIP's RN50 and RN101."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from bcosification.convert.families.base import Family, register
from bcosification.convert.rules import Options


@register("open_clip.modified_resnet.ModifiedResNet")
class OpenClipResNet(Family):
    """A stem of three convolutions, layer1 to layer4 of bottlenecks that stride by average pooling, attnpool.

    The attention pooling loses its positional embedding and its biases, whatever becomes of the other layers' biases:
    the converted tower takes images of any size from 32 pixels on.
    """

    name = "open_clip_resnet"
    title = "open_clip ModifiedResNet (CLIP RN50, RN101)"
    converts = "convolutions, BatchNorms; the attention pooling, as \"pool\" or \"unpool\""
    keeps = "ReLUs, average pooling, q, k, v projections; q and k constant"
    cannot = "keep the attention pooling's positional embedding and biases"
    preprocessing = "openai"
    embeds = True

    def input_layer(self, model: nn.Module) -> str:
        return "conv1"

    def head(self, model: nn.Module) -> None:
        return None

    def moves_head(self, model: nn.Module) -> bool:
        return False

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        if model.attnpool is None:
            raise ValueError("bcosify: expected a ModifiedResNet with its attention pooling (attnpool), got None there")
        return model

    def comparable(self, model: nn.Module) -> tuple[nn.Module, str]:
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.attnpool.positional_embedding.zero_()
            for projection in (model.attnpool.q_proj, model.attnpool.k_proj, model.attnpool.v_proj):
                projection.bias.zero_()
            model.attnpool.c_proj.bias.zero_()
        return model, "attention pooling without positional embedding and biases"

    def input_size(self, model: nn.Module) -> tuple[int, int]:
        size = model.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        return {
            "layers": [len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4)],
            "output_dim": model.output_dim,
            "heads": model.attnpool.num_heads,
            "image_size": model.image_size,
            "width": model.conv3.out_channels,
        }

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        from open_clip.modified_resnet import ModifiedResNet

        return ModifiedResNet(**architecture)

    def example(self) -> nn.Module:
        return self.build({"layers": [1, 1, 1, 1], "output_dim": 12, "heads": 4, "image_size": 64, "width": 8})
