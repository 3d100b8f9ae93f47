"""Two measures of where an attribution points: the grid pointing game and the energy pointing game.

Both give the share of positive attribution that falls where it should. An attribution method is a function
(model, images, targets) -> maps (N, H, W); `bcosification.explanation.attribution` has some.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcosification.nn.evaluation_mode import evaluation_mode

__all__ = ["Localization", "energy_pointing_game", "grid_pointing_game"]

Attribution = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Localization:
    """Scores of a pointing game.

    Attributes:
        scores: One per explained class, float32, in [0, 1]: share of positive attribution in the right place; 0 where
            nothing is positive.
        chance: The score of an attribution that is the same everywhere.
        targets: The explained classes, as `scores`.
        indices: The image of each score, index into what was given.
    """

    scores: Tensor
    chance: float
    targets: Tensor
    indices: Tensor

    @property
    def mean(self) -> float:
        """Mean of the scores."""
        return float(self.scores.double().mean())

    def __len__(self) -> int:
        return self.scores.numel()

    def __str__(self) -> str:
        return f"{self.mean:.3f} (chance {self.chance:.3f}, {len(self)} scores)"


def grid_pointing_game(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attribute: Attribution,
    *,
    grid: int = 2,
    count: int | None = None,
    confidence: float = 0.5,
    seed: int = 0,
    probability: str = "sigmoid",
    rescale: bool = False,
    batch_size: int = 64,
) -> Localization:
    """GridPG: images of distinct classes in a grid; does the explanation of each class point at its cell?

    Of the images that the model classifies correctly and with more than `confidence`, the most confident of every class
    come first. For a grid, grid² classes that have images left are drawn, and the next image of each is taken; the
    model sees the grid as one larger image, and every one of its classes is explained.

    Args:
        model: A classifier that takes images of any size (a convolutional one), else `rescale`.
        images: (N, C, H, W), what the model takes.
        labels: Classes (N,).
        attribute: (model, images, targets) -> (N, H, W).
        grid: Cells along an edge, default 2.
        count: Number of grids; default as many as the images give (the papers use 500 of ImageNet's).
        confidence: Least probability of the true class, default 0.5; 0 takes all that are classified correctly.
        seed: The grids are a function of it, of the confidences and the labels.
        probability: How confidence follows from the logits: "sigmoid" (default, for networks trained with BCE, and
            what the papers use) or "softmax".
        rescale: Shrink every image to 1 / grid, so that the grid has the size of one image (networks of fixed size).
        batch_size: Images at once when confidences are computed, default 64.

    Returns:
        `Localization` with grid² scores per grid; chance 1 / grid².

    Raises:
        ValueError: too few confident images for `count` grids (or for a single one), wrong shapes or values.

    Source: Convolutional Dynamic Alignment Networks (Boehle et al., 2021), section 5.2; B-cos Networks (2022).
    """
    if grid < 2 or (count is not None and count < 1) or not 0 <= confidence < 1:
        raise ValueError(
            "grid_pointing_game: expected grid >= 2, count >= 1 and confidence in [0, 1), got "
            f"grid={grid}, count={count}, confidence={confidence}"
        )
    if probability not in ("sigmoid", "softmax"):
        raise ValueError(f"grid_pointing_game: expected probability 'sigmoid' or 'softmax', got {probability!r}")
    _check("grid_pointing_game", images, labels)
    by_class = _confident(model, images, labels, confidence, probability, batch_size)
    cells = grid * grid
    chosen = _draw_grids(by_class, cells, count, seed)
    if not chosen or (count is not None and len(chosen) < count):
        raise ValueError(
            f"grid_pointing_game: expected confident images (p > {confidence}, classified correctly) of {cells} "
            f"classes for each of {count or 1} grids of {grid} x {grid}, got {sum(map(len, by_class.values()))} such "
            f"images of {sum(map(bool, by_class.values()))} classes among {images.size(0)}, enough for {len(chosen)} "
            "grids"
        )
    scores = []
    for indices in chosen:
        picture = _tile(images[indices], grid, rescale)
        targets = labels[indices].to(images.device)
        maps = attribute(model, picture.expand(cells, -1, -1, -1), targets)
        positive = _positive("grid_pointing_game", maps, (cells, *picture.shape[-2:]))
        rows, columns = (size // grid for size in positive.shape[-2:])
        energy = positive.unflatten(2, (grid, columns)).unflatten(1, (grid, rows)).sum((2, 4)).flatten(1)
        scores.append(_share(energy.diagonal(), energy.sum(1)))
    order = torch.tensor(chosen).flatten()
    return Localization(torch.cat(scores).float().cpu(), 1 / cells, labels.cpu()[order], order)


def energy_pointing_game(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    boxes: Tensor | Sequence[Tensor],
    attribute: Attribution,
    *,
    batch_size: int = 64,
) -> Localization:
    """EPG: the share of positive attribution inside the object's box.

    Args:
        model: A classifier.
        images: (N, C, H, W), what the model takes.
        labels: Classes (N,), which are explained.
        boxes: In pixels (x0, y0, x1, y1), upper ends excluded: (N, 4), or for every image (K, 4), whose union counts.
        attribute: (model, images, targets) -> (N, H, W).
        batch_size: Images given to `attribute` at once, default 64.

    Returns:
        `Localization` with N scores; chance = mean share of the images' area inside their boxes.

    Raises:
        ValueError: boxes that are empty or leave the image, wrong shapes.

    Source: Score-CAM (Wang et al., 2020); Studying How to Efficiently and Effectively Guide Models with Explanations
    (Rao et al., 2023).
    """
    _check("energy_pointing_game", images, labels)
    inside = _box_masks(boxes, images)
    scores = []
    for start in range(0, images.size(0), batch_size):
        part = slice(start, start + batch_size)
        maps = attribute(model, images[part], labels[part].to(images.device))
        positive = _positive("energy_pointing_game", maps, (images[part].size(0), *images.shape[-2:]))
        scores.append(_share((positive * inside[part].to(positive.device)).sum((1, 2)), positive.sum((1, 2))))
    chance = float(inside.double().mean())
    return Localization(torch.cat(scores).float().cpu(), chance, labels.cpu().clone(), torch.arange(images.size(0)))


def _check(name: str, images: Tensor, labels: Tensor) -> None:
    if images.dim() != 4 or labels.shape != images.shape[:1] or images.size(0) == 0:
        raise ValueError(
            f"{name}: expected images (N, C, H, W) and labels (N,), N >= 1, got "
            f"{tuple(images.shape)} and {tuple(labels.shape)}"
        )


def _confident(
    model: nn.Module, images: Tensor, labels: Tensor, least: float, probability: str, batch_size: int
) -> dict[int, list[int]]:
    """Class -> indices of its confident and correctly classified images, the most confident first."""
    like = next(model.parameters(), images)
    logits = []
    with torch.inference_mode(), evaluation_mode(model):
        for start in range(0, images.size(0), batch_size):
            logits.append(model(images[start : start + batch_size].to(like.device, like.dtype)).float().cpu())
    logits, labels = torch.cat(logits), labels.cpu()
    value, predicted = logits.max(1)
    sure = value.sigmoid() if probability == "sigmoid" else logits.softmax(1).amax(1)
    # By the logit and not by the probability, which is 1.0 for many in float32.
    ranking = value if probability == "sigmoid" else value - logits.logsumexp(1)
    order = ranking.sort(descending=True, stable=True).indices
    by_class: dict[int, list[int]] = {int(label): [] for label in labels.unique()}
    for i in order[((predicted == labels) & (sure > least))[order]].tolist():
        by_class[int(labels[i])].append(i)
    return by_class


def _draw_grids(by_class: dict[int, list[int]], cells: int, count: int | None, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    left = {label: list(reversed(found)) for label, found in by_class.items()}
    grids = []
    while count is None or len(grids) < count:
        available = [label for label in sorted(left) if left[label]]
        if len(available) < cells:
            break
        drawn = torch.randperm(len(available), generator=generator)[:cells].tolist()
        grids.append([left[available[i]].pop() for i in drawn])
    return grids


def _tile(images: Tensor, grid: int, rescale: bool) -> Tensor:
    """grid² images (grid², C, H, W) as one (1, C, grid * H, grid * W), row by row."""
    if rescale:
        if images.size(2) % grid or images.size(3) % grid:
            raise ValueError(
                f"grid_pointing_game: expected image sizes divisible by grid={grid} with rescale=True, got "
                f"{tuple(images.shape[-2:])}"
            )
        size = (images.size(2) // grid, images.size(3) // grid)
        images = F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)
    rows = [torch.cat(list(images[row * grid : (row + 1) * grid]), dim=2) for row in range(grid)]
    return torch.cat(rows, dim=1)[None]


def _positive(name: str, maps: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(maps, Tensor) or tuple(maps.shape) != shape:
        got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"{name}: expected attribute to return maps of shape {shape}, got {got}")
    return maps.detach().double().clamp(min=0)


def _share(part: Tensor, total: Tensor) -> Tensor:
    return torch.where(total > 0, part / total.where(total > 0, 1), 0)


def _box_masks(boxes: Tensor | Sequence[Tensor], images: Tensor) -> Tensor:
    """(N, H, W) bool: inside one of the image's boxes."""
    height, width = images.shape[-2:]
    if len(boxes) != images.size(0):
        raise ValueError(f"energy_pointing_game: expected boxes for {images.size(0)} images, got {len(boxes)}")
    inside = torch.zeros(images.size(0), height, width, dtype=torch.bool)
    for i, of_image in enumerate(boxes):
        of_image = torch.as_tensor(of_image)
        of_image = of_image[None] if of_image.dim() == 1 else of_image
        if of_image.dim() != 2 or of_image.size(1) != 4 or of_image.size(0) == 0:
            raise ValueError(
                f"energy_pointing_game: expected boxes (4,) or (K, 4), K >= 1, for image {i}, got "
                f"{tuple(of_image.shape)}"
            )
        for x0, y0, x1, y1 in of_image.tolist():
            if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                raise ValueError(
                    f"energy_pointing_game: expected a box (x0, y0, x1, y1) within {width} x {height} pixels for image "
                    f"{i}, got {(x0, y0, x1, y1)}"
                )
            inside[i, int(y0) : int(y1), int(x0) : int(x1)] = True
    return inside
