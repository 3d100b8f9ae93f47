"""Which network a peer's weights belong to, told from their names and shapes; all published ones by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from bcosification.models import CONSTRUCTORS, FullyConvolutionalConvNeXt, FullyConvolutionalVGG, SimpleViT

__all__ = ["ARCHITECTURES", "TOWERS", "class_count", "guess", "is_tower", "output_count"]

Shapes = Mapping[str, tuple[int, ...]]

_VGG11 = [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"]
_TINY = [(96, 3), (192, 3), (384, 9), (768, 3)]
_BASE = [(128, 3), (256, 3), (512, 27), (1024, 3)]


def _torchvision(name: str) -> Callable[[int], nn.Module]:
    def build(num_classes: int) -> nn.Module:
        try:
            from torchvision import models
        except ImportError as error:
            raise RuntimeError(f"{name}: needs torchvision ({error}): pip install 'bcos-kernels[train]'") from None
        return models.get_model(name, weights=None, num_classes=num_classes)

    return build


_CLIP_SIZES = {64: 224, 80: 288, 96: 384, 128: 448}
"""Width of CLIP's ResNets -> edge of their images in pixels."""


def _clip_resnet(layers: tuple[int, ...], width: int) -> Callable[[int], nn.Module]:
    def build(output_dim: int) -> nn.Module:
        try:
            from open_clip.modified_resnet import ModifiedResNet
        except ImportError as error:
            raise RuntimeError(f"CLIP towers: need open_clip ({error}): pip install 'bcos-kernels[train]'") from None
        # CLIP's heads have 64 channels each; neither their number nor the images' size can be read off the weights.
        return ModifiedResNet(list(layers), output_dim, width * 32 // 64, _CLIP_SIZES.get(width, 224), width)

    return build


TOWERS: dict[str, Callable[[int], nn.Module]] = {
    "RN50": _clip_resnet((3, 4, 6, 3), 64),
    "RN101": _clip_resnet((3, 4, 23, 3), 64),
    "RN50x4": _clip_resnet((4, 6, 10, 6), 80),
    "RN50x16": _clip_resnet((6, 8, 18, 8), 96),
    "RN50x64": _clip_resnet((3, 15, 36, 10), 128),
}
"""CLIP's ResNets by their usual names -> function of the embedding's size -> standard image tower."""

ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{depth}": _torchvision(f"resnet{depth}") for depth in (18, 34, 50, 101, 152)},
    "resnext50_32x4d": _torchvision("resnext50_32x4d"),
    **{f"densenet{depth}": _torchvision(f"densenet{depth}") for depth in (121, 161, 169, 201)},
    "vgg11_bnu": lambda n: FullyConvolutionalVGG(_VGG11, n),
    "convnext_tiny": lambda n: FullyConvolutionalConvNeXt(_TINY, n, "layer", 0.1),
    "convnext_base": lambda n: FullyConvolutionalConvNeXt(_BASE, n, "layer", 0.5),
    "convnext_tiny_bnu": lambda n: FullyConvolutionalConvNeXt(_TINY, n, "batch", 0.1),
    "convnext_base_bnu": lambda n: FullyConvolutionalConvNeXt(_BASE, n, "batch", 0.5),
    **CONSTRUCTORS,
}
"""Name, as B-cos v2's functions have it -> function num_classes -> standard network of that structure."""

# Where the classifier's weight lies; B-cos layers keep theirs in a submodule "linear".
_HEADS = (
    "fc.linear.weight",
    "classifier.linear.weight",
    "classifier.2.linear.weight",  # VGG
    "classifier.1.linear.weight",  # ConvNeXt
    "linear_head.linear.linear.weight",
    "linear_head.linear.weight",  # the standard SimpleViT
)


def class_count(shapes: Shapes) -> int | None:
    """Number of classes of the weights with these shapes, or None where no classifier is known."""
    return next((shapes[name][0] for name in _HEADS if name in shapes), None)


def is_tower(shapes: Shapes) -> bool:
    """Whether these are weights of an image tower of CLIP's ResNets, which ends in an attention pooling."""
    return any(name.startswith("attnpool.") for name in shapes)


def output_count(shapes: Shapes) -> int | None:
    """Number of classes, or of an image tower the size of its embedding; None where neither is known."""
    return shapes.get("attnpool.c_proj.linear.weight", (class_count(shapes),))[0]


def guess(shapes: Shapes) -> nn.Module | None:
    """The standard network of the weights with these shapes, names without prefixes; None if it is none known here.

    Raises:
        ValueError: a SimpleViT or an image tower whose number of heads, which weights do not tell, is no matter of
            convention.
    """
    if is_tower(shapes):
        return _tower(shapes)
    if "linear_head.norm.weight" in shapes:
        return _simple_vit(shapes)
    if "layer1.0.conv1.linear.weight" in shapes and "fc.linear.weight" in shapes:
        return _resnet(shapes)
    if any(".denselayer1.conv2." in name for name in shapes):
        return _densenet(shapes)
    if "features.2.0.layer_scale" in shapes:
        return _convnext(shapes)
    if "features.0.linear.weight" in shapes and "classifier.2.linear.weight" in shapes:
        return _vgg(shapes)
    return None


def _indices(shapes: Shapes, pattern: str) -> list[int]:
    """The numbers that stand for (\\d+) in the names that begin like this, in order."""
    found = {int(match[1]) for name in shapes if (match := re.match(pattern, name))}
    return sorted(found)


