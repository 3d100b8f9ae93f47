"""timm's Xception, as Keras had it and as DeepLab aligned it."""

from __future__ import annotations

from torch import nn

from bcosification.convert.families.base import register
from bcosification.convert.families.timm_family import ClassifierHeadFamily, PooledHeadFamily, narrowed
from bcosification.convert.timm_layers import KNOWN_FORWARDS

KNOWN_FORWARDS |= {
    "timm.models.xception.Block",
    "timm.models.xception.SeparableConv2d",
    "timm.models.xception_aligned.PreSeparableConv2d",
    "timm.models.xception_aligned.PreXceptionModule",
    "timm.models.xception_aligned.SeparableConv2d",
    "timm.models.xception_aligned.XceptionModule",
}
_CONVERTS = "convolutions, BatchNorms, max pooling; the classifier before the pooling"


@register("timm.models.xception.Xception")
class TimmXception(PooledHeadFamily):
    """conv1, conv2, block1 to block12, conv3, conv4, global_pool, fc."""

    name = "timm_xception"
    title = "timm Xception"
    example_name = "legacy_xception"
    example_size = (64, 64)
    converts, keeps = _CONVERTS, "ReLUs"
    head_name = "fc"

    def example(self) -> nn.Module:
        model = narrowed(super().example(), 8)
        for i in range(5, 12):  # blocks of one kind
            model.add_module(f"block{i}", nn.Identity())
        return model


@register("timm.models.xception_aligned.XceptionAligned")
class TimmXceptionAligned(ClassifierHeadFamily):
    """stem, blocks of separable convolutions (norms before or behind them), act, a ClassifierHead."""

    name = "timm_xception_aligned"
    title = "timm Xception 41, 65, 71"
    example_options = {"mean": 0.5, "std": 0.25}
    example_size = (64, 64)
    converts, keeps = _CONVERTS, "ReLUs"

    def example(self) -> nn.Module:
        from timm.models.xception_aligned import XceptionAligned  # create_model takes no blocks

        first = {"in_chs": 64, "out_chs": 12, "stride": 2}
        last = {"in_chs": 12, "out_chs": (12, 16, 16), "stride": 1, "no_skip": True, "start_with_relu": False}
        blocks = [first, {"in_chs": 12, "out_chs": 12, "stride": 1}, last]
        return XceptionAligned(blocks, num_classes=5)
