"""The command `bcosify`: fine-tune, distil, explain, evaluate, convert, verify and benchmark models.

    bcosify finetune --model resnet18 --data digits --out runs/digits
    bcosify explain runs/digits IMAGE… --out pictures
    bcosify evaluate runs/digits --data digits

Exit codes: 0 done; 1 not all of it (a check did not hold, an image named on the command line could not be read,
something is missing here); 2 wrong usage or input, nothing was done; 130 interrupted.
Nothing but the standard library is needed for the help; what an extra provides is imported by the command that uses it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from bcosification.cli_options import CONVERSION, FOLDER_HELP, STANDARD_HELP, in_options, parser

__all__ = ["main"]

# Which extra of the distribution brings a module.
EXTRAS = {
    name: "train" for name in ("lightning", "torchmetrics", "torchvision", "timm", "open_clip", "sklearn", "tqdm")
}
EXTRAS |= {"yaml": "train", "safetensors": "train", "matplotlib": "explain", "captum": "explain", "PIL": "explain"}

# Families of image towers, whose models have no classes.
CLIP_FAMILIES = ("open_clip_resnet", "open_clip_vit", "open_clip_timm", "huggingface_clip")

# --- the commands -----------------------------------------------------------------------------------------------------


def _finetune(arguments: argparse.Namespace) -> int:
    from bcosification.train.finetuning import FinetuneConfig, finetune

    result = finetune(_run_config(arguments, FinetuneConfig), resume=arguments.resume)
    last = result.history[-1]["val_top1"]
    return _tell_run(result, f"validation top-1 {100 * last:.2f} % (best {100 * result.best:.2f} %)")


def _distill(arguments: argparse.Namespace) -> int:
    from bcosification.train.distillation import DistillConfig, distill

    result = distill(_run_config(arguments, DistillConfig), resume=arguments.resume)
    last = result.history[-1]["val_cosine"]
    return _tell_run(result, f"cosine with the teacher {last:.4f} (best {result.best:.4f})")


def _run_config(arguments: argparse.Namespace, kind):
    """The configuration of a run: the command line's, on top of a recipe's or of the run that is resumed."""
    from bcosification.train.finetuning import check_output, load_recipe, saved_config

    given = _given(arguments, [field.name for field in dataclasses.fields(kind)])
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
    conversion = _given(arguments, CONVERSION)
    if conversion:
        given["conversion"] = {**values.get("conversion", {}), **conversion}
    if "model" in given and not arguments.resume:
        from bcosification.convert.checkpoints import read_config

        given["model"] = _run_folder(given["model"])
        if _is_converted(given["model"]):  # it keeps the options that it was converted with
            values = {name: read_config(given["model"])["options"][name] for name in ("b", "bias")} | values
    return kind.from_mapping(values | given, "command line")


def _tell_run(result, reached: str) -> int:
    done = len(result.history)
    if result.earlier == done:
        print(f"the run in {result.output} is complete; --resume --epochs N with N > {done} goes on with it")
    print(
        f"{_count(done, 'epoch')}; {reached}\n"
        f"model: {result.output / 'last'} (best: {result.output / 'best'}); curves and metrics in {result.output}"
    )
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    _needs("PIL", "matplotlib", "safetensors")
    images, spec = list(arguments.images), arguments.model
    if spec is None:
        spec, images = images[0], images[1:]
    if not images:
        raise ValueError(f"expected MODEL and at least one IMAGE, got {spec!r} alone")
    out = _output_folder(arguments.out)
    folder = _bcos_folder(spec)
    files = _image_files(images)

    import torch

    import bcosification
    from bcosification.explanation import save_figure
    from bcosification.explanation.pictures import check_options, enlargement

    check_options(arguments.smooth, arguments.percentile)
    enlargement(1, 1, arguments.size)
    model = bcosification.load(folder)
    tensors, read, unreadable = _read_images([path for path, _ in files], model)
    names = model.config.get("class_names")
    texts = _texts(arguments, model, folder)
    if texts is not None and arguments.target is not None:
        raise ValueError("expected --target or --text, got both")
    targets = None if arguments.target is None else _class_number(arguments.target, names, model.num_classes)
    model.to(_device(arguments.device))
    explained = {} if texts is None else dict(text=texts, templates=_templates(arguments), protocol=arguments.protocol)
    explanation = bcosification.explain(
        model, torch.stack(tensors), targets, batch_size=arguments.batch_size, **explained
    )
    height, width = tensors[0].shape[-2:]
    smooth = arguments.smooth
    if smooth is None:
        # 15 pixels at 224, as in the papers; the same share of other sizes, and odd.
        smooth = max(1, 15 * min(height, width) // 224)
        smooth -= smooth % 2 == 0
    drawn = dict(class_names=names, smooth=smooth, percentile=arguments.percentile)
    explanation.save(out, names=_distinct([path.stem for path in read]), size=arguments.size, **drawn)
    save_figure(explanation.figure(indices=range(min(len(read), 64)), **drawn), out / "overview.png")
    for i, path in enumerate(read) if texts is not None else ():
        cosines = ", ".join(f"{text!r} {float(value):.3f}" for text, value in zip(
            texts, explanation.logits[i], strict=True))  # fmt: skip
        print(f"{path}: cosines with {cosines}")
    for i, path in enumerate(read) if texts is None else ():
        target, predicted = int(explanation.targets[i]), int(explanation.logits[i].argmax())
        label = names[target] if names else target
        note = "" if target == predicted else f" (predicted: {names[predicted] if names else predicted})"
        logit, added = float(explanation.logits[i, target]), float(explanation.contributions[i].sum())
        faint = f" (of which the image adds {added:.1e}: an untrained network passes little of it on)"
        print(f"{path}: class {label}{note}, logit {logit:.2f}{faint if abs(added) < 1e-4 * abs(logit) else ''}")
    each = "" if texts is None else "textNUMBER_"
    factor = enlargement(height, width, arguments.size)
    pixels = f"{height * factor} x {width * factor} pixels"
    if factor > 1:
        pixels += f" (the network sees {height} x {width}, each drawn {factor} x {factor})"
    print(
        f"{out}: {_count(len(read), 'image')}, each as NAME_image.png, NAME_{each}explanation.png and "
        f"NAME_{each}contributions.png, {pixels}; all in overview.png, numbers in explanations.json"
    )
    _list_unreadable(unreadable, len(files))
    named = {path for path, by_name in files if by_name}
    return 1 if any(path in named for path, _ in unreadable) else 0


def _evaluate(arguments: argparse.Namespace) -> int:
    _needs("lightning", "torchmetrics", "tqdm")
    from bcosification.evaluation import evaluate
    from bcosification.train.data import build_datamodule, check_source, evaluation_transform

    check_source(arguments.data, evaluation_only=True)
    device = _device(arguments.device)
    spec = _model_spec(arguments)
    model, config = (_clip_model if arguments.zero_shot else _any_model)(arguments, spec)
    size = arguments.image_size or (min(config["input_size"]) if config.get("input_size") else None)
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
    _list_unreadable(data.unreadable, len(data.unreadable) + result["images"])
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
    templates = _templates(arguments, default="openai")
    return evaluate_zero_shot(model, data.val_dataloader(), names, templates, device=device)


def _convert(arguments: argparse.Namespace) -> int:
    _needs("safetensors")
    out = _output_folder(arguments.out)
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"--out: expected a new or empty folder, got {out} with files in it; choose another")
    spec = _model_spec(arguments)
    if _is_converted(spec):
        raise ValueError(
            f"expected a standard model ({STANDARD_HELP}), got {spec}, which holds a converted one; finetune, explain, "
            "evaluate and verify take it"
        )
    original, converted = _converted(arguments, spec)
    _switch_attention_pool(arguments, converted)
    if arguments.with_text:
        _expect_clip(converted, "--with-text", spec)
        converted.save_pretrained(out, with_text=True)
    else:
        converted.save_pretrained(out)
    changed = [entry for entry in converted.conversion if entry["was"] != entry["becomes"]]
    print(
        f"{type(original).__name__}: {len(changed)} of {len(converted.conversion)} layers converted, "
        f"{sum('Bcos' in entry['becomes'] for entry in changed)} of them to B-cos layers"
    )
    train = "finetune" if converted.config["family"] not in CLIP_FAMILIES else "distill"
    print(f"written to {out}; it wants fine-tuning: bcosify {train} --model {out} --data DIR --out RUN")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    import bcosification

    spec = _model_spec(arguments)
    if arguments.images < 1:
        raise ValueError(f"expected --images >= 1, got {arguments.images}")
    files = [_output_file("--json", arguments.json), _output_file("--html", arguments.html)]
    if _is_converted(spec):
        original, converted = _with_original(arguments, _run_folder(spec))
    elif arguments.original is not None:
        raise ValueError(f"--original: expected {FOLDER_HELP} as MODEL, got {spec}, which is converted here")
    else:
        original, converted = _converted(arguments, spec)
    images, normalized = _random_images(arguments.images, original, converted)
    report = bcosification.verify(original, converted, images, normalized=normalized)
    print(report)
    report.save(json=files[0], html=files[1])
    return 0 if report.ok else 1


def _families(arguments: argparse.Namespace) -> int:
    file = _output_file("--json", arguments.json)

    from bcosification.convert.family_checks import family_reports
    from bcosification.evaluation.measuring import machine

    reports = family_reports(arguments.names, check=arguments.check)
    for report in reports:
        told = [("classes", ", ".join(report.classes) or "any"), ("converts", report.converts), ("keeps", report.keeps)]
        told += [("cannot", report.cannot)] if report.cannot else []
        if report.equivalence is not None:
            errors = f"error at B = 1 {report.equivalence:.1e}, contributions + constant {report.completeness:.1e}, "
            errors += f"W(x) {report.explanation:.1e}; {report.layers} B-cos layers"
            told.append(("verified", f"{'ok' if report.ok else 'FAILED'}: {errors}"))
        if report.problem:
            told.append(("" if report.equivalence is not None else "verified", report.problem))
        print(f"{report.title} ({report.name})")
        for label, text in told:
            print(textwrap.fill(text, 110, initial_indent=f"  {label:<10}", subsequent_indent=" " * 12))
    if file is not None:
        content = {"machine": machine(), "families": [report.to_dict() for report in reports]}
        file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if any(report.ok is False for report in reports) else 0


def _sweep(arguments: argparse.Namespace) -> int:
    _needs("lightning", "torchmetrics", "tqdm", "matplotlib")
    from bcosification.train.finetuning import FinetuneConfig, load_recipe

    given = _given(arguments, [field.name for field in dataclasses.fields(FinetuneConfig)])
    values = {} if arguments.recipe is None else load_recipe(arguments.recipe)
    if arguments.recipe is None and not {"model", "data"} & set(given):
        from bcosification.train.sweeping import DEMO

        values = dict(DEMO)
    for option, name in (("--model", "model"), ("--data", "data")):
        if not (given.get(name) or values.get(name)):
            raise ValueError(f"expected {option} (or a recipe that names it, or neither: the demo)")
    conversion = _given(arguments, CONVERSION)
    if conversion:
        given["conversion"] = {**values.get("conversion", {}), **conversion}
    config = FinetuneConfig.from_mapping(values | given, "command line")

    from bcosification.train.sweeping import sweep

    options = {name: getattr(arguments, name) for name in ("ask", "b_values", "seeds", "grids", "pretrain_epochs")}
    result = sweep(config, **options, say=lambda text: print(text, flush=True))
    print(f"\n{result}\n\nrows in {result.output / 'sweep.json'}, the table in sweep.md, the figure in sweep.png")
    return 0


def _benchmark(arguments: argparse.Namespace) -> int:
    spec = _model_spec(arguments)
    for name, value in (("--batch", arguments.batch), ("--size", arguments.size)):
        if value is not None and value < 1:
            raise ValueError(f"expected {name} >= 1, got {value}")
    file = _output_file("--json", arguments.json)

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
    device = _device(arguments.device)
    batch = arguments.batch or (8 if device.type == "cpu" else 64)
    if _is_converted(spec):
        folder = _run_folder(spec)
        _refuse_conversion(arguments, folder)
        converted = bcosification.load(folder)
        original = standard_network(converted.config, folder)
    else:
        arguments.pretrained, arguments.weights = False, None
        original, converted = _converted(arguments, spec)
    height, width = (arguments.size,) * 2 if arguments.size else converted.config["input_size"] or (224, 224)
    images = torch.rand(batch, converted.channels, height, width, generator=torch.Generator().manual_seed(0))
    result = benchmark(
        original, converted, images.to(device), contenders=contenders, rounds=arguments.rounds, dtype=arguments.dtype
    )
    print(f"{spec}, {result}")
    if file is not None:
        file.write_text(json.dumps({"model": spec, **result.to_dict()}, indent=1) + "\n", encoding="utf-8")
    return 1 if any("failed" in row for row in result.rows) else 0


# --- models, images, output -------------------------------------------------------------------------------------------


def _needs(*packages: str) -> None:
    """Raises before any work is done for which a package of an extra is missing in the end."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> dict:
    """The options that were given: those with argparse.SUPPRESS as default are absent otherwise."""
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def _model_spec(arguments: argparse.Namespace) -> str:
    given = [spec for spec in (arguments.model, arguments.model_option) if spec is not None]
    if len(given) != 1:
        raise ValueError(f"expected one MODEL, got {len(given)}")
    return given[0]


