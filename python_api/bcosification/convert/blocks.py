"""Block fusion: known blocks get a forward that gives residual and ReLU to the BatchNorm before them, in one pass.

A block is fused by giving the instance a subclass of its library class (``module.__class__``): parameters, keys, hooks,
``isinstance`` and deep copies stay what they were, pickles find the subclass here, and `unfuse_blocks` gives the
library's class back. Only exact library types of the table below are touched, and only if their parts are what the
library builds them of.

The fused forwards decide part by part when they run what is one op (chains.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bcos_kernels

from ..nn import GELU, BatchNormUncentered2d, BcosConv2d, BcosLinear, LayerNorm
from .chains import (
    convolution_norm_activation,
    fusible_convolution,
    fusible_gelu,
    fusible_linear,
    fusible_norm,
    norm_activation,
    run_in_turn,
    unit_norm_activation,
)
from .fusion_report import FusionReport
from .tracing import Calls, NotTraceable, has_parts, has_units, traced_class

__all__ = ["FusionReport", "fuse_blocks", "norm_activation", "recomputes", "set_recompute", "unfuse_blocks"]


# --- forwards -------------------------------------------------------------------------------------------------------
#
# With `recompute_activations` (memory="low") what a pass over something kept gives again is not kept itself.


def recomputes(self: nn.Module) -> bool:
    """Whether a block was told by `set_recompute` to keep less."""
    return self.__dict__.get("recompute_activations", False)


def set_recompute(model: nn.Module, recompute: bool) -> None:
    """Set whether the blocks of ``model`` that `fuse_blocks` or a conversion gave their forwards compute activations
    again in the backward where a pass over something kept gives them: normalised, rectified and gated ones,
    concatenations, and outputs of one-pixel convolutions that widen."""
    for module in model.modules():
        for flag in ("recompute", "recompute_activations"):
            module.__dict__.pop(flag, None)
        if recompute and isinstance(module, LayerNorm):
            module.recompute = True
        elif recompute and not {"_library_class", "_original_class"}.isdisjoint(vars(type(module))):
            module.recompute_activations = True


def _residual_of(self: Any, x: Tensor) -> Tensor:
    return x if self.downsample is None else self.downsample(x)


def _basic_block_forward(self: Any, x: Tensor) -> Tensor:
    low = recomputes(self)
    out = convolution_norm_activation(self.conv1, self.bn1, self.relu, x, recompute=low)
    return convolution_norm_activation(self.conv2, self.bn2, self.relu, out, _residual_of(self, x), recompute=low)


def _bottleneck_forward(self: Any, x: Tensor) -> Tensor:
    low = recomputes(self)
    out = convolution_norm_activation(self.conv1, self.bn1, self.relu, x, recompute=low)
    out = convolution_norm_activation(self.conv2, self.bn2, self.relu, out, recompute=low)
    return convolution_norm_activation(self.conv3, self.bn3, self.relu, out, _residual_of(self, x), recompute=low)


def _peer_residual(self: Any, conv: nn.Module, norm: nn.Module, out: Tensor, x: Tensor) -> Tensor:
    """norm(conv(out)) + identity; stochastic depth stands between the two."""
    low = recomputes(self)
    if self.stochastic_depth is not None:
        out = self.stochastic_depth(convolution_norm_activation(conv, norm, None, out, recompute=low))
        return out + _residual_of(self, x)
    return convolution_norm_activation(conv, norm, None, out, _residual_of(self, x), recompute=low)


def _peer_basic_block_forward(self: Any, x: Tensor) -> Tensor:
    out = convolution_norm_activation(self.conv1, self.bn1, None, x, recompute=recomputes(self))
    return _peer_residual(self, self.conv2, self.bn2, out, x)


def _peer_bottleneck_forward(self: Any, x: Tensor) -> Tensor:
    low = recomputes(self)
    out = convolution_norm_activation(self.conv1, self.bn1, None, x, recompute=low)
    out = convolution_norm_activation(self.conv2, self.bn2, None, out, recompute=low)
    return _peer_residual(self, self.conv3, self.bn3, out, x)


def _dense_layer_features(self: Any, inputs: list[Tensor]) -> Tensor:
    """relu1(norm1(cat(inputs))); the package bcos has no ReLUs."""
    low = recomputes(self)
    features = torch.cat(inputs, 1)
    if low:
        features = bcos_kernels.recomputed(features, lambda *parts: torch.cat(parts, 1), *inputs)
    return norm_activation(self.norm1, getattr(self, "relu1", None), features, recompute=low)


def _dense_layer_bn_function(self: Any, inputs: list[Tensor]) -> Tensor:
    return self.conv1(_dense_layer_features(self, inputs))


def _dense_layer_forward(self: Any, x: Tensor | list[Tensor]) -> Tensor:
    features = [x] if isinstance(x, Tensor) else x
    low, relu = recomputes(self), getattr(self, "relu2", None)
    if self.memory_efficient and self.any_requires_grad(features):
        out = norm_activation(self.norm2, relu, self.call_checkpoint_bottleneck(features), recompute=low)
    else:
        out = _dense_layer_features(self, features)
        out = convolution_norm_activation(self.conv1, self.norm2, relu, out, recompute=low)
    out = self.conv2(out)
    return F.dropout(out, p=self.drop_rate, training=self.training) if self.drop_rate > 0 else out


def _timm_dense_layer_forward(self: Any, x: Tensor | list[Tensor]) -> Tensor:
    features = [x] if isinstance(x, Tensor) else x
    low = recomputes(self)
    if self.grad_checkpointing and self.any_requires_grad(features):
        out = norm_activation(self.norm2, None, self.call_checkpoint_bottleneck(features), recompute=low)
    else:
        out = _dense_layer_features(self, features)
        out = convolution_norm_activation(self.conv1, self.norm2, None, out, recompute=low)
    out = self.conv2(out)
    return F.dropout(out, p=self.drop_rate, training=self.training) if self.drop_rate > 0 else out


def _dla_basic_forward(self: Any, x: Tensor, shortcut: Tensor | None = None, children: Any = None) -> Tensor:
    low, residual = recomputes(self), x if shortcut is None else shortcut
    out = convolution_norm_activation(self.conv1, self.bn1, self.relu, x, recompute=low)
    return convolution_norm_activation(self.conv2, self.bn2, self.relu, out, residual, recompute=low)


def _dla_bottleneck_forward(self: Any, x: Tensor, shortcut: Tensor | None = None, children: Any = None) -> Tensor:
    low, residual = recomputes(self), x if shortcut is None else shortcut
    out = convolution_norm_activation(self.conv1, self.bn1, self.relu, x, recompute=low)
    out = convolution_norm_activation(self.conv2, self.bn2, self.relu, out, recompute=low)
    return convolution_norm_activation(self.conv3, self.bn3, self.relu, out, residual, recompute=low)


def _stages(self: Any, x: Tensor) -> Tensor:
    x = self.maxpool(convolution_norm_activation(self.conv1, self.bn1, self.relu, x, recompute=recomputes(self)))
    return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def _resnet_forward_impl(self: Any, x: Tensor) -> Tensor:
    return self.fc(torch.flatten(self.avgpool(_stages(self, x)), 1))


def _resnet_head_first_forward_impl(self: Any, x: Tensor) -> Tensor:
    return self.avgpool(self.fc(_stages(self, x))).flatten(1)


def _sequential_forward(self: Any, x: Any) -> Any:
    return run_in_turn(list(self._modules.values()), x, recomputes(self))


def _distilbert_feed_forward(self: Any, x: Tensor) -> Tensor:
    if fusible_linear(self.lin1) and fusible_gelu(self.activation):
        x = self.activation.behind(self.lin1, x, "output" if recomputes(self) else None)
    else:
        x = self.activation(self.lin1(x))
    return self.dropout(self.lin2(x))


# --- what may be fused ----------------------------------------------------------------------------------------------


def _needs(relus: tuple[str, ...], norms: tuple[str, ...]) -> Callable[[nn.Module], str | None]:
    """A check that returns why a block is left, or None: norms have to be uncentered, activations ReLUs or removed."""

    def check(module: nn.Module) -> str | None:
        for name in relus:
            part = getattr(module, name, None)
            if type(part) not in (nn.ReLU, nn.Identity):
                return f"{name} is {type(part).__name__}, not ReLU"
        for name in norms:
            part = getattr(module, name, None)
            if not isinstance(part, BatchNormUncentered2d):
                return f"{name} is {type(part).__name__}, not BatchNormUncentered2d"
        return None

    return check


_NOTHING_TO_FUSE = (
    "no BatchNormUncentered2d after a B-cos convolution or before a ReLU, no GELU after a B-cos linear layer"
)


def _has_feed_forward(module: nn.Module) -> str | None:
    return None if isinstance(module.lin1, BcosLinear) and type(module.activation) is GELU else _NOTHING_TO_FUSE


def _has_pair(module: nn.Module) -> str | None:
    parts = list(module._modules.values())
    for a, b in zip(parts, parts[1:], strict=False):
        if isinstance(a, BatchNormUncentered2d) and type(b) is nn.ReLU:
            return None
        if isinstance(a, BcosConv2d) and isinstance(b, BatchNormUncentered2d):
            return None
        if isinstance(a, BcosLinear) and type(b) is GELU:
            return None
    return _NOTHING_TO_FUSE


Chains = tuple[tuple[str, str], ...]
"""(convolution, norm): names of children that a forward calls in turn, and as one op where they are of this package."""


def _sequential_chains(module: nn.Module) -> Chains:
    names = list(module._modules)
    return tuple(zip(names, names[1:], strict=False))


@dataclass(frozen=True)
class BlockRule:
    """How blocks of one library class are fused: the subclass's name and methods, the check of a block's parts, and its
    chains, or a function that tells a block's."""

    name: str
    methods: dict[str, Callable[..., Any]]
    check: Callable[[nn.Module], str | None]
    chains: Chains | Callable[[nn.Module], Chains] = _sequential_chains


