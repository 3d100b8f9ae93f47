"""Drop-in modules for B-cos networks. Each has an explanation mode in which its dynamic weights are constants."""

from .attention_pool2d import AttentionPool2d
from .batch_norm_uncentered import BatchNormUncentered2d, SyncBatchNormUncentered2d
from .cond_conv2d import BcosCondConv2d
from .constant_embedding import ConstantEmbedding
from .conv2d import BcosConv2d
from .conv2d_same import BcosConv2dSame
from .cosine import L2Norm, PositionMean
from .encoding import AddInverse, Normalize
from .gates import GatedActivation, Hardswish, Mish, QuickGELU, ReLU6, ScalingGate, SiLU, SqueezeExcitation, Tanh
from .gelu import GELU
from .global_response_norm import GlobalResponseNorm, ScaleAndShift
from .group_norm import GroupNorm
from .held_output import HeldOutput
from .layer_norm import LayerNorm
from .layer_norm2d import LayerNorm2d
from .linear import BcosLinear
from .logits import LogitBias
from .modes import DetachableModule, explanation_mode
from .multihead_attention import MultiheadAttention
from .norm_act import BatchNormAct2d, GroupNormAct, LayerNormAct, LayerNormAct2d, SyncBatchNormAct2d
from .qkv_linear import QKVLinear
from .rms_norm import RMSNorm, RMSNorm2d

__all__ = [
    "AddInverse",
    "AttentionPool2d",
    "BatchNormAct2d",
    "BatchNormUncentered2d",
    "BcosCondConv2d",
    "BcosConv2d",
    "BcosConv2dSame",
    "BcosLinear",
    "ConstantEmbedding",
    "DetachableModule",
    "GELU",
    "GatedActivation",
    "GlobalResponseNorm",
    "GroupNorm",
    "GroupNormAct",
    "Hardswish",
    "HeldOutput",
    "L2Norm",
    "LayerNorm",
    "LayerNorm2d",
    "LayerNormAct",
    "LayerNormAct2d",
    "LogitBias",
    "Mish",
    "MultiheadAttention",
    "Normalize",
    "PositionMean",
    "QKVLinear",
    "QuickGELU",
    "RMSNorm",
    "RMSNorm2d",
    "ReLU6",
    "ScaleAndShift",
    "ScalingGate",
    "SiLU",
    "SqueezeExcitation",
    "SyncBatchNormAct2d",
    "SyncBatchNormUncentered2d",
    "Tanh",
    "explanation_mode",
]
