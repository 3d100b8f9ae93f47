"""Zero-shot accuracy: classes that are texts, of a CLIP model before and after its B-cosification."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bcosification.convert.clip import BcosifiedCLIP, StandardCLIP
from bcosification.convert.clip_texts import Templates, open_clip_library
from bcosification.evaluation.accuracy import evaluate

__all__ = ["evaluate_zero_shot", "texts_of_classes"]


def texts_of_classes(class_names: Sequence[str]) -> list[str]:
    """What folders of classes are called, as texts: "golden_retriever" -> "golden retriever".

    The 1000 folders of ImageNet (n01440764 …, in order) get open_clip's names of ImageNet's classes.

    Raises:
        ValueError: WordNet numbers (n01440764) that are not ImageNet's 1000.
    """
    numbers = [name for name in class_names if re.fullmatch(r"n\d{8}", name)]
    if not numbers:
        return [name.replace("_", " ").strip() for name in class_names]
    if len(numbers) != 1000 or list(class_names) != sorted(class_names):
        raise ValueError(
            f"class names: expected the names of classes, or ImageNet's 1000 folders, got {len(numbers)} WordNet "
            f"numbers ({numbers[0]} …) among {len(class_names)}; give the names (--class-names)"
        )
    return list(open_clip_library().IMAGENET_CLASSNAMES)


def evaluate_zero_shot(
    model: BcosifiedCLIP | StandardCLIP,
    loader: Iterable[tuple[Tensor, Tensor]],
    class_names: Sequence[str] | Tensor,
    templates: Templates = "openai",
    device: torch.device | str | None = None,
    topk: Sequence[int] = (1, 5),
    *,
    progress: bool = True,
) -> dict[str, float | int]:
    """Zero-shot top-k accuracy over a data loader.

        embeddings = model.encode_texts(class_names, templates)                          # (classes, D)
        predicted = (F.normalize(model.encode_image(images), dim=-1) @ embeddings.T).argmax(1)

    Args:
        model: A B-cosified CLIP model (with "unpool", cosines are those of its positions), or a StandardCLIP.
        loader: Gives batches (images (N, C, H, W) in [0, 1], labels (N,) int64).
        class_names: Names of the classes, in the order of the labels, or their embeddings (classes, D).
        templates: What names are put into: "openai" (default, 80 texts), "simple" (7), None, or texts with {}.
        device, topk, progress: As in `evaluate`.

    Returns:
        {"top1": …, "top5": …, "images": number of images}; accuracies in [0, 1].

    Raises:
        ValueError: a model without a text tower, and what `evaluate` refuses.

    Source: Learning Transferable Visual Models From Natural Language Supervision (Radford et al., 2021), section 3.1;
    open_clip's classifier and templates.

    Example:
        >>> evaluate_zero_shot(model, loader, ["cat", "dog"], templates="simple")
        {'top1': 0.71, 'top5': 1.0, 'images': 200}
    """
    if not isinstance(model, BcosifiedCLIP | StandardCLIP):
        raise TypeError(
            f"evaluate_zero_shot: expected a BcosifiedCLIP or a StandardCLIP, got {type(model).__name__}"
        )
    if device is not None:
        model.to(device)
    classifier = model.classifier(class_names, None if isinstance(class_names, Tensor) else templates)
    return evaluate(classifier, loader, topk=topk, progress=progress)
