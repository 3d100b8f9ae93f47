"""The commands `bcosify finetune`, `distill` and `sweep`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from bcosification.cli.files import counted
from bcosification.cli.models import given_options, is_converted, needs, run_folder
from bcosification.cli.options import (
    CLASSIFIER_HELP,
    CONVERSION,
    EMBEDDED_HELP,
    FOLDER_HELP,
    SOURCE,
    add_command,
    add_common,
    add_conversion,
    add_shared,
    adder,
)


def add_finetune(commands) -> argparse.ArgumentParser:
    from bcosification.train.configuration import FinetuneConfig, recipes

    listed = "\n".join(f"  {name:22} {text}" for name, text in recipes().items())
    command = add_command(
        commands, "finetune", _finetune, "B-cosify a pretrained model and fine-tune it",
        "B-cosify a pretrained model and fine-tune it. Options given here override those of --recipe.",
        "examples:\n"
        "  bcosify finetune --recipe digits --out runs/digits\n"
        "  bcosify finetune --model resnet18 --data /data/imagenet --recipe imagenet_resnet18 --out runs/r18\n"
        "  bcosify finetune --resume --out runs/r18                    (after a kill)\n"
        "  bcosify finetune --resume --out runs/digits --epochs 6      (go on with a complete run)\n\n"
        f"recipes:\n{listed}",
        usage="bcosify finetune --model MODEL --data DATA --out DIR [options]\n"
        "       bcosify finetune --recipe NAME --out DIR [options]\n"
        "       bcosify finetune --resume --out DIR [options]",
    )  # fmt: skip
    add = adder(FinetuneConfig())
    group = command.add_argument_group("what")
    add(group, "--model", f"{CLASSIFIER_HELP}; or {FOLDER_HELP}", metavar="MODEL")
    add(
        group, "--data", f"{EMBEDDED_HELP}, or a folder with train/ and val/, one sub-folder per class in each",
        metavar="DATA",
    )  # fmt: skip
    add_shared(group, "--out", add=add)
    add_shared(group, "--recipe", "--resume")
    add_shared(group, *SOURCE, add=add)

    _add_run(command, add)
    return command


def _finetune(arguments: argparse.Namespace) -> int:
    from bcosification.train.finetuning import FinetuneConfig, finetune

    result = finetune(_run_config(arguments, FinetuneConfig), resume=arguments.resume)
    last = result.history[-1]["val_top1"]
    return _tell_run(result, f"validation top-1 {100 * last:.2f} % (best {100 * result.best:.2f} %)")


def add_distill(commands) -> argparse.ArgumentParser:
    from bcosification.train.distillation import DistillConfig

    command = add_command(
        commands, "distill", _distill, "B-cosify CLIP's image tower and distil it from the original",
        "B-cosify a CLIP model's image tower and train it to give the original's embeddings: images are all it takes.",
        "examples:\n"
        "  bcosify distill --model open_clip:RN50/openai --data /data/images --out runs/clip --epochs 20\n"
        "  bcosify distill --resume --out runs/clip                    (after a kill)\n\n"
        "The loss is SigLIP's, between the embeddings of the standard tower and of the B-cosified one. Labels and\n"
        "sub-folders of DATA mean nothing; without train/ and val/, a twentieth of the images is held out.",
        usage="bcosify distill --model MODEL --data DATA --out DIR [options]\n"
        "       bcosify distill --resume --out DIR [options]",
    )  # fmt: skip
    add = adder(DistillConfig())
    group = command.add_argument_group("what")
    add(group, "--model", f"open_clip:NAME/TAG, or transformers:NAME; or {FOLDER_HELP}", metavar="MODEL")
    add(
        group, "--data", f"{EMBEDDED_HELP}, a folder of images, with train/ and val/ in it or without, or tar shards: "
        "a folder of them, or 'DIR/{00000..00331}.tar'", metavar="DATA",
    )  # fmt: skip
    add_shared(group, "--out", add=add)
    add_shared(group, "--resume")
    add(group, "--teacher", "another teacher than MODEL, named as it is", metavar="MODEL")
    add(group, "--with-text", "store the text tower with the student", action="store_true")
    add_shared(group, "--no-pretrained", add=add)
    _add_run(command, add)
    return command


def _distill(arguments: argparse.Namespace) -> int:
    from bcosification.train.distillation import DistillConfig, distill

    result = distill(_run_config(arguments, DistillConfig), resume=arguments.resume)
    last = result.history[-1]["val_cosine"]
    return _tell_run(result, f"cosine with the teacher {last:.4f} (best {result.best:.4f})")


def _run_config(arguments: argparse.Namespace, kind):
    """The configuration of a run: the command line's, on top of a recipe's or of the run that is resumed."""
    from bcosification.train.configuration import load_recipe
    from bcosification.train.run_folder import check_output, saved_config

    given = given_options(arguments, [field.name for field in dataclasses.fields(kind)])
    values = {}
    if arguments.resume and "output" not in given:
        raise ValueError("--resume: expected --out with the folder of the run to continue")
    if given.get("output"):
        check_output(given["output"], resume=arguments.resume)  # before torch is imported, which may take its time
    if arguments.resume:
        values = dataclasses.asdict(saved_config(Path(given["output"]), kind))
    recipe = getattr(arguments, "recipe", None)
    if recipe is not None:
        values |= load_recipe(recipe)
    for option, name in (("--model", "model"), ("--data", "data"), ("--out", "output")):
        if not (given.get(name) or values.get(name)):
            hint = " (or a recipe that names it)" if name != "output" and hasattr(arguments, "recipe") else ""
            raise ValueError(f"expected {option}{hint}")
    conversion = given_options(arguments, CONVERSION)
    if conversion:
        given["conversion"] = {**values.get("conversion", {}), **conversion}
    if "model" in given and not arguments.resume:
        from bcosification.convert.checkpoints import read_config

        given["model"] = run_folder(given["model"])
        if is_converted(given["model"]):  # it keeps the options that it was converted with
            values = {name: read_config(given["model"])["options"][name] for name in ("b", "bias")} | values
    return kind.from_mapping(values | given, "command line")


def _tell_run(result, reached: str) -> int:
    done = len(result.history)
    if result.earlier == done:
        print(f"the run in {result.output} is complete; --resume --epochs N with N > {done} goes on with it")
    print(
        f"{counted(done, 'epoch')}; {reached}\n"
        f"model: {result.output / 'last'} (best: {result.output / 'best'}); curves and metrics in {result.output}"
    )
    if result.backends is not None:
        from bcosification.train.backend_times import told

        print(told(result.backends))
    return 0


def _add_run(command: argparse.ArgumentParser, add: Callable[..., None]) -> None:
    """What every run has options for: conversion, optimisation, data, machine."""
    from bcosification.train.configuration import FinetuneConfig

    group = command.add_argument_group("conversion, of a standard model")
    add(group, "--b", "exponent B >= 1", type=float, metavar="B")
    add(group, "--b-epochs", "raise B linearly from 1 over so many epochs; 0: at once", type=float, metavar="EPOCHS")
    add(
        group, "--bias", "remove the biases, keep them, or decay them to 0 over --bias-epochs",
        choices=("remove", "keep", "decay"),
    )  # fmt: skip
    add(group, "--bias-epochs", "with --bias decay: epochs until they are gone", type=float, metavar="EPOCHS")
    add_conversion(group)

    group = command.add_argument_group("optimisation")
    add_shared(group, "--epochs", "--batch-size", "--lr", add=add)
    add(group, "--optimizer", "optimiser", choices=("adam", "adamw"))
    add(group, "--weight-decay", "of matrices and kernels, not of vectors", type=float, metavar="DECAY")
    add(group, "--warmup-epochs", "linear warm-up, fractions allowed", type=float, metavar="EPOCHS")
    if command.prog.endswith("distill"):
        add(group, "--logit-scale", "of the SigLIP loss's logits", type=float, metavar="SCALE")
        add(group, "--logit-bias", "likewise", type=float, metavar="BIAS")
    else:
        add(
            group, "--loss", "binary cross-entropy with off labels 1/classes, with one-hot labels, or cross-entropy",
            choices=("bce_uniform", "bce", "cross_entropy"),
        )  # fmt: skip
    clipping = "adaptive gradient clipping with this factor"
    if not command.prog.endswith("distill"):  # whose default is the papers'
        clipping += " (default: none; the papers: 0.01)"
    add(group, "--agc", clipping, type=float, metavar="FACTOR")
    add(group, "--clip-norm", "clip the gradient's norm", type=float, metavar="NORM")
    add_shared(group, "--seed", add=add)

    group = command.add_argument_group("data")
    add_shared(group, "--image-size", add=add)
    add(
        group, "--no-augment", "no random crops and flips (embedded data: shifts)", dest="augment", action="store_false"
    )
    add_shared(group, "--num-workers", "--limit-batches", add=add)

    group = command.add_argument_group("machine")
    add(group, "--precision", ", ".join(FinetuneConfig.PRECISIONS), metavar="NAME")
    add(group, "--compile", "torch.compile the model", action="store_true")
    add_shared(group, "--accelerator", "--devices", add=add)
    add(group, "--no-progress", "a line per epoch instead of a bar", dest="progress", action="store_false")
    add_shared(group, "--debug")


def add_sweep(commands) -> argparse.ArgumentParser:
    from bcosification.train.configuration import FinetuneConfig

    command = add_command(
        commands, "sweep", _sweep, "fine-tune with one choice changed at a time, and compare",
        "Fine-tune a B-cosified model again and again, one choice changed at a time, and compare accuracy, GridPG and\n"
        "what the conversion changes: B from 1 to 3; biases and schedules; the six design choices between standard\n"
        "and B-cos networks. Without --model and --data: a small ResNet on scenes, minutes on a CPU (3 epochs of 60\n"
        "batches of 24, learning rate 0.001, unless told otherwise). The same command goes on with a sweep that was\n"
        "interrupted.",
        "examples:\n"
        "  bcosify sweep --out runs/sweep\n"
        "  bcosify sweep --model resnet18 --data /data/imagenet --recipe imagenet_resnet18 --epochs 9 --out runs/s18\n"
        "  bcosify sweep --out runs/sweep --ask b --b-values 1 1.5 2 3 --seeds 3\n\n"
        "Written to --out: sweep.json (a row per run), sweep.md (the table), sweep.png (the figure), runs/ (the runs).",
        usage="bcosify sweep [options] --out DIR",
    )  # fmt: skip
    add = adder(FinetuneConfig())
    group = command.add_argument_group("what")
    add(group, "--model", f"{CLASSIFIER_HELP}; or small, the demo's network", metavar="MODEL")
    add(group, "--data", f"{EMBEDDED_HELP}, or a folder with train/ and val/", metavar="DATA")
    group.add_argument("--out", dest="output", metavar="DIR", required=True, help="output folder, or that of a sweep")
    add_shared(group, "--recipe")
    group.add_argument(
        "--ask", nargs="+", choices=("b", "biases", "design"), default=("b", "biases", "design"),
        help="questions (default: all three)",
    )  # fmt: skip
    group.add_argument(
        "--b-values", type=float, nargs="+", metavar="B", default=(1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0),
        help="of question b (default: 1 1.25 1.5 1.75 2 2.5 3)",
    )  # fmt: skip
    group.add_argument("--seeds", type=int, default=1, metavar="N", help="repetitions of every run (default: 1)")
    group.add_argument("--grids", type=int, default=16, metavar="N", help="of the grid pointing game (default: 16)")
    group.add_argument(
        "--pretrain-epochs", type=int, metavar="N",
        help="train the standard model on the data first (default: 5 for small, else 0)",
    )  # fmt: skip
    add_shared(group, *SOURCE, add=add)
    group = command.add_argument_group("conversion, where it is not what is asked")
    add_conversion(group)
    group = command.add_argument_group("fine-tuning of each run")
    add_shared(
        group, "--epochs", "--batch-size", "--lr", "--image-size", "--limit-batches", "--num-workers", "--seed",
        "--accelerator", "--devices", add=add,
    )  # fmt: skip
    add_common(command)
    return command


def _sweep(arguments: argparse.Namespace) -> int:
    needs("lightning", "torchmetrics", "tqdm", "matplotlib")
    from bcosification.train.configuration import FinetuneConfig, load_recipe

    given = given_options(arguments, [field.name for field in dataclasses.fields(FinetuneConfig)])
    values = {} if arguments.recipe is None else load_recipe(arguments.recipe)
    if arguments.recipe is None and not {"model", "data"} & set(given):
        from bcosification.train.sweeping import DEMO

        values = dict(DEMO)
    for option, name in (("--model", "model"), ("--data", "data")):
        if not (given.get(name) or values.get(name)):
            raise ValueError(f"expected {option} (or a recipe that names it, or neither: the demo)")
    conversion = given_options(arguments, CONVERSION)
    if conversion:
        given["conversion"] = {**values.get("conversion", {}), **conversion}
    config = FinetuneConfig.from_mapping(values | given, "command line")

    from bcosification.train.sweeping import sweep

    options = {name: getattr(arguments, name) for name in ("ask", "b_values", "seeds", "grids", "pretrain_epochs")}
    result = sweep(config, **options, say=lambda text: print(text, flush=True))
    print(f"\n{result}\n\nrows in {result.output / 'sweep.json'}, the table in sweep.md, the figure in sweep.png")
    return 0
