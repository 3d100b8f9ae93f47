"""What runs, and how rows are kept."""

import json

import pytest

from benchmarks import protocol
from benchmarks.protocol import Results, Settings, chosen, load_rows

HAS = ("plain", "plain-compiled", "peer", "ours", "ours-compiled")


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch):
    for name in ("CONTENDERS", "ROUNDS", "BATCH", "SIZE", "DTYPE", "RESULTS"):
        monkeypatch.delenv(f"BCOS_BENCH_{name}", raising=False)


@pytest.mark.parametrize(
    "asked, default, expected",
    [
        (None, None, HAS),
        (None, ("plain", "ours"), ("plain", "ours")),
        ("all", ("plain", "ours"), HAS),
        ("eager", None, ("plain", "peer", "ours")),
        ("ours", None, ("plain", "ours")),
        ("ours-compiled, peer,ours-low", None, ("plain", "peer", "ours-compiled")),
    ],
)
def test_contenders_are_chosen(asked, default, expected, monkeypatch):
    if asked is not None:
        monkeypatch.setenv("BCOS_BENCH_CONTENDERS", asked)
    assert chosen(HAS, default) == list(expected)


def test_contenders_that_are_none(monkeypatch):
    monkeypatch.setenv("BCOS_BENCH_CONTENDERS", "plain,us")
    with pytest.raises(ValueError, match="BCOS_BENCH_CONTENDERS: expected eager, all, or some of plain, .*, got us"):
        chosen(HAS)
    monkeypatch.setenv("BCOS_BENCH_CONTENDERS", "fused-peer")
    with pytest.raises(pytest.skip.Exception, match="none of BCOS_BENCH_CONTENDERS=fused-peer is a contender here"):
        chosen(HAS)


def test_settings_that_differ_are_in_the_label(monkeypatch):
    assert Settings.read(batch=8, rounds=7) == Settings(8, 7)
    monkeypatch.setenv("BCOS_BENCH_BATCH", "2")
    monkeypatch.setenv("BCOS_BENCH_ROUNDS", "1")
    assert Settings.read(batch=8, rounds=7) == Settings(2, 1, label=", batch 2")
    assert Settings.read(batch=2, rounds=7).label == ""
    monkeypatch.setenv("BCOS_BENCH_SIZE", "64")
    assert Settings.read(batch=8, rounds=7).label == ", batch 2, 64 pixels"
    monkeypatch.setenv("BCOS_BENCH_ROUNDS", "0")
    with pytest.raises(ValueError, match="BCOS_BENCH_ROUNDS: expected a whole number >= 1, got '0'"):
        Settings.read(batch=8, rounds=7)


def test_dtypes_of_layers(monkeypatch):
    assert protocol.dtype()[0] == "float32"
    monkeypatch.setenv("BCOS_BENCH_DTYPE", "int8")
    with pytest.raises(ValueError, match="BCOS_BENCH_DTYPE: expected one of float32, bfloat16, got 'int8'"):
        protocol.dtype()


def _results(folder, started):
    results = Results("suite", folder)
    results.started = started
    results.machine = {"device": started, "commit": "c0ffee"}
    return results


def test_a_partial_run_replaces_its_own_rows_alone(tmp_path):
    first = _results(tmp_path, "monday")
    for case in ("a", "b"):
        for contender in ("plain", "ours"):
            first.add(case, contender, ratio=1.23456789)
    second = _results(tmp_path, "tuesday")
    second.add("a", "ours", ratio=2)
    second.add("a", "peer", ratio=3)
    second.cannot("c", "ours", "not convertible yet", "no family\nat length")
    rows = load_rows("suite", tmp_path)
    assert [(row["case"], row["contender"], row["run"]["started"]) for row in rows] == [
        ("a", "plain", "monday"), ("a", "ours", "tuesday"), ("a", "peer", "tuesday"),
        ("b", "plain", "monday"), ("b", "ours", "monday"), ("c", "ours", "tuesday"),
    ]  # fmt: skip
    assert rows[0]["ratio"] == 1.2346 and rows[1]["ratio"] == 2
    assert rows[0]["run"] == {"started": "monday", "device": "monday", "commit": "c0ffee"}
    assert (rows[-1]["status"], rows[-1]["reason"]) == ("not convertible yet", "no family")
    third = _results(tmp_path, "wednesday")
    for case in ("a", "b"):
        third.add(case, "plain", ratio=1)
    third.add("b", "ours", ratio=1)
    assert set(json.loads((tmp_path / "suite.json").read_text())["runs"]) == {"tuesday", "wednesday"}
    assert load_rows("nothing", tmp_path) == []


def test_a_run_names_machine_versions_and_commit(tmp_path):
    results = Results("suite", tmp_path)
    results.add("a", "plain", ratio=1.0)
    run = load_rows("suite", tmp_path)[0]["run"]
    assert {"started", "date", "device", "threads", "capability", "torch", "python", "commit"} == set(run)
