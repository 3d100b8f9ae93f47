"""The command for GPUs: what it says without one, rows, limits and going on where it stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.gpu import command, running
from tests.benchmarks.gpu.rows import CPU, rows_of

STAGES = command.all_stages()


without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def test_the_list(capsys):
    assert command.main(["--list"]) == command.DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(STAGES)
    assert all(0 < stage.limit_s < 600 for stage in STAGES.values())


@pytest.mark.parametrize("arguments, message", [(["--stage", "speed"], "expected some of environment, .*, got speed"),
                                                (["--limit", "0"], "expected seconds > 0, got 0"),
                                                (["--budget", "90"], "expected more than 120 seconds for 10 stages, "
                                                                     "got 90")])  # fmt: skip
def test_arguments_that_are_none(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@without_a_gpu
@pytest.mark.parametrize("name", STAGES)
def test_without_a_gpu_every_stage_says_so(name, tmp_path, capsys):
    assert command.run_here(STAGES[name], tmp_path, 10) == command.NO_GPU == 3
    assert capsys.readouterr().out.startswith(f"{name}: no GPU here")
    assert command.main(["--here", "--stage", name, "--out", str(tmp_path)]) == command.NO_GPU
    assert not list(tmp_path.iterdir())


@without_a_gpu
def test_without_a_gpu_the_command_says_so(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path)]) == command.NO_GPU
    assert capsys.readouterr().out == "no GPU here (torch.cuda.is_available() is False)\n"


def test_the_worst_ending_is_the_command_s():
    assert command.worst([0, 4, 1]) == command.WRONG and command.worst([0, 4]) == command.CUT_OFF
    assert command.worst([0, 3, 4]) == command.NO_GPU and command.worst([0, 0]) == command.worst([]) == command.DONE


def counting(measured, pause=0.0, fail=None):
    """A stage of three cases that notes those that it measures."""

    def stage(run):
        for case in "abc":
            if run.due(case, "ours"):
                measured.append(case)
                time.sleep(pause)
                if case == fail:
                    raise RuntimeError("a crash")
                run.add(case, "ours", value=1.0)

    return command.Stage("counting", "", 1, 1, stage)


def test_a_stage_that_is_cut_off_keeps_its_rows_and_goes_on(tmp_path):
    measured = []
    assert command.run_here(counting(measured, 0.2), tmp_path, 0.3, rehearsal=True) == command.CUT_OFF
    assert measured == ["a", "b"] and set(rows_of("counting", tmp_path)) == {("a", "ours"), ("b", "ours")}
    assert command.run_here(counting(measured), tmp_path, 10, rehearsal=True) == command.DONE
    assert measured == ["a", "b", "c"]
    assert command.run_here(counting(measured), tmp_path, 10, rehearsal=True) == command.DONE
    assert measured == ["a", "b", "c"]
    assert command.run_here(counting(measured), tmp_path, 10, rehearsal=True, again=True) == command.DONE
    assert measured == ["a", "b", "c", "a", "b", "c"]


def test_rows_of_other_sources_are_measured_again(tmp_path, monkeypatch):
    measured = []
    command.run_here(counting(measured), tmp_path, 10, rehearsal=True)
    monkeypatch.setattr(running, "sources", lambda: "elsewhere")
    command.run_here(counting(measured), tmp_path, 10, rehearsal=True)
    assert measured == ["a", "b", "c"] * 2


def test_what_is_wrong_is_measured_again(tmp_path):
    def stage(run):
        for case, status in (("a", "wrong"), ("b", "failed"), ("c", "not run")):
            if run.due(case, "ours"):
                run.add(case, "ours", status=status)

    stage = command.Stage("wrong", "", 1, 1, stage)
    assert command.run_here(stage, tmp_path, 10, rehearsal=True) == command.WRONG
    run = running.Run(CPU, True, running.Rows("wrong", tmp_path, CPU), tmp_path, time.monotonic() + 10)
    assert [run.due(case, "ours") for case in "abc"] == [True, True, False]


def test_a_stage_that_crashes_keeps_its_rows(tmp_path, capsys):
    assert command.run_here(counting([], fail="b"), tmp_path, 10, rehearsal=True) == command.WRONG
    assert "a crash" in capsys.readouterr().err and set(rows_of("counting", tmp_path)) == {("a", "ours")}


def test_rows_name_sources_and_versions(tmp_path, monkeypatch):
    def no_git(*arguments, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(running.subprocess, "run", no_git)
    command.run_here(counting([]), tmp_path, 10, rehearsal=True)
    run = rows_of("counting", tmp_path)["a", "ours"]["run"]
    assert run["commit"] == "" and len(run["sources"]) == 12 and run["torch"] == torch.__version__
    assert {"device", "date", "triton", "python"} <= set(run)


def test_a_budget_is_shared_out_and_kept():
    """Whether stages take all of their limits or nothing, and however little there is."""
    stages = list(STAGES.values())
    for budget in (120, 560, 880, 1e6):
        for use in (0.0, 0.3, 1.0):
            left = budget
            for position, stage in enumerate(stages, 1):
                limit = command.limit_of(stage, stages[position:], left)
                assert (0 if budget == 120 else command.LEAST) <= limit <= stage.limit_s
                left -= use * limit
            assert left >= command.GRACE
    assert command.limit_of(stages[-1], [], 560) == 540  # the last one gets whatever is left
    assert command.limit_of(stages[-1], [], 5) == 0


def test_a_stage_without_time_is_not_begun(tmp_path, monkeypatch, capsys):
    begun, now = [], [0.0]

    def apart(stage, out, limit, options, packages):
        begun.append((stage.name, limit))
        now[0] += 1.2 * limit + command.GRACE  # every stage goes beyond its limit
        return command.CUT_OFF

    monkeypatch.setattr(command, "run_apart", apart)
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    assert command.main(["--rehearse", "--budget", "150", "--out", str(tmp_path)]) == command.CUT_OFF
    assert [name for name, _ in begun] == list(STAGES)[: len(begun)] and 0 < len(begun) < len(STAGES)
    assert all(limit >= command.LEAST for _, limit in begun)
    assert "sanitizer: not begun, 0 s are left for it" in capsys.readouterr().out


def test_a_stage_that_hangs_is_ended(tmp_path, monkeypatch):
    """The limit comes before its process has imported torch."""
    monkeypatch.setattr(command, "GRACE", 0)
    start = time.monotonic()
    assert command.run_apart(STAGES["networks"], tmp_path, 0.05, ["--rehearse"]) == command.CUT_OFF
    assert time.monotonic() - start < 10


@pytest.mark.slow
def test_stages_run_in_processes_of_their_own(tmp_path, capfd):
    assert command.main(["--rehearse", "--stage", "environment", "--out", str(tmp_path)]) == command.DONE
    row = rows_of("stages", tmp_path)["environment", "stage"]
    assert row["status"] == "done" and row["seconds"] > 0
    assert ("bandwidth", "copy, read + written") in rows_of("environment", tmp_path)
    assert "== environment: done" in capfd.readouterr().out


def test_a_tool_that_hangs_is_ended_with_its_children(tmp_path):
    started = tmp_path / "started"
    script = f"sh -c 'sleep 1; touch {tmp_path / 'survived'}' & touch {started}; wait"
    assert running.output_of("sh", "-c", script, timeout=0.3) == (124, "took more than 0 s")
    time.sleep(1.2)
    assert started.exists() and not (tmp_path / "survived").exists()
    assert running.output_of("no-such-tool")[0] == 127 and running.output_of("sh", "-c", "exit 7") == (7, "")


def test_rows_are_json(tmp_path):
    command.run_here(counting([]), tmp_path, 10, rehearsal=True)
    content = json.loads((tmp_path / "gpu_counting.json").read_text())
    assert set(content) == {"runs", "rows"} and len(content["runs"]) == 1


@pytest.mark.slow
def test_without_torchvision_the_stages_are_there(tmp_path):
    """In a process of its own, in which it cannot be imported: the stage of networks says so, nothing else needs it."""
    program = f"""
import sys
sys.modules["torchvision"] = None
from benchmarks.gpu import command
assert command.main(["--list"]) == command.DONE
assert command.main(["--here", "--rehearse", "--stage", "environment", "--out", {str(tmp_path)!r}]) == command.DONE
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=running.ROOT, env=environment)
