"""Drop-in modules for B-cos networks. Each has an explanation mode in which its dynamic weights are constants."""

from .attention_pool2d import AttentionPool2d
from .batch_norm_uncentered import BatchNormUncentered2d, SyncBatchNormUncentered2d
from .conv2d import BcosConv2d
from .cosine import L2Norm, PositionMean
from .encoding import AddInverse, Normalize
from .gelu import GELU
from .group_norm import GroupNorm
from .layer_norm import LayerNorm
from .layer_norm2d import LayerNorm2d
from .linear import BcosLinear
from .logits import LogitBias
from .modes import DetachableModule, explanation_mode
from .multihead_attention import MultiheadAttention

__all__ = [
    "AddInverse",
    "AttentionPool2d",
    "BatchNormUncentered2d",
    "BcosConv2d",
    "BcosLinear",
    "DetachableModule",
    "GELU",
    "GroupNorm",
    "L2Norm",
    "LayerNorm",
    "LayerNorm2d",
    "LogitBias",
    "MultiheadAttention",
    "Normalize",
    "PositionMean",
    "SyncBatchNormUncentered2d",
    "explanation_mode",
]
