"""``verify``: is a conversion exact where the mathematics says so, and do its explanations add up to the logits?"""

from __future__ import annotations

import copy
import datetime
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bcosification.convert.clip import BcosifiedCLIP
from bcosification.convert.conversion import convert
from bcosification.convert.families import family_of
from bcosification.convert.frozen_replay import frozen_replay
from bcosification.convert.linear_map import bare_model, dynamic_linear_map
from bcosification.convert.preprocessing import Preprocessing
from bcosification.convert.rules import Options, biases, type_name
from bcosification.convert.text import BcosifiedText
from bcosification.convert.verification_report import (
    Completeness,
    Difference,
    Equivalence,
    Explanation,
    LayerReport,
    PreprocessingCheck,
    Report,
)
from bcosification.convert.wrapper import BcosifiedModel
from bcosification.nn.evaluation_mode import evaluation_mode

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Largest relative error ‖got − expected‖ / ‖expected‖ that passes, by dtype."""
PREPROCESSING_TOLERANCE = 1e-4
"""Of normalised images: float32, so that 1e-6 is rounding."""


_NOT_COMPARED = "not compared: another shape, behind the head that moved or of doubled channels"


Inputs = Tensor | Mapping[str, Tensor]
"""Images (N, C, H, W), or what a tokenizer gives: input_ids (N, T) and so on."""


def verify(
    original: nn.Module, converted: BcosifiedModel, images: Inputs, *, normalized: Tensor | None = None
) -> Report:
    """Check a conversion, layer by layer and end to end.

    - Equivalence: ``original`` is converted once more with b=1, biases and max pooling kept; the output of every
      converted layer and the logits have to be the original's, in its own dtype and in float64 (float64: 1e-10,
      float32: 1e-4, relative). Where moving the head before the pooling changes the function by itself (a LayerNorm
      stands between them), the outputs are compared with the head kept. ``equivalence.differences`` tells what the
      converted model does otherwise on purpose, and how much each of these changes the logits. An original is compared
      without what every conversion drops (CLIP's attention pooling: positional embedding and biases).
    - Calls: a converted layer that the forward never calls is an error, in that copy and in ``converted`` itself; so is
      a layer of ``converted`` that is no longer what the conversion made of it.
    - Biases: a model that was converted with bias="remove" and has some is an error.
    - Completeness: in ``converted`` itself, contributions + constant have to be the logit of the predicted class, the
      constant being computed on its own.
    - Explanations: in a float64 copy of ``converted``, W(x) has to be the gradient of the frozen replay: the same
      forward pass with every scale, gate, variance and attention matrix held at its value, which knows nothing of
      explanation mode (frozen_replay.py); and that replay has to be affine.
    - Of CLIP's image towers, what is explained are the cosines with four fixed directions. Of classifiers of texts, W
      is a map of the words' embeddings.

    Args:
        original: the standard model that was converted. It may be in any mode, and is left as it is.
        converted: what ``bcosify`` made of it; fine-tuned is fine.
        images: (N, C, H, W) in [0, 1], not normalised; verify normalises them for ``original``. Of a classifier of
            texts: what its tokenizer returns, a mapping with input_ids (N, T).
        normalized: the same images as ``original``'s own preprocessing makes them, (N, C, H, W). They have to be what
            the converted model makes of ``images`` inside, and are what ``original`` is given in float32. Default:
            none, and ``converted``'s mean and std are believed.

    Returns:
        A report with .ok, .layers, .equivalence, .completeness, .explanation, .preprocessing, .never_called, .biases,
        .without_rule and .weights_changed.

    Raises:
        TypeError, ValueError: models that are not original and conversion of one another, images of another shape.

    Example:
        >>> network = torchvision.models.resnet18().double()
        >>> print(verify(network, bcosify(network), torch.rand(2, 3, 64, 64).double()))
    """
    original, converted = _check_models(original, converted)
    of_text = isinstance(converted, BcosifiedText)
    images = converted.checked_inputs(images) if of_text else _check_images(images, converted)
    if of_text and normalized is not None:
        raise ValueError("verify: expected no normalized= with a classifier of texts, which reads tokens")
    if normalized is not None and (not isinstance(normalized, Tensor) or normalized.shape != images.shape):
        got = tuple(normalized.shape) if isinstance(normalized, Tensor) else type(normalized).__name__
        raise ValueError(f"verify: expected normalized= to be images {tuple(images.shape)}, got {got}")
    work = _work_dtype(original)
    images = _moved(images, next(original.parameters()).device)
    with _Float64Throughout():
        layers, equivalence, changed = _compare(original, converted, images, work, normalized)
        if work != torch.float64:
            doubled, double, _ = _compare(original, converted, images, torch.float64, None)
    if work != torch.float64:
        equivalence.error_float64, equivalence.tolerance_float64 = double.error, double.tolerance
        equivalence.ok = equivalence.ok and double.ok
        for layer, other in zip(layers, doubled, strict=True):
            layer.error_float64 = other.error
            if layer.ok and not other.ok:
                layer.ok, layer.problem = False, f"in float64: {other.problem}"
    _judge_converted(converted, images, layers)
    preprocessing = None if normalized is None else _preprocessing(converted, images, normalized)
    completeness = _completeness(converted, images if of_text else images.to(work))
    explanation = _explanation(converted, images)
    left = [f"model.{name}" for name in biases(converted.model)]
    checks = [equivalence, completeness, explanation, *layers, *([] if preprocessing is None else [preprocessing])]
    ok = all(check.ok for check in checks) and not (left and converted.config["options"]["bias"] == "remove")
    return Report(
        ok,
        layers,
        equivalence,
        completeness,
        explanation,
        changed,
        never_called=[layer.name for layer in layers if layer.calls == 0 and layer.was != layer.becomes],
        biases=left,
        without_rule=[entry["name"] for entry in converted.config.get("kept", [])],
        preprocessing=preprocessing,
        about=_about(converted, images, work),
    )


def _about(converted: BcosifiedModel, images: Inputs, work: torch.dtype) -> dict[str, Any]:
    config = converted.config
    options = {name: value for name, value in config["options"].items() if name not in ("logit_bias", "on_unknown")}
    what, first = ("images", images) if isinstance(images, Tensor) else ("tokens", images["input_ids"])
    return {
        "class": config["class"],
        "family": config["family"],
        "source": config.get("source"),
        "weights": config.get("source_weights"),
        "options": {**options, "logit_bias": config["logit_bias"]},
        what: list(first.shape),
        "dtype": str(work).removeprefix("torch."),
        "device": first.device.type,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


class _Float64Throughout(TorchFunctionMode):
    """Norms that a library computes in float32 whatever the type is (``x.float()``) keep float64: else the rounding of
    their inputs, which differs by the last bit, would be the error of a comparison in float64."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def _compare(
    original: nn.Module, converted: BcosifiedModel, images: Inputs, work: torch.dtype, normalized: Tensor | None
) -> tuple[list[LayerReport], Equivalence, list[str]]:
    """The original and its conversion at B = 1 in the dtype ``work``: layers, logits, and changed weights."""
    if next(original.parameters()).dtype != work:
        original = copy.deepcopy(original).to(work)
    preprocessing = None if isinstance(converted, BcosifiedText) else Preprocessing.from_dict(converted.config)
    if preprocessing is None:
        inputs: Inputs = images
    else:
        images = images.to(work)
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
        inputs = (images - mean) / std
        if normalized is not None and work == torch.float32:  # in float64, its float32 would be the largest error
            inputs = normalized.to(inputs)
    exact = replace(
        Options(**converted.config["options"]),
        b=1.0,
        bias="keep",
        pool="keep",
        activation="keep",
        normalize_weight=False,
        normalize_input=True,
        logit_bias=None,
        on_unknown="keep",
    )

    def variant(**options: Any) -> BcosifiedModel:
        # Kept layers were told when ``converted`` was made; they are in the report.
        return convert(original, replace(exact, **options), preprocessing, blocks=False, warn=False)

    def logits_of(model: BcosifiedModel) -> Tensor:
        with torch.no_grad(), evaluation_mode(model):
            return _called(model, images) if preprocessing is not None else _called(model, images).logits

    twin = variant()
    changed = _compare_parameters(twin, converted)
    family = family_of(original)
    reference, left_out = family.comparable(original)
    modules = dict(original.named_modules())  # families may add modules to the converted network
    names = [entry["name"] for entry in twin.conversion if entry["name"] in modules]
    added = [entry["name"] for entry in twin.conversion if entry["name"] not in modules]
    with torch.no_grad(), evaluation_mode(reference), _recorded(reference, names) as expected:
        logits = family.output(_called(reference, inputs))
    if not isinstance(logits, Tensor):
        raise TypeError(f"verify: expected the models to return a tensor of logits, got {type(logits).__name__}")
    with _recorded(twin.model, names) as got, _recorded(twin.model, added) as of_added:
        twin_logits = logits_of(twin)
    differences: list[Difference] = []
    if left_out is not None:
        with torch.no_grad(), evaluation_mode(original):
            change = _error(logits, family.output(_called(original, inputs)))
        differences.append(Difference(left_out, "conversions drop it", change))
    reason, moved = None, set()
    if converted.config["head_before_pool"]:
        reason = family.head_move_changes(original)
    if reason is not None:
        kept = variant(head="keep")
        with _recorded(kept.model, names) as unmoved:
            kept_logits = logits_of(kept)
        moved = {name for name in names if _shapes(got[name]) != _shapes(unmoved[name])}
        # Calls are judged as the converted model makes them, outputs where they are the original's.
        got = {name: unmoved[name] if len(unmoved[name]) == len(got[name]) else got[name] for name in names}
        what, why = f"head='before_pool' ({reason})", "moving the head is another function by itself"
        differences.append(Difference(what, why, _error(twin_logits, kept_logits)))
        twin_logits = kept_logits
    tolerance = TOLERANCE[work]
    layers = [_judge_layer(entry, expected, got, tolerance) for entry in converted.conversion if entry["name"] in got]
    for layer in layers:
        if layer.name in moved and layer.calls == 0 and layer.was == layer.becomes:  # pooling, say
            layer.ok, layer.problem = True, "not called: the head, which moved, does without it"
        elif layer.ok and layer.name in moved:
            layer.problem = "compared with the head kept after the pooling"
    layers += [_judge_added(entry, of_added) for entry in converted.conversion if entry["name"] in of_added
               and entry["was"] != entry["becomes"]]  # fmt: skip
    layers += _kept_layers(converted, {layer.name for layer in layers})
    error = _error(twin_logits, logits)
    head = exact.head if reason is None else "keep"
    for what, why, options in _differing(converted):
        change = _error(logits_of(variant(**{"head": head, **options})), twin_logits)
        differences.append(Difference(what, why, change))
    return layers, Equivalence(error, tolerance, error <= tolerance, differences), changed


