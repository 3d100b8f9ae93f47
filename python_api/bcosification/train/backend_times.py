"""Which backends run a training run's B-cos layers and norms, measured in its first steps: a Lightning callback."""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback

import bcos_kernels
from bcosification.evaluation.measuring import fallback_share

from .run_folder import write

__all__ = ["BackendTimes", "saved", "told"]

FILE = "backends.json"
STEPS = 3
# Backends that have kernels for a type of device, and what a user can do where they are not used.
_KERNELS = {
    "cpu": (("cpu",), "python -m bcos_kernels tells what was built"),
    "cuda": (("triton", "cuda"), "python -m bcos_kernels selftest checks and unlocks the kernels on this GPU"),
}


class BackendTimes(Callback):
    """Times every op in a few training steps (`bcos_kernels.timed`) and warns of those that ran without a kernel.

    The second to fourth step of the first epoch that is trained here, forward and backward: the first one allocates and
    compiles. (An epoch of one step: that one.) It costs two readings of a clock per op, on a GPU two events, and one
    wait for them at the end.

    Args:
        output: the run's folder, for backends.json; None writes nothing.
        steps: how many, default 3.

    Attributes:
        found: None before (or where somebody else is timing); then a dict, as in backends.json: device ("cpu",
            "cuda:0"), steps, fallback_share (of the time in B-cos layers and norms, that on the backend "reference"),
            fallback_ops (names of the ops that ran there), seconds ({op: {backend: seconds}}), reasons ({backend: why
            it cannot run here}, of those with kernels for the device).
    """

    def __init__(self, output: Path | None = None, steps: int = STEPS):
        self.output, self.steps = output, steps
        self.found: dict | None = None
        self._over = False
        self._timing = contextlib.ExitStack()
        self._seconds: dict[tuple[str, str], float] | None = None
        self._done = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self._over or self._seconds is not None or batch_idx < min(1, trainer.num_training_batches - 1):
            return
        try:
            self._seconds = self._timing.enter_context(bcos_kernels.timed())
        except RuntimeError:  # one at a time in a process
            self._over = True

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self._seconds is None or self._over:
            return
        self._done += 1
        if self._done == self.steps:
            self._finish(trainer, pl_module.device)

    def on_validation_start(self, trainer, pl_module) -> None:
        self._finish(trainer, pl_module.device)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self._finish(trainer, pl_module.device)

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._timing.close()

    def _finish(self, trainer, device: torch.device) -> None:
        if self._over or not self._done:
            return
        self._over = True
        self._timing.close()
        seconds: dict[str, dict[str, float]] = {}
        for (op, backend), value in sorted(self._seconds.items()):
            seconds.setdefault(op, {})[backend] = value
        if not seconds or not trainer.is_global_zero:
            return
        kernels, hint = _KERNELS.get(device.type, ((), ""))
        usable = bcos_kernels.backends()
        self.found = {
            "device": str(device),
            "steps": self._done,
            **fallback_share(self._seconds),
            "seconds": seconds,
            "reasons": {name: usable[name] for name in kernels if usable[name] is not None},
        }
        if self.output is not None:
            write(self.output / FILE, json.dumps(self.found, indent=1, allow_nan=False) + "\n")
        if self.found["fallback_ops"] and len(self.found["reasons"]) < len(kernels):
            warnings.warn(
                f"ops ran without a kernel on {device}, where there are kernels: "
                f"{', '.join(self.found['fallback_ops'])}, {_percent(self.found)} of the time in B-cos layers and "
                f"norms; {hint}",
                RuntimeWarning,
                stacklevel=2,
            )


def _percent(found: dict) -> str:
    share = 100 * found["fallback_share"]
    return "under 1 %" if 0 < share < 1 else f"{share:.0f} %"


def told(found: dict) -> str:
    """What `BackendTimes` found, in a line."""
    steps = "1 training step" if found["steps"] == 1 else f"{found['steps']} training steps"
    ops = f" ({', '.join(found['fallback_ops'])})" if found["fallback_ops"] else ""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in found["reasons"].items()) if ops else ""
    return (
        f"share of the time in B-cos layers and norms that ran on the fallback, plain PyTorch: {_percent(found)}{ops}; "
        f"measured in {steps} on {found['device']}" + (f"; {reasons}" if reasons else "")
    )


def saved(output: Path) -> dict | None:
    """backends.json of a run, None where it has none."""
    path = output / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