def _is_converted(spec: str) -> bool:
    """Whether MODEL is a folder of ours, or of a run."""
    return (Path(spec) / "config.json").is_file() or (Path(spec) / "config.yaml").is_file()


def _run_folder(spec: str) -> str:
    """The folder of a run stands for its best model."""
    folder = Path(spec)
    if (folder / "config.yaml").is_file():
        if not (folder / "best" / "config.json").is_file():
            raise FileNotFoundError(f"MODEL: expected a run with at least one complete epoch, found none in {folder}")
        return str(folder / "best")
    return spec


def _converted(arguments: argparse.Namespace, spec: str):
    """The standard model and its conversion with the options of the command line."""
    import bcosification
    from bcosification.convert.resolver import resolve

    original, _ = resolve(spec, arch=arguments.arch, pretrained=arguments.pretrained, weights=arguments.weights)
    return original, bcosification.bcosify(original, **_given(arguments, ("b", "bias", *CONVERSION)))


def _refuse_conversion(arguments: argparse.Namespace, folder: str) -> None:
    """Raises if options of the conversion were given for a model that is converted already."""
    given = _given(arguments, ("b", "bias", *CONVERSION))
    if given:
        raise ValueError(
            f"expected no options of the conversion, as {folder} is converted already, got "
            + ", ".join(f"{name}=" for name in given)
        )


