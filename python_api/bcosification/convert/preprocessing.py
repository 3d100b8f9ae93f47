"""How a model wants its images: mean, std, size and crop, where they are known from, and the transform they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the network.

    Attributes:
        mean, std: per channel, for values in [0, 1].
        input_size: (height, width) of the network's input; None: not known, images keep their size.
        resize: shorter side, in pixels, that images are resized to before the central crop; None: no resizing.
            ``crop="squash"`` resizes to ``input_size`` whatever the aspect ratio.
        crop: "center" or "squash".
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        origin: where this comes from, in words.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int] | None = None
    resize: int | None = None
    crop: str = "center"
    interpolation: str = "bilinear"
    origin: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, the keys of ``BcosifiedModel.config``."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "input_size": None if self.input_size is None else list(self.input_size),
            "resize": self.resize,
            "crop": self.crop,
            "interpolation": self.interpolation,
            "preprocessing_origin": self.origin,
        }

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Preprocessing:
        """The inverse of ``to_dict``; other keys are ignored."""
        size = config.get("input_size")
        return cls(
            mean=tuple(float(value) for value in config["mean"]),
            std=tuple(float(value) for value in config["std"]),
            input_size=None if size is None else (int(size[0]), int(size[1])),
            resize=config.get("resize"),
            crop=config.get("crop", "center"),
            interpolation=config.get("interpolation", "bilinear"),
            origin=config.get("preprocessing_origin", ""),
        )


def _interpolation(name: Any) -> str:
    name = str(getattr(name, "value", name)).lower()
    return name if name in INTERPOLATIONS else "bicubic"


def from_timm(config: Any, size: tuple[int, int] | None = None) -> Preprocessing:
    """From timm's ``pretrained_cfg`` (a dict or an object with ``to_dict``); ``size``: of a model made for another."""
    values = config if isinstance(config, dict) else config.to_dict()
    height, width = values["input_size"][-2:] if size is None else size
    crop_mode = values.get("crop_mode") or "center"
    crop = values.get("crop_pct") or 0.875
    squash = crop_mode == "squash"
    return Preprocessing(
        tuple(values["mean"]),
        tuple(values["std"]),
        (height, width),
        None if squash else math.floor(min(height, width) / crop),
        "squash" if squash else "center",
        _interpolation(values.get("interpolation", "bicubic")),
        "timm pretrained_cfg",
    )


def from_open_clip(config: dict[str, Any]) -> Preprocessing:
    """From open_clip's ``preprocess_cfg`` (of a visual tower)."""
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    squash = config.get("resize_mode") == "squash"
    return Preprocessing(
        tuple(config["mean"]),
        tuple(config["std"]),
        (height, width),
        None if squash else min(height, width),
        "squash" if squash else "center",
        _interpolation(config.get("interpolation", "bicubic")),
        "open_clip preprocess_cfg",
    )


def from_torchvision(transforms: Any, origin: str) -> Preprocessing:
    """From a torchvision weight entry's ``transforms()`` (its ImageClassification preset)."""
    crop, resize = transforms.crop_size[0], transforms.resize_size[0]
    return Preprocessing(
        tuple(transforms.mean),
        tuple(transforms.std),
        (crop, crop),
        resize,
        "center",
        _interpolation(transforms.interpolation),
        origin,
    )


def imagenet(size: tuple[int, int] | None) -> Preprocessing:
    """torchvision's ImageNet evaluation: resize to 256/224 of the size (default 224), central crop."""
    size = size or (224, 224)
    return Preprocessing(
        IMAGENET_MEAN, IMAGENET_STD, size, round(min(size) * 256 / 224), origin="ImageNet (torchvision)"
    )


def openai(size: tuple[int, int] | None) -> Preprocessing:
    """OpenAI's preprocessing of CLIP: resize the shorter side to the input's (default 224), central crop, bicubic."""
    size = size or (224, 224)
    return Preprocessing(OPENAI_MEAN, OPENAI_STD, size, min(size), "center", "bicubic", origin="OpenAI's CLIP")


