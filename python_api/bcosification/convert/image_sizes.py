"""Images of a size that a network does not take, told apart from everything else that can go wrong in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bcosification.nn.evaluation_mode import evaluation_mode

__all__ = ["SIZE_ERRORS", "refuses_size", "size_told"]

SIZE_ERRORS = (RuntimeError, ValueError, AssertionError)
"""What libraries raise for a size: torchvision and timm an AssertionError, torch a RuntimeError or ValueError."""


def refuses_size(network: nn.Module, inputs: Tensor, own: Sequence[int] | None) -> bool:
    """Whether it is the size of ``inputs`` (N, C, H, W) that ``network`` failed on: tried, as every library has errors
    of its own. One image of zeros of that size has to fail, and one of the network's ``own`` size (height, width) not.
    """
    if own is None or inputs.dim() != 4 or tuple(inputs.shape[-2:]) == tuple(own):
        return False

    def fails(size: Sequence[int]) -> bool:
        try:
            with torch.no_grad(), evaluation_mode(network):
                network(inputs.new_zeros(1, inputs.shape[1], *size))
        except SIZE_ERRORS:
            return True
        return False

    return not fails(own) and fails(inputs.shape[-2:])


def size_told(size: Sequence[int]) -> str:
    """(height, width) in words."""
    return " x ".join(map(str, size))
