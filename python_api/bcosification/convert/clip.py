"""B-cosified CLIP: a converted image tower beside a text tower that stays as it is, and classifiers made of texts."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcosification import nn as bnn
from bcosification.convert.clip_texts import (
    Templates,
    Tokenizer,
    build_text,
    describe_text,
    named_templates,
    open_clip_library,
    token_sizes,
    tokenizer_of,
)
from bcosification.convert.rules import type_name
from bcosification.convert.wrapper import BcosifiedModel
from bcosification.nn.cosine import checked_power

__all__ = ["BcosifiedCLIP", "StandardCLIP", "Templates", "ZeroShotClassifier"]

PROTOCOLS = ("paper", "peer")


class _WithTexts:
    """What image towers with a text tower beside them can do with texts."""

    def _text_tower(self) -> nn.Module:
        raise NotImplementedError

    def _tokenizer(self) -> Tokenizer:
        raise NotImplementedError

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Embeddings (T, D) of tokens (T, context length), by the text tower; with ``normalize`` of length 1."""
        return self._text_tower().encode_text(text, normalize=normalize)

    def encode_texts(self, texts: str | Sequence[str], templates: Templates = None) -> Tensor:
        """Embeddings (T, D) of length 1 of texts, by the text tower; the mean over templates where those are given.

        Args:
            texts: T texts, or with templates what is put into them (class names).
            templates: None (default): the texts as they are; "openai" or "simple": open_clip's for ImageNet; or texts
                with a {}, or functions of a text.

        Raises:
            ValueError: no text tower here, no texts, templates without {}. RuntimeError: open_clip is missing.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts: expected at least one text, all of them str, got {texts!r}")
        tower, tokenizer, library = self._text_tower(), self._tokenizer(), open_clip_library()
        training = tower.training
        device = next(tower.parameters()).device
        try:
            tower.eval()
            embeddings = library.build_zero_shot_classifier(
                tower, tokenizer, texts, named_templates(templates), device=device
            )
        finally:
            tower.train(training)
        return embeddings.T.contiguous()

    def embeddings_of(self, text: str | Sequence[str] | Tensor, templates: Templates = None) -> Tensor:
        """Embeddings (T, D) of length 1, on the model's device: of texts, or of embeddings that are given (T, D)."""
        if not isinstance(text, Tensor):
            text = self.encode_texts(text, templates)
        elif templates is not None:
            raise ValueError("text: expected texts with templates=, got embeddings")
        elif text.dim() != 2 or not text.is_floating_point() or not text.numel():
            raise ValueError(
                f"text: expected texts, or floating point embeddings (T, D), T >= 1, got {tuple(text.shape)} "
                f"{text.dtype}"
            )
        like = next(self.parameters())
        return F.normalize(text.detach().to(like.device, like.dtype), dim=-1)

    def classifier(
        self,
        text: str | Sequence[str] | Tensor,
        templates: Templates = None,
        *,
        scale: float | str = 1.0,
        protocol: str = "paper",
    ) -> ZeroShotClassifier:
        """A classifier of images whose classes are texts: images (N, C, H, W) -> cosines (N, T); see its class.

        With ``scale="own"`` it gives the model's own logits, exp(logit_scale) * cosine + logit_bias (SigLIP has one).
        """
        bias = 0.0
        if scale == "own":
            scale, bias = self._own_scale()
        elif isinstance(scale, str):
            raise ValueError(f"scale: expected a number or 'own', got {scale!r}")
        embeddings = self.embeddings_of(text, templates)
        return ZeroShotClassifier(self, embeddings, scale=scale, bias=bias, protocol=protocol)

    def _scales_of(self) -> nn.Module:
        """What has logit_scale and logit_bias."""
        return self

    def _own_scale(self) -> tuple[float, float]:
        """exp(logit_scale) and logit_bias of the model as numbers (0 without a bias)."""
        holder = self._scales_of()
        scale, bias = getattr(holder, "logit_scale", None), getattr(holder, "logit_bias", None)
        if scale is None:
            raise ValueError("scale: expected a model with logit_scale for 'own', got a bare image tower")
        return float(scale.detach().double().exp()), 0.0 if bias is None else float(bias.detach())


