"""Lightning's Trainer on a TrainedModule, with history, checkpoints and schedules that resume: `train`."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

from .history import row_text, write_history
from .run_folder import save_model

__all__ = ["check_machine", "train"]


def train(
    module, datamodule, *, epochs: int, seed: int = 0, output: Path | None = None, callbacks=(), resume: bool = False,
    precision: str = "32-true", accelerator: str = "auto", devices="auto", clip_norm: float | None = None,
    limit_batches: int | None = None, progress: bool | None = True, ready=None,
) -> list[dict]:  # fmt: skip
    """Runs Lightning's Trainer on a TrainedModule; the core of `finetune` and `distill`, usable with any model.

    Args:
        module, datamodule: see lightning_module and data.
        epochs: number of epochs in all (also when resuming).
        output: folder for metrics.csv, curves and checkpoints; None writes nothing.
        callbacks: further Lightning callbacks (schedules).
        resume: continue from output/last.ckpt.
        precision, accelerator, devices: Lightning's. clip_norm: gradient norm limit.
        limit_batches: per epoch and part; None: all.
        progress: True: a bar on a terminal, elsewhere a line per epoch; False: a line per epoch; None: nothing.
        ready: called without arguments when everything has been accepted, before anything runs.

    Returns:
        One dict per epoch: epoch, step, seconds (training part), lr, train_loss, train_top1, val_loss, val_top1, …

    Raises:
        ValueError: a precision, an accelerator or devices that are not usable here, each named with what is.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Trainer

    check_machine(accelerator, devices)

    module.seed = seed
    module.train()  # Lightning keeps the mode that it finds, and models come in eval mode
    history, keep = _callbacks(output, progress is not None)
    # Lightning names itself, its GPUs and its tips at level INFO.
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    in_main_thread = threading.current_thread() is threading.main_thread()
    on_interrupt = signal.getsignal(signal.SIGINT)
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*optimizer.step.*")
            try:
                trainer = Trainer(
                    max_epochs=epochs, precision=precision, accelerator=accelerator, devices=devices,
                    callbacks=[*callbacks, history, *([keep] if keep else [])], logger=False,
                    enable_checkpointing=keep is not None, enable_model_summary=False, num_sanity_val_steps=0,
                    enable_progress_bar=bool(progress) and _has_terminal(), use_distributed_sampler=False,
                    gradient_clip_val=clip_norm, limit_train_batches=limit_batches, limit_val_batches=limit_batches,
                )  # fmt: skip
            except (MisconfigurationException, TypeError, ValueError) as error:
                raise ValueError(
                    "finetune: expected precision=, accelerator= and devices= that this machine has, got "
                    f"{precision!r}, {accelerator!r} and {devices!r}: {error}"
                ) from None
            if ready is not None:
                ready()
            path = output / "last.ckpt" if resume and output is not None else None
            if path is not None and not path.is_file():
                path = None  # killed in its first epoch: the same seed starts the same run again
            try:
                trainer.fit(module, datamodule=datamodule, ckpt_path=path, weights_only=True if path else None)
            except SystemExit:  # what Lightning makes of Ctrl-C, after putting its things in order
                if trainer.interrupted:
                    raise KeyboardInterrupt from None
                raise
    finally:
        logger.setLevel(level)
        if in_main_thread:
            signal.signal(signal.SIGINT, on_interrupt)  # Lightning leaves Ctrl-C ignored after the first
    return history.rows


def check_machine(accelerator: str, devices) -> None:
    """Raises ValueError unless `accelerator` is usable here and `devices` a number, "auto" or a list of indices."""
    from lightning.pytorch.accelerators import AcceleratorRegistry

    known = sorted(AcceleratorRegistry.available_accelerators())
    here = [name for name in known if AcceleratorRegistry[name]["accelerator"].is_available()]
    usable = ["auto", *(["gpu"] if {"cuda", "mps"} & set(here) else []), *here]
    if accelerator not in usable:
        reason = ", of which torch finds none here" if accelerator in (*known, "gpu") else ""
        raise ValueError(
            f"finetune: expected accelerator to be one of {', '.join(usable)}, got {accelerator!r}{reason}"
        )
    text = str(devices).strip()
    if not (text in ("auto", "-1") or re.fullmatch(r"[1-9]\d*|\d+(,\d+)+,?|\d+,", text)):
        raise ValueError(
            f"finetune: expected devices to be a number >= 1, auto, or indices such as 0,2; got {devices!r}"
        )


def _callbacks(output: Path | None, show: bool):
    """History, checkpoints, and the seed of an epoch; in a function because lightning is an extra."""
    import torch
    from lightning.pytorch.callbacks import Callback, Checkpoint

    class History(Callback):
        """Collects one row per epoch; the rows travel in the checkpoint."""

        def __init__(self):
            self.rows: list[dict] = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                # The checkpoint resumes at an epoch's start: everything random in it (dropout) follows from its number.
                torch.manual_seed(pl_module.seed * 1_000_003 + trainer.current_epoch)
                self._started, self._seconds = time.perf_counter(), None

        def on_validation_start(self, trainer, pl_module):
            if hasattr(self, "_started"):
                self._seconds = time.perf_counter() - self._started

        def on_train_epoch_end(self, trainer, pl_module):
            row = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
            row["seconds"] = self._seconds or time.perf_counter() - self._started
            row["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
            for callback in trainer.callbacks:
                if hasattr(callback, "value"):
                    row["b"] = callback.value
                if hasattr(callback, "factor"):
                    row["bias_factor"] = callback.factor
            for name in ("train_loss", "train_top1", "val_loss", "val_cosine", "val_top1", "val_top5"):
                if name in trainer.callback_metrics:
                    row[name] = float(trainer.callback_metrics[name])
            self.rows.append(row)
            if trainer.is_global_zero:
                if output is not None:
                    write_history(self.rows, output)
                if show and not trainer.progress_bar_callback:
                    print(row_text(row, trainer.max_epochs), flush=True)

        def state_dict(self):
            return {"rows": self.rows}

        def load_state_dict(self, state):
            self.rows = state["rows"]

    class Keep(Checkpoint):
        """last.ckpt, last/ and best/ after every epoch; as a Checkpoint it is called after all other callbacks."""

        def __init__(self):
            self.best = float("-inf")

        def on_train_epoch_end(self, trainer, pl_module):
            score = float(trainer.callback_metrics.get(pl_module.score, float("nan")))
            improved = not score <= self.best
            if improved:
                self.best = score
            temporary = output / "last.ckpt.tmp"
            trainer.save_checkpoint(temporary)  # on every rank
            if trainer.is_global_zero:
                if hasattr(pl_module.model, "save_pretrained"):
                    save_model(pl_module, output / "last")
                    if improved:
                        shutil.rmtree(output / "best.tmp", ignore_errors=True)
                        shutil.copytree(output / "last", output / "best.tmp")
                        shutil.rmtree(output / "best", ignore_errors=True)
                        os.replace(output / "best.tmp", output / "best")
                os.replace(temporary, output / "last.ckpt")

        def state_dict(self):
            return {"best": self.best}

        def load_state_dict(self, state):
            self.best = state["best"]

    return History(), Keep() if output is not None else None


def _has_terminal() -> bool:
    """Whether a bar can be drawn: a terminal of no width, as containers have them, would show nothing at all."""
    return sys.stdout.isatty() and os.get_terminal_size(sys.stdout.fileno()).columns > 0
