"""Networks that are a trunk, a global pooling and a classifier: the classifier runs at every position before it."""

from __future__ import annotations

import torch
from torch import nn

from bcosification.convert.class_change import change_class
from bcosification.convert.families.base import Family, HeadBeforePool
from bcosification.convert.rules import GATED, Options, as_convolution, type_name

_ACTIVATIONS = {*GATED, *map(type_name, (nn.ReLU, nn.LeakyReLU, nn.GELU))}
_LAYER_NORMS = (type_name(nn.LayerNorm), "torchvision.models.convnext.LayerNorm2d")


class PositionwiseHead(HeadBeforePool):
    """The children ``trunk``, then the layers of ``classifier`` at every position, then ``pooling`` (or the mean).

    A ModuleList in the trunk is run through. Pooling and flattening in between the classifier's layers come last, too.
    """

    trunk: tuple[str, ...] = ("features",)
    classifiers: tuple[str, ...] = ("classifier",)
    pooling: tuple[str, ...] = ("avgpool",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.trunk:
            part = getattr(self, name)
            for layer in part if isinstance(part, nn.ModuleList) else (part,):
                x = layer(x)
        layers = classifier_layers(self, self.classifiers).values()
        for layer in layers:
            if isinstance(layer, nn.LayerNorm) and not _channels_first(layer):
                x = layer(x.movedim(1, -1)).movedim(-1, 1)
            elif not _pools(layer):
                x = layer(x)
        for layer in [*(getattr(self, name) for name in self.pooling), *filter(_pools, layers)]:
            x = layer(x)
        return x.mean((2, 3)) if x.dim() == 4 else x


class PositionwiseHeadFamily(Family):
    """What such networks have in common. ``reader``: the layer that reads the image."""

    preprocessing = "imagenet"
    reader: str
    mixin: type[PositionwiseHead]

    def input_layer(self, model: nn.Module) -> str:
        return self.reader

    def head(self, model: nn.Module) -> str | None:
        part = getattr(model, self.mixin.classifiers[-1], None)
        names = list(classifier_layers(model, self.mixin.classifiers)) if part is not None else []
        if not names or isinstance(part, nn.Identity) or isinstance(model.get_submodule(names[-1]), nn.Flatten):
            return None  # taken off, to use the features
        return names[-1]

    def moves_head(self, model: nn.Module) -> bool:
        for name, layer in self._before_head(model).items():
            if not (_pools(layer) or _keeps_positions(layer)):
                raise ValueError(
                    f"bcosify: expected the classifier of {type(model).__name__} to consist of linear layers, dropout, "
                    f"activations and LayerNorms to move it before the global pooling, got {layer} as {name!r}; "
                    "head='keep' leaves it where it is"
                )
        return True

    def head_move_changes(self, model: nn.Module) -> str | None:
        nonlinear = [
            type(layer).__name__
            for layer in self._before_head(model).values()
            if type_name(type(layer)) in (*_ACTIVATIONS, *_LAYER_NORMS)
        ]
        if not nonlinear:
            return None
        return f"the mean over positions is taken after the classifier's {' and '.join(nonlinear)}, not before"

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        if not head_moves:
            return model
        for name, layer in self._before_head(model).items():
            if type(layer) is nn.Linear:
                model.set_submodule(name, as_convolution(layer))
        return change_class(model, self.mixin)

    def _before_head(self, model: nn.Module) -> dict[str, nn.Module]:
        return dict(list(classifier_layers(model, self.mixin.classifiers).items())[:-1])


def classifier_layers(model: nn.Module, parts: tuple[str, ...]) -> dict[str, nn.Module]:
    """The layers of the parts of ``model`` in the order in which they run, by name; nn.Sequentials are opened."""
    layers = {}
    for part in parts:
        layer = getattr(model, part)
        if isinstance(layer, nn.Sequential):
            layers |= {f"{part}.{name}": inside for name, inside in layer.named_children()}
        else:
            layers[part] = layer
    return layers


def _pools(layer: nn.Module) -> bool:
    if type(layer) is nn.Flatten:
        return (layer.start_dim, layer.end_dim) == (1, -1)
    return type(layer) is nn.AdaptiveAvgPool2d and layer.output_size in (1, (1, 1))


def _keeps_positions(layer: nn.Module) -> bool:
    if type_name(type(layer)) in (*_ACTIVATIONS, *_LAYER_NORMS):
        return True
    return type(layer) is nn.Linear or isinstance(layer, (nn.Dropout, nn.Identity))


def _channels_first(layer: nn.Module) -> bool:
    """Whether a LayerNorm takes (N, C, H, W): torchvision's and ours, and what is swapped in for ours."""
    return getattr(layer, "channels_first", type(layer).__name__ == "LayerNorm2d")


def largest_probability(probabilities: list[float], steps: int) -> float:
    """The stochastic_depth_prob that gave block i the probability prob * i / steps, to the last bit."""
    last = probabilities[-1] * steps / max(len(probabilities) - 1, 1)
    for candidate in (round(last, 12), last):
        if all(p == candidate * float(i) / steps for i, p in enumerate(probabilities)):
            return candidate
    return last


def norm_options(model: nn.Module) -> dict[str, float]:
    """eps and momentum of the first BatchNorm of ``model``, as torchvision makes them all alike."""
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    return {"eps": norm.eps, "momentum": norm.momentum}


def dropout_of(classifier: nn.Sequential) -> float:
    """The probability of the first dropout layer."""
    return next(layer.p for layer in classifier if isinstance(layer, nn.Dropout))
