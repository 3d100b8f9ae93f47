"""Schedules of B and of the biases during B-cosification's fine-tuning, and of the norms' statistics, as Lightning
callbacks.

Those of B and the biases are functions of the number of optimiser steps taken, nothing else: after a resume they
continue where they were. The papers set B = 2 and remove the biases at once; the gradual forms are their ablations.
"""

from __future__ import annotations

import torch
from lightning.pytorch import Callback
from torch import nn

from bcosification.convert.rules import biases
from bcosification.nn import BatchNormUncentered2d

__all__ = ["BiasDecay", "FreshStatistics", "LinearB", "linear_ramp", "scale_biases"]


def linear_ramp(step: int, steps: int, start: float, end: float) -> float:
    """start at step 0, end from step `steps` on, a straight line between."""
    if step >= steps:
        return float(end)
    return start + (end - start) * step / steps


def _steps(trainer, epochs: float) -> int:
    """Optimiser steps in `epochs` epochs of this run."""
    per_epoch = trainer.estimated_stepping_batches / trainer.max_epochs
    return max(1, round(epochs * per_epoch))


class LinearB(Callback):
    """Raises B linearly from `start` to `end` over the first `epochs` epochs, then leaves it at `end`.

    While it rises, the layers hold b as a 0-dim tensor whose value changes in place: nothing is recompiled, nothing is
    read on the host. At the end they get the Python number again, with its cheaper special form.

    Args:
        epochs: length, fractions allowed, > 0.
        start: B of the first step, >= 1 (default 1: the layers are linear).
        end: B in the end, >= start (default 2).

    Attributes:
        value: B now, a float.
    """

    def __init__(self, epochs: float, start: float = 1.0, end: float = 2.0):
        if epochs <= 0:
            raise ValueError(f"LinearB: expected epochs > 0, got {epochs}")
        if not 1 <= start <= end:
            raise ValueError(f"LinearB: expected 1 <= start <= end, got start={start} and end={end}")
        self.epochs, self.start, self.end = epochs, float(start), float(end)
        self.value = self.start

    def setup(self, trainer, pl_module, stage) -> None:
        if stage == "fit" and not _layers(pl_module):
            raise ValueError("LinearB: expected a model with B-cos layers (modules with set_b), found none")

    def on_train_start(self, trainer, pl_module) -> None:
        self._steps = _steps(trainer, self.epochs)
        self._apply(trainer, pl_module, install=True)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.value != self.end:
            self._apply(trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if self.value != self.end:
            self._apply(trainer, pl_module)

    def _apply(self, trainer, pl_module, install: bool = False) -> None:
        self.value = linear_ramp(trainer.global_step, self._steps, self.start, self.end)
        for layer in _layers(pl_module):
            if self.value == self.end:
                layer.set_b(self.end, buffer=False)
            elif install:
                layer.set_b(self.value, buffer=True)
            else:
                layer.b.fill_(self.value)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "set_b")]


def scale_biases(model: nn.Module, factor: float) -> None:
    """Multiplies every bias of the model's layers by `factor`, in place."""
    with torch.no_grad():
        for bias in biases(model).values():
            bias.mul_(factor)


class BiasDecay(Callback):
    """Scales every bias linearly to zero over the first `epochs` epochs, then removes it from the model.

    Biases are trained meanwhile: before step k they are multiplied by f(k)/f(k − 1), f falling from 1 to 0. At the end
    they are removed from the modules and from the optimiser, and checkpoints no longer hold them. The constant logit
    bias and the means of the input normalisation are no biases in this sense and stay. For models of `bcosify` only.

    Args:
        epochs: length, fractions allowed, > 0.

    Attributes:
        factor: f now, 1 → 0.
    """

    def __init__(self, epochs: float):
        if epochs <= 0:
            raise ValueError(f"BiasDecay: expected epochs > 0, got {epochs}")
        self.epochs = epochs
        self.factor = 1.0

    def on_train_start(self, trainer, pl_module) -> None:
        self._steps = _steps(trainer, self.epochs)
        self.factor = linear_ramp(trainer.global_step, self._steps, 1.0, 0.0)
        if self.factor > 0 and not biases(_backbone(pl_module)):
            raise ValueError("BiasDecay: expected a model converted with bias='decay', found no bias in it")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._apply(trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self._apply(trainer, pl_module)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        checkpoint["biases_removed"] = self.factor == 0

    def on_load_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        # Called before the weights are loaded and before the optimiser is made: both then match the checkpoint.
        if checkpoint.get("biases_removed"):
            pl_module.model.remove_biases()

    def _apply(self, trainer, pl_module) -> None:
        if self.factor == 0:
            return
        factor = linear_ramp(trainer.global_step, self._steps, 1.0, 0.0)
        if factor == 0:
            decayed = list(biases(_backbone(pl_module)).values())
            pl_module.model.remove_biases()
            gone = {id(bias) for bias in decayed}
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
                for bias in decayed:
                    optimizer.state.pop(bias, None)
        elif factor != self.factor:
            scale_biases(_backbone(pl_module), factor / self.factor)
        self.factor = factor


class FreshStatistics(Callback):
    """Lets the running variances of the norms begin with the first step's batch, instead of what they were before.

    They were the standard network's, or 1 in a new one; B and missing biases change the scale of what the norms read by
    orders of magnitude. A running average forgets its start by 1 - momentum a step: of 22 steps of an epoch of digits a
    tenth of it is left, which drowns the rest, and validation was at chance (10 %, 82 % with this callback) though the
    network had learnt. Training does not read the running variances, so it is the same to the bit with and without.

    Of the first step of a run, not of a resumed one: running_var begins at 0 and is divided by 1 - (1 - momentum)^k, k
    its updates in that step (as Adam's averages are). Norms with momentum None, which average over all batches, and
    those that the step does not call are left as they are.
    """

    def __init__(self):
        self._before: list[tuple[BatchNormUncentered2d, torch.Tensor, torch.Tensor]] | None = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step > 0 or self._before is not None:
            return
        self._before = [
            (module, module.running_var.clone(), module.num_batches_tracked.clone())
            for module in pl_module.modules()
            if isinstance(module, BatchNormUncentered2d) and module.track_running_stats and module.momentum is not None
        ]
        for module, _, _ in self._before:
            module.running_var.zero_()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        for module, old, counted in self._before or ():
            updates = module.num_batches_tracked - counted
            share = 1 - (1 - module.momentum) ** updates.double()
            fresh = (module.running_var / share).to(old)
            module.running_var.copy_(torch.where(updates > 0, fresh, old))
        self._before = []


def _backbone(pl_module) -> nn.Module:
    """The converted network: inside BcosifiedModel, without its constant logit bias and input normalisation."""
    model = pl_module.model
    return model.model if isinstance(getattr(model, "model", None), nn.Module) else model
