"""Top-k accuracy of a classifier."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from bcosification.nn.evaluation_mode import evaluation_mode

__all__ = ["evaluate"]


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str | None = None,
    topk: Sequence[int] = (1, 5),
    *,
    progress: bool = True,
) -> dict[str, float | int]:
    """Top-k accuracy over a data loader.

    Args:
        model: A classifier, returning logits (N, classes). It runs in eval mode and gets its modes back. It is moved to
            `device` where one is given, and stays there.
        loader: Gives batches (images (N, C, H, W), labels (N,) int64).
        device: Where to run; default where the model is.
        topk: The k's, default (1, 5). With no more than k classes, top-k is 1 by definition.
        progress: Show a progress bar where there is a terminal (default).

    Returns:
        {"top1": …, "top5": …, "images": number of images}; accuracies in [0, 1].

    Raises:
        ValueError: an empty loader, labels that are no classes, logits or labels of another shape, k < 1.
        ModuleNotFoundError: torchmetrics or tqdm is missing.

    Example:
        >>> evaluate(model, torch.utils.data.DataLoader(scenes("val"), batch_size=64))
        {'top1': 0.9533, 'top5': 0.9967, 'images': 600}
    """
    try:
        from torchmetrics.classification import MulticlassAccuracy
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ModuleNotFoundError(
            f"evaluate needs {error.name}, which is not installed: pip install 'bcos-kernels[train]'"
        ) from error
    topk = sorted(set(topk))
    if not topk or any(not isinstance(k, int) or k < 1 for k in topk):
        raise ValueError(f"evaluate: expected topk as ints >= 1, got {topk}")
    if device is not None:
        model.to(device)
    like = next(model.parameters(), None)
    device = like.device if like is not None else torch.device(device or "cpu")
    metrics: dict[int, nn.Module] = {}
    classes, count, running = 0, 0, None
    with torch.inference_mode(), evaluation_mode(model):
        hidden = None if progress else True  # None: where there is no terminal
        for images, labels in tqdm(loader, desc="evaluate", unit="batch", disable=hidden, leave=False):
            logits, labels = model(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)
            _check_batch(logits, labels)
            if not count:
                classes = logits.size(1)
                metrics = {
                    k: MulticlassAccuracy(classes, top_k=k, average="micro", validate_args=False).to(device)
                    for k in topk
                    if k < classes
                }
            count += labels.numel()
            for metric in metrics.values():
                metric.update(logits, labels)
        running = {k: float(metric.compute()) for k, metric in metrics.items()}
    if not count:
        raise ValueError("evaluate: expected at least one image, got an empty loader")
    return {f"top{k}": running.get(k, 1.0) for k in topk} | {"images": count}


def _check_batch(logits: Tensor, labels: Tensor) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            "evaluate: expected logits (N, classes) and labels (N,), got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if labels.is_floating_point():
        raise ValueError(f"evaluate: expected integer labels, got {labels.dtype}")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.size(1):
        raise ValueError(
            f"evaluate: expected labels in [0, {logits.size(1) - 1}], got {int(labels.min())} to {int(labels.max())}"
        )
