"""What ``verify`` returns: its parts, as a table in the terminal, as JSON types and as a page."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bcosification.json_files import finite
from bcosification.weights_files import shortened

__all__ = ["Completeness", "Difference", "Equivalence", "Explanation", "LayerReport", "PreprocessingCheck", "Report"]


@dataclass
class LayerReport:
    """One layer: what it was and became, calls in one forward pass, error of its output at B = 1, and the verdict.

    error: largest relative error of an image, ‖got − expected‖ / ‖expected‖, in the model's dtype; error_float64: the
    same in float64. largest: the largest difference of one element, relative to the largest element of the output.
    """

    name: str
    was: str
    becomes: str
    calls: int
    error: float | None
    ok: bool
    problem: str = ""
    error_float64: float | None = None
    largest: float | None = None


@dataclass
class Difference:
    """An option of the converted model that leaves the original's function on purpose.

    what: the option; why: how it changes the function; change: relative change of the logits by this option alone.
    """

    what: str
    why: str
    change: float


@dataclass
class Equivalence:
    """Logits of the B = 1 copy against the original's: relative error per image (largest), tolerance, verdict.

    ``differences``: what the converted model does otherwise, and why. ``error_float64``, ``tolerance_float64``: the
    same comparison in float64, where the model's own dtype is another.
    """

    error: float
    tolerance: float
    ok: bool
    differences: list[Difference] = field(default_factory=list)
    error_float64: float | None = None
    tolerance_float64: float | None = None

    @property
    def differs_by(self) -> list[str]:
        """The options that leave the original's function on purpose, by name."""
        return [difference.what for difference in self.differences]


@dataclass
class PreprocessingCheck:
    """Images as the original's own preprocessing makes them against those that the converted model makes inside.

    error: the largest difference of a normalised value.
    """

    error: float
    tolerance: float
    ok: bool


