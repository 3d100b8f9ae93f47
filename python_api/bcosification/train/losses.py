"""The papers' classification losses: binary cross-entropy on logits, a wrapper around torch's function each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["LOSSES", "BinaryCrossEntropy", "UniformOffLabelsBCE", "build_loss"]


def _dense(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Targets of the shape and dtype of the logits: class numbers (N,) become one-hot rows."""
    if target.shape == logits.shape:
        return target.to(logits.dtype)
    if target.shape != logits.shape[:1] or target.is_floating_point():
        raise ValueError(
            f"loss: expected class numbers of shape {tuple(logits.shape[:1])} or dense targets of shape "
            f"{tuple(logits.shape)}, got {target.dtype} of shape {tuple(target.shape)}"
        )
    return F.one_hot(target, logits.shape[-1]).to(logits.dtype)


class BinaryCrossEntropy(nn.Module):
    """Binary cross-entropy of every class against one-hot targets.

        F.binary_cross_entropy_with_logits(logits, F.one_hot(target, C).float())

    Args:
        reduction: "mean" (over samples and classes, default), "sum" or "none".

    Call with logits (N, C) and targets, class numbers (N,) or dense (N, C). Source: B-cos v2, section 4.
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(logits, _dense(logits, target), reduction=self.reduction)


class UniformOffLabelsBCE(nn.Module):
    """Binary cross-entropy in which the other classes' targets are 1/C instead of 0.

        F.binary_cross_entropy_with_logits(logits, F.one_hot(target, C).float().clamp(min=1 / C))

    Args:
        off_label: the value of the other classes; None for 1/C.
        reduction: "mean" (over samples and classes, default), "sum" or "none".

    Call with logits (N, C) and targets, class numbers (N,) or dense (N, C). Source: B-cos v2, section 4, and
    B-cosification's training recipe.
    """

    def __init__(self, off_label: float | None = None, reduction: str = "mean"):
        super().__init__()
        if off_label is not None and not 0 < off_label <= 1:
            raise ValueError(f"UniformOffLabelsBCE: expected 0 < off_label <= 1 or None, got {off_label}")
        self.off_label, self.reduction = off_label, reduction

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        off = 1 / logits.shape[-1] if self.off_label is None else self.off_label
        target = _dense(logits, target).clamp(min=off)
        return F.binary_cross_entropy_with_logits(logits, target, reduction=self.reduction)


LOSSES = {
    "bce_uniform": UniformOffLabelsBCE,
    "bce": BinaryCrossEntropy,
    "cross_entropy": nn.CrossEntropyLoss,
}


def build_loss(name: str) -> nn.Module:
    """The loss called `name`: "bce_uniform" (the papers' for training), "bce", or "cross_entropy"."""
    if name not in LOSSES:
        raise ValueError(f"loss: expected one of {tuple(LOSSES)}, got {name!r}")
    return LOSSES[name]()
