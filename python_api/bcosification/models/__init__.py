"""Architectures of the papers that no library ships: standard networks, to be converted by ``bcosify``.

    network = bcosification.models.simple_vit_s_patch16_224(weights="standard_simple_vit_s_patch16_224-f2934fcdcf.pth")
    model = bcosification.bcosify(network)

SimpleViT and ViT_c (SimpleViT behind a convolutional stem) are those that B-cos v2 and B-cosification use. Nothing here
needs more than torch, except the networks of ``fully_convolutional``, which need torchvision.
"""

from .fully_convolutional import FullyConvolutionalConvNeXt, FullyConvolutionalVGG
from .simple_vit import (
    CONSTRUCTORS,
    SimpleViT,
    simple_vit_b_patch16_224,
    simple_vit_l_patch16_224,
    simple_vit_s_patch16_224,
    simple_vit_ti_patch16_224,
    vitc_b_patch1_14,
    vitc_l_patch1_14,
    vitc_s_patch1_14,
    vitc_ti_patch1_14,
)

__all__ = [
    "CONSTRUCTORS",
    "FullyConvolutionalConvNeXt",
    "FullyConvolutionalVGG",
    "SimpleViT",
    "simple_vit_b_patch16_224",
    "simple_vit_l_patch16_224",
    "simple_vit_s_patch16_224",
    "simple_vit_ti_patch16_224",
    "vitc_b_patch1_14",
    "vitc_l_patch1_14",
    "vitc_s_patch1_14",
    "vitc_ti_patch1_14",
]
