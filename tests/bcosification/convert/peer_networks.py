"""The peers' networks, small and with random weights: B-cos v2's from the package ``bcos``, and B-cosification's.

B-cosification is no package: its conversion is written here once more, from what its code does, with the stand-ins of
its layers: convolutions and linear layers without weight normalisation, uncentered norms, every child of an
nn.Sequential numbered (CNNs), all biases gone, 6-channel normalisation before and the logit layer behind the network.
Nothing is shared with bcosification.
"""

import math
import warnings
from functools import partial

import bcos.models.convnext
import bcos.models.densenet
import bcos.models.resnet
import bcos.models.vgg
import bcos.models.vit
import torch
import torchvision
from bcos.common import BcosUtilMixin
from bcos.modules import BcosConv2d, BcosLinear, BcosSequential, DetachableGNLayerNorm2d, LogitLayer, norms
from torch import nn
from torch.nn import functional
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from tests.bcosification.convert.b_cosification_standins import BcosifyConv2d, BcosifyLinear, MyGELU

CLASSES = 5
NO_BIAS = norms.NoBias(norms.BatchNormUncentered2d)


# --- B-cos v2 -------------------------------------------------------------------------------------------------------


def simple_vit(dim=64, depth=2, heads=1, mlp_dim=24, image_size=32, patch_size=8, conv_stem=None, **arguments):
    """B-cos v2's SimpleViT as its experiments make it; with ``standard=True`` its standard network."""
    standard = arguments.pop("standard", False)
    layers = dict(norm_layer=nn.LayerNorm, act_layer=nn.GELU, norm2d_layer=DetachableGNLayerNorm2d, channels=3)
    layers |= dict(linear_layer=nn.Linear, conv2d_layer=nn.Conv2d)
    if not standard:
        layers = dict(
            norm_layer=norms.NoBias(norms.DetachableLayerNorm),
            act_layer=nn.Identity,
            norm2d_layer=norms.NoBias(DetachableGNLayerNorm2d),
            linear_layer=partial(BcosLinear, b=2),
            conv2d_layer=partial(BcosConv2d, b=2),
            channels=6,
        )
    sizes = dict(dim=dim, depth=depth, heads=heads, mlp_dim=mlp_dim, num_classes=CLASSES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not to use these constructors
        model = bcos.models.vit.SimpleViT(
            image_size=image_size, patch_size=patch_size, conv_stem=conv_stem, **{**sizes, **layers, **arguments}
        )
    return model if standard else BcosSequential(model, LogitLayer(logit_bias=math.log(1 / (model_classes(model) - 1))))


def model_classes(model):
    return model.linear_head.linear.out_features


def v2_resnet(block=bcos.models.resnet.BasicBlock, layers=(1, 1, 1, 1), **arguments):
    return bcos.models.resnet.BcosResNet(block, list(layers), num_classes=CLASSES, norm_layer=NO_BIAS, **arguments)


def v2_densenet():
    return bcos.models.densenet.BcosDenseNet(4, (2, 1, 2), 8, bn_size=2, num_classes=CLASSES, norm_layer=NO_BIAS)


def v2_vgg():
    # The classifier's 512 and 4096 channels are fixed there; on "meta" they cost nothing until weights are needed.
    layers = bcos.models.vgg.make_layers([8, "M", 12, 512, "M"], NO_BIAS, BcosConv2d)
    model = bcos.models.vgg.BcosVGG(layers, CLASSES, init_weights=False, conv_layer=BcosConv2d)
    model.classifier = nn.Sequential(BcosConv2d(512, 16, 7, padding=3), BcosConv2d(16, 16), BcosConv2d(16, CLASSES))
    return model


def v2_convnext(norm="layer"):
    config = bcos.models.convnext.CNBlockConfig
    blocks = [config(8, 12, 2), config(12, 16, 1), config(16, None, 1)]
    return bcos.models.convnext.BcosConvNeXt(
        blocks, 0.1, num_classes=CLASSES, norm_layer=None if norm == "layer" else NO_BIAS
    )


V2 = {
    "resnet, basic blocks": (v2_resnet, 32),
    "resnet, grouped bottlenecks": (
        partial(v2_resnet, bcos.models.resnet.Bottleneck, (1, 2, 1, 1), groups=2, width_per_group=16), 32,
    ),
    "densenet": (v2_densenet, 32),
    "vgg": (v2_vgg, 32),
    "convnext, position norms": (v2_convnext, 32),
    "convnext, batch norms": (partial(v2_convnext, "batch"), 32),
    "simple_vit": (simple_vit, 32),
    "vitc": (partial(simple_vit, patch_size=1, image_size=4, conv_stem=[8, 8, 12, 12, 16]), 32),
}  # fmt: skip
"""Name -> (constructor, image size in pixels)."""


# --- B-cosification --------------------------------------------------------------------------------------------------


class HeadFirstResNet(ResNet):
    def _forward_impl(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.avgpool(self.fc(x)).flatten(1)


class HeadFirstDenseNet(DenseNet):
    def forward(self, x):
        x = self.classifier(functional.relu(self.features(x)))
        return functional.adaptive_avg_pool2d(x, 1).flatten(1)


class HeadFirstSimpleViT(bcos.models.vit.SimpleViT):
    def forward(self, x):
        x = self.to_patch_embedding(x)
        x = x.flatten(1, 2) + self.positional_embedding(x)
        return self.linear_head(self.transformer(x)).mean(dim=1)


class BcosifyNetwork(BcosUtilMixin, nn.Module):
    """Encoded images in [0, 1] -> logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.bcosifynormalize = torchvision.transforms.Normalize(
            (0.485, 0.456, 0.406, 0.515, 0.544, 0.594), (0.229, 0.224, 0.225) * 2
        )
        self.logit_layer = LogitLayer(None, -math.log(1000 - 1))

    def forward(self, x):
        return self.logit_layer(self.model(self.bcosifynormalize(x)))


def _layer(child, name, last, keep_bias, b):
    """B-cosification's counterpart of one layer, or None."""
    if isinstance(child, nn.Conv2d):
        arguments = (child.kernel_size, child.stride, child.padding, child.dilation[0], child.groups)
        new = BcosifyConv2d(child.in_channels, child.out_channels, *arguments, b=b, linear_bias=child.bias is not None)
    elif isinstance(child, nn.Linear) and name == last:
        new = BcosifyConv2d(child.in_features, child.out_features, b=b, linear_bias=True)
    elif isinstance(child, nn.Linear) and name != "to_qkv":
        new = BcosifyLinear(child.in_features, child.out_features, b=b, linear_bias=child.bias is not None)
    elif isinstance(child, nn.BatchNorm2d):
        new = norms.BatchNormUncentered2d(child.num_features)
        new.weight.data = child.weight.data
        shift = child.running_mean / (child.running_var + child.eps).sqrt() * child.weight.data
        new.bias.data = child.bias.data - shift
        new.running_var, new.running_mean = child.running_var, child.running_mean
    elif isinstance(child, nn.GELU):
        return MyGELU()
    elif isinstance(child, nn.MaxPool2d):
        return nn.AvgPool2d(3, stride=2, padding=1)
    elif isinstance(child, (nn.LayerNorm, nn.GroupNorm)):
        layer_norm = isinstance(child, nn.LayerNorm)
        new = (
            norms.DetachableLayerNorm(child.normalized_shape, eps=child.eps)
            if layer_norm
            else norms.DetachableGroupNorm2d(child.num_groups, child.num_channels, eps=child.eps)
        )
        new.weight.data, new.bias.data = child.weight.data, child.bias.data
    else:
        return None
    if hasattr(new, "linear"):
        new.linear.weight.data = child.weight.data.view(new.linear.weight.shape)
        if child.bias is not None:
            new.linear.bias.data = child.bias.data
    if not keep_bias:
        for module in (new, getattr(new, "linear", None)):
            if isinstance(getattr(module, "bias", None), nn.Parameter):
                module.bias = None
    return new


def _convert(module, last, keep_bias, numbered, b):
    for name, child in list(module.named_children()):
        _convert(child, last, keep_bias, numbered, b)
        new = _layer(child, name, last, keep_bias, b)
        if new is None and numbered and isinstance(child, nn.Sequential):
            new = BcosSequential(*child._modules.values())
        if new is not None:
            setattr(module, name, new)


def b_cosification(model, *, keep_bias=False, b=2):
    """What B-cosification's code makes of a standard network of a HeadFirst class (changed in place)."""
    vit = isinstance(model, bcos.models.vit.SimpleViT)
    if vit and "conv_stem" not in model.to_patch_embedding._modules:
        layer = model.to_patch_embedding.linear
        pixels = layer.weight.data.view(layer.out_features, -1, 3)
        layer.weight.data = torch.cat([pixels, -pixels], 2).flatten(1) / 2
        layer.in_features *= 2
    else:
        layer = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        layer.weight.data = torch.cat([layer.weight.data, -layer.weight.data], 1) / 2
        layer.in_channels *= 2
    last = {HeadFirstResNet: "fc", HeadFirstDenseNet: "classifier"}.get(type(model))
    _convert(model, last, keep_bias, numbered=not vit, b=b)
    return BcosifyNetwork(model)


def _head_first(constructor, kind):
    def construct():
        model = constructor()
        model.__class__ = kind
        return model

    return construct


STANDARD = {
    "resnet, basic blocks": (_head_first(lambda: ResNet(BasicBlock, [1, 1, 1, 1], CLASSES), HeadFirstResNet), 32),
    "resnet, bottlenecks": (_head_first(lambda: ResNet(Bottleneck, [1, 1, 1, 1], CLASSES), HeadFirstResNet), 32),
    "densenet": (
        _head_first(lambda: DenseNet(4, (2, 1, 2), 8, bn_size=2, num_classes=CLASSES), HeadFirstDenseNet), 32,
    ),
    "simple_vit": (_head_first(partial(simple_vit, standard=True), HeadFirstSimpleViT), 32),
    "vitc": (_head_first(
        partial(simple_vit, standard=True, patch_size=1, image_size=4, conv_stem=[8, 8, 12, 12, 16]),
        HeadFirstSimpleViT,
    ), 32),
}  # fmt: skip
"""Name -> (constructor of the standard network that B-cosification starts from, image size)."""


# --- weights and images ----------------------------------------------------------------------------------------------


def randomize(model, seed=0):
    """Statistics, norms' weights, biases and scales that are all different; float64, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layer_scale"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3, generator=generator))
            elif parameter.dim() == 2:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.002, 0.01, generator=generator)
                # B-cos v2's norms never touch their mean; a standard network's has one.
                if not hasattr(module, "set_explanation_mode"):
                    module.running_mean.normal_(0, 0.1, generator=generator)
    return model


def make_v2(name, seed=0):
    """A network of V2 and encoded images for it, float64."""
    constructor, size = V2[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomize(constructor(), seed), encoded(size, seed)


def make_standard(name, seed=0):
    """A standard network of STANDARD with a head-first forward and encoded images, float64."""
    constructor, size = STANDARD[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomize(constructor(), seed), encoded(size, seed)


def encoded(size, seed=0, count=2):
    x = torch.rand(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    return torch.cat([x, 1 - x], 1)


def logits_and_gradient(model, x, target=1):
    """Logits, and the gradient of one of them in explanation mode, by the peer's own context."""
    x = x.clone().requires_grad_()
    with model.explanation_mode() if hasattr(model, "explanation_mode") else bcos.common.explanation_mode(model):
        logits = model(x)
        (gradient,) = torch.autograd.grad(logits[:, target].sum(), x)
    return logits.detach(), gradient