def detect(model: nn.Module, known: str | None, size: tuple[int, int] | None) -> Preprocessing | None:
    """What the model itself tells: timm's pretrained_cfg, open_clip's preprocess_cfg, what its family knows (known),
    or that it is one of torchvision's classifiers."""
    config = getattr(model, "pretrained_cfg", None)
    if config and (config if isinstance(config, dict) else config.to_dict()).get("mean"):
        return from_timm(config, size)
    for tower in (model, getattr(model, "visual", None)):
        config = getattr(tower, "preprocess_cfg", None)
        if isinstance(config, dict) and "mean" in config:
            return from_open_clip(config)
        mean, std = getattr(tower, "image_mean", None), getattr(tower, "image_std", None)
        if mean is not None and std is not None:
            return Preprocessing(tuple(mean), tuple(std), size, None, origin="open_clip image_mean, image_std")
    config = getattr(getattr(model, "trunk", None), "pretrained_cfg", None)  # of open_clip's towers made of timm's
    if config and (config if isinstance(config, dict) else config.to_dict()).get("mean"):
        return from_timm(config, size)
    if known == "openai":
        return openai(size)
    # torchvision's classifiers are modules of torchvision.models itself; those of its sub-packages (detection,
    # segmentation, video, optical flow) have normalisations of their own.
    package, _, _ = type(model).__module__.rpartition(".")
    return imagenet(size) if known == "imagenet" or package == "torchvision.models" else None


def own_transform(model: nn.Module) -> Callable[[Any], Tensor] | None:
    """What the library of a resolved model itself makes of a PIL image before the network: normalised, (C, H, W).

    Nothing of this package: torchvision's preset of the weights (its ImageNet preset where they are random), timm's
    ``create_transform`` for the model, open_clip's ``image_transform_v2`` for its tower. None for other models.
    """
    source = getattr(model, "bcosification_source", None) or {}
    library, _, name = (source.get("spec") or "").partition(":")
    if library == "timm":
        from timm.data import create_transform, resolve_model_data_config

        return create_transform(**resolve_model_data_config(model), is_training=False)
    if library == "open_clip":
        from open_clip.transform import PreprocessCfg, image_transform_v2

        return image_transform_v2(PreprocessCfg(**getattr(model, "visual", model).preprocess_cfg), is_train=False)
    if library == "torchvision":
        from torchvision import models

        entries = models.get_model_weights(name)
        for entry in entries:
            if str(entry) == source["weights"]:
                return entry.transforms()
        known = Preprocessing.from_dict(source["preprocessing"])
        return next(iter(entries)).transforms.func(crop_size=known.input_size[0], resize_size=known.resize)
    return None


def with_statistics(
    found: Preprocessing | None,
    mean: Sequence[float] | float | None,
    std: Sequence[float] | float | None,
    size: tuple[int, int] | None,
) -> Preprocessing:
    """``found`` with the mean and std that the caller gives, if any; ValueError when neither knows them."""
    if found is None and (mean is None or std is None):
        raise ValueError(
            "bcosify: expected mean= and std= (per channel, of images in [0, 1]): this model does not tell how its "
            f"images are normalised, got mean={mean} and std={std}"
        )
    given = [name for name, value in (("mean", mean), ("std", std)) if value is not None]
    mean = _per_channel("mean", found.mean if mean is None else mean)
    std = _per_channel("std", found.std if std is None else std)
    if len(mean) != len(std):
        raise ValueError(f"bcosify: expected as many values in mean= as in std=, got {len(mean)} and {len(std)}")
    if not all(value > 0 for value in std):
        raise ValueError(f"bcosify: expected std > 0, got {std}")
    if found is None:
        return Preprocessing(mean, std, size, None, origin="given: mean, std")
    origin = f"{found.origin}; given: {', '.join(given)}" if given else found.origin
    return replace(found, mean=mean, std=std, origin=origin)


