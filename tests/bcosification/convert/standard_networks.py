"""Standard networks of the known families, small, with weights, biases and statistics that are all different.

Made for tests of the conversion: after ``randomize`` a mistake in any tensor shows in the logits.
"""

import torch
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

CLASSES = 5
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def randomize(model, seed=0):
    """Random statistics and parameters, float64, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3, generator=generator))
            elif name.endswith("layer_scale"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif parameter.dim() == 2 or "embed" in name or "token" in name:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.5, generator=generator)
                # Small variances keep the signal of a B = 2 network with random weights from dying out.
                module.running_var.uniform_(0.002, 0.01, generator=generator)
    return model


def basic_resnet():
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)


def bottleneck_resnet():
    return ResNet(Bottleneck, [1, 2, 1, 1], num_classes=CLASSES, groups=2, width_per_group=16)


def dilated_resnet():
    return ResNet(Bottleneck, [1, 1, 1, 2], CLASSES, replace_stride_with_dilation=[False, False, True])


def densenet():
    return DenseNet(growth_rate=8, block_config=(2, 1, 2, 1), num_init_features=12, bn_size=2, num_classes=CLASSES)


def convnext():
    blocks = [CNBlockConfig(8, 12, 2), CNBlockConfig(12, None, 1)]
    return ConvNeXt(blocks, stochastic_depth_prob=0.1, num_classes=CLASSES)


def vit():
    return VisionTransformer(16, 4, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=24, num_classes=CLASSES)


def vit_conv_stem():
    stem = [ConvStemConfig(8, 3, 2), ConvStemConfig(12, 3, 2)]
    return VisionTransformer(16, 4, 1, 2, hidden_dim=12, mlp_dim=20, num_classes=CLASSES, conv_stem_configs=stem)


def sequential():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8, affine=False),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
        nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, groups=2), nn.GroupNorm(3, 12), nn.GELU("tanh")),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(12, CLASSES),
    )


NETWORKS = {
    "resnet, basic blocks": (basic_resnet, 33),
    "resnet, grouped bottlenecks": (bottleneck_resnet, 32),
    "densenet": (densenet, 35),
    "convnext": (convnext, 20),
    "vit": (vit, 16),
    "vit, convolutional stem": (vit_conv_stem, 16),
    "sequential": (sequential, 17),
}
"""Name -> (constructor, image size)."""

LARGER = {"resnet, dilated": (dilated_resnet, 32)}
"""Slower ones, for fewer tests."""


def make(name, seed=0):
    """A network of the table, randomized, and two images for it in [0, 1]."""
    torch.manual_seed(seed)
    constructor, size = {**NETWORKS, **LARGER}[name]
    images = torch.rand(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    return randomize(constructor(), seed), images


def normalized(images):
    mean, std = images.new_tensor(MEAN).view(-1, 1, 1), images.new_tensor(STD).view(-1, 1, 1)
    return (images - mean) / std


def statistics_of(name):
    """mean= and std= where the network's family does not know them."""
    return {"mean": MEAN, "std": STD} if name == "sequential" else {}


def relative_error(got, expected):
    return float((got - expected).norm() / expected.norm())
