"""Multi-head attention whose attention matrix is a constant in explanation mode, with a B-cos output projection."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import BcosLinear
from .modes import DetachableModule, per_sample

__all__ = ["MultiheadAttention"]


class MultiheadAttention(DetachableModule):
    """Drop-in for nn.MultiheadAttention: v linear, q and k constant in explanation mode, the output projection B-cos.

        q, k, v = (linear projections of query, key, value, split into heads)
        if explaining: q, k = q.detach(), k.detach()
        y = out_proj((softmax(q @ k.mT / head_dim**0.5 + mask) @ v).merge_heads())

    Constructor arguments, forward arguments, results and the keys of state_dict are nn.MultiheadAttention's.
    ``out_proj`` is a `BcosLinear`, or an nn.Linear with ``bcos_out_proj=False``.

    Args:
        embed_dim: size of query and output; num_heads divides it.
        dropout: of the attention matrix in training mode, default 0.
        bias: biases of the projections, default True (out_proj's too, unless ``out_proj_bias`` says otherwise).
        add_bias_kv, add_zero_attn, kdim, vdim, device, dtype: as nn.MultiheadAttention's.
        batch_first: (N, L, E) instead of (L, N, E), default False.
        b, normalize_weight: exponent (default 2) and weight normalisation (default False) of the output projection.
        out_proj_bias: default None, the same as ``bias``.
        bcos_out_proj: default True.

    Shapes: query (L, N, E), key (S, N, kdim), value (S, N, vdim), with ``batch_first`` N first, or without N; returns
    (output of query's shape, attention weights (N, L, S), (N, num_heads, L, S) without averaging, or None).

    Raises:
        ValueError: if num_heads does not divide embed_dim, or shapes do not fit.

    Source: B-cos networks v2, arXiv:2306.10898, section 3.3; B-cosification, arXiv:2411.00715.

    Example:
        >>> attention = MultiheadAttention(16, 4, batch_first=True)
        >>> x = torch.rand(2, 5, 16)
        >>> attention(x, x, x, need_weights=False)[0].shape
        torch.Size([2, 5, 16])
    """

    # nn.TransformerEncoderLayer reads this: False keeps it off the fast path, which would use out_proj.weight plainly.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        b: float | Tensor = 2,
        normalize_weight: bool = False,
        out_proj_bias: bool | None = None,
        bcos_out_proj: bool = True,
    ) -> None:
        super().__init__()
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(
                f"MultiheadAttention: expected embed_dim divisible by num_heads (both positive), "
                f"got {embed_dim} and {num_heads}"
            )
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn
        factory = {"device": device, "dtype": dtype}

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, **factory))

        packed = self.kdim == embed_dim and self.vdim == embed_dim
        self.register_parameter("in_proj_weight", parameter(3 * embed_dim, embed_dim) if packed else None)
        self.register_parameter("q_proj_weight", None if packed else parameter(embed_dim, embed_dim))
        self.register_parameter("k_proj_weight", None if packed else parameter(embed_dim, self.kdim))
        self.register_parameter("v_proj_weight", None if packed else parameter(embed_dim, self.vdim))
        self.register_parameter("in_proj_bias", parameter(3 * embed_dim) if bias else None)
        out_bias = bias if out_proj_bias is None else out_proj_bias
        if bcos_out_proj:
            self.out_proj: nn.Module = BcosLinear(
                embed_dim, embed_dim, bias=out_bias, b=b, normalize_weight=normalize_weight, **factory
            )
        else:
            self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_bias, **factory)
        self.register_parameter("bias_k", parameter(1, 1, embed_dim) if add_bias_kv else None)
        self.register_parameter("bias_v", parameter(1, 1, embed_dim) if add_bias_kv else None)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def _constant(self, bias: Tensor | None, batch: int) -> Tensor | None:
        """A bias that counts as an additive constant, (E,) → (E,) or (N, 1, E) with its gain per sample."""
        if bias is None or self.constant_gain is None:
            return bias
        return bias * per_sample(self.constant_gain, batch, 3, "MultiheadAttention").to(bias.dtype)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Batch-first query, key, value → q, k, v of size embed_dim."""
        bias = self.in_proj_bias
        bias_q, bias_k, bias_v = (None, None, None) if bias is None else bias.chunk(3)
        if self.in_proj_weight is None:
            weight_q, weight_k, weight_v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        elif query is key and key is value and self.constant_gain is None:
            return F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
        else:
            weight_q, weight_k, weight_v = self.in_proj_weight.chunk(3)
        bias_v = self._constant(bias_v, value.shape[0])
        v = F.linear(value, weight_v)
        if bias_v is not None:
            v = v + bias_v
        return F.linear(query, weight_q, bias_q), F.linear(key, weight_k, bias_k), v

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, sources: int, is_causal: bool
    ) -> Tensor | None:
        """Both masks as one additive float mask, broadcastable over (N, heads, L, S)."""
        batch, _, targets, _ = q.shape
        if is_causal and attn_mask is None:
            raise ValueError("MultiheadAttention: expected attn_mask with is_causal=True, got None")
        total = None
        if attn_mask is not None:
            if attn_mask.dim() == 2:
                expected: tuple[int, ...] = (targets, sources)
            else:
                expected = (batch * self.num_heads, targets, sources)
            if tuple(attn_mask.shape) != expected:
                raise ValueError(
                    f"MultiheadAttention: expected attn_mask of shape {expected}, got {tuple(attn_mask.shape)}"
                )
            total = _additive(attn_mask, q.dtype, "attn_mask")
            if total.dim() == 3:
                total = total.view(batch, self.num_heads, targets, sources)
        if key_padding_mask is not None:
            if tuple(key_padding_mask.shape) != (batch, sources):
                raise ValueError(
                    f"MultiheadAttention: expected key_padding_mask of shape {(batch, sources)}, "
                    f"got {tuple(key_padding_mask.shape)}"
                )
            padding = _additive(key_padding_mask, q.dtype, "key_padding_mask").view(batch, 1, 1, sources)
            total = padding if total is None else total + padding
        extra = (self.bias_k is not None) + self.add_zero_attn
        return total if total is None or not extra else F.pad(total, (0, extra))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend. Masks: True (or −inf) keeps a position out; ``is_causal`` says that attn_mask is a causal one."""
        same_self = query is key and key is value
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            raise ValueError(
                "MultiheadAttention: expected query, key and value of 2 dimensions (unbatched) or 3, got "
                f"{query.dim()}, {key.dim()} and {value.dim()}"
            )
        sizes = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        for name, (tensor, size) in sizes.items():
            if tensor.shape[-1] != size:
                raise ValueError(f"MultiheadAttention: expected {name}.size(-1) == {size}, got {tensor.shape[-1]}")
        batched = query.dim() == 3

        def batch_first(x: Tensor) -> Tensor:
            if not batched:
                return x.unsqueeze(0)
            return x if self.batch_first else x.transpose(0, 1)

        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        query = batch_first(query)
        key, value = (query, query) if same_self else (batch_first(key), batch_first(value))
        q, k, v = self._project(query, key, value)
        mask_sources = k.shape[1]
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], 1)
            bias_v = self._constant(self.bias_v, v.shape[0])
            v = torch.cat([v, bias_v.expand(v.shape[0], -1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = self._split(q), self._split(k), self._split(v)
        if self.detach:
            q, k = q.detach(), k.detach()
        mask = self._mask(attn_mask, key_padding_mask, q, mask_sources, is_causal)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(self.head_dim)) @ k.mT
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        y = self.out_proj(heads.transpose(1, 2).flatten(-2))
        if not batched:
            y = y.squeeze(0)
        elif not self.batch_first:
            y = y.transpose(0, 1)
        return y, weights

    def extra_repr(self) -> str:
        text = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"
        return text + (f", dropout={self.dropout}" if self.dropout else "")


def _additive(mask: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise TypeError(f"MultiheadAttention: expected {name} to be bool or floating, got {mask.dtype}")
    return mask.to(dtype)
