"""The command for GPUs: what it says without one, its stages tried on the CPU, limits and going on where it stopped."""

from __future__ import annotations

import json
import re
import time
import types
import zipfile

import pytest
import torch

from bcos_kernels import selftest, selftest_cases
from bcosification.evaluation import measuring
from benchmarks import (
    floor,
    gpu,
    gpu_correctness,
    gpu_finetune,
    gpu_guards,
    gpu_layers,
    gpu_networks,
    gpu_stages,
    gpu_warm_up,
    networks,
    wheels,
)
from tests.benchmarks.gpu_rows import CPU, rates_of, rows_of

STAGES = gpu.stages()
without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_list(capsys):
    assert gpu.main(["--list"]) == gpu.DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(STAGES)
    assert all(0 < stage.limit_s < 600 for stage in STAGES.values())


@pytest.mark.parametrize("arguments, message", [(["--stage", "speed"], "expected some of environment, .*, got speed"),
                                                (["--limit", "0"], "expected seconds > 0, got 0"),
                                                (["--budget", "90"], "expected more than 120 seconds for 10 stages, "
                                                                     "got 90")])  # fmt: skip
def test_arguments_that_are_none(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@without_a_gpu
@pytest.mark.parametrize("name", STAGES)
def test_without_a_gpu_every_stage_says_so(name, tmp_path, capsys):
    assert gpu.run_here(STAGES[name], tmp_path, 10) == gpu.NO_GPU == 3
    assert capsys.readouterr().out.startswith(f"{name}: no GPU here")
    assert gpu.main(["--here", "--stage", name, "--out", str(tmp_path)]) == gpu.NO_GPU
    assert not list(tmp_path.iterdir())


@without_a_gpu
def test_without_a_gpu_the_command_says_so(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == gpu.NO_GPU
    assert capsys.readouterr().out == "no GPU here (torch.cuda.is_available() is False)\n"


def test_the_worst_ending_is_the_command_s():
    assert gpu.worst([0, 4, 1]) == gpu.WRONG and gpu.worst([0, 4]) == gpu.CUT_OFF and gpu.worst([0, 3, 4]) == gpu.NO_GPU
    assert gpu.worst([0, 0]) == gpu.worst([]) == gpu.DONE


# --- rows, limits, going on -------------------------------------------------------------------------------------------


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

    return gpu.Stage("counting", "", 1, 1, stage)


def test_a_stage_that_is_cut_off_keeps_its_rows_and_goes_on(tmp_path):
    measured = []
    assert gpu.run_here(counting(measured, 0.2), tmp_path, 0.3, rehearsal=True) == gpu.CUT_OFF
    assert measured == ["a", "b"] and set(rows_of("counting", tmp_path)) == {("a", "ours"), ("b", "ours")}
    assert gpu.run_here(counting(measured), tmp_path, 10, rehearsal=True) == gpu.DONE
    assert measured == ["a", "b", "c"]
    assert gpu.run_here(counting(measured), tmp_path, 10, rehearsal=True) == gpu.DONE
    assert measured == ["a", "b", "c"]
    assert gpu.run_here(counting(measured), tmp_path, 10, rehearsal=True, again=True) == gpu.DONE
    assert measured == ["a", "b", "c", "a", "b", "c"]


def test_rows_of_other_sources_are_measured_again(tmp_path, monkeypatch):
    measured = []
    gpu.run_here(counting(measured), tmp_path, 10, rehearsal=True)
    monkeypatch.setattr(gpu, "sources", lambda: "elsewhere")
    gpu.run_here(counting(measured), tmp_path, 10, rehearsal=True)
    assert measured == ["a", "b", "c"] * 2


def test_what_is_wrong_is_measured_again(tmp_path):
    def stage(run):
        for case, status in (("a", "wrong"), ("b", "failed"), ("c", "not run")):
            if run.due(case, "ours"):
                run.add(case, "ours", status=status)

    stage = gpu.Stage("wrong", "", 1, 1, stage)
    assert gpu.run_here(stage, tmp_path, 10, rehearsal=True) == gpu.WRONG
    run = gpu.Run(CPU, True, gpu.Rows("wrong", tmp_path, CPU), tmp_path, time.monotonic() + 10)
    assert [run.due(case, "ours") for case in "abc"] == [True, True, False]


def test_a_stage_that_crashes_keeps_its_rows(tmp_path, capsys):
    assert gpu.run_here(counting([], fail="b"), tmp_path, 10, rehearsal=True) == gpu.WRONG
    assert "a crash" in capsys.readouterr().err and set(rows_of("counting", tmp_path)) == {("a", "ours")}


def test_rows_name_sources_and_versions(tmp_path, monkeypatch):
    def no_git(*arguments, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(gpu.subprocess, "run", no_git)
    gpu.run_here(counting([]), tmp_path, 10, rehearsal=True)
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
                limit = gpu.limit_of(stage, stages[position:], left)
                assert (0 if budget == 120 else gpu.LEAST) <= limit <= stage.limit_s
                left -= use * limit
            assert left >= gpu.GRACE
    assert gpu.limit_of(stages[-1], [], 560) == 540  # the last one gets whatever is left
    assert gpu.limit_of(stages[-1], [], 5) == 0


def test_a_stage_without_time_is_not_begun(tmp_path, monkeypatch, capsys):
    begun, now = [], [0.0]

    def apart(stage, out, limit, options, packages):
        begun.append((stage.name, limit))
        now[0] += 1.2 * limit + gpu.GRACE  # every stage goes beyond its limit
        return gpu.CUT_OFF

    monkeypatch.setattr(gpu, "run_apart", apart)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    assert gpu.main(["--rehearse", "--budget", "150", "--out", str(tmp_path)]) == gpu.CUT_OFF
    assert [name for name, _ in begun] == list(STAGES)[: len(begun)] and 0 < len(begun) < len(STAGES)
    assert all(limit >= gpu.LEAST for _, limit in begun)
    assert "sanitizer: not begun, 0 s are left for it" in capsys.readouterr().out


def test_a_stage_that_hangs_is_ended(tmp_path, monkeypatch):
    """The limit comes before its process has imported torch."""
    monkeypatch.setattr(gpu, "GRACE", 0)
    start = time.monotonic()
    assert gpu.run_apart(STAGES["networks"], tmp_path, 0.05, ["--rehearse"]) == gpu.CUT_OFF
    assert time.monotonic() - start < 10


@pytest.mark.slow
def test_stages_run_in_processes_of_their_own(tmp_path, capfd):
    assert gpu.main(["--rehearse", "--stage", "environment", "--out", str(tmp_path)]) == gpu.DONE
    row = rows_of("stages", tmp_path)["environment", "stage"]
    assert row["status"] == "done" and row["seconds"] > 0
    assert ("bandwidth", "copy, read + written") in rows_of("environment", tmp_path)
    assert "== environment: done" in capfd.readouterr().out


# --- packages from wheels ---------------------------------------------------------------------------------------------


def wheel(folder, name, version, files=()):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        archive.writestr(f"{name}-{version}.dist-info/METADATA", metadata)
        for path in files:
            archive.writestr(path, "VALUE = 7\n")


def test_what_is_not_installed_is_unpacked(tmp_path):
    wheel(tmp_path / "wheels", "abacus", "1.5", ["abacus/__init__.py", "abacus-1.5.data/purelib/beads.py"])
    wheel(tmp_path / "wheels", "torch", "99.0", ["torch.py"])  # installed
    (tmp_path / "wheels" / "README").write_text("no wheel")
    target = tmp_path / "target"
    assert wheels.unpack(tmp_path / "wheels", target) == {"abacus": "1.5"}
    assert (target / "abacus" / "__init__.py").is_file() and (target / "beads.py").is_file()
    assert not (target / "torch.py").exists()


@pytest.mark.parametrize(
    "name, message",
    [(None, "which is no folder"), ("", "which has none"), ("abacus-1.5-cp311-cp311-linux_x86_64.whl", "pure Python"),
     ("abacus-1.5-py3-none-any.whl", "abacus-1.5-py3-none-any.whl cannot be unpacked: File is not a zip file")],
)  # fmt: skip
def test_what_is_no_folder_of_wheels(name, message, tmp_path, capsys):
    folder = tmp_path / "wheels"
    if name is not None:
        folder.mkdir()
    if name:
        (folder / name).write_text("no zip")
    with pytest.raises(ValueError, match=message):
        wheels.unpack(folder, tmp_path / "target")
    with pytest.raises(SystemExit):
        gpu.main(["--rehearse", "--stage", "environment", "--out", str(tmp_path), "--wheels", str(folder)])
    assert f"--wheels: {'' if name else 'expected a folder'}" in capsys.readouterr().err


@pytest.mark.slow
def test_stages_have_what_comes_as_wheels(tmp_path, monkeypatch, capfd):
    """In their own processes, where the package of that name was not installed."""
    wheel(tmp_path / "wheels", "einops", "99.0", ["einops/__init__.py"])
    monkeypatch.setattr(wheels, "_installed", lambda distribution: False)
    monkeypatch.setenv("BCOS_WHEELS", str(tmp_path / "wheels"))
    assert gpu.main(["--rehearse", "--stage", "environment", "--out", str(tmp_path)]) == gpu.DONE
    assert "from wheels: einops 99.0" in capfd.readouterr().out
    assert rows_of("environment", tmp_path)["packages", "einops"]["says"] == "99.0"


# --- the stages, rehearsed --------------------------------------------------------------------------------------------


def test_environment(rehearse):
    status, rows = rehearse("environment")
    assert status == gpu.DONE
    assert {case for case, _ in rows} == {"tools", "packages", "bandwidth", "matrix product 64^3"}
    assert rows["matrix product 64^3", "bfloat16"]["TFLOP_per_s"] > 0
    assert rows["tools", "nvcc"]["status"] in ("there", "missing")


def test_builds(rehearse):
    status, rows = rehearse("builds")
    assert status == gpu.DONE and rows["setup.py", "native"]["status"] == "built"
    assert rows["triton", "compiled side by side"]["status"] == "compiled"
    assert rows["triton", "compiled side by side"]["processes"] == 2


def test_builds_are_made_again_on_every_machine(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(gpu_stages, "output_of", lambda *command, **options: (made.append(command), (0, "built"))[1])
    monkeypatch.setattr(gpu_stages.gpu_warm_up, "side_by_side", lambda run: {"status": "compiled"})
    for _ in range(2):
        assert gpu.run_here(STAGES["builds"], tmp_path, 60, rehearsal=True) == gpu.DONE
    assert len(made) == 2


def test_parts_of_the_warm_up_are_all_of_it(monkeypatch, capsys):
    launched = []
    monkeypatch.setattr(gpu_warm_up, "_launch", lambda case, precision, *where: launched.append((case, precision)))
    monkeypatch.setattr(gpu_warm_up, "layer_cases", lambda: selftest_cases.timed_cases(quick=True))
    monkeypatch.setattr(gpu_warm_up, "tuned_cases", lambda: selftest_cases.timed_cases(quick=True))
    every = gpu_warm_up.calls()
    monkeypatch.setattr(gpu_warm_up, "calls", lambda rehearsal: every)
    for part in range(7):
        gpu_warm_up.main([str(part), "7", "--rehearse"])
    assert launched == every and {precision for _, precision in every} == set(selftest.BOUNDS)
    assert sum(int(line.split()[0]) for line in capsys.readouterr().out.splitlines()) == len(every)
    with pytest.raises(SystemExit):
        gpu_warm_up.main(["7", "7"])


def test_what_raises_while_warming_up_ends_nothing(monkeypatch, capsys):
    def raising(case, precision, *where):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_warm_up, "_launch", raising)
    assert gpu_warm_up.main(["0", "1", "--rehearse"]) == 0
    assert "RuntimeError: no such kernel" in (said := capsys.readouterr().out) and "4 calls, 4 raised" in said


@pytest.mark.parametrize("program, limit, expected", [("raise SystemExit(7)", 60, "incomplete"),
                                                      ("import time; time.sleep(60)", 1.5, None)])  # fmt: skip
def test_a_part_of_the_warm_up_that_crashes_or_hangs(program, limit, expected, tmp_path, monkeypatch):
    popen = gpu_warm_up.subprocess.Popen
    monkeypatch.setattr(gpu_warm_up.subprocess, "Popen", lambda c, **o: popen([c[0], "-c", program], **o))
    run = gpu.Run(CPU, True, gpu.Rows("builds", tmp_path, CPU), tmp_path, time.monotonic() + limit)
    if expected is None:
        with pytest.raises(gpu.OutOfTime):
            gpu_warm_up.side_by_side(run)
    else:
        row = gpu_warm_up.side_by_side(run)
        assert row["status"] == expected and row["crashed"] == row["processes"] == 2


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_correctness(rehearse):
    status, rows = rehearse("correctness")
    assert status == gpu.DONE
    assert {row["status"] for row in rows.values()} == {"right", "not run"}
    for case, who in rows:
        assert rows[case, who]["status"] == "right" or case.startswith(("side stream", "CUDA graph"))
    assert sum(case.startswith("compiled: ") for case, _ in rows) >= 2


def test_wrong_numbers_end_the_correctness_stage_wrong(rehearse, monkeypatch):
    monkeypatch.setattr(gpu_correctness, "EXTRAS", {})
    monkeypatch.setattr(gpu_correctness, "LARGE", {})
    right = gpu_correctness.selftest._worst
    monkeypatch.setattr(gpu_correctness.selftest, "_worst", lambda *arguments: (right(*arguments)[0] + 2, "y: off"))
    status, rows = rehearse("correctness")
    assert status == gpu.WRONG and {row["status"] for row in rows.values()} == {"wrong"}


def test_tuning(rehearse):
    status, rows = rehearse("tuning")
    assert status == gpu.DONE and rows["checks", "all"]["checks"] >= len(selftest_cases.cases(quick=True))


def test_tuning_takes_the_checks_of_the_stage_before(rehearse, tmp_path, monkeypatch, capsys):
    """Wrong ones too; what is missing there is checked, and so is all of it where the sources are others."""
    cases = [selftest_cases.linear(name, 20, 16, 12) for name in ("right", "wrong", "missing")]
    monkeypatch.setattr(gpu_stages.selftest_cases, "cases", lambda quick=False: cases)
    monkeypatch.setattr(gpu_stages.selftest, "usable", lambda device: ["cpu"])
    monkeypatch.setattr(gpu_stages.selftest, "precisions", lambda device, quick: ["float32"])
    before = gpu.Rows("correctness", tmp_path, CPU)
    for case in cases[:2]:
        before.add(f"linear float32, {case}", "cpu", status=case.name, fraction_of_allowed=0.1, detail="y: as told")
    checked = []
    check = gpu_stages.selftest_commands.check
    monkeypatch.setattr(
        gpu_stages.selftest_commands, "check", lambda case, *rest: (checked.append(case.name), check(case, *rest))[1]
    )
    status, rows = rehearse("tuning")
    assert status == gpu.WRONG and checked == ["missing"] and rows["checks", "all"]["checks"] == 3
    assert rows[f"linear float32, {cases[1]}", "cpu"]["reason"] == "y: as told"
    assert "2 checks are those of the stage correctness" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "sources", lambda: "elsewhere")
    status, rows = rehearse("tuning")
    assert status == gpu.DONE and checked == ["missing", "right", "wrong", "missing"]


def test_tuning_writes_row_after_row(tmp_path, monkeypatch):
    """The whole stage, with the CPU in the place of a GPU."""
    stages, cases = gpu_stages, [selftest_cases.linear("layer", 20, 16, 12)]
    monkeypatch.setenv("BCOS_TUNING_CACHE", str(tmp_path / "tuning"))
    monkeypatch.setattr(stages.tuning, "identity", lambda device: ("Abacus", "sm_99"))
    monkeypatch.setattr(stages.selftest, "usable", lambda device: ["reference"])
    monkeypatch.setattr(stages.selftest, "_milliseconds", lambda runs, rounds, warmup=3: dict.fromkeys(runs, 1.0))
    monkeypatch.setattr(stages.selftest_cases, "cases", lambda quick=False: cases)
    monkeypatch.setattr(stages.selftest_cases, "timed_cases", lambda quick=False, batch=64: cases)
    monkeypatch.setattr(stages.selftest_cases, "network_cases", lambda name, batch: [])
    run = gpu.Run(CPU, False, gpu.Rows("tuning", tmp_path, CPU), tmp_path, time.monotonic() + 60)
    gpu_stages.tune(run)
    rows = rows_of("tuning", tmp_path)
    for dtype in ("bfloat16", "float32"):
        for direction in ("forward", "backward", "inference"):
            row = rows[f"linear {dtype}, layer: x 20x16, weight 12x16", direction]
            assert row["fastest"] == "reference" and row["reference_ms"] == 1.0
    assert rows["auto, forward and backward together", "auto"]["status"] == "right" and not run.wrong
    table = json.loads((tmp_path / "tuning" / "abacus.json").read_text())
    assert len(table["rows"]) == 6 and table["device"] == "Abacus"


def test_a_tool_that_hangs_is_ended_with_its_children(tmp_path):
    started = tmp_path / "started"
    script = f"sh -c 'sleep 1; touch {tmp_path / 'survived'}' & touch {started}; wait"
    assert gpu.output_of("sh", "-c", script, timeout=0.3) == (124, "took more than 0 s")
    time.sleep(1.2)
    assert started.exists() and not (tmp_path / "survived").exists()
    assert gpu.output_of("no-such-tool")[0] == 127 and gpu.output_of("sh", "-c", "exit 7") == (7, "")


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
    run = gpu.Run(CPU, True, gpu.Rows("sanitizer", tmp_path, CPU), tmp_path, time.monotonic() + 60)
    found = gpu_stages._sanitized(run, str(tool), "memcheck", "cuda:cutlass")
    assert found["status"] == status and found.get("skipped") == skipped
    assert found.get("says", "") == ("ERROR SUMMARY: 3 errors" if status == "wrong" else "")


def test_layers(rehearse):
    status, rows = rehearse("layers")
    assert status == gpu.DONE
    contenders = {case: {who for c, who in rows if c == case} for case, _ in rows}
    assert len(contenders) == 4
    for case, found in contenders.items():
        assert found >= ({"plain", "plain-compiled", "peer-compiled"} if "max-autotune" in case else
                         {"plain", "peer", "ours-auto"})  # fmt: skip
    assert all(row["median_ms"] > 0 and row["forward_ms"] > 0 for row in rows.values())
    assert all(row["difference_from_peer"] < 1e-4 for (_, who), row in rows.items() if "plain" not in who)


def test_networks(rehearse):
    status, rows = rehearse("networks")
    assert status == gpu.DONE
    tasks = ("training", "inference", "explanation")
    of_the_package = {who: row for (case, who), row in rows.items() if case.endswith("package bcos")}
    rows = {key: row for key, row in rows.items() if not key[0].endswith("package bcos")}
    assert {who for _, who in rows} == {f"{who}, {task}" for who in ("plain", "ours") for task in tasks}
    assert set(of_the_package) == {
        f"{who}, {task}" for who in ("plain", "bcos", "bcos, fused", "bcos, fused, NCHW") for task in tasks
    }
    assert 0 < of_the_package["bcos, fused, training"]["difference_from_peer"] < 1e-2
    assert all(row["images_per_s"] > 0 for row in of_the_package.values())
    ours = next(row for (_, who), row in rows.items() if who == "ours, training")
    assert ours["ratio"] > 0 and ours["peak_MiB"] > 0 and ours["backends"]


def test_a_package_s_network_with_other_gradients_is_wrong(rehearse, monkeypatch):
    build = gpu_networks.Models.build

    def off(models, contender):
        model = build(models, contender)
        if contender == "fused-peer":
            with torch.no_grad():
                next(model.parameters()).mul_(1.1)  # its first layer normalises weights: not seen
                list(model.parameters())[1].mul_(1.1)
        return model

    monkeypatch.setattr(gpu_networks.Models, "build", off)
    status, rows = rehearse("networks")
    assert status == gpu.WRONG
    assert rows["resnet18, float32, batch 2, package bcos", "bcos, fused"]["status"] == "wrong"


def test_networks_without_the_package(rehearse, monkeypatch):
    def missing(models):
        raise networks.NotHere("needs bcos", "pip install bcos")

    monkeypatch.setattr(gpu_networks.Models, "peer", missing)
    status, rows = rehearse("networks")
    assert status == gpu.DONE
    assert rows["resnet18, float32, batch 2, package bcos", "bcos"]["reason"] == "needs bcos: pip install bcos"


def test_the_networks_that_are_measured():
    """All of section 10's, at every precision; what needs no compiler first."""
    every = list(gpu_networks.plan())
    assert len(set(every)) == len(every) and {name for name, _, _ in every} == set(gpu_networks.KNOWN)
    assert {(name, precision) for name, precision, group in every if group == "eager"} == {
        (name, precision) for name in gpu_networks.KNOWN for precision in ("bfloat16", "tf32", "float32")
    }
    first = [group for _, _, group in every[: len(gpu_networks.KNOWN)]]
    assert set(first) == {"eager"}
    assert all(name in networks.NETWORKS for name, _, group in every if group == gpu_networks.PACKAGE)


def test_a_network_whose_library_is_not_there(tmp_path, monkeypatch):
    network = gpu_networks.Measured(list, 2, needs="no_such_library")
    monkeypatch.setattr(gpu_networks, "REHEARSED", {"resnet18": network})
    run = gpu.Run(CPU, True, gpu.Rows("networks", tmp_path, CPU), tmp_path, time.monotonic() + 60)
    gpu_networks.networks(run)
    row = rows_of("networks", tmp_path)["resnet18, float32, batch 2, eager", "all"]
    assert (row["status"], row["reason"]) == ("not run", "needs no_such_library") and not run.wrong


def test_clip_s_tower_is_measured_as_it_is_converted():
    """The one network of the stage that is no classifier: by a small model of its kind."""
    from tests.bcosification.small_clip import clip

    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    model = gpu_networks.converted_of(clip("resnet"), images)
    variances = [norm.running_var for norm in model.modules() if getattr(norm, "running_var", None) is not None]
    assert variances and all((var != 1).any() for var in variances)


def test_rows_have_the_floor_where_the_rates_are_known(rehearse, tmp_path):
    _, before = rehearse("layers")
    assert not any("floor_ms" in row for row in before.values())
    rates_of(tmp_path)
    run = gpu.Run(CPU, True, gpu.Rows("layers", tmp_path, CPU), tmp_path, time.monotonic() + 60, again=True)
    gpu_layers.layers(run)
    rows = rows_of("layers", tmp_path)
    case = next(case for case, _ in rows if case.startswith("linear float32") and "autotune" not in case)
    work, backward = floor.of_layer(selftest_cases.linear("MLP", 10, 16, 8), 4)
    row = rows[case, "plain"]
    assert row["forward_floor_ms"] == pytest.approx(work.bytes / 10e6, rel=1e-4)
    assert row["floor_ms"] == pytest.approx((work.bytes + backward.bytes) / 10e6, rel=1e-4)
    assert row["device_ms"] > 0 and row["device_forward_ratio"] == 1
    assert "floor_ms" not in rows[case, "peer"]


def test_what_a_graph_cannot_hold_is_timed_without_one(rehearse, monkeypatch):
    def refuses(function, device):
        if len(refused) == 1:
            refused.append(function)
            raise RuntimeError("operation not permitted when stream is capturing")
        refused.append(function)
        return function

    refused = []
    monkeypatch.setattr(gpu_layers, "captured", refuses)
    status, rows = rehearse("layers")
    assert status == gpu.DONE
    without = [of for of, row in rows.items() if "device_ms" not in row]
    assert len(without) == 1 and without[0][1] != "plain" and rows[without[0]]["ratio"] > 0


def test_finetune(rehearse):
    status, rows = rehearse("finetune")
    assert status == gpu.DONE
    (label,) = {case for case, _ in rows if ": kernels" not in case}
    assert label == "resnet18, float32, batch 4, 64 pixels, 4 steps"
    for who in ("plain", "peer", "ours"):
        row = rows[label, who]
        assert row["status"] == "right" and row["images_per_s"] > 0 and row["resident_ms"] > 0
        assert 0 < row["waiting"] < 1 and 0 < row["first_loss"] < 2 and row["last_loss"] > 0
        shares = [r["share_of_step"] for (case, _), r in rows.items() if case == f"{label}: kernels of {who}"]
        assert len(shares) > 5 and 0.3 < sum(shares) <= 1.001 and shares == sorted(shares, reverse=True)
    kernels = {kernel for case, kernel in rows if case.endswith("kernels of ours")}
    assert any("bcos" in kernel for kernel in kernels), kernels


def test_a_fine_tune_that_goes_wrong_says_so():
    training = gpu_finetune.Training(torch.nn.Linear(2, 2), CPU, None)
    training.losses, training.memory = [torch.tensor(1.0), torch.tensor(0.9)], [1000, 1004]
    assert training.wrong() == ""
    training.memory.append(1000 + 2**20)
    assert training.wrong() == "memory that grows: 1.0 MiB from the first steps on"
    training.losses.append(torch.tensor(float("nan")))
    assert training.wrong() == "a loss that is not finite"


def test_sanitizer(rehearse):
    status, rows = rehearse("sanitizer")
    assert status == gpu.DONE
    kinds = {case.partition(":")[0] for case, _ in rows}
    assert {"guard bands", "3 repeats", "compute-sanitizer"} <= kinds | {"compute-sanitizer"}
    assert all(row["status"] == "right" for (case, _), row in rows.items() if ":" in case)
    assert any(row["tensors"] > 4 for (case, _), row in rows.items() if case.startswith("guard bands"))


# --- times on a GPU, by events that are stood in for ------------------------------------------------------------------


@pytest.fixture
def events(monkeypatch):
    """Events of a device whose clock a call of `tick` moves on; `waits` counts how often the host waited."""
    clock = types.SimpleNamespace(ms=0.0, waits=0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream=None):
            self.at = clock.ms

        def elapsed_time(self, end):
            return end.at - self.at

    def wait(device=None):
        clock.waits += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    return clock


def ticking(clock, ms):
    def run():
        clock.ms += ms

    return run


def test_suites_time_by_events_and_wait_once_a_round(events):
    runs = {"plain": ticking(events, 2.0), "ours": ticking(events, 3.0)}
    times = measuring.interleaved(runs, rounds=4, warmup=1, device=torch.device("cuda"))
    assert times == {"plain": [0.002] * 4, "ours": [0.003] * 4} and events.waits == 1 + 4


def test_the_selftest_times_by_events_and_waits_once(events):
    runs = {"reference": ticking(events, 2.0), "triton": ticking(events, 3.0)}
    assert selftest._milliseconds(runs, rounds=5) == {"reference": 2.0, "triton": 3.0} and events.waits == 1


# --- guard bands ------------------------------------------------------------------------------------------------------

LINEAR = selftest_cases.linear("layer", 6, 8, 5)


def with_launcher(monkeypatch, change):
    launcher = gpu_guards.dispatch._launcher

    def changed(name, which):
        launch = launcher(name, which)
        return (lambda *arguments: change(launch, *arguments)) if which == "linear_forward" else launch

    monkeypatch.setattr(gpu_guards.dispatch, "_launcher", changed)


def test_a_write_beside_a_tensor_is_seen(monkeypatch):
    def stray(launch, x, *others):
        with torch.no_grad():
            made = torch.empty(3)
            if made.untyped_storage().nbytes() > 1000:  # between bands
                made.as_strided((1,), (1,), made.storage_offset() + 3).fill_(1.0)
        return launch(x, *others)

    assert gpu_guards.guarded(LINEAR, "float32", "reference", CPU)["status"] == "right"
    with_launcher(monkeypatch, stray)
    found = gpu_guards.guarded(LINEAR, "float32", "reference", CPU)
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
    found = gpu_guards.guarded(LINEAR, "float32", "reference", CPU)
    assert found["status"] == "wrong" and "other results" in found["detail"]


def test_a_result_that_changes_is_seen(monkeypatch):
    calls = []

    def unsteady(launch, x, *others):
        calls.append(None)
        y, *rest = launch(x, *others)
        return y + 1e-6 * (len(calls) == 4), *rest

    assert gpu_guards.repeated(LINEAR, "float32", "reference", CPU, 5) == {"status": "right", "different": 0}
    with_launcher(monkeypatch, unsteady)
    assert gpu_guards.repeated(LINEAR, "float32", "reference", CPU, 5) == {"status": "wrong", "different": 1}


def test_the_small_set_for_the_checkers(capsys, monkeypatch):
    assert gpu_guards.main(["reference"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(selftest_cases.cases(quick=True))

    def refuse(launch, *arguments):
        raise NotImplementedError("linear: not this")

    with_launcher(monkeypatch, refuse)
    assert gpu_guards.main(["reference"]) == 0
    lines = capsys.readouterr().out.splitlines()
    skipped = [line for line in lines if line.startswith("not built: ")]
    assert len(lines) == len(selftest_cases.cases(quick=True)) and len(skipped) == len(
        [case for case in selftest_cases.cases(quick=True) if case.op in ("linear", "linear_gelu")]
    )
    assert skipped[0] == "not built: linear, B = 2: x 37x45, weight 29x45: linear: not this"


def test_rows_are_json(tmp_path):
    gpu.run_here(counting([]), tmp_path, 10, rehearsal=True)
    content = json.loads((tmp_path / "gpu_counting.json").read_text())
    assert set(content) == {"runs", "rows"} and len(content["runs"]) == 1
