"""What every family converts, and the proof: `verify` on a small model of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from bcosification.convert.conversion import bcosify
from bcosification.convert.families import FAMILIES, Family
from bcosification.convert.families.base import enlarged
from bcosification.convert.verification import verify
from bcosification.names import did_you_mean, meant

__all__ = ["FamilyReport", "family_reports", "randomized"]


@dataclass
class FamilyReport:
    """A family in words, and what `verify` said of its example.

    Attributes:
        name, title, converts, keeps, cannot: the family's own.
        classes: dotted names of the models' classes.
        ok: whether every check holds; None: not checked. problem: why there is no check, or what failed.
        equivalence: error of the logits at B = 1, biases kept, in float64 (relative); completeness, explanation: as in
            ``verify``'s report. All None without a check.
        contributions: the smallest |Σ contributions| of an image: what of it reaches the logit, past the constant.
        layers: B-cos layers of the example. parameters: of the example.
    """

    name: str
    title: str
    classes: list[str]
    converts: str
    keeps: str
    cannot: str
    ok: bool | None = None
    problem: str = ""
    equivalence: float | None = None
    completeness: float | None = None
    explanation: float | None = None
    contributions: float | None = None
    layers: int | None = None
    parameters: int | None = None
    differs_by: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def family_reports(names: Sequence[str] = (), *, check: bool = False) -> list[FamilyReport]:
    """All families, the generic one last.

    Args:
        names: those of these names only, or whose names or titles have one of these in them; default: all.
        check: convert the example of each (random weights, float64) and verify it; seconds.

    Raises:
        ValueError: an unknown name.
    """
    families: dict[str, tuple[Family, list[str]]] = {}
    for class_name, family in FAMILIES.items():
        families.setdefault(family.name, (family, []))[1].append(class_name)
    ordered = {name: families[name] for name in sorted(families)}
    ordered[Family.name] = (Family(), [])
    called = {name: f"{name} {family.title}".lower() for name, (family, _) in ordered.items()}
    found = {name: [name] if name in ordered else [n for n in ordered if name.lower() in called[n]] for name in names}
    chosen = {name for several in found.values() for name in several} or set(ordered)
    unknown = [name for name, several in found.items() if not several]
    if unknown:
        near = did_you_mean(name for one in unknown for name in meant(one, ordered, most=2))
        raise ValueError(
            f"families: expected names among the {len(ordered)} that `bcosify families` lists, got "
            f"{', '.join(unknown)}{near}"
        )
    reports = []
    for name, (family, classes) in ordered.items():
        if name in chosen:
            told = {key: getattr(family, key) for key in ("title", "converts", "keeps", "cannot")}
            report = FamilyReport(name, classes=classes, **told)
            if check:
                _check(family, report)
            reports.append(report)
    return reports


def _check(family: Family, report: FamilyReport) -> None:
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = family.example()
            model = None if model is None else randomized(model)
    except ImportError as error:
        report.problem = f"not checked: {error}"
        return
    if model is None:
        report.problem = "not checked: the family has no example"
        return
    report.parameters = sum(parameter.numel() for parameter in model.parameters())
    try:
        converted = bcosify(model, **family.example_options)
        found = verify(model, converted, family.example_inputs(model))
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        report.ok, report.problem = False, str(error)
        return
    report.ok = found.ok
    report.equivalence, report.completeness = found.equivalence.error, found.completeness.error
    report.explanation = max(found.explanation.error, found.explanation.largest)
    report.contributions = min(map(abs, found.completeness.contributions))
    report.layers = sum("Bcos" in entry["becomes"] for entry in converted.conversion)
    report.differs_by = found.equivalence.differs_by
    if not found.ok:
        failed = [f"{layer.name}: {layer.problem}" for layer in found.layers if not layer.ok]
        failed += [f"{what}: {told}" for what, told, ok in found.checks() if not ok]
        report.problem = "; ".join(failed) or "biases left"


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in float64 and eval mode, with parameters and statistics in which a mistake shows, in place.

    Norms start as 1 and 0, biases as 0 or near it, layer scales at 1e-6: a conversion that forgot one of them would
    give the same logits. Afterwards all of them are something else, and weights are of a size at which a B = 2 network
    passes its signal on. Draws weights from torch's generator, the rest from one of its own with this seed.
    """
    generator = torch.Generator().manual_seed(seed)
    model = enlarged(model.double().eval())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_scale" in name or name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif parameter.dim() <= 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3, generator=generator))
            elif not _is_weight(model, name):  # positions, tokens, biases of attention
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.3, generator=generator))
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def _is_weight(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), (nn.Conv2d, nn.Linear))
