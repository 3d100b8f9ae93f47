"""What MODEL stands for on the command line, and the networks, towers and texts that it gives."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from bcosification.cli.options import CONVERSION, FOLDER_HELP, STANDARD_HELP
from bcosification.folders import best_of_run
from bcosification.names import did_you_mean, meant, shortened

# Families of image towers, whose models have no classes.
CLIP_FAMILIES = ("open_clip_resnet", "open_clip_vit", "open_clip_timm", "huggingface_clip")

# Families of classifiers of texts, which read no images.
TEXT_FAMILIES = ("huggingface_bert", "huggingface_roberta", "huggingface_xlm_roberta", "huggingface_distilbert")


def needs(*packages: str) -> None:
    """Raises before any work is done for which a package of an extra is missing in the end."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def given_options(arguments: argparse.Namespace, names: Sequence[str]) -> dict:
    """The options that were given: those with argparse.SUPPRESS as default are absent otherwise."""
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def model_spec(arguments: argparse.Namespace) -> str:
    given = [spec for spec in (arguments.model, arguments.model_option) if spec is not None]
    if len(given) != 1:
        raise ValueError(f"expected one MODEL, got {len(given)}")
    return given[0]


def is_converted(spec: str) -> bool:
    """Whether MODEL is a folder of ours, or of a run; not one of a Hugging Face model."""
    config = Path(spec) / "config.json"
    return (Path(spec) / "config.yaml").is_file() or (config.is_file() and not of_transformers(config))


def of_transformers(config: Path) -> bool:
    """Whether a config.json is that of a Hugging Face model."""
    try:
        return "model_type" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def run_folder(spec: str) -> str:
    """The folder of a run stands for its best model."""
    return str(best_of_run(spec)) if Path(spec).is_dir() else spec


def original_and_converted(arguments: argparse.Namespace, spec: str):
    """The standard model and its conversion with the options of the command line."""
    import bcosification
    from bcosification.convert.resolver import resolve

    original, _ = resolve(spec, arch=arguments.arch, pretrained=arguments.pretrained, weights=arguments.weights)
    return original, bcosification.bcosify(original, **given_options(arguments, ("b", "bias", *CONVERSION)))


def refuse_conversion(arguments: argparse.Namespace, folder: str) -> None:
    """Raises if options of the conversion were given for a model that is converted already."""
    given = given_options(arguments, ("b", "bias", *CONVERSION))
    if given:
        raise ValueError(
            f"expected no options of the conversion, as {folder} is converted already, got "
            + ", ".join(f"{name}=" for name in given)
        )


def with_original(arguments: argparse.Namespace, folder: str):
    """The standard model that the converted one in `folder` was made of, that one, and whether the original's weights
    were random ones, which nobody kept: the standard model then has newly drawn ones."""
    import bcosification
    from bcosification.convert.resolver import resolve

    refuse_conversion(arguments, folder)
    converted = bcosification.load(folder)
    config = converted.config
    options = dict(arch=arguments.arch, pretrained=arguments.pretrained, weights=arguments.weights)
    drawn = False
    if arguments.original is not None:
        spec = arguments.original
    elif not config.get("source"):
        raise ValueError(
            f"expected --original with the standard model that {folder} was made of ({STANDARD_HELP}), as its "
            "config.json does not name it"
        )
    else:
        spec, options["num_classes"] = config["source"], config.get("source_num_classes")
        weights = config.get("source_weights")
        if weights is None and "source_weights" in config:
            options["pretrained"], drawn = False, options["weights"] is None
        elif weights is not None and spec.startswith("torchvision:") and options["weights"] is None:
            options["weights"] = weights
        elif weights is not None and Path(weights).is_file() and options["weights"] is None:
            options["weights"] = weights
    original, info = resolve(spec, **options)
    if drawn:
        print(
            f"{folder} was made of {spec} with random weights, which are kept nowhere.\n"
            f"Layers and logits at B = 1 are compared with {spec} with newly drawn weights: that checks the\n"
            "conversion, not the weights in the folder. Completeness, explanations and biases are those of the model\n"
            "in the folder. --weights FILE compares with the weights that it was made of, if you have them.\n"
        )
    else:
        print(f"{folder}, compared with {info['spec']}, weights: {info['weights'] or 'random'}\n")
    return original, converted, drawn


def any_model(arguments: argparse.Namespace, spec: str):
    """The model that `spec` names, taking images in [0, 1], and its configuration (input_size, class_names, …)."""
    from torch import nn

    from bcosification.convert.families import family_of
    from bcosification.convert.resolver import resolve
    from bcosification.convert.wrapper import BcosifiedModel
    from bcosification.nn import Normalize

    model, info = resolve(
        run_folder(spec), arch=arguments.arch, pretrained=arguments.pretrained, weights=arguments.weights
    )
    if isinstance(model, BcosifiedModel):
        if model.config["family"] in CLIP_FAMILIES:
            raise ValueError(f"expected --zero-shot for a CLIP model, got {spec} without")
        return model, model.config
    family = family_of(family_of(model).tower(model))
    if family.embeds or callable(getattr(model, "encode_text", None)):
        raise ValueError(f"expected --zero-shot for a CLIP model, got {spec} without")
    if family.reads_text:
        raise ValueError(f"expected a model of images, got {spec} ({type(model).__name__}), which reads texts")
    known = info["preprocessing"]
    if known is None:
        raise ValueError(f"expected a model whose input normalisation is known, got {spec}")
    return nn.Sequential(Normalize(known["mean"], known["std"]), model).eval(), {
        **known,
        "num_classes": info["num_classes"],
    }


