"""timm's CoAtNet, CoAtNeXt, MaxViT and MaxxViT."""

from __future__ import annotations

from torch import nn

from bcosification.convert import timm_attention
from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import ClassifierHeadFamily
from bcosification.convert.rules import Options, rule
from bcosification.convert.timm_attention import hold_channels
from bcosification.convert.timm_layers import KNOWN_FORWARDS, convert_children

_BLOCKS = (
    "ConvNeXtBlock", "Downsample2d", "MaxxVitBlock", "MaxxVitStage", "MbConvBlock", "ParallelMaxxVitBlock",
    "ParallelPartitionAttention", "PartitionAttention2d", "PartitionAttentionCl", "Stem", "TransformerBlock2d",
)  # fmt: skip
KNOWN_FORWARDS |= {f"timm.models.maxxvit.{name}" for name in _BLOCKS}


def _parts_first(layer: nn.Module) -> None:
    """The joint projection's outputs as all queries, all keys, all values, where they come head by head."""
    if not layer.head_first:
        return
    layer.head_first = False
    for name in ("weight", "bias"):
        old = layer.qkv._parameters[name]
        if old is not None:
            new = old.detach().unflatten(0, (layer.num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
            layer.qkv._parameters[name] = nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)


@rule("timm.models.maxxvit.AttentionCl")
def attention(layer: nn.Module, options: Options) -> nn.Module:
    """AttentionCl, on channels last: qkv stays linear, q and k are held, proj becomes B-cos."""
    _parts_first(layer)
    return timm_attention.attention(layer, options)


@rule("timm.models.maxxvit.Attention2d")
def attention2d(layer: nn.Module, options: Options) -> nn.Module:
    """Attention2d, whose projections are 1x1 convolutions: qkv stays linear, q and k are held, proj becomes B-cos."""
    _parts_first(layer)
    convert_children(layer, options, keep=("qkv",))
    hold_channels(layer.qkv, 2 * layer.qkv.out_channels // 3)
    layer.constant_children = tuple(name for name in ("rel_pos",) if layer._modules.get(name) is not None)
    return layer


@register("timm.models.maxxvit.MaxxVit")
class TimmMaxxVit(ClassifierHeadFamily):
    """stem, stages of blocks of convolutions (MBConv, ConvNeXt) and attention (whole, windows, grids), norm, head."""

    name = "timm_maxxvit"
    title = "timm CoAtNet, CoAtNeXt, MaxViT, MaxxViT"
    example_name = "maxvit_rmlp_pico_rw_256"
    example_arguments = {
        "img_size": 64, "embed_dim": (32, 32, 32, 32), "depths": (1, 1, 1, 1), "stem_width": (8, 8),
    }  # fmt: skip
    converts = "convolutions, norms, MLPs, output projections, SiLUs, GELUs; the classifier before the pooling"
    keeps = "q, k, v projections, position biases, squeeze-and-excitation; q, k and scales constant"
    cannot = "be exact at B = 1 where the head's norm or tanh follows the pooling (head='keep' is)"