def _with_original(arguments: argparse.Namespace, folder: str):
    """The converted model in `folder`, and the standard model that it was made of."""
    import bcosification
    from bcosification.convert.resolver import resolve

    _refuse_conversion(arguments, folder)
    converted = bcosification.load(folder)
    config = converted.config
    options = dict(arch=arguments.arch, pretrained=arguments.pretrained, weights=arguments.weights)
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
            options["pretrained"] = False
        elif weights is not None and spec.startswith("torchvision:") and options["weights"] is None:
            options["weights"] = weights
        elif weights is not None and Path(weights).is_file() and options["weights"] is None:
            options["weights"] = weights
    original, info = resolve(spec, **options)
    print(f"{folder}, compared with {info['spec']}, weights: {info['weights'] or 'random'}\n")
    return original, converted


def _any_model(arguments: argparse.Namespace, spec: str):
    """The model that `spec` names, taking images in [0, 1], and its configuration (input_size, class_names, …)."""
    from torch import nn

    from bcosification.convert.resolver import resolve
    from bcosification.convert.wrapper import BcosifiedModel
    from bcosification.nn import Normalize

    model, info = resolve(
        _run_folder(spec), arch=arguments.arch, pretrained=arguments.pretrained, weights=arguments.weights
    )
    if isinstance(model, BcosifiedModel):
        if model.config["family"] in CLIP_FAMILIES:
            raise ValueError(f"expected --zero-shot for a CLIP model, got {spec} without")
        return model, model.config
    if callable(getattr(model, "encode_text", None)):
        raise ValueError(f"expected --zero-shot for a CLIP model, got {spec} without")
    known = info["preprocessing"]
    if known is None:
        raise ValueError(f"expected a model whose input normalisation is known, got {spec}")
    return nn.Sequential(Normalize(known["mean"], known["std"]), model).eval(), {
        **known,
        "num_classes": info["num_classes"],
    }


