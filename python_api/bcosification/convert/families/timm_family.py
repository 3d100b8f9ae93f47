"""What timm's models have in common: pretrained_cfg, create_model's arguments, classifiers by name."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcosification.convert import timm_attention, timm_layers, timm_norms  # noqa: F401  (they register rules)
from bcosification.convert.class_change import ChangedForward, change_class
from bcosification.convert.families.base import Family, HeadBeforePool
from bcosification.convert.rules import Options, double_input_channels, type_name

_CLASSIFIER_HEADS = ("timm.layers.classifier.ClassifierHead", "timm.layers.classifier.NormMlpClassifierHead")


def configuration(model: nn.Module) -> dict[str, Any]:
    """timm's pretrained_cfg as a dict; empty for a model that create_model did not make."""
    found = getattr(model, "pretrained_cfg", None) or {}
    return found if isinstance(found, dict) else found.to_dict()


class TimmFamily(Family):
    """Base of the families of timm's classes. ``head_name`` is where the classifier is; ``example_name`` and
    ``example_arguments``: create_model's for a small network."""

    head_name = "head"
    example_name = ""
    example_arguments: dict[str, Any] = {}

    def example(self) -> nn.Module:
        return self.build({"name": self.example_name, "arguments": {"num_classes": 5, **self.example_arguments}})

    def input_layer(self, model: nn.Module) -> str | None:
        return next(iter(self._readers(model)), None)

    def _readers(self, model: nn.Module) -> list[str]:
        """The convolutions that read the image: those that timm names, or else the first one."""
        first = configuration(model).get("first_conv")
        modules = dict(model.named_modules())
        names = [first] if isinstance(first, str) else list(first or [])
        named = [name for name in names if isinstance(modules.get(name), nn.Conv2d)]
        return named or [name for name, module in modules.items() if isinstance(module, nn.Conv2d)][:1]

    def head(self, model: nn.Module) -> str | None:
        found = dict(model.named_modules()).get(self.head_name)
        return self.head_name if isinstance(found, (nn.Linear, nn.Conv2d)) else None

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        # Its channels are doubled before it is converted, and [W, -W] / 2 standardised is not W's.
        name = self.input_layer(model)
        if name is not None and "StdConv2d" in type(model.get_submodule(name)).__name__:
            model.set_submodule(name, timm_layers.unstandardized(model.get_submodule(name)))
        for name in self._readers(model)[1:] if options.inverse else ():  # branches of a re-parametrised stem
            double_input_channels(model.get_submodule(name))
        return model

    def input_size(self, model: nn.Module) -> tuple[int, int] | None:
        size = getattr(model, "_traits", {}).get("img_size")
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) if size is None else size
        size = configuration(model).get("input_size", (None, None))[-2:] if size is None else size
        return None if size[0] is None else (int(size[0]), int(size[1]))

    def architecture(self, model: nn.Module) -> dict[str, Any] | None:
        """create_model's name and arguments; None without a name, or with arguments that JSON cannot hold."""
        config = configuration(model)
        name, tag = config.get("architecture"), config.get("tag")
        if not name:
            return None
        arguments = dict(getattr(model, "_model_args", {}))
        if isinstance(getattr(model, "num_classes", None), int):
            arguments["num_classes"] = model.num_classes
        try:
            return json.loads(json.dumps({"name": f"{name}.{tag}" if tag else name, "arguments": arguments}))
        except TypeError:
            return None

    def build(self, architecture: dict[str, Any]) -> nn.Module:
        import timm

        return timm.create_model(architecture["name"], pretrained=False, **architecture["arguments"])


_WIDTHS = ("in_channels", "out_channels", "num_features", "in_features", "out_features", "groups", "expand_chs")


def narrowed(model: nn.Module, divisor: int, classes: int = 5) -> nn.Module:
    """A model like this one, on "meta", with random weights and ``divisor`` times fewer channels, in place.

    For examples of networks whose constructors take no width: all but the image's channels have to be multiples.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if list(layer.parameters(recurse=False))]
    last = [name for name, layer in layers if isinstance(layer, nn.Linear)][-1:]
    for name, layer in model.named_modules():
        for given in _WIDTHS:
            value = layer.__dict__.get(given)
            if value is None or (given == "in_channels" and value == 3) or (given == "groups" and value == 1):
                continue
            if value % divisor and not (name in last and given == "out_features"):
                raise ValueError(f"narrowed: expected {given} of {name!r} to be a multiple of {divisor}, got {value}")
            setattr(layer, given, classes if name in last and given == "out_features" else value // divisor)
    for _, layer in layers:
        if isinstance(layer, nn.Conv2d):
            shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
        elif isinstance(layer, nn.Linear):
            shape = (layer.out_features, layer.in_features)
        else:
            shape = (layer.num_features,)
        for key, old in [*layer._parameters.items(), *layer._buffers.items()]:
            if old is not None and old.dim():
                new = torch.zeros(shape if key == "weight" else shape[:1])
                setattr(layer, key, nn.Parameter(new) if key in layer._parameters else new)
            elif old is not None:
                setattr(layer, key, torch.tensor(0))
        layer.reset_parameters()
    return model


class HeadBeforePoolLinear(HeadBeforePool):
    """A classifier that is alone behind the global pooling, before it, as the 1x1 convolution that it becomes."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits:
            return super().forward_head(x, pre_logits=True)
        if hasattr(self, "head_drop"):
            x = self.head_drop(x)
        else:
            x = F.dropout(x, float(self.drop_rate), self.training)
        x = self.global_pool(self.get_classifier()(x))
        return self.flatten(x) if "flatten" in self._modules else x.flatten(1)


