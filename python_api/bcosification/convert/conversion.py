"""``bcosify``: a standard network into a B-cosified one that starts from its weights."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import nn

from bcosification.convert.blocks import fuse_blocks
from bcosification.convert.clip import BcosifiedCLIP
from bcosification.convert.families import FAMILIES, Family, family_of, original_class
from bcosification.convert.families.base import SIBLINGS
from bcosification.convert.preprocessing import Preprocessing, detect, with_statistics
from bcosification.convert.rules import (
    COMPOSITES,
    FACTORS,
    LINEAR,
    UNREAD,
    NoRule,
    Options,
    as_convolution,
    check_hooks,
    double_input_channels,
    find_rule,
    remove_biases,
    type_name,
)
from bcosification.convert.text import BcosifiedText
from bcosification.convert.wrapper import BcosifiedModel, auto_logit_bias

FORMAT = 1
"""Version of the layout of ``BcosifiedModel.config`` (and so of config.json)."""
READERS_OF_TEXT = (
    "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM", "ForCausalLM",
    "LMHeadModel",
)  # fmt: skip
"""Ends of the names of classes of transformers that no advice about images helps."""

_CHOICES = {
    "bias": ("remove", "keep", "decay"),
    "pool": ("average", "keep"),
    "head": ("before_pool", "keep"),
    "activation": ("keep", "remove"),
    "on_unknown": ("error", "keep"),
}

_WRAPPERS = {
    "DistributedDataParallel": "its .module",
    "DataParallel": "its .module",
    "FullyShardedDataParallel": "the model before it was sharded",
    "OptimizedModule": "its ._orig_mod, and compile the converted model",
    "GraphModule": "the model before it was traced",
    "ScriptModule": "the model before it was scripted",
}
"""Torch's classes around a model -> what to convert instead."""
_FEATURES_ONLY = "timm.models._features."
"""Module of timm's classes whose forward returns feature maps (create_model(…, features_only=True))."""


def bcosify(
    model: nn.Module,
    *,
    b: float = 2.0,
    bias: str = "remove",
    pool: str = "average",
    head: str = "before_pool",
    activation: str = "keep",
    normalize_weight: bool = False,
    inverse: bool = True,
    normalize_input: bool = True,
    logit_bias: str | float | None = "auto",
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    on_unknown: str = "error",
) -> BcosifiedModel:
    """Convert a standard model into a B-cos model that starts from its weights. ``model`` itself is left alone.

        linear, convolution  ->  B-cos layer with the same weight          (first one: [W, -W] / 2 on [x, 1 - x])
        BatchNorm            ->  x / sqrt(running_var + eps) * w + bias - running_mean / sqrt(running_var + eps) * w
        max pooling          ->  average pooling; classifier -> 1x1 B-cos convolution before global pooling

    With b=1, bias="keep" and pool="keep" the logits in eval mode are those of ``model`` on normalised images. Where
    a LayerNorm or an activation belongs to the classifier (ConvNeXt, MobileNetV3, MaxViT), that takes head="keep":
    moved, it is applied at every position instead of to their mean. docs/families.md says it of each family.

    Args:
        model: a standard network; torchvision's classifiers, nn.Sequential, open_clip's CLIP models, their image towers
            alone and Hugging Face's CLIPVisionModelWithProjection (these become a BcosifiedCLIP), and Hugging Face's
            sequence classifiers of BERT's kind (these become a BcosifiedText) are known whole (`bcosify families`
            lists all), other classes are converted layer by layer with head="keep".
        b: exponent of all B-cos layers, a number >= 1, default 2.
        bias: "remove" all biases (default), "keep" them, or "decay": kept now, to be removed during training
            (``BcosifiedModel.remove_biases``).
        pool: max pooling becomes "average" pooling of the same kernel (default), or is kept ("keep").
        head: the classifier runs "before_pool" as a 1x1 layer (default; on the class token where there is one), or
            stays where it is ("keep").
        activation: "keep" ReLU and GELU (default) or "remove" them (B-cos v2).
        normalize_weight: B-cos layers divide weights by their norm (B-cos v2); default False.
        inverse: encode images as [x, 1 - x] (default True).
        normalize_input: normalise by mean and std inside the model (default True).
        logit_bias: number added to all logits, None, or "auto" (default): -log(classes - 1) unless bias="keep".
        mean, std: per channel for images in [0, 1]; default: those of timm's pretrained_cfg, open_clip's preprocessing
            (OpenAI's for CLIP's bare towers) or ImageNet's for torchvision's models. Required for other models.
        on_unknown: layers without a rule: "error" (default) names them all, "keep" leaves them as they are.
        Of texts, ``pool``, ``head``, ``inverse`` and ``normalize_input`` have nothing to act on; mean and std are an
        error.

    Returns:
        A new BcosifiedModel on the same device, in the same dtype and train/eval mode. It takes images (N, 3, H, W) in
        [0, 1] or encoded ones (N, 6, H, W) (C and 2C in general). Nothing is shared with ``model``.

    Raises:
        TypeError: not a module, or a wrapper (DataParallel, compiled, scripted): give it the model inside.
        ValueError: an unknown option, one that a classifier of texts has nothing for, unknown mean and std, layers
            without a rule, tied parameters, a model that is B-cos already.

    Source: B-cosification (Arya, Rao, Boehle, Schiele, 2024), section 3.

    Example:
        >>> model = bcosify(torchvision.models.resnet18(weights="DEFAULT"))
        >>> model(torch.rand(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
    """
    check_convertible(model)
    whole, model = model, family_of(model).tower(model)
    family = family_of(model)
    options = check_options(
        b=b,
        bias=bias,
        pool=pool,
        head=head,
        activation=activation,
        normalize_weight=normalize_weight,
        inverse=inverse,
        normalize_input=normalize_input,
        logit_bias=logit_bias,
        on_unknown=on_unknown,
    )
    source = getattr(whole, "bcosification_source", None) or {}
    if family.reads_text:
        if mean is not None or std is not None:
            kind = type_name(type(model))
            raise ValueError(f"bcosify: expected no mean= and std= for {kind}, which reads no images")
        return convert(model, replace(options, inverse=False, normalize_input=False), None, source=source)
    size = family.input_size(model)
    if source.get("preprocessing"):
        found = Preprocessing.from_dict(source["preprocessing"])
    else:
        found = detect(model, family.preprocessing, size)
    problems: list[str] = []
    if whole is not model and not family.embeds:
        problems.append(
            "expected an image tower of a known family (open_clip's ModifiedResNet, VisionTransformer, TimmModel), got "
            f"{type_name(type(model))} in {type_name(type(whole))}"
        )
    preprocessing = None
    with _noted(problems):
        preprocessing = with_statistics(found, mean, std, size)
    converted = convert(model, options, preprocessing, source=source, problems=problems)
    if whole is not model:
        converted.attach_text(whole)
    return converted