def _clip_model(arguments: argparse.Namespace, spec: str):
    """The CLIP model that `spec` names, B-cosified or standard, with a text tower, on images in [0, 1]."""
    from bcosification.convert.clip import StandardCLIP
    from bcosification.convert.resolver import resolve
    from bcosification.convert.wrapper import BcosifiedModel

    model, info = resolve(
        _run_folder(spec), arch=arguments.arch, pretrained=arguments.pretrained, weights=arguments.weights
    )
    if isinstance(model, BcosifiedModel):
        _expect_clip(model, "--zero-shot", spec)
        _switch_attention_pool(arguments, model)
        _attach_text(arguments, model, spec)
        return model, model.config
    if not callable(getattr(model, "encode_text", None)):
        raise ValueError(f"--zero-shot: expected a CLIP model, got {spec} ({type(model).__name__})")
    known = info["preprocessing"]
    return StandardCLIP(model, known["mean"], known["std"]).eval(), known


def _expect_clip(model, option: str, spec: str) -> None:
    from bcosification.convert.clip import BcosifiedCLIP

    if not isinstance(model, BcosifiedCLIP):
        raise ValueError(f"{option}: expected a CLIP model, got {spec} ({model.config['class']})")


def _switch_attention_pool(arguments: argparse.Namespace, model) -> None:
    if arguments.attention_pool is None and arguments.power is None:
        return
    _expect_clip(model, "--attention-pool" if arguments.power is None else "--power", "MODEL")
    model.set_attention_pool(arguments.attention_pool, p=arguments.power)