def _called(model: nn.Module, inputs: Inputs) -> Any:
    return model(inputs) if isinstance(inputs, Tensor) else model(**inputs)


def _moved(inputs: Inputs, device: torch.device) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return {name: value.to(device) for name, value in inputs.items()}


def _preprocessing(converted: BcosifiedModel, images: Tensor, normalized: Tensor) -> PreprocessingCheck:
    """The original's own normalised images against (images - mean) / std."""
    known = Preprocessing.from_dict(converted.config)
    mean, std = (images.new_tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (known.mean, known.std))
    ours = (images.double() - mean) / std
    error = float((normalized.to(ours) - ours).abs().max())
    return PreprocessingCheck(error, PREPROCESSING_TOLERANCE, error <= PREPROCESSING_TOLERANCE)


def _check_models(original: nn.Module, converted: BcosifiedModel) -> tuple[nn.Module, BcosifiedModel]:
    if not isinstance(original, nn.Module) or isinstance(original, BcosifiedModel):
        raise TypeError(f"verify: expected the standard model first, got {type(original).__name__}")
    converted = bare_model(converted)
    if not isinstance(converted, BcosifiedModel):
        raise TypeError(f"verify: expected a model made by bcosify second, got {type(converted).__name__}")
    original = bare_model(original)
    original = family_of(original).tower(original)
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
    if list(images.shape[-2:]) != converted.config.get("input_size"):
        like = next(converted.parameters())
        with torch.no_grad(), evaluation_mode(converted):
            converted(images[:1].to(like))  # which tells of a size that is not taken
    return images.detach()


