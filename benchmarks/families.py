"""Which of timm's models convert: ``python -m benchmarks.families [GLOB ...]`` writes results/timm_models.json.

Every model of the globs (default: all of timm's names, those of the globs that people bring most counted apart) is
built on the meta device and converted with the default options, which takes no memory for weights and a third of a
second each. Without globs, registered architectures of the most used families are verified besides, at their own depth
and width, on small images: the conversion at B = 1 against the original, contributions against logits, and W(x) against
the frozen replay. Their weights are random, and stirred so that no block is silent and the signal does not die out.
Small networks of all classes are tested so in tests/bcosification/convert/families/.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from bcosification import bcosify, explain, verify
from bcosification.convert.survey import TIMM_GLOBS, SurveyRow, summary, survey
from bcosification.evaluation.measuring import machine
from benchmarks.protocol import commit, results_folder

# timm's name -> (arguments of create_model, image size)
SAMPLE: dict[str, tuple[dict[str, Any], int]] = {
    "resnet50": ({}, 64),
    "resnetrs50": ({}, 64),
    "resnext50d_32x4d": ({}, 64),
    "resnetv2_50x1_bit": ({}, 64),
    "resnet50_clip": ({"img_size": 64}, 64),
    "vit_tiny_patch16_224": ({"img_size": 64}, 64),
    "vit_base_patch16_siglip_224": ({"img_size": 32}, 32),
    "vit_small_patch14_reg4_dinov2": ({"img_size": 56}, 56),
    "vit_small_patch16_dinov3": ({"img_size": 64}, 64),
    "vit_small_r26_s32_224": ({"img_size": 64}, 64),
    "vit_relpos_small_patch16_224": ({"img_size": 64}, 64),
    "deit3_small_patch16_224": ({"img_size": 64}, 64),
    "deit_tiny_distilled_patch16_224": ({"img_size": 64}, 64),
    "convnext_tiny": ({}, 64),
    "convnextv2_atto": ({}, 64),
    "swin_tiny_patch4_window7_224": ({"img_size": 56}, 56),
    "swinv2_tiny_window8_256": ({"img_size": 64}, 64),
    "swinv2_cr_tiny_ns_224": ({"img_size": 64}, 64),
    "efficientnet_b0": ({}, 64),
    "efficientnetv2_s": ({}, 64),
    "mobilenetv3_large_100": ({}, 64),
    "mixer_s32_224": ({"img_size": 64}, 64),
}


def stirred(network: nn.Module) -> nn.Module:
    """No parameter at 0 or 1 where initialisations put it, statistics as if from data; float64, eval mode."""
    network = network.double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.rpartition(".")[2] in ("gamma", "gamma_1", "gamma_2"):  # layer scales
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3, generator=generator))
            elif float(parameter.std()) == 0:
                parameter.normal_(0, 0.1, generator=generator)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.05, 0.2, generator=generator)
    return network


def verified(name: str) -> dict[str, Any]:
    """Errors of one registered architecture, in float64."""
    import timm

    arguments, size = SAMPLE[name]
    torch.manual_seed(0)
    network = stirred(timm.create_model(name, **arguments))
    converted, images = bcosify(network), torch.rand(1, 3, size, size, dtype=torch.float64)
    report = verify(network, converted, images)
    largest = float(explain(converted, images).weights.abs().max())
    row = {
        "name": name,
        "size": size,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "ok": report.ok and 0 < largest < math.inf,
        "equivalence_error": float(f"{report.equivalence.error:.1e}"),
        "completeness_error": float(f"{report.completeness.error:.1e}"),
        "explanation_error": float(f"{report.explanation.error:.1e}"),
        "largest_weight": float(f"{largest:.1e}"),
    }
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def write(rows: Sequence[SurveyRow], checked: Sequence[dict[str, Any]]) -> None:
    """Rows and where they are from, one line each, into timm_models.json of the results."""
    run = {**machine(), "timm": version("timm"), "commit": commit()}
    surveyed = [{key: value for key, value in row.to_dict().items() if value != ""} for row in rows]
    parts = [",\n  ".join(json.dumps(row) for row in part) for part in (surveyed, checked)]
    text = f'{{"run": {json.dumps(run)},\n "rows": [\n  {parts[0]}\n ],\n "verified": [\n  {parts[1]}\n ]}}\n'
    folder = results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "timm_models.json").write_text(text, encoding="utf-8")


def main(patterns: Sequence[str]) -> int:
    rows = survey(patterns or (*TIMM_GLOBS, "*"))
    print(summary(rows))
    checked = [] if patterns else [verified(name) for name in SAMPLE]
    write(rows, checked)
    return 0 if all(row["ok"] for row in checked) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
