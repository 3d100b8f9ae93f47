"""Small networks of torchvision's classification families (see standard_networks.py for the first ones)."""

import torch
from torch import nn
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.swin_transformer import SwinTransformer

from bcosification.convert.families import FAMILIES
from bcosification.convert.families.base import enlarged
from tests.bcosification.convert.standard_networks import CLASSES


def example(family):
    """The constructor of a family's own example."""
    return FAMILIES[f"torchvision.models.{family}"].example


def vgg_without_batch_norm():
    family = FAMILIES["torchvision.models.vgg.VGG"]
    architecture = {"features": [8, "M", 8, "M", 12], "classifier": [12 * 49, 10, 9, CLASSES], "dropout": 0.5}
    return family.build({**architecture, "batch_norm": False})


def efficientnet_v1():
    stages = [MBConvConfig(1, 3, 1, 16, 8, 1), MBConvConfig(3, 5, 2, 8, 16, 2)]
    return EfficientNet(stages, 0.2, 0.1, CLASSES)


def regnet_x():
    return RegNet(BlockParams([1, 2], [16, 24], [8, 8], [1.0, 1.0], [2, 2]), CLASSES, stem_width=8)


def regnet_with_silu():
    blocks = BlockParams([1, 2], [16, 24], [8, 8], [1.0, 0.5], [2, 2], 0.25)
    return RegNet(blocks, CLASSES, stem_width=8, activation=nn.SiLU)


def swin_v1():
    return SwinTransformer([2, 2], 8, [2, 2], [2, 4], [4, 4], 2.0, num_classes=CLASSES)


NETWORKS = {
    "alexnet": (example("alexnet.AlexNet"), 223),
    "vgg": (vgg_without_batch_norm, 28),
    "vgg, batch norm": (example("vgg.VGG"), 28),
    "squeezenet": (example("squeezenet.SqueezeNet"), 40),
    "googlenet": (example("googlenet.GoogLeNet"), 48),
    "inception v3": (example("inception.Inception3"), 79),
    "mobilenet v2": (example("mobilenetv2.MobileNetV2"), 32),
    "mobilenet v3": (example("mobilenetv3.MobileNetV3"), 32),
    "mnasnet": (example("mnasnet.MNASNet"), 40),
    "shufflenet v2": (example("shufflenetv2.ShuffleNetV2"), 48),
    "efficientnet": (efficientnet_v1, 32),
    "efficientnet v2": (example("efficientnet.EfficientNet"), 32),
    "regnet x": (regnet_x, 32),
    "regnet y": (example("regnet.RegNet"), 32),
    "regnet y, silu": (regnet_with_silu, 32),
    "swin": (swin_v1, 22),
    "swin v2": (example("swin_transformer.SwinTransformer"), 40),
    "maxvit": (example("maxvit.MaxVit"), 32),
}
"""Name -> (constructor, image size)."""

BY_CLASS = {"alexnet", "googlenet", "inception v3"}
"""Narrower than the library's constructors make them: `load` needs model= for these."""


def randomize(model, seed=0):
    """Random parameters and statistics, float64, eval mode; a B = 2 network of them passes its signal on."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = enlarged(model.double().eval())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
            elif hasattr(module, "relative_position_bias_table"):
                module.relative_position_bias_table.normal_(0, 0.5, generator=generator)
    return model


def make(name, seed=0):
    """A network of the table, randomized, and two images for it in [0, 1]."""
    torch.manual_seed(seed)
    constructor, size = NETWORKS[name]
    images = torch.rand(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    return randomize(constructor(), seed), images
