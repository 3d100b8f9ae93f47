"""Explanations per second, against the plain network's input gradients per second.

    pytest -q -s benchmarks/bench_explanations.py

plain: ∂(largest logit)/∂image; peer: the package bcos, one image after the other as its `explain` does it, without
drawing; peer-batch: the same gradients of a batch at once; fused-peer and ours: `bcosification.explain`, which computes
contributions and the constant as well. At batch 16, and at batch 1, where only latency counts. Rows of
explanations.json: median_ms, ratio (of times), explanations_per_s.
"""

from __future__ import annotations

import functools

import pytest

import bcosification
from bcosification.evaluation.benchmarking import explain_one_by_one, gradient_error, input_gradient
from bcosification.evaluation.measuring import interleaved, summarized
from bcosification.evaluation.peer_style import peer_style
from bcosification.explanation.explaining import encode
from bcosification.nn import explanation_mode

from .networks import NETWORKS, Models, NotHere, inputs
from .protocol import Results, Settings, chosen

CONTENDERS = ("plain", "peer", "peer-batch", "fused-peer", "ours")


def _batched(model, images):
    with explanation_mode(model):
        weights = input_gradient(model, images)
    return weights, (images * weights).sum(1)


def _explainer(contender, model, images):
    if contender == "plain":
        return functools.partial(input_gradient, model, images)
    if contender == "peer":
        return functools.partial(explain_one_by_one, model, images)
    if contender == "peer-batch":
        return functools.partial(_batched, model, images)
    return functools.partial(bcosification.explain, model, images, batch_size=len(images))


def _check(models: Models, contender: str, run, images) -> float | None:
    """How far W(x) is from the peer's (of ours: from the eager formulas'), or None where nothing is to be equal."""
    if contender in ("plain", "peer"):
        return None
    model = peer_style(models.converted()) if contender == "ours" else models.build("peer")
    encoded = encode(model, images) if contender == "ours" else images
    expected = explain_one_by_one(model.eval(), encoded)
    got = run()
    got = got[0] if contender == "peer-batch" else got.weights
    return gradient_error({"": got}, {"": expected})


@pytest.mark.parametrize("batch", [16, 1], ids=lambda batch: f"batch{batch}")
@pytest.mark.parametrize("name", NETWORKS)
def test_explanations(name, batch):
    settings = Settings.read(batch, rounds=9 if batch > 1 else 25)
    case = f"{name}, batch {settings.batch}" + (f", {settings.size} pixels" if settings.size != 224 else "")
    results, models, runs, errors = Results("explanations"), Models(name, settings.size), {}, {}
    for contender in chosen(CONTENDERS):
        images = inputs(contender, settings.batch, settings.size)
        try:
            model = models.build("peer" if contender == "peer-batch" else contender).eval()
        except NotHere as error:
            results.cannot(case, contender, error.status, error)
            continue
        run = _explainer(contender, model, images)
        error = _check(models, contender, run, images)
        assert error is None or error < 1e-3, (case, contender, error)
        errors[contender] = {} if error is None else {"gradient_error": error}
        runs[contender] = run
    for contender, values in summarized(interleaved(runs, rounds=settings.rounds)).items():
        rate = settings.batch / values["median_ms"] * 1e3
        results.add(case, contender, batch=settings.batch, dtype="float32", explanations_per_s=rate, **values,
                    **errors[contender])  # fmt: skip
        print(f"{case:24s} {contender:12s} {rate:7.2f} /s  time {values['ratio']:.3f} "
              f"[{values['ratio_q1']:.2f}, {values['ratio_q3']:.2f}]", flush=True)  # fmt: skip
