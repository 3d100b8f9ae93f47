"""W(x) and everything else that adds to a logit, in one forward and one backward pass."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from bcosification.names import shortened
from bcosification.nn import explanation_mode
from bcosification.nn.evaluation_mode import evaluation_mode
from bcosification.nn.modes import constant_modules, per_sample

__all__ = ["dynamic_linear_map"]

_CHANNELS_FIRST = (_ConvNd, nn.GroupNorm, _BatchNorm)

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


def dynamic_linear_map(model: nn.Module, x6: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The affine map that a B-cos model applies to each image, for one logit of each.

        with explanation_mode(model):
            logits = model(x6.requires_grad_())
        weights = autograd.grad(logits.gather(1, targets[:, None]).sum(), x6)
        constant = logits.gather(1, targets[:, None]) - (weights * x6).sum()      # but computed on its own

    The constant is not that difference: every module that adds a constant multiplies it by a gain, one per sample,
    that is 1, and ∂logit/∂gain is what all the constants together add.

    Args:
        model: a B-cosified model, one made of this package's or the peers' modules, or any wrapper of DataParallel's
            or torch.compile's kind around one (which is run without the wrapper).
        x6: images (N, C, H, W), floating point, passed to the model as they are (encoded, not normalised). Or whatever
            a model of floating point reads, samples first: the embeddings (N, T, D) of a text.
        targets: (N,) integers, the logits to explain; None: the largest one of each image; (N, T): several of each,
            from one forward pass and T backward passes.

    Returns:
        logits (N, classes), weights W(x) = ∂logit/∂x6 (N, C, H, W), constant (N,), all detached, in the logits' dtype
        (weights: x6's). (weights * x6).sum + constant = logit. With targets (N, T): weights (N, T, C, H, W) and
        constant (N, T).

    The model runs in eval and explanation mode; both are restored, also after errors. ``.grad`` is left alone. Calls
    for the same model wait for each other.

    Raises:
        ValueError: the model does not return logits (N, classes), or targets do not fit them.

    Source: B-cos networks v2, arXiv:2306.10898, section 3.
    """
    model = bare_model(model)
    if not isinstance(x6, Tensor) or not x6.is_floating_point():
        raise TypeError(f"explain: expected floating point images, got {getattr(x6, 'dtype', type(x6))}")
    with _locks_guard:  # classifiers made of one CLIP model share its layers, so they share its lock
        lock = _locks.setdefault(getattr(model, "explained", model), threading.RLock())
    with lock, torch.inference_mode(False), torch.enable_grad(), evaluation_mode(model), explanation_mode(model):
        x6 = x6.detach().clone().requires_grad_()
        gain = torch.ones(x6.shape[0], device=x6.device, dtype=x6.dtype, requires_grad=True)
        with _gained(model, gain) as parameters:
            logits = torch.func.functional_call(model, parameters, (x6,)) if parameters else model(x6)
        index = _target_index(logits, x6.shape[0], targets)
        chosen = logits.gather(1, index).sum(0)
        if not chosen.requires_grad:
            raise ValueError("explain: expected logits that depend on the images, got constant ones")
        parts = []
        for i, column in enumerate(chosen):
            more = i + 1 < chosen.numel()
            parts.append(
                torch.autograd.grad(column, (x6, gain), retain_graph=more, allow_unused=True, materialize_grads=True)
            )
    if targets is None or torch.as_tensor(targets).dim() == 1:
        ((weights, constant),) = parts
    else:
        weights, constant = (torch.stack(tensors, 1) for tensors in zip(*parts, strict=True))
    return logits.detach(), weights.detach(), constant.detach().to(logits.dtype)


def bare_model(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and DataParallel's wrappers, in which hooks and modes take effect."""
    while True:
        inside = getattr(model, "_orig_mod", None)
        if inside is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inside = model.module
        if inside is None:
            return model
        model = inside


def additive_parameters(model: nn.Module) -> list[str]:
    """Names, in ``model``, of the parameters that it or a module inside tells to be added outside any layer."""
    names = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "additive_parameters", ())
    ]
    return list(dict.fromkeys(names))