def _resnet(shapes: Shapes) -> nn.Module | None:
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    layers = [len(_indices(shapes, rf"layer{stage}\.(\d+)\.")) for stage in (1, 2, 3, 4)]
    if 0 in layers or shapes["conv1.linear.weight"] != (64, 6, 7, 7):
        return None  # three stages, other widths: CIFAR's
    if "layer1.0.conv3.linear.weight" not in shapes:
        return ResNet(BasicBlock, layers, shapes["fc.linear.weight"][0])
    width, per_group = shapes["layer1.0.conv2.linear.weight"][:2]
    groups = width // per_group
    return ResNet(Bottleneck, layers, shapes["fc.linear.weight"][0], groups=groups, width_per_group=width // groups)


def _tower(shapes: Shapes) -> nn.Module | None:
    layers = [len(_indices(shapes, rf"layer{stage}\.(\d+)\.")) for stage in (1, 2, 3, 4)]
    stem, embedding = shapes.get("conv3.linear.weight"), shapes.get("attnpool.c_proj.linear.weight")
    if 0 in layers or stem is None or embedding is None:
        return None
    if stem[0] % 2:
        raise ValueError(
            "load_peer: expected arch= (the standard image tower): the number of heads is not in the weights, and "
            f"{32 * stem[0]} channels are no multiple of the usual 64 of a head"
        )
    return _clip_resnet(tuple(layers), stem[0])(embedding[0])


def _densenet(shapes: Shapes) -> nn.Module | None:
    from torchvision.models.densenet import DenseNet

    blocks: dict[str, int] = {}
    for name in shapes:
        match = re.match(r"features\.([^.]+)\.denselayer\d+\.conv2\.linear\.weight", name)
        if match:
            blocks[match[1]] = blocks.get(match[1], 0) + 1
    # "denseblock3" of the package bcos, "8" of B-cosification, which numbers what lies in a Sequential.
    order = sorted(blocks, key=lambda name: int(re.sub(r"\D", "", name)))
    stem = shapes.get("features.conv0.linear.weight") or shapes.get("features.0.linear.weight")
    if stem is None or stem[2:] != (7, 7) or "classifier.linear.weight" not in shapes:
        return None
    first = f"features.{order[0]}.denselayer1"
    growth = shapes[f"{first}.conv2.linear.weight"][0]
    return DenseNet(
        growth_rate=growth,
        block_config=tuple(blocks[name] for name in order),
        num_init_features=stem[0],
        bn_size=shapes[f"{first}.conv1.linear.weight"][0] // growth,
        num_classes=shapes["classifier.linear.weight"][0],
    )


def _vgg(shapes: Shapes) -> nn.Module:
    convolutions = _indices(shapes, r"features\.(\d+)\.linear\.weight")
    layers: list[int | str] = []
    for here, after in zip(convolutions, [*convolutions[1:], None], strict=True):
        layers.append(shapes[f"features.{here}.linear.weight"][0])
        if after is None or after == here + 3:  # convolution, norm, and a pooling before the next
            layers.append("M")
    return FullyConvolutionalVGG(
        layers, shapes["classifier.2.linear.weight"][0], hidden=shapes["classifier.0.linear.weight"][0]
    )


def _convnext(shapes: Shapes) -> nn.Module:
    stages = _indices(shapes, r"features\.(\d+)\.\d+\.layer_scale")
    settings = [
        (shapes[f"features.{stage}.0.layer_scale"][0], len(_indices(shapes, rf"features\.{stage}\.(\d+)\.layer_scale")))
        for stage in stages
    ]
    norm = "batch" if "features.1.running_var" in shapes else "layer"
    published = {tuple(_TINY): 0.1, tuple(_BASE): 0.5}
    return FullyConvolutionalConvNeXt(
        settings, shapes["classifier.1.linear.weight"][0], norm, published.get(tuple(settings), 0.1)
    )


def _simple_vit(shapes: Shapes) -> nn.Module:
    standard = "to_patch_embedding.linear.linear.weight" not in shapes
    tail = "weight" if standard else "linear.weight"
    dim, patch_dim = shapes[f"to_patch_embedding.linear.{tail}"][:2]
    convolutions = _indices(shapes, rf"to_patch_embedding\.conv_stem\.(\d+)\.{tail}")
    stem = []
    for i in convolutions:
        shape = shapes[f"to_patch_embedding.conv_stem.{i}.{tail}"]
        if len(shape) == 4:
            stem.append(shape[0])
    channels = stem[-1] if stem else (3 if standard else 6)
    patch_size = round((patch_dim / channels) ** 0.5)
    if dim % 64:
        raise ValueError(
            f"load_peer: expected arch= (a name, or the standard network): the number of heads is not in the weights, "
            f"and tokens of width {dim} are no multiple of the usual 64 of a head"
        )
    arguments: dict[str, Any] = dict(
        patch_size=patch_size,
        num_classes=class_count(shapes),
        dim=dim,
        depth=len(_indices(shapes, r"transformer\.encoder_(\d+)\.")),
        heads=dim // 64,
        mlp_dim=shapes[f"transformer.encoder_0.ff.net.linear1.{tail}"][0],
        conv_stem=stem,
    )
    try:
        return SimpleViT(image_size=224, **arguments)
    except ValueError:  # the weights do not know the size of the images; one of 14 x 14 tokens fits always
        reduction = 2 ** sum(after > before for before, after in zip([3, *stem], stem, strict=False))
        return SimpleViT(image_size=14 * reduction * patch_size, **arguments)
