"""An embedding that is no part of what is explained: positions, segments."""

from __future__ import annotations

from torch import Tensor, nn

from .modes import DetachableModule, per_sample

__all__ = ["ConstantEmbedding"]


class ConstantEmbedding(DetachableModule, nn.Embedding):
    """nn.Embedding whose output counts as a constant of the explanation (``constant_gain`` multiplies it).

        y = F.embedding(ids, weight)

    For embeddings that are added to those of the words: a position says nothing about what stands there. It has nothing
    dynamic, so explanation mode changes nothing.

    Arguments, shapes and keys are nn.Embedding's: ids (N, T), or (1, T) for all N alike; y (N or 1, T, D).

    Source: the constant of an explanation: B-cos networks v2, arXiv:2306.10898, section 3.

    Example:
        >>> ConstantEmbedding(512, 16)(torch.arange(7)[None]).shape
        torch.Size([1, 7, 16])
    """

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        gain = self.constant_gain
        if gain is None:
            return y
        shared = y.shape[0] == 1  # the same positions for all samples, each of which has a gain of its own
        return y * per_sample(gain, gain.shape[0] if shared else y.shape[0], y.dim(), type(self).__name__)
