"""`fuse`: models made of the peers' B-cos modules run on this package's kernels. `unfuse`: the way back.

The peers are the package ``bcos`` (B-cos v2) and B-cosification's code, whose package has the same name and more
modules. A module is fused by giving the very instance the class of its counterpart (``module.__class__``). So the
parameters, buffers, hooks, modes, the parents' references and what a peer's model has stored about its modules all
stay, and the peer's keys too: a fused layer reads its weight from the peer's own submodule ``linear``, where
optimisers, checkpoints and parameter names expect it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import (
    GELU,
    BatchNormUncentered2d,
    BcosConv2d,
    BcosLinear,
    DetachableModule,
    GroupNorm,
    LayerNorm,
    LayerNorm2d,
    LogitBias,
)
from .blocks import fuse_blocks, set_recompute, unfuse_blocks
from .fusion_report import FusionReport

__all__ = ["fuse", "unfuse"]


class PeerLayer:
    """Mixin of the fused peers' layers: weight and bias live in the peer's submodule ``linear``."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise TypeError(f"{type(self).__name__} is made by fuse() from a peer's layer; new ones are bcosification.nn's")

    @property
    def linear(self) -> nn.Module:
        return self._modules["linear"]

    @property
    def weight(self) -> Tensor:
        return self._modules["linear"].weight

    @property
    def bias(self) -> Tensor | None:
        return self._modules["linear"].bias

    def __setattr__(self, name: str, value: object) -> None:
        if name in ("weight", "bias"):
            setattr(self._modules["linear"], name, value)
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        for name in ("weight", "bias"):  # our own keys are taken as well
            if prefix + name in state_dict and f"{prefix}linear.{name}" not in state_dict:
                state_dict[f"{prefix}linear.{name}"] = state_dict.pop(prefix + name)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)


class PeerBcosConv2d(PeerLayer, BcosConv2d):
    """``bcos``'s BcosConv2d, fused: the weight is normalised."""

    normalize_weight = True


class PeerBcosConv2dWithScale(PeerBcosConv2d):
    """``bcos``'s BcosConv2dWithScale, fused: the output is divided by ``scale``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.scale

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:.3f}"


class PeerBcosLinear(PeerLayer, BcosLinear):
    """``bcos``'s BcosLinear, fused: the weight is normalised."""

    normalize_weight = True


class BcosifyExponent:
    """Mixin: B-cosification's exponent, b + 2 with ``b_loss``, else b clamped to 1 + 1e-6 with ``clamping``, else b."""

    def exponent(self) -> float | Tensor:
        b = self.b
        if self.b_loss:
            b = b + 2
            # The peer uses the general form here, even for a plain number that has a special one.
            return self.weight.new_full((), b) if not isinstance(b, Tensor) and b in (1, 2) else b
        if self.clamping:
            return b.clamp(min=1 + 1e-6) if isinstance(b, Tensor) else max(b, 1 + 1e-6)
        return b


class PeerBcosifyConv2d(BcosifyExponent, PeerLayer, BcosConv2d):
    """B-cosification's BcosifyConv2d, fused: no weight normalisation, possibly a bias."""

    normalize_weight = False


class PeerBcosifyLinear(BcosifyExponent, PeerLayer, BcosLinear):
    """B-cosification's BcosifyLinear, fused: no weight normalisation, possibly a bias."""

    normalize_weight = False


