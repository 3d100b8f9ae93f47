"""The options of the command `bcosify`, and the library's messages in their words.

`parser` makes argparse's parser; `in_options` turns a message that names Python's parameters into one that names
options. Nothing but the standard library is needed here.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping

__all__ = ["CONVERSION", "FOLDER_HELP", "STANDARD_HELP", "in_options", "parser"]

STANDARD_HELP = (
    "torchvision:NAME or just NAME (resnet18), timm:NAME, open_clip:NAME/TAG, bcosification:NAME "
    "(simple_vit_s_patch16_224), or a weights file together with --arch"
)
FOLDER_HELP = "a folder that finetune, distill or convert wrote (a run stands for its best epoch)"
EXIT_CODES = """\
exit codes: 0 done; 1 not all of it (a check failed, a named image could not be read, a package is missing);
2 wrong usage or input, nothing was done; 130 interrupted"""

# Options of bcosify that finetune, convert and verify share; --b and --bias are apart: finetune has their schedules.
CONVERSION = ("pool", "head", "activation", "normalize_weight", "mean", "std", "on_unknown")


def parser(run: Mapping[str, Callable]) -> argparse.ArgumentParser:
    """The parser of the whole command; ``run`` holds the function of every command by its name."""
    whole = argparse.ArgumentParser(
        prog="bcosify", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Turn pretrained vision models into B-cos models: convert, fine-tune, explain, measure.",
        epilog=f"""\
bcosify COMMAND --help tells the options of a command. A first try, without a download:
  bcosify finetune --recipe digits --no-pretrained --out runs/digits
  bcosify evaluate runs/digits --data digits

