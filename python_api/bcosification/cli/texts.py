"""Classifiers of texts on the command line: explanations of texts, random tokens to verify with."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from bcosification.cli.files import counted, output_folder
from bcosification.cli.models import class_number, usable_device


def reads_text(folder: str) -> bool:
    """Whether the B-cosified model in `folder` reads texts: its config.json tells how many tokens."""
    try:
        return "max_tokens" in json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False  # `load` says what is wrong with it


def explain_texts(arguments: argparse.Namespace, folder: str, images: Sequence[str]) -> int:
    """`bcosify explain` of the texts of --text: a page of coloured tokens, bars, a table on the screen."""
    if images or not arguments.text:
        got = f"{images[0]!r}" if images else "none"
        raise ValueError(f"expected --text TEXT [TEXT ...] for {folder}, which reads texts, and no images, got {got}")
    for name in ("templates", "text_model", "attention_pool", "power"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"expected no {name}= for {folder}, which is no CLIP model")
    out = output_folder(arguments.out)

    import bcosification

    model = bcosification.load(folder).to(usable_device(arguments.device))
    names = model.config.get("class_names")
    target = None if arguments.target is None else class_number(arguments.target, names, model.num_classes)
    inputs = model.tokenize(arguments.text)
    explanation = bcosification.explain(model, inputs, target, batch_size=arguments.batch_size)
    explanation.save(out)
    for i, text in enumerate(arguments.text):
        target, predicted = int(explanation.targets[i]), int(explanation.logits[i].argmax())
        note = "" if target == predicted else f" (predicted: {explanation.class_name(predicted)})"
        print(f"{text!r}: {explanation.class_name(target)}{note}\n\n{explanation.table(i)}\n")
    print(
        f"{out}: {counted(len(explanation), 'text')}, in colours in explanations.html, as bars in 0000.png and so on, "
        "numbers in explanations.json"
    )
    return 0


def random_tokens(count: int, converted):
    """What a tokenizer might give for texts of random tokens, padded to different lengths."""
    import torch

    generator = torch.Generator().manual_seed(0)
    told, length = converted.model.config, min(24, converted.config["max_tokens"])
    padding = told.pad_token_id or 0
    ids = torch.randint(0, converted.word_embeddings.num_embeddings, (count, length), generator=generator)
    ids[ids == padding] = (padding + 1) % converted.word_embeddings.num_embeddings
    lengths = torch.randint((length + 1) // 2, length + 1, (count,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    inputs = {"input_ids": torch.where(mask.bool(), ids, padding), "attention_mask": mask}
    if getattr(told, "type_vocab_size", 1) > 1:
        inputs["token_type_ids"] = (torch.arange(length) >= length // 2).long() * mask
    return inputs
