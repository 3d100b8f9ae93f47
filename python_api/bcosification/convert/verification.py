"""``verify``: is a conversion exact where the mathematics says so, and do its explanations add up to the logits?"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bcosification.convert.conversion import convert
from bcosification.convert.families import family_of
from bcosification.convert.frozen_replay import frozen_replay
from bcosification.convert.linear_map import bare_model, dynamic_linear_map
from bcosification.convert.preprocessing import Preprocessing
from bcosification.convert.rules import Options, type_name
from bcosification.convert.wrapper import BcosifiedModel
from bcosification.nn.evaluation_mode import evaluation_mode

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Largest relative error ‖got − expected‖ / ‖expected‖ that passes, by dtype."""


_NOT_COMPARED = "not compared: another shape, behind the head that moved or of doubled channels"


@dataclass
class LayerReport:
    """One layer: what it was and became, calls in one forward pass, error of its output at B = 1, and the verdict."""

    name: str
    was: str
    becomes: str
    calls: int
    error: float | None
    ok: bool
    problem: str = ""


@dataclass
class Equivalence:
    """Logits of the B = 1 copy against the original's: relative error per image (largest), tolerance, verdict.

    ``differs_by`` names the options of the converted model that leave the original's function on purpose.
    """

    error: float
    tolerance: float
    ok: bool
    differs_by: list[str] = field(default_factory=list)


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


@dataclass
class Explanation:
    """W(x) of the predicted class against the frozen replay's gradient, in float64.

    error: largest relative difference of an image's weights or constant. ``problem`` says why there is none.
    """

    error: float
    tolerance: float
    ok: bool
    problem: str = ""