class PooledHeadFamily(TimmFamily):
    """Families whose global_pool is followed by dropout and the classifier ``head_name`` alone."""

    def moves_head(self, model: nn.Module) -> bool:
        return averages(model.global_pool)

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        model = super().prepare(model, options, head_moves)
        return change_class(model, HeadBeforePoolLinear) if head_moves else model


class HeadBeforePoolClassifierHead(ChangedForward):
    """ClassifierHead whose classifier runs before the global pooling."""

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits:
            return super().forward(x, pre_logits=True)
        return self.flatten(self.global_pool(self.fc(self.drop(x))))


class HeadBeforePoolNormMlpHead(ChangedForward):
    """NormMlpClassifierHead whose norm, MLP and classifier run at every position before the global pooling."""

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits:
            return super().forward(x, pre_logits=True)
        x = self.norm(x).permute(0, 2, 3, 1)  # what follows is linear over the last dimension
        x = self.fc(self.drop(self.pre_logits(x))).permute(0, 3, 1, 2)
        return self.flatten(self.global_pool(x))


class ClassifierHeadFamily(TimmFamily):
    """Families whose model.head is a ClassifierHead or a NormMlpClassifierHead."""

    head_name = "head.fc"

    def moves_head(self, model: nn.Module) -> bool:
        head = model.head
        return type_name(type(head)) in _CLASSIFIER_HEADS and averages(head.global_pool)

    def moved_head_is_convolution(self, model: nn.Module) -> bool:
        return not hasattr(model.head, "norm") and getattr(model.head, "input_fmt", "NCHW") == "NCHW"

    def head_move_changes(self, model: nn.Module) -> str | None:
        head = model.head
        if isinstance(getattr(head, "pre_logits", None), nn.Sequential):
            return "the mean over positions is taken after the head's norm and MLP, not before"
        norm = getattr(head, "norm", None)
        # A BatchNorm commutes with the mean, a norm over the channels does not.
        if norm is None or isinstance(norm, (nn.Identity, nn.BatchNorm2d)):
            return None
        return "the mean over positions is taken after the head's norm, not before"

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        if head_moves:
            mixin = HeadBeforePoolNormMlpHead if hasattr(model.head, "norm") else HeadBeforePoolClassifierHead
            change_class(model.head, mixin)
        return super().prepare(model, options, head_moves)


def averages(pool: nn.Module) -> bool:
    """Whether a SelectAdaptivePool2d takes the mean over all positions. ValueError where it takes a maximum."""
    kind = pool.pool_type.lower()
    if "max" in kind:
        raise ValueError(
            f"bcosify: expected global average pooling to move the head before it, got pool_type={kind!r}; "
            "head='keep' leaves it where it is"
        )
    return bool(kind)


class HeadBeforePoolTokens(HeadBeforePool):
    """Token models: positions of other image sizes per sample, and, with ``head_before_pool``, the head per token."""

    head_before_pool = False

    def pooled_tokens(self, x: Tensor) -> Tensor:
        """Those of the tokens (N, L, D) that the global pooling averages."""
        prefix = 0 if getattr(self, "pool_include_prefix", False) else getattr(self, "num_prefix_tokens", 0)
        return x[:, prefix:]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits or not self.head_before_pool:
            return super().forward_head(x, pre_logits)
        x = self.pooled_tokens(x)
        if hasattr(self, "fc_norm"):
            x = self.fc_norm(x)
        return self.head(self.head_drop(x)).mean(1)

    def _pos_embed(self, x: Tensor) -> Any:
        """timm's, one sample at a time where explanations have given every sample its own positions to resample."""
        own = {
            name: self._parameters[name]
            for name in ADDITIVE
            if isinstance(self._parameters.get(name), Tensor) and self._parameters[name].shape[0] > 1
        }
        if not own or not self.dynamic_img_size:
            return super()._pos_embed(x)
        results = []
        try:
            for i in range(x.shape[0]):
                self._parameters.update({name: value[i : i + 1] for name, value in own.items()})
                results.append(super()._pos_embed(x[i : i + 1]))
        finally:
            self._parameters.update(own)
        if isinstance(results[0], tuple):  # with rotary positions, which are those of every sample
            return torch.cat([tokens for tokens, _ in results]), results[0][1]
        return torch.cat(results)


ADDITIVE = ("pos_embed", "cls_token", "reg_token", "dist_token")
"""Parameters of timm's token models that are added to the tokens, or put beside them."""


class TokenFamily(TimmFamily):
    """Families of models on tokens (N, L, D): the classifier ``head`` is behind global_pool, fc_norm and head_drop."""

    def moves_head(self, model: nn.Module) -> bool:
        if getattr(model, "attn_pool", None) is not None or model.global_pool in ("", "token"):
            return False
        if model.global_pool != "avg":
            raise ValueError(
                "bcosify: expected global_pool='avg', 'token', 'map' or '', to know where the head goes, got "
                f"{model.global_pool!r}; head='keep' leaves it where it is"
            )
        return True

    def moved_head_is_convolution(self, model: nn.Module) -> bool:
        return False

    def head_move_changes(self, model: nn.Module) -> str | None:
        if isinstance(getattr(model, "fc_norm", nn.Identity()), nn.Identity):
            return None
        return "the mean over tokens is taken after fc_norm, not before"

    def additive_parameters(self, model: nn.Module) -> list[str]:
        return [name for name in ADDITIVE if isinstance(getattr(model, name, None), nn.Parameter)]

    def prepare(self, model: nn.Module, options: Options, head_moves: bool) -> nn.Module:
        model = super().prepare(model, options, head_moves)
        model.head_before_pool = head_moves
        return change_class(model, HeadBeforePoolTokens)
