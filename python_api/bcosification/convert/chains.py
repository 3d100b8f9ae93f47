"""What a chain of modules runs as: one op where the modules are this package's, else one after the other.

    conv -> BatchNorm (-> + residual) (-> ReLU),   BatchNorm (-> + residual) (-> ReLU),   linear -> GELU

It is decided when they run: a part that was replaced since, or that has hooks, is called the way the library calls it,
so hooks see what they would see in the unfused block.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..nn import GELU, BatchNormUncentered2d, BcosConv2d, BcosLinear
from .tracing import is_unit

__all__ = [
    "convolution_norm_activation",
    "fusible_convolution",
    "fusible_norm",
    "has_hooks",
    "norm_activation",
    "run_in_turn",
    "stem_norm_activation",
    "unit_norm_activation",
]


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def fusible_norm(norm: nn.Module) -> bool:
    return isinstance(norm, BatchNormUncentered2d) and not has_hooks(norm)


def _acting(activation: nn.Module | None) -> nn.Module | None:
    """The activation, None for an nn.Identity, which stands where a conversion removed one."""
    return None if type(activation) is nn.Identity and not has_hooks(activation) else activation


def norm_activation(
    norm: nn.Module,
    activation: nn.Module | None,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """activation(norm(x) + residual), in one pass if ``norm`` is a BatchNormUncentered2d and ``activation`` an nn.ReLU.

    Modules of any other type, and modules with hooks, are called one after the other: the result is the same. Models
    with a forward of their own may call this where they have ``relu(bn(x))``.

    Args:
        norm, activation: the modules; activation may be None.
        x: (N, C, H, W), input of ``norm``.
        residual: of norm(x)'s shape, added before the activation; None (default) for none.
        recompute: the result is computed again in the backward instead of being kept (not with a residual, which would
            have to be kept in its place).
    """
    activation = _acting(activation)
    if activation is None:
        y = _norm_add(norm, x, residual)
        return norm.recomputed(y, x) if recompute and residual is None and fusible_norm(norm) else y
    if fusible_norm(norm) and type(activation) is nn.ReLU and not has_hooks(activation):
        y = norm(x, residual, "relu")
        return norm.recomputed(y, x, "relu") if recompute and residual is None else y
    return activation(_norm_add(norm, x, residual))


def convolution_norm_activation(
    conv: nn.Module,
    norm: nn.Module,
    activation: nn.Module | None,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    recompute: bool = False,
    between: tuple[nn.Module, ...] = (),
) -> Tensor:
    """activation(norm(conv(x)) + residual), as one op where conv is a B-cos convolution and ``norm`` uncentered.

    Modules of other types, and modules with hooks, are called one after the other, as far as that takes.

    Args:
        conv, norm, activation: the modules; activation may be None.
        x: (N, C, H, W), input of ``conv``. residual: added before the activation; None (default) for none.
        recompute: what is between this and the next layer is computed again in the backward instead of being kept: the
            result (not with a residual), and conv's output where that is cheap.
        between: modules called behind the norm, before the residual is added, which do nothing as long as they are
            nn.Identity (timm's drop_block and drop_path).
    """
    if any(type(part) is not nn.Identity or has_hooks(part) for part in between):
        out = convolution_norm_activation(conv, norm, None, x, recompute=recompute)
        for part in between:
            out = part(out)
        out = out if residual is None else out + residual
        return out if activation is None else activation(out)
    activation = _acting(activation)
    rectifies = activation is None or (type(activation) is nn.ReLU and not has_hooks(activation))
    if not (rectifies and fusible_convolution(conv) and fusible_norm(norm)):
        return norm_activation(norm, activation, conv(x), residual, recompute=recompute)
    again = None
    if recompute:
        again = {(True, True): "both", (True, False): "output", (False, True): "inner", (False, False): None}[
            residual is None, _is_cheap(conv)
        ]
    return norm.behind(conv, x, residual, None if activation is None else "relu", again)


def unit_norm_activation(
    unit: nn.Module,
    activation: nn.Module | None,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    recompute: bool = False,
    between: tuple[nn.Module, ...] = (),
) -> Tensor:
    """`convolution_norm_activation` of a module that is convolution and norm (timm's ConvNormAct), if it is no more."""
    aa = unit._modules.get("aa")
    opens = is_unit(unit) and "forward" not in unit.__dict__ and not has_hooks(unit)
    if opens and (aa is None or type(aa) is nn.Identity and not has_hooks(aa)):
        conv, norm = unit.conv, unit.bn
        return convolution_norm_activation(conv, norm, activation, x, residual, recompute=recompute, between=between)
    out = unit(x)
    for part in between:
        out = part(out)
    out = out if residual is None else out + residual
    return out if activation is None else activation(out)


def stem_norm_activation(
    stem: nn.Module, norm: nn.Module, activation: nn.Module | None, x: Tensor, *, recompute: bool = False
) -> Tensor:
    """`convolution_norm_activation` of a convolution, or of an nn.Sequential that ends in one (timm's deep stems)."""
    layers = list(stem._modules.values())
    library = getattr(type(stem), "_library_class", type(stem))
    if library is nn.Sequential and layers and "forward" not in stem.__dict__ and not has_hooks(stem):
        x, stem = run_in_turn(layers[:-1], x, recompute), layers[-1]
    return convolution_norm_activation(stem, norm, activation, x, recompute=recompute)


def fusible_convolution(conv: nn.Module) -> bool:
    """Whether nothing but the transform happens when ``conv`` is called."""
    plain = isinstance(conv, BcosConv2d) and type(conv).forward is BcosConv2d.forward
    return plain and "forward" not in conv.__dict__ and not has_hooks(conv)


def fusible_linear(linear: nn.Module) -> bool:
    plain = isinstance(linear, BcosLinear) and type(linear).forward is BcosLinear.forward
    return plain and "forward" not in linear.__dict__ and not has_hooks(linear)


def fusible_gelu(gelu: nn.Module) -> bool:
    return type(gelu) is GELU and "forward" not in gelu.__dict__ and not has_hooks(gelu)


def _is_cheap(conv: BcosConv2d) -> bool:
    """Whether a convolution may be computed twice: one of one pixel, which writes more than it reads."""
    return conv.kernel_size == (1, 1) and conv.out_channels >= 2 * conv.in_channels and conv.groups == 1


def _norm_add(norm: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    if residual is None:
        return norm(x)
    return norm(x, residual) if fusible_norm(norm) else norm(x) + residual


def run_in_turn(modules: list[nn.Module], x: Any, low: bool) -> Any:
    """x through the modules of an nn.Sequential, with the chains among them as one op each; ``low``: recomputing."""
    i = 0
    while i < len(modules):
        module, *rest = modules[i:]
        if rest and fusible_linear(module) and fusible_gelu(rest[0]):
            x, i = rest[0].behind(module, x, "output" if low else None), i + 2
            continue
        conv = module if rest and fusible_convolution(module) and fusible_norm(rest[0]) else None
        norm, *rest = rest if conv is not None else (module, *rest)
        if conv is None and not fusible_norm(norm):
            x, i = module(x), i + 1
            continue
        relu = rest[0] if rest and type(rest[0]) is nn.ReLU and not has_hooks(rest[0]) else None
        if conv is not None:
            x = convolution_norm_activation(conv, norm, relu, x, recompute=low)
        else:
            x = norm_activation(norm, relu, x, recompute=low and relu is not None)
        i += 1 + (conv is not None) + (relu is not None)
    return x
