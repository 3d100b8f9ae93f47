"""Explanation mode: the switch that every module with dynamic weights has, and the context that flips a whole model.

In explanation mode a network is the affine map that it applies to one input: every scale, gate, variance and attention
matrix is a constant for the gradient, so that ∂logit/∂x is the W(x) of the B-cos papers (arXiv:2306.10898).
"""

from __future__ import annotations

import threading
import weakref
from types import TracebackType

from torch import Tensor, nn

__all__ = ["DetachableModule", "constant_modules", "explanation_mode"]


class DetachableModule(nn.Module):
    """A module whose dynamic weights can be held constant for the gradient.

    Attributes:
        detach: whether explanation mode is on (default False).
        constant_gain: None, or a tensor of shape (N,). Modules that add a constant (a bias, a mean) multiply it by
            ``constant_gain[n]`` for sample n; with a gain of ones that requires grad, ∂logit_n/∂gain_n in explanation
            mode is what all these constants add to the logit. Dimension 0 of the input is the batch; an input whose
            dimension 0 is a multiple k·N (windows cut from images, batch first) repeats every gain k times.

    Both live on the class until they are set, so a module that got this class later (``fuse``) has them too.
    """

    detach: bool = False
    constant_gain: Tensor | None = None

    def set_explanation_mode(self, activate: bool = True) -> None:
        """Turn explanation mode on (default) or off for this module alone."""
        self.detach = bool(activate)

    @property
    def is_in_explanation_mode(self) -> bool:
        """Whether this module is in explanation mode."""
        return self.detach


def per_sample(gain: Tensor, batch: int, dims: int, name: str) -> Tensor:
    """``gain`` (N,) as (batch, 1, …, 1) with ``dims`` dimensions; batch must be a multiple of N."""
    samples = gain.shape[0]
    if gain.dim() != 1 or (batch % samples if samples else batch):
        raise ValueError(
            f"{name}: expected constant_gain of shape (N,) with the batch size a multiple of N, "
            f"got {tuple(gain.shape)} and a batch of {batch}"
        )
    if batch != samples:
        gain = gain.repeat_interleave(batch // samples)
    return gain.view(batch, *([1] * (dims - 1)))


def constant_modules(model: nn.Module) -> set[nn.Module]:
    """The modules in ``model`` that compute nothing but constants of the explanation: no part of them is in W(x).

    Such are the children that a module names in ``constant_children``: the layers of a squeeze-and-excitation, of a
    network that makes the attention's position bias. They stay plain layers, their biases add nothing to a logit and
    are no biases to remove.
    """
    return {
        inside
        for module in model.modules()
        for name in getattr(module, "constant_children", ())
        if module._modules.get(name) is not None
        for inside in module._modules[name].modules()
    }


_lock = threading.RLock()
# module → [number of contexts that hold it, the mode found by the first of them]
_held: weakref.WeakKeyDictionary[nn.Module, list] = weakref.WeakKeyDictionary()


def _mode_of(module: nn.Module) -> bool:
    mode = getattr(module, "is_in_explanation_mode", None)
    return bool(getattr(module, "detach", False) if mode is None else mode)


def _release(modules: list[nn.Module]) -> None:
    for module in modules:
        entry = _held.get(module)
        if entry is None:
            continue
        entry[0] -= 1
        if entry[0] == 0:
            del _held[module]
            module.set_explanation_mode(entry[1])


class explanation_mode:  # noqa: N801  (a context manager, named like a function)
    """Context manager: every submodule that can is in explanation mode, and back in the mode it was in afterwards.

        with explanation_mode(model):
            logits = model(images)
            logits[0, 3].backward()

    Serves this package's modules and the peers' (whatever has ``set_explanation_mode``). Contexts nest and may overlap
    between threads: they are counted per module under a lock, and the modes found by the first are restored when the
    last one is left. Train/eval mode and gradients are left alone. Enter the context before compiling or exporting:
    such programs keep the mode they were made in.

    Args:
        model: any module; modules added to it inside the context are not switched.

    Raises:
        TypeError: if ``model`` is not a module. What a module's ``set_explanation_mode`` raises (the peer's centred
            BatchNorm in training mode) passes through, with all modes restored.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"explanation_mode: expected a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self._entered: list[list[nn.Module]] = []

    def __enter__(self) -> nn.Module:
        modules: list[nn.Module] = []
        with _lock:
            try:
                for module in self.model.modules():
                    if not hasattr(module, "set_explanation_mode"):
                        continue
                    entry = _held.get(module)
                    if entry is None:
                        mode = _mode_of(module)
                        module.set_explanation_mode(True)
                        _held[module] = [1, mode]
                    else:
                        entry[0] += 1
                    modules.append(module)
            except BaseException:
                _release(modules)
                raise
            self._entered.append(modules)
        return self.model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _lock:
            _release(self._entered.pop())
