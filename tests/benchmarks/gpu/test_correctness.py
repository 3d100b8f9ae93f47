"""The stage `correctness`, rehearsed on the CPU."""

from __future__ import annotations

import pytest

from benchmarks.gpu import command, correctness


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_correctness(rehearse):
    status, rows = rehearse("correctness")
    assert status == command.DONE
    assert {row["status"] for row in rows.values()} == {"right", "not run"}
    for case, who in rows:
        assert rows[case, who]["status"] == "right" or case.startswith(("side stream", "CUDA graph"))
    assert sum(case.startswith("compiled: ") for case, _ in rows) >= 2


def test_wrong_numbers_end_the_correctness_stage_wrong(rehearse, monkeypatch):
    monkeypatch.setattr(correctness, "EXTRAS", {})
    monkeypatch.setattr(correctness, "LARGE", {})
    right = correctness.selftest._worst
    monkeypatch.setattr(correctness.selftest, "_worst", lambda *arguments: (right(*arguments)[0] + 2, "y: off"))
    status, rows = rehearse("correctness")
    assert status == command.WRONG and {row["status"] for row in rows.values()} == {"wrong"}
