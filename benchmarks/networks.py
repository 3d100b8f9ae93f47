"""The networks of the model suites: plain from torchvision, the peer's from the package bcos, ours made of the plain.

A contender is made by `build`; `NotHere` says why one cannot be.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

import bcosification


class NotHere(Exception):
    """A contender that cannot be made; `status` is what a table says, the message why."""

    def __init__(self, status: str, reason: object):
        super().__init__(str(reason))
        self.status = status


def _vit(width: int, heads: int) -> Callable[[int], nn.Module]:
    def make(size: int) -> nn.Module:
        from torchvision.models.vision_transformer import VisionTransformer

        return VisionTransformer(
            image_size=size, patch_size=16, num_layers=12, num_heads=heads, hidden_dim=width, mlp_dim=4 * width
        )

    return make


def _torchvision(name: str) -> Callable[[int], nn.Module]:
    def make(size: int) -> nn.Module:
        import torchvision  # not where this module is: a machine with a GPU may lack it

        return getattr(torchvision.models, name)(weights=None)

    return make


@dataclasses.dataclass(frozen=True)
class Network:
    """One architecture.

    Attributes:
        title: its name in tables.
        plain: the standard network, of the edge of its images.
        peer: its name in bcos.models.pretrained, which builds the B-cos network of that kind as the package trains it.
            The peer's ViTs are SimpleViTs: no class token, tokens averaged before the head.
        batch: images of a training step.
    """

    title: str
    plain: Callable[[int], nn.Module]
    peer: str
    batch: int


_CALIBRATION = 8  # images

NETWORKS = {
    "resnet18": Network("ResNet-18", _torchvision("resnet18"), "resnet18", 16),
    "resnet50": Network("ResNet-50", _torchvision("resnet50"), "resnet50", 8),
    "densenet121": Network("DenseNet-121", _torchvision("densenet121"), "densenet121", 8),
    "vit_ti": Network("ViT-Ti/16", _vit(192, 3), "simple_vit_ti_patch16_224", 8),
    "vit_s": Network("ViT-S/16", _vit(384, 6), "simple_vit_s_patch16_224", 8),
    "convnext_tiny": Network("ConvNeXt-T", _torchvision("convnext_tiny"), "convnext_tiny", 4),
}


def channels_last(t):
    return t.to(memory_format=torch.channels_last)


def calibrated(model: nn.Module, images: Tensor) -> nn.Module:
    """``model`` with the statistics of its activations on ``images`` in its batch norms, as training leaves them.

    In place. With those of a new network (variance 1) a B-cos network's signal shrinks from layer to layer: W(x) of a
    ResNet-50 is 1e-20 and full of denormal numbers, which take an Intel CPU eight times as long.
    """
    norms = [module for module in model.modules() if getattr(module, "running_var", None) is not None]
    momenta, training = [norm.momentum for norm in norms], model.training
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.train(training)


class Models:
    """The contenders of one network, all with the same weights where they have the same parameters."""

    def __init__(self, name: str, size: int):
        self.network = NETWORKS[name]
        torch.manual_seed(0)
        self.size = size
        self.plain = calibrated(channels_last(self.network.plain(size)), inputs("plain", _CALIBRATION, size))
        self._converted: nn.Module | None = None
        self._peer: nn.Module | None = None

    def converted(self) -> nn.Module:
        if self._converted is None:
            try:
                self._converted = channels_last(bcosification.bcosify(self.plain))
            except (ValueError, NotImplementedError) as error:
                raise NotHere("not convertible yet", error) from None
            calibrated(self._converted, inputs("ours", _CALIBRATION, self.size))
        return self._converted

    def peer(self) -> nn.Module:
        if self._peer is None:
            for package in ("bcos", "einops") if "vit" in self.network.peer else ("bcos",):
                if importlib.util.find_spec(package) is None:
                    raise NotHere(f"needs {package}", f"pip install {package}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from bcos.models import pretrained

                self._peer = channels_last(getattr(pretrained, self.network.peer)(pretrained=False))
            calibrated(self._peer, inputs("peer", _CALIBRATION, self.size))
            # Its configuration and transform are the package's own objects, of no use here, and not all can be copied.
            for attribute in ("config", "transform"):
                self._peer.__dict__.pop(attribute, None)
        return self._peer

    def build(self, contender: str) -> nn.Module:
        """A fresh copy of a contender's model; raises NotHere if there is none."""
        kind, _, how = contender.partition("-")
        if kind == "fused":
            model = bcosification.fuse(copy.deepcopy(self.peer()))
        elif kind == "peer":
            model = copy.deepcopy(self.peer())
        else:
            model = copy.deepcopy(self.plain if kind == "plain" else self.converted())
        if how == "low":
            bcosification.fuse(model, memory="low")
        return torch.compile(model) if how == "compiled" else model

    @staticmethod
    def eager(contender: str) -> str | None:
        """The contender that has to compute the same numbers: an eager one, or the peer for its fused form."""
        kind, _, how = contender.partition("-")
        if kind == "fused":
            return "peer"
        return kind if how in ("compiled", "low") else None


def inputs(contender: str, batch: int, size: int) -> Tensor:
    """Random images as a contender takes them: channels_last, 3 channels, or for the peer's networks encoded in 6."""
    images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    if "peer" in contender:
        images = torch.cat([images, 1 - images], dim=1)
    return images if contender.endswith("-nchw") else channels_last(images)