def _compare_parameters(twin: BcosifiedModel, converted: BcosifiedModel) -> list[str]:
    """Names of tensors with other values than a fresh conversion gives; ValueError for other shapes or names."""
    fresh = twin.state_dict()
    heads = tuple(f"model.{name}." for name in (converted.config["head"], *converted.config.get("other_heads", [])))
    changed = []
    state = {name: value for name, value in converted.state_dict().items() if name.startswith("model.")}
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


def _behind_pooling(got: Tensor, expected: Tensor, channels_last: bool) -> Tensor:
    """The mean over positions of what a layer gave that the original runs behind the pooling, else ``got``."""
    if channels_last and got.dim() > expected.dim() == 2:  # a linear head before the pooling
        return got.flatten(1, -2).mean(1)
    if not channels_last and got.dim() == expected.dim() + 2:  # a convolution
        return got.mean((-2, -1))
    if got.dim() == 4 and expected.shape[2:] == (1, 1) != got.shape[2:]:  # which it was behind the pooling, too
        return got.mean((-2, -1), keepdim=True)
    return got


def _error(got: Tensor, expected: Tensor) -> float:
    """Largest relative error of an image; inf for another shape, nan for values that are not numbers."""
    if got.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    difference = (got - expected).flatten(1).norm(dim=1)
    size = expected.flatten(1).norm(dim=1)
    return float((difference / size.clamp_min(torch.finfo(expected.dtype).tiny)).max())


