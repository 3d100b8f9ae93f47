"""What turns an image's embedding into a similarity with texts: the L2 norm, and the mean over positions."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from .modes import DetachableModule

__all__ = ["L2Norm", "PositionMean"]


class L2Norm(DetachableModule):
    """x / ‖x‖ along the last dimension; in explanation mode the norm is a constant for the gradient.

        y = x / x.norm(dim=-1, keepdim=True).clamp_min(eps).detach()          # explanation mode

    With the norm constant, y is linear in x, so that contributions add up to a cosine. (Through the norm, a cosine's
    gradient is orthogonal to x, and contributions add up to 0.)

    Args:
        eps: smallest norm that is divided by, default 1e-12, as torch.nn.functional.normalize has it.

    Shapes: (..., D), kept.

    Source: B-cosification, arXiv:2411.00715, section on CLIP.

    Example:
        >>> L2Norm()(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    def __init__(self, eps: float = 1e-12) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Half precision: squares of 256 are beyond float16.
        wide = (x.detach() if self.detach else x).to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp_min(self.eps)
        return (x / norm).to(x.dtype)


class PositionMean(DetachableModule):
    """Mean over positions of ℓ·|ℓ|^(p−1); in explanation mode |ℓ|^(p−1) is a constant for the gradient.

        y = (l * l.abs().detach() ** (p - 1)).mean(1)                         # explanation mode

    A power above 1 gives the positions that are most like the text more weight, and keeps their signs.

    Args:
        p: the power, a number >= 1, default 1 (the plain mean).

    Shapes: ℓ (N, P, T), the cosines of P positions with T texts; y (N, T).

    Raises:
        ValueError, TypeError: p is not a finite number >= 1.

    Source: B-cosification, arXiv:2411.00715, section on CLIP (its reference calls p the cosine power).

    Example:
        >>> PositionMean(2)(torch.tensor([[[0.5], [-1.0]]]))
        tensor([[-0.3750]])
    """

    def __init__(self, p: float = 1.0) -> None:
        super().__init__()
        self.p = checked_power(p)

    def forward(self, cosines: Tensor) -> Tensor:
        if self.p != 1:
            scale = (cosines.detach() if self.detach else cosines).abs() ** (self.p - 1)
            cosines = cosines * scale
        return cosines.mean(1)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


def checked_power(p: float) -> float:
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(f"PositionMean: expected p to be a number, got {type(p).__name__} {p!r}")
    if not 1 <= p < math.inf:
        raise ValueError(f"PositionMean: expected p >= 1 and finite, got {p}")
    return float(p)
