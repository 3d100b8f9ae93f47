"""Pictures of explanations, as in the papers: colours from W(x), contribution maps in blue, white and red.

Pictures are float32 NumPy arrays (H, W, 4) in [0, 1], RGBA. Nothing here opens a window or needs a display.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bcosification.explanation.explaining import Explanation

__all__ = [
    "color_picture",
    "contribution_picture",
    "enlarged",
    "enlargement",
    "explanation_figure",
    "image_picture",
    "on_background",
    "picture_grid",
    "save_figure",
    "save_picture",
]

_QUANTILE_LIMIT = 16_000_000  # elements; torch.quantile refuses more


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise ModuleNotFoundError(
            "pictures of explanations need matplotlib, which is not installed: pip install 'bcos-kernels[explain]'"
        ) from error
    return matplotlib


def check_options(smooth: int | None, percentile: float) -> None:
    """Raise ValueError unless pictures can be drawn with these options."""
    if smooth and (smooth < 0 or smooth % 2 == 0):
        raise ValueError(f"explanation picture: expected smooth to be odd and >= 1, or 0 for none, got {smooth}")
    if not 0 < percentile <= 100:
        raise ValueError(f"explanation picture: expected percentile > 0 and <= 100, got {percentile}")


def _quantile(values: Tensor, q: float) -> Tensor:
    if values.numel() > _QUANTILE_LIMIT:
        return torch.as_tensor(np.quantile(values.cpu().numpy(), q), dtype=values.dtype, device=values.device)
    return torch.quantile(values, q)


def color_picture(image: Tensor, weights: Tensor, *, smooth: int | None = 15, percentile: float = 99.5) -> np.ndarray:
    """The colour picture of a dynamic linear map W(x).

    Equivalent to:

        color = (W / W.abs().amax(0)).clamp(min=0); color = color[:3] / (color[:3] + color[3:])
        alpha = avg_pool2d(where((image * W).sum(0) < 0, 0, W.norm(dim=0)), smooth, 1, (smooth - 1) // 2)
        picture = cat([color, (alpha / quantile(alpha, percentile / 100)).clamp(0, 1)])

    The colour of a pixel is that which the model looks for there: the positive part of W, each channel against its
    inverse. Opaque pixels weigh most; pixels that speak against the class are transparent.

    Args:
        image: Encoded image [x, 1 - x], (6, H, W), in [0, 1].
        weights: W(x) of one logit, (6, H, W).
        smooth: Edge in pixels of the box that averages alpha, odd; None or 0: no smoothing. Default 15, which suits 224
            pixels; 3 suits 64.
        percentile: Percentile of alpha that is drawn fully opaque, default 99.5.

    Returns:
        float32 array (H, W, 4) in [0, 1]: `gradient_to_image` of the package `bcos` to 1e-6, and transparent where the
        peer divides zero by zero (a map that is zero everywhere).

    Raises:
        ValueError: other shapes, an even `smooth`, a percentile outside (0, 100].

    Source: B-cos Networks: Alignment is All We Need for Interpretability (2022), section 5; B-cos v2's
    gradient_to_image.
    """
    if image.dim() != 3 or image.size(0) != 6 or weights.shape != image.shape:
        raise ValueError(
            "color_picture: expected an encoded image [x, 1 - x] and weights, both of shape (6, H, W), got "
            f"{tuple(image.shape)} and {tuple(weights.shape)}"
        )
    check_options(smooth, percentile)
    image, weights = (t.detach().to(torch.float32) for t in (image, weights))
    colors = (weights / (weights.abs().amax(0, keepdim=True) + 1e-12)).clamp(min=0)
    colors = colors[:3] / (colors[:3] + colors[3:] + 1e-12)
    contributions = (image * weights).sum(0, keepdim=True)
    alpha = torch.where(contributions < 0, 1e-12, weights.norm(dim=0, keepdim=True))
    if smooth:
        alpha = F.avg_pool2d(alpha, smooth, stride=1, padding=(smooth - 1) // 2)
    opaque = _quantile(alpha.flatten(), percentile / 100)
    alpha = (alpha / opaque.clamp(min=torch.finfo(alpha.dtype).tiny)).clamp(0, 1)
    return torch.cat([colors, alpha]).permute(1, 2, 0).cpu().numpy()


def contribution_picture(contributions: Tensor | np.ndarray, *, percentile: float = 99.5) -> np.ndarray:
    """A contribution map in blue (against), white (nothing) and red (for).

    Args:
        contributions: Map (H, W), any scale.
        percentile: Percentile of |contribution| that is drawn in full colour, default 99.5.

    Returns:
        float32 array (H, W, 4) in [0, 1], matplotlib's colour map "bwr".

    Raises:
        ValueError: not two-dimensional, or a percentile outside (0, 100].
        ModuleNotFoundError: matplotlib is missing.
    """
    check_options(None, percentile)
    if isinstance(contributions, Tensor):
        contributions = contributions.detach().float().cpu().numpy()
    values = np.asarray(contributions)
    if values.ndim != 2:
        raise ValueError(f"contribution_picture: expected a map of shape (H, W), got {values.shape}")
    limit = np.percentile(np.abs(values), percentile)
    # Zero is the middle of 256 colours; an all-zero map is white.
    unit = np.zeros_like(values) if limit == 0 else np.clip(values / limit, -1, 1)
    return _matplotlib().colormaps["bwr"]((unit + 1) / 2).astype(np.float32)


def image_picture(image: Tensor) -> np.ndarray:
    """An image (3 or 6 channels, H, W) in [0, 1], plain or encoded [x, 1 - x], as a picture (H, W, 4)."""
    if image.dim() != 3 or image.size(0) not in (1, 3, 6):
        raise ValueError(f"image_picture: expected an image of shape (1, 3 or 6, H, W), got {tuple(image.shape)}")
    colors = image.detach()[:3].to(torch.float32).clamp(0, 1).expand(3, -1, -1)
    return torch.cat([colors, torch.ones_like(colors[:1])]).permute(1, 2, 0).cpu().numpy()


def on_background(picture: np.ndarray, color: Sequence[float] = (1.0, 1.0, 1.0)) -> np.ndarray:
    """Lay an RGBA picture (H, W, 4) on a plain colour (default white): an opaque picture (H, W, 4)."""
    if picture.ndim != 3 or picture.shape[2] != 4:
        raise ValueError(f"on_background: expected a picture of shape (H, W, 4), got {picture.shape}")
    alpha = picture[..., 3:]
    colors = picture[..., :3] * alpha + np.asarray(color, dtype=np.float32) * (1 - alpha)
    return np.concatenate([colors, np.ones_like(alpha)], axis=2).astype(np.float32)


def enlargement(height: int, width: int, size: int | None) -> int:
    """The smallest whole factor that makes the shorter side at least `size` pixels; 1 for None or 0."""
    if size is not None and size < 0:
        raise ValueError(f"explanation picture: expected size >= 0, got {size}")
    return max(1, -(-(size or 0) // min(height, width)))


def enlarged(picture: np.ndarray, size: int | None) -> np.ndarray:
    """A picture (H, W, 4) with every pixel drawn as a square, so that its shorter side has at least `size` pixels.

    A whole factor and no interpolation: what one pixel of the network's input says is not mixed with its neighbours',
    and [::factor, ::factor] gives the picture back. None or 0, and pictures that are large enough: unchanged.
    """
    factor = enlargement(picture.shape[0], picture.shape[1], size)
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def save_picture(picture: np.ndarray, path: str | Path) -> Path:
    """Write a picture (H, W, 4) in [0, 1] as a PNG of the same size in pixels, transparency kept; folders are made.

    Raises:
        ValueError: another shape, or a path that does not end in .png.
        ModuleNotFoundError: Pillow is missing.
    """
    path = _png_path(path)
    if picture.ndim != 3 or picture.shape[2] != 4:
        raise ValueError(f"save_picture: expected a picture of shape (H, W, 4), got {picture.shape}")
    try:
        from PIL import Image
    except ImportError as error:
        raise ModuleNotFoundError(
            "writing PNG files needs Pillow, which is not installed: pip install 'bcos-kernels[explain]'"
        ) from error
    Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8), mode=None).save(path)
    return path


def _png_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"saving a picture: expected a file name that ends in .png, got {str(path)!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def picture_grid(
    rows: Sequence[Sequence[np.ndarray | None]],
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    cell_labels: Sequence[Sequence[str | None]] | None = None,
    title: str | None = None,
    cell: float = 1.6,
) -> Figure:
    """A figure of pictures in rows and columns, on white.

    Args:
        rows: For every row its pictures (H, W, 4); None leaves a cell empty. Rows of equal length.
        row_labels: A text left of every row.
        column_labels: A text above every column.
        cell_labels: A text under single cells, as `rows`.
        title: A text above all.
        cell: Edge of a cell in inches, default 1.6.

    Returns:
        A matplotlib figure; `save_figure` writes it.

    Raises:
        ValueError: no rows, rows of different lengths, or as many labels as rows or columns missing.
        ModuleNotFoundError: matplotlib is missing.
    """
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"picture_grid: expected rows of equal length, got lengths {[len(row) for row in rows]}")
    for name, labels, expected in (
        ("row_labels", row_labels, len(rows)),
        ("column_labels", column_labels, len(rows[0])),
        ("cell_labels", cell_labels, len(rows)),
    ):
        if labels is not None and len(labels) != expected:
            raise ValueError(f"picture_grid: expected {expected} {name}, got {len(labels)}")
    figure = _matplotlib().figure.Figure(figsize=(cell * len(rows[0]), cell * len(rows)), layout="constrained", dpi=150)
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            axis = axes[i, j]
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if picture is not None:
                axis.imshow(on_background(picture), interpolation="nearest")
            if cell_labels is not None and cell_labels[i][j]:
                axis.set_xlabel(cell_labels[i][j], fontsize=7)
        if row_labels is not None:
            axes[i, 0].set_ylabel(row_labels[i], fontsize=8)
    for axis, label in zip(axes[0], column_labels or [], strict=False):
        axis.set_title(label, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def explanation_figure(
    explanation: Explanation,
    *,
    indices: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    labels: Sequence[int] | Tensor | None = None,
    smooth: int | None = 15,
    percentile: float = 99.5,
    title: str | None = None,
) -> Figure:
    """One row per image: the image, the colour picture of W(x), the contribution map; with class and logit.

    Args:
        explanation: What `explain` returned, for 6-channel images.
        indices: Which images, default all.
        class_names: Names of the classes; default their numbers.
        labels: True classes (N,), shown beside the explained ones.
        smooth, percentile: As in `color_picture`.
        title: A text above all.

    Returns:
        A matplotlib figure.
    """
    indices = range(len(explanation)) if indices is None else list(indices)

    def name(index: int) -> str:
        return str(class_names[index] if class_names is not None else index)

    rows, row_labels = [], []
    for i in indices:
        rows.append(
            [
                image_picture(explanation.images[i]),
                explanation.image(i, smooth=smooth, percentile=percentile),
                explanation.contribution_map(i, percentile=percentile),
            ]
        )
        target = int(explanation.targets[i])
        text = f"{name(target)}\nlogit {float(explanation.logits[i, target]):.2f}"
        row_labels.append(text if labels is None else f"{text}\ntrue: {name(int(labels[i]))}")
    columns = ["image", "explanation W(x)", "contributions"]
    return picture_grid(rows, row_labels=row_labels, column_labels=columns, title=title)


def save_figure(figure: Figure, path: str | Path, *, dpi: int = 150) -> Path:
    """Write a figure as PNG (`dpi` dots per inch, default 150); folders are made."""
    path = _png_path(path)
    figure.savefig(path, dpi=dpi)
    return path
