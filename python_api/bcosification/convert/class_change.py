"""A module with another forward: its class becomes a subclass of its own in which a mixin's methods come first."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["ChangedForward", "change_class", "original_class"]


class ChangedForward:
    """Base of the mixins that replace methods of a library's class; see ``change_class``."""

    _original_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class is made at run time: pickle and deepcopy make it again from its two parents.
        mixin = type(self).__mro__[1]
        return _rebuild, (mixin, self._original_class), self.__dict__


_changed: dict[tuple[type, type], type] = {}


def _changed_class(mixin: type, original: type) -> type:
    if (mixin, original) not in _changed:
        namespace = {"_original_class": original, "__module__": mixin.__module__}
        _changed[mixin, original] = type(original.__name__, (mixin, original), namespace)
    return _changed[mixin, original]


def _rebuild(mixin: type, original: type) -> nn.Module:
    kind = _changed_class(mixin, original)
    return kind.__new__(kind)


def change_class(model: nn.Module, mixin: type[ChangedForward]) -> nn.Module:
    """Make ``model`` an instance of a subclass of its class in which ``mixin``'s methods come first, in place.

    Children, parameters and names stay as they are. A mixin with dynamic weights of its own inherits from
    ``nn.DetachableModule`` (or ``nn.ScalingGate``) besides.
    """
    model.__class__ = _changed_class(mixin, type(model))
    return model


def original_class(model: nn.Module) -> type[nn.Module]:
    """The class a model had before ``change_class``."""
    return getattr(type(model), "_original_class", type(model))
