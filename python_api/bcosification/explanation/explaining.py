"""`explain`: the dynamic linear map W(x) of a B-cos model, in batches.

x6 is the encoded image [x, 1 - x] in [0, 1], before any normalisation inside the model. In explanation mode a B-cos
model is

    logit = sum(W(x) * x6) + constant,        W(x) = d logit / d x6

and `contributions` are the summands, added over the channels.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bcosification.convert.clip import BcosifiedCLIP, Templates
from bcosification.convert.linear_map import bare_model, dynamic_linear_map
from bcosification.convert.text import BcosifiedText
from bcosification.convert.wrapper import BcosifiedModel, out_of_range
from bcosification.explanation import pictures
from bcosification.json_files import json_text
from bcosification.nn import LogitBias, Normalize, explanation_mode
from bcosification.nn.evaluation_mode import evaluation_mode
from bcosification.warned import warn_caller

__all__ = ["Explanation", "TextExplanation", "explain"]

Targets = int | Sequence[int] | Tensor | None

# Pixels explained at once where no batch_size is given: 16 images of 224 x 224, about 1.5 GiB for a ResNet-50 in fp32.
_PIXELS_AT_ONCE = 16 * 224 * 224


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """What `explain` returns: N explained images.

    Attributes:
        images: Encoded images x6 (N, 6, H, W), in [0, 1].
        logits: (N, classes).
        targets: Explained classes (N,), int64.
        weights: W(x) of the target logits (N, 6, H, W).
        contributions: sum over channels of x6 * W(x), (N, H, W).
        constant: (N,), everything else that adds to the logit: contributions.sum + constant = logit. Besides the
            logit bias that is what the input's normalisation subtracts (weighted by W(x), so it differs from image to
            image), positional embeddings, class tokens and kept biases.
    """

    images: Tensor
    logits: Tensor
    targets: Tensor
    weights: Tensor
    contributions: Tensor
    constant: Tensor

    def __len__(self) -> int:
        return self.targets.size(0)

    def __repr__(self) -> str:
        shape = tuple(self.weights.shape)
        return f"Explanation({len(self)} images, targets {self.targets.tolist()[:16]}, weights {shape})"

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> Explanation:
        """The explanations of some images; an int gives one, still with its first dimension."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"Explanation: expected an index below {len(self)}, got {index}")
            index = [index]
        return dataclasses.replace(self, **{name: tensor[index] for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, *args, **kwargs) -> Explanation:
        """All tensors moved as by `Tensor.to` (device, dtype); `targets` keep their integer type."""
        moved = {name: t.to(*args, **kwargs) for name, t in self._tensors().items()}
        moved["targets"] = self.targets.to(moved["logits"].device)
        return dataclasses.replace(self, **moved)

    def image(self, i: int, smooth: int | None = 15, percentile: float = 99.5) -> np.ndarray:
        """The colour picture of image i: float32 (H, W, 4) in [0, 1]; see `pictures.color_picture`."""
        return pictures.color_picture(self.images[i], self.weights[i], smooth=smooth, percentile=percentile)

    def contribution_map(self, i: int, percentile: float = 99.5) -> np.ndarray:
        """The contribution map of image i in blue, white and red: float32 (H, W, 4); needs matplotlib."""
        return pictures.contribution_picture(self.contributions[i], percentile=percentile)

    def figure(self, **options):
        """A figure with one row per image; options as in `pictures.explanation_figure`."""
        return pictures.explanation_figure(self, **options)

    def save(
        self,
        folder: str | Path,
        *,
        names: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        smooth: int | None = 15,
        percentile: float = 99.5,
        size: int | None = 224,
    ) -> list[Path]:
        """Write three PNGs per image and one `explanations.json`.

        Args:
            folder: Where to; made if it is missing.
            names: Stems of the files, one per image and different; default 0000, 0001, …
            class_names: Names of the classes for the JSON file.
            smooth, percentile: As in `image`.
            size: Pictures are enlarged by a whole factor, every pixel a square, until their shorter side has at least
                so many pixels, default 224; None: as large as the network's input.

        Returns:
            The files: NAME_image.png, NAME_explanation.png (transparent), NAME_contributions.png, explanations.json.

        Raises:
            ValueError: names missing, repeated, or with a folder in them.
            OSError: the folder cannot be written (before any picture is).
        """
        names = [f"{i:04d}" for i in range(len(self))] if names is None else [str(name) for name in names]
        if len(names) != len(self) or len(set(names)) != len(names):
            raise ValueError(f"Explanation.save: expected {len(self)} different names, got {names}")
        if any(Path(name).name != name for name in names):
            raise ValueError(f"Explanation.save: expected file names without folders, got {names}")
        pictures.enlargement(1, 1, size)  # refuses what is no size before anything is written
        pictures_of = [self._pictures(i, smooth, percentile) for i in range(len(self))]
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        summary = folder / "explanations.json"
        summary.write_text(json_text(self._summary(names, class_names), indent=2), encoding="utf-8")
        files = [
            pictures.save_picture(pictures.enlarged(picture, size), folder / f"{name}_{kind}.png")
            for name, by_kind in zip(names, pictures_of, strict=True)
            for kind, picture in by_kind.items()
        ]
        return [*files, summary]

    def _pictures(self, i: int, smooth: int | None, percentile: float) -> dict[str, np.ndarray]:
        """What `save` writes of image i, by the ends of the files' names."""
        return {
            "image": pictures.image_picture(self.images[i]),
            "explanation": self.image(i, smooth=smooth, percentile=percentile),
            "contributions": self.contribution_map(i, percentile=percentile),
        }

    def _summary(self, names: Sequence[str], class_names: Sequence[str] | None) -> list[dict]:
        summary = []
        for i, name in enumerate(names):
            target, predicted = int(self.targets[i]), int(self.logits[i].argmax())
            entry = {
                "name": name,
                "target": target,
                "predicted": predicted,
                "logit": float(self.logits[i, target]),
                "contributions": float(self.contributions[i].double().sum()),
                "constant": float(self.constant[i]),
            }
            if class_names is not None:
                entry |= {"target_name": class_names[target], "predicted_name": class_names[predicted]}
            summary.append(entry)
        return summary


@dataclasses.dataclass(frozen=True, repr=False)
class TextExplanation(Explanation):
    """What `explain` returns for texts: N images, each explained for T texts.

    Attributes:
        images: Encoded images x6 (N, 6, H, W), in [0, 1].
        logits: (N, T), the cosines of images and texts (with "unpool": the mean over positions of l * |l|^(p - 1)).
        targets: (N, T), the numbers of the texts.
        weights: W(x) of every cosine (N, T, 6, H, W).
        contributions: sum over channels of x6 * W(x), (N, T, H, W).
        constant: (N, T), everything else that adds to a cosine: contributions.sum + constant = cosine. (With
            protocol="peer" the two add up to 0.)
        texts: The T texts; "text 0" … for embeddings.
    """

    texts: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"TextExplanation({len(self)} images, texts {list(self.texts)}, weights {tuple(self.weights.shape)})"

    def _number(self, text: int | str) -> int:
        if isinstance(text, str):
            if text not in self.texts:
                raise ValueError(f"TextExplanation: expected one of the texts {list(self.texts)}, got {text!r}")
            return self.texts.index(text)
        return text

    def image(self, i: int, smooth: int | None = 15, percentile: float = 99.5, *, text: int | str = 0) -> np.ndarray:
        """The colour picture of image i for one text: float32 (H, W, 4) in [0, 1]; see `pictures.color_picture`."""
        weights = self.weights[i, self._number(text)]
        return pictures.color_picture(self.images[i], weights, smooth=smooth, percentile=percentile)

    def contribution_map(self, i: int, percentile: float = 99.5, *, text: int | str = 0) -> np.ndarray:
        """The contribution map of image i for one text, in blue, white and red: float32 (H, W, 4)."""
        return pictures.contribution_picture(self.contributions[i, self._number(text)], percentile=percentile)

    def figure(
        self,
        *,
        indices: Sequence[int] | None = None,
        smooth: int | None = 15,
        percentile: float = 99.5,
        title: str | None = None,
        **_: object,
    ):
        """A figure with one row per image: the image, then W(x) and contributions for every text, with the cosine."""
        indices = range(len(self)) if indices is None else list(indices)
        rows, labels = [], []
        for i in indices:
            row, label = [pictures.image_picture(self.images[i])], [None]
            for t in range(len(self.texts)):
                row += [self.image(i, smooth, percentile, text=t), self.contribution_map(i, percentile, text=t)]
                label += [f"{float(self.logits[i, t]):.3f}", None]
            rows.append(row)
            labels.append(label)
        columns = ["image"]
        for text in self.texts:
            columns += [_shortened(text), "contributions"]
        return pictures.picture_grid(rows, column_labels=columns, cell_labels=labels, title=title)

    def _pictures(self, i: int, smooth: int | None, percentile: float) -> dict[str, np.ndarray]:
        result = {"image": pictures.image_picture(self.images[i])}
        for t in range(len(self.texts)):
            result[f"text{t}_explanation"] = self.image(i, smooth, percentile, text=t)
            result[f"text{t}_contributions"] = self.contribution_map(i, percentile, text=t)
        return result

    def _summary(self, names: Sequence[str], class_names: Sequence[str] | None) -> list[dict]:
        return [
            {
                "name": name,
                "texts": [
                    {
                        "text": text,
                        "cosine": float(self.logits[i, t]),
                        "contributions": float(self.contributions[i, t].double().sum()),
                        "constant": float(self.constant[i, t]),
                    }
                    for t, text in enumerate(self.texts)
                ],
            }
            for i, name in enumerate(names)
        ]


def _shortened(text: str, most: int = 24) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def explain(
    model: nn.Module,
    images: Tensor,
    targets: Targets = None,
    *,
    text: str | Sequence[str] | Tensor | None = None,
    templates: Templates = None,
    protocol: str = "paper",
    batch_size: int | None = None,
) -> Explanation:
    """Explain logits of a B-cos model by its dynamic linear map W(x).

    Equivalent, for one batch of 6-channel images, to:

        with explanation_mode(model.eval()):
            logits = model(x6.requires_grad_()); W, = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), x6)
        contributions = (x6 * W).sum(1)

    Args:
        model: A model of `bcosify`, one made of the package bcos's layers, or a fused one. It runs in eval and
            explanation mode and gets its modes back; `.grad` and requires_grad of its parameters are left alone.
            Calls from several threads are safe; their batches run one after the other.
        images: (N, 3, H, W) in [0, 1], or encoded [x, 1 - x] (N, 6, H, W). 3 channels are encoded here (a model of
            `bcosify` built with inverse=False takes them as they are). They may lie on another device than the model.
            Of a classifier of texts (a BcosifiedText): what its tokenizer returns, a mapping with input_ids (N, T),
            attention_mask and what else there is (`model.tokenize(texts)`).
        targets: Classes to explain: one int for all, N ints (list or tensor), or None for the predicted ones (default).
        text: Of B-cosified CLIP models: T texts, or their embeddings (T, D), whose cosines with the image are
            explained, from one forward pass for all of them.
        templates: With texts: "openai", "simple" or texts with {}, over which a text's embedding is averaged; default
            None, the texts as they are.
        protocol: "paper" (default): L2 norms are constants, contributions add up to cosines; "peer": the gradient goes
            through the norm, as in the reference's code.
        batch_size: Images explained at once; default as many as 16 images of 224 x 224 have pixels.

    Returns:
        An `Explanation`, with `text` a `TextExplanation`, of a classifier of texts a `TokenExplanation` (contributions
        per token); its tensors lie on the device of `images`.

    Warns:
        UserWarning: images outside [0, 1]; contributions + constant differs from the logit (by more than rounding): the
            model has a dynamic layer without explanation mode, or adds a constant that is not known.

    Raises:
        TypeError: images or targets of another type than the above.
        ValueError: wrong shapes, a size that the model does not take, a target that is not a class, a model in which
            nothing can be detached: its input gradient would not be a dynamic linear map; a CLIP model without text=,
            or texts and no text tower.

    Source: B-cos Networks (2022), section 3.2; B-cosification (2024), section 3.

    Example:
        >>> explanation = explain(model, images)          # images (N, 3, 224, 224) in [0, 1]
        >>> explanation.save("explanations")
        >>> picture = explanation.image(0)                # (224, 224, 4)
    """
    if isinstance(bare_model(model), BcosifiedText):
        from bcosification.explanation.tokens import explain_tokens  # which builds on this file

        if text is not None or templates is not None or protocol != "paper":
            raise ValueError(
                "explain: expected no text=, templates= and protocol= for a classifier of texts: the second argument "
                "is what its tokenizer returns (model.tokenize)"
            )
        return explain_tokens(bare_model(model), images, targets, batch_size=batch_size)
    _check_images(images)
    # Normalize and LogitBias can be switched too, but have nothing dynamic: plain networks are wrapped in them.
    if not any(
        hasattr(module, "set_explanation_mode") and not isinstance(module, Normalize | LogitBias)
        for module in model.modules()
    ):
        raise ValueError(
            f"explain: expected a B-cos model, got {type(model).__name__}, in which no layer has "
            "dynamic weights that can be detached (set_explanation_mode); `bcosify(model)` makes a B-cos model of it, "
            "and bcosification.explanation.attribution explains plain models"
        )
    if isinstance(bare_model(model), BcosifiedModel):
        bare_model(model).check_images(images)  # before texts are encoded, which may take its time
    elif images.size(1) == 3 and not hasattr(model, "encode") and (told := out_of_range(images)) is not None:
        warn_caller(f"explain: {told}; they are encoded as [x, 1 - x]")
    texts = None
    if text is not None:
        if not isinstance(model, BcosifiedCLIP):
            raise ValueError(f"explain: expected a B-cosified CLIP model with text=, got {type(model).__name__}")
        if targets is not None:
            raise ValueError("explain: expected targets= or text=, got both")
        texts = _texts(text)
        model = model.classifier(text if texts is None else list(texts), templates, protocol=protocol)
        targets = torch.arange(model.num_classes).expand(images.size(0), -1)
        texts = tuple(f"text {t}" for t in range(model.num_classes)) if texts is None else texts
    elif isinstance(model, BcosifiedCLIP):
        raise ValueError(
            "explain: expected text= (texts, or embeddings (T, D)) for a CLIP model, whose outputs are no logits, got "
            "none"
        )
    if batch_size is None:
        batch_size = max(1, _PIXELS_AT_ONCE // max(1, images.size(2) * images.size(3)))
    elif batch_size < 1:
        raise ValueError(f"explain: expected batch_size >= 1, got {batch_size}")
    parts = []
    # An inference tensor cannot be part of a graph; outside inference mode inputs are copied into plain ones.
    whole = getattr(model, "explained", model)
    with torch.inference_mode(False), evaluation_mode(whole), evaluation_mode(model), explanation_mode(model):
        targets = targets if texts else checked_targets(targets, images.size(0))
        for start in range(0, images.size(0), batch_size):
            stop = start + batch_size
            parts.append(_explain_batch(model, images[start:stop], None if targets is None else targets[start:stop]))
    *tensors, sizes = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    explanation = TextExplanation(*tensors, texts) if texts else Explanation(*tensors)
    if getattr(model, "protocol", "paper") == "paper":
        check_sum(explanation, sizes)
    return explanation


def _texts(text: str | Sequence[str] | Tensor) -> tuple[str, ...] | None:
    """The texts, or None for embeddings."""
    if isinstance(text, Tensor):
        return None
    texts = (text,) if isinstance(text, str) else tuple(text)
    if not texts or not all(isinstance(entry, str) for entry in texts):
        raise ValueError(f"explain: expected text= as texts or a tensor of embeddings (T, D), got {text!r}")
    return texts


def _explain_batch(model: nn.Module, images: Tensor, targets: Tensor | None) -> tuple[Tensor, ...]:
    x6 = encode(model, images)
    logits, weights, constant = dynamic_linear_map(model, x6, targets)
    targets = logits.argmax(1) if targets is None else targets
    summands = (x6 if targets.dim() == 1 else x6[:, None]) * weights  # with texts: (N, T, C, H, W)
    contributions = summands.sum(-3)
    sizes = summands.abs_().sum((-3, -2, -1))
    return tuple(t.detach().to(images.device) for t in (x6, logits, targets, weights, contributions, constant, sizes))


def encode(model: nn.Module, images: Tensor) -> Tensor:
    """The tensor that `model` is to be called with: images (N, C, H, W) on its device, in its dtype, encoded."""
    like = next((p for p in model.parameters() if p.is_floating_point()), images)
    images = images.detach().to(like.device, like.dtype, copy=True)
    if callable(getattr(model, "encode", None)):
        return model.encode(images).detach()
    if images.size(1) == 3:
        return torch.cat([images, 1 - images], dim=1)
    if images.size(1) == 6:
        return images
    raise ValueError(
        f"explain: expected images of 3 channels, or 6 when encoded [x, 1 - x], got {images.size(1)} channels"
    )


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"explain: expected images as a tensor, got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"explain: expected floating-point images in [0, 1], got {images.dtype}")
    if images.dim() != 4:
        hint = " (one image: images[None])" if images.dim() == 3 else ""
        raise ValueError(f"explain: expected images of shape (N, 3 or 6, H, W), got {tuple(images.shape)}{hint}")
    if images.numel() == 0:
        raise ValueError(f"explain: expected at least one image, got shape {tuple(images.shape)}")


def checked_targets(targets: Targets, count: int) -> Tensor | None:
    if targets is None:
        return None
    try:
        tensor = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"explain: expected targets as an int, a list of ints or a tensor, got {targets!r}") from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"explain: expected integer targets, got {tensor.dtype}")
    if tensor.dim() == 0:
        tensor = tensor.expand(count)
    if tensor.shape != (count,):
        raise ValueError(f"explain: expected one target per image, shape ({count},), got {tuple(tensor.shape)}")
    return tensor.to(torch.int64, copy=True)


def check_sum(explanation: Explanation, sizes: Tensor) -> None:
    """Warn where contributions + constant is not the logit: something adds to it that nobody accounts for. sizes (N,)
    or (N, T): Σ |x6 ⊙ W|, which rounding is measured against."""
    contributions = explanation.contributions.double().flatten(explanation.targets.dim()).sum(-1).flatten()
    targets = explanation.targets.view(len(explanation), -1)
    logit = explanation.logits.gather(1, targets).flatten().double()
    constant, sizes = explanation.constant.double().flatten(), sizes.flatten()
    off = (contributions + constant - logit).abs()
    size = sizes.double() + constant.abs() + logit.abs()
    tolerance = 1e-3 if torch.finfo(explanation.weights.dtype).eps < 1e-4 else 5e-2
    worst = int((off - tolerance * size).argmax())
    if not off[worst] <= tolerance * size[worst]:
        warnings.warn(
            f"explain: expected contributions + constant = logit, got {contributions[worst]:.4g} + "
            f"{constant[worst]:.4g} and {logit[worst]:.4g} for image {worst // targets.size(1)}; the model has a layer "
            "that is not linear in explanation mode, or adds a constant outside its layers (parameters can be named in "
            "model.additive_parameters)",
            stacklevel=3,
        )
