"""Images of a size or dtype that a network does not take, told apart from everything else that can go wrong in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bcosification.nn.evaluation_mode import evaluation_mode

__all__ = ["INPUT_ERRORS", "refuses_dtype", "refuses_size", "size_told"]

INPUT_ERRORS = (RuntimeError, ValueError, AssertionError, TypeError)
"""What libraries raise for a size (torchvision and timm an AssertionError, torch a RuntimeError or ValueError) or a
dtype (torch a RuntimeError, this package's ops a TypeError)."""


def refuses_size(network: nn.Module, inputs: Tensor, own: Sequence[int] | None) -> bool:
    """Whether it is the size of ``inputs`` (N, C, H, W) that ``network`` failed on: tried, as every library has errors
    of its own. One image of zeros of that size has to fail, and one of the network's ``own`` size (height, width) not.
    """
    if own is None or inputs.dim() != 4 or tuple(inputs.shape[-2:]) == tuple(own):
        return False
    return not _fails(network, inputs, own, inputs.dtype) and _fails(network, inputs, inputs.shape[-2:], inputs.dtype)


def refuses_dtype(network: nn.Module, inputs: Tensor, own: torch.dtype) -> bool:
    """Whether it is the dtype of ``inputs`` (N, C, H, W) that ``network`` failed on, likewise tried; ``own``: that of
    its parameters."""
    if inputs.dim() != 4 or inputs.dtype == own:
        return False
    size = inputs.shape[-2:]
    return not _fails(network, inputs, size, own) and _fails(network, inputs, size, inputs.dtype)


def _fails(network: nn.Module, inputs: Tensor, size: Sequence[int], dtype: torch.dtype) -> bool:
    try:
        with torch.no_grad(), evaluation_mode(network):
            network(inputs.new_zeros(1, inputs.shape[1], *size, dtype=dtype))
    except INPUT_ERRORS:
        return True
    return False


def size_told(size: Sequence[int]) -> str:
    """(height, width) in words."""
    return " x ".join(map(str, size))
