"""The commands `bcosify convert`, `verify` and `families`."""

from __future__ import annotations

import argparse
import textwrap

from bcosification.cli.files import output_file, output_folder, random_images
from bcosification.cli.models import (
    CLIP_FAMILIES,
    TEXT_FAMILIES,
    expect_clip,
    is_converted,
    model_spec,
    needs,
    original_and_converted,
    run_folder,
    switch_attention_pool,
    with_original,
)
from bcosification.cli.options import (
    CONVERTIBLE_HELP,
    FOLDER_HELP,
    SOURCE,
    add_attention_pool,
    add_b_and_bias,
    add_command,
    add_common,
    add_conversion,
    add_model,
    add_shared,
)
from bcosification.cli.texts import random_tokens
from bcosification.json_files import json_text


def add_convert(commands) -> argparse.ArgumentParser:
    command = add_command(
        commands, "convert", _convert, "B-cosify and save, without training",
        "B-cosify a standard model and write model.safetensors, config.json and a model card, README.md: what\n"
        "bcosification.load and BcosifiedModel.from_pretrained read, and push_to_hub uploads.",
        "examples:\n"
        "  bcosify convert resnet18 --out converted/r18\n"
        "  bcosify convert my_resnet50.pth --arch resnet50 --b 1.5 --out converted/r50\n"
        "  bcosify convert transformers:textattack/bert-base-uncased-SST-2 --out converted/bert",
        usage="bcosify convert [options] MODEL --out DIR",
    )  # fmt: skip
    add_model(command, CONVERTIBLE_HELP)
    command.add_argument("--out", metavar="DIR", required=True, help="where to; new or empty")
    add_shared(command.add_argument_group("standard model"), *SOURCE)
    group = command.add_argument_group("conversion")
    add_b_and_bias(group)
    add_conversion(group)
    group = command.add_argument_group("CLIP models")
    group.add_argument("--with-text", action="store_true", help="store the text tower, too")
    add_attention_pool(group)
    add_common(command)
    return command


def _convert(arguments: argparse.Namespace) -> int:
    needs("safetensors")
    out = output_folder(arguments.out)
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"--out: expected a new or empty folder, got {out} with files in it; choose another")
    spec = model_spec(arguments)
    if is_converted(spec):
        raise ValueError(
            f"expected a standard model ({CONVERTIBLE_HELP}), got {spec}, which holds a converted one; finetune, "
            "explain, evaluate and verify take it"
        )
    original, converted = original_and_converted(arguments, spec)
    switch_attention_pool(arguments, converted, spec)
    if arguments.with_text:
        expect_clip(converted, "--with-text", spec)
        converted.save_pretrained(out, with_text=True)
    else:
        converted.save_pretrained(out)
    changed = [entry for entry in converted.conversion if entry["was"] != entry["becomes"]]
    print(
        f"{type(original).__name__}: {len(changed)} of {len(converted.conversion)} layers converted, "
        f"{sum('Bcos' in entry['becomes'] for entry in changed)} of them to B-cos layers"
    )
    if converted.config["family"] in TEXT_FAMILIES:
        print(f"written to {out}; it wants fine-tuning, by a loop or a Trainer on model(**inputs, labels=labels).loss")
        return 0
    train = "finetune" if converted.config["family"] not in CLIP_FAMILIES else "distill"
    print(f"written to {out}; it wants fine-tuning: bcosify {train} --model {out} --data DIR --out RUN")
    return 0


def add_verify(commands) -> argparse.ArgumentParser:
    command = add_command(
        commands, "verify", _verify, "check a conversion layer by layer",
        "Show, layer by layer, that only B and the biases change what a model computes, and that explanations are\n"
        "exact: of a model that is converted here, or of one that was converted (and fine-tuned) before.",
        "examples:\n"
        "  bcosify verify resnet18 --b 1.5\n"
        "  bcosify verify converted/r18\n"
        "  bcosify verify runs/mine --original my_resnet50.pth --arch resnet50\n"
        "  bcosify verify timm:vit_tiny_patch16_224 --html report.html --json report.json\n\n"
        "The original is given its own library's preprocessing of the same pictures. Of a model that was made of\n"
        "random weights (--no-pretrained), which are kept nowhere, layers are compared on newly drawn ones. The exit\n"
        "code is 1 if a check fails.",
        usage="bcosify verify [options] MODEL",
    )  # fmt: skip
    add_model(command, f"a standard model: {CONVERTIBLE_HELP}; or {FOLDER_HELP}")
    command.add_argument(
        "--original", metavar="MODEL", help="what a folder is compared with (default: what it was made of, if it tells)"
    )
    command.add_argument(
        "--images", type=int, default=2, metavar="N", help="number of random images or texts to compare on (default: 2)"
    )
    command.add_argument("--json", metavar="FILE", help="write the report there, too")
    command.add_argument("--html", metavar="FILE", help="write the report there as a page that needs nothing else")
    add_shared(command.add_argument_group("standard model"), *SOURCE)
    group = command.add_argument_group("conversion, of a standard model")
    add_b_and_bias(group)
    add_conversion(group)
    add_common(command)
    return command


def _verify(arguments: argparse.Namespace) -> int:
    import bcosification

    spec = model_spec(arguments)
    if arguments.images < 1:
        raise ValueError(f"expected --images >= 1, got {arguments.images}")
    files = [output_file("--json", arguments.json), output_file("--html", arguments.html)]
    drawn = False
    if is_converted(spec):
        original, converted, drawn = with_original(arguments, run_folder(spec))
    elif arguments.original is not None:
        raise ValueError(f"--original: expected {FOLDER_HELP} as MODEL, got {spec}, which is converted here")
    else:
        original, converted = original_and_converted(arguments, spec)
    if converted.config["family"] in TEXT_FAMILIES:
        images, normalized = random_tokens(arguments.images, converted), None
    else:
        images, normalized = random_images(arguments.images, original, converted)
    report = bcosification.verify(original, converted, images, normalized=normalized)
    if drawn:  # all tensors differ from a conversion of other random weights, which says nothing
        report.weights_changed = []
        report.about["weights"] = "random ones, kept nowhere; compared with newly drawn ones"
    print(report)
    report.save(json=files[0], html=files[1])
    return 0 if report.ok else 1


def add_families(commands) -> argparse.ArgumentParser:
    command = add_command(
        commands, "families", _families, "which models can be converted, and how exactly",
        "List the families of models, what of each becomes B-cos, what stays and what cannot be done; with --check,\n"
        "convert a small model of each and verify it (random weights, float64, seconds).",
        "examples:\n"
        "  bcosify families\n"
        "  bcosify families --check --json families.json\n\n"
        "The exit code is 1 if a check fails.",
        usage="bcosify families [options] [NAME ...]",
    )  # fmt: skip
    command.add_argument("names", metavar="NAME", nargs="*", help="only those with this in their name (default: all)")
    command.add_argument("--check", action="store_true", help="verify a small model of each")
    command.add_argument("--json", metavar="FILE", help="write the list there, too")
    add_common(command)
    return command


def _families(arguments: argparse.Namespace) -> int:
    file = output_file("--json", arguments.json)

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
        file.write_text(json_text(content, ensure_ascii=False), encoding="utf-8")
    return 1 if any(report.ok is False for report in reports) else 0
