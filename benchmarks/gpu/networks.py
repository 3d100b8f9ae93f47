"""The stage `networks` of `make gpu`: whole networks at batches as one device holds them.

A case is a network at a precision with a group of contenders: "eager"; "compiled", by torch.compile; or "package bcos",
the package's own network as it is and fused by us, beside the plain one. Precisions are bfloat16 and float16, by
autocast, tf32 (float32 whose products run so) and float32. Rows of the plain network have floor_ms, what its layers
take at the rates that the stage `environment` has measured (floor.py).
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

import bcos_kernels
from bcos_kernels import selftest
from bcosification.evaluation.benchmarking import Step, explain_one_by_one, gradient_error, inference, input_gradient
from bcosification.evaluation.measuring import interleaved, summarized

from .. import floor
from ..networks import NETWORKS, Models, NotHere, calibrated, inputs
from .running import Run, first_line

PACKAGE = "package bcos"
GROUPS = {
    "eager": ("plain", "peer", "ours", "ours-low"),
    "compiled": ("plain", "plain-compiled", "peer-compiled", "ours-compiled"),
}
EXPLAINED = 16
"""Images of the explanations: the package explains one after the other, a whole batch would take minutes."""
LEAST = 60
"""Seconds that a case takes at most where all goes well: it is not begun with less."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A network of this stage: how its plain form is made, images of a batch, what has to be installed for it."""

    make: Callable[[], nn.Module]
    batch: int
    needs: str = "torchvision"


def _torchvision(name: str) -> nn.Module:
    import torchvision

    return getattr(torchvision.models, name)(weights=None)


def _clip_rn50() -> nn.Module:
    import open_clip

    return open_clip.create_model("RN50", pretrained=None)


def _plain(name: str) -> Callable[[], nn.Module]:
    return lambda: NETWORKS[name].plain(224)


KNOWN = {
    "resnet50": Measured(_plain("resnet50"), 256),
    "vit_b": Measured(lambda: _torchvision("vit_b_16"), 256),
    "densenet121": Measured(_plain("densenet121"), 256),
    "convnext_tiny": Measured(_plain("convnext_tiny"), 256),
    "vit_s": Measured(_plain("vit_s"), 256),
    "clip_rn50": Measured(_clip_rn50, 256, needs="open_clip"),
}
REHEARSED = {"resnet18": Measured(lambda: NETWORKS["resnet18"].plain(64), 2)}


def plan(rehearsal: bool = False) -> Iterator[tuple[str, str, str]]:
    """(network, precision, group), what tells the most first."""
    if rehearsal:
        yield from [("resnet18", "float32", "eager"), ("resnet18", "float32", PACKAGE)]
        return
    of_the_package = [name for name in KNOWN if name in NETWORKS]
    yield from [(name, "bfloat16", "eager") for name in KNOWN]
    yield ("resnet50", "bfloat16", PACKAGE)
    yield from [(name, "bfloat16", "compiled") for name in ("resnet50", "vit_b", "vit_s")]
    yield ("resnet50", "float16", PACKAGE)
    yield from [(name, "tf32", "eager") for name in KNOWN]
    yield from [(name, "bfloat16", PACKAGE) for name in of_the_package if name != "resnet50"]
    yield from [(name, "float32", "eager") for name in KNOWN]
    yield from [(name, "bfloat16", "compiled") for name in ("densenet121", "convnext_tiny", "clip_rn50")]
    yield from [(name, "tf32", "compiled") for name in ("resnet50", "vit_b")]


def networks(run: Run) -> None:
    """Numbers first, as `bcosification.evaluation.benchmark` checks them; then times."""
    known, size, rounds = (REHEARSED, 64, 1) if run.rehearsal else (KNOWN, 224, 3)
    for name, precision, group in plan(run.rehearsal):
        network = known[name]
        label = f"{name}, {precision}, batch {network.batch}, {group}"
        if not run.due(label, seconds=0 if run.rehearsal else LEAST):
            continue
        if importlib.util.find_spec(network.needs) is None:
            run.add(label, "all", status="not run", reason=f"needs {network.needs}")
            continue
        run.free()
        with selftest._tf32(precision == "tf32"):
            if group == PACKAGE:
                _of_the_package(run, label, name, precision, network.batch, size, rounds)
            else:
                _converted(run, label, network, precision, GROUPS[group], size, rounds)


def autocast_of(precision: str) -> torch.dtype | None:
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)


def converted_of(plain: nn.Module, images: Tensor) -> nn.Module:
    """What `bcosify` makes of a network, its norms' statistics those of a few images: with a new network's variances of
    1, its signals shrink from layer to layer until rounding is all that is left."""
    import bcosification

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return calibrated(bcosification.bcosify(plain, mean=MEAN, std=STD), images[:8])


def steps_of(run: Run, name: str, batch: int, precision: str, size: int) -> dict[str, Step]:
    """Training steps of a network, "plain" and "ours", on the same random images."""
    torch.manual_seed(0)
    known = REHEARSED if run.rehearsal else KNOWN
    plain = known[name].make().to(run.device, memory_format=torch.channels_last)
    images = torch.rand(batch, 3, size, size, device=run.device).contiguous(memory_format=torch.channels_last)
    ours = converted_of(plain, images).to(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=run.device)
    return {who: Step(model, images, labels, autocast=autocast_of(precision))
            for who, model in (("plain", plain), ("ours", ours))}  # fmt: skip


