"""Which backend runs which op on which tensors, and saying so.

A backend is a module with the six launchers ``{linear,conv2d,batch_norm_uncentered}_{forward,backward}``, and those of
fused ops where it has them (composed.py puts the others together). The choice is made when an op runs, inside the
opaque op, so that `backend` also governs compiled graphs.

On a GPU only kernels run by themselves that were verified there and are the fastest for the shape, as the tables of
tuning.py say; everything else runs on the library plus eager passes.

A backend may run its launchers in several variants: "cuda" is the variant "cuda:library" unless a row of the table, or
whoever names it, says "cuda:cutlass". A variant takes every call that its backend takes; what ran is told as
"cuda:cutlass" only where a kernel of the variant's own did.
"""

from __future__ import annotations

import importlib
import json
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from . import composed, layouts, tuning

NAMES = ("reference", "cpu", "triton", "cuda")
VARIANTS = ("cuda:cutlass",)
"""Of backends, beside what they run by themselves (`DEFAULTS`)."""
DEFAULTS = {"cuda": "cuda:library"}
_NAMED = "named "  # before a recorded backend
_MODULES = {"reference": "reference", "cpu": "cpu", "triton": "triton_kernels", "cuda": "cuda"}
_ON_CPU = ("cpu", "reference")
_LIBRARY_ALONE = ("reference",)
_UNVERIFIED = (
    "no verified kernels for this GPU yet: ops run on the library plus eager passes; "
    "`python -m bcos_kernels selftest` checks and unlocks the kernels"
)
_UNMEASURED = (
    "shapes that were never measured on this GPU run on the library plus eager passes; "
    "`python -m bcos_kernels tune` measures a network's"
)

_selected: ContextVar[str] = ContextVar("bcos_kernels_backend", default="auto")
_lock = threading.Lock()
_last_run: dict[str, str] = {}
_warned: set[str] = set()
_thread = threading.local()
_marks: list[tuple] | None = None  # while `timed` is on: ((op, backend), start, end) of every launch


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
    name = base(name)
    module = _module(name)
    if launcher in composed.NAMES and not hasattr(module, launcher):
        return partial(getattr(composed, launcher), partial(_launcher, name))
    launch = getattr(module, launcher)
    return launch if getattr(module, "STRICT_LAYOUTS", False) else layouts.strict(launcher, launch)


def base(name: str) -> str:
    """The backend of a variant; a backend's name as it is."""
    return name.partition(":")[0]


def _variant_module(name: str) -> object:
    """What a backend's module has for a variant: ``unusable_reason()``, and ``running()``, a context inside which the
    backend's launchers run so; it gives an object whose ``ran`` tells whether kernels of the variant did."""
    backend, _, variant = name.partition(":")
    return _module(backend).VARIANTS[variant]


def _unusable(name: str) -> str | None:
    """Why a backend, or a variant of one, cannot run on this machine, or None."""
    if name == "reference":
        return None
    if name in VARIANTS:
        return _variant_module(name).unusable_reason()
    return _module(base(name)).unusable_reason()


class _Backends(dict):
    """Backend → None or a reason; so, too, for variants, which are no keys: they run under their backend's name."""

    def __missing__(self, name: str) -> str | None:
        if name not in (*VARIANTS, *DEFAULTS.values()):
            raise KeyError(name)
        return _unusable(name)