class PeerAttention(DetachableModule):
    """The attention of ``bcos``'s SimpleViT, fused: softmax(q kᵀ·scale) v in one op, which keeps no matrix of it."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.detach:
            q, k = q.detach(), k.detach()
        heads = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.to_out(heads.transpose(1, 2).flatten(2))


# --- what may be fused ----------------------------------------------------------------------------------------------


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _check_layer(module: nn.Module, holder: str) -> str | None:
    linear = module._modules.get("linear")
    if _qualified(type(linear)) != holder:
        return f"its linear is {type(linear).__name__}, not {holder.rpartition('.')[2]}"
    if any(linear.__dict__[hooks] for hooks in _HOOKS) or "forward" in linear.__dict__:
        return "its linear has hooks or a forward of its own, which would not be called"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding_mode={module.padding_mode!r}: the peer's norm ignores it, ours would change the result"
    b = getattr(module, "b", None)
    if not isinstance(b, Tensor) and not getattr(module, "b_loss", False) and not b >= 1:
        return f"b={b} is below 1"
    return None


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _check_conv(module: nn.Module, holder: str) -> str | None:
    own = module.__dict__.get("calc_patch_norms")
    slow = getattr(type(module), "_calc_patch_norms_slow", None)
    if own is not None and (slow is None or getattr(own, "__func__", None) is not slow):
        return "has a calc_patch_norms of its own"
    return _check_layer(module, holder)


def _check_normalized_conv(module: nn.Module) -> str | None:
    return _check_conv(module, "bcos.modules.bcosconv2d.NormedConv2d")


def _check_normalized_linear(module: nn.Module) -> str | None:
    return _check_layer(module, "bcos.modules.bcoslinear.NormedLinear")


def _check_plain_conv(module: nn.Module) -> str | None:
    return _check_conv(module, "torch.nn.modules.conv.Conv2d")


def _check_plain_linear(module: nn.Module) -> str | None:
    return _check_layer(module, "torch.nn.modules.linear.Linear")


def _check_attention(module: nn.Module) -> str | None:
    attend = module._modules.get("attend")
    if type(attend) is not nn.Softmax or attend.dim != -1:
        return f"its attend is {attend}, not Softmax(dim=-1)"
    if any(attend.__dict__[hooks] for hooks in _HOOKS) or "forward" in attend.__dict__:
        return "its softmax has hooks or a forward of its own, which would not be called"
    return None


def _check_nothing(module: nn.Module) -> str | None:
    return None


@dataclass(frozen=True)
class PeerRule:
    """The class that a peer's class becomes, and a check that returns why an instance is left, or None."""

    fused: type
    check: Callable[[nn.Module], str | None] = _check_nothing


# Exact classes of ``bcos`` by qualified name.
PEER_RULES: dict[str, PeerRule] = {
    "bcos.modules.bcosconv2d.BcosConv2d": PeerRule(PeerBcosConv2d, _check_normalized_conv),
    "bcos.modules.bcosconv2d.BcosConv2dWithScale": PeerRule(PeerBcosConv2dWithScale, _check_normalized_conv),
    "bcos.modules.bcoslinear.BcosLinear": PeerRule(PeerBcosLinear, _check_normalized_linear),
    "bcos.modules.norms.uncentered_norms.batchnorm_uncentered.BatchNormUncentered2d": PeerRule(BatchNormUncentered2d),
    "bcos.modules.norms.centered_norms.DetachableLayerNorm": PeerRule(LayerNorm),
    "bcos.modules.norms.centered_norms.DetachableGroupNorm2d": PeerRule(GroupNorm),
    "bcos.modules.norms.centered_norms.DetachableGNInstanceNorm2d": PeerRule(GroupNorm),
    "bcos.modules.norms.centered_norms.DetachableGNLayerNorm2d": PeerRule(GroupNorm),
    "bcos.modules.norms.centered_norms.DetachablePositionNorm2d": PeerRule(LayerNorm2d),
    "bcos.modules.logitlayer.LogitLayer": PeerRule(LogitBias),
    "bcos.models.vit.Attention": PeerRule(PeerAttention, _check_attention),
}

# B-cosification is no package and is vendored under many names: its classes are known by name and attributes.
BCOSIFICATION_RULES: dict[str, tuple[tuple[str, ...], PeerRule]] = {
    "BcosifyConv2d": (
        ("clamping", "b_loss", "b", "linear", "kernel_size"),
        PeerRule(PeerBcosifyConv2d, _check_plain_conv),
    ),
    "BcosifyLinear": (
        ("clamping", "b_loss", "b", "linear", "in_features"),
        PeerRule(PeerBcosifyLinear, _check_plain_linear),
    ),
}
_MY_GELU = "MyGELU"
_MY_GELU_MODULES = ("bcosify_vit", "bcos.experiments.ImageNet.vit_bcosification.experiment_parameters")


def _rule_of(module: nn.Module) -> PeerRule | None:
    cls = type(module)
    rule = PEER_RULES.get(_qualified(cls))
    if rule is not None:
        return rule
    if cls.__name__ in BCOSIFICATION_RULES:
        attributes, rule = BCOSIFICATION_RULES[cls.__name__]
        if all(hasattr(module, name) for name in attributes):
            return rule
    if cls.__name__ == _MY_GELU and cls.__module__ in _MY_GELU_MODULES:
        return PeerRule(GELU)
    return None


