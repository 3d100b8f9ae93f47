"""B-cos networks from standard ones: convert, fine-tune, explain, measure.

    model = bcosification.bcosify(torchvision.models.resnet18(weights="DEFAULT"))
    explanation = bcosification.explain(model, images)

The names below are imported when they are first used, so that importing this package needs nothing but torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "nn": None,
    "BcosifiedCLIP": "bcosification.convert.clip",
    "BcosifiedModel": "bcosification.convert.wrapper",
    "BcosifiedText": "bcosification.convert.text",
    "DistillConfig": "bcosification.train.distillation",
    "Explanation": "bcosification.explanation.explaining",
    "FinetuneConfig": "bcosification.train.finetuning",
    "bcosify": "bcosification.convert.conversion",
    "distill": "bcosification.train.distillation",
    "evaluate": "bcosification.evaluation.accuracy",
    "evaluate_zero_shot": "bcosification.evaluation.zero_shot",
    "explain": "bcosification.explanation.explaining",
    "explanation_mode": "bcosification.nn.modes",
    "export_peer": "bcosification.convert.peer_checkpoints",
    "finetune": "bcosification.train.finetuning",
    "fuse": "bcosification.convert.peers",
    "list_pretrained": "bcosification.convert.published",
    "load": "bcosification.convert.checkpoints",
    "load_peer": "bcosification.convert.peer_checkpoints",
    "pretrained": "bcosification.convert.published",
    "reset_head": "bcosification.convert.wrapper",
    "resolve": "bcosification.convert.resolver",
    "unfuse": "bcosification.convert.peers",
    "verify": "bcosification.convert.verification",
}

__all__ = sorted(_HOMES)


_PACKAGES = ("convert", "evaluation", "explanation", "models", "train")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'bcosification' has no attribute {name!r}")
    home = _HOMES[name]
    if home is None:
        return importlib.import_module(f"{__name__}.{name}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