def backends() -> dict[str, str | None]:
    """Backend name → None if it can run on this machine, else the reason.

    ``backends()["cuda:cutlass"]`` tells the same of a backend's variant.

    >>> import bcos_kernels
    >>> bcos_kernels.backends()["reference"] is None
    True
    """
    return _Backends((name, _unusable(name)) for name in NAMES)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Context manager that selects the backend of every op run inside it, in eager and in compiled graphs.

    Args:
        name: "reference", "cpu", "triton", "cuda", or "auto" (the default outside any context: the fastest backend
            measured for the shape). A named backend never falls back. "cuda" runs in the variant that the tuning table
            has for the shape, the library's products plus fused passes without one; "cuda:library" and "cuda:cutlass"
            name a variant. CUTLASS's kernels run for the calls that they take, the library for all others.

    Raises:
        ValueError: unknown name.
        RuntimeError: the named backend cannot run on this machine (the reason is in `backends()`). An op raises
            NotImplementedError inside the context for a combination that the backend does not build.
    """
    if name != "auto" and name not in NAMES and name not in VARIANTS and name not in DEFAULTS.values():
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
    """Op → backend that ran it last in this process, forward ("conv2d") and backward ("conv2d_backward") apart; as
    "cuda:cutlass" where kernels of that variant ran."""
    with _lock:
        return _Dispatched(_last_run)


@contextmanager
def timed() -> Iterator[dict[tuple[str, str], float]]:
    """Context manager that measures how long each op runs on each backend, in the whole process.

    Yields:
        (op, backend) → seconds, forward ("conv2d") and backward ("conv2d_backward") apart, filled when the context is
        left. On the CPU it is the launchers' time; on a GPU that between CUDA events around them, which are waited for
        at the end. Not for capturing CUDA graphs.

    Raises:
        RuntimeError: inside another one.

    >>> import bcos_kernels, torch
    >>> with bcos_kernels.timed() as seconds, bcos_kernels.backend("reference"):
    ...     _ = bcos_kernels.linear(torch.rand(2, 3), torch.rand(4, 3))
    >>> list(seconds)
    [('linear', 'reference')]
    """
    global _marks
    if _marks is not None:
        raise RuntimeError("timed: expected one at a time in a process, got a second one inside another")
    marks: list[tuple] = []
    seconds: dict[tuple[str, str], float] = {}
    _marks = marks
    try:
        yield seconds
    finally:
        _marks = None
        for what, start, end in marks:
            if not isinstance(start, float):
                end.synchronize()
            took = end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
            seconds[what] = seconds.get(what, 0.0) + took


def _now(device: torch.device) -> float | torch.cuda.Event:
    """The host's clock, or on a GPU an event in its current stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def last_backend() -> str:
    """What ran this thread's most recent op, for its backward to run there too: a backend's name, marked where it was
    named by `backend` and so may not fall back ("" before the first)."""
    return getattr(_thread, "last", "")


def backend_of(recorded: str) -> str:
    """The name of a backend as `last_backend` records it, "auto" for none; of one with variants the default one, which
    computes what fused ops keep."""
    name = base(recorded.removeprefix(_NAMED) or "auto")
    return DEFAULTS.get(name, name)


def runs_kernels(device: torch.device) -> bool:
    """Whether ops on ``device`` may run on kernels that read and write Σ_c x² on the way (squares.py), as far as that
    can be said without a shape: on the CPU, and on a GPU where kernels are named or verified."""
    name = _selected.get()
    if device.type == "cpu":
        return True
    return device.type == "cuda" and (base(name) in tuning.KERNELS or name == "auto" and bool(tuning.table(device)))


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
    marks = _marks
    if marks is None:
        return _run_without_autocast(op, direction, tensor, arguments, recorded)
    start = _now(tensor.device)
    result = _run_without_autocast(op, direction, tensor, arguments, recorded)
    key = op if direction == "forward" else f"{op}_{direction}"
    marks.append(((key, backend_of(last_backend())), start, _now(tensor.device)))
    return result


def _run_without_autocast(op: str, direction: str, tensor: Tensor, arguments: tuple, recorded: str) -> tuple:
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
    device = tensor.device.type
    if name != "auto" and (named or device != "cuda" or _selected.get() == name):
        found = _run_named(name, launcher, op, direction, tensor, arguments, strict=named)
        if found is not None:
            result, ran = found
            _record(key, ran, name, named)
            return result
    if device == "cuda":
        return _run_tuned(op, direction, tensor, arguments, name)
    refused = ""
    for candidate in _ON_CPU if device == "cpu" else _LIBRARY_ALONE:
        reason = _unusable(candidate)
        if reason is None:
            try:
                result = _launcher(candidate, launcher)(*arguments)
            except NotImplementedError as error:
                reason = str(error)
            else:
                if refused:
                    _warn_once(f"{key}: {refused}", f"{key} runs on the reference implementation: {refused}")
                _record(key, candidate, candidate, False)
                return result
        refused = f"{candidate}: {reason}"
    raise RuntimeError(f"{op}: no backend runs on {tensor.device}: {refused}")


def _launch(name: str, launcher: str, arguments: tuple) -> tuple[tuple, str]:
    """(what a launcher gives, what ran: the variant that was asked for, or its backend, whose own kernels served)."""
    if name not in VARIANTS:
        return _launcher(name, launcher)(*arguments), base(name)
    with _variant_module(name).running() as use:
        result = _launcher(name, launcher)(*arguments)
    return result, name if use.ran else base(name)