def _largest(got: Tensor, expected: Tensor) -> float:
    """Largest difference of one element, relative to the largest element of an image; inf for another shape."""
    if got.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    size = expected.flatten(1).abs().amax(1).clamp_min(torch.finfo(expected.dtype).tiny)
    return float(((got - expected).flatten(1).abs().amax(1) / size).max())


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
        pairs = zip(got[name], expected[name], strict=True)
        pairs = [(_behind_pooling(one, other, linear), other) for one, other in pairs]
        errors, largest = ([measure(*pair) for pair in pairs] for measure in (_error, _largest))
        report.error, report.largest = (math.nan if any(map(math.isnan, e)) else max(e) for e in (errors, largest))
        if not replaced and math.inf in errors:
            report.error, report.largest, report.problem = None, None, _NOT_COMPARED
        elif not report.error <= tolerance:
            report.ok, report.problem = False, f"output differs at B=1 (tolerance {tolerance:.0e})"
        elif "MaxPool" in entry["was"] and replaced:
            report.problem = "compared with max pooling kept"
    return report


def _judge_added(entry: dict[str, str], got: dict[str, list[Tensor]]) -> LayerReport:
    """A layer that the original has no module for (a bare matrix, a function): its calls are all there is to check."""
    calls = len(got[entry["name"]])
    ok = calls > 0 or entry["was"] == entry["becomes"]
    problem = "no layer of the original's" if ok else "a converted layer that is never called"
    return LayerReport(entry["name"], entry["was"], entry["becomes"], calls, None, ok, problem)


def _judge_converted(converted: BcosifiedModel, inputs: Inputs, layers: list[LayerReport]) -> None:
    """What only ``converted`` itself can tell: that its layers are those that the conversion made, and are called."""
    modules = dict(converted.model.named_modules())
    replaced = [layer for layer in layers if layer.was != layer.becomes and layer.name in modules]
    parameter = next(converted.parameters())
    if isinstance(inputs, Tensor):
        inputs = inputs.to(parameter.device, parameter.dtype)
    names = [layer.name for layer in replaced]
    with torch.no_grad(), evaluation_mode(converted), _recorded(converted.model, names) as got:
        _called(converted, inputs)
    for layer in replaced:
        found = type_name(type(modules[layer.name]))
        if layer.ok and found != layer.becomes:
            layer.ok, layer.problem = False, f"is {found} in the converted model, of another type than it was made"
        elif layer.ok and layer.calls and not got[layer.name]:
            layer.ok, layer.calls, layer.problem = False, 0, "a converted layer that the converted model never calls"