def _attach_text(arguments: argparse.Namespace, model, spec: str) -> None:
    """The text tower of --text-model, where one was named or the folder holds none."""
    from bcosification.convert.resolver import resolve

    if arguments.text_model is not None:
        source, _ = resolve(arguments.text_model)
        model.attach_text(source)
    elif model.text is None:
        told = model.config["text"]
        named = "--text-model MODEL" if told is None or not told["model"] else f"--text-model {told['model']}"
        raise ValueError(
            f"expected a model with its text tower, got {spec}, which was saved without (--with-text stores it); give "
            + named
        )


def _texts(arguments: argparse.Namespace, model, folder: str) -> list[str] | None:
    """The texts of --text, for a CLIP model with its text tower; None for a classifier."""
    from bcosification.convert.clip import BcosifiedCLIP

    _switch_attention_pool(arguments, model)
    if not arguments.text:
        if isinstance(model, BcosifiedCLIP):
            raise ValueError(f"expected --text for a CLIP model, got {folder} without")
        return None
    _expect_clip(model, "--text", folder)
    _attach_text(arguments, model, folder)
    return list(arguments.text)


def _templates(arguments: argparse.Namespace, default: str | None = None):
    given = arguments.templates
    if given is None:
        return default
    return {"none": None}.get(given[0], given[0]) if len(given) == 1 else given


def _bcos_folder(spec: str) -> str:
    """The folder of a B-cosified model; anything else is refused before a network is built or downloaded."""
    path = Path(spec)
    if path.is_dir():
        return _run_folder(spec)
    got = f"the file {spec}" if path.exists() else f"{spec!r}, where no folder is"
    raise ValueError(
        f"MODEL: expected {FOLDER_HELP}, got {got}; of a standard network, finetune or convert make a B-cos model"
    )


def _output_folder(name: str) -> Path:
    from bcosification.train.finetuning import check_writable

    folder = Path(name)
    check_writable(folder)
    return folder


def _output_file(option: str, name: str | None) -> Path | None:
    file = None if name is None else Path(name)
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise FileNotFoundError(f"{option}: expected a file in a folder that is there, got {file}")
    return file


def _random_images(count: int, original, converted):
    """Pictures of random pixels as the converted model takes them, and as the original's own preprocessing makes them.

    The latter are None where the two crop or normalise otherwise: after fine-tuning on images of another size, or where
    --mean or --std were given.
    """
    import numpy
    import torch
    from PIL import Image

    from bcosification.convert.preprocessing import Preprocessing, own_transform

    wanted = Preprocessing.from_dict(converted.config)
    height, width = wanted.input_size or (224, 224)
    random = numpy.random.default_rng(0)
    shape = (round(1.25 * height), round(1.5 * width), 3)  # not square, and larger: what is resized and cropped shows
    pictures = [Image.fromarray(random.integers(0, 256, shape, dtype=numpy.uint8)) for _ in range(count)]
    images = torch.stack([converted.transform(picture) for picture in pictures])
    known = (getattr(original, "bcosification_source", None) or {}).get("preprocessing")
    own = own_transform(original)
    if own is None or dataclasses.replace(Preprocessing.from_dict(known), origin=wanted.origin) != wanted:
        return images, None
    return images, torch.stack([own(picture) for picture in pictures])