def clip_model(arguments: argparse.Namespace, spec: str):
    """The CLIP model that `spec` names, B-cosified or standard, with a text tower, on images in [0, 1]."""
    from bcosification.convert.clip import StandardCLIP
    from bcosification.convert.resolver import resolve
    from bcosification.convert.wrapper import BcosifiedModel

    model, info = resolve(
        run_folder(spec), arch=arguments.arch, pretrained=arguments.pretrained, weights=arguments.weights
    )
    if isinstance(model, BcosifiedModel):
        expect_clip(model, "--zero-shot", spec)
        switch_attention_pool(arguments, model, spec)
        attach_text(arguments, model, spec)
        return model, model.config
    if not callable(getattr(model, "encode_text", None)):
        raise ValueError(
            f"--zero-shot: expected a CLIP model with its text tower (open_clip:NAME/TAG), got {spec} "
            f"({type(model).__name__})"
        )
    known = info["preprocessing"]
    return StandardCLIP(model, known["mean"], known["std"]).eval(), known


def expect_clip(model, option: str, spec: str) -> None:
    from bcosification.convert.clip import BcosifiedCLIP

    if not isinstance(model, BcosifiedCLIP):
        raise ValueError(f"{option}: expected a CLIP model, got {spec} ({model.config['class']})")


def switch_attention_pool(arguments: argparse.Namespace, model, spec: str) -> None:
    if arguments.attention_pool is None and arguments.power is None:
        return
    expect_clip(model, "--attention-pool" if arguments.power is None else "--power", spec)
    model.set_attention_pool(arguments.attention_pool, p=arguments.power)


def attach_text(arguments: argparse.Namespace, model, spec: str) -> None:
    """The text tower of --text-model, where one was named or the folder holds none."""
    from bcosification.convert.resolver import resolve

    if arguments.text_model is not None:
        source, _ = resolve(arguments.text_model)
        model.attach_text(source)
    elif model.text is None:
        raise ValueError(f"expected a model with its text tower, got {spec}, {_missing_texts(model.config)}")


def _missing_texts(config: dict) -> str:
    """Why a model has no text tower, and which option gives one."""
    told = config["text"]
    if told is None or not told["model"]:
        was = "a bare image tower" if told is None else f"a {told['class']} without a name"
        return (
            f"which was made of {was}: --text-model takes the open_clip model that its texts are of "
            "(open_clip:NAME/TAG)"
        )
    if config["source_weights"] is None:  # a conversion of random weights
        name = told["model"].partition("/")[0]
        return (
            f"which was made of {name} with random weights, texts' too, and saved without them: no name gives them "
            f"again. --with-text of convert and distill stores them; --text-model {name}/TAG takes pretrained ones"
        )
    return (
        f"which was saved without: --text-model {told['model']} reads it again (--with-text of convert and distill "
        "stores it)"
    )


def texts_to_explain(arguments: argparse.Namespace, model, folder: str) -> list[str] | None:
    """The texts of --text, for a CLIP model with its text tower; None for a classifier."""
    from bcosification.convert.clip import BcosifiedCLIP

    switch_attention_pool(arguments, model, folder)
    if not arguments.text:
        if isinstance(model, BcosifiedCLIP):
            raise ValueError(f"expected --text for a CLIP model, got {folder} without")
        return None
    expect_clip(model, "--text", folder)
    attach_text(arguments, model, folder)
    return list(arguments.text)


def templates_told(arguments: argparse.Namespace, default: str | None = None):
    """What --templates says, checked: before a model is read that texts are then put into them for."""
    given = arguments.templates
    if given is None:
        return default

    from bcosification.convert.clip_texts import named_templates

    told = {"none": None}.get(given[0], given[0]) if len(given) == 1 else given
    named_templates(told)
    return told


def bcos_folder(spec: str) -> str:
    """The folder of a B-cosified model; anything else is refused before a network is built or downloaded."""
    path = Path(spec)
    if path.is_dir():
        return run_folder(spec)
    got = f"the file {spec}" if path.exists() else f"{spec!r}, where no folder is"
    raise ValueError(
        f"MODEL: expected {FOLDER_HELP}, got {got}; of a standard network, finetune or convert make a B-cos model"
    )


def class_number(target: str, names: Sequence[str] | None, classes: int) -> int:
    """The class that --target names or numbers."""
    if names and target in names:
        return list(names).index(target)
    if target.isdecimal() and int(target) < classes:
        return int(target)
    near = did_you_mean(meant(target, map(str, names or ())))
    listed = f" or one of {shortened(names)}" if names and not near else " or the name of a class" if names else ""
    raise ValueError(f"expected --target to be a class number below {classes}{listed}, got {target!r}{near}")


def usable_device(name: str):
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: expected a device that is usable here, got {name!r}: {error}") from None
    return device
