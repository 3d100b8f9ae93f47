"""Norms with the activation behind them in one module, as timm has them: their keys are the norm's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .batch_norm_uncentered import BatchNormUncentered2d, SyncBatchNormUncentered2d
from .conv2d import BcosConv2d
from .group_norm import GroupNorm
from .layer_norm import LayerNorm
from .layer_norm2d import LayerNorm2d

__all__ = ["BatchNormAct2d", "GroupNormAct", "LayerNormAct", "LayerNormAct2d", "SyncBatchNormAct2d"]


class BatchNormAct2d(BatchNormUncentered2d):
    """`BatchNormUncentered2d`, then ``drop``, then ``act``: y = act(drop(norm(x))), in one pass where act is nn.ReLU.

    Args:
        num_features and further ones: BatchNormUncentered2d's.
        drop, act: modules, default nn.Identity. ``act`` has its own explanation mode.

    Shapes: x (N, C, H, W), kept. Keys: BatchNormUncentered2d's, and those of drop and act.

    Example:
        >>> BatchNormAct2d(8, act=nn.ReLU())(torch.rand(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self, num_features: int, *args: Any, drop: nn.Module | None = None, act: nn.Module | None = None, **options: Any
    ) -> None:
        super().__init__(num_features, *args, **options)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act

    def _own_activation(self) -> str | None:
        """What the norm's pass does of drop and act: "relu" where that is all, "none" if they do nothing, else None."""
        for part in (self.drop, self.act):
            if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
                return None
        if type(self.drop) is not nn.Identity:
            return None
        return {nn.ReLU: "relu", nn.Identity: "none"}.get(type(self.act))

    def forward(self, x: Tensor, residual: Tensor | None = None, activation: str | None = None) -> Tensor:
        """y = activation(act(drop(norm(x))) + residual); ``activation`` None or "relu"."""
        own = self._own_activation()
        if own == "none":
            return super().forward(x, residual, activation)
        if own == "relu":
            y = super().forward(x, None, "relu")
        else:
            self._check(x, activation)
            y = self.act(self.drop(super().forward(x)))
        return _added(y, residual, activation)

    def behind(
        self,
        conv: BcosConv2d,
        x: Tensor,
        residual: Tensor | None = None,
        activation: str | None = None,
        recompute: str | None = None,
    ) -> Tensor:
        own = self._own_activation()
        if own == "none":
            return super().behind(conv, x, residual, activation, recompute)
        inner = "inner" if recompute in ("inner", "both") else None
        if own == "relu":
            y = super().behind(conv, x, None, "relu", recompute if residual is None else inner)
        else:
            y = self.act(self.drop(super().behind(conv, x, None, None, inner)))
        return _added(y, residual, activation)

    def recomputed(self, y: Tensor, x: Tensor, activation: str | None = None) -> Tensor:
        own = self._own_activation()
        if own is None:
            return y
        return super().recomputed(y, x, "relu" if own == "relu" else activation)


def _added(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    y = y if residual is None else y + residual
    return y.relu() if activation == "relu" else y


class SyncBatchNormAct2d(BatchNormAct2d, SyncBatchNormUncentered2d):
    """`BatchNormAct2d` whose training variance is that of all processes, as `SyncBatchNormUncentered2d`'s."""


BatchNormAct2d.synchronised = SyncBatchNormAct2d


class _ThenAct:
    """Mixin of norms with drop and act behind them."""

    drop: nn.Module
    act: nn.Module

    def __init__(self, *args: Any, drop: nn.Module | None = None, act: nn.Module | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class GroupNormAct(_ThenAct, GroupNorm):
    """`GroupNorm`, then ``drop``, then ``act`` (modules, default nn.Identity): y = act(drop(norm(x)))."""


class LayerNormAct(_ThenAct, LayerNorm):
    """`LayerNorm`, then ``drop``, then ``act`` (modules, default nn.Identity): y = act(drop(norm(x)))."""


class LayerNormAct2d(_ThenAct, LayerNorm2d):
    """`LayerNorm2d`, then ``drop``, then ``act`` (modules, default nn.Identity): y = act(drop(norm(x)))."""
