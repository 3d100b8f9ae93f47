"""torchvision's Swin Transformer, versions 1 and 2."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.families.base import register
from bcosification.convert.families.positionwise_head import (
    PositionwiseHead,
    PositionwiseHeadFamily,
    largest_probability,
)
from bcosification.convert.rules import NoRule, Options, linear, qkv_linear, rule

_V1 = "torchvision.models.swin_transformer.ShiftedWindowAttention"
_V2 = "torchvision.models.swin_transformer.ShiftedWindowAttentionV2"


class WindowAttention(ChangedForward):
    """Attention in (shifted) windows whose projections are called as the layers they are.

        q, k, v = qkv(windows of x);  y = windows back to x's places of proj(softmax(s(q, k) + bias + mask) @ v)

    with s the scaled dot product, or the cosine with a learnt scale where there is ``logit_scale`` (version 2).
    torchvision's forward passes the projections' weights to one function, which replacing layers cannot reach.
    qkv is a QKVLinear, so the attention matrix is a constant in explanation mode; proj is a BcosLinear.
    """

    # What makes version 2's position bias is part of the attention matrix alone.
    constant_children = ("cpb_mlp",)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        rows, columns = self.window_size
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        down, across = x.shape[1] // rows, x.shape[2] // columns
        # A window as large as the map is not shifted.
        shift = [s if n > 1 else 0 for s, n in zip(self.shift_size, (down, across), strict=True)]
        if any(shift):
            x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        windows = x.view(batch, down, rows, across, columns, channels).permute(0, 1, 3, 2, 4, 5)
        y = self._attend(windows.reshape(batch * down * across, rows * columns, channels), shift, down, across)
        y = y.view(batch, down, across, rows, columns, channels).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(batch, down * rows, across * columns, channels)
        if any(shift):
            y = torch.roll(y, (shift[0], shift[1]), (1, 2))
        return y[:, :height, :width].contiguous()

    def _attend(self, x: Tensor, shift: list[int], down: int, across: int) -> Tensor:
        """Attention among the tokens of each window, x (windows, tokens, channels)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logit_scale = getattr(self, "logit_scale", None)
        if logit_scale is None:
            scores = (q * q.shape[-1] ** -0.5) @ k.mT
        else:
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
            scores = scores * logit_scale.clamp(max=math.log(100.0)).exp()
        scores = scores + self.get_relative_position_bias()
        if any(shift):
            mask = self._mask(shift, down, across, scores)
            scores = (scores.unflatten(0, (-1, down * across)) + mask).flatten(0, 1)
        attention = F.dropout(F.softmax(scores, dim=-1), self.attention_dropout, self.training)
        y = self.proj((attention @ v).transpose(1, 2).flatten(-2))
        return F.dropout(y, self.dropout, self.training)

    def _mask(self, shift: list[int], down: int, across: int, like: Tensor) -> Tensor:
        """-100 between tokens that the shift brought into one window, else 0: (windows, 1, tokens, tokens)."""
        regions = []
        for count, size, moved in zip((down, across), self.window_size, shift, strict=True):
            position = torch.arange(count * size, device=like.device)
            length = count * size
            # three runs of rows: those of whole windows, and both parts of the last one
            regions.append((position >= length - size).long() + (position >= length - (moved or length)).long())
        region = 3 * regions[0][:, None] + regions[1]
        rows, columns = self.window_size
        region = region.view(down, rows, across, columns).transpose(1, 2).reshape(down * across, 1, rows * columns)
        different = region.mT != region
        return torch.zeros_like(different, dtype=like.dtype).masked_fill(different, -100.0).unsqueeze(1)


@rule(_V1, _V2)
def window_attention(layer: nn.Module, options: Options) -> nn.Module:
    """ShiftedWindowAttention, replaced whole: qkv stays linear, with q and k constant; proj becomes a BcosLinear."""
    for name in ("qkv", "proj"):
        part = getattr(layer, name)
        if type(part) is not nn.Linear or part._forward_hooks or part._forward_pre_hooks:
            raise NoRule(f"its {name} is not a plain nn.Linear, which its own forward reads the weight of")
    layer.qkv = qkv_linear(layer.qkv, options, key_bias=not hasattr(layer, "logit_scale"))
    layer.proj = linear(layer.proj, options)
    return change_class(layer, WindowAttention)


class HeadBeforePoolSwin(PositionwiseHead):
    """The head, a 1x1 convolution, behind the last LayerNorm and before the pooling."""

    trunk = ("features", "norm", "permute")
    classifiers = ("head",)
    pooling = ("avgpool", "flatten")


@register("torchvision.models.swin_transformer.SwinTransformer")
class TorchvisionSwin(PositionwiseHeadFamily):
    """features (patches, stages of blocks, patch merging), norm, permute, avgpool, flatten, head.

    The LayerNorm comes before the pooling in the original, too: the moved head is exact at B = 1.
    """

    name = "torchvision_swin"
    title = "torchvision Swin Transformer, V1 and V2"
    example_size = (40, 40)
    converts = "patches, MLPs, output projections, patch merging, LayerNorms, GELUs; the head before the pooling"
    keeps = "q, k, v projections, position biases; q and k constant"
    reader = "features.0.0"
    mixin = HeadBeforePoolSwin

    def input_size(self, model: nn.Module) -> tuple[int, int] | None:
        return (256, 256) if _version(model) == 2 else None

    def architecture(self, model: nn.Module) -> dict[str, Any]:
        stages = list(model.features)[1::2]
        first, probabilities = stages[0][0], [block.stochastic_depth.p for stage in stages for block in stage]
        return {
            "version": _version(model),
            "patch_size": list(model.features[0][0].kernel_size),
            "embed_dim": model.features[0][0].out_channels,
            "depths": [len(stage) for stage in stages],
            "num_heads": [stage[0].attn.num_heads for stage in stages],
            "window_size": list(first.attn.window_size),
            "mlp_ratio": first.mlp[0].out_features / first.mlp[0].in_features,
            "dropout": first.attn.dropout,
            "attention_dropout": first.attn.attention_dropout,
            "stochastic_depth_prob": largest_probability(probabilities, len(probabilities) - 1),
            "num_classes": model.head.out_features,
            "eps": model.norm.eps,
        }

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        from torchvision.models import swin_transformer

        arguments = dict(architecture)
        suffix = "V2" if arguments.pop("version") == 2 else ""
        return swin_transformer.SwinTransformer(
            block=getattr(swin_transformer, f"SwinTransformerBlock{suffix}"),
            downsample_layer=getattr(swin_transformer, f"PatchMerging{suffix}"),
            norm_layer=partial(nn.LayerNorm, eps=arguments.pop("eps")),
            **arguments,
        )

    def example(self) -> nn.Module:
        return self.build(
            {
                "version": 2,
                "patch_size": [4, 4],
                "embed_dim": 8,
                "depths": [2, 2],
                "num_heads": [2, 4],
                "window_size": [4, 4],
                "mlp_ratio": 2.0,
                "num_classes": 5,
                "eps": 1e-5,
            }
        )


def _version(model: nn.Module) -> int:
    return 2 if type(model.features[1][0]).__name__ == "SwinTransformerBlockV2" else 1