_ONE_CHAIN: Chains = (("conv1", "bn1"),)
_TWO_CHAINS: Chains = (*_ONE_CHAIN, ("conv2", "bn2"))
_THREE_CHAINS: Chains = (*_TWO_CHAINS, ("conv3", "bn3"))
_DENSE_CHAIN: Chains = (("conv1", "norm2"),)
_TORCHVISION_RESNET = _needs(("relu",), ("bn1", "bn2"))
_SEQUENTIAL = {"forward": _sequential_forward}
_DENSE_LAYER = {"forward": _dense_layer_forward, "bn_function": _dense_layer_bn_function}

# Qualified name of the library's class → rule. Conversions of further families add theirs here.
BLOCK_RULES: dict[str, BlockRule] = {
    "torchvision.models.resnet.BasicBlock": BlockRule(
        "FusedBasicBlock", {"forward": _basic_block_forward}, _TORCHVISION_RESNET, _TWO_CHAINS
    ),
    "torchvision.models.resnet.Bottleneck": BlockRule(
        "FusedBottleneck", {"forward": _bottleneck_forward}, _needs(("relu",), ("bn1", "bn2", "bn3")), _THREE_CHAINS
    ),
    "torchvision.models.resnet.ResNet": BlockRule(
        "FusedResNet", {"_forward_impl": _resnet_forward_impl}, _needs(("relu",), ("bn1",)), _ONE_CHAIN
    ),
    "torchvision.models.densenet._DenseLayer": BlockRule(
        "FusedDenseLayer", _DENSE_LAYER, _needs(("relu1", "relu2"), ("norm1", "norm2")), _DENSE_CHAIN
    ),
    "bcos.models.densenet._DenseLayer": BlockRule(
        "FusedPeerDenseLayer", _DENSE_LAYER, _needs((), ("norm1", "norm2")), _DENSE_CHAIN
    ),
    "timm.models.densenet.DenseLayer": BlockRule(
        "FusedTimmDenseLayer", {"forward": _timm_dense_layer_forward}, _needs((), ("norm1", "norm2")), _DENSE_CHAIN
    ),
    "timm.models.dla.DlaBasic": BlockRule(
        "FusedDlaBasic", {"forward": _dla_basic_forward}, _TORCHVISION_RESNET, _TWO_CHAINS
    ),
    "timm.models.dla.DlaBottleneck": BlockRule(
        "FusedDlaBottleneck",
        {"forward": _dla_bottleneck_forward},
        _needs(("relu",), ("bn1", "bn2", "bn3")),
        _THREE_CHAINS,
    ),
    "torchvision.models.densenet._Transition": BlockRule("FusedTransition", _SEQUENTIAL, _has_pair),
    "torchvision.ops.misc.Conv2dNormActivation": BlockRule("FusedConv2dNormActivation", _SEQUENTIAL, _has_pair),
    "torchvision.models.regnet.SimpleStemIN": BlockRule("FusedSimpleStemIN", _SEQUENTIAL, _has_pair),
    "torchvision.ops.misc.MLP": BlockRule("FusedMLP", _SEQUENTIAL, _has_pair),
    "torchvision.models.vision_transformer.MLPBlock": BlockRule("FusedMLPBlock", _SEQUENTIAL, _has_pair),
    "torch.nn.modules.container.Sequential": BlockRule("FusedSequential", _SEQUENTIAL, _has_pair),
    "bcos.modules.common.BcosSequential": BlockRule("FusedBcosSequential", _SEQUENTIAL, _has_pair),
    "bcos.models.resnet.BasicBlock": BlockRule(
        "FusedPeerBasicBlock", {"forward": _peer_basic_block_forward}, _needs((), ("bn2",)), _TWO_CHAINS
    ),
    "bcos.models.resnet.Bottleneck": BlockRule(
        "FusedPeerBottleneck", {"forward": _peer_bottleneck_forward}, _needs((), ("bn3",)), _THREE_CHAINS
    ),
    "bcos.models.standard_models.ResNetBcos": BlockRule(
        "FusedResNetBcos",
        {"_forward_impl": _resnet_head_first_forward_impl},
        _needs(("relu",), ("bn1",)),
        _ONE_CHAIN,
    ),
}