{EXIT_CODES}""",
    )  # fmt: skip
    whole.add_argument("--version", action="store_true", help="print versions and what this machine can run")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND")
    for name, add in (
        ("finetune", _add_finetune),
        ("distill", _add_distill),
        ("explain", _add_explain),
        ("evaluate", _add_evaluate),
        ("convert", _add_convert),
        ("verify", _add_verify),
        ("families", _add_families),
        ("sweep", _add_sweep),
        ("benchmark", _add_benchmark),
    ):
        command = add(commands, name)
        command.set_defaults(run=run[name], parser=command)
    return whole


def _command(commands, name: str, text: str, description: str, epilog: str, usage: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=text, description=description, epilog=epilog, usage=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def _add_model(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("model", metavar="MODEL", nargs="?", help=text)
    command.add_argument("--model", dest="model_option", metavar="MODEL", help=argparse.SUPPRESS)


def _add_source(group) -> None:
    group.add_argument("--arch", metavar="NAME", help="architecture of a weights file, as a MODEL is named")
    group.add_argument("--weights", metavar="FILE", help="the standard model's weights, .safetensors or .pth")
    group.add_argument(
        "--no-pretrained", dest="pretrained", action="store_false", help="random weights; nothing is downloaded"
    )


def _add_common(command: argparse.ArgumentParser, *, device: bool = False) -> None:
    group = command.add_argument_group("running")
    if device:
        group.add_argument(
            "--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)"
        )
    group.add_argument("--debug", action="store_true", help="on an error, show the Python traceback")


def _add_conversion(group) -> None:
    def add(name: str, text: str, **options) -> None:
        group.add_argument(name, default=argparse.SUPPRESS, help=text, **options)

    add("--pool", "max pooling becomes average pooling, or is kept (default: average)", choices=("average", "keep"))
    add(
        "--head", "the classifier runs before the global pooling, or stays where it is (default: before_pool)",
        choices=("before_pool", "keep"),
    )  # fmt: skip
    add("--activation", "keep or remove ReLU and GELU (default: keep)", choices=("keep", "remove"))
    add("--normalize-weight", "divide weights by their norms, as B-cos v2 does", action="store_true")
    add(
        "--mean", "input normalisation per channel, of images in [0, 1], where the model does not tell it",
        type=float, nargs="+", metavar="X",
    )  # fmt: skip
    add("--std", "likewise", type=float, nargs="+", metavar="X")
    add(
        "--on-unknown", "layers without a rule: stop and name them, or keep them (default: error)",
        choices=("error", "keep"),
    )  # fmt: skip


def _add_b_and_bias(group) -> None:
    group.add_argument("--b", type=float, default=argparse.SUPPRESS, metavar="B", help="exponent B >= 1 (default: 2)")
    group.add_argument(
        "--bias", choices=("remove", "keep", "decay"), default=argparse.SUPPRESS,
        help="remove the biases, keep them, or keep them to be decayed in fine-tuning (default: remove)",
    )  # fmt: skip


def _add_attention_pool(group) -> None:
    group.add_argument(
        "--attention-pool", choices=("pool", "unpool"),
        help="of CLIP's ResNets: one embedding an image, or one of every position (default: as the model was saved)",
    )  # fmt: skip
    group.add_argument(
        "--power", type=float, metavar="P", help="with unpool: the mean over positions is that of l * |l|^(P-1), P >= 1"
    )


def _add_texts(group, templates: str) -> None:
    group.add_argument(
        "--templates", nargs="+", metavar="TEXT", help="openai, simple (open_clip's for ImageNet), none, or texts with "
        f"{{}} in them (default: {templates})",
    )  # fmt: skip
    group.add_argument(
        "--text-model", metavar="MODEL", help="open_clip:NAME/TAG whose text tower is used, where the folder holds none"
    )
    _add_attention_pool(group)


def _add_explain(commands, name: str) -> argparse.ArgumentParser:
    command = _command(
        commands, name, "write pictures of explanations",
        "Write for every image its picture, its explanation W(x) and its contribution map, as PNG.",
        "examples:\n"
        "  bcosify explain runs/r18 photo.jpg other.png --out pictures\n"
        "  bcosify explain runs/r18/last photos/ --out pictures --target 207\n"
        "  bcosify explain runs/clip photo.jpg --out pictures --text 'a dog' 'a cat' --attention-pool unpool\n\n"
        "An image that cannot be read is left out and listed; the exit code is then 1 if it was named itself, and 0\n"
        "if it lies in a folder that was named.",
        usage="bcosify explain [options] MODEL IMAGE [IMAGE ...] --out DIR",
    )  # fmt: skip
    command.add_argument("--model", metavar="MODEL", help=f"{FOLDER_HELP}; may also come first, before the images")
    command.add_argument("images", metavar="IMAGE", nargs="+", help="image files, or folders of them")
    command.add_argument("--out", metavar="DIR", required=True, help="where to; made if it is missing")
    command.add_argument("--target", metavar="CLASS", help="class to explain, number or name (default: the predicted)")
    group = command.add_argument_group("CLIP models")
    group.add_argument(
        "--text", nargs="+", metavar="TEXT", help="texts to explain, each with pictures of its own (put it after IMAGE)"
    )
    _add_texts(group, "none")
    group.add_argument(
        "--protocol", choices=("paper", "peer"), default="paper",
        help="peer: the gradient goes through the L2 norm, as in the reference's code (default: paper)",
    )  # fmt: skip
    group = command.add_argument_group("pictures")
    group.add_argument(
        "--size", type=int, default=224, metavar="PIXELS",
        help="enlarge pictures by a whole factor until their shorter side has so many pixels; 0: as large as the "
        "network's input (default: 224)",
    )  # fmt: skip
    group.add_argument(
        "--smooth", type=int, metavar="PIXELS",
        help="edge of the box that smooths the explanation's opacity, odd; 0: none (default: 15 at 224 pixels, and in "
        "proportion)",
    )  # fmt: skip
    group.add_argument(
        "--percentile", type=float, default=99.5, metavar="P", help="of the pixels, drawn fully opaque (default: 99.5)"
    )
    _add_common(command, device=True)
    command.add_argument(
        "--batch-size", type=int, metavar="N", help="images at once (default: as many as 16 of 224 pixels fill)"
    )
    return command


def _add_evaluate(commands, name: str) -> argparse.ArgumentParser:
    command = _command(
        commands, name, "top-1 and top-5 accuracy",
        "Accuracy on a data set: digits, scenes, or a folder (its val/ if it has one, else its class folders).",
        "examples:\n"
        "  bcosify evaluate runs/r18 --data /data/imagenet\n"
        "  bcosify evaluate resnet18 --data /data/imagenet\n"
        "  bcosify evaluate open_clip:RN50/openai --data /data/imagenet --zero-shot\n"
        "  bcosify evaluate runs/clip --data /data/imagenet --zero-shot --text-model open_clip:RN50/openai\n\n"
        "Image files that cannot be read are left out, counted and listed; it is an error only if all are.",
        usage="bcosify evaluate [options] MODEL --data DATA",
    )  # fmt: skip
    _add_model(command, f"{FOLDER_HELP}, or a standard model: {STANDARD_HELP}")
    command.add_argument("--data", metavar="DATA", required=True, help="digits, scenes, or a folder of class folders")
    command.add_argument("--image-size", type=int, metavar="PIXELS", help="edge of the images (default: the model's)")
    command.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at once (default: 64)")
    command.add_argument(
        "--num-workers", type=int, metavar="N", help="loading processes (default: 0 for embedded data, else up to 8)"
    )
    group = command.add_argument_group("CLIP models")
    group.add_argument("--zero-shot", action="store_true", help="classes are texts: the names of the class folders")
    group.add_argument("--class-names", metavar="FILE", help="their names, one a line in the order of the folders")
    _add_texts(group, "openai")
    _add_source(command.add_argument_group("standard model"))
    _add_common(command, device=True)
    return command


def _add_convert(commands, name: str) -> argparse.ArgumentParser:
    command = _command(
        commands, name, "B-cosify and save, without training",
        "B-cosify a standard model and write model.safetensors, config.json and a model card, README.md: what\n"
        "bcosification.load and BcosifiedModel.from_pretrained read, and push_to_hub uploads.",
        "examples:\n"
        "  bcosify convert resnet18 --out converted/r18\n"
        "  bcosify convert my_resnet50.pth --arch resnet50 --b 1.5 --out converted/r50",
        usage="bcosify convert [options] MODEL --out DIR",
    )  # fmt: skip
    _add_model(command, STANDARD_HELP)
    command.add_argument("--out", metavar="DIR", required=True, help="where to; new or empty")
    _add_source(command.add_argument_group("standard model"))
    group = command.add_argument_group("conversion")
    _add_b_and_bias(group)
    _add_conversion(group)
    group = command.add_argument_group("CLIP models")
    group.add_argument("--with-text", action="store_true", help="store the text tower, too")
    _add_attention_pool(group)
    _add_common(command)
    return command


def _add_verify(commands, name: str) -> argparse.ArgumentParser:
    command = _command(
        commands, name, "check a conversion layer by layer",
        "Show, layer by layer, that only B and the biases change what a model computes, and that explanations are\n"
        "exact: of a model that is converted here, or of one that was converted (and fine-tuned) before.",
        "examples:\n"
        "  bcosify verify resnet18 --b 1.5\n"
        "  bcosify verify converted/r18\n"
        "  bcosify verify runs/mine --original my_resnet50.pth --arch resnet50\n"
        "  bcosify verify timm:vit_tiny_patch16_224 --html report.html --json report.json\n\n"
        "The original is given its own library's preprocessing of the same pictures. The exit code is 1 if a check\n"
        "fails.",
        usage="bcosify verify [options] MODEL",
    )  # fmt: skip
    _add_model(command, f"a standard model: {STANDARD_HELP}; or {FOLDER_HELP}")
    command.add_argument(
        "--original", metavar="MODEL", help="what a folder is compared with (default: what it was made of, if it tells)"
    )
    command.add_argument(
        "--images", type=int, default=2, metavar="N", help="number of random images to compare on (default: 2)"
    )
    command.add_argument("--json", metavar="FILE", help="write the report there, too")
    command.add_argument("--html", metavar="FILE", help="write the report there as a page that needs nothing else")
    _add_source(command.add_argument_group("standard model"))
    group = command.add_argument_group("conversion, of a standard model")
    _add_b_and_bias(group)
    _add_conversion(group)
    _add_common(command)
    return command


def _add_families(commands, name: str) -> argparse.ArgumentParser:
    command = _command(
        commands, name, "which models can be converted, and how exactly",
        "List the families of models, what of each becomes B-cos, what stays and what cannot be done; with --check,\n"
        "convert a small model of each and verify it (random weights, float64, seconds).",
        "examples:\n"
        "  bcosify families\n"
        "  bcosify families --check --json families.json\n\n"
        "The exit code is 1 if a check fails.",
        usage="bcosify families [options] [NAME ...]",
    )  # fmt: skip
    command.add_argument("names", metavar="NAME", nargs="*", help="those families only (default: all)")
    command.add_argument("--check", action="store_true", help="verify a small model of each")
    command.add_argument("--json", metavar="FILE", help="write the list there, too")
    _add_common(command)
    return command


def _add_benchmark(commands, name: str) -> argparse.ArgumentParser:
    command = _command(
        commands, name, "images per second and memory, on this machine",
        "Training steps, inference and explanations in images per second, and the memory of a training step: of the\n"
        "plain model, of its conversion with the peers' layers, and of its conversion with ours. Numbers are checked\n"
        "before anything is timed. Weights are random (nothing is downloaded): speed does not depend on them.",
        "examples:\n"
        "  bcosify benchmark resnet50 --batch 64\n"
        "  bcosify benchmark resnet18 --no-compile --rounds 9 --json resnet18.json\n"
        "  bcosify benchmark runs/r18 --contenders plain,ours,ours-compiled,ours-low\n\n"
        "contenders: plain; peer; ours; each of these with -compiled after it (torch.compile, which takes minutes on\n"
        "a small machine; these train and infer, they do not explain); ours-low (fuse with memory=\"low\"). Times are\n"
        "relative to the first. peer is peer-style: the converted model with its B-cos layers and BatchNorms computed\n"
        "by eager formulas, as the layers of the package bcos and of B-cosification compute them; it is no run of\n"
        "those packages. It explains one image after the other, as they do, without drawing.",
        usage="bcosify benchmark [options] MODEL",
    )  # fmt: skip
    _add_model(command, f"a standard model: {STANDARD_HELP}; or {FOLDER_HELP}")
    command.add_argument("--arch", metavar="NAME", help="architecture of a weights file, as a MODEL is named")
    group = command.add_argument_group("measuring")
    group.add_argument("--batch", type=int, metavar="N", help="images at once (default: 8 on a CPU, else 64)")
    group.add_argument("--size", type=int, metavar="PIXELS", help="edge of the images (default: the model's)")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="of the activations: 16 bits by autocast (default: float32)",
    )  # fmt: skip
    group.add_argument(
        "--contenders", metavar="NAMES", default="plain,peer,peer-compiled,ours",
        help="separated by commas, see below (default: plain,peer,peer-compiled,ours)",
    )  # fmt: skip
    group.add_argument("--no-compile", dest="compile", action="store_false", help="leave out what has to be compiled")
    group.add_argument("--rounds", type=int, default=5, metavar="N", help="timed calls of each (default: 5)")
    group.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    group = command.add_argument_group("conversion, of a standard model")
    _add_b_and_bias(group)
    _add_conversion(group)
    _add_common(command, device=True)
    return command


def _adder(defaults) -> Callable:
    """A function that adds an option for a field of FinetuneConfig, telling the field's default."""

    def add(group, name: str, text: str, **options) -> None:
        destination = options.pop("dest", name.removeprefix("--").replace("-", "_"))
        default = getattr(defaults, destination)
        shown = "" if default in (None, "") or isinstance(default, bool) else f" (default: {default:g})" if isinstance(
            default, float) else f" (default: {default})"  # fmt: skip
        # Only what was given: recipes and earlier runs fill in the rest.
        group.add_argument(name, dest=destination, default=argparse.SUPPRESS, help=text + shown, **options)

    return add