@dataclass
class Report:
    """What ``verify`` found. ``ok`` is all of it together; printing gives a table, ``to_dict`` JSON types."""

    ok: bool
    layers: list[LayerReport]
    equivalence: Equivalence
    completeness: Completeness
    explanation: Explanation
    weights_changed: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types (errors that are not finite as None)."""
        return _finite(asdict(self))

    def __str__(self) -> str:
        width = max([5, *(len(layer.name) for layer in self.layers)])
        lines = [f"{'layer':<{width}}  {'was':<20}  {'becomes':<24}  calls  error at B=1"]
        for layer in self.layers:
            error = "" if layer.error is None else f"{layer.error:.1e}"
            was, becomes = layer.was.rpartition(".")[2], layer.becomes.rpartition(".")[2]
            verdict = "" if layer.ok else f"  FAILED: {layer.problem}"
            if layer.ok and layer.problem:
                verdict = f"  {layer.problem}"
            lines.append(f"{layer.name:<{width}}  {was:<20}  {becomes:<24}  {layer.calls:>5}  {error:>12}{verdict}")
        e, c = self.equivalence, self.completeness
        lines.append("")
        lines.append(f"equivalence at B=1:  error {e.error:.1e}, tolerance {e.tolerance:.0e}: {_verdict(e.ok)}")
        if e.differs_by:
            lines.append(f"  the converted model differs by: {', '.join(e.differs_by)}")
        lines.append(f"completeness:        error {c.error:.1e}, tolerance {c.tolerance:.0e}: {_verdict(c.ok)}")
        x = self.explanation
        lines.append(f"explanations:        error {x.error:.1e}, tolerance {x.tolerance:.0e}: {_verdict(x.ok)}")
        if x.problem:
            lines.append(f"  {x.problem}")
        if self.weights_changed:
            lines.append(f"weights:             {len(self.weights_changed)} tensors differ from a fresh conversion")
        lines.append(f"verified: {_verdict(self.ok)}")
        return "\n".join(lines)


def _verdict(ok: bool) -> str:
    return "ok" if ok else "FAILED"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verify(original: nn.Module, converted: BcosifiedModel, images: Tensor) -> Report:
    """Check a conversion, layer by layer and end to end.

    - Equivalence: ``original`` is converted once more with b=1, biases and max pooling kept; the output of every
      converted layer and the logits have to be the original's (float64: 1e-10, float32: 1e-4, relative).
      Where moving the head before the pooling changes the function by itself (a LayerNorm stands between them), the
      outputs are compared with the head kept, and ``equivalence.differs_by`` says so.
    - Calls: a converted layer that the forward never calls is an error.
    - Completeness: in ``converted`` itself, contributions + constant have to be the logit of the predicted class, the
      constant being computed on its own.
    - Explanations: in a float64 copy of ``converted``, W(x) has to be the gradient of the frozen replay: the same
      forward pass with every scale, gate, variance and attention matrix held at its value, which knows nothing of
      explanation mode (frozen_replay.py); and that replay has to be affine.

    Args:
        original: the standard model that was converted. It may be in any mode, and is left as it is.
        converted: what ``bcosify`` made of it; fine-tuned is fine.
        images: (N, C, H, W) in [0, 1], not normalised; verify normalises them for ``original``.

    Returns:
        A report with .ok, .layers, .equivalence, .completeness, .explanation and .weights_changed.

    Raises:
        TypeError, ValueError: models that are not original and conversion of one another, images of another shape.

    Example:
        >>> network = torchvision.models.resnet18().double()
        >>> print(verify(network, bcosify(network), torch.rand(2, 3, 64, 64).double()))
    """
    original, converted = _check_models(original, converted)
    work = _work_dtype(original)
    if next(original.parameters()).dtype != work:
        original = copy.deepcopy(original).to(work)
    device = next(original.parameters()).device
    images = _check_images(images, converted).to(device, work)
    preprocessing = Preprocessing.from_dict(converted.config)
    options = Options(**converted.config["options"])
    exact = replace(
        options,
        b=1.0,
        bias="keep",
        pool="keep",
        activation="keep",
        normalize_weight=False,
        normalize_input=True,
        logit_bias=None,
        on_unknown="keep",
    )
    # Kept layers were told when ``converted`` was made; they are in the report.
    twin = convert(original, exact, preprocessing, blocks=False, warn=False)
    changed = _compare_parameters(twin, converted)

    mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    modules = dict(original.named_modules())  # families may add modules to the converted network
    names = [entry["name"] for entry in twin.conversion if entry["name"] in modules]
    with torch.no_grad(), evaluation_mode(original), evaluation_mode(twin):
        with _recorded(original, names) as expected:
            logits = original((images - mean) / std)
        with _recorded(twin.model, names) as got:
            twin_logits = twin(images)
    change, moved = None, set()
    if converted.config["head_before_pool"]:
        change = family_of(original).head_move_changes(original)
    if change is not None:
        kept = convert(original, replace(exact, head="keep"), preprocessing, blocks=False, warn=False)
        with torch.no_grad(), evaluation_mode(kept), _recorded(kept.model, names) as unmoved:
            twin_logits = kept(images)
        moved = {name for name in names if _shapes(got[name]) != _shapes(unmoved[name])}
        # Calls are judged as the converted model makes them, outputs where they are the original's.
        got = {name: unmoved[name] if len(unmoved[name]) == len(got[name]) else got[name] for name in names}
    tolerance = TOLERANCE[work]
    layers = [_judge_layer(entry, expected, got, tolerance) for entry in converted.conversion if entry["name"] in got]
    for layer in layers:
        if layer.name in moved and layer.calls == 0 and layer.was == layer.becomes:  # pooling, say
            layer.ok, layer.problem = True, "not called: the head, which moved, does without it"
        elif layer.ok and layer.name in moved:
            layer.problem = "compared with the head kept after the pooling"
    layers += _kept_layers(converted, {layer.name for layer in layers})
    if not isinstance(logits, Tensor):
        raise TypeError(f"verify: expected the models to return a tensor of logits, got {type(logits).__name__}")
    error = _error(twin_logits, logits)
    differs_by = _differences(converted) + ([] if change is None else [f"head='before_pool' ({change})"])
    equivalence = Equivalence(error, tolerance, error <= tolerance, differs_by)
    completeness = _completeness(converted, images)
    explanation = _explanation(converted, images)
    ok = equivalence.ok and completeness.ok and explanation.ok and all(layer.ok for layer in layers)
    return Report(ok, layers, equivalence, completeness, explanation, changed)


def _check_models(original: nn.Module, converted: BcosifiedModel) -> tuple[nn.Module, BcosifiedModel]:
    if not isinstance(original, nn.Module) or isinstance(original, BcosifiedModel):
        raise TypeError(f"verify: expected the standard model first, got {type(original).__name__}")
    converted = bare_model(converted)
    if not isinstance(converted, BcosifiedModel):
        raise TypeError(f"verify: expected a model made by bcosify second, got {type(converted).__name__}")
    original = bare_model(original)
    if type_name(type(original)) != converted.config["class"]:
        raise ValueError(
            f"verify: expected a conversion of {type_name(type(original))}, got one of {converted.config['class']}"
        )
    if next(original.parameters(), None) is None:
        raise ValueError("verify: expected a model with parameters, got one without")
    return original, converted


def _work_dtype(model: nn.Module) -> torch.dtype:
    """The model's own dtype if it has a tolerance, else float32 (half precision rounds more than conversions do)."""
    dtype = next(model.parameters()).dtype
    return dtype if dtype in TOLERANCE else torch.float32


