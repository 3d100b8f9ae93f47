"""Which backend runs which op on which tensors, and saying so.

A backend is a module with the six launchers ``{linear,conv2d,batch_norm_uncentered}_{forward,backward}``, and those of
fused ops where it has them (composed.py puts the others together). The choice is made when an op runs, inside the
opaque op, so that `backend` also governs compiled graphs.
"""

from __future__ import annotations

import importlib
import json
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from . import composed, layouts

NAMES = ("reference", "cpu", "triton", "cuda")
_NAMED = "named "  # before a recorded backend
_MODULES = {"reference": "reference", "cpu": "cpu", "triton": "triton_kernels"}

_selected: ContextVar[str] = ContextVar("bcos_kernels_backend", default="auto")
_lock = threading.Lock()
_last_run: dict[str, str] = {}
_warned: set[str] = set()
_thread = threading.local()


@cache
def build_report() -> dict[str, str | None]:
    """Backend → None where its library was built, else the reason recorded by the build."""
    path = Path(__file__).with_name("_build_report.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        reason = "not built: the package runs from a source tree that was never installed (pip install .)"
        return {"cpu": reason, "cuda": reason}
    except (OSError, ValueError) as error:
        reason = f"the build report {path.name} cannot be read: {error}"
        return {"cpu": reason, "cuda": reason}


@cache
def _module(name: str) -> object:
    return importlib.import_module(f"bcos_kernels.{_MODULES[name]}")


def _launcher(name: str, launcher: str) -> Callable:
    """A backend's launcher; one that sees to the strides of its tensors itself says so (``STRICT_LAYOUTS``)."""
    module = _module(name)
    if launcher in composed.NAMES and not hasattr(module, launcher):
        return partial(getattr(composed, launcher), partial(_launcher, name))
    launch = getattr(module, launcher)
    return launch if getattr(module, "STRICT_LAYOUTS", False) else layouts.strict(launcher, launch)


def _unusable(name: str) -> str | None:
    """Why a backend cannot run on this machine, or None."""
    if name == "reference":
        return None
    if name == "cuda":
        return build_report().get("cuda") or "no kernels of this backend are built"
    return _module(name).unusable_reason()


def backends() -> dict[str, str | None]:
    """Backend name → None if it can run on this machine, else the reason.

    >>> import bcos_kernels
    >>> bcos_kernels.backends()["reference"] is None
    True
    """
    return {name: _unusable(name) for name in NAMES}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Context manager that selects the backend of every op run inside it, in eager and in compiled graphs.

    Args:
        name: "reference", "cpu", "triton", "cuda", or "auto" (the default outside any context: the fastest backend
            measured for the shape). A named backend never falls back.

    Raises:
        ValueError: unknown name.
        RuntimeError: the named backend cannot run on this machine (the reason is in `backends()`). An op raises
            NotImplementedError inside the context for a combination that the backend does not build.
    """
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join((*NAMES, 'auto'))}, got {name!r}")
    if name != "auto":
        reason = _unusable(name)
        if reason is not None:
            raise RuntimeError(f"backend: {name!r} cannot be used here: {reason}")
    token = _selected.set(name)
    try:
        yield
    finally:
        _selected.reset(token)


class _Dispatched(dict):
    """Op → backend that ran it last; prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no op has run yet"
        width = max(len(op) for op in self)
        return "\n".join(f"{op:<{width}}  {name}" for op, name in sorted(self.items()))


def dispatched() -> dict[str, str]:
    """Op → backend that ran it last in this process, forward ("conv2d") and backward ("conv2d_backward") apart."""
    with _lock:
        return _Dispatched(_last_run)


def last_backend() -> str:
    """What ran this thread's most recent op, for its backward to run there too: a backend's name, marked where it was
    named by `backend` and so may not fall back ("" before the first)."""
    return getattr(_thread, "last", "")


def backend_of(recorded: str) -> str:
    """The name of a backend as `last_backend` records it, "auto" for none."""
    return recorded.removeprefix(_NAMED) or "auto"


def _candidates(device: torch.device) -> tuple[str, ...]:
    # CUDA kernels are picked only with a verified, committed row for op, dtype and architecture: there is none yet
    return ("cpu", "reference") if device.type == "cpu" else ("reference",)


def _warn_once(key: str, message: str) -> None:
    with _lock:
        if key in _warned:
            return
        _warned.add(key)
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _accepts_device(name: str, device: torch.device) -> bool:
    if name == "reference":
        return True
    if name == "cpu":
        return device.type == "cpu"
    if name == "triton":
        return device.type == "cuda" or _module("triton").runs_on(device)
    return device.type == "cuda"


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for tensors of ``device`` (it raises for devices that it does not know)."""
    return torch._C._is_any_autocast_enabled() and device.type != "meta" and torch.is_autocast_enabled(device.type)


def run(op: str, direction: str, tensor: Tensor, arguments: tuple, recorded: str = "") -> tuple:
    """Run launcher ``{op}_{direction}`` of the backend chosen for ``tensor``; ``recorded`` is the forward's backend."""
    if autocast_enabled(tensor.device):
        # the public function has cast what is to be cast; the products inside a launcher keep its tensors' types, also
        # where a backward runs inside an autocast region and its forward did not
        with torch.autocast(tensor.device.type, enabled=False):
            return _run(op, direction, tensor, arguments, recorded)
    return _run(op, direction, tensor, arguments, recorded)


def _run(op: str, direction: str, tensor: Tensor, arguments: tuple, recorded: str) -> tuple:
    named = recorded.startswith(_NAMED) or not recorded and _selected.get() != "auto"
    name = recorded.removeprefix(_NAMED) or _selected.get()
    launcher = f"{op}_{direction}"
    key = op if direction == "forward" else launcher
    if name != "auto":
        result = _run_named(name, launcher, op, tensor, arguments, strict=named)
        if result is not None:
            _record(key, name, named)
            return result
    refused = ""
    for candidate in _candidates(tensor.device):
        reason = _unusable(candidate)
        if reason is None:
            try:
                result = _launcher(candidate, launcher)(*arguments)
            except NotImplementedError as error:
                reason = str(error)
            else:
                if refused:
                    _warn_once(f"{key}: {refused}", f"{key} runs on the reference implementation: {refused}")
                elif candidate == "reference" and tensor.device.type == "cuda":
                    _warn_once("cuda", "no verified kernels for this GPU yet: ops run on the library plus eager passes")
                _record(key, candidate, False)
                return result
        refused = f"{candidate}: {reason}"
    raise RuntimeError(f"{op}: no backend runs on {tensor.device}: {refused}")


def _run_named(name: str, launcher: str, op: str, tensor: Tensor, arguments: tuple, strict: bool) -> tuple | None:
    reason = _unusable(name)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {name!r} cannot be used here: {reason}")
    if not _accepts_device(name, tensor.device):
        raise RuntimeError(f"{op}: backend {name!r} does not run on {tensor.device.type} tensors")
    try:
        return _launcher(name, launcher)(*arguments)
    except NotImplementedError:
        # chosen by itself, the forward's backend may lack the backward of this combination
        if strict or _selected.get() == name:
            raise
        return None


def _record(key: str, name: str, named: bool) -> None:
    _thread.last = _NAMED + name if named else name
    if _last_run.get(key) != name:
        with _lock:
            _last_run[key] = name