def _why_left(module: nn.Module) -> tuple[str, bool] | None:
    """(reason, whether to warn) for a module of the peers without a rule, None for any other module."""
    cls = type(module)
    for base in cls.__mro__[1:]:
        if _qualified(base) in PEER_RULES or base.__name__ in BCOSIFICATION_RULES:
            return f"subclass of {_qualified(base)}", True
    if cls.__module__.startswith("bcos.modules.") and hasattr(module, "set_explanation_mode"):
        return "has no fused form and works as it is", False
    return None


def _swap(module: nn.Module, fused: type) -> None:
    """Give ``module`` its fused class, remembering what `unfuse` needs."""
    state = module.__dict__
    state["_peer_class"] = type(module)
    namer = state.pop("_get_name", None)  # bcos's NoBias puts a function here, which no pickle can hold
    if namer is not None:
        state["_peer_name"] = namer()
    if state.pop("calc_patch_norms", None) is not None:  # bcos sets its slower method on dilated convolutions
        state["_peer_slow_norm"] = True
    module.__class__ = fused
    if isinstance(module, BcosConv2d):
        _to_channels_last(module._modules["linear"]._parameters.get("weight"))


def _unswap(module: nn.Module) -> None:
    state = module.__dict__
    peer = state.pop("_peer_class")
    module.__class__ = peer
    name = state.pop("_peer_name", None)
    if name is not None:
        module._get_name = functools.partial(str, name)
    if state.pop("_peer_slow_norm", False):
        module.calc_patch_norms = module._calc_patch_norms_slow


def _to_channels_last(weight: Tensor | None) -> None:
    if weight is None or weight.dim() != 4 or weight.is_contiguous(memory_format=torch.channels_last):
        return
    # A weight that is a piece of a larger storage, or shared between processes, is somebody's view: its layout stays.
    whole = weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    if whole and not weight.is_shared():
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        if weight.grad is not None:  # a gradient that goes on being accumulated has to have the same layout
            weight.grad = weight.grad.contiguous(memory_format=torch.channels_last)


@dataclass
class FuseReport(FusionReport):
    """What `fuse` did, and what it found done.

    Attributes:
        already: (name, class) of every layer and block that was of this package before: new, converted or fused.
    """

    already: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        if not (self.fused or self.left or self.already):
            return "nothing to fuse"
        lines = [f"{len(names)} x {before} -> {after}" for (before, after), names in _grouped(self.fused).items()]
        if self.already:
            kinds = _grouped(self.already).items()
            lines.append("already on the fused kernels: " + ", ".join(f"{len(n)} x {kind}" for (kind,), n in kinds))
        lines += self.of_chains()
        if self.left:
            lines.append("left as they are:")
            for (kind, reason), names in _grouped(self.left).items():
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                count = f"{len(names)} x " if len(names) > 1 else ""
                lines.append(f"  {count}{kind} ({reason}): {', '.join(name or '(root)' for name in names[:3])}{more}")
        return "\n".join(lines)


def _grouped(rows: list[tuple[str, ...]]) -> dict[tuple[str, ...], list[str]]:
    """The names of rows (name, …) that are the same otherwise."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, *rest in rows:
        groups.setdefault(tuple(rest), []).append(name)
    return groups


def _is_ours(module: nn.Module) -> bool:
    """Whether a layer or block runs on this package's kernels already."""
    if "_library_class" in type(module).__dict__ or "_peer_class" in module.__dict__:
        return True
    return isinstance(module, BcosConv2d | BcosLinear | BatchNormUncentered2d)


def _has_converted_forward(module: nn.Module) -> bool:
    """Whether `bcosify` gave the module its forward, which fuses its own passes (families.change_class)."""
    return "_original_class" in type(module).__dict__


