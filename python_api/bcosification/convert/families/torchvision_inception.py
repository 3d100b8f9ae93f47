"""torchvision's Inception v3 and GoogLeNet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from bcosification import nn as bnn
from bcosification.convert.blocks import recomputes
from bcosification.convert.chains import convolution_norm_activation
from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.families.base import register
from bcosification.convert.families.positionwise_head import PositionwiseHead, PositionwiseHeadFamily
from bcosification.convert.rules import Options, type_name


class ConvertedBasicConv(ChangedForward):
    """conv, bn and the ReLU, which torchvision calls as a function, as a layer, ``activation``."""

    fused_chains = (("conv", "bn"),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return convolution_norm_activation(self.conv, self.bn, self.activation, x, recompute=recomputes(self))


class PooledInceptionB(ChangedForward):
    """InceptionB with its max pooling, which torchvision calls as a function, as a layer, ``pool``."""

    def _forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch3x3(x), double, self.pool(x)]


class PooledInceptionD(ChangedForward):
    """InceptionD likewise."""

    def _forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        long = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return [self.branch3x3_2(self.branch3x3_1(x)), long, self.pool(x)]


class ConvertedInception(ChangedForward):
    """``input_transform``, where there is one, knows of the inverted channels; no auxiliary classifiers."""

    def _transform_input(self, x: torch.Tensor) -> torch.Tensor:
        return self.input_transform(x)


class _HeadBeforePool(ConvertedInception, PositionwiseHead):
    classifiers = ("dropout", "fc")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.input_transform(x))


class HeadBeforePoolInception(_HeadBeforePool):
    """The classifier, a 1x1 convolution, before the global pooling."""

    trunk = (
        "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2",
        "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e",
        "Mixed_7a", "Mixed_7b", "Mixed_7c",
    )  # fmt: skip


class HeadBeforePoolGoogLeNet(_HeadBeforePool):
    """The classifier, a 1x1 convolution, before the global pooling."""

    trunk = (
        "conv1", "maxpool1", "conv2", "conv3", "maxpool2", "inception3a", "inception3b", "maxpool3",
        "inception4a", "inception4b", "inception4c", "inception4d", "inception4e", "maxpool4",
        "inception5a", "inception5b",
    )  # fmt: skip


class InceptionFamily(PositionwiseHeadFamily):
    """Convolutions in branches, avgpool, dropout, fc.

    The auxiliary classifiers go: they helped to train the network from random weights, and without them it returns the
    logits alone in training mode, too. ReLUs and poolings that torchvision calls as functions become layers.
    ``transform_input`` (true for torchvision's weights), which normalises the images once more, is done on [x, 1 - x].
    """

    converts = "convolutions, BatchNorms, max pooling, also where it is a function; the classifier before the pooling"
    keeps = "ReLUs"
    cannot = "keep the auxiliary classifiers"

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        for name in self.auxiliary:
            setattr(model, name, None)
        model.aux_logits = False
        for module in list(model.modules()):
            kind = type_name(type(module)).rpartition(".")
            if kind[0] not in ("torchvision.models.inception", "torchvision.models.googlenet"):
                continue
            if kind[2] == "BasicConv2d":
                module.activation = nn.ReLU(inplace=True).train(module.training)
                change_class(module, ConvertedBasicConv)
            elif kind[2] in ("InceptionB", "InceptionD"):
                module.pool = nn.MaxPool2d(3, stride=2).train(module.training)
                change_class(module, PooledInceptionB if kind[2] == "InceptionB" else PooledInceptionD)
        model.input_transform = _input_transform(model, options) if model.transform_input else nn.Identity()
        return super().prepare(model, options, True) if head_moves else change_class(model, ConvertedInception)

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        auxiliary = getattr(model, self.auxiliary[0])
        return {
            "num_classes": model.fc.out_features,
            # Those of the pretrained network where only fc was made anew.
            "auxiliary_classes": None if auxiliary is None else _classes(auxiliary),
            "transform_input": model.transform_input,
            "dropout": model.dropout.p,
        }

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        arguments = dict(architecture)
        classes, auxiliary = arguments.pop("num_classes"), arguments.pop("auxiliary_classes")
        model = self.library_class()(auxiliary or classes, auxiliary is not None, init_weights=False, **arguments)
        if model.fc.out_features != classes:
            model.fc = nn.Linear(model.fc.in_features, classes)
        return model


def _input_transform(model: nn.Module, options: Options) -> nn.Module:
    """From ImageNet's mean and std to (x - 0.5) / 0.5, and the negative of it on channels of the inverse."""
    old_mean, old_std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    std = [0.5 / value for value in old_std]
    mean = [(0.5 - value) / old for value, old in zip(old_mean, old_std, strict=True)]
    if options.inverse:
        mean, std = mean + [-value for value in mean], std * 2
    transform = bnn.Normalize(mean, std)
    parameter = next(model.parameters())
    if parameter.dtype == torch.float64:  # the numbers above, not those rounded to float32
        transform.mean, transform.std = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    transform = transform if parameter.is_meta else transform.to(parameter.device)
    return transform.train(model.training)


@register("torchvision.models.inception.Inception3")
class TorchvisionInception(InceptionFamily):
    """Conv2d_1a_3x3 to Conv2d_4a_3x3 with max pooling, Mixed_5b to Mixed_7c, avgpool, dropout, fc."""

    name = "torchvision_inception_v3"
    title = "torchvision Inception v3"
    example_size = (79, 79)
    reader = "Conv2d_1a_3x3.conv"
    mixin = HeadBeforePoolInception
    auxiliary = ("AuxLogits",)

    def input_size(self, model: nn.Module) -> tuple[int, int]:
        return 299, 299

    def library_class(self) -> type[nn.Module]:
        from torchvision.models.inception import Inception3

        return Inception3

    def example(self) -> nn.Module:
        from torchvision.models.inception import (
            BasicConv2d,
            Inception3,
            InceptionA,
            InceptionAux,
            InceptionB,
            InceptionC,
            InceptionD,
            InceptionE,
        )

        narrow = _narrow(BasicConv2d)
        kinds = (InceptionA, InceptionB, InceptionC, InceptionD, InceptionE, InceptionAux)
        blocks = [narrow, *(partial(kind, conv_block=narrow) for kind in kinds)]
        model = Inception3(5, transform_input=True, inception_blocks=blocks, init_weights=False)
        model.fc, model.AuxLogits.fc = nn.Linear(2048 // 8, 5), nn.Linear(768 // 8, 5)
        return model


@register("torchvision.models.googlenet.GoogLeNet")
class TorchvisionGoogLeNet(InceptionFamily):
    """conv1 to conv3 and inception3a to inception5b with max pooling, avgpool, dropout, fc."""

    name = "torchvision_googlenet"
    title = "torchvision GoogLeNet"
    example_size = (48, 48)
    reader = "conv1.conv"
    mixin = HeadBeforePoolGoogLeNet
    auxiliary = ("aux1", "aux2")

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        dropout = {} if model.aux1 is None else {"dropout_aux": model.aux1.dropout.p}
        return {**super().architecture(model), **dropout}

    def library_class(self) -> type[nn.Module]:
        from torchvision.models.googlenet import GoogLeNet

        return GoogLeNet

    def example(self) -> nn.Module:
        from torchvision.models.googlenet import BasicConv2d, GoogLeNet, Inception, InceptionAux

        narrow = _narrow(BasicConv2d)
        blocks = [narrow, *(partial(kind, conv_block=narrow) for kind in (Inception, InceptionAux))]
        model = GoogLeNet(5, transform_input=True, blocks=blocks, init_weights=False)
        model.fc = nn.Linear(1024 // 8, 5)
        return model


def _classes(auxiliary: nn.Module) -> int:
    return [layer for layer in auxiliary.modules() if isinstance(layer, nn.Linear)][-1].out_features


def _narrow(convolution: type[nn.Module]) -> Callable[..., nn.Module]:
    """``convolution``, a library's BasicConv2d, with an eighth of the channels that it is asked for."""
    return lambda inputs, outputs, **options: convolution(
        inputs if inputs == 3 else inputs // 8, outputs // 8, **options
    )
