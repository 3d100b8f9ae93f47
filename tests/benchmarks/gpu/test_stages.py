"""Environment, builds, tuning and sanitizer, rehearsed on the CPU."""

from __future__ import annotations

import json
import time

import pytest

from bcos_kernels import selftest_cases
from benchmarks.gpu import command, running, stages
from tests.benchmarks.gpu.rows import CPU, rows_of


def test_environment(rehearse):
    status, rows = rehearse("environment")
    assert status == command.DONE
    assert {case for case, _ in rows} == {"tools", "packages", "bandwidth", "matrix product 64^3"}
    assert rows["matrix product 64^3", "bfloat16"]["TFLOP_per_s"] > 0
    assert rows["tools", "nvcc"]["status"] in ("there", "missing")


def test_builds(rehearse):
    status, rows = rehearse("builds")
    assert status == command.DONE and rows["setup.py", "native"]["status"] == "built"
    assert rows["triton", "compiled side by side"]["status"] == "compiled"
    assert rows["triton", "compiled side by side"]["processes"] == 2


def test_builds_are_made_again_on_every_machine(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(stages, "output_of", lambda *command, **options: (made.append(command), (0, "built"))[1])
    monkeypatch.setattr(stages.warm_up, "side_by_side", lambda run: {"status": "compiled"})
    for _ in range(2):
        assert command.run_here(command.all_stages()["builds"], tmp_path, 60, rehearsal=True) == command.DONE
    assert len(made) == 2


def test_tuning(rehearse):
    status, rows = rehearse("tuning")
    assert status == command.DONE and rows["checks", "all"]["checks"] >= len(selftest_cases.cases(quick=True))


def test_tuning_takes_the_checks_of_the_stage_before(rehearse, tmp_path, monkeypatch, capsys):
    """Wrong ones too; what is missing there is checked, and so is all of it where the sources are others."""
    cases = [selftest_cases.linear(name, 20, 16, 12) for name in ("right", "wrong", "missing")]
    monkeypatch.setattr(stages.selftest_cases, "cases", lambda quick=False: cases)
    monkeypatch.setattr(stages.selftest, "usable", lambda device: ["cpu"])
    monkeypatch.setattr(stages.selftest, "precisions", lambda device, quick: ["float32"])
    before = running.Rows("correctness", tmp_path, CPU)
    for case in cases[:2]:
        before.add(f"linear float32, {case}", "cpu", status=case.name, fraction_of_allowed=0.1, detail="y: as told")
    checked = []
    check = stages.selftest_commands.check
    monkeypatch.setattr(
        stages.selftest_commands, "check", lambda case, *rest: (checked.append(case.name), check(case, *rest))[1]
    )
    status, rows = rehearse("tuning")
    assert status == command.WRONG and checked == ["missing"] and rows["checks", "all"]["checks"] == 3
    assert rows[f"linear float32, {cases[1]}", "cpu"]["reason"] == "y: as told"
    assert "2 checks are those of the stage correctness" in capsys.readouterr().out
    monkeypatch.setattr(running, "sources", lambda: "elsewhere")
    status, rows = rehearse("tuning")
    assert status == command.DONE and checked == ["missing", "right", "wrong", "missing"]


def test_tuning_writes_row_after_row(tmp_path, monkeypatch):
    """The whole stage, with the CPU in the place of a GPU."""
    cases = [selftest_cases.linear("layer", 20, 16, 12)]
    monkeypatch.setenv("BCOS_TUNING_CACHE", str(tmp_path / "tuning"))
    monkeypatch.setattr(stages.tuning, "identity", lambda device: ("Abacus", "sm_99"))
    monkeypatch.setattr(stages.selftest, "usable", lambda device: ["reference"])
    monkeypatch.setattr(stages.selftest, "_milliseconds", lambda runs, rounds, warmup=3: dict.fromkeys(runs, 1.0))
    monkeypatch.setattr(stages.selftest_cases, "cases", lambda quick=False: cases)
    monkeypatch.setattr(stages.selftest_cases, "timed_cases", lambda quick=False, batch=64: cases)
    monkeypatch.setattr(stages.selftest_cases, "network_cases", lambda name, batch: [])
    run = running.Run(CPU, False, running.Rows("tuning", tmp_path, CPU), tmp_path, time.monotonic() + 60)
    stages.tune(run)
    rows = rows_of("tuning", tmp_path)
    for dtype in ("bfloat16", "float32"):
        for direction in ("forward", "backward", "inference"):
            row = rows[f"linear {dtype}, layer: x 20x16, weight 12x16", direction]
            assert row["fastest"] == "reference" and row["reference_ms"] == 1.0
    assert rows["auto, forward and backward together", "auto"]["status"] == "right" and not run.wrong
    table = json.loads((tmp_path / "tuning" / "abacus.json").read_text())
    assert len(table["rows"]) == 6 and table["device"] == "Abacus"


@pytest.mark.parametrize(
    "script, status, skipped",
    [("exit 0", "right", None), ("echo '========= ERROR SUMMARY: 3 errors'; exit 86", "wrong", None),
     ("exit 1", "failed", None), ("echo 'Device not supported'; exit 1", "not run", None),
     ("echo 'linear, B = 2'; echo 'not built: conv2d, 3x3: no'; echo 'not built: linear, x: y'", "right",
      "conv2d, 3x3: no; linear, x: y")],
)  # fmt: skip
def test_what_a_checker_says(script, status, skipped, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    run = running.Run(CPU, True, running.Rows("sanitizer", tmp_path, CPU), tmp_path, time.monotonic() + 60)
    found = stages._sanitized(run, str(tool), "memcheck", "cuda:cutlass")
    assert found["status"] == status and found.get("skipped") == skipped
    assert found.get("says", "") == ("ERROR SUMMARY: 3 errors" if status == "wrong" else "")


def test_sanitizer(rehearse):
    status, rows = rehearse("sanitizer")
    assert status == command.DONE
    kinds = {case.partition(":")[0] for case, _ in rows}
    assert {"guard bands", "3 repeats", "compute-sanitizer"} <= kinds | {"compute-sanitizer"}
    assert all(row["status"] == "right" for (case, _), row in rows.items() if ":" in case)
    assert any(row["tensors"] > 4 for (case, _), row in rows.items() if case.startswith("guard bands"))
