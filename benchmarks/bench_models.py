"""Training steps and inference of whole networks: plain, the package bcos, that fused, and the converted network.

    pytest -q -s benchmarks/bench_models.py                         # everything
    pytest -q -s benchmarks/bench_models.py -k "training and resnet50"

A training step is zero_grad, forward, binary cross-entropy, backward, SGD, in training mode. Rows of training.json and
inference.json: median_ms, ratio of times to plain's with the quartiles of the rounds; gradient_error, how far the
parameters' gradients (of inference: the logits) are from those that they have to equal; of compiled contenders also
compile_s, the first call minus a later one, with nothing cached.
"""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn

from bcosification.evaluation.benchmarking import Step, gradient_error, inference
from bcosification.evaluation.measuring import interleaved, summarized
from bcosification.evaluation.peer_style import peer_style

from .networks import NETWORKS, Models, NotHere, inputs
from .protocol import Results, Settings, chosen

TRAINING = (
    "plain", "plain-compiled", "peer", "peer-compiled", "fused-peer", "fused-peer-nchw", "ours", "ours-compiled",
    "ours-low",
)  # fmt: skip
INFERENCE = ("plain", "plain-compiled", "peer", "peer-compiled", "fused-peer", "ours", "ours-compiled")
TOLERANCE = 1e-2  # of a whole network's gradients in float32, whose ReLUs near zero tip this way or that
# Where they tip more (ResNet-50 with random weights at batch 8: the eager network's own gradients in float32 are 4e-2
# from those in float64), the error to float64 decides: at most this much worse than the eager network's own.
WORSE_THAN_EAGER = 2


class Inference:
    """Logits in eval mode, with the gradients' interface of a Step."""

    def __init__(self, model: nn.Module, images: torch.Tensor):
        self.model, self.images = model.eval(), images

    def __call__(self) -> torch.Tensor:
        return inference(self.model, self.images)

    def gradients(self) -> dict[str, torch.Tensor]:
        return {"logits": self()}


def _step(model: nn.Module, images: torch.Tensor) -> Step:
    return Step(model, images, torch.arange(len(images)) * 7 % 1000)


def _eager(models: Models, name: str) -> nn.Module | None:
    """Whose gradients (or logits) a contender's have to be: the eager model; of ours, that with the eager formulas."""
    if name == "ours":
        return peer_style(models.converted())
    eager = models.eager(name)
    return None if eager is None else models.build(eager)


def _checked(case: str, name: str, got: dict[str, torch.Tensor], model: nn.Module, make, images) -> float:
    """How far a contender's gradients (or logits) are from the eager model's."""
    expected = make(copy.deepcopy(model), images).gradients()
    error = gradient_error(got, expected)
    if not error < TOLERANCE:
        exact = make(copy.deepcopy(model).double(), images.double()).gradients()
        errors = gradient_error(got, exact), gradient_error(expected, exact)
        assert errors[0] <= WORSE_THAN_EAGER * errors[1], (case, name, error, errors)
    return error


def _measure(suite: str, name: str, contenders, settings: Settings, make) -> None:
    results, case = Results(suite), name + settings.label
    models = Models(name, settings.size)
    runs, extra = {}, {}
    torch.compiler.reset()
    for contender in contenders:
        images = inputs(contender, settings.batch, settings.size)
        try:
            run = make(models.build(contender), images)
        except NotHere as error:
            results.cannot(case, contender, error.status, error)
            continue
        start = time.perf_counter()
        with torch.compiler.config.patch(force_disable_caches=True):
            got = run.gradients()
        first = time.perf_counter() - start
        extra[contender] = {}
        eager = _eager(models, contender)
        if eager is not None:
            extra[contender]["gradient_error"] = _checked(case, contender, got, eager, make, images)
        assert all(bool(value.isfinite().all()) for value in got.values()), (case, contender)
        if contender.endswith("-compiled"):
            run()
            start = time.perf_counter()
            run()
            extra[contender]["compile_s"] = first - (time.perf_counter() - start)
        runs[contender] = run
    for contender, values in summarized(interleaved(runs, rounds=settings.rounds)).items():
        results.add(case, contender, batch=settings.batch, dtype="float32", **values, **extra[contender])
        compiled = f"  compiled in {extra[contender]['compile_s']:.0f} s" if "compile_s" in extra[contender] else ""
        print(f"{suite} {case:16s} {contender:16s} {values['median_ms']:8.1f} ms  {values['ratio']:.3f} "
              f"[{values['ratio_q1']:.2f}, {values['ratio_q3']:.2f}]{compiled}", flush=True)  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_training(name):
    _measure("training", name, chosen(TRAINING), Settings.read(NETWORKS[name].batch, rounds=7), _step)


@pytest.mark.parametrize("name", NETWORKS)
def test_inference(name):
    _measure("inference", name, chosen(INFERENCE), Settings.read(NETWORKS[name].batch, rounds=9), Inference)