def _kept_layers(converted: BcosifiedModel, known: set[str]) -> list[LayerReport]:
    """Layers that no rule was applied to (on_unknown="keep")."""
    return [
        LayerReport(name, kind, kind, 0, None, True, f"kept without a rule: {reason}")
        for name, kind, reason in ((e["name"], e["type"], e["reason"]) for e in converted.config.get("kept", []))
        if name not in known
    ]


_WHY = {
    "b": "B-cos layers scale their outputs by |cos|^(B - 1)",
    "bias": {
        "remove": "layers and norms have no biases",
        "decay": "biases are to be decayed; they are there now",
    },
    "activation": "no ReLU or GELU between the layers",
    "normalize_weight": "weights are divided by their norms",
    "normalize_input": "images are not normalised",
}
_EXACT = {"b": 1, "bias": "keep", "activation": "keep", "normalize_weight": False, "normalize_input": True}


def _differing(converted: BcosifiedModel) -> list[tuple[str, str, dict[str, Any]]]:
    """What leaves the original's function on purpose: the option, why, and the option alone for ``convert``."""
    options = converted.config["options"]
    found = []
    for name, value in _EXACT.items():
        if name == "normalize_input" and isinstance(converted, BcosifiedText):
            continue  # there is none
        if options[name] != value:
            told = f"{name}={options[name]:g}" if name == "b" else f"{name}={options[name]!r}"
            why = _WHY[name] if isinstance(_WHY[name], str) else _WHY[name][options[name]]
            found.append((told, why, {name: options[name]}))
    if any("MaxPool" in entry["was"] and entry["was"] != entry["becomes"] for entry in converted.conversion):
        found.append(("average pooling", "max pooling became average pooling", {"pool": "average"}))
    bias = converted.config["logit_bias"]
    if bias:  # of two classes it is 0
        found.append((f"logit bias {bias:.4g}", "a constant is added to all logits", {"logit_bias": bias}))
    return found


def _explained(model: BcosifiedModel, inputs: Inputs) -> tuple[nn.Module, Tensor]:
    """A function to logits, and its argument: the model and encoded images; of an image tower the cosines with four
    directions that stand for texts; of a classifier of texts the function of its words' embeddings."""
    parameter = next(model.parameters())
    if isinstance(model, BcosifiedText):
        return model.on_embeddings(inputs)
    x6 = model.encode(inputs.to(parameter.device, parameter.dtype))
    if not isinstance(model, BcosifiedCLIP):
        return model, x6
    with torch.no_grad():
        size = model.encode_image(x6).shape[-1]
    directions = torch.randn(4, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model.classifier(directions), x6


def _completeness(converted: BcosifiedModel, images: Inputs) -> Completeness:
    model = converted
    if next(converted.parameters()).dtype not in TOLERANCE:
        model = copy.deepcopy(converted).float()
    tolerance = TOLERANCE[next(model.parameters()).dtype]
    with evaluation_mode(model):
        function, x6 = _explained(model, images)
        logits, weights, constant = dynamic_linear_map(function, x6)
    chosen = logits.amax(1)
    parts = (x6 * weights).double().flatten(1)
    total, size = parts.sum(1), parts.abs().sum(1) + constant.double().abs()
    error = float(((total + constant.double() - chosen.double()).abs() / size.clamp_min(1e-300)).max())
    return Completeness(error, tolerance, error <= tolerance, chosen.tolist(), total.tolist(), constant.tolist())


def _explanation(converted: BcosifiedModel, images: Inputs) -> Explanation:
    tolerance = 1e-8
    model, x6 = _explained(copy.deepcopy(converted).double().eval(), images)
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
    largest = _largest(*pairs[0]) if expected.any() else float(weights.abs().max())
    problem = "" if affine else "the network is not affine with its scales, gates and attention held"
    ok = affine and error <= tolerance and largest <= tolerance
    zero = not (expected.any() or weights.any())
    return Explanation(error, tolerance, ok, problem, largest, dict(sorted(replay.recorded.items())), zero)
