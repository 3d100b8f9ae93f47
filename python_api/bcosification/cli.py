"""The command `bcosify`: fine-tune, explain, evaluate, convert and verify models.

    bcosify finetune --model resnet18 --data digits --out runs/digits
    bcosify explain --model runs/digits IMAGE… --out pictures
    bcosify evaluate runs/digits --data digits

Exit codes: 0 done, 1 failed (a check did not hold, something is missing here), 2 wrong usage or input, 130 interrupted.
Nothing but the standard library is needed for the help; what an extra provides is imported by the command that uses it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

MODEL_HELP = (
    "torchvision:NAME or just NAME (resnet18), timm:NAME, open_clip:NAME/TAG, a folder written by finetune or convert, "
    "or a weights file together with --arch"
)

# Which extra of the distribution brings a module.
EXTRAS = {
    name: "train" for name in ("lightning", "torchmetrics", "torchvision", "timm", "open_clip", "sklearn", "tqdm")
}
EXTRAS |= {"yaml": "train", "safetensors": "train", "matplotlib": "explain", "captum": "explain", "PIL": "explain"}


def _finetune(arguments: argparse.Namespace) -> int:
    from bcosification.train.finetuning import FinetuneConfig, finetune, load_recipe, saved_config

    given = {
        field.name: getattr(arguments, field.name)
        for field in dataclasses.fields(FinetuneConfig)
        if hasattr(arguments, field.name)
    }
    values = {}
    if arguments.resume:
        if "output" not in given:
            raise ValueError("--resume: expected --out with the folder of the run to continue")
        values = dataclasses.asdict(saved_config(Path(given["output"])))
    if arguments.recipe is not None:
        values |= load_recipe(arguments.recipe)
    for option, name in (("--model", "model"), ("--data", "data"), ("--out", "output")):
        if not (given.get(name) or values.get(name)):
            raise ValueError(f"expected {option}" + (" (or a recipe that names it)" if name != "output" else ""))
    config = FinetuneConfig.from_mapping(values | given, "command line")
    result = finetune(config, resume=arguments.resume)
    last = result.history[-1]
    print(
        f"{len(result.history)} epochs; val top-1 {100 * last['val_top1']:.2f} % (best {100 * result.best:.2f} %)\n"
        f"model: {result.output / 'last'} (best: {result.output / 'best'}); curves and metrics in {result.output}"
    )
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    import torch

    import bcosification
    from bcosification.explanation import save_figure

    images, spec = list(arguments.images), arguments.model
    if spec is None:
        spec, images = images[0], images[1:]
    if not images:
        raise ValueError("explain: expected --model MODEL and at least one image")
    out = _output_folder(arguments.out)
    model = _bcos_model(arguments, spec, "explain")
    paths = _image_files(images)
    tensors, read, unreadable = _read_images(paths, model)
    names = model.config.get("class_names")
    targets = None if arguments.target is None else _class_number(arguments.target, names, model.num_classes)
    device = _device(arguments.device)
    model.to(device).eval()
    explanation = bcosification.explain(model, torch.stack(tensors), targets, batch_size=arguments.batch_size)
    smooth = arguments.smooth
    if smooth is None:
        # 15 pixels at 224, as in the papers; the same share of other sizes, and odd.
        smooth = max(1, 15 * min(tensors[0].shape[-2:]) // 224)
        smooth -= smooth % 2 == 0
    stems = _distinct([path.stem for path in read])
    files = explanation.save(out, names=stems, class_names=names, smooth=smooth, percentile=arguments.percentile)
    figure = explanation.figure(indices=range(min(len(read), 64)), class_names=names, smooth=smooth)
    files.append(save_figure(figure, out / "overview.png"))
    for i, path in enumerate(read):
        target, predicted = int(explanation.targets[i]), int(explanation.logits[i].argmax())
        label = names[target] if names else target
        note = "" if target == predicted else f" (predicted: {names[predicted] if names else predicted})"
        print(f"{path}: class {label}{note}, logit {float(explanation.logits[i, target]):.2f}")
    for path, reason in unreadable:
        print(f"left out, unreadable: {path}: {reason}", file=sys.stderr)
    print(f"{len(files)} files in {out}: each image, its explanation and its contribution map, and all in one overview")
    if unreadable:
        print(f"{len(unreadable)} of {len(paths)} images could not be read", file=sys.stderr)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from bcosification.evaluation import evaluate
    from bcosification.train.data import build_datamodule, evaluation_transform

    model, config = _any_model(arguments, _model_spec(arguments))
    size = arguments.image_size or (min(config["input_size"]) if config.get("input_size") else None)
    own = arguments.image_size is None and hasattr(model, "transform")
    names = config.get("class_names")
    data = build_datamodule(
        arguments.data, image_size=size, batch_size=arguments.batch_size, num_workers=arguments.num_workers,
        eval_transform=model.transform if own else evaluation_transform(size or 224), evaluation_only=True,
        class_names=names,
    )  # fmt: skip
    classes = config.get("num_classes")
    if classes is not None and data.num_classes > classes:
        raise ValueError(f"evaluate: expected data with at most the model's {classes} classes, got {data.num_classes}")
    if classes is not None and data.num_classes < classes:
        print(f"warning: the model has {classes} classes and the data {data.num_classes}: class k of the data is taken "
              "for the model's class k", file=sys.stderr)  # fmt: skip
    result = evaluate(model, data.val_dataloader(), device=_device(arguments.device))
    print(f"images {result['images']}, top-1 {100 * result['top1']:.2f} %, top-5 {100 * result['top5']:.2f} %")
    if data.unreadable:
        print(f"{len(data.unreadable)} unreadable image files were left out:", file=sys.stderr)
        for path, reason in data.unreadable:
            print(f"  {path}: {reason}", file=sys.stderr)
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    out = _output_folder(arguments.out)
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"convert: expected a new or empty folder, got {out} with files in it; choose another")
    original, converted = _converted(arguments)
    converted.save_pretrained(out)
    changed = sum(entry["was"] != entry["becomes"] for entry in converted.conversion)
    print(f"{type(original).__name__}: {changed} of {len(converted.conversion)} layers became B-cos layers")
    print(f"written to {out}; it wants fine-tuning: bcosify finetune --model {out} --data DIR --out RUN")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    import torch

    import bcosification

    original, converted = _converted(arguments)
    height, width = converted.config["input_size"] or (224, 224)
    images = torch.rand(arguments.images, 3, height, width, generator=torch.Generator().manual_seed(0))
    report = bcosification.verify(original, converted, images)
    print(report)
    return 0 if report.ok else 1


def _converted(arguments: argparse.Namespace):
    """The standard model and its conversion with the options of the command line."""
    import bcosification
    from bcosification.convert.resolver import resolve
    from bcosification.convert.wrapper import BcosifiedModel

    spec = _model_spec(arguments)
    original, _ = resolve(spec, arch=arguments.arch, pretrained=arguments.pretrained, weights=arguments.weights)
    if isinstance(original, BcosifiedModel):
        raise ValueError(f"expected a standard model, got {spec}, which is B-cosified already")
    options = {
        name: getattr(arguments, name)
        for name in ("b", "bias", "pool", "head", "activation", "normalize_weight", "mean", "std", "on_unknown")
    }
    return original, bcosification.bcosify(original, **options)


def _model_spec(arguments: argparse.Namespace) -> str:
    given = [spec for spec in (arguments.model, arguments.model_option) if spec is not None]
    if len(given) != 1:
        raise ValueError(f"expected one MODEL, got {len(given)}")
    return given[0]


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
        return model, model.config
    known = info["preprocessing"]
    if known is None:
        raise ValueError(f"expected a model whose input normalisation is known, got {spec}")
    return nn.Sequential(Normalize(known["mean"], known["std"]), model).eval(), {
        **known,
        "num_classes": info["num_classes"],
    }


def _bcos_model(arguments: argparse.Namespace, spec: str, command: str):
    from bcosification.convert.wrapper import BcosifiedModel

    model, _ = _any_model(arguments, spec)
    if not isinstance(model, BcosifiedModel):
        raise ValueError(
            f"{command}: expected a B-cosified model, got the standard network {spec}; bcosify finetune (or convert) "
            "makes one of it"
        )
    return model


def _run_folder(spec: str) -> str:
    """The folder of a run stands for its best model."""
    folder = Path(spec)
    if (folder / "config.yaml").is_file():
        if not (folder / "best" / "config.json").is_file():
            raise FileNotFoundError(f"model: expected a run with at least one complete epoch, found none in {folder}")
        return str(folder / "best")
    return spec


def _output_folder(name: str) -> Path:
    from bcosification.train.finetuning import check_writable

    folder = Path(name)
    check_writable(folder)
    return folder


def _image_files(names: Sequence[str]) -> list[Path]:
    """The files; a folder stands for the images directly in it."""
    suffixes = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
    files = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = sorted(entry for entry in path.iterdir() if entry.suffix.lower() in suffixes)
            if not inside:
                raise FileNotFoundError(f"explain: expected images in the folder {path}, found none")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"explain: expected an image file or a folder, found neither at {path}")
    return files


def _read_images(paths: Sequence[Path], model):
    from bcosification.train.image_files import load_image

    tensors, read, unreadable = [], [], []
    for path in paths:
        try:
            image = load_image(path)
        except (OSError, ValueError, SyntaxError) as error:
            unreadable.append((path, error))
            continue
        tensors.append(model.transform(image))
        read.append(path)
    if not read:
        path, reason = unreadable[0]
        raise ValueError(f"explain: expected images, but none of {len(paths)} can be read (first: {path}: {reason})")
    return tensors, read, unreadable


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
    raise ValueError(f"explain: expected --target to be {known}, got {target!r}")


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bcosify",
        description="Turn pretrained vision models into B-cos models: convert, fine-tune, explain, measure.",
        epilog="bcosify COMMAND --help tells the options of a command.",
    )
    parser.add_argument("--version", action="store_true", help="print versions and what this machine can run")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="on an error, show the Python traceback")
    source = argparse.ArgumentParser(add_help=False)
    group = source.add_argument_group("model")
    group.add_argument("--arch", metavar="NAME", help="architecture of a weights file, as a MODEL is named")
    group.add_argument("--weights", metavar="FILE", help="standard weights from this file (.safetensors, .pth)")
    group.add_argument(
        "--no-pretrained", dest="pretrained", action="store_false", help="random weights; nothing is downloaded"
    )
    positional = argparse.ArgumentParser(add_help=False)
    positional.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    positional.add_argument("--model", dest="model_option", metavar="MODEL", help=argparse.SUPPRESS)
    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")

    _add_finetune(commands, common)

    command = commands.add_parser(
        "explain", parents=[common, source, running], help="write pictures of explanations",
        description="Write for every image its picture, its explanation W(x) and its contribution map, as PNG.",
    )  # fmt: skip
    command.add_argument("--model", metavar="MODEL", help=f"a B-cosified model: {MODEL_HELP}")
    command.add_argument("images", metavar="IMAGE", nargs="+", help="image files, or folders of them")
    command.add_argument("--out", metavar="DIR", required=True, help="where to; made if it is missing")
    command.add_argument("--target", metavar="CLASS", help="class to explain, number or name (default: the predicted)")
    command.add_argument("--smooth", type=int, help="edge of the box that smooths, odd (default: 15 at 224 pixels)")
    command.add_argument("--percentile", type=float, default=99.5, help="drawn fully opaque (default: 99.5)")
    command.add_argument("--batch-size", type=int, help="images at once (default: as many as fit 16 of 224 pixels)")
    command.set_defaults(run=_explain)

    command = commands.add_parser(
        "evaluate", parents=[common, positional, source, running], help="top-1 and top-5 accuracy",
        description="Accuracy on a data set: digits, scenes, or a folder (its val/ if it has one, else class folders).",
    )  # fmt: skip
    command.add_argument("--data", required=True, help="digits, scenes, or a folder of class folders")
    command.add_argument("--image-size", type=int, help="edge in pixels (default: the model's)")
    command.add_argument("--batch-size", type=int, default=64, help="images at once (default: 64)")
    command.add_argument("--num-workers", type=int, help="loading processes (default: 0 for embedded data, up to 8)")
    command.set_defaults(run=_evaluate)

    conversion = argparse.ArgumentParser(add_help=False)
    group = conversion.add_argument_group("conversion")
    group.add_argument("--b", type=float, default=2.0, help="exponent B (default: 2)")
    group.add_argument("--bias", choices=("remove", "keep", "decay"), default="remove", help="(default: remove)")
    group.add_argument("--pool", choices=("average", "keep"), default="average", help="max pooling (default: average)")
    group.add_argument("--head", choices=("before_pool", "keep"), default="before_pool", help="(default: before_pool)")
    group.add_argument("--activation", choices=("keep", "remove"), default="keep", help="ReLU, GELU (default: keep)")
    group.add_argument("--normalize-weight", action="store_true", help="normalise weights as B-cos v2 does")
    group.add_argument("--mean", type=float, nargs="+", help="input normalisation, where the model does not tell it")
    group.add_argument("--std", type=float, nargs="+", help="likewise")
    group.add_argument("--on-unknown", choices=("error", "keep"), default="error", help="layers without a rule")

    command = commands.add_parser(
        "convert", parents=[common, positional, source, conversion], help="B-cosify and save, without training",
        description="B-cosify a standard model and write model.safetensors and config.json.",
    )  # fmt: skip
    command.add_argument("--out", metavar="DIR", required=True, help="where to; new or empty")
    command.set_defaults(run=_convert)

    command = commands.add_parser(
        "verify", parents=[common, positional, source, conversion], help="check a conversion layer by layer",
        description="Convert a model and show, layer by layer, that only B and the biases change what it computes.",
    )  # fmt: skip
    command.add_argument("--images", type=int, default=2, help="number of random images to compare on (default: 2)")
    command.set_defaults(run=_verify)
    return parser


def _add_finetune(commands, common) -> None:
    from bcosification.train.finetuning import FinetuneConfig, recipes

    defaults = FinetuneConfig()
    listed = "\n".join(f"  {name:22} {text}" for name, text in recipes().items())
    command = commands.add_parser(
        "finetune", parents=[common], help="B-cosify a pretrained model and fine-tune it",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="B-cosify a pretrained model and fine-tune it. Options given here override those of --recipe.",
        epilog=f"recipes:\n{listed}\n\nA stopped run goes on with: bcosify finetune --resume --out DIR",
    )  # fmt: skip
    nothing = argparse.SUPPRESS  # only what was given: recipes and earlier runs fill in the rest

    def add(group, name: str, text: str, **options) -> None:
        destination = options.pop("dest", name.removeprefix("--").replace("-", "_"))
        default = getattr(defaults, destination)
        shown = "" if default in (None, "") or isinstance(default, bool) else f" (default: {default:g})" if isinstance(
            default, float) else f" (default: {default})"  # fmt: skip
        group.add_argument(name, dest=destination, default=nothing, help=text + shown, **options)

    group = command.add_argument_group("what")
    add(group, "--model", MODEL_HELP)
    add(group, "--data", "digits, scenes, or a folder with train/ and val/, one sub-folder per class in each")
    add(group, "--out", "output folder: new, empty, or with --resume that of a run", dest="output", metavar="DIR")
    group.add_argument("--recipe", metavar="NAME_OR_FILE", help="options from a recipe (below) or a YAML file")
    group.add_argument("--resume", action="store_true", help="continue the run in --out after its last complete epoch")
    add(group, "--arch", "architecture of a weights file, as a MODEL is named", metavar="NAME")
    add(group, "--weights", "standard weights from this file (.safetensors, .pth)", metavar="FILE")
    add(group, "--no-pretrained", "random weights; nothing is downloaded", dest="pretrained", action="store_false")

    group = command.add_argument_group("conversion")
    add(group, "--b", "exponent B", type=float)
    add(group, "--b-epochs", "raise B linearly from 1 over this many epochs; 0: at once", type=float)
    add(group, "--bias", "biases", choices=("remove", "keep", "decay"))
    add(group, "--bias-epochs", "with --bias decay: epochs until they are gone", type=float)

    group = command.add_argument_group("optimisation")
    add(group, "--epochs", "passes over the training data", type=int)
    add(group, "--batch-size", "images per step and device", type=int)
    add(group, "--lr", "peak learning rate; a cosine takes it to 0", type=float)
    add(group, "--optimizer", "optimiser", choices=("adam", "adamw"))
    add(group, "--weight-decay", "of matrices and kernels, not of vectors", type=float)
    add(group, "--warmup-epochs", "linear warm-up, fractions allowed", type=float)
    add(
        group, "--loss", "binary cross-entropy with off labels 1/classes, with one-hot labels, or cross-entropy",
        choices=("bce_uniform", "bce", "cross_entropy"),
    )  # fmt: skip
    add(group, "--agc", "adaptive gradient clipping with this factor (the papers: 0.01)", type=float, metavar="FACTOR")
    add(group, "--clip-norm", "clip the gradient's norm", type=float, metavar="NORM")
    add(group, "--seed", "of everything random", type=int)

    group = command.add_argument_group("data")
    add(group, "--image-size", "edge in pixels (default: the data set's, or the model's for folders)", type=int)
    add(
        group, "--no-augment", "no random crops and flips (embedded data: shifts)", dest="augment", action="store_false"
    )
    add(group, "--num-workers", "loading processes (default: 0 for embedded data, else up to 8)", type=int)
    add(group, "--limit-batches", "batches per epoch and part, for a trial (default: all)", type=int)

    group = command.add_argument_group("machine")
    add(group, "--precision", "32-true, bf16-mixed, 16-mixed, …")
    add(group, "--compile", "torch.compile the model", action="store_true")
    add(group, "--accelerator", "auto, cpu, gpu, …")
    add(group, "--devices", "number of devices, or auto")
    add(group, "--no-progress", "no progress bar", dest="progress", action="store_false")
    command.set_defaults(run=_finetune)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.version:
        from bcos_kernels.__main__ import main as report

        return report([])
    if arguments.command is None:
        parser.print_help()
        return 2
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        hint = ""
        if arguments.command == "finetune" and hasattr(arguments, "output"):
            hint = f"; go on with: bcosify finetune --resume --out {arguments.output}"
        print(f"bcosify: interrupted{hint}", file=sys.stderr)
        return 130
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS and "pip install" not in str(error):
            error = ModuleNotFoundError(
                f"this needs {error.name}, which is not installed: pip install 'bcos-kernels[{EXTRAS[error.name]}]'"
            )
        expected = isinstance(error, (ValueError, TypeError, OSError, NotImplementedError))
        text = str(error) or type(error).__name__
        more = "" if expected or isinstance(error, (ImportError, RuntimeError)) else " (--debug shows where)"
        print(f"bcosify {arguments.command}: error: {text}{more}", file=sys.stderr)
        return 2 if expected else 1


if __name__ == "__main__":
    sys.exit(main())