def _run_tuned(op: str, direction: str, tensor: Tensor, arguments: tuple, forward: str) -> tuple:
    """On a GPU, without a name: the fastest backend that was verified there for the shape, else the library's ops with
    eager passes. ``forward`` is the backend that the forward took ("auto": there was none, or this is one)."""
    launcher = f"{op}_{direction}"
    key = op if direction == "forward" else launcher
    table = tuning.table(tensor.device)
    what = tuning.key(op, direction, arguments) if table else ()
    tuned = table.get(what, ())
    if forward != "auto" and (not tuned or op in tuning.JOINT):
        candidates = dict.fromkeys((forward, *([base(forward)] if not tuned else []), *tuned, "reference"))
    else:
        candidates = dict.fromkeys((*tuned, "reference"))
    refused = ""
    for candidate in candidates:
        reason = _unusable(candidate)
        if reason is None:
            try:
                own = base(forward) in ("auto", base(candidate))
                result, ran = _launch(candidate, launcher, arguments if own else _portable(op, candidate, arguments))
            except NotImplementedError as error:
                reason = str(error)
            except Exception as error:
                if candidate not in tuning.KERNELS or _is_out_of_memory(error):
                    raise
                reason = f"{type(error).__name__}: {_first_line(error)}"
                tuning.drop(tensor.device, what, candidate)  # compiling it again would fail again
            else:
                if refused:
                    serves = "the library plus eager passes" if candidate == "reference" else candidate
                    _warn_once(f"{key}: {refused}", f"{key} runs on {serves}: {refused}")
                elif not tuned and candidate == "reference":
                    _warn_once("cuda", _UNVERIFIED if not table else _UNMEASURED)
                _record(key, ran, candidate, False)
                return result
        refused = f"{candidate}: {reason}"
    raise RuntimeError(f"{op}: no backend runs on {tensor.device}: {refused}")


def _portable(op: str, name: str, arguments: tuple) -> tuple:
    """A backward's arguments for backend ``name``, which is not the forward's. What fused ops keep in y's place is a
    backend's own affair: without it conv2d_batch_norm computes y again, and of linear_gelu that is done here."""
    if op not in tuning.JOINT:
        return arguments
    if op == "conv2d_batch_norm":
        return *arguments[:7], arguments[7].new_empty((0,)), *arguments[8:]
    dh, x, weight, bias, _, _, _, _, b, b_tensor, normalize_weight, max_out, *rest = arguments
    made = _launcher(name, "linear_forward")(x, weight, bias, b, b_tensor, normalize_weight, max_out, True, None)
    return dh, x, weight, bias, *made, b, b_tensor, normalize_weight, max_out, *rest


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _is_out_of_memory(error: Exception) -> bool:
    """Of the allocator, or of a driver that found no room for a kernel's code or stack: no reason to do without it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error)


def _variant(name: str, op: str, direction: str, tensor: Tensor, arguments: tuple) -> str:
    """What a named backend runs: the variant that the table has first for this call, where it can run."""
    if name not in DEFAULTS or tensor.device.type != "cuda":
        return name
    table = tuning.table(tensor.device)
    found = table.get(tuning.key(op, direction, arguments), ()) if table else ()
    measured = next((candidate for candidate in found if base(candidate) == name), name)
    return measured if _unusable(measured) is None else name


def _run_named(
    name: str, launcher: str, op: str, direction: str, tensor: Tensor, arguments: tuple, strict: bool
) -> tuple[tuple, str] | None:
    """(results, what ran), or None where a backend that was not named by the user lacks the call."""
    reason = _unusable(name)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {name!r} cannot be used here: {reason}")
    if not _accepts_device(base(name), tensor.device):
        raise RuntimeError(f"{op}: backend {name!r} does not run on {tensor.device.type} tensors")
    variant = _variant(name, op, direction, tensor, arguments)
    if variant != name:
        try:
            return _launch(variant, launcher, arguments)
        except Exception as error:
            if isinstance(error, NotImplementedError) or _is_out_of_memory(error):
                raise
            tuning.drop(tensor.device, tuning.key(op, direction, arguments), variant)
            why = f"{variant}: {type(error).__name__}: {_first_line(error)}"
            _warn_once(f"{launcher}: {why}", f"{launcher} runs on {DEFAULTS[name]}: {why}")
    try:
        return _launch(name, launcher, arguments)
    except NotImplementedError:
        # chosen by itself, the forward's backend may lack the backward of this combination
        if strict or _selected.get() == name:
            raise
        return None


def _record(key: str, ran: str, name: str, named: bool) -> None:
    """``ran`` is told to users; ``name``, what was chosen or named, to the op's backward."""
    _thread.last = _NAMED + name if named else name
    if _last_run.get(key) != ran:
        with _lock:
            _last_run[key] = ran