def fuse(model: nn.Module, *, blocks: bool = True, memory: str = "default") -> nn.Module:
    """Run a peer's B-cos model on the fused kernels: same parameters, same numbers, same state_dict keys.

    B-cos layers, uncentered BatchNorms (with or without bias), detachable layer, group and position norms, the
    attention of SimpleViTs and the logit layer of ``bcos`` 0.1.3, and the layers of B-cosification, get the classes of
    this package, in place, exact types only: the classifiers that the two publish are covered whole.
    Parameters, buffers, hooks, device, dtype, training and explanation mode stay the same objects and values; weights
    of convolutions become channels_last in memory. Checkpoints load in both directions, and the peer model's own
    ``explain`` and ``explanation_mode`` keep working. On models of this package's modules, weights become
    channels_last and blocks are fused.

    Args:
        model: a model, changed in place and returned; make optimisers before or after.
        blocks: also fuse known blocks (default): residual and ReLU go into the BatchNorm's pass, see `fuse_blocks`.
        memory: "default", or "low": what a pass over something kept gives again (normalised, rectified and gated
            activations, outputs of layer normalisation before B-cos layers, concatenations, outputs of one-pixel
            convolutions that widen) is computed again in the backward. Same numbers; needs ``blocks``; second
            derivatives raise. Can be changed by calling `fuse` again.

    Fused attention is torch's scaled_dot_product_attention, whose second derivatives raise where its fast kernels run.
    A block of your own is traced once: numbers and flags that its forward reads from the module (``self.alpha``) stay
    as they are then. `unfuse`, change them, and fuse again; parameters and buffers are read anew at every call.

    Returns:
        ``model``. ``model.fusion_report`` says what was fused, what was so already, and what was left and why, at
        length in its lists ``fused``, ``already`` and ``left``, in short when it is printed. Subclasses of the peers'
        classes, and layers that a fused one would not reproduce exactly (``padding_mode`` other than zeros, hooks on
        the inner ``linear``), are left, with a warning that names them. A model without anything to fuse (a standard
        network: `bcosify` makes a B-cos model of it) comes back as it is, with a warning.

    Raises:
        TypeError: if ``model`` is not a module. ValueError: an unknown ``memory``, or "low" without ``blocks``.

    Example:
        >>> import bcos.models.resnet
        >>> model = fuse(bcos.models.resnet.resnet18(num_classes=10))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: expected a torch.nn.Module, got {type(model).__name__}")
    if memory not in ("default", "low"):
        raise ValueError(f"fuse: expected memory to be 'default' or 'low', got {memory!r}")
    if memory == "low" and not blocks:
        raise ValueError(
            "fuse: expected blocks=True with memory='low', which recomputes inside fused blocks, got False"
        )
    report = FuseReport()
    warn: list[str] = []
    for name, module in list(model.named_modules()):
        before = type(module).__name__
        if _is_ours(module):
            report.already.append((name, before))
        rule = _rule_of(module)
        if rule is None:
            left = _why_left(module)
            if type(module) is BcosConv2d:
                _to_channels_last(module.weight)
        else:
            reason = rule.check(module)
            if reason is None and "forward" in module.__dict__:
                reason = "has a forward of its own"
            left = None if reason is None else (reason, True)
        if left is not None:
            report.left.append((name, before, left[0]))
            if left[1]:
                warn.append(f"{name or '(root)'} ({before}: {left[0]})")
        elif rule is not None:
            _swap(module, rule.fused)
            report.fused.append((name, before, rule.fused.__name__))
    found = bool(report.fused or report.left or report.already)
    if blocks and found:
        report.extend(fuse_blocks(model))
        set_recompute(model, memory == "low")
        report.left = [row for row in report.left if not _has_converted_forward(model.get_submodule(row[0]))]
    model.fusion_report = report
    if not found:
        warnings.warn(
            "fuse: expected a model with layers of the package bcos, of B-cosification or of bcosification, found none "
            f"in {type(model).__name__}; bcosification.bcosify(model) makes a B-cos model of a standard network",
            stacklevel=2,
        )
    if warn:
        warnings.warn(f"fuse: left as they are: {'; '.join(warn)}", stacklevel=2)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse`, in place: the peers' module classes and the library's blocks again, with the parameters as they are.

    Args:
        model: a fused model; parts that `fuse` did not change stay as they are.

    Returns:
        ``model``.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse: expected a torch.nn.Module, got {type(model).__name__}")
    unfuse_blocks(model)
    for module in model.modules():
        if "_peer_class" in module.__dict__:
            _unswap(module)
    model.__dict__.pop("fusion_report", None)
    return model
