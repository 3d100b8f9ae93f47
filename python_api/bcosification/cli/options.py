"""Options that several commands share, each told once. Nothing but the standard library is needed here."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from bcosification.names import did_you_mean, meant

_OWN_HELP = "bcosification:NAME (simple_vit_s_patch16_224), or a weights file together with --arch"
CLASSIFIER_HELP = f"torchvision:NAME or just NAME (resnet18), timm:NAME, {_OWN_HELP}"
STANDARD_HELP = f"torchvision:NAME or just NAME (resnet18), timm:NAME, open_clip:NAME/TAG, {_OWN_HELP}"
CONVERTIBLE_HELP = (
    f"{STANDARD_HELP}; transformers:NAME or transformers:FOLDER for Hugging Face's classifiers of texts and CLIP's "
    "image towers"
)
FOLDER_HELP = "a folder that finetune, distill or convert wrote (a run stands for its best epoch)"

EMBEDDED_HELP = "digits, scenes (both come with scikit-learn: nothing is downloaded)"

# Options of bcosify that finetune, convert and verify share; --b and --bias are apart: finetune has their schedules.
CONVERSION = ("pool", "head", "activation", "normalize_weight", "mean", "std", "on_unknown")


# What several commands have an option for: what the help says of it, and what argparse is told.
SHARED: dict[str, tuple[str, dict]] = {
    "--arch": ("architecture of a weights file, as a MODEL is named", {"metavar": "NAME"}),
    "--weights": ("the standard model's weights, .safetensors or .pth", {"metavar": "FILE"}),
    "--no-pretrained": ("random weights; nothing is downloaded", {"dest": "pretrained", "action": "store_false"}),
    "--recipe": ("options from a recipe (finetune --help lists them) or a YAML file", {"metavar": "NAME_OR_FILE"}),
    "--resume": (
        "continue the run in --out after its last complete epoch, with its own options; --epochs may differ, those of "
        "the machine, and --data where the data have moved", {"action": "store_true"},
    ),
    "--out": (
        "output folder: new, empty, or with --resume that of a run", {"dest": "output", "metavar": "DIR"},
    ),
    "--epochs": ("passes over the training data, in all", {"type": int, "metavar": "N"}),
    "--batch-size": ("images per step and device", {"type": int, "metavar": "N"}),
    "--lr": ("peak learning rate; a cosine takes it to 0", {"type": float, "metavar": "RATE"}),
    "--image-size": (
        "edge of the images (default: of digits 32, of scenes 64, enlarged for models that take one size only; of "
        "folders the model's)", {"type": int, "metavar": "PIXELS"},
    ),
    "--limit-batches": ("batches per epoch and part, for a trial (default: all)", {"type": int, "metavar": "N"}),
    "--num-workers": (
        "loading processes (default: 0 for embedded data, else up to 8)", {"type": int, "metavar": "N"},
    ),
    "--seed": ("of everything random", {"type": int, "metavar": "N"}),
    "--accelerator": ("auto, cpu, gpu, …", {"metavar": "NAME"}),
    "--devices": ("their number, auto, or indices such as 0,2", {"metavar": "N"}),
    "--debug": ("on an error, show the Python traceback", {"action": "store_true"}),
}  # fmt: skip
SOURCE = ("--arch", "--weights", "--no-pretrained")


# What other programs call our options.
OTHER_WORDS = {"--learning-rate": "--lr", "--gpus": "--devices", "--workers": "--num-workers", "--n-epochs": "--epochs"}


class Parser(argparse.ArgumentParser):
    """argparse's, which says what a misspelt command, choice or option may have been meant to be."""

    def _check_value(self, action: argparse.Action, value: str) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            near = did_you_mean(meant(str(value), known))
            raise argparse.ArgumentError(action, f"expected one of {', '.join(known)}, got {value!r}{near}")

    def parse_args(self, args=None, namespace=None):
        arguments, rest = self.parse_known_args(args, namespace)
        if rest:
            command = getattr(arguments, "parser", None) or self
            known = {name: name for action in command._actions for name in action.option_strings}
            known |= {other: name for other, name in OTHER_WORDS.items() if name in known}
            unknown = [word.partition("=")[0] for word in rest if word.startswith("-")]
            near = [known[name] for word in unknown for name in meant(word, known, most=1)]
            command.error(f"expected options that --help tells, got {' '.join(rest)}{did_you_mean(near)}")
        return arguments


def add_command(commands, name: str, run: Callable, text: str, description: str, epilog: str, usage: str):
    """The parser of a command, which ``run`` carries out."""
    added = commands.add_parser(
        name, help=text, description=description, epilog=epilog, usage=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    added.set_defaults(run=run, parser=added)
    return added


def add_model(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("model", metavar="MODEL", nargs="?", help=text)
    command.add_argument("--model", dest="model_option", metavar="MODEL", help=argparse.SUPPRESS)


def add_shared(group, *names: str, add: Callable | None = None) -> None:
    """Adds options of SHARED to a group; ``add`` (see `adder`): as fields of a configuration."""
    for name in names:
        text, told = SHARED[name]
        if add is None:
            group.add_argument(name, help=text, **told)
        else:
            add(group, name, text, **told)


def add_common(command: argparse.ArgumentParser, *, device: bool = False) -> None:
    group = command.add_argument_group("running")
    if device:
        group.add_argument(
            "--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)"
        )
    add_shared(group, "--debug")


def add_conversion(group) -> None:
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


def add_b_and_bias(group) -> None:
    group.add_argument("--b", type=float, default=argparse.SUPPRESS, metavar="B", help="exponent B >= 1 (default: 2)")
    group.add_argument(
        "--bias", choices=("remove", "keep", "decay"), default=argparse.SUPPRESS,
        help="remove the biases, keep them, or keep them to be decayed in fine-tuning (default: remove)",
    )  # fmt: skip


def add_attention_pool(group) -> None:
    group.add_argument(
        "--attention-pool", choices=("pool", "unpool"),
        help="of CLIP's ResNets: one embedding an image, or one of every position (default: as the model was saved)",
    )  # fmt: skip
    group.add_argument(
        "--power", type=float, metavar="P", help="with unpool: the mean over positions is that of l * |l|^(P-1), P >= 1"
    )


def add_texts(group, templates: str) -> None:
    group.add_argument(
        "--templates", nargs="+", metavar="TEXT", help="openai, simple (open_clip's for ImageNet), none, or texts with "
        f"{{}} in them (default: {templates})",
    )  # fmt: skip
    group.add_argument(
        "--text-model", metavar="MODEL", help="open_clip:NAME/TAG whose text tower is used, where the folder holds none"
    )
    add_attention_pool(group)


def adder(defaults) -> Callable:
    """A function that adds an option for a field of FinetuneConfig, telling the field's default."""

    def add(group, name: str, text: str, **options) -> None:
        destination = options.pop("dest", name.removeprefix("--").replace("-", "_"))
        default = getattr(defaults, destination)
        shown = "" if default in (None, "") or isinstance(default, bool) else f" (default: {default:g})" if isinstance(
            default, float) else f" (default: {default})"  # fmt: skip
        # Only what was given: recipes and earlier runs fill in the rest.
        group.add_argument(name, dest=destination, default=argparse.SUPPRESS, help=text + shown, **options)

    return add
