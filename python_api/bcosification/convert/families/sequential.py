"""nn.Sequential: layers in a row, optionally ending in global average pooling, flatten, (dropout,) linear."""

from __future__ import annotations

import torch
from torch import nn

from bcosification.convert.class_change import change_class
from bcosification.convert.families.base import Family, HeadBeforePool, register
from bcosification.convert.rules import Options


def _head_position(model: nn.Sequential) -> int | None:
    return len(model) - 1 if len(model) and type(model[-1]) is nn.Linear else None


def _pool_position(model: nn.Sequential) -> int | None:
    """Where the global average pooling sits if only flattening and dropout lie between it and the head."""
    head = _head_position(model)
    if head is None:
        return None
    position = head - 1
    while position >= 0 and isinstance(model[position], (nn.Flatten, nn.Dropout)):
        position -= 1
    if position >= 0 and isinstance(model[position], nn.AdaptiveAvgPool2d):
        if model[position].output_size in (1, (1, 1)):
            return position
    return None


class HeadBeforePoolSequential(HeadBeforePool):
    """The last layer, a 1x1 convolution, and its dropout run before the pooling at ``pool_position``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *layers, head = self
        pooling = [layer for layer in layers[self.pool_position :] if not isinstance(layer, nn.Dropout)]
        dropout = [layer for layer in layers[self.pool_position :] if isinstance(layer, nn.Dropout)]
        for layer in [*layers[: self.pool_position], *dropout, head, *pooling]:
            x = layer(x)
        return x


@register("torch.nn.modules.container.Sequential")
class SequentialFamily(Family):
    """The first layer that has weights reads the image; the last layer, if an nn.Linear, is the head."""

    name = "sequential"
    title = "nn.Sequential"
    converts = (
        "convolutions, linear layers, norms, max pooling; a last linear layer behind global pooling moves before it"
    )
    cannot = "move a head that is not the last layer, behind AdaptiveAvgPool2d(1) and Flatten"
    example_options = {"mean": 0.5, "std": 0.25}

    def input_layer(self, model: nn.Module) -> str | None:
        for name, module in model.named_modules():
            if type(module) in (nn.Conv2d, nn.Linear):
                return name
        return None

    def head(self, model: nn.Module) -> str | None:
        position = _head_position(model)
        return None if position is None else list(model._modules)[position]

    def moves_head(self, model: nn.Module) -> bool:
        return _pool_position(model) is not None

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        if head_moves:
            model.pool_position = _pool_position(model)
            change_class(model, HeadBeforePoolSequential)
        return model

    def example(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8, affine=False),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
            nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, groups=2), nn.GroupNorm(3, 12), nn.GELU("tanh")),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(12, 5),
        )
