"""Bytes of a training step: what a forward keeps for the backward, and the most that is alive at once.

    pytest -q -s benchmarks/bench_memory.py

Nothing is timed, so these rows may be taken on a machine that is busy. Rows of memory.json: kept_MiB and its ratio to
plain's; peak_MiB, during forward and backward, beyond parameters, gradients of the parameters included, and its ratio.
"""

from __future__ import annotations

import pytest
import torch

from bcosification.evaluation.benchmarking import MIB, Step
from bcosification.evaluation.measuring import bytes_kept, peak_bytes

from .networks import NETWORKS, Models, NotHere, inputs
from .protocol import Results, Settings, chosen

CONTENDERS = ("plain", "plain-compiled", "peer", "peer-compiled", "fused-peer", "ours", "ours-compiled", "ours-low")
DEFAULT = tuple(name for name in CONTENDERS if not name.endswith("-compiled"))


@pytest.mark.parametrize("name", NETWORKS)
def test_memory(name):
    settings = Settings.read(NETWORKS[name].batch, rounds=1)
    results, case = Results("memory"), name + settings.label
    models = Models(name, settings.size)
    torch.compiler.reset()
    plain = {}
    for contender in chosen(CONTENDERS, DEFAULT):
        images = inputs(contender, settings.batch, settings.size)
        try:
            step = Step(models.build(contender), images, torch.arange(len(images)))
        except NotHere as error:
            results.cannot(case, contender, error.status, error)
            continue
        step()  # what is allocated once is not the step's
        step.optimizer.zero_grad(set_to_none=True)
        bytes_of = {"kept": bytes_kept(step.loss), "peak": peak_bytes(step.backward)}
        plain = plain or bytes_of
        values = {f"{what}_MiB": count / MIB for what, count in bytes_of.items()}
        values |= {f"{what}_ratio": count / plain[what] for what, count in bytes_of.items()}
        results.add(case, contender, batch=settings.batch, dtype="float32", **values)
        print(f"{case:16s} {contender:16s} kept {values['kept_MiB']:6.0f} MiB ({values['kept_ratio']:.3f}), "
              f"peak {values['peak_MiB']:6.0f} MiB ({values['peak_ratio']:.3f})", flush=True)  # fmt: skip
