"""timm's ViTamin, a VisionTransformer whose patches are made by a stack of convolutions and whose MLPs are gated."""

from __future__ import annotations

from torch import nn

from bcosification.convert.rules import Options, rule
from bcosification.convert.timm_layers import KNOWN_FORWARDS, convert_children, held

KNOWN_FORWARDS |= {
    "timm.models.vitamin.Downsample2d",
    "timm.models.vitamin.MbConvLNBlock",
    "timm.models.vitamin.MbConvStages",
    "timm.models.vitamin.Stem",
    "timm.models.vitamin.StridedConv",
}


@rule("timm.models.vitamin.GeGluMlp")
def geglu_mlp(layer: nn.Module, options: Options) -> nn.Module:
    """GeGluMlp: w1 and w2 become B-cos; the gate, made by w0, which stays linear, is held."""
    convert_children(layer, options, keep=("act", "w0"))
    held(layer, "act")
    layer.constant_children = ("act", "w0")
    return layer
