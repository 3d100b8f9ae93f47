"""Fine-tuning from a configuration: `finetune(FinetuneConfig(...))`, behind `bcosify finetune`.

What a run leaves in its output folder:

    config.yaml          the configuration, complete; --resume reads it
    metrics.csv          one row per epoch (units: seconds, shares of 1)
    training_curves.png  loss and accuracy (when matplotlib is installed)
    backends.json        which backends ran the B-cos layers, and the share of their time without a kernel
    last.ckpt            everything needed to go on: weights, optimiser, schedule, counters
    last/, best/         model.safetensors + config.json (and a model card), for bcosification.load and every command
    unreadable_images.txt  files that were left out, if any
"""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path

from .configuration import FinetuneConfig, load_recipe, recipes, with_absolute_paths
from .run_folder import check_output, check_same, check_same_data, saved_config, write
from .training import check_machine, train

__all__ = ["FinetuneConfig", "FinetuneResult", "check_output", "finetune", "load_recipe", "recipes", "train"]


@dataclass
class FinetuneResult:
    """output: the folder; history: one dict per epoch, as in metrics.csv; model: the trained model, in eval mode;
    best: highest val_top1 (share of 1), of a distillation val_cosine; unreadable: list of (path, reason); earlier: how
    many of the history's epochs are those of the run that was resumed (all of them: it was complete); backends: what
    backends.json holds (see backend_times.BackendTimes), None if no step was measured."""

    output: Path
    history: list[dict]
    model: object
    best: float
    unreadable: list
    earlier: int = 0
    backends: dict | None = None


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
    given = {name: getattr(config, name) for name in ("data", "weights", "teacher") if hasattr(config, name)}
    if model is None:  # else its name is a label
        given["model"] = config.model
    config = dataclasses.replace(config, **with_absolute_paths(given))
    _check_data(config, output, resume)
    earlier = check_same(config, output) if resume else 0

    import torch

    torch.manual_seed(config.seed)
    module, datamodule = prepare(config, model, output / "last" if earlier else None)
    if earlier:
        check_same_data(config, datamodule, output)
    from .backend_times import BackendTimes, saved
    from .schedules import BiasDecay, FreshStatistics, LinearB

    times = BackendTimes(output)
    callbacks = [times, FreshStatistics()]
    if config.b_epochs > 0:
        callbacks.append(LinearB(config.b_epochs, end=config.b))
    if config.bias == "decay":
        callbacks.append(BiasDecay(config.bias_epochs))
    if config.compile:
        module.model.compile()

    def ready() -> None:
        output.mkdir(parents=True, exist_ok=True)
        write(output / "config.yaml", config.to_yaml())
        if config.progress is not None and earlier < config.epochs:
            print(_summary(config, module.model, datamodule, earlier), flush=True)
        if datamodule.unreadable:
            listed = output / "unreadable_images.txt"
            write(listed, "".join(f"{path}\t{reason}\n" for path, reason in datamodule.unreadable))
            count = len(datamodule.unreadable)
            files = "1 unreadable image file is" if count == 1 else f"{count:,} unreadable image files are"
            warnings.warn(f"{files} left out, listed in {listed}; first: {datamodule.unreadable[0][0]}", stacklevel=1)

    history = train(
        module, datamodule, epochs=config.epochs, seed=config.seed, output=output, callbacks=callbacks, resume=resume,
        precision=config.precision, accelerator=config.accelerator, devices=config.devices,
        clip_norm=config.clip_norm, limit_batches=config.limit_batches, progress=config.progress, ready=ready,
    )  # fmt: skip
    best = max((row[module.score] for row in history if module.score in row), default=float("nan"))
    backends = times.found or saved(output)
    return FinetuneResult(output, history, module.saved.eval(), best, datamodule.unreadable, earlier, backends)


def _check_data(config: FinetuneConfig, output: Path, resume: bool) -> None:
    """The data, before anything is built; of a resumed run with what to do where they have moved."""
    try:
        config.check_data()
    except FileNotFoundError as error:
        if not resume or saved_config(output, type(config)).data != config.data:
            raise
        raise FileNotFoundError(
            f"{error}; the run in {output} was trained on it: data= tells where it is now"
        ) from None


def _require(extra: str, *modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"this needs {', '.join(missing)}, not installed here: pip install 'bcos-kernels[{extra}]'"
        )


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
    size, as_expected = image_size(config, model)
    if saved is None:
        if model.num_classes != datamodule.num_classes:
            model.reset_classifier(datamodule.num_classes)
        model.config["class_names"] = datamodule.class_names
        model.config["finetuned_on"] = Path(config.data).name
        if not as_expected:
            resize = size if embedded(config) else round(size * 256 / 224)
            model.config.update(input_size=[size, size], resize=resize, crop="center")
    return model, datamodule


def data_for(config: FinetuneConfig, model):
    """The data module of `config.data`, with images as `model`, a B-cosified one, takes them.

    Raises:
        ValueError: a model that is no classifier of images, an image size that the model does not take. Those of
            `build_datamodule`.
    """
    from bcosification.convert.text import BcosifiedText

    from .data import build_datamodule, evaluation_transform

    if isinstance(model, BcosifiedText) or model.num_classes is None:
        why = "which reads texts" if isinstance(model, BcosifiedText) else "which has no classes"
        hint = "; distill trains CLIP's image towers" if hasattr(model, "encode_image") else ""
        raise ValueError(
            f"{config.COMMAND}: expected a classifier of images, got {config.model} ({model.config['class']}), {why}"
            f"{hint}"
        )
    size, as_expected = image_size(config, model)
    return build_datamodule(
        config.data, image_size=size, batch_size=config.batch_size, num_workers=config.num_workers, seed=config.seed,
        augment=config.augment, eval_transform=model.transform if as_expected else evaluation_transform(size),
    )  # fmt: skip


def embedded(config: FinetuneConfig) -> bool:
    """Whether the data are one of the sets that are made here."""
    from .data import EMBEDDED

    return config.data in EMBEDDED


def image_size(config: FinetuneConfig, model, teacher=None) -> tuple[int, bool]:
    """Edge of the images, and whether they are cropped as the model's weights expect.

    The data set's own where it has one and the model (and the teacher, which may fix another size) takes it; else the
    model's, or 224.

    Raises:
        ValueError: config.image_size, or what was found, is a size that one of the two does not take.
    """
    from bcosification.convert.image_sizes import size_told

    from .data import digits, scenes

    networks = [model] if teacher is None else [model, teacher]

    def taken(size: int) -> bool:
        return all(takes_size(network, size) for network in networks)

    expected = model.config["input_size"]
    size = config.image_size or (min(expected) if expected is not None else 224)
    if config.image_size is None and embedded(config):
        native = {"digits": digits, "scenes": scenes}[config.data]("val").images.shape[-1]
        size = native if expected is None or taken(native) else size
    if not taken(size):
        who, own = (config.model, "its") if teacher is None else (f"{config.model} and its teacher", "their")
        raise ValueError(
            f"{config.COMMAND}: expected image_size to be one that {who} can take"
            f"{f' ({own} own: {size_told(expected)})' if expected else ''}, got {size}"
        )
    return size, not embedded(config) and config.image_size is None and expected is not None


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