BLOCK_RULES |= {
    f"transformers.models.{module}.modeling_{module}.{name}Intermediate": BlockRule(
        f"Fused{name}Intermediate", _SEQUENTIAL, _has_pair
    )
    for module, name in (("bert", "Bert"), ("roberta", "Roberta"), ("xlm_roberta", "XLMRoberta"))
}
BLOCK_RULES["transformers.models.distilbert.modeling_distilbert.FFN"] = BlockRule(
    "FusedDistilBertFFN", {"ff_chunk": _distilbert_feed_forward}, _has_feed_forward
)


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _fused_class(rule: BlockRule, library: type) -> type:
    """The subclass of ``library`` with the rule's methods, made once and kept in this module under the rule's name."""
    made = globals().get(rule.name)
    if made is None or made._library_class is not library:
        members = {"__module__": __name__, "__qualname__": rule.name, "_library_class": library, **rule.methods}
        members["fused_chains"] = rule.chains
        members["__doc__"] = f"{_qualified(library)} with fused passes; made by fuse_blocks."
        made = globals()[rule.name] = type(rule.name, (library,), members)
    return made


def __getattr__(name: str) -> type:
    """The fused classes, made when first asked for: unpickling finds them here; no library is imported in vain."""
    for qualified, rule in BLOCK_RULES.items():
        if rule.name == name:
            module, _, cls = qualified.rpartition(".")
            return _fused_class(rule, getattr(importlib.import_module(module), cls))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def fuse_blocks(model: nn.Module) -> FusionReport:
    """Give every block in ``model`` whose forward is known its fused forward, in place; what is unknown stays as it is.

    A forward is known where it is the one of a class in `BLOCK_RULES`, with the parts that it was written for, or from
    its trace (tracing.py), in which chains of convolution, BatchNorm, addition and ReLU are found whatever they are
    called. A traced forward is the one that the block has now: parts may be replaced, but `unfuse_blocks` before
    changing what decides between its branches (setting ``downsample`` to None).

    Args:
        model: any model, possibly itself a block.

    Returns:
        A FusionReport. Left with a reason are blocks that have a forward of their own on the instance, and those whose
        trace would not be all that their forward does.
    """
    report = FusionReport()
    for name, module in list(model.named_modules()):
        cls = type(module)
        rule = BLOCK_RULES.get(_qualified(cls))
        if rule is not None and not _is_the_librarys(cls, rule):
            rule = None
        reason = None if rule is None else rule.check(module)
        own = next((m for m in ("forward", *(rule.methods if rule else ())) if m in module.__dict__), None)
        if rule is not None and reason is None and own is None:
            module.__class__ = _fused_class(rule, cls)
            report.fused.append((name, cls.__name__, rule.name))
            continue
        if _may_be_traced(module):
            try:
                if own is None and fuse_traced(module):
                    report.fused.append((name, cls.__name__, type(module).__name__))
                    continue
                reason = reason if own is None else "has a forward of its own"
            except NotTraceable as error:
                reason = str(error) if has_parts(module) else reason  # its units run as one op each anyway
        if reason not in (None, _NOTHING_TO_FUSE):
            report.left.append((name, cls.__name__, reason))
    _report_chains(model, report)
    return report