def _per_channel(name: str, values: Any) -> tuple[float, ...]:
    if isinstance(values, Tensor):
        values = values.flatten().tolist()
    if isinstance(values, (int, float)):
        values = [values]
    values = tuple(float(value) for value in values)
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"bcosify: expected {name} to be one finite number per channel, got {values}")
    return values


class ImageTransform:
    """PIL image -> float32 tensor (C, H, W) in [0, 1], resized and cropped as the model's weights expect.

    The same steps as torchvision's evaluation presets (antialiased resizing of the shorter side, central crop), on PIL
    alone, without the normalisation: that happens inside the model, except with ``normalize=True``, for standard
    networks. Images smaller than the crop are padded with 0.

    Example:
        >>> from PIL import Image
        >>> images = model.transform(Image.open("goldfinch.png")).unsqueeze(0)
    """

    def __init__(self, preprocessing: Preprocessing, *, normalize: bool = False) -> None:
        self.preprocessing = preprocessing
        self.normalize = normalize

    def __call__(self, image: Any) -> Tensor:
        try:
            from PIL import Image
        except ImportError as error:
            raise RuntimeError("transform: needs Pillow: pip install 'bcos-kernels[explain]'") from error
        import numpy

        if not isinstance(image, Image.Image):
            raise TypeError(f"transform: expected a PIL image, got {type(image).__name__}")
        p = self.preprocessing
        image = eight_bits(image).convert("L" if len(p.mean) == 1 else "RGB")
        method = getattr(Image.Resampling, p.interpolation.upper())
        if p.crop == "squash" and p.input_size is not None:
            image = image.resize((p.input_size[1], p.input_size[0]), method)
        elif p.resize is not None:
            image = image.resize(_shorter_side(image.size, p.resize), method)
        pixels = torch.from_numpy(numpy.array(image))
        pixels = pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        if p.input_size is not None:
            pixels = _center_crop(pixels, *p.input_size)
        pixels = pixels.contiguous().to(torch.float32) / 255
        if self.normalize:
            pixels = (pixels - pixels.new_tensor(p.mean).view(-1, 1, 1)) / pixels.new_tensor(p.std).view(-1, 1, 1)
        return pixels

    def __repr__(self) -> str:
        p = self.preprocessing
        normalize = ", normalize=True" if self.normalize else ""
        return f"ImageTransform(resize={p.resize}, crop={p.crop!r}, size={p.input_size}, {p.interpolation}{normalize})"


def eight_bits(image: Any) -> Any:
    """A PIL image of 16 bits a pixel (mode I;16) as one of 8 (mode L), anything else as it is.

    Pillow's own conversion cuts off what is above 255 instead, which leaves a picture that is white almost everywhere.

    Raises:
        ValueError: 32-bit integers or floating point (modes I and F), whose range is not known.
    """
    if image.mode.startswith("I;16"):
        import numpy
        from PIL import Image

        return Image.fromarray((numpy.asarray(image).astype(numpy.float32) / 257 + 0.5).astype(numpy.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating point"
        raise ValueError(f"expected an image of 8 or 16 bits a channel, got one of {kind}, whose range is not known")
    return image


def _shorter_side(size: tuple[int, int], target: int) -> tuple[int, int]:
    width, height = size
    short, long = min(size), max(size)
    long = int(target * long / short)
    return (target, long) if width <= height else (long, target)


def _center_crop(pixels: Tensor, height: int, width: int) -> Tensor:
    missing_rows, missing_columns = max(height - pixels.shape[1], 0), max(width - pixels.shape[2], 0)
    if missing_rows or missing_columns:
        left, top = missing_columns // 2, missing_rows // 2
        padding = (left, missing_columns - left, top, missing_rows - top)
        pixels = nn.functional.pad(pixels, padding)
    top = round((pixels.shape[1] - height) / 2)
    left = round((pixels.shape[2] - width) / 2)
    return pixels[:, top : top + height, left : left + width]
