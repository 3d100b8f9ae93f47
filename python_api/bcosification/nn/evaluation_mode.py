"""A model in eval mode for the length of a block, put back as it was."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

from torch import nn

__all__ = ["evaluation_mode"]

_lock = threading.Lock()
_entered: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[tuple[nn.Module, bool]]]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put `model` in eval mode, and every submodule back in the mode it had.

    Nested and concurrent blocks are counted per model under a lock: the first one in remembers the modes, the last one
    out restores them, so that a block that ends in one thread does not switch dropout on in another.

    Args:
        model: Any module.

    Returns:
        A context manager that gives the model.

    Example:
        >>> with evaluation_mode(model):
        ...     logits = model(images)
    """
    with _lock:
        count, modes = _entered.get(model, (0, None))
        if modes is None:
            modes = [(module, module.training) for module in model.modules()]
            model.eval()
        _entered[model] = (count + 1, modes)
    try:
        yield model
    finally:
        with _lock:
            count, modes = _entered[model]
            if count > 1:
                _entered[model] = (count - 1, modes)
            else:
                del _entered[model]
                for module, training in modes:
                    module.training = training
