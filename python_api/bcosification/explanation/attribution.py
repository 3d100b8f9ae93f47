"""Attribution methods with one signature: (model, images, targets) -> maps (N, H, W).

`bcos_contributions` is that of B-cos models; the others are what the papers compare with, computed by Captum on any
classifier that takes images in [0, 1]. A standard network that expects normalised images is wrapped first:

    >>> plain = torch.nn.Sequential(bcosification.nn.Normalize(mean, std), resnet18)

Each of them runs the model in eval mode, puts its modes back, and leaves `.grad` and requires_grad alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bcosification.explanation.explaining import explain
from bcosification.nn.evaluation_mode import evaluation_mode

__all__ = ["bcos_contributions", "grad_cam", "input_x_gradient", "integrated_gradients"]

Targets = int | Sequence[int] | Tensor


def bcos_contributions(model: nn.Module, images: Tensor, targets: Targets, *, batch_size: int | None = None) -> Tensor:
    """Contributions of a B-cos model: sum over channels of x6 * W(x), (N, H, W); see `explain`."""
    return explain(model, images, targets, batch_size=batch_size).contributions


def input_x_gradient(model: nn.Module, images: Tensor, targets: Targets, *, batch_size: int = 32) -> Tensor:
    """Input times gradient: sum over channels of x * d logit / d x.

    Args:
        model: A classifier of images in [0, 1], returning logits (N, classes).
        images: (N, C, H, W).
        targets: Classes: one int for all, or N.
        batch_size: Images at once, default 32.

    Returns:
        Maps (N, H, W) on the device of `images`; positive speaks for the class.

    Raises:
        TypeError, ValueError: images or targets of other shapes or types.
        ModuleNotFoundError: Captum is missing.

    Source: Not Just a Black Box (Shrikumar et al., 2016); Captum's InputXGradient.
    """
    method = _captum().attr.InputXGradient(model)

    def attribute(x: Tensor, y: Tensor) -> Tensor:
        return method.attribute(x, target=y).sum(1)

    return _in_batches("input_x_gradient", attribute, model, images, targets, batch_size)


def integrated_gradients(
    model: nn.Module, images: Tensor, targets: Targets, *, steps: int = 50, batch_size: int = 32
) -> Tensor:
    """Integrated Gradients from a black image, summed over channels.

    Args:
        model, images, targets: As in `input_x_gradient`.
        steps: Points of the integral (Gauss-Legendre), default 50 as in the B-cos papers.
        batch_size: Images times steps at once, default 32.

    Returns:
        Maps (N, H, W); their sums approach logit(image) - logit(black image).

    Source: Axiomatic Attribution for Deep Networks (Sundararajan et al., 2017); Captum's IntegratedGradients.
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(f"integrated_gradients: expected steps and batch_size >= 1, got {steps} and {batch_size}")
    method = _captum().attr.IntegratedGradients(model)

    def attribute(x: Tensor, y: Tensor) -> Tensor:
        # Captum splits images x steps itself, with at least one of each at once.
        return method.attribute(x, target=y, n_steps=steps, internal_batch_size=max(batch_size, x.size(0))).sum(1)

    return _in_batches("integrated_gradients", attribute, model, images, targets, max(1, batch_size // steps))


def grad_cam(
    model: nn.Module,
    images: Tensor,
    targets: Targets,
    *,
    layer: str | nn.Module | None = None,
    interpolation: str = "nearest",
    batch_size: int = 32,
) -> Tensor:
    """Grad-CAM of a convolutional layer, enlarged to the size of the image; negative values are cut off.

    Args:
        model, images, targets, batch_size: As in `input_x_gradient`.
        layer: The layer or its name; default the last module in the forward pass that returns feature maps
            (N, C, h, w) of more than one pixel: layer4 of a ResNet, features of a DenseNet.
        interpolation: "nearest" (default, as in the B-cos papers' evaluation) or "bilinear".

    Returns:
        Maps (N, H, W), not negative.

    Raises:
        ValueError: no such layer, or none that returns feature maps.

    Source: Grad-CAM (Selvaraju et al., 2017); Captum's LayerGradCam.
    """
    captum = _captum()
    _check_images("grad_cam", images)
    if layer is None:
        layer = last_feature_map(model, images[:1])
    elif isinstance(layer, str):
        named = dict(model.named_modules())
        if layer not in named:
            raise ValueError(f"grad_cam: expected the name of a layer, such as {_some(named)}, got {layer!r}")
        layer = named[layer]
    method = captum.attr.LayerGradCam(model, layer)

    def attribute(x: Tensor, y: Tensor) -> Tensor:
        maps = method.attribute(x, target=y, relu_attributions=True)
        if maps.dim() != 4:
            raise ValueError(f"grad_cam: expected a layer that returns (N, C, h, w), got maps {tuple(maps.shape)}")
        return captum.attr.LayerAttribution.interpolate(maps, tuple(x.shape[-2:]), interpolation)[:, 0]

    return _in_batches("grad_cam", attribute, model, images, targets, batch_size)


def last_feature_map(model: nn.Module, image: Tensor) -> nn.Module:
    """The submodule whose output (N, C, h, w), h * w > 1, comes last in the forward pass of `image` (1, C, H, W)."""
    found: list[nn.Module] = []

    def remember(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and output[0, 0].numel() > 1 and module is not model:
            found.append(module)

    hooks = [module.register_forward_hook(remember) for module in model.modules()]
    try:
        with torch.no_grad(), evaluation_mode(model):
            model(_like_model(model, image))
    finally:
        for hook in hooks:
            hook.remove()
    # An input normalisation returns (N, C, h, w) too, but a layer has to have learnt something, itself or before it.
    found = [m for m in found if any(True for _ in m.parameters())] or found
    if not found:
        raise ValueError(
            "grad_cam: expected a model with feature maps (N, C, h, w) of more than one pixel, got "
            f"{type(model).__name__} without any for images of shape {tuple(image.shape)}"
        )
    return found[-1]


def _some(named: dict[str, nn.Module]) -> str:
    names = [name for name in named if name]
    return ", ".join(names[-5:])


def _captum() -> Any:
    try:
        import captum.attr
    except ImportError as error:
        raise ModuleNotFoundError(
            "attribution methods other than bcos_contributions need Captum, which is not installed: "
            "pip install 'bcos-kernels[explain]'"
        ) from error
    return captum


def _check_images(name: str, images: Tensor) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = getattr(images, "dtype", type(images).__name__)
        raise TypeError(f"{name}: expected images as a floating-point tensor, got {got}")
    if images.dim() != 4 or images.numel() == 0:
        raise ValueError(f"{name}: expected images of shape (N, C, H, W), N >= 1, got {tuple(images.shape)}")


def _like_model(model: nn.Module, images: Tensor) -> Tensor:
    like = next((p for p in model.parameters() if p.is_floating_point()), images)
    return images.detach().to(like.device, like.dtype, copy=True)


@contextlib.contextmanager
def _ready(model: nn.Module) -> Iterator[None]:
    """Eval mode, and a graph whatever surrounds the call."""
    with torch.inference_mode(False), torch.enable_grad(), evaluation_mode(model):
        yield


def _in_batches(
    name: str,
    attribute: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    images: Tensor,
    targets: Targets,
    batch_size: int,
) -> Tensor:
    _check_images(name, images)
    if batch_size < 1:
        raise ValueError(f"{name}: expected batch_size >= 1, got {batch_size}")
    targets = torch.as_tensor(targets)
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"{name}: expected integer targets, got {targets.dtype}")
    targets = targets.expand(images.size(0)) if targets.dim() == 0 else targets
    if targets.shape != images.shape[:1]:
        raise ValueError(
            f"{name}: expected one target per image, shape ({images.size(0)},), got {tuple(targets.shape)}"
        )
    maps = []
    with _ready(model):
        for start in range(0, images.size(0), batch_size):
            x = _like_model(model, images[start : start + batch_size])
            y = targets[start : start + batch_size].long().to(x.device)
            maps.append(attribute(x.requires_grad_(), y).detach().to(images.device))
    return torch.cat(maps)