@dataclass
class Completeness:
    """Contributions + constant against the logit of the predicted class, per image.

    error: largest |contributions + constant − logit| relative to Σ|contributions| + |constant|.
    """

    error: float
    tolerance: float
    ok: bool
    logits: list[float] = field(default_factory=list)
    contributions: list[float] = field(default_factory=list)
    constants: list[float] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The largest |contributions| of an image relative to |contributions| + |constant|. Where it is as small as the
        tolerance, the check holds whatever the contributions are: the constant is the logit (untrained networks)."""
        parts = [(abs(c), abs(rest)) for c, rest in zip(self.contributions, self.constants, strict=True)]
        return max((c / (c + rest) if c + rest else 0.0 for c, rest in parts), default=0.0)


@dataclass
class Explanation:
    """W(x) of the predicted class against the frozen replay's gradient, in float64.

    error: largest relative difference of an image's weights or constant; largest: the largest difference of one element
    of W(x), relative to the image's largest. ``problem`` says why there is none. held: how many values of each kind
    (scale, relu, gelu, variance, attention, …) the replay holds constant. zero: W(x) is 0 everywhere, in both.
    """

    error: float
    tolerance: float
    ok: bool
    problem: str = ""
    largest: float = math.inf
    held: dict[str, int] = field(default_factory=dict)
    zero: bool = False


@dataclass
class Report:
    """What ``verify`` found. ``ok`` is all of it together; printing gives a table, ``to_dict`` JSON types.

    never_called: converted layers that the forward pass does not call. biases: those that the converted model has left.
    without_rule: layers that were kept as they are for want of a rule. weights_changed: tensors with other values than
    a fresh conversion gives. preprocessing: None where the original's own was not given. about: what was compared.
    """

    ok: bool
    layers: list[LayerReport]
    equivalence: Equivalence
    completeness: Completeness
    explanation: Explanation
    weights_changed: list[str] = field(default_factory=list)
    never_called: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)
    without_rule: list[str] = field(default_factory=list)
    preprocessing: PreprocessingCheck | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types (errors that are not finite as None)."""
        return finite(asdict(self))

    def to_html(self) -> str:
        """The report as one HTML page that needs nothing else."""
        from bcosification.convert.verification_page import page

        return page(self)

    def save(self, *, json: str | os.PathLike | None = None, html: str | os.PathLike | None = None) -> None:
        """Write the report into files: ``to_dict`` as JSON, ``to_html``."""
        import json as library

        if json is not None:
            Path(json).write_text(library.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        if html is not None:
            Path(html).write_text(self.to_html(), encoding="utf-8")

    def __str__(self) -> str:
        width = max([5, *(len(layer.name) for layer in self.layers)])
        double = self.equivalence.error_float64 is not None
        more = f"  {'in float64':>12}" if double else ""
        lines = [f"{'layer':<{width}}  {'was':<20}  {'becomes':<24}  calls  error at B=1{more}"]
        for layer in self.layers:
            errors = [layer.error, layer.error_float64] if double else [layer.error]
            told = "  ".join(f"{'' if error is None else f'{error:.1e}':>12}" for error in errors)
            was, becomes = layer.was.rpartition(".")[2], layer.becomes.rpartition(".")[2]
            verdict = "" if layer.ok else f"  FAILED: {layer.problem}"
            if layer.ok and layer.problem:
                verdict = f"  {layer.problem}"
            lines.append(f"{layer.name:<{width}}  {was:<20}  {becomes:<24}  {layer.calls:>5}  {told}{verdict}".rstrip())
        lines.append("")
        lines += [f"{check + ':':<20} {told}: {_verdict(ok)}" for check, told, ok in self.checks()]
        if self.equivalence.differences:
            lines.append("  the converted model differs by (change of the logits, each alone):")
            lines += [f"    {d.what}: {d.why} ({d.change:.1e})" for d in self.equivalence.differences]
        if self.explanation.held:
            held = ", ".join(f"{count} {kind}" for kind, count in self.explanation.held.items())
            lines.append(f"  held constant by the replay: {held}")
        if self.explanation.problem:
            lines.append(f"  {self.explanation.problem}")
        for what, names in self.listed():
            lines.append(f"{what + ':':<20} {shortened(names) if names else 'none'}")
        if self.weights_changed:
            lines.append(f"weights:             {len(self.weights_changed)} tensors differ from a fresh conversion")
        lines.append(f"verified: {_verdict(self.ok)}")
        return "\n".join(lines)

    def checks(self) -> list[tuple[str, str, bool]]:
        """The checks that ``ok`` is made of besides the layers: name, error and tolerance in words, verdict."""
        e, c, x = self.equivalence, self.completeness, self.explanation
        told = f"error {e.error:.1e}, tolerance {e.tolerance:.0e}"
        if e.error_float64 is not None:
            told += f"; in float64 {e.error_float64:.1e}, tolerance {e.tolerance_float64:.0e}"
        found = [("equivalence at B=1", told, e.ok)]
        if self.preprocessing is not None:
            p = self.preprocessing
            found.append(("preprocessing", f"error {p.error:.1e}, tolerance {p.tolerance:.0e}", p.ok))
        told = f"error {c.error:.1e}, tolerance {c.tolerance:.0e}"
        if c.share <= c.tolerance:
            told += f", which says little: contributions are {c.share:.1e} of the logits (untrained weights?)"
        found.append(("completeness", told, c.ok))
        told = f"error {x.error:.1e}, of one element {x.largest:.1e}, tolerance {x.tolerance:.0e}"
        if x.zero:
            told += "; W(x) is 0 everywhere, there is nothing to compare (untrained weights?)"
        return [*found, ("explanations", told, x.ok)]

    def listed(self) -> list[tuple[str, list[str]]]:
        """What was looked for in the model, and the names of what was found."""
        return [
            ("never called", self.never_called),
            ("without a rule", self.without_rule),
            ("biases left", self.biases),
        ]


def _verdict(ok: bool) -> str:
    return "ok" if ok else "FAILED"
