"""The commands `bcosify evaluate` and `bcosify benchmark`."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from bcosification.cli.files import list_unreadable, output_file
from bcosification.cli.models import (
    any_model,
    clip_model,
    is_converted,
    model_spec,
    needs,
    original_and_converted,
    refuse_conversion,
    run_folder,
    templates_told,
    usable_device,
)
from bcosification.cli.options import (
    EMBEDDED_HELP,
    FOLDER_HELP,
    SOURCE,
    STANDARD_HELP,
    add_b_and_bias,
    add_command,
    add_common,
    add_conversion,
    add_model,
    add_shared,
    add_texts,
)
from bcosification.json_files import json_text


def add_evaluate(commands) -> argparse.ArgumentParser:
    command = add_command(
        commands, "evaluate", _evaluate, "top-1 and top-5 accuracy",
        "Accuracy on a data set: digits, scenes, or a folder (its val/ if it has one, else its class folders).",
        "examples:\n"
        "  bcosify evaluate runs/r18 --data /data/imagenet\n"
        "  bcosify evaluate resnet18 --data /data/imagenet\n"
        "  bcosify evaluate open_clip:RN50/openai --data /data/imagenet --zero-shot\n"
        "  bcosify evaluate runs/clip --data /data/imagenet --zero-shot --text-model open_clip:RN50/openai\n\n"
        "Image files that cannot be read are left out, counted and listed; it is an error only if all are.",
        usage="bcosify evaluate [options] MODEL --data DATA",
    )  # fmt: skip
    add_model(command, f"{FOLDER_HELP}, or a standard model: {STANDARD_HELP}")
    command.add_argument("--data", metavar="DATA", required=True, help=f"{EMBEDDED_HELP}, or a folder of class folders")
    command.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="edge of the images (default: the model's, to which digits "
        "and scenes are enlarged)",
    )  # fmt: skip
    command.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at once (default: 64)")
    add_shared(command, "--num-workers")
    group = command.add_argument_group("CLIP models")
    group.add_argument("--zero-shot", action="store_true", help="classes are texts: the names of the class folders")
    group.add_argument("--class-names", metavar="FILE", help="their names, one a line in the order of the folders")
    add_texts(group, "openai")
    add_shared(command.add_argument_group("standard model"), *SOURCE)
    add_common(command, device=True)
    return command


def _evaluate(arguments: argparse.Namespace) -> int:
    needs("lightning", "torchmetrics", "tqdm")
    from bcosification.convert.image_sizes import size_told
    from bcosification.evaluation import evaluate
    from bcosification.train.data import build_datamodule, check_source, evaluation_transform
    from bcosification.train.finetuning import takes_size

    for name, least in (("image_size", 1), ("batch_size", 1), ("num_workers", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"expected --{name.replace('_', '-')} >= {least}, got {value}")
    check_source(arguments.data, evaluation_only=True)
    templates_told(arguments)
    device = usable_device(arguments.device)
    spec = model_spec(arguments)
    model, config = (clip_model if arguments.zero_shot else any_model)(arguments, spec)
    size = arguments.image_size or (min(config["input_size"]) if config.get("input_size") else None)
    if arguments.image_size is not None and not takes_size(model, size):
        own = config.get("input_size")
        hint = f" (its own: {size_told(own)})" if own else ""
        raise ValueError(f"--image-size: expected a size that {spec} takes{hint}, got {size}")
    own = arguments.image_size is None and hasattr(model, "transform")
    names = None if arguments.zero_shot else config.get("class_names")
    data = build_datamodule(
        arguments.data, image_size=size, batch_size=arguments.batch_size, num_workers=arguments.num_workers,
        eval_transform=model.transform if own else evaluation_transform(size or 224), evaluation_only=True,
        class_names=names,
    )  # fmt: skip
    classes = None if arguments.zero_shot else config.get("num_classes")
    if classes is not None and data.num_classes > classes:
        raise ValueError(f"--data: expected at most the model's {classes} classes, got {data.num_classes}")
    if classes is not None and data.num_classes < classes:
        warnings.warn(
            f"the model has {classes} classes and the data {data.num_classes}: class k of the data is taken for the "
            "model's class k", stacklevel=1,
        )  # fmt: skip
    if arguments.zero_shot:
        result = _zero_shot(arguments, model, data, device)
    else:
        result = evaluate(model, data.val_dataloader(), device=device)
    print(f"images {result['images']}, top-1 {100 * result['top1']:.2f} %, top-5 {100 * result['top5']:.2f} %")
    list_unreadable(data.unreadable, len(data.unreadable) + result["images"])
    return 0


def _zero_shot(arguments: argparse.Namespace, model, data, device) -> dict:
    from bcosification.evaluation import evaluate_zero_shot
    from bcosification.evaluation.zero_shot import texts_of_classes

    if arguments.class_names is None:
        names = texts_of_classes(data.class_names)
    else:
        file = Path(arguments.class_names)
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if len(names) != data.num_classes:
            raise ValueError(
                f"--class-names: expected {data.num_classes} names, one a line in the order of the classes "
                f"({', '.join(data.class_names[:5])} …), got {len(names)} in {file}"
            )
    templates = templates_told(arguments, default="openai")
    return evaluate_zero_shot(model, data.val_dataloader(), names, templates, device=device)


def add_benchmark(commands) -> argparse.ArgumentParser:
    command = add_command(
        commands, "benchmark", _benchmark, "images per second and memory, on this machine",
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
    add_model(command, f"a standard model: {STANDARD_HELP}; or {FOLDER_HELP}")
    add_shared(command, "--arch")
    group = command.add_argument_group("measuring")
    group.add_argument("--batch", type=int, metavar="N", help="images at once (default: 8 on a CPU, else 64)")
    group.add_argument(
        "--explained", type=int, metavar="N",
        help="images of the batch that are explained (default: all); the peers explain one after the other",
    )  # fmt: skip
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
    add_b_and_bias(group)
    add_conversion(group)
    add_common(command, device=True)
    return command


def _benchmark(arguments: argparse.Namespace) -> int:
    spec = model_spec(arguments)
    for name, value in (("--batch", arguments.batch), ("--size", arguments.size), ("--explained", arguments.explained)):
        if value is not None and value < 1:
            raise ValueError(f"expected {name} >= 1, got {value}")
    file = output_file("--json", arguments.json)

    import torch

    import bcosification
    from bcosification.convert.checkpoints import standard_network
    from bcosification.evaluation.benchmarking import benchmark, check_options

    contenders = [name.strip() for name in arguments.contenders.split(",") if name.strip()]
    check_options(contenders, arguments.rounds, arguments.dtype)
    if not arguments.compile:
        contenders = [name for name in contenders if not name.endswith("-compiled")]
        if not contenders:
            raise ValueError(f"--no-compile: expected a contender that is not compiled, got {arguments.contenders}")
    device = usable_device(arguments.device)
    batch = arguments.batch or (8 if device.type == "cpu" else 64)
    if arguments.explained is not None and arguments.explained > batch:
        raise ValueError(f"expected --explained of at most {batch}, the batch, got {arguments.explained}")
    if is_converted(spec):
        folder = run_folder(spec)
        refuse_conversion(arguments, folder)
        converted = bcosification.load(folder)
        original = standard_network(converted.config, folder)
    else:
        arguments.pretrained, arguments.weights = False, None
        original, converted = original_and_converted(arguments, spec)
    height, width = (arguments.size,) * 2 if arguments.size else converted.config["input_size"] or (224, 224)
    images = torch.rand(batch, converted.channels, height, width, generator=torch.Generator().manual_seed(0))
    result = benchmark(
        original, converted, images.to(device), contenders=contenders, rounds=arguments.rounds, dtype=arguments.dtype,
        explained=arguments.explained,
    )  # fmt: skip
    print(f"{spec}, {result}")
    if file is not None:
        file.write_text(json_text({"model": spec, **result.to_dict()}), encoding="utf-8")
    return 1 if any("failed" in row for row in result.rows) else 0
