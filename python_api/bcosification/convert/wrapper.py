"""The B-cosified model: encoding, normalisation, the converted network, the logit bias."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bcosification import nn as bnn
from bcosification.convert.hub import HubMixin
from bcosification.convert.image_sizes import INPUT_ERRORS, refuses_dtype, refuses_size, size_told
from bcosification.convert.preprocessing import ImageTransform, Preprocessing
from bcosification.convert.rules import remove_biases
from bcosification.warned import warn_caller

IN_RANGE = (-0.01, 1.01)


class BcosifiedModel(HubMixin, nn.Module):
    """A network converted by ``bcosify``.

        x6 = torch.cat([images, 1 - images], dim=1)                 # add_inverse; 2C channels are taken as they are
        z = (x6 - cat(mean, 1 - mean)) / cat(std, std)              # normalize
        logits = model(z) + logit_bias

    Args and shapes of the forward: images (N, C, H, W) in [0, 1] or already encoded (N, 2C, H, W); returns what the
    network returns, for a classifier logits (N, classes). Values outside [-0.01, 1.01] warn once; a size that the
    network does not take, as many ViTs one, is a ValueError.

    Attributes:
        add_inverse, normalize, model, logit_bias: the four parts, nn.Identity where an option drops one.
        config: what it was made of and with (JSON types): architecture, options, mean, std, input_size, num_classes …
        conversion: one dict per layer that a rule was applied to: name, was, becomes.
        additive_parameters: names of parameters of this module added to activations outside any layer.
        transform: PIL image -> [0, 1] tensor (C, H, W) ready for the model.

    Source: B-cosification (Arya, Rao, Boehle, Schiele, 2024), section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, Any],
        *,
        conversion: list[dict[str, str]] | None = None,
        additive_parameters: list[str] | None = None,
    ) -> None:
        super().__init__()
        self._prepare_input(config, model)
        self.model = model
        bias = config["logit_bias"]
        self.logit_bias = (nn.Identity() if bias is None else bnn.LogitBias(bias)).train(model.training)
        self.config = config
        self.conversion = list(conversion or [])
        self.additive_parameters = [f"model.{name}" for name in additive_parameters or []]
        self.training = model.training

    def _prepare_input(self, config: dict[str, Any], model: nn.Module) -> None:
        """Add what stands before the network: the encoding and the normalisation of images."""
        options, preprocessing = config["options"], Preprocessing.from_dict(config)
        self.channels = len(preprocessing.mean)
        self._range_checked = False
        self.add_inverse = bnn.AddInverse() if options["inverse"] else nn.Identity()
        self.normalize = _normalize(preprocessing, options, model) if options["normalize_input"] else nn.Identity()
        for part in (self.add_inverse, self.normalize):
            part.train(model.training)

    def forward(self, images: Tensor) -> Tensor:
        return self.logit_bias(self._network(images))

    def _network(self, images: Tensor) -> Tensor:
        """What the converted network returns for images (N, C, H, W) or encoded ones."""
        inputs = self.normalize(self.encode(images))
        if torch.compiler.is_compiling():
            return self.model(inputs)
        try:
            return self.model(inputs)
        except INPUT_ERRORS as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            own, dtype = self.config.get("input_size"), next(self.model.parameters(), inputs).dtype
            if refuses_size(self.model, inputs, own):
                raise ValueError(
                    f"BcosifiedModel: expected images of a size that {self.config['class']} takes (its own: "
                    f"{size_told(own)}, which model.transform makes of pictures), got {size_told(inputs.shape[-2:])}: "
                    + str(error).partition("\n")[0]
                ) from error
            if refuses_dtype(self.model, inputs, dtype):
                raise TypeError(
                    f"BcosifiedModel: expected images of the model's dtype, {dtype}, got {inputs.dtype} "
                    "(images.to(dtype), or model.to(dtype))"
                ) from error
            raise

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] as [x, 1 - x] (N, 2C, H, W); 2C channels, or ``inverse=False``: unchanged."""
        self.check_images(images)
        if images.shape[1] == self.channels:
            return self.add_inverse(images)
        return images

    @property
    def num_classes(self) -> int | None:
        """Number of logits; None for a network without a head."""
        return self.config["num_classes"]

    @property
    def transform(self) -> ImageTransform:
        """PIL image -> float32 tensor (C, H, W) in [0, 1], resized and cropped as the weights expect."""
        return ImageTransform(Preprocessing.from_dict(self.config))

    def check_images(self, images: Tensor) -> None:
        """What ``encode`` and the forward check first, of images (N, C, H, W) or encoded ones: warns once of values
        outside [-0.01, 1.01].

        Raises:
            TypeError: no tensor, or one of integers. ValueError: another shape.
        """
        encoded = 2 * self.channels if self.config["options"]["inverse"] else self.channels
        expected = f"{self.channels}" if encoded == self.channels else f"{self.channels} or {encoded}"
        if not isinstance(images, Tensor):
            raise TypeError(f"BcosifiedModel: expected a tensor of images in [0, 1], got {type(images).__name__}")
        if images.dim() != 4 or images.shape[1] not in (self.channels, encoded):
            raise ValueError(
                f"BcosifiedModel: expected images of shape (N, C, H, W) with C = {expected}, got {tuple(images.shape)}"
            )
        if not images.is_floating_point():
            raise TypeError(f"BcosifiedModel: expected floating point images in [0, 1], got {images.dtype}")
        if self._range_checked or torch.compiler.is_compiling():
            return
        # Reading a value waits for the device, so elsewhere than on the CPU only the first images are looked at.
        self._range_checked = images.device.type != "cpu" and values_readable(images)
        text = out_of_range(images)
        if text is not None:
            self._range_checked = True
            warn_caller(f"BcosifiedModel: {text}; they are normalised inside the model (said once)")

    def reset_classifier(self, num_classes: int) -> BcosifiedModel:
        """Replace the head by a new one with ``num_classes`` outputs and random weights, in place; returns self.

        The new head has the old one's type, exponent and options. A logit bias that was set by "auto" becomes
        -log(num_classes - 1).
        """
        return reset_head(self, num_classes)

    def remove_biases(self) -> list[str]:
        """Set the biases of all layers to None, in place, as after bias decay; returns their names.

        The logit bias stays: it is a constant, no parameter.
        """
        removed = remove_biases(self.model)
        self.config["options"]["bias"] = "remove"
        return [f"model.{name}" for name in removed]

    def saved_state(self) -> dict[str, Tensor]:
        """The tensors that ``save_pretrained`` writes, by name."""
        return self.state_dict()

    def prepare_for(self, config: dict[str, Any], state: dict[str, Tensor]) -> None:
        """Called by ``load`` before ``state`` is loaded: for what a model has beside the converted network."""

    def loaded_from(self, folder: Path) -> None:
        """Called by ``load`` in the end: for what lies in the folder beside weights and config.json."""

    def extra_repr(self) -> str:
        c = self.config
        return f"num_classes={c['num_classes']}, b={c['options']['b']}, bias={c['options']['bias']!r}"


def _normalize(preprocessing: Preprocessing, options: dict[str, Any], model: nn.Module) -> nn.Module:
    normalize = bnn.Normalize(preprocessing.mean, preprocessing.std, inverse=options["inverse"])
    parameter = next(model.parameters(), torch.empty(0))
    if parameter.dtype == torch.float64:
        # In float64 from the start: 1 - mean rounded to float32 would not cancel against mean to 1e-10.
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
        std = torch.tensor(preprocessing.std, dtype=torch.float64)
        normalize.mean = torch.cat([mean, 1 - mean]) if options["inverse"] else mean
        normalize.std = torch.cat([std, std]) if options["inverse"] else std
    return normalize if parameter.is_meta else normalize.to(parameter.device)


def out_of_range(images: Tensor) -> str | None:
    """What is wrong with the values of images, in words; None: they lie in [0, 1], or cannot be read."""
    if not values_readable(images):
        return None
    low, high = torch.aminmax(images.detach())
    if low >= IN_RANGE[0] and high <= IN_RANGE[1]:
        return None
    return f"expected images in [0, 1], got values from {low:.3g} to {high:.3g}"


def values_readable(images: Tensor) -> bool:
    """Whether a tensor's values can be looked at without being waited for, or are there at all."""
    if images.numel() == 0 or images.is_meta or torch.jit.is_tracing():
        return False
    # Fake, functional and vmapped tensors have no values to look at; a stream being captured must not be waited for.
    if type(images) not in (Tensor, nn.Parameter) or torch._C._functorch.is_functorch_wrapped_tensor(images):
        return False
    return not (images.is_cuda and torch.cuda.is_current_stream_capturing())