def check_options(**given: Any) -> Options:
    """The options of ``bcosify``, checked."""
    for name, choices in _CHOICES.items():
        if given[name] not in choices:
            expected = ", ".join(repr(choice) for choice in choices)
            raise ValueError(f"bcosify: expected {name} to be one of {expected}, got {given[name]!r}")
    b = given["b"]
    if isinstance(b, bool) or not isinstance(b, Real):
        raise TypeError(f"bcosify: expected b to be a number, got {type(b).__name__} {b!r}")
    if not 1 <= b < math.inf:
        raise ValueError(f"bcosify: expected b >= 1 and finite, got {b}")
    logit_bias = given["logit_bias"]
    if isinstance(logit_bias, Real) and not isinstance(logit_bias, bool):
        if not math.isfinite(logit_bias):
            raise ValueError(f"bcosify: expected logit_bias to be finite, got {logit_bias}")
        given["logit_bias"] = float(logit_bias)
    elif logit_bias not in ("auto", None):
        raise ValueError(f"bcosify: expected logit_bias to be 'auto', None or a number, got {logit_bias!r}")
    for name in ("normalize_weight", "inverse", "normalize_input"):
        if not isinstance(given[name], bool):
            raise TypeError(f"bcosify: expected {name} to be True or False, got {given[name]!r}")
    return Options(**{**given, "b": float(b)})


