"""Small networks of torchvision's classification families (see standard_networks.py for the first ones)."""

import importlib
import warnings
from functools import partial

import torch
from torch import nn
from torchvision.models import swin_transformer
from torchvision.models.alexnet import AlexNet
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig
from torchvision.models.maxvit import MaxVit
from torchvision.models.mnasnet import MNASNet
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.shufflenetv2 import ShuffleNetV2
from torchvision.models.squeezenet import SqueezeNet
from torchvision.models.vgg import VGG, make_layers

from tests.bcosification.convert.standard_networks import CLASSES


def _fully_connected(inputs, *, first_dropout=False):
    """The classifier of a VGG or an AlexNet, narrow: the library's has 100 million weights."""
    linear, relu, dropout = [nn.Linear(inputs, 10), nn.Linear(10, 9), nn.Linear(9, CLASSES)], nn.ReLU(True), nn.Dropout
    if first_dropout:
        return nn.Sequential(dropout(), linear[0], relu, dropout(), linear[1], nn.ReLU(True), linear[2])
    return nn.Sequential(linear[0], relu, dropout(), linear[1], nn.ReLU(True), dropout(), linear[2])


def vgg(batch_norm=False):
    with torch.device("meta"):
        network = VGG(nn.Sequential(), init_weights=False)
    network.features = make_layers([8, "M", 8, "M", 12], batch_norm)
    network.classifier = _fully_connected(12 * 49)
    return network


def alexnet():
    with torch.device("meta"):
        network = AlexNet()
    layers = [
        nn.Conv2d(3, 8, 11, 4, 2), nn.ReLU(True), nn.MaxPool2d(3, 2), nn.Conv2d(8, 8, 5, padding=2), nn.ReLU(True),
        nn.MaxPool2d(3, 2), nn.Conv2d(8, 9, 3, padding=1), nn.ReLU(True),
    ]  # fmt: skip
    network.features, network.classifier = nn.Sequential(*layers), _fully_connected(9 * 36, first_dropout=True)
    return network


def squeezenet():
    return SqueezeNet("1_1", num_classes=CLASSES)


# Their names in torchvision.models are those of functions.
inception_, googlenet_ = (importlib.import_module(f"torchvision.models.{name}") for name in ("inception", "googlenet"))


def _narrow(library):
    """The library's BasicConv2d with an eighth of the channels."""
    return lambda inputs, outputs, **options: library.BasicConv2d(
        inputs if inputs == 3 else inputs // 8, outputs // 8, **options
    )


def inception_v3():
    blocks = ["InceptionA", "InceptionB", "InceptionC", "InceptionD", "InceptionE", "InceptionAux"]
    narrow = _narrow(inception_)
    network = inception_.Inception3(
        CLASSES,
        transform_input=True,
        inception_blocks=[narrow, *(partial(getattr(inception_, block), conv_block=narrow) for block in blocks)],
        init_weights=False,
    )
    network.fc, network.AuxLogits.fc = nn.Linear(256, CLASSES), nn.Linear(96, CLASSES)
    return network


def googlenet():
    narrow = _narrow(googlenet_)
    blocks = [partial(getattr(googlenet_, block), conv_block=narrow) for block in ("Inception", "InceptionAux")]
    network = googlenet_.GoogLeNet(CLASSES, transform_input=True, blocks=[narrow, *blocks], init_weights=False)
    network.fc = nn.Linear(128, CLASSES)
    return network


def mobilenet_v2():
    return MobileNetV2(CLASSES, 0.25, [[1, 16, 1, 1], [3, 24, 2, 2], [2.5, 32, 1, 1]])


def mobilenet_v3():
    rows = [
        (8, 3, 8, 8, True, "RE", 2, 1),
        (8, 5, 16, 16, False, "RE", 1, 1),
        (16, 3, 24, 16, True, "HS", 1, 2),
    ]
    return MobileNetV3([InvertedResidualConfig(*row, 1.0) for row in rows], 24, CLASSES)


def mnasnet():
    return MNASNet(0.2, CLASSES)


def shufflenet_v2():
    return ShuffleNetV2([1, 2, 1], [8, 16, 24, 32, 40], CLASSES)


def efficientnet():
    stages = [MBConvConfig(1, 3, 1, 16, 8, 1), MBConvConfig(3, 5, 2, 8, 16, 2)]
    return EfficientNet(stages, 0.2, 0.1, CLASSES)


def efficientnet_v2():
    stages = [
        FusedMBConvConfig(1, 3, 1, 8, 8, 1),
        FusedMBConvConfig(3, 3, 2, 8, 16, 2),
        MBConvConfig(2, 3, 2, 16, 24, 1),
    ]
    norm = partial(nn.BatchNorm2d, eps=1e-3)
    return EfficientNet(stages, 0.3, 0.2, CLASSES, norm_layer=norm, last_channel=40)


def _regnet(se_ratio, **options):
    blocks = BlockParams([1, 2], [16, 24], [8, 8], [1.0, 1.0], [2, 2], se_ratio)
    return RegNet(blocks, CLASSES, stem_width=8, **options)


def regnet_x():
    return _regnet(None)


def regnet_y():
    return _regnet(0.25, activation=nn.SiLU)


def _swin(version):
    suffix = "V2" if version == 2 else ""
    return swin_transformer.SwinTransformer(
        [2, 2], 8, [2, 2], [2, 4], [4, 4], 2.0, num_classes=CLASSES,
        block=getattr(swin_transformer, f"SwinTransformerBlock{suffix}"),
        downsample_layer=getattr(swin_transformer, f"PatchMerging{suffix}"),
    )  # fmt: skip


def swin():
    return _swin(1)


def swin_v2():
    return _swin(2)


def maxvit():
    return MaxVit((32, 32), 8, 2, [8, 16], [1, 1], 4, 0.1, mlp_ratio=2, num_classes=CLASSES, expansion_ratio=2)


NETWORKS = {
    "alexnet": (alexnet, 111),
    "vgg": (vgg, 28),
    "vgg, batch norm": (partial(vgg, True), 28),
    "squeezenet": (squeezenet, 40),
    "googlenet": (googlenet, 48),
    "inception v3": (inception_v3, 79),
    "mobilenet v2": (mobilenet_v2, 32),
    "mobilenet v3": (mobilenet_v3, 32),
    "mnasnet": (mnasnet, 40),
    "shufflenet v2": (shufflenet_v2, 48),
    "efficientnet": (efficientnet, 32),
    "efficientnet v2": (efficientnet_v2, 32),
    "regnet x": (regnet_x, 32),
    "regnet y": (regnet_y, 32),
    "swin": (swin, 22),
    "swin v2": (swin_v2, 22),
    "maxvit": (maxvit, 32),
}
"""Name -> (constructor, image size)."""

BY_CLASS = {"alexnet", "googlenet", "inception v3"}
"""Narrower than the library's constructors make them: `load` needs model= for these."""


def randomize(model, seed=0):
    """Random parameters and statistics, float64, eval mode; a B = 2 network of them passes its signal on.

    There a layer of n inputs and weights of size s gives s^2 n^(1/2) times the size of its input.
    """
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3, generator=generator))
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.normal_(0, module.weight[0].numel() ** -0.25, generator=generator)
            elif isinstance(module, nn.BatchNorm2d):
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randomize(constructor(), seed), images