def _target_index(logits: Tensor, samples: int, targets: Tensor | None) -> Tensor:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != samples:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"explain: expected the model to return logits ({samples}, classes), got {got}")
    if targets is None:
        return logits.detach().argmax(1, keepdim=True)
    targets = torch.as_tensor(targets, device=logits.device)
    shaped = targets.dim() in (1, 2) and targets.shape[0] == samples and (targets.dim() == 1 or targets.shape[1] > 0)
    if not shaped or targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(
            f"explain: expected targets ({samples},) or ({samples}, T) of integers, got "
            f"{tuple(targets.shape)} {targets.dtype}"
        )
    # One host read, before anything is computed from the targets: gather on CUDA would end in a device assertion.
    if samples and not bool(((targets >= 0) & (targets < logits.shape[1])).all()):
        wrong = [str(value) for value in targets.unique().tolist() if not 0 <= value < logits.shape[1]]
        raise ValueError(f"explain: expected targets in [0, {logits.shape[1] - 1}], got {shortened(wrong)}")
    return targets.long() if targets.dim() == 2 else targets.long().unsqueeze(1)


@contextmanager
def _gained(model: nn.Module, gain: Tensor) -> Iterator[dict[str, Tensor]]:
    """Every constant of ``model`` multiplied by ``gain``; yields the additive parameters' values, times gain.

    This package's modules do it themselves (``constant_gain``). Plain layers and the peers' get a forward hook that
    adds (gain - 1) times their constant, which is 0. What is inside a gate adds nothing to the logit.
    """
    with ExitStack() as stack:
        inside_gates = constant_modules(model)
        for module in model.modules():
            if module in inside_gates:
                continue
            if hasattr(module, "constant_gain"):
                stack.callback(setattr, module, "constant_gain", module.constant_gain)
                module.constant_gain = gain
            else:
                hook = _constant_hook(module, gain)
                if hook is not None:
                    stack.callback(module.register_forward_hook(hook).remove)
        values = {}
        for name in additive_parameters(model):
            parameter = model.get_parameter(name)
            if parameter.shape[0] != 1:
                raise ValueError(
                    f"explain: expected additive parameter {name!r} of shape (1, ...), "
                    f"got {tuple(parameter.shape)}"
                )
            values[name] = parameter.detach() * gain.view(-1, *[1] * (parameter.dim() - 1))
        yield values


def _constant_hook(module: nn.Module, gain: Tensor) -> Callable | None:
    """A forward hook that multiplies what ``module`` adds to its output by ``gain``; None if it adds nothing."""
    kind = type(module).__name__
    if kind == "PosEmbSinCos2d":  # the peer's SimpleViT: its output, without a batch, is added to the tokens

        def whole(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
            return output.unsqueeze(0) * gain.view(-1, *[1] * output.dim())

        return whole

    constant = _constant_of(module)
    if constant is None:
        return None
    # The peers' PositionNorm and torchvision's LayerNorm2d are nn.LayerNorms on (N, C, H, W).
    names = ("LayerNorm2d", "Normalize")
    channels_first = isinstance(module, _CHANNELS_FIRST) or "PositionNorm" in kind or kind in names

    def part(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        extra = per_sample(gain, output.shape[0], output.dim(), kind) - 1
        added = constant
        if channels_first and isinstance(added, Tensor):
            added = added.to(output).view(-1, *[1] * (output.dim() - 2))
        return output + extra * added

    return part


def _constant_of(module: nn.Module) -> Tensor | float | None:
    bias = getattr(module, "logit_bias", None)  # the peers' LogitLayer
    if isinstance(bias, (int, float)) and not module._modules:
        return float(bias)
    if f"{type(module).__module__}.{type(module).__qualname__}" == "torchvision.transforms.transforms.Normalize":
        mean, std = (torch.as_tensor(values, dtype=torch.float64) for values in (module.mean, module.std))
        return -mean / std  # B-cosification's networks begin with one
    if not isinstance(module, (*_CHANNELS_FIRST, nn.Linear, nn.LayerNorm)):
        return None
    bias = None if module.bias is None else module.bias.detach()
    centred = isinstance(module, _BatchNorm) and "Uncentered" not in type(module).__name__
    if not centred or module.running_mean is None:
        return bias
    shift = module.running_mean / torch.sqrt(module.running_var + module.eps)
    if module.weight is not None:
        shift = shift * module.weight.detach()
    return -shift if bias is None else bias - shift
