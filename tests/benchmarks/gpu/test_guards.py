"""Guard bands and repeats see what they are there for."""

from __future__ import annotations

import torch

from bcos_kernels import selftest_cases
from benchmarks.gpu import guards
from tests.benchmarks.gpu.rows import CPU

LINEAR = selftest_cases.linear("layer", 6, 8, 5)


def with_launcher(monkeypatch, change):
    launcher = guards.dispatch._launcher

    def changed(name, which):
        launch = launcher(name, which)
        return (lambda *arguments: change(launch, *arguments)) if which == "linear_forward" else launch

    monkeypatch.setattr(guards.dispatch, "_launcher", changed)


def test_a_write_beside_a_tensor_is_seen(monkeypatch):
    def stray(launch, x, *others):
        with torch.no_grad():
            made = torch.empty(3)
            if made.untyped_storage().nbytes() > 1000:  # between bands
                made.as_strided((1,), (1,), made.storage_offset() + 3).fill_(1.0)
        return launch(x, *others)

    assert guards.guarded(LINEAR, "float32", "reference", CPU)["status"] == "right"
    with_launcher(monkeypatch, stray)
    found = guards.guarded(LINEAR, "float32", "reference", CPU)
    assert found["status"] == "wrong" and found["detail"] == "a band was written to"


def test_what_was_never_written_is_seen(monkeypatch):
    def lazy(launch, x, *others):
        y, *rest = launch(x, *others)
        if x.untyped_storage().nbytes() > 4096:  # between bands: what the allocator left there is not looked at
            made = torch.empty_like(y)
            made[:-1] = y[:-1]
            y = made
        return y, *rest

    with_launcher(monkeypatch, lazy)
    found = guards.guarded(LINEAR, "float32", "reference", CPU)
    assert found["status"] == "wrong" and "other results" in found["detail"]


def test_a_result_that_changes_is_seen(monkeypatch):
    calls = []

    def unsteady(launch, x, *others):
        calls.append(None)
        y, *rest = launch(x, *others)
        return y + 1e-6 * (len(calls) == 4), *rest

    assert guards.repeated(LINEAR, "float32", "reference", CPU, 5) == {"status": "right", "different": 0}
    with_launcher(monkeypatch, unsteady)
    assert guards.repeated(LINEAR, "float32", "reference", CPU, 5) == {"status": "wrong", "different": 1}


def test_the_small_set_for_the_checkers(capsys, monkeypatch):
    assert guards.main(["reference"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(selftest_cases.cases(quick=True))

    def refuse(launch, *arguments):
        raise NotImplementedError("linear: not this")

    with_launcher(monkeypatch, refuse)
    assert guards.main(["reference"]) == 0
    lines = capsys.readouterr().out.splitlines()
    skipped = [line for line in lines if line.startswith("not built: ")]
    assert len(lines) == len(selftest_cases.cases(quick=True)) and len(skipped) == len(
        [case for case in selftest_cases.cases(quick=True) if case.op in ("linear", "linear_gelu")]
    )
    assert skipped[0] == "not built: linear, B = 2: x 37x45, weight 29x45: linear: not this"
