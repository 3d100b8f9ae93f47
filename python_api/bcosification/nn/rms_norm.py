"""RMSNorm whose scale is a constant in explanation mode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gates import ScalingGate

__all__ = ["RMSNorm", "RMSNorm2d"]


class RMSNorm(ScalingGate):
    """x divided by its root mean square; in explanation mode what it is multiplied by is a constant for the gradient.

        scale = (x.square().mean(dims, keepdim=True) + eps).rsqrt() * weight
        y = x * scale.detach()                                                # explanation mode

    It adds nothing, so all of y is attributed to x.

    Args:
        normalized_shape: size or sizes of the last dimensions.
        eps: added to the mean square; None (default) for torch's, the smallest step of x's type.
        elementwise_affine: whether there is a weight, default True.
        device, dtype: of the weight.

    Shapes: x (..., *normalized_shape), kept. The keys are nn.RMSNorm's.

    Source: arXiv:1910.07467; norms as constants of explanations: B-cos networks v2, arXiv:2306.10898, appendix.

    Example:
        >>> RMSNorm(16)(torch.rand(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.normalized_shape, self.eps, self.elementwise_affine = shape, eps, elementwise_affine
        weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype)) if elementwise_affine else None
        self.register_parameter("weight", weight)

    def _root(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        """1 / root mean square, in float32 at least."""
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide.square().mean(dims, keepdim=True) + eps).rsqrt()

    def scale(self, x: Tensor) -> Tensor:
        root = self._root(x, tuple(range(-len(self.normalized_shape), 0)))
        return (root if self.weight is None else root * self.weight).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not self.detach:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return super().forward(x)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class RMSNorm2d(RMSNorm):
    """`RMSNorm` over the channels of every position: x (N, C, H, W), normalized_shape is C."""

    def scale(self, x: Tensor) -> Tensor:
        root = self._root(x, (1,))
        return (root if self.weight is None else root * self.weight.view(-1, 1, 1)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"RMSNorm2d: expected x of shape (N, C, H, W), got {tuple(x.shape)}")
        return ScalingGate.forward(self, x)