class BcosifiedCLIP(_WithTexts, BcosifiedModel):
    """An image tower of CLIP converted by ``bcosify``, with open_clip's interface, on images in [0, 1].

        features = encode_image(images)                     # (N, D); what the tower returns
        texts = encode_text(tokenizer(["a dog", "a cat"]))  # by the original's text tower, which is not converted
        cosines = classifier(["a dog", "a cat"])(images)    # (N, T)

    Attributes:
        model, add_inverse, normalize, config, conversion, transform: as BcosifiedModel's; calling the model is
            ``encode_image``.
        text: the text tower: the original open_clip model without its image tower, or None (of bare towers, and of
            folders that were saved without it).
        tokenizer: texts -> tokens; found by open_clip where None.
        logit_scale, logit_bias: the original's parameters (None of bare towers): logits are exp(logit_scale) * cosine
            (+ logit_bias).
        attention_pool: "pool" or "unpool" of towers with attention pooling, None of others; power: p with "unpool".

    Source: B-cosification (Arya, Rao, Boehle, Schiele, 2024), section on CLIP.

    Example:
        >>> model = bcosify(open_clip.create_model("RN50", pretrained="openai"))
        >>> explanation = explain(model, images, text=["a dog", "a cat"], templates="openai")
    """

    def __init__(self, model: nn.Module, config: dict[str, Any], **parts: Any) -> None:
        super().__init__(model, config, **parts)
        del self.logit_bias  # the constant of classifiers' logits; CLIP's is the original's parameter
        self.register_parameter("logit_scale", None)
        self.register_parameter("logit_bias", None)
        self.register_module("text", None)
        self.l2_norm, self.position_mean = bnn.L2Norm(), bnn.PositionMean()
        self.tokenizer: Tokenizer | None = None
        config.setdefault("text", None)
        pools = self._attention_pools()
        kept = config.setdefault("attention_pool", {"mode": "pool", "p": 1.0} if pools else None)
        if pools:
            self.set_attention_pool(kept["mode"], p=kept["p"])

    def forward(self, images: Tensor) -> Tensor:
        return self.encode_image(images)

    def image_features(self, images: Tensor) -> Tensor:
        """What the image tower gives: embeddings (N, D); with "unpool" (N, positions, D), each of length 1."""
        return self._network(images)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Embeddings (N, D) of images in [0, 1]; with "unpool" the mean over positions of vectors of length 1.

        ``normalize`` gives them length 1; the norm is a constant in explanation mode.
        """
        features = self.image_features(image)
        features = features.mean(1) if features.dim() == 3 else features
        return self.l2_norm(features) if normalize else features

    # --- attention pooling ---

    def _attention_pools(self) -> list[bnn.AttentionPool2d]:
        return [module for module in self.model.modules() if isinstance(module, bnn.AttentionPool2d)]

    @property
    def attention_pool(self) -> str | None:
        """"pool", "unpool", or None for towers without attention pooling."""
        kept = self.config["attention_pool"]
        return None if kept is None else kept["mode"]

    @property
    def power(self) -> float:
        """p of the mean over positions of l * |l|**(p - 1), with "unpool"."""
        return self.position_mean.p

    def set_attention_pool(self, mode: str | None = None, *, p: float | None = None) -> BcosifiedCLIP:
        """Switch the attention pooling; returns self. Nothing has to be trained again: both modes share their weights.

        Args:
            mode: "pool": one embedding an image; "unpool": one a position, compared with texts on its own; None: as it
                is.
            p: power of the mean over positions with "unpool", >= 1; None: as it is.

        Raises:
            ValueError: a tower without attention pooling, another mode, p < 1; "pool" of a tower that was trained
                with "unpool" alone, and so has no q and k.
        """
        pools = self._attention_pools()
        if not pools:
            raise ValueError(
                "set_attention_pool: expected a tower with the attention pooling of CLIP's ResNets, got "
                f"{self.config['class']}, which has none (or, as CoCa and SigLIP, one of another kind)"
            )
        kept = self.config["attention_pool"] or {}
        if mode == "pool" and kept.get("only") == "unpool":
            raise ValueError(
                "set_attention_pool: expected 'unpool', as this tower was trained without the pooling's q and k "
                "projections, got 'pool'"
            )
        if p is not None:
            self.position_mean.p = checked_power(p)
        for pool in pools:
            pool.mode = pool.mode if mode is None else mode
        self.config["attention_pool"] = {**kept, "mode": pools[0].mode, "p": self.position_mean.p}
        return self

    # --- the text tower ---

    def attach_text(self, model: nn.Module, *, spec: str | None = None, tokenizer: Tokenizer | None = None) -> None:
        """Take the text tower of an open_clip model, and its logit_scale and logit_bias where there are none yet.

        Args:
            model: the whole open_clip model; its text tower is copied.
            spec: its name for ``resolve`` ("open_clip:RN50/openai"), for config.json; default: what ``resolve`` noted.
            tokenizer: texts -> tokens; default: found by open_clip, by its name or as its usual one.

        Raises:
            ValueError: a model without encode_text, or whose embeddings have another size.
        """
        if not callable(getattr(model, "encode_text", None)) or not hasattr(model, "visual"):
            raise ValueError(
                f"attach_text: expected an open_clip model with a text tower, got {type_name(type(model))}"
            )
        # None stands for the image tower in the copy, which is not copied.
        left_out = [name for name in ("visual", "text_decoder") if name in model._modules]  # CoCa's, for captions
        text = copy.deepcopy(model, {id(model._modules[name]): None for name in left_out})
        for name in left_out:
            text._modules.pop(name)
        source = text.__dict__.pop("bcosification_source", None) or {}
        for name in ("logit_scale", "logit_bias"):
            value = text._parameters.pop(name, None)
            setattr(text, name, None)
            if value is not None and getattr(self, name) is None:
                setattr(self, name, nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad))
        self.text = text
        self.tokenizer = tokenizer
        self.config["text"] = {
            "model": spec or source.get("spec"),
            "class": type_name(type(model)),
            "architecture": describe_text(text),
            **token_sizes(model),
            "stored": False,
        }

    def without_text(self) -> BcosifiedCLIP:
        """The image part of this model, all that is trained and explained; its parameters are shared."""
        bare = copy.copy(self)
        for name in ("_modules", "_parameters", "_buffers"):
            bare.__dict__[name] = dict(self.__dict__[name])
        bare._modules["text"] = None
        bare._parameters |= {"logit_scale": None, "logit_bias": None}
        return bare

    def _text_tower(self) -> nn.Module:
        if self.text is None:
            told = self.config["text"]
            if told is None:
                had = "it was made of a bare image tower"
            else:
                had = f"that of {told['model'] or told['class']} was not stored with it"
            raise ValueError(
                f"text: expected a model with a text tower, got one without ({had}); give embeddings (T, D), "
                "attach_text(open_clip model), or save it with_text=True"
            )
        return self.text

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            self.tokenizer = tokenizer_of(self.config["text"])
        return self.tokenizer

    # --- saving and loading ---

    def save_pretrained(self, folder: str | os.PathLike, *, with_text: bool = False, **options: Any) -> str | None:
        """Write model.safetensors, config.json and a model card into ``folder``; ``bcosification.load`` reads them.

        config.json names the text tower; with ``with_text`` its weights are stored, too. ``options`` as
        BcosifiedModel's.

        Raises:
            ValueError: with_text, and there is no text tower or one that cannot be built from its description.
        """
        told = self.config["text"]
        if with_text:
            self._text_tower()
            if told["architecture"] is None and told["model"] is None:
                raise ValueError(
                    f"save_pretrained: expected a text tower that can be built again from a description, got "
                    f"{told['class']}, which cannot; leave with_text and attach_text() it after loading"
                )
        if told is not None:
            told["stored"] = bool(with_text)
        return super().save_pretrained(folder, **options)

    def saved_state(self) -> dict[str, Tensor]:
        """state_dict, without the text tower unless config says that it is stored."""
        stored = self.config["text"] is not None and self.config["text"]["stored"]
        return {name: value for name, value in self.state_dict().items() if stored or not name.startswith("text.")}

    def prepare_for(self, config: dict[str, Any], state: dict[str, Tensor]) -> None:
        """Make room for what ``state`` holds beside the image tower, and take over the switches of ``config``."""
        self.config["text"] = config.get("text")
        for name in ("logit_scale", "logit_bias"):
            if name in state:
                setattr(self, name, nn.Parameter(torch.empty_like(state[name])))
        if self.config["text"] is not None and self.config["text"]["stored"]:
            text = build_text(self.config["text"])
            self.text = text.to(next(iter(self.model.parameters())).dtype)
        kept = config.get("attention_pool")
        if kept is not None:
            self.config["attention_pool"] = dict(kept)
            self.set_attention_pool(kept["mode"], p=kept["p"])

    def extra_repr(self) -> str:
        options = self.config["options"]
        pool = "" if self.attention_pool is None else f", attention_pool={self.attention_pool!r}, p={self.power:g}"
        return f"b={options['b']}, bias={options['bias']!r}{pool}"


class StandardCLIP(_WithTexts, nn.Module):
    """An open_clip model as it is, on images in [0, 1]: what a B-cosified one is compared with, and its teacher.

        features = model.encode_image((images - mean) / std)

    Args:
        model: the whole open_clip model, or anything that returns embeddings (N, D) of normalised images.
        mean, std: per channel, of images in [0, 1].
        spec: its name for ``resolve``, by which its tokenizer is found; default: what ``resolve`` noted.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], spec: str | None = None) -> None:
        super().__init__()
        from bcosification.convert.families import family_of

        self.normalize, self.model = bnn.Normalize(mean, std), model
        self.normalize.to(next(model.parameters()).device)
        self._family = family_of(family_of(model).tower(model))
        self.tokenizer: Tokenizer | None = None
        source = getattr(model, "bcosification_source", None) or {}
        self._told = {"model": spec or source.get("spec"), **token_sizes(model)}

    def image_features(self, images: Tensor) -> Tensor:
        """Embeddings (N, D) of images (N, C, H, W) in [0, 1]."""
        encode = getattr(self.model, "encode_image", None)
        if encode is None:
            return self._family.output(self.model(self.normalize(images)))
        # CoCa's gives embeddings of length 1 unless it is asked not to.
        options = {"normalize": False} if "normalize" in inspect.signature(encode).parameters else {}
        return self._family.output(encode(self.normalize(images), **options))

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Embeddings (N, D), with ``normalize`` of length 1."""
        features = self.image_features(image)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, images: Tensor) -> Tensor:
        return self.image_features(images)

    def _scales_of(self) -> nn.Module:
        return self.model

    def _text_tower(self) -> nn.Module:
        if not callable(getattr(self.model, "encode_text", None)):
            raise ValueError(f"text: expected a model with a text tower, got {type_name(type(self.model))}")
        return self.model

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            self.tokenizer = tokenizer_of(self._told)
        return self.tokenizer


class ZeroShotClassifier(nn.Module):
    """A classifier whose classes are texts: the cosines of an image with their embeddings.

        cosines = F.normalize(model.image_features(images), dim=-1) @ embeddings.T                        # (N, T)
        cosines = (l * l.abs() ** (p - 1)).mean(1), l = model.image_features(images) @ embeddings.T       # "unpool"

    Of a BcosifiedCLIP it is a B-cos model like any other: `explain`, `evaluate` and the pointing games take it. In
    explanation mode L2 norms and |l|^(p−1) are constants, so contributions + constant = the cosine.

    Args:
        model: a BcosifiedCLIP or StandardCLIP; its parts are shared, its text tower is left out.
        embeddings: (T, D), of length 1.
        scale: a number that cosines are multiplied by, default 1; exp(logit_scale) gives CLIP's own logits.
        bias: a number added to them then, default 0: logit_bias, of models that have one. It is a constant of
            explanations.
        protocol: "paper" (default), or "peer": the gradient goes through the last L2 norm, as in the reference's code;
            contributions (and constants) then add up to 0 over the image, whatever the cosine is.

    Raises:
        ValueError: another protocol, or embeddings of another size than the model's (when it is called).
    """

    def __init__(
        self,
        model: BcosifiedCLIP | StandardCLIP,
        embeddings: Tensor,
        *,
        scale: float = 1.0,
        bias: float = 0.0,
        protocol: str = "paper",
    ) -> None:
        super().__init__()
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol: expected 'paper' or 'peer', got {protocol!r}")
        self.__dict__["explained"] = model  # not a submodule: that is the model without its text tower
        self.model = model.without_text() if isinstance(model, BcosifiedCLIP) else model
        self.register_buffer("embeddings", embeddings, persistent=False)
        self.scale, self.protocol = float(scale), protocol
        self.logit_bias = bnn.LogitBias(float(bias)) if bias else nn.Identity()
        self.training = model.training

    def __deepcopy__(self, memo: dict) -> ZeroShotClassifier:
        copied = copy.copy(self)
        memo[id(self)] = copied
        for name in ("_modules", "_buffers"):
            copied.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        copied.__dict__["explained"] = copied.model
        return copied

    @property
    def num_classes(self) -> int:
        """Number of texts."""
        return self.embeddings.shape[0]

    def encode(self, images: Tensor) -> Tensor:
        """Images as the model reads them; see BcosifiedModel.encode."""
        return self.model.encode(images)

    def forward(self, images: Tensor) -> Tensor:
        features = self.model.image_features(images)
        if features.shape[-1] != self.embeddings.shape[1]:
            raise ValueError(
                f"text: expected embeddings (T, {features.shape[-1]}) for this model, got "
                f"{tuple(self.embeddings.shape)}"
            )
        if self.protocol == "peer" or not isinstance(self.model, BcosifiedCLIP):
            features = F.normalize(features, dim=-1)
        elif features.dim() == 2:
            features = self.model.l2_norm(features)
        cosines = features @ self.embeddings.to(features.dtype).T
        if cosines.dim() == 3:
            cosines = self.model.position_mean(cosines)
        return self.logit_bias(cosines if self.scale == 1 else self.scale * cosines)

    def extra_repr(self) -> str:
        return f"texts={self.num_classes}, scale={self.scale:g}, protocol={self.protocol!r}"
