"""Kernels compiled side by side: all of them, whatever single ones do."""

from __future__ import annotations

import time

import pytest

from bcos_kernels import selftest, selftest_cases
from benchmarks.gpu import running, warm_up
from tests.benchmarks.gpu.rows import CPU


def test_parts_of_the_warm_up_are_all_of_it(monkeypatch, capsys):
    launched = []
    monkeypatch.setattr(warm_up, "_launch", lambda case, precision, *where: launched.append((case, precision)))
    monkeypatch.setattr(warm_up, "layer_cases", lambda: selftest_cases.timed_cases(quick=True))
    monkeypatch.setattr(warm_up, "tuned_cases", lambda: selftest_cases.timed_cases(quick=True))
    every = warm_up.calls()
    monkeypatch.setattr(warm_up, "calls", lambda rehearsal: every)
    for part in range(7):
        warm_up.main([str(part), "7", "--rehearse"])
    assert launched == every and {precision for _, precision in every} == set(selftest.BOUNDS)
    assert sum(int(line.split()[0]) for line in capsys.readouterr().out.splitlines()) == len(every)
    with pytest.raises(SystemExit):
        warm_up.main(["7", "7"])


def test_what_raises_while_warming_up_ends_nothing(monkeypatch, capsys):
    def raising(case, precision, *where):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(warm_up, "_launch", raising)
    assert warm_up.main(["0", "1", "--rehearse"]) == 0
    assert "RuntimeError: no such kernel" in (said := capsys.readouterr().out) and "4 calls, 4 raised" in said


@pytest.mark.parametrize("program, limit, expected", [("raise SystemExit(7)", 60, "incomplete"),
                                                      ("import time; time.sleep(60)", 1.5, None)])  # fmt: skip
def test_a_part_of_the_warm_up_that_crashes_or_hangs(program, limit, expected, tmp_path, monkeypatch):
    popen = warm_up.subprocess.Popen
    monkeypatch.setattr(warm_up.subprocess, "Popen", lambda c, **o: popen([c[0], "-c", program], **o))
    run = running.Run(CPU, True, running.Rows("builds", tmp_path, CPU), tmp_path, time.monotonic() + limit)
    if expected is None:
        with pytest.raises(running.OutOfTime):
            warm_up.side_by_side(run)
    else:
        row = warm_up.side_by_side(run)
        assert row["status"] == expected and row["crashed"] == row["processes"] == 2
