"""The command `bcosify explain`."""

from __future__ import annotations

import argparse
from pathlib import Path

from bcosification.cli.files import (
    counted,
    distinct_names,
    image_files,
    list_unreadable,
    output_folder,
    read_images,
)
from bcosification.cli.models import (
    bcos_folder,
    class_number,
    needs,
    templates_told,
    texts_to_explain,
    usable_device,
)
from bcosification.cli.options import FOLDER_HELP, add_command, add_common, add_texts
from bcosification.cli.texts import explain_texts, reads_text
from bcosification.names import shortened


def add_explain(commands) -> argparse.ArgumentParser:
    command = add_command(
        commands, "explain", _explain, "write pictures of explanations",
        "Write for every image its picture, its explanation W(x) and its contribution map, as PNG; for every text its\n"
        "tokens in the colours of their contributions, as HTML.",
        "examples:\n"
        "  bcosify explain runs/r18 photo.jpg other.png --out pictures\n"
        "  bcosify explain runs/r18/last photos/ --out pictures --target 207\n"
        "  bcosify explain runs/clip photo.jpg --out pictures --text 'a dog' 'a cat' --attention-pool unpool\n"
        "  bcosify explain converted/bert --text 'a gripping film' 'a dull one' --out pictures\n\n"
        "An image that cannot be read is left out and listed; the exit code is then 1 if it was named itself, and 0\n"
        "if it lies in a folder that was named.",
        usage="bcosify explain [options] MODEL IMAGE [IMAGE ...] --out DIR\n"
        "       bcosify explain [options] MODEL --text TEXT [TEXT ...] --out DIR",
    )  # fmt: skip
    command.add_argument("--model", metavar="MODEL", help=f"{FOLDER_HELP}; may also come first, before the images")
    command.add_argument("images", metavar="IMAGE", nargs="+", help="image files, or folders of them")
    command.add_argument("--out", metavar="DIR", required=True, help="where to; made if it is missing")
    command.add_argument("--target", metavar="CLASS", help="class to explain, number or name (default: the predicted)")
    group = command.add_argument_group("CLIP models, and --text of classifiers of texts")
    group.add_argument(
        "--text", nargs="+", metavar="TEXT", help="texts to explain, with images each with pictures of its own (put it "
        "after IMAGE or MODEL)",
    )  # fmt: skip
    add_texts(group, "none")
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
    add_common(command, device=True)
    command.add_argument(
        "--batch-size", type=int, metavar="N", help="images at once (default: as many as 16 of 224 pixels fill)"
    )
    return command


def _explain(arguments: argparse.Namespace) -> int:
    needs("PIL", "matplotlib", "safetensors")
    images, spec = list(arguments.images), arguments.model
    if spec is None:
        spec, images = images[0], images[1:]
    if Path(spec).is_dir() and reads_text(bcos_folder(spec)):
        return explain_texts(arguments, bcos_folder(spec), images)
    if not images:
        raise ValueError(f"expected MODEL and at least one IMAGE, got {spec!r} alone")
    out = output_folder(arguments.out)
    folder = bcos_folder(spec)
    files = image_files(images)

    import torch

    import bcosification
    from bcosification.explanation import save_figure
    from bcosification.explanation.pictures import check_options, enlargement

    check_options(arguments.smooth, arguments.percentile)
    enlargement(1, 1, arguments.size)
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise ValueError(f"expected --batch-size >= 1, got {arguments.batch_size}")
    templates = templates_told(arguments)
    model = bcosification.load(folder)
    names = model.config.get("class_names")
    texts = texts_to_explain(arguments, model, folder)
    if texts is not None and arguments.target is not None:
        raise ValueError("expected --target or --text, got both")
    targets = None if arguments.target is None else class_number(arguments.target, names, model.num_classes)
    tensors, read, unreadable = read_images([path for path, _ in files], model)
    model.to(usable_device(arguments.device))
    explained = (
        {} if texts is None else dict(text=texts, templates=templates, protocol=arguments.protocol)
    )
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
    before = set(out.glob("*.png"))
    written = explanation.save(out, names=distinct_names([path.stem for path in read]), size=arguments.size, **drawn)
    written.append(save_figure(explanation.figure(indices=range(min(len(read), 64)), **drawn), out / "overview.png"))
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
        f"{out}: {counted(len(read), 'image')}, each as NAME_image.png, NAME_{each}explanation.png and "
        f"NAME_{each}contributions.png, {pixels}; all in overview.png, numbers in explanations.json"
    )
    older = sorted(path.name for path in before.difference(written))
    if older:
        print(f"{out} had other pictures before, which are no part of these: {shortened(older)}")
    list_unreadable(unreadable, len(files))
    named = {path for path, by_name in files if by_name}
    return 1 if any(path in named for path, _ in unreadable) else 0
