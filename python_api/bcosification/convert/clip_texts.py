"""open_clip's text towers: their templates and tokenizers, and how one is described in config.json and built again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bcosification.convert.rules import type_name
from bcosification.names import did_you_mean, meant

__all__ = [
    "Templates",
    "Tokenizer",
    "build_text",
    "describe_text",
    "named_templates",
    "open_clip_library",
    "token_sizes",
    "tokenizer_of",
]

Templates = str | Sequence[str] | Sequence[Callable[[str], str]] | None
Tokenizer = Callable[[list[str]], Tensor]


def open_clip_library() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise RuntimeError(f"text: needs open_clip ({error}): pip install 'bcos-kernels[train]'") from None
    return open_clip


def named_templates(templates: Templates) -> Sequence[Any]:
    """Templates as open_clip takes them: "openai" and "simple" stand for its own, None for the text alone."""
    if templates is None:
        return ["{}"]
    if isinstance(templates, str):
        library = open_clip_library()
        own = {"openai": library.OPENAI_IMAGENET_TEMPLATES, "simple": library.SIMPLE_IMAGENET_TEMPLATES}
        templates = own.get(templates, [templates])
    templates = list(templates)
    wrong = [t for t in templates if not (callable(t) or (isinstance(t, str) and "{}" in t))]
    if not templates or wrong or len({callable(t) for t in templates}) > 1:
        near = did_you_mean(name for text in wrong for name in meant(str(text), ("openai", "simple"), most=1))
        raise ValueError(
            "templates: expected 'openai', 'simple', or texts with {} in them (or functions of a text), got "
            f"{(wrong or templates)!r}{near}"
        )
    return templates


def token_sizes(model: nn.Module) -> dict[str, int | None]:
    """context_length and vocab_size of an open_clip model; CoCa's vocabulary is its text tower's to tell."""
    text = getattr(model, "text", None)
    return {name: getattr(model, name, getattr(text, name, None)) for name in ("context_length", "vocab_size")}


def tokenizer_of(told: dict[str, Any]) -> Tokenizer:
    """open_clip's tokenizer of a model: by its name, or the usual one where vocabulary and length are CLIP's."""
    library = open_clip_library()
    name = told.get("model")
    if name is not None and name.startswith("open_clip:"):
        architecture = name.removeprefix("open_clip:").partition("/")[0]
        return library.get_tokenizer(architecture, context_length=told.get("context_length"))
    usual = library.SimpleTokenizer(context_length=told.get("context_length"))
    if told.get("vocab_size") != usual.vocab_size:
        raise ValueError(
            f"text: expected a tokenizer (model.tokenizer = a function of texts, returning tokens), as none is known "
            f"for a vocabulary of {told.get('vocab_size')}"
        )
    return usual


def describe_text(text: nn.Module) -> dict[str, Any] | None:
    """Arguments (JSON) from which ``build_text`` makes a text tower like this one; None: not possible."""
    try:
        architecture = _text_architecture(text)
        with torch.device("meta"):
            rebuilt = build_text({"class": type_name(type(text)), "architecture": architecture})
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
        return None
    same = repr(rebuilt) == repr(text) and {n: p.shape for n, p in rebuilt.named_parameters()} == {
        n: p.shape for n, p in text.named_parameters()
    }
    return architecture if same else None


def _text_architecture(text: nn.Module) -> dict[str, Any]:
    inner = getattr(text, "text", text)  # of CustomTextCLIP
    blocks = inner.transformer.resblocks
    projection = inner.text_projection
    width = inner.token_embedding.embedding_dim
    scaled = type_name(type(blocks[0].ls_1)) == "open_clip.transformer.LayerScale"
    if projection is None:
        raise ValueError("a text tower without projection")
    approximate = getattr(blocks[0].mlp.gelu, "approximate", "none")
    return {
        "embed_dim": projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1],
        "quick_gelu": type_name(type(blocks[0].mlp.gelu)) == "open_clip.transformer.QuickGELU",
        "text_cfg": {
            "context_length": inner.context_length,
            "vocab_size": inner.vocab_size,
            "width": width,
            "heads": blocks[0].attn.num_heads,
            "layers": len(blocks),
            "mlp_ratio": blocks[0].mlp.c_fc.out_features / width,
            "ls_init_value": 1.0 if scaled else None,
            "embed_cls": getattr(inner, "cls_emb", None) is not None,
            "pad_id": getattr(inner, "pad_id", 0),
            "eos_id": inner.eos_id if hasattr(inner, "eos_id") else inner.text_eos_id,
            "no_causal_mask": inner.attn_mask is None,
            "pool_type": inner.pool_type if hasattr(inner, "pool_type") else inner.text_pool_type,
            "proj_bias": isinstance(projection, nn.Linear),
            "norm_kwargs": {"eps": inner.ln_final.eps},
            "act_kwargs": None if approximate == "none" else {"approximate": approximate},
            "output_tokens": getattr(inner, "output_tokens", False),
        },
    }


def build_text(told: dict[str, Any]) -> nn.Module:
    """A text tower with random weights, from what config.json says of it."""
    library = open_clip_library()
    if told["architecture"] is None:
        from bcosification.convert.resolver import resolve

        model, _ = resolve(told["model"], pretrained=False)
        model.__dict__.pop("bcosification_source", None)
    else:
        kind = {"open_clip.model.CLIP": library.CLIP, "open_clip.model.CustomTextCLIP": library.CustomTextCLIP}
        # An image tower without layers, which is dropped.
        more: dict[str, Any] = {"vision_cfg": {"layers": 0, "width": 64, "patch_size": 32, "image_size": 32}}
        if told["class"] == "open_clip.coca_model.CoCa":  # nor has the text decoder any
            kind[told["class"]] = library.CoCa
            length = told["architecture"]["text_cfg"]["context_length"]
            more["multimodal_cfg"] = {"layers": 0, "width": 64, "heads": 1, "context_length": length}
        model = kind[told["class"]](**more, **told["architecture"])
    for name in ("visual", "text_decoder"):
        model._modules.pop(name, None)
    for name in ("logit_scale", "logit_bias"):
        model._parameters.pop(name, None)
        setattr(model, name, None)
    return model