def _image_files(names: Sequence[str]) -> list[tuple[Path, bool]]:
    """Files, and whether each was named itself; a folder stands for the images directly in it."""
    suffixes = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
    files = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in suffixes)
            if not inside:
                raise FileNotFoundError(f"IMAGE: expected images in the folder {path}, found none")
            files += [(entry, False) for entry in inside]
        elif path.is_file():
            files.append((path, True))
        else:
            raise FileNotFoundError(f"IMAGE: expected an image file or a folder, found neither at {path}")
    return files


def _read_images(paths: Sequence[Path], model):
    from bcosification.train.image_files import load_image

    tensors, read, unreadable = [], [], []
    for path in paths:
        try:
            image = load_image(path)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # Pillow's decoders raise many types on broken files
            unreadable.append((path, error))
            continue
        tensors.append(model.transform(image))
        read.append(path)
    if not read:
        path, reason = unreadable[0]
        raise ValueError(f"IMAGE: expected images, but none of {len(paths)} can be read (first: {path}: {reason})")
    shapes = sorted({tuple(tensor.shape[-2:]) for tensor in tensors})
    if len(shapes) > 1:  # of models that tell no input size
        listed = ", ".join(f"{height} x {width}" for height, width in shapes)
        raise ValueError(f"IMAGE: expected images of one size, as the model has none of its own, got {listed}")
    return tensors, read, unreadable


def _list_unreadable(unreadable: Sequence[tuple], of: int) -> None:
    if unreadable:
        print(f"left out, as {len(unreadable)} of {_count(of, 'image')} could not be read:", file=sys.stderr)
        for path, reason in unreadable:
            print(f"  {path}: {reason}", file=sys.stderr)


def _distinct(stems: Sequence[str]) -> list[str]:
    seen: dict[str, int] = {}
    result = []
    for stem in stems:
        seen[stem] = seen.get(stem, 0) + 1
        candidate = stem if seen[stem] == 1 else f"{stem}_{seen[stem]}"
        while candidate in result:
            candidate += "_"
        result.append(candidate)
    return result


def _class_number(target: str, names: Sequence[str] | None, classes: int) -> int:
    if names and target in names:
        return list(names).index(target)
    if target.isdecimal() and int(target) < classes:
        return int(target)
    known = f"a class number below {classes}" + (f" or one of {', '.join(names[:10])}" if names else "")
    raise ValueError(f"expected --target to be {known}, got {target!r}")


def _device(name: str):
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: expected a device that is usable here, got {name!r}: {error}") from None
    return device


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


# --- running a command, and its errors --------------------------------------------------------------------------------

COMMANDS = {
    "finetune": _finetune,
    "distill": _distill,
    "explain": _explain,
    "evaluate": _evaluate,
    "convert": _convert,
    "verify": _verify,
    "families": _families,
    "sweep": _sweep,
    "benchmark": _benchmark,
}


def _missing_package(error: ModuleNotFoundError, command: str) -> ModuleNotFoundError:
    """The error with the pip line of the extra that brings the package, if one does."""
    name = (error.name or "").partition(".")[0]
    if name not in EXTRAS or "pip install" in str(error):
        return error
    extra = EXTRAS[name]
    if command == "explain" and name in ("torchvision", "safetensors"):
        extra = "explain"
    return ModuleNotFoundError(f"this needs {name}, which is not installed: pip install 'bcos-kernels[{extra}]'")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    whole = parser(COMMANDS)
    arguments = whole.parse_args(argv)
    if arguments.version:
        from bcos_kernels.__main__ import main as report

        return report([])
    if arguments.command is None:
        whole.print_help()
        return 2
    command = f"bcosify {arguments.command}"

    def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
        print(f"{command}: warning: {in_options(str(message), arguments.parser)}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            return arguments.run(arguments)
    except KeyboardInterrupt:
        hint = ""
        if arguments.command in ("finetune", "distill") and hasattr(arguments, "output"):
            hint = f"; go on with: bcosify {arguments.command} --resume --out {arguments.output}"
        print(f"bcosify: interrupted{hint}", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        if isinstance(error, ModuleNotFoundError):
            error = _missing_package(error, arguments.command)
        expected = isinstance(error, (ValueError, TypeError, OSError, NotImplementedError))
        text = in_options(str(error), arguments.parser) or type(error).__name__
        more = "" if expected or isinstance(error, (ImportError, RuntimeError)) else " (--debug shows where)"
        print(f"{command}: error: {text}{more}", file=sys.stderr)
        return 2 if expected else 1


if __name__ == "__main__":
    sys.exit(main())