def _check_images(images: Tensor, converted: BcosifiedModel) -> Tensor:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(f"verify: expected floating point images, got {getattr(images, 'dtype', type(images))}")
    if images.dim() != 4 or images.shape[1] != converted.channels or images.shape[0] == 0:
        raise ValueError(
            f"verify: expected images (N, {converted.channels}, H, W) in [0, 1], N >= 1, got {tuple(images.shape)}"
        )
    low, high = torch.aminmax(images)
    if low < -0.01 or high > 1.01:
        raise ValueError(f"verify: expected images in [0, 1], not normalised, got values from {low:.3g} to {high:.3g}")
    return images.detach()


def _compare_parameters(twin: BcosifiedModel, converted: BcosifiedModel) -> list[str]:
    """Names of tensors with other values than a fresh conversion gives; ValueError for other shapes or names."""
    fresh = twin.state_dict()
    heads = tuple(f"model.{name}." for name in (converted.config["head"], *converted.config.get("other_heads", [])))
    changed = []
    state = converted.state_dict()
    for name, value in fresh.items():  # fresh has the biases, too, which converted may have lost
        if name.startswith("model.") and name not in state and not name.endswith("bias"):
            raise ValueError(
                f"verify: expected converted to be a conversion of original, but {name} {tuple(value.shape)} of "
                "a fresh one is not in it"
            )
    for name, value in state.items():
        if name.endswith(".b"):
            continue
        if name not in fresh or (fresh[name].shape != value.shape and not name.startswith(heads)):
            got = "no such tensor" if name not in fresh else str(tuple(fresh[name].shape))
            raise ValueError(
                f"verify: expected converted to be a conversion of original, but {name} {tuple(value.shape)} "
                f"is {got} in a fresh one"
            )
        if name.endswith("num_batches_tracked"):
            continue
        expected = fresh[name].to(value.device, value.dtype)
        if expected.shape != value.shape or not torch.equal(expected, value):
            changed.append(name)
    return changed


