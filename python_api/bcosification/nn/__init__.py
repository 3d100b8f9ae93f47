"""Drop-in modules for B-cos networks. Each has an explanation mode in which its dynamic weights are constants."""

from .attention_pool2d import AttentionPool2d
from .batch_norm_uncentered import BatchNormUncentered2d, SyncBatchNormUncentered2d
from .conv2d import BcosConv2d
from .cosine import L2Norm, PositionMean
from .encoding import AddInverse, Normalize
from .gates import GatedActivation, Hardswish, Mish, QuickGELU, ReLU6, ScalingGate, SiLU, SqueezeExcitation, Tanh
from .gelu import GELU
from .group_norm import GroupNorm
from .layer_norm import LayerNorm
from .layer_norm2d import LayerNorm2d
from .linear import BcosLinear
from .logits import LogitBias
from .modes import DetachableModule, explanation_mode
from .multihead_attention import MultiheadAttention
from .qkv_linear import QKVLinear

__all__ = [
    "AddInverse",
    "AttentionPool2d",
    "BatchNormUncentered2d",
    "BcosConv2d",
    "BcosLinear",
    "DetachableModule",
    "GELU",
    "GatedActivation",
    "GroupNorm",
    "Hardswish",
    "L2Norm",
    "LayerNorm",
    "LayerNorm2d",
    "LogitBias",
    "Mish",
    "MultiheadAttention",
    "Normalize",
    "PositionMean",
    "QKVLinear",
    "QuickGELU",
    "ReLU6",
    "ScalingGate",
    "SiLU",
    "SqueezeExcitation",
    "SyncBatchNormUncentered2d",
    "Tanh",
    "explanation_mode",
]