def _converted(run: Run, label: str, network: Measured, precision: str, group, size: int, rounds: int) -> None:
    from bcosification.evaluation import benchmark

    contenders = group[::2] if run.rehearsal else group  # plain and ours
    dtype = "float32" if precision == "tf32" else precision
    try:
        torch.manual_seed(0)
        original = network.make().to(run.device)
        images = torch.rand(network.batch, 3, size, size, device=run.device)
        found = benchmark(
            original, converted_of(original, images), images, contenders=contenders, rounds=rounds, dtype=dtype,
            explained=min(EXPLAINED, network.batch), progress=True,
        )  # fmt: skip
        floors = _floors(run, original, tuple(images.shape), precision)
    except Exception as error:  # of one network
        run.add(label, "all", status="failed", reason=f"{type(error).__name__}: {first_line(error)}")
        return
    print(found, flush=True)
    ran = ", ".join(sorted(set(bcos_kernels.dispatched().values())))
    for row in found.rows:
        values = {key: value for key, value in row.items() if key not in ("task", "contender", "failed")}
        if "failed" in row:
            values |= {"status": "failed", "reason": row["failed"]}
        elif row["contender"].startswith("ours"):
            values["backends"] = ran
        elif row["contender"] == "plain" and row["task"] in floors:
            values["floor_ms"] = floors[row["task"]]
        run.add(label, f"{row['contender']}, {row['task']}", **values)


def rates(run: Run, precision: str) -> tuple[float, float] | None:
    """(GB/s of a copy, TFLOP/s of a matrix product) that the stage `environment` has measured with these sources on
    this device; None if it has not."""
    found = run.rows.of_stage("environment")
    copied = found.get(("bandwidth", "copy, read + written"), {}).get("GB_per_s")
    products = [row for (case, who), row in found.items() if case.startswith("matrix product") and who == precision]
    return (copied, products[0]["TFLOP_per_s"]) if copied and products and "TFLOP_per_s" in products[0] else None


def _floors(run: Run, model: nn.Module, shape: tuple[int, ...], precision: str) -> dict[str, float]:
    """Task → milliseconds; nothing where the rates are not known, or of a model that is more than a network of
    images."""
    measured = rates(run, precision)
    if measured is None or hasattr(model, "encode_image"):
        return {}
    itemsize = 2 if autocast_of(precision) else 4
    forward, step = floor.of_step(model, shape, itemsize, measured)
    return {"inference": forward, "training": step}


# --- the package's own networks ---------------------------------------------------------------------------------------


def _of_the_package(run: Run, label: str, name: str, precision: str, batch: int, size: int, rounds: int) -> None:
    """Other networks than the converted ones: weights normalised, and its ViTs have no class token. Gradients are
    compared before times: next to the constant of an untrained network's logits the rest is nothing."""
    names = {"plain": "plain", "peer": "bcos", "fused-peer": "bcos, fused", "fused-peer-nchw": "bcos, fused, NCHW"}
    models = Models(name, size)
    autocast = autocast_of(precision)
    try:
        made = {who: models.build(who).to(run.device) for who in names}
        images = {who: inputs(who, batch, size).to(run.device) for who in names}
        labels = torch.arange(batch, device=run.device)
        error, right = _same_gradients(made["peer"], made["fused-peer"], images["peer"][:4], labels[:4])
        if not right:
            run.add(label, "bcos, fused", status="wrong", difference_from_peer=error)
            return
        few = {who: images[who][:EXPLAINED] for who in names}
        tasks = {
            "training": lambda who: Step(made[who].train(), images[who], labels, autocast=autocast),
            "inference": lambda who: partial(inference, made[who].eval(), images[who], autocast=autocast),
            "explanation": lambda who: _explainer(who, made[who].eval(), few[who], autocast),
        }
        for task, prepare in tasks.items():
            runs = {who: prepare(who) for who in names}
            times = interleaved(runs, rounds=rounds, warmup=1, device=run.device)
            count = len(few["plain"]) if task == "explanation" else batch
            for who, values in reversed(summarized(times).items()):  # plain last: a case counts as measured by it
                rate = count / values["median_ms"] * 1e3
                extra = {"difference_from_peer": error} if who == "fused-peer" else {}
                run.add(label, f"{names[who]}, {task}", images_per_s=rate, **values, **extra)
    except NotHere as error:
        run.add(label, "bcos", status="not run", reason=f"{error.status}: {first_line(error)}")
    except Exception as error:  # of one network
        run.add(label, "bcos", status="failed", reason=f"{type(error).__name__}: {first_line(error)}")


def _same_gradients(peer: nn.Module, fused: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, bool]:
    """How far the gradients of a fused network are from its peer's, and whether that is rounding: below a hundredth, or
    no further from those in float64 than twice what the peer's are."""

    def gradients(model: nn.Module, x: Tensor = images) -> dict[str, Tensor]:
        return Step(copy.deepcopy(model), x, labels).gradients()

    got, expected = gradients(fused), gradients(peer)
    error = gradient_error(got, expected)
    if error < 1e-2:
        return error, True
    exact = gradients(copy.deepcopy(peer).double(), images.double())
    return error, gradient_error(got, exact) <= 2 * gradient_error(expected, exact)


def _explainer(who: str, model: nn.Module, images: Tensor, autocast: torch.dtype | None) -> Callable[[], object]:
    """Of plain the input gradient; of the package image by image, as it explains; fused, in batches."""
    if who == "plain":
        return partial(input_gradient, model, images, autocast=autocast)
    if who == "peer":
        return partial(explain_one_by_one, model, images, autocast=autocast)

    def ours():
        from bcosification.explanation import explain

        with warnings.catch_warnings(), torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            warnings.simplefilter("ignore")  # in 16 bits the sum of the contributions is the logit roughly
            return explain(model, images, batch_size=len(images))

    return ours
