"""Fine-tuning from a configuration: `finetune(FinetuneConfig(...))`, behind `bcosify finetune`.

What a run leaves in its output folder:

    config.yaml          the configuration, complete; --resume reads it
    metrics.csv          one row per epoch (units: seconds, shares of 1)
    training_curves.png  loss and accuracy (when matplotlib is installed)
    last.ckpt            everything needed to go on: weights, optimiser, schedule, counters
    last/, best/         model.safetensors + config.json (and a model card), for bcosification.load and every command
    unreadable_images.txt  files that were left out, if any
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import logging
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

__all__ = ["FinetuneConfig", "FinetuneResult", "check_output", "finetune", "load_recipe", "recipes", "train"]


@dataclass
class FinetuneConfig:
    """Everything that determines a run. Recipes are YAML files with these keys.

    Model: `model` (a spec such as resnet18, torchvision:NAME, timm:NAME, a folder written by us, a weights file with
    `arch`), `arch`, `pretrained` (False: random weights), `weights` (a local file with the standard network's weights).
    `conversion` holds further options of `bcosify` (pool, head, activation, normalize_weight, logit_bias, mean, …).

    B: `b` reached, raised linearly from 1 over `b_epochs` (0: at once). Biases: `bias` is "remove", "keep" or "decay"
    (over `bias_epochs`).

    Data: `data` (digits, scenes or a folder), `image_size` (None: the data set's or the model's), `augment`,
    `num_workers` (None: chosen).

    Optimisation: `epochs`, `batch_size` (per device), `lr`, `optimizer` (adam, adamw), `weight_decay`, `warmup_epochs`,
    `loss` (bce_uniform, bce, cross_entropy), `agc` (clip factor or None), `clip_norm` (norm or None), `seed`.

    Machine: `precision` (one of PRECISIONS, Lightning's names), `compile`, `channels_last`, `accelerator` (auto, cpu,
    gpu, …), `devices` (a number, auto, or indices such as "0,2"), `limit_batches` (per epoch and part, for trials;
    None: all), `progress` (True: a bar on a terminal, elsewhere a line per epoch; False: a line per epoch; None:
    nothing is printed).
    """

    model: str = ""
    data: str = ""
    output: str = ""
    arch: str | None = None
    pretrained: bool = True
    weights: str | None = None
    conversion: dict = field(default_factory=dict)
    b: float = 2.0
    b_epochs: float = 0.0
    bias: str = "remove"
    bias_epochs: float = 0.0
    image_size: int | None = None
    augment: bool = True
    num_workers: int | None = None
    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-4
    optimizer: str = "adam"
    weight_decay: float = 0.0
    warmup_epochs: float = 0.0
    loss: str = "bce_uniform"
    agc: float | None = None
    clip_norm: float | None = None
    seed: int = 0
    precision: str = "32-true"
    compile: bool = False
    channels_last: bool = True
    accelerator: str = "auto"
    devices: str = "auto"
    limit_batches: int | None = None
    progress: bool | None = True

    PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")

    COMMAND = "finetune"
    """Who speaks in errors."""

    # A resumed run may differ in these, and in the number of epochs; all others decide what comes out.
    MACHINE = frozenset(
        {"output", "num_workers", "accelerator", "devices", "progress", "compile", "channels_last", "precision"}
    )

    def check(self) -> None:
        """Raises ValueError naming the first option whose value makes no sense."""

        def expect(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise ValueError(f"{self.COMMAND}: expected {name} {expected}, got {getattr(self, name)!r}")

        for name in ("model", "data", "output"):
            expect(bool(getattr(self, name)), name, "to be given")
        for name in ("epochs", "batch_size"):
            expect(getattr(self, name) >= 1, name, ">= 1")
        expect(self.lr > 0, "lr", "> 0")
        expect(self.b >= 1, "b", ">= 1")
        expect(0 <= self.b_epochs <= self.epochs, "b_epochs", f"between 0 and the number of epochs, {self.epochs}")
        expect(self.bias in ("remove", "keep", "decay"), "bias", "in ('remove', 'keep', 'decay')")
        most = f"between 0 and the number of epochs, {self.epochs}"
        expect(0 <= self.bias_epochs <= self.epochs, "bias_epochs", most)
        expect(self.bias != "decay" or self.bias_epochs > 0, "bias_epochs", "> 0 with bias='decay'")
        expect(self.bias == "decay" or self.bias_epochs == 0, "bias_epochs", "to be 0 without bias='decay'")
        expect(0 <= self.warmup_epochs < self.epochs, "warmup_epochs", f">= 0 and < {self.epochs} (epochs in all)")
        expect(self.optimizer in ("adam", "adamw"), "optimizer", "in ('adam', 'adamw')")
        expect(self.loss in self.losses(), "loss", f"in {tuple(self.losses())}")
        expect(self.weight_decay >= 0, "weight_decay", ">= 0")
        expect(self.agc is None or self.agc > 0, "agc", "> 0")
        expect(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "> 0")
        if self.agc is not None and self.clip_norm is not None:
            raise ValueError(
                f"{self.COMMAND}: expected agc= or clip_norm=, got both: {self.agc!r} and {self.clip_norm!r}"
            )
        expect(self.image_size is None or self.image_size >= 8, "image_size", ">= 8")
        expect(self.num_workers is None or self.num_workers >= 0, "num_workers", ">= 0")
        expect(self.limit_batches is None or self.limit_batches >= 1, "limit_batches", ">= 1")
        expect(self.precision in self.PRECISIONS, "precision", f"to be one of {', '.join(self.PRECISIONS)}")
        expect(isinstance(self.conversion, dict), "conversion", "to be a mapping of bcosify's options")
        for name in ("b", "bias"):
            if name in self.conversion:
                raise ValueError(f"{self.COMMAND}: expected {name} outside of conversion, got {self.conversion!r}")

    def losses(self) -> tuple[str, ...]:
        """The names that `loss` may have."""
        from .losses import LOSSES

        return tuple(LOSSES)

    def check_data(self) -> None:
        """Raises FileNotFoundError unless `data` is there, laid out as it has to be."""
        from .data import check_source

        check_source(self.data)

    @classmethod
    def from_mapping(cls, values: dict, source: str) -> FinetuneConfig:
        return cls(**_typed(values, source, cls))

    def to_yaml(self) -> str:
        import yaml

        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def _typed(values: dict, source: str, config: type[FinetuneConfig] = FinetuneConfig) -> dict:
    """`values` with known keys only and the fields' types (YAML reads 1e-4 as a string)."""
    if not isinstance(values, dict):
        raise ValueError(f"{source}: expected a mapping of options, got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(config)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{source}: expected options among {', '.join(fields)}; got {', '.join(map(repr, unknown))}")
    result = {}
    for name, value in values.items():
        kind = str(fields[name].type)
        try:
            if value is None and "None" not in kind:
                raise ValueError
            if value is not None:
                if kind.startswith("bool"):
                    if not isinstance(value, bool):
                        raise ValueError
                elif kind.startswith("float"):
                    value = float(value)
                elif kind.startswith("int"):
                    if int(value) != float(value):
                        raise ValueError
                    value = int(value)
                elif kind.startswith("str"):
                    value = str(value)
        except (TypeError, ValueError):
            raise ValueError(f"{source}: expected {name} to be {kind}, got {value!r}") from None
        result[name] = value
    return result


@dataclass
class FinetuneResult:
    """output: the folder; history: one dict per epoch, as in metrics.csv; model: the trained model, in eval mode;
    best: highest val_top1 (share of 1), of a distillation val_cosine; unreadable: list of (path, reason); earlier: how
    many of the history's epochs are those of the run that was resumed (all of them: it was complete)."""

    output: Path
    history: list[dict]
    model: object
    best: float
    unreadable: list
    earlier: int = 0


def recipes() -> dict[str, str]:
    """Name → first comment line of every recipe that comes with the package."""
    found = {}
    for entry in sorted(resources.files(__package__).joinpath("recipes").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            found[entry.name[: -len(".yaml")]] = entry.read_text().splitlines()[0].lstrip("# ")
    return found


def load_recipe(name_or_file: str) -> dict:
    """Options of a recipe that comes with the package, or of a YAML file of one's own.

    Raises:
        FileNotFoundError: neither. ValueError: not YAML, unknown options, wrong types.
    """
    import yaml

    text = None
    if name_or_file in recipes():
        text = resources.files(__package__).joinpath("recipes", f"{name_or_file}.yaml").read_text()
    elif Path(name_or_file).is_file():
        text = Path(name_or_file).read_text()
    if text is None:
        raise FileNotFoundError(f"recipe: expected a YAML file or one of {', '.join(recipes())}; got {name_or_file!r}")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {name_or_file}: not valid YAML: {error}") from None
    return _typed(values, f"recipe {name_or_file}")


def check_output(folder, *, resume: bool = False) -> None:
    """Raises unless `folder` can take a new run (or, with resume, holds one); leaves nothing behind.

    Raises:
        NotADirectoryError, PermissionError: it cannot be written. FileExistsError: it is not empty.
        FileNotFoundError: resume, and there is no run in it.
    """
    folder = Path(folder)
    check_writable(folder)
    if resume:
        if not (folder / "config.yaml").is_file():
            raise FileNotFoundError(
                f"--resume: expected the folder of an earlier run (config.yaml), found none in {folder}"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        hint = "give --resume to continue the run in it, or " if (folder / "config.yaml").is_file() else ""
        raise FileExistsError(
            f"output: expected a new or empty folder, got {folder} with files in it; {hint}choose another"
        )


def check_writable(folder: Path) -> None:
    """Raises NotADirectoryError or PermissionError unless `folder` can be written or made; leaves nothing behind."""
    parent = folder.absolute()
    while not os.path.lexists(parent):  # a link to nowhere exists: nothing can be made in its place
        parent = parent.parent
    if not os.path.isdir(parent):
        kind = "a link to nothing" if parent.is_symlink() else "a file"
        raise NotADirectoryError(f"output: expected a folder, got {folder}, where {parent} is {kind}")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise PermissionError(
            f"output: expected a folder that can be written, got {folder}: {error.strerror}"
        ) from None


def _require(extra: str, *modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"this needs {', '.join(missing)}, not installed here: pip install 'bcos-kernels[{extra}]'"
        )


def _write(path: Path, text: str) -> None:
    """The file is either the old or the new one, also when the process is killed in between."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _save_model(module, folder: Path) -> None:
    """What save_pretrained writes, written beside and moved into place."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    module.save(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


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
                    _write_history(self.rows, output)
                if show and not trainer.progress_bar_callback:
                    print(_row_text(row, trainer.max_epochs), flush=True)

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
                    _save_model(pl_module, output / "last")
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


def _row_text(row: dict, epochs: int) -> str:
    """One epoch in one line."""
    parts = []
    for part, label in (("train", "training"), ("val", "validation")):
        metrics = [f"loss {row[f'{part}_loss']:.4f}"] if f"{part}_loss" in row else []
        metrics += [f"cosine {row[f'{part}_cosine']:.4f}"] if f"{part}_cosine" in row else []
        metrics += [f"top-{k} {100 * row[f'{part}_top{k}']:.2f} %" for k in (1, 5) if f"{part}_top{k}" in row]
        if metrics:
            parts.append(f"{label}: {', '.join(metrics)}")
    return f"epoch {row['epoch']} of {epochs}: {'; '.join(parts)}; {row['seconds']:.0f} s"


def _write_history(rows: list[dict], output: Path) -> None:
    import io

    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _write(output / "metrics.csv", text.getvalue())
    if importlib.util.find_spec("matplotlib") is not None:
        _draw_history(rows, output / "training_curves.png")


def _draw_history(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure  # no pyplot: nothing global is touched, no display is needed

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    panels = [(left, "loss", ("train_loss", "val_loss"), 1), (right, "accuracy (%)", ("train_top1", "val_top1"), 100)]
    if "val_cosine" in rows[0]:
        panels[1] = (right, "cosine of student and teacher", ("val_cosine",), 1)
    for axis, unit, names, factor in panels:
        for name in names:
            values = [row.get(name, float("nan")) * factor for row in rows]
            axis.plot(epochs, values, marker="." if len(epochs) < 30 else None, label=name.split("_")[0])
        axis.set(xlabel="epoch", ylabel=unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    left.set_yscale("log")
    figure.savefig(path, dpi=110)


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


def finetune(config: FinetuneConfig, *, model=None, resume: bool = False) -> FinetuneResult:
    """Takes a pretrained network, B-cosifies it and fine-tunes it.

    Args:
        config: see FinetuneConfig.
        model: a standard network of one's own, with its weights, instead of what config.model names (which then only
            labels the run); it is not changed. Resuming needs it again where its class cannot be built from its name.
        resume: continue the run in config.output from its last complete epoch; everything except FinetuneConfig.MACHINE
            and `epochs` has to be as it was. On the same machine the result is that of an uninterrupted run, bit for
            bit. With another number of epochs, at least those that are done, the learning rate goes on along the
            schedule of the new number (so that of a complete run rises again).

    Raises:
        ValueError, FileNotFoundError, FileExistsError, PermissionError: the configuration, the data, the model or the
            output folder is not usable; nothing has been written then.
    """
    return run(config, _classification, model=model, resume=resume)


def run(config: FinetuneConfig, prepare, *, model=None, resume: bool = False) -> FinetuneResult:
    """One run from a configuration, whatever is trained.

    Args:
        config, model, resume: see `finetune`.
        prepare: (config, own model or None, the run's last/ when it is resumed or None) → a TrainedModule around the
            model, and the data module.
    """
    if model is not None and not config.model:
        config = dataclasses.replace(config, model=type(model).__name__)
    config.check()
    _require(
        "train", "lightning", "torchmetrics", "torchvision", "yaml", "safetensors",
        *(["timm"] if config.agc is not None else []),
    )  # fmt: skip
    output = Path(config.output)
    check_output(output, resume=resume)
    check_machine(config.accelerator, config.devices)
    config.check_data()
    earlier = _check_same(config, output) if resume else 0

    import torch

    torch.manual_seed(config.seed)
    module, datamodule = prepare(config, model, output / "last" if earlier else None)
    from .schedules import BiasDecay, LinearB

    callbacks = []
    if config.b_epochs > 0:
        callbacks.append(LinearB(config.b_epochs, end=config.b))
    if config.bias == "decay":
        callbacks.append(BiasDecay(config.bias_epochs))
    if config.compile:
        module.model.compile()

    def ready() -> None:
        output.mkdir(parents=True, exist_ok=True)
        _write(output / "config.yaml", config.to_yaml())
        if config.progress is not None and earlier < config.epochs:
            print(_summary(config, module.model, datamodule, earlier), flush=True)
        if datamodule.unreadable:
            listed = output / "unreadable_images.txt"
            _write(listed, "".join(f"{path}\t{reason}\n" for path, reason in datamodule.unreadable))
            count = len(datamodule.unreadable)
            files = "1 unreadable image file is" if count == 1 else f"{count:,} unreadable image files are"
            warnings.warn(f"{files} left out, listed in {listed}; first: {datamodule.unreadable[0][0]}", stacklevel=1)

    history = train(
        module, datamodule, epochs=config.epochs, seed=config.seed, output=output, callbacks=callbacks, resume=resume,
        precision=config.precision, accelerator=config.accelerator, devices=config.devices,
        clip_norm=config.clip_norm, limit_batches=config.limit_batches, progress=config.progress, ready=ready,
    )  # fmt: skip
    best = max((row[module.score] for row in history if module.score in row), default=float("nan"))
    return FinetuneResult(output, history, module.saved.eval(), best, datamodule.unreadable, earlier)


def _classification(config: FinetuneConfig, own, saved: Path | None):
    """What `finetune` trains: a classifier on labelled images."""
    model, datamodule = _prepare(config, own, saved)
    from .lightning_module import ClassificationModule

    module = ClassificationModule(
        model, datamodule.num_classes, loss=config.loss, optimizer=config.optimizer, lr=config.lr,
        weight_decay=config.weight_decay, warmup_epochs=config.warmup_epochs, agc=config.agc,
        channels_last=config.channels_last,
    )  # fmt: skip
    return module, datamodule


def _summary(config: FinetuneConfig, model, datamodule, earlier: int) -> str:
    height, width = model.config["input_size"] or ("?", "?")
    resumed = f"going on after epoch {earlier} of {config.epochs}\n" if earlier else ""
    return resumed + (
        f"{config.model}: {sum(p.numel() for p in model.parameters()):,} parameters, B {config.b:g}, biases: "
        f"{config.bias}; {config.data}: {len(datamodule.train):,} images to train on and {len(datamodule.val):,} to "
        f"validate on, {datamodule.what}, {height} x {width} pixels"
    )


def saved_config(output: Path, kind: type[FinetuneConfig] = FinetuneConfig) -> FinetuneConfig:
    """The configuration of the run in `output`."""
    import yaml

    check_output(output, resume=True)
    path = output / "config.yaml"
    return kind.from_mapping(yaml.safe_load(path.read_text()), str(path))


def _check_same(config: FinetuneConfig, output: Path) -> int:
    """The number of complete epochs of the run in `output`; ValueError if `config` asks for another run."""
    path = output / "config.yaml"
    before, now = (_decisive(c) for c in (saved_config(output, type(config)), config))
    other = [name for name in before | now if before.get(name) != now.get(name)]
    if other:
        values = [", ".join(f"{name}={options.get(name)!r}" for name in other) for options in (before, now)]
        raise ValueError(
            f"{config.COMMAND}: expected the options of the run that is resumed ({path}), {values[0]}; got "
            f"{values[1]}: another run needs a folder of its own"
        )
    done = _complete_epochs(output)
    if config.epochs < done:
        raise ValueError(
            f"{config.COMMAND}: expected epochs >= {done}, which the run in {output} has done, got {config.epochs}"
        )
    return done


def _decisive(config: FinetuneConfig) -> dict:
    """The options that decide what comes out, those of the conversion among them, without the number of epochs."""
    options = dataclasses.asdict(config)
    options |= options.pop("conversion")
    return {name: value for name, value in options.items() if name != "epochs" and name not in config.MACHINE}


def _complete_epochs(output: Path) -> int:
    """Epochs that last.ckpt holds; 0 for a run that was killed in its first."""
    import torch

    path = output / "last.ckpt"
    if not path.is_file():
        return 0
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["epoch"] + 1
    except pickle.UnpicklingError:  # whose text goes on to tell how to switch the check off
        got = "another format, or a pickle with other objects, which could run code when it is read, so it is refused"
    except (RuntimeError, EOFError, OSError, KeyError, TypeError, zipfile.BadZipFile) as error:
        got = f"one that cannot be read: {error}"
    raise ValueError(f"{path}: expected a checkpoint of finetune, got {got}")


def _prepare(config: FinetuneConfig, own, saved: Path | None):
    """The B-cosified model with a head for the data's classes, and the data module.

    From the run's last/ (saved) when it is resumed: its configuration holds what the first start found out.
    """
    import bcosification
    from bcosification.convert.resolver import resolve
    from bcosification.convert.wrapper import BcosifiedModel

    if saved is not None:
        model = bcosification.load(saved, model=own)
    else:
        found = own
        if own is None:
            found, _ = resolve(config.model, arch=config.arch, pretrained=config.pretrained, weights=config.weights)
        if isinstance(found, BcosifiedModel):
            model = found
            _check_converted(config, model)
        else:
            model = bcosification.bcosify(found, b=config.b, bias=config.bias, **config.conversion)
    datamodule = data_for(config, model)
    size, as_expected = _image_size(config, model)
    if saved is None:
        if model.num_classes != datamodule.num_classes:
            model.reset_classifier(datamodule.num_classes)
        model.config["class_names"] = datamodule.class_names
        model.config["finetuned_on"] = Path(config.data).name
        if not as_expected:
            resize = size if _embedded(config) else round(size * 256 / 224)
            model.config.update(input_size=[size, size], resize=resize, crop="center")
    return model, datamodule


def data_for(config: FinetuneConfig, model):
    """The data module of `config.data`, with images as `model`, a B-cosified one, takes them.

    Raises:
        ValueError: an image size that the model does not take. Those of `build_datamodule`.
    """
    from .data import build_datamodule, evaluation_transform

    size, as_expected = _image_size(config, model)
    return build_datamodule(
        config.data, image_size=size, batch_size=config.batch_size, num_workers=config.num_workers, seed=config.seed,
        augment=config.augment, eval_transform=model.transform if as_expected else evaluation_transform(size),
    )  # fmt: skip


def _embedded(config: FinetuneConfig) -> bool:
    from .data import EMBEDDED

    return config.data in EMBEDDED and not Path(config.data).is_dir()


def _image_size(config: FinetuneConfig, model) -> tuple[int, bool]:
    """Edge of the images, and whether they are cropped as the model's weights expect."""
    from .data import digits, scenes

    expected = model.config["input_size"]
    if _embedded(config):
        native = {"digits": digits, "scenes": scenes}[config.data]("val").images.shape[-1]
        size = config.image_size or (native if expected is None or takes_size(model, native) else min(expected))
    else:
        size = config.image_size or (min(expected) if expected is not None else 224)
    if not takes_size(model, size):
        raise ValueError(
            f"{config.COMMAND}: expected an image_size that {config.model} can take (its own: {expected}), got {size}"
        )
    return size, not _embedded(config) and config.image_size is None and expected is not None


def _check_converted(config: FinetuneConfig, model) -> None:
    """A model that is B-cosified already keeps the options of its conversion; other wishes are errors."""
    options = model.config["options"]
    for name in ("b", "bias"):
        if getattr(config, name) != options[name]:
            raise ValueError(
                f"{config.COMMAND}: expected {name}={options[name]!r}, which {config.model} was B-cosified with, got "
                f"{name}={getattr(config, name)!r}"
            )
    if config.conversion:
        raise ValueError(
            f"{config.COMMAND}: expected no options of conversion, as {config.model} is B-cosified already; got "
            + ", ".join(f"{name}=" for name in config.conversion)
        )


def takes_size(model, size: int) -> bool:
    """Whether the model takes size × size images: tried, as families differ in what they fix."""
    import torch

    training = model.training
    like = next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size, device=like.device, dtype=like.dtype))
        return True
    except (RuntimeError, ValueError, AssertionError):
        return False
    finally:
        model.train(training)