def check_convertible(model: nn.Module) -> None:
    """Raise, naming the reason, for what is no standard network: wrappers, B-cos models, tied parameters."""
    if not isinstance(model, nn.Module):
        hint = f" (resolve({model!r})[0] gives the model of a name)" if isinstance(model, str) else ""
        raise TypeError(f"bcosify: expected a torch.nn.Module, got {type(model).__name__}{hint}")
    if isinstance(model, BcosifiedModel):
        raise ValueError("bcosify: expected a standard model, got one that is already B-cosified")
    if type_name(type(model)).startswith(_FEATURES_ONLY):
        raise ValueError(
            f"bcosify: expected a model that gives logits, which are what W(x) explains, got timm's "
            f"{type(model).__name__}, which gives a list of feature maps: create it without features_only=True"
        )
    for name, module in model.named_modules():
        place = f"submodule {name!r} is" if name else "got"
        kind = type_name(type(module))
        for base in type(module).__mro__:
            if base.__module__.startswith("torch.") and base.__name__ in _WRAPPERS:
                instead = _WRAPPERS[base.__name__]
                raise TypeError(f"bcosify: expected a plain model, {place} {base.__name__}; convert {instead}")
        if hasattr(module, "set_explanation_mode"):
            raise ValueError(f"bcosify: expected a standard model, {place} {kind}, which is B-cos already")
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
            raise ValueError(
                f"bcosify: expected layers whose parameters are there, {place} {type(module).__name__}, which makes "
                "them in its first call: call the model once, model(images), and convert it then"
            )
    known = next((known for prefix, known in SIBLINGS.items() if type_name(type(model)).startswith(prefix)), None)
    if type_name(type(model)).startswith("transformers.") and type(model).__name__.endswith(READERS_OF_TEXT):
        known = known or SIBLINGS["transformers.models.bert."]
    if known is not None and type(family_of(model)) is Family:
        raise ValueError(f"bcosify: expected {known}, got {type_name(type(model))}")
    owners: dict[Any, str] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = f"{module_name}.{name}" if module_name else name
            keys: list[Any] = [id(parameter)]
            if parameter.numel() and parameter.device.type != "meta":
                keys.append((str(parameter.device), parameter.data_ptr(), parameter.shape))
            for key in keys:
                if owners.setdefault(key, full) != full:
                    raise ValueError(
                        f"bcosify: expected every layer to have its own parameters, got {owners[key]!r} and {full!r}, "
                        "which are one tensor (tied weights)"
                    )


@dataclass
class _Walk:
    """Replaces layers by their rules, depth first, and keeps account of it."""

    options: Options
    additive: set[str]
    done: dict[int, nn.Module] = field(default_factory=dict)
    applied: list[dict[str, str]] = field(default_factory=list)
    unknown: list[tuple[str, str, str]] = field(default_factory=list)

    def replace(self, module: nn.Module, name: str, place: str | None = None) -> nn.Module:
        if id(module) in self.done:  # one layer registered in several places stays one layer
            return self.done[id(module)]
        new = self._replace(module, name, place)
        self.done[id(module)] = new
        return new

    def _replace(self, module: nn.Module, name: str, place: str | None) -> nn.Module:
        kind = type_name(original_class(module))
        if kind in COMPOSITES:
            self.unknown.append((name, kind, COMPOSITES[kind]))
            return module
        rule = find_rule(module, place)
        if rule is not None:
            try:
                check_hooks(module)
                new = rule(module, self.options)
            except NoRule as reason:
                self.unknown.append((name, kind, str(reason)))
                return module
            self.applied.append({"name": name, "was": kind, "becomes": type_name(type(new))})
            return new
        read = next((known for prefix, known in UNREAD.items() if kind.startswith(prefix)), None)
        if read is not None and kind not in read and kind not in FAMILIES and module._modules:
            reason = "what its forward does besides calling its layers is not known, so they may not be all of it"
            self.unknown.append((name, kind, reason))
        known = self.additive.union(_join(name, factor) for factor in FACTORS.get(kind, ()))
        own = [
            parameter
            for parameter in module._parameters
            if module._parameters[parameter] is not None and _join(name, parameter) not in known
        ]
        if own:
            self.unknown.append((name, kind, f"it holds the parameters {', '.join(own)}"))
        elif not module._modules and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            self.unknown.append((name, kind, "no rule for this type"))
        for child_name, child in module._modules.items():
            if child is not None:
                module._modules[child_name] = self.replace(child, _join(name, child_name), f"{kind}.{child_name}")
        return module


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


@contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """A ValueError inside becomes one more of ``problems``: everything that hinders a conversion is told at once."""
    try:
        yield
    except ValueError as error:
        problems.append(str(error).removeprefix("bcosify: "))


