"""Activations that the backward computes again instead of keeping them.

`recomputed(t, function, *inputs)` declares that ``function(*inputs)`` gives ``t`` again. The ops of this package that
would keep t for their backward (the op that made it, and those that take it as input) then keep the recipe: the inputs,
which are kept anyway or have recipes themselves. The value is computed once per backward, and freed after its last use.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Recipe:
    """How to compute a tensor again. ``holders``: how many backward nodes will ask for it."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple):
        self.function = function
        self.inputs = tuple(recipe_of(t) or t.detach() for t in inputs)
        for t in self.inputs:
            if isinstance(t, Recipe):
                t.holders += 1  # this one will ask for it too
        self.versions = tuple(t._version if isinstance(t, Tensor) else None for t in self.inputs)
        device = inputs[0].device.type if inputs else "cpu"
        self.autocast = {"device_type": device, "enabled": False}
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device):
            self.autocast.update(enabled=True, dtype=torch.get_autocast_dtype(device))
        self.holders = 0
        self.taken = 0
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        if self.value is None:
            for t, version in zip(self.inputs, self.versions, strict=True):
                if version is not None and t._version != version:
                    raise RuntimeError(
                        "recomputed: a tensor from which an activation has to be computed again was changed by an "
                        f"in-place operation: expected version {version}, got {t._version} (shape {tuple(t.shape)})"
                    )
            with torch.no_grad(), torch.autocast(**self.autocast):
                self.value = self.function(*(t.take() if isinstance(t, Recipe) else t for t in self.inputs))
        value = self.value
        self.taken += 1
        if self.taken >= self.holders:
            self.value, self.taken = None, 0
        return value


def recipe_of(t: Tensor | None) -> Recipe | None:
    """The recipe of a tensor that was declared and has not been changed in place since."""
    declared = None if t is None else getattr(t, "_bcos_recipe", None)
    if declared is None:
        return None
    recipe, version = declared
    return recipe if t._version == version else None


def viewed(view: Tensor, tensor: Tensor) -> Tensor:
    """Declare that ``view``, ``tensor`` in another shape, is computed again as ``tensor`` is; returns ``view``."""
    if view is not tensor and not torch.compiler.is_compiling() and recipe_of(tensor) is not None:
        shape = view.shape
        view._bcos_recipe = (Recipe(lambda t: t.view(shape), (tensor,)), view._version)
    return view


def recomputed(tensor: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Declare that the backward may compute ``tensor`` again instead of keeping it; returns ``tensor``.

    Only what the ops of this package keep is saved in memory: the op that made the tensor, and ops that it is given to.
    Where nothing is differentiated, inside compiled code, torch.func transforms and active saved-tensor hooks
    (activation checkpointing, offload) this does nothing. A second derivative through such an op raises.

    Args:
        tensor: an activation, as an op of this package returned it.
        function: called in the backward, without recording gradients, as ``function(*inputs)``; has to return the very
            same values, so nothing random and no running statistics.
        inputs: tensors that are kept anyway, or themselves declared so. Changing one in place before the backward is
            an error.

    >>> import torch, bcos_kernels
    >>> x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    >>> y = bcos_kernels.linear(x, w)
    >>> y = bcos_kernels.recomputed(y, bcos_kernels.linear, x, w)
    >>> bcos_kernels.linear(y, w).sum().backward()
    """
    from .autograd import saved_tensor_hooks_active
    from .ops import functorch_active

    if torch.compiler.is_compiling() or functorch_active() or saved_tensor_hooks_active():
        return tensor
    node = tensor.grad_fn
    if node is None:
        return tensor
    recipe = Recipe(function, inputs)
    tensor._bcos_recipe = (recipe, tensor._version)
    if getattr(node, "held", None) is not None:
        node.held = recipe
        recipe.holders += 1
    return tensor
