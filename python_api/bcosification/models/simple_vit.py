"""SimpleViT and ViT_c, the standard networks, with the parameter names of B-cos v2's ``standard_*`` models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcosification.weights_files import load_state, read_weights

__all__ = [
    "CONSTRUCTORS",
    "SimpleViT",
    "simple_vit_b_patch16_224",
    "simple_vit_l_patch16_224",
    "simple_vit_s_patch16_224",
    "simple_vit_ti_patch16_224",
    "vitc_b_patch1_14",
    "vitc_l_patch1_14",
    "vitc_s_patch1_14",
    "vitc_ti_patch1_14",
]


class Patches(nn.Module):
    """Cut maps into patches, channels innermost: (N, C, h·p, w·p) → (N, h, w, p·p·C)."""

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch_size
        if x.dim() != 4 or x.shape[2] % p or x.shape[3] % p:
            raise ValueError(
                f"SimpleViT: expected maps (N, C, H, W) with H and W multiples of the patch size {p}, got "
                f"{tuple(x.shape)}"
            )
        return x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 3, 5, 1).flatten(3)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}"


class PosEmbSinCos2d(nn.Module):
    """Sines and cosines of the columns and rows of tokens (N, h, w, dim): a constant (h·w, dim), no parameters.

    In float32 whatever the tokens' type, as the published weights were trained with it.
    """

    def __init__(self, temperature: float = 10_000) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, tokens: Tensor) -> Tensor:
        h, w, dim = tokens.shape[1:]
        device = tokens.device
        rows, columns = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        frequencies = 1.0 / self.temperature ** (torch.arange(dim // 4, device=device) / (dim // 4 - 1))
        x, y = columns.reshape(-1, 1) * frequencies, rows.reshape(-1, 1) * frequencies
        return torch.cat((x.sin(), x.cos(), y.sin(), y.cos()), dim=1).to(tokens.dtype)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}"


class Attention(nn.Module):
    """Self-attention of tokens (N, L, dim) behind a LayerNorm; none of its projections has a bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        inner = dim // heads * heads
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.to_out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q kᵀ / √d) v of q, k, v (N, heads, L, d)."""
        return F.scaled_dot_product_attention(q, k, v)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class FeedForward(nn.Module):
    """LayerNorm, linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential()
        self.net.add_module("norm", nn.LayerNorm(dim))
        self.net.add_module("linear1", nn.Linear(dim, hidden))
        self.net.add_module("act", nn.GELU())
        self.net.add_module("linear2", nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Encoder(nn.Module):
    """x + attention(x), then x + feed-forward(x)."""

    def __init__(self, dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.attn = Attention(dim, heads)
        self.ff = FeedForward(dim, mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x) + x
        return self.ff(x) + x


class SimpleViT(nn.Module):
    """SimpleViT: patches, sinusoidal positions, encoders, mean of the tokens, LayerNorm and linear classifier.

    With ``conv_stem`` it is ViT_c: 3×3 convolutions, of stride 2 wherever the channels grow, with layer norms (over
    channels and positions) and GELUs come first.

    Args:
        image_size: height and width of images in pixels, default 224. Other sizes are taken too if patches fit.
        patch_size: of the image, or of the stem's output.
        num_classes: default 1000.
        dim, depth, heads, mlp_dim: width of tokens (a multiple of 4 and at least 8), encoders, heads, hidden width.
        channels: of the image, default 3.
        conv_stem: output channels of the stem's convolutions; none by default.

    Shapes: (N, channels, H, W), normalised images → logits (N, num_classes).

    Raises:
        ValueError: sizes that do not fit one another.

    Source: Better plain ViT baselines for ImageNet-1k, arXiv:2205.01580; Early convolutions help transformers see
    better, arXiv:2106.14881; B-cos networks v2, arXiv:2306.10898.

    Example:
        >>> SimpleViT(image_size=32, patch_size=8, num_classes=5, dim=16, depth=1, heads=2, mlp_dim=32)(
        ...     torch.rand(1, 3, 32, 32)).shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int,
        num_classes: int = 1000,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        channels: int = 3,
        conv_stem: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        stem = list(conv_stem or [])
        # A convolution halves the maps where the channels grow.
        reduction = 2 ** sum(after > before for before, after in zip([channels, *stem], stem, strict=False))
        if image_size < 1 or image_size % (reduction * patch_size):
            raise ValueError(
                f"SimpleViT: expected image_size to be a multiple of {reduction * patch_size} (stem {reduction}, "
                f"patches {patch_size}), got {image_size}"
            )
        if dim % 4 or dim < 8 or not 1 <= heads <= dim:
            raise ValueError(f"SimpleViT: expected dim to be a multiple of 4 and >= 8, got {dim} with {heads} heads")
        self.image_size, self.patch_size, self.channels, self.stem_channels = image_size, patch_size, channels, stem
        self.dim, self.heads, self.mlp_dim = dim, heads, mlp_dim
        self.to_patch_embedding = nn.Sequential()
        if stem:
            self.to_patch_embedding.add_module("conv_stem", _conv_stem(channels, stem))
        self.to_patch_embedding.add_module("patches", Patches(patch_size))
        patch_dim = (stem[-1] if stem else channels) * patch_size**2
        self.to_patch_embedding.add_module("linear", nn.Linear(patch_dim, dim))
        self.positional_embedding = PosEmbSinCos2d()
        self.transformer = nn.Sequential()
        for i in range(depth):
            self.transformer.add_module(f"encoder_{i}", Encoder(dim, heads, mlp_dim))
        self.linear_head = nn.Sequential()
        self.linear_head.add_module("norm", nn.LayerNorm(dim))
        self.linear_head.add_module("linear", nn.Linear(dim, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.linear_head(self.forward_tokens(images).mean(dim=1))

    def forward_tokens(self, images: Tensor) -> Tensor:
        """Images (N, channels, H, W) → tokens (N, L, dim) behind the last encoder."""
        x = self.to_patch_embedding(images)
        return self.transformer(x.flatten(1, 2) + self.positional_embedding(x))


def _conv_stem(channels: int, stem: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for outputs in stem:
        stride = 2 if outputs > channels else 1
        layers += [nn.Conv2d(channels, outputs, 3, stride, 1), nn.GroupNorm(1, outputs), nn.GELU()]
        channels = outputs
    return nn.Sequential(*layers)


Weights = str | os.PathLike | Mapping[str, Tensor] | None


def _build(name: str, weights: Weights, arguments: dict) -> SimpleViT:
    if weights is None:
        return SimpleViT(**arguments)
    given = isinstance(weights, Mapping)
    state = weights if given else read_weights(weights)
    with torch.device("meta"):
        model = SimpleViT(**arguments)
    # Copies, so that training does not change what the caller holds.
    state = {key: value.detach().clone() if given else value for key, value in state.items()}
    load_state(model, state, "weights" if given else str(weights), name, assign=True)
    return model


_SIZES = {
    "ti": dict(dim=192, depth=12, heads=3, mlp_dim=768),
    "s": dict(dim=384, depth=12, heads=6, mlp_dim=1536),
    "b": dict(dim=768, depth=12, heads=12, mlp_dim=3072),
    "l": dict(dim=1024, depth=14, heads=16, mlp_dim=4096),
}
_STEMS = {
    "ti": [24, 48, 96, 192],
    "s": [48, 96, 192, 384],
    "b": [64, 128, 128, 256, 256, 512],
    "l": [64, 128, 128, 256, 256, 512],
}

CONSTRUCTORS: dict[str, Callable[..., SimpleViT]] = {}
"""Name -> constructor, of every network of this file."""


def _constructor(name: str, size: str, stem: bool) -> Callable[..., SimpleViT]:
    sizes = dict(_SIZES[size])
    if stem:  # an encoder less, for the stem's computation
        sizes |= {"depth": sizes["depth"] - 1, "patch_size": 1, "conv_stem": _STEMS[size]}
    else:
        sizes["patch_size"] = 16
    kind = "ViT_c" if stem else "SimpleViT"

    def construct(num_classes: int = 1000, image_size: int = 224, weights: Weights = None) -> SimpleViT:
        return _build(name, weights, {**sizes, "num_classes": num_classes, "image_size": image_size})

    construct.__name__ = construct.__qualname__ = name
    construct.__doc__ = f"""{kind}-{size.capitalize()}, the standard network (3 channels): {sizes}.

    Args:
        num_classes: outputs of the classifier, default 1000.
        image_size: height and width in pixels, a multiple of 16, default 224.
        weights: None (default) for random ones; a file of tensors (of ``torch.save`` or safetensors, read without
            executing anything), as published by B-cos v2 for ``standard_{name}``; or its tensors by name.

    Raises:
        ValueError: weights that do not fit (what is missing and what is left over is told), an image_size that does
            not. FileNotFoundError: no such file.
    """
    CONSTRUCTORS[name] = construct
    return construct


simple_vit_ti_patch16_224 = _constructor("simple_vit_ti_patch16_224", "ti", stem=False)
simple_vit_s_patch16_224 = _constructor("simple_vit_s_patch16_224", "s", stem=False)
simple_vit_b_patch16_224 = _constructor("simple_vit_b_patch16_224", "b", stem=False)
simple_vit_l_patch16_224 = _constructor("simple_vit_l_patch16_224", "l", stem=False)
vitc_ti_patch1_14 = _constructor("vitc_ti_patch1_14", "ti", stem=True)
vitc_s_patch1_14 = _constructor("vitc_s_patch1_14", "s", stem=True)
vitc_b_patch1_14 = _constructor("vitc_b_patch1_14", "b", stem=True)
vitc_l_patch1_14 = _constructor("vitc_l_patch1_14", "l", stem=True)