def convert(
    model: nn.Module,
    options: Options,
    preprocessing: Preprocessing | None,
    *,
    source: dict[str, Any] | None = None,
    blocks: bool = True,
    problems: Sequence[str] = (),
    warn: bool = True,
) -> BcosifiedModel:
    """The conversion itself, on a copy of ``model``, with checked options.

    ``source`` tells how the resolver made the model ("spec", "num_classes", "weights"); ``blocks=False`` leaves blocks
    unfused. ``problems`` is what is known to stand in the way (``preprocessing`` is None then, and of texts): it is
    told together with what is found here. ``warn=False``: layers that are kept without a rule were told before.
    """
    problems = list(problems)
    family = family_of(model)
    config = {
        "format": FORMAT,
        "class": type_name(type(model)),
        "family": family.name,
        "architecture": describe(family, model),
        "source": source.get("spec") if source else None,
        "source_num_classes": source.get("num_classes") if source else None,
        "source_weights": source.get("weights") if source else None,
        "dtype": str(next((p.dtype for p in model.parameters()), torch.get_default_dtype())).removeprefix("torch."),
        "options": asdict(options),
    }
    input_name, head_name = family.input_layer(model), family.head(model)
    moves, classes = False, None
    with _noted(problems):
        family.check(model)
    if options.head == "before_pool" and (head_name is not None or family.embeds):
        with _noted(problems):
            moves = family.moves_head(model)
    if preprocessing is not None:
        with _noted(problems):
            preprocessing = _check_channels(model, input_name, options, preprocessing)
    if family.embeds:
        with _noted(problems):
            _check_tower(model, options)
    with _noted(problems):
        _check_single(model, input_name if options.inverse else None, "layer that reads the image")
        _check_single(model, head_name if moves else None, "classifier")
    if head_name is not None:
        with _noted(problems):
            classes = _check_head(model, head_name, moves)

    network = copy.deepcopy(model)
    network.__dict__.pop("bcosification_source", None)
    additive = family.additive_parameters(model)
    walk = _Walk(options, set(additive))
    if not problems:
        with _noted(problems):
            network = family.prepare(network, options, moves)
        if options.inverse:
            try:
                innermost = len(preprocessing.mean) if family.channels_innermost(model) else None
                double_input_channels(network.get_submodule(input_name), innermost=innermost)
            except NoRule as reason:
                problems.append(f"layer {input_name!r}: {reason}")
        turns = moves and head_name is not None and family.moved_head_is_convolution(model)
        if turns and isinstance(model.get_submodule(head_name), nn.Linear):
            network.set_submodule(head_name, as_convolution(network.get_submodule(head_name)))
    network = walk.replace(network, "")  # with problems, only to find the layers without a rule
    originals = dict(model.named_modules())
    for entry in walk.applied:  # families and the move of the head put other layers in the place of some
        if entry["name"] in originals:
            entry["was"] = type_name(type(originals[entry["name"]]))
    _report(model, problems, walk.unknown, options, warn)
    if options.bias == "remove":
        remove_biases(network)
    if blocks:
        fuse_blocks(network)

    logit_bias = options.logit_bias
    config |= {"input_size": None} if preprocessing is None else preprocessing.to_dict()
    config |= {
        "num_classes": classes,
        "head": head_name,
        "head_before_pool": moves,
        "other_heads": family.other_heads(model),
        "logit_bias": auto_logit_bias(options.bias, classes) if logit_bias == "auto" else logit_bias,
        "kept": [{"name": name, "type": kind, "reason": reason} for name, kind, reason in walk.unknown],
    }
    kind = BcosifiedText if family.reads_text else BcosifiedCLIP if family.embeds else BcosifiedModel
    return kind(network, config, conversion=walk.applied, additive_parameters=additive)


def describe(family: Family, model: nn.Module) -> dict[str, Any] | None:
    """Arguments from which the family builds a model like this one, or None when it cannot."""
    try:
        architecture = family.architecture(model)
        if architecture is None:
            return None
        with torch.device("meta"):
            rebuilt = family.build(architecture)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ImportError):
        return None  # a model of this class, changed by hand
    return architecture if repr(rebuilt) == repr(model) and _same_numbers(rebuilt, model) else None


_STATES = ("training", "grad_checkpointing")


def _same_numbers(rebuilt: nn.Module, model: nn.Module) -> bool:
    """Whether two models of the same repr agree in what it may not show: shapes of parameters and buffers, and the
    numbers and words that their modules keep (not those that only ``model`` has)."""
    shapes = [
        [(name, t.shape) for name, t in itertools.chain(m.named_parameters(), m.named_buffers())]
        for m in (rebuilt, model)
    ]
    kept = [
        (vars(module).get(key), value)
        for ours, module in zip(rebuilt.modules(), model.modules(), strict=True)
        for key, value in vars(ours).items()
        if isinstance(value, (bool, int, float, str)) and key[0] != "_" and key not in _STATES
    ]
    return shapes[0] == shapes[1] and all(one == other for one, other in kept)