@contextmanager
def _recorded(model: nn.Module, names: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Outputs of the named submodules, call by call, as they are returned (cloned: what follows may be in place)."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def record(name: str):
        def hook(_: nn.Module, __: tuple, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            outputs[name].append(output.detach().clone() if isinstance(output, Tensor) else output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(record(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _shapes(outputs: list[Any]) -> list[Any]:
    return [getattr(output, "shape", None) for output in outputs]


def _error(got: Tensor, expected: Tensor, channels_last: bool = False) -> float:
    """Largest relative error of an image; inf for another shape, nan for values that are not numbers."""
    if channels_last and got.dim() > expected.dim() == 2:  # a linear head before the pooling
        got = got.flatten(1, -2).mean(1)
    elif not channels_last and got.dim() == expected.dim() + 2:  # a convolution
        got = got.mean((-2, -1))
    elif got.dim() == 4 and expected.shape[2:] == (1, 1) != got.shape[2:]:  # which it was behind the pooling, too
        got = got.mean((-2, -1), keepdim=True)
    if got.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    difference = (got - expected).flatten(1).norm(dim=1)
    size = expected.flatten(1).norm(dim=1)
    return float((difference / size.clamp_min(torch.finfo(expected.dtype).tiny)).max())


def _judge_layer(
    entry: dict[str, str], expected: dict[str, list[Tensor]], got: dict[str, list[Tensor]], tolerance: float
) -> LayerReport:
    name = entry["name"]
    calls = len(got[name])
    report = LayerReport(name, entry["was"], entry["becomes"], calls, None, True)
    replaced = entry["was"] != entry["becomes"]
    if calls != len(expected[name]):
        report.ok = False
        report.problem = f"called {calls} times, in the original {len(expected[name])} times"
    elif calls == 0 and replaced:
        report.ok, report.problem = False, "a converted layer that is never called"
    elif calls:
        linear = "Linear" in entry["becomes"]
        errors = [_error(one, other, linear) for one, other in zip(got[name], expected[name], strict=True)]
        report.error = math.nan if any(map(math.isnan, errors)) else max(errors)
        if not replaced and math.inf in errors:
            report.error, report.problem = None, _NOT_COMPARED
        elif not report.error <= tolerance:
            report.ok, report.problem = False, f"output differs at B=1 (tolerance {tolerance:.0e})"
        elif "MaxPool" in entry["was"] and replaced:
            report.problem = "compared with max pooling kept"
    return report


def _kept_layers(converted: BcosifiedModel, known: set[str]) -> list[LayerReport]:
    """Layers that no rule was applied to (on_unknown="keep")."""
    return [
        LayerReport(name, kind, kind, 0, None, True, f"kept without a rule: {reason}")
        for name, kind, reason in ((e["name"], e["type"], e["reason"]) for e in converted.config.get("kept", []))
        if name not in known
    ]


def _differences(converted: BcosifiedModel) -> list[str]:
    options = converted.config["options"]
    found = []
    if options["b"] != 1:
        found.append(f"b={options['b']:g}")
    exact = {"bias": "keep", "activation": "keep", "normalize_weight": False, "normalize_input": True}
    for name, value in exact.items():
        if options[name] != value:
            found.append(f"{name}={options[name]!r}")
    if any("MaxPool" in entry["was"] and entry["was"] != entry["becomes"] for entry in converted.conversion):
        found.append("average pooling")
    if converted.config["logit_bias"] is not None:
        found.append(f"logit bias {converted.config['logit_bias']:.4g}")
    return found


def _completeness(converted: BcosifiedModel, images: Tensor) -> Completeness:
    parameter = next(converted.parameters())
    model = converted
    if parameter.dtype not in TOLERANCE:
        model = copy.deepcopy(converted).float()
    dtype = next(model.parameters()).dtype
    tolerance = TOLERANCE[dtype]
    with evaluation_mode(model):
        x6 = model.encode(images.to(parameter.device, dtype))
        logits, weights, constant = dynamic_linear_map(model, x6)
    chosen = logits.amax(1)
    parts = (x6 * weights).double()
    total, size = parts.sum((1, 2, 3)), parts.abs().sum((1, 2, 3)) + constant.double().abs()
    error = float(((total + constant.double() - chosen.double()).abs() / size.clamp_min(1e-300)).max())
    return Completeness(error, tolerance, error <= tolerance, chosen.tolist(), total.tolist(), constant.tolist())


def _explanation(converted: BcosifiedModel, images: Tensor) -> Explanation:
    tolerance = 1e-8
    model = copy.deepcopy(converted).double().eval()
    x6 = model.encode(images.to(next(model.parameters()).device, torch.float64))
    try:
        replay = frozen_replay(model, x6)
        logits, weights, constant = dynamic_linear_map(model, x6)
        targets = logits.argmax(1)
        expected, rest = replay.gradient(targets), replay.constant(targets)
        affine = replay.is_affine()
    except (NotImplementedError, RuntimeError) as error:
        return Explanation(math.inf, tolerance, False, f"the forward pass cannot be replayed: {error}")
    pairs = ((weights.flatten(1), expected.flatten(1)), (constant[:, None], rest[:, None]))
    error = max(_error(got, wanted) if wanted.any() else float(got.abs().max()) for got, wanted in pairs)
    problem = "" if affine else "the network is not affine with its scales, gates and attention held"
    return Explanation(error, tolerance, affine and error <= tolerance, problem)
