"""CLIP's attention pooling as a dynamic linear layer: one vector of an image, or one of every position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bcos_kernels

from .cosine import L2Norm
from .linear import BcosLinear
from .modes import DetachableModule

__all__ = ["AttentionPool2d"]

MODES = ("pool", "unpool")


class AttentionPool2d(DetachableModule):
    """CLIP's AttentionPool2d without positional embedding and biases, in two modes.

        tokens = x.flatten(2).mT                                              # (N, H·W, C)
        # "pool": the mean token asks, all tokens answer; q, k constant in explanation mode, v and c_proj linear
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        y = c_proj.weight @ merge_heads(softmax(q(tokens[:, :1]) @ k(tokens).mT / head_dim**0.5) @ v(tokens))
        # "unpool": v linear, c_proj a B-cos layer at every position, every position of length 1
        y = c_proj(v(tokens)); y = y / y.norm(dim=-1, keepdim=True)

    Args:
        embed_dim: channels C of x; num_heads divides it.
        output_dim: size of the embedding, default None: embed_dim.
        device, dtype: of the parameters.
        b, normalize_weight: exponent (default 2) and weight normalisation (default False) of c_proj.
        mode: "pool" (default) or "unpool"; may be set later, both use the same weights.

    Shapes: x (N, C, H, W) of any H and W; y (N, output_dim) with "pool", (N, H·W, output_dim) with "unpool".

    Raises:
        ValueError: num_heads does not divide embed_dim, or another mode.

    Source: B-cosification, arXiv:2411.00715, section on CLIP. Its reference bypasses B-cos in "pool" as this does, by
    reading c_proj's weight alone.

    Example:
        >>> AttentionPool2d(64, 4, 32)(torch.rand(2, 64, 7, 7)).shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        output_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        b: float | Tensor = 2,
        normalize_weight: bool = False,
        mode: str = "pool",
    ) -> None:
        super().__init__()
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(
                f"AttentionPool2d: expected embed_dim divisible by num_heads (both positive), got {embed_dim} and "
                f"{num_heads}"
            )
        factory = {"device": device, "dtype": dtype}
        output_dim = embed_dim if output_dim is None else output_dim
        self.embed_dim, self.output_dim, self.num_heads = embed_dim, output_dim, num_heads
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(embed_dim, embed_dim, bias=False, **factory))
        self.c_proj = BcosLinear(embed_dim, output_dim, b=b, normalize_weight=normalize_weight, **factory)
        self.norm = L2Norm()
        self.mode = mode

    @property
    def mode(self) -> str:
        """"pool" or "unpool"."""
        return self._mode

    @mode.setter
    def mode(self, value: str) -> None:
        if value not in MODES:
            raise ValueError(f"AttentionPool2d: expected mode to be 'pool' or 'unpool', got {value!r}")
        self._mode = value

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.embed_dim:
            raise ValueError(f"AttentionPool2d: expected x of shape (N, {self.embed_dim}, H, W), got {tuple(x.shape)}")
        tokens = x.flatten(2).mT
        return self._pooled(tokens) if self.mode == "pool" else self.norm(self.c_proj(self.v_proj(tokens)))

    def _pooled(self, tokens: Tensor) -> Tensor:
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        asked = tokens.detach() if self.detach else tokens
        q, k, v = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(asked[:, :1]), self.k_proj(asked), self.v_proj(tokens))
        )
        heads = F.scaled_dot_product_attention(q, k, v)
        pooled = heads.transpose(1, 2).flatten(1)
        return bcos_kernels.linear(
            pooled, self.c_proj.weight, b=1.0, normalize_weight=self.c_proj.normalize_weight, detach=self.detach
        )

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, mode={self.mode!r}"