def _check_channels(
    model: nn.Module, input_name: str | None, options: Options, preprocessing: Preprocessing
) -> Preprocessing:
    if input_name is None:
        if options.inverse:
            raise ValueError(
                f"bcosify: expected a layer that reads the image (an nn.Conv2d), found none in {type(model).__name__}, "
                "so its channels cannot be doubled: inverse=False converts without"
            )
        return preprocessing
    layer, channels = model.get_submodule(input_name), len(preprocessing.mean)
    if isinstance(layer, nn.Conv2d):
        if channels == 1 < layer.in_channels:
            repeated = layer.in_channels
            return Preprocessing(
                **{**vars(preprocessing), "mean": preprocessing.mean * repeated, "std": preprocessing.std * repeated}
            )
        matches, read = layer.in_channels == channels, layer.in_channels
    elif isinstance(layer, nn.Linear):
        matches, read = layer.in_features % channels == 0, layer.in_features
    else:
        raise ValueError(
            f"bcosify: expected the layer that reads the image, {input_name!r}, to be an nn.Conv2d or nn.Linear, "
            f"got {type(layer).__name__}"
        )
    if not matches:
        raise ValueError(
            f"bcosify: expected one mean and std per channel of {input_name!r}, which reads {read}, got {channels}"
        )
    return preprocessing


def _check_tower(model: nn.Module, options: Options) -> None:
    """Of an image tower, whose outputs are no logits."""
    if isinstance(options.logit_bias, float):
        raise ValueError(
            f"bcosify: expected logit_bias='auto' or None for an image tower, which has no logits, got "
            f"{options.logit_bias}"
        )
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    if len(dtypes) > 1:
        raise ValueError(
            f"bcosify: expected an image tower in one dtype, got {' and '.join(dtypes)}; model.float() makes it one"
        )


def _check_single(model: nn.Module, name: str | None, what: str) -> None:
    """A layer that is changed, not only replaced, must be registered in one place."""
    if name is None:
        return
    layer = model.get_submodule(name)
    names = [other for other, module in model.named_modules(remove_duplicate=False) if module is layer]
    if len(names) > 1:
        raise ValueError(f"bcosify: expected the {what} in one place, got {', '.join(map(repr, names))}")


def _check_head(network: nn.Module, name: str, moves: bool) -> int | None:
    head = network.get_submodule(name)
    if type_name(type(head)) in LINEAR:
        return head.out_features
    if type(head) is nn.Conv2d and (not moves or head.kernel_size == (1, 1)):  # at every position already, or can be
        return head.out_channels
    if moves:
        raise ValueError(
            f"bcosify: expected the classifier {name!r} to be an nn.Linear, got {type(head).__name__}; head='keep' "
            "leaves it where it is"
        )
    return None


def _report(
    model: nn.Module, problems: list[str], unknown: list[tuple[str, str, str]], options: Options, warn: bool
) -> None:
    """ValueError with all that stands in the way; a warning for layers without a rule that are to be kept."""
    listed = _by_reason(unknown)
    if unknown and options.on_unknown == "error":
        problems.append(
            f"expected a rule for every layer, got {len(unknown)} without one:\n{listed}\n"
            "on_unknown='keep' leaves them as they are; bcosification.convert.rules.rule and "
            "bcosification.convert.families.register add rules"
        )
    if len(problems) == 1:
        raise ValueError(f"bcosify: {problems[0]}")
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise ValueError(f"bcosify: {type_name(type(model))} cannot be converted like this:\n{listed}")
    if unknown and warn:
        layers = "1 layer without a rule is kept as it is" if len(unknown) == 1 else (
            f"{len(unknown)} layers without a rule are kept as they are"
        )  # fmt: skip
        warnings.warn(
            f"bcosify: {layers}; explanations may not be exact:\n{listed}",
            stacklevel=4,
        )


def _by_reason(unknown: list[tuple[str, str, str]]) -> str:
    """One line per type and reason, naming every layer."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, kind, reason in unknown:
        names.setdefault((kind, reason), []).append(name or "(the model)")
    return "\n".join(f"  {kind}: {reason}: {', '.join(layers)}" for (kind, reason), layers in names.items())