def auto_logit_bias(bias: str, num_classes: int | None) -> float | None:
    """-log(classes - 1) when biases go, else None (as with fewer than two classes)."""
    if bias == "keep" or num_classes is None or num_classes < 2:
        return None
    return -math.log(num_classes - 1)


def _new_head(old: nn.Module, num_classes: int) -> nn.Module:
    """A copy of a B-cos layer with another number of outputs and random weights."""
    weight = old.weight.new_empty(num_classes * old.max_out, *old.weight.shape[1:])
    new = copy.deepcopy(old)
    new.weight = nn.Parameter(weight, requires_grad=old.weight.requires_grad)
    if old.bias is not None:
        new.bias = nn.Parameter(weight.new_empty(weight.shape[0]), requires_grad=old.bias.requires_grad)
    setattr(new, "out_channels" if isinstance(new, bnn.BcosConv2d) else "out_features", num_classes)
    new.reset_parameters()
    return new


def reset_head(model: BcosifiedModel, num_classes: int) -> BcosifiedModel:
    """Give a B-cosified model a new B-cos head with random weights, in place.

        head = model.model.get_submodule(model.config["head"])       # BcosConv2d (1x1) or BcosLinear

    Args:
        model: what ``bcosify`` or ``load`` returned.
        num_classes: outputs of the new head, at least 1.

    Returns:
        ``model``. The head keeps its type, place, exponent, bias (or none) and dtype; weights are drawn as nn.Linear
        draws them. A logit bias set by "auto" follows the number of classes.

    Raises:
        TypeError: ``model`` is not B-cosified. ValueError: num_classes < 1, or the model has no head.
    """
    if not isinstance(model, BcosifiedModel):
        raise TypeError(f"reset_head: expected a model made by bcosify, got {type(model).__name__}")
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"reset_head: expected num_classes to be an int >= 1, got {num_classes!r}")
    name = model.config["head"]
    if name is None:
        raise ValueError("reset_head: expected a model with a classification head, got one without")
    for place in (name, *model.config.get("other_heads", [])):
        model.model.set_submodule(place, _new_head(model.model.get_submodule(place), num_classes))
    model.config["num_classes"] = num_classes
    model.config.pop("class_names", None)  # those of the old head
    if model.config["options"]["logit_bias"] == "auto":
        bias = auto_logit_bias(model.config["options"]["bias"], num_classes)
        model.config["logit_bias"] = bias
        model.logit_bias = (nn.Identity() if bias is None else bnn.LogitBias(bias)).train(model.training)
    return model
