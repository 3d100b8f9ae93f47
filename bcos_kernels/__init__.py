"""Fused B-cos transforms as differentiable torch functions: tensors in, tensors out."""

from . import flops
from .dispatch import backend, backends, dispatched, timed
from .functional import batch_norm_uncentered, conv2d, conv2d_batch_norm, linear, linear_gelu
from .recompute import recomputed

__version__ = "0.1.0"
__all__ = [
    "backend",
    "backends",
    "batch_norm_uncentered",
    "conv2d",
    "conv2d_batch_norm",
    "dispatched",
    "linear",
    "linear_gelu",
    "recomputed",
    "timed",
]

flops.register_with_counter()