def _add_sweep(commands, name: str) -> argparse.ArgumentParser:
    from bcosification.train.finetuning import FinetuneConfig

    command = _command(
        commands, name, "fine-tune with one choice changed at a time, and compare",
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
    add = _adder(FinetuneConfig())
    group = command.add_argument_group("what")
    add(group, "--model", f"{STANDARD_HELP}; or small, the demo's network", metavar="MODEL")
    add(group, "--data", "digits, scenes, or a folder with train/ and val/", metavar="DATA")
    group.add_argument("--out", dest="output", metavar="DIR", required=True, help="output folder, or that of a sweep")
    group.add_argument("--recipe", metavar="NAME_OR_FILE", help="options from a recipe or a YAML file")
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
    add(group, "--arch", "architecture of a weights file, as a MODEL is named", metavar="NAME")
    add(group, "--weights", "the standard model's weights, .safetensors or .pth", metavar="FILE")
    add(group, "--no-pretrained", "random weights; nothing is downloaded", dest="pretrained", action="store_false")
    group = command.add_argument_group("conversion, where it is not what is asked")
    _add_conversion(group)
    group = command.add_argument_group("fine-tuning of each run")
    add(group, "--epochs", "passes over the training data", type=int, metavar="N")
    add(group, "--batch-size", "images per step and device", type=int, metavar="N")
    add(group, "--lr", "peak learning rate; a cosine takes it to 0", type=float, metavar="RATE")
    add(group, "--image-size", "edge of the images (default: as finetune)", type=int, metavar="PIXELS")
    add(group, "--limit-batches", "batches per epoch and part (default: all)", type=int, metavar="N")
    add(group, "--num-workers", "loading processes (default: 0 for embedded data, else up to 8)", type=int, metavar="N")
    add(group, "--seed", "of everything random", type=int, metavar="N")
    add(group, "--accelerator", "auto, cpu, gpu, …", metavar="NAME")
    add(group, "--devices", "their number, auto, or indices such as 0,2", metavar="N")
    _add_common(command)
    return command


def _add_finetune(commands, name: str) -> argparse.ArgumentParser:
    from bcosification.train.finetuning import FinetuneConfig, recipes

    defaults = FinetuneConfig()
    listed = "\n".join(f"  {name:22} {text}" for name, text in recipes().items())
    command = _command(
        commands, name, "B-cosify a pretrained model and fine-tune it",
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
    add = _adder(defaults)

    group = command.add_argument_group("what")
    add(group, "--model", f"{STANDARD_HELP}; or {FOLDER_HELP}", metavar="MODEL")
    add(
        group, "--data", "digits, scenes, or a folder with train/ and val/, one sub-folder per class in each",
        metavar="DATA",
    )  # fmt: skip
    add(group, "--out", "output folder: new, empty, or with --resume that of a run", dest="output", metavar="DIR")
    group.add_argument("--recipe", metavar="NAME_OR_FILE", help="options from a recipe (below) or a YAML file")
    group.add_argument(
        "--resume", action="store_true",
        help="continue the run in --out after its last complete epoch, with its own options; --epochs may differ, and "
        "those of the machine",
    )  # fmt: skip
    add(group, "--arch", "architecture of a weights file, as a MODEL is named", metavar="NAME")
    add(group, "--weights", "the standard model's weights, .safetensors or .pth", metavar="FILE")
    add(group, "--no-pretrained", "random weights; nothing is downloaded", dest="pretrained", action="store_false")

    _add_run(command, add)
    return command


def _add_distill(commands, name: str) -> argparse.ArgumentParser:
    from bcosification.train.distillation import DistillConfig

    command = _command(
        commands, name, "B-cosify CLIP's image tower and distil it from the original",
        "B-cosify a CLIP model's image tower and train it to give the original's embeddings: images are all it takes.",
        "examples:\n"
        "  bcosify distill --model open_clip:RN50/openai --data /data/images --out runs/clip --epochs 20\n"
        "  bcosify distill --resume --out runs/clip                    (after a kill)\n\n"
        "The loss is SigLIP's, between the embeddings of the standard tower and of the B-cosified one. Labels and\n"
        "sub-folders of DATA mean nothing; without train/ and val/, a twentieth of the images is held out.",
        usage="bcosify distill --model MODEL --data DATA --out DIR [options]\n"
        "       bcosify distill --resume --out DIR [options]",
    )  # fmt: skip
    add = _adder(DistillConfig())
    group = command.add_argument_group("what")
    add(group, "--model", f"open_clip:NAME/TAG; or {FOLDER_HELP}", metavar="MODEL")
    add(group, "--data", "digits, scenes, or a folder of images, with train/ and val/ in it or without", metavar="DATA")
    add(group, "--out", "output folder: new, empty, or with --resume that of a run", dest="output", metavar="DIR")
    group.add_argument(
        "--resume", action="store_true",
        help="continue the run in --out after its last complete epoch, with its own options; --epochs may differ, and "
        "those of the machine",
    )  # fmt: skip
    add(group, "--teacher", "another teacher than MODEL, named as it is", metavar="MODEL")
    add(group, "--with-text", "store the text tower with the student", action="store_true")
    add(group, "--no-pretrained", "random weights; nothing is downloaded", dest="pretrained", action="store_false")
    _add_run(command, add)
    return command


def _adder(defaults) -> Callable[..., None]:
    """Adds options that name fields of a configuration: their defaults are shown, only what is given is set."""

    def add(group, name: str, text: str, **options) -> None:
        destination = options.pop("dest", name.removeprefix("--").replace("-", "_"))
        default = getattr(defaults, destination)
        shown = "" if default in (None, "") or isinstance(default, bool) else f" (default: {default:g})" if isinstance(
            default, float) else f" (default: {default})"  # fmt: skip
        # Recipes and earlier runs fill in the rest.
        group.add_argument(name, dest=destination, default=argparse.SUPPRESS, help=text + shown, **options)

    return add


def _add_run(command: argparse.ArgumentParser, add: Callable[..., None]) -> None:
    """What every run has options for: conversion, optimisation, data, machine."""
    from bcosification.train.finetuning import FinetuneConfig

    group = command.add_argument_group("conversion, of a standard model")
    add(group, "--b", "exponent B >= 1", type=float, metavar="B")
    add(group, "--b-epochs", "raise B linearly from 1 over so many epochs; 0: at once", type=float, metavar="EPOCHS")
    add(
        group, "--bias", "remove the biases, keep them, or decay them to 0 over --bias-epochs",
        choices=("remove", "keep", "decay"),
    )  # fmt: skip
    add(group, "--bias-epochs", "with --bias decay: epochs until they are gone", type=float, metavar="EPOCHS")
    _add_conversion(group)

    group = command.add_argument_group("optimisation")
    add(group, "--epochs", "passes over the training data, in all", type=int, metavar="N")
    add(group, "--batch-size", "images per step and device", type=int, metavar="N")
    add(group, "--lr", "peak learning rate; a cosine takes it to 0", type=float, metavar="RATE")
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
    add(group, "--agc", "adaptive gradient clipping with this factor (the papers: 0.01)", type=float, metavar="FACTOR")
    add(group, "--clip-norm", "clip the gradient's norm", type=float, metavar="NORM")
    add(group, "--seed", "of everything random", type=int, metavar="N")

    group = command.add_argument_group("data")
    add(
        group, "--image-size", "edge of the images (default: the data set's, or the model's for folders)", type=int,
        metavar="PIXELS",
    )  # fmt: skip
    add(
        group, "--no-augment", "no random crops and flips (embedded data: shifts)", dest="augment", action="store_false"
    )
    add(group, "--num-workers", "loading processes (default: 0 for embedded data, else up to 8)", type=int, metavar="N")
    add(group, "--limit-batches", "batches per epoch and part, for a trial (default: all)", type=int, metavar="N")

    group = command.add_argument_group("machine")
    add(group, "--precision", ", ".join(FinetuneConfig.PRECISIONS), metavar="NAME")
    add(group, "--compile", "torch.compile the model", action="store_true")
    add(group, "--accelerator", "auto, cpu, gpu, …", metavar="NAME")
    add(group, "--devices", "their number, auto, or indices such as 0,2", metavar="N")
    add(group, "--no-progress", "a line per epoch instead of a bar", dest="progress", action="store_false")
    group.add_argument("--debug", action="store_true", help="on an error, show the Python traceback")


# What the library's messages begin with: the function that speaks, which the user of a command did not call.
SPEAKERS = ("bcosify", "resolve", "load", "finetune", "distill", "explain", "evaluate", "verify", "benchmark")
SPEAKERS += ("families", "sweep", "explanation picture", "set_attention_pool")
# Parameters that are named otherwise on the command line.
RENAMED = {"targets": "target"}
# Parameters that no command has an option for.
PYTHON_ONLY = ("model", "inverse", "normalize_input", "logit_bias", "conversion", "num_classes")
_VALUE = r"""'[^']*'|"[^"]*"|\[[^\]]*\]|[\w.+-]+"""


def in_options(text: str, parser: argparse.ArgumentParser) -> str:
    """A message of the library, whose parameters are Python's, in the options of a command.

    The library writes a parameter as NAME=VALUE or NAME=, at the beginning ("output: …"), or after "expected" and
    before what is expected of it ("expected batch_size >= 1"); these become "--batch-size". Quoted words, which the
    user gave, stay. Messages about a file of options keep the names that the file uses.
    """
    if re.match(r"recipe\b|.*config\.yaml: ", text):
        return text
    speaker, separator, rest = text.partition(": ")
    if separator and speaker in SPEAKERS:
        text = rest
    options = {
        action.dest: action
        for action in parser._actions
        if action.option_strings and action.dest not in ("help", "model_option")
    }
    options |= {name: options[dest] for name, dest in RENAMED.items() if dest in options}

    def option(name: str) -> str | None:
        return options[name].option_strings[-1] if name in options else None

    def assigned(match: re.Match) -> str:
        name, value = match["name"], match["value"]
        flag = option(name)
        if flag is None or (name == "model" and not value):  # a MODEL is a name, Python's model= a network
            return f"{match[0]} in Python" if name in PYTHON_ONLY else match[0]
        if not value:
            return flag
        if value == "None":
            return f"no {flag}"
        if options[name].nargs == 0:  # a flag: its constant is what it means
            return flag if value == str(options[name].const) else f"no {flag}"
        return f"{flag} {value.strip(chr(39) + chr(34))}"

    def after_expected(match: re.Match) -> str:
        return f"expected {option(match['name']) or match['name']}"

    text = re.sub(rf"(?<![\w'\"/.-])(?P<name>[a-z]\w*)=(?P<value>{_VALUE})?", assigned, text)
    text = re.sub(r"\bexpected (?P<name>[a-z]\w*)(?= (?:[<>]|to be\b|in \(|between\b))", after_expected, text)
    return re.sub(r"^(?P<name>[a-z]\w*)(?=: )", lambda match: option(match["name"]) or match[0], text)
