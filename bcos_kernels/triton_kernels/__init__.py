"""Triton kernels of the B-cos ops: implicit-GEMM forward and custom backward, one file an op.

The launchers ``{op}_{forward,backward}`` are imported at their first use; importing this package imports neither triton
nor a kernel, compiles nothing and tunes nothing. Built for float32, bfloat16 and
float16 tensors on a CUDA device, or on the CPU in Triton's interpreter (``TRITON_INTERPRET=1`` set before triton is
imported). The kernels keep to what Triton 3.6 offers.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache

import torch

from .. import layouts

_FILES = {
    f"{op}_{direction}": op
    for op in ("linear", "conv2d", "batch_norm_uncentered", "conv2d_batch_norm", "linear_gelu", "layer_norm")
    for direction in ("forward", "backward")
} | {"conv2d_backward": "conv2d_gradient"}

__all__ = [*_FILES, "own_launcher", "runs_on", "unusable_reason"]  # noqa: PLE0604  (the launchers are resolved by __getattr__)


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: the variable is read as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _broken_triton() -> str | None:
    """Why triton cannot be used at all; imports it."""
    if not _installed():
        return "triton is not installed (pip install triton; Linux only)"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation raises whatever it likes
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    return None


@cache
def _broken_interpreter() -> str | None:
    """Why the interpreter of this triton does not run, triton itself being sound."""
    numpy, triton = (importlib.import_module(name).__version__ for name in ("numpy", "triton"))
    triton_version, numpy_version = (tuple(map(int, version.split(".")[:2])) for version in (triton, numpy))
    if triton_version <= (3, 6) and numpy_version >= (2, 4):
        return f"the interpreter of triton {triton} needs numpy < 2.4, got {numpy}"
    return None


def unusable_reason() -> str | None:
    """None if the kernels can run on this machine, else why not."""
    if _interpreted():
        return _broken_triton() or _broken_interpreter()
    if _installed() and not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter)"
    return _broken_triton()


def runs_on(device: torch.device) -> bool:
    """Whether tensors on ``device`` are accepted: CUDA always, the CPU in the interpreter only."""
    return device.type == "cuda" or (device.type == "cpu" and _interpreted())


def own_launcher(name: str) -> Callable:
    """Launcher ``name`` as `bcos_kernels.dispatch` calls it, for ops that are put together from others."""
    return layouts.strict(name, __getattr__(name))


def __getattr__(name: str) -> object:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    reason = _broken_triton()
    if reason is not None:
        raise ImportError(f"{name}: {reason}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