def _report_chains(model: nn.Module, report: FusionReport) -> None:
    """Fill in ``report`` which pairs of convolution and norm run as one op, as the modules' classes tell."""
    behind: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        for conv_name, norm_name in _chains_of(module):
            conv, norm = _child(module, conv_name), _child(module, norm_name)
            if conv is not None and norm is not None and fusible_convolution(conv) and fusible_norm(norm):
                behind[norm] = conv
    names = {module: name for name, module in model.named_modules()}
    norms = [module for module in names if isinstance(module, BatchNormUncentered2d)]
    report.chains = [(names[behind[norm]], names[norm]) for norm in norms if norm in behind]
    report.apart = [names[norm] for norm in norms if norm not in behind]


def _chains_of(module: nn.Module) -> Iterable[tuple[str, str]]:
    """What the class of a fused or converted module says: ``fused_chains``, names or a function of the module."""
    found = getattr(type(module), "fused_chains", ())
    return found(module) if callable(found) else found


def _child(module: nn.Module, name: str) -> nn.Module | None:
    """A module's child; of an nn.Sequential as a stem, its last layer."""
    child = module._modules.get(name)
    return list(child._modules.values())[-1] if isinstance(child, nn.Sequential) and len(child) else child


def fuse_traced(module: nn.Module) -> bool:
    """Give a block the fused form of its forward's trace; False where there is no chain in it. Raises NotTraceable."""
    cls = traced_class(module, Calls(convolution_norm_activation, unit_norm_activation))
    if cls is not None:
        module.__class__ = cls
    return cls is not None


def _is_the_librarys(cls: type, rule: BlockRule) -> bool:
    """Whether the methods that a rule replaces are those that the class's own library defines, and nobody's patches."""
    bases = {(base.__module__, base.__qualname__) for base in cls.__mro__}
    methods = (getattr(cls, name) for name in rule.methods)
    return all((m.__module__, m.__qualname__.rpartition(".")[0]) in bases for m in methods)


def _may_be_traced(module: nn.Module) -> bool:
    cls = type(module)
    ours = cls.__module__.partition(".")[0] == __name__.partition(".")[0] or "_library_class" in cls.__dict__
    return not ours and not isinstance(module, nn.Sequential) and (has_parts(module) or has_units(module))


def unfuse_blocks(model: nn.Module) -> nn.Module:
    """Give every fused block in ``model`` its library class again, in place; returns ``model``."""
    for module in model.modules():
        library = type(module).__dict__.get("_library_class")
        if library is not None:
            module.__class__ = library
    set_recompute(model, False)
    return model
