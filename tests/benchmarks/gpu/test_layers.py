"""The stage `layers`, rehearsed on the CPU; floors; what no CUDA graph can hold."""

from __future__ import annotations

import time

import pytest

from bcos_kernels import selftest_cases
from benchmarks import floor
from benchmarks.gpu import command, layers, running
from tests.benchmarks.gpu.rows import CPU, rates_of, rows_of


def test_layers(rehearse):
    status, rows = rehearse("layers")
    assert status == command.DONE
    contenders = {case: {who for c, who in rows if c == case} for case, _ in rows}
    assert len(contenders) == 4
    for case, found in contenders.items():
        assert found >= ({"plain", "plain-compiled", "peer-compiled"} if "max-autotune" in case else
                         {"plain", "peer", "ours-auto"})  # fmt: skip
    assert all(row["median_ms"] > 0 and row["forward_ms"] > 0 for row in rows.values())
    assert all(row["difference_from_peer"] < 1e-4 for (_, who), row in rows.items() if "plain" not in who)


def test_rows_have_the_floor_where_the_rates_are_known(rehearse, tmp_path):
    _, before = rehearse("layers")
    assert not any("floor_ms" in row for row in before.values())
    rates_of(tmp_path)
    run = running.Run(CPU, True, running.Rows("layers", tmp_path, CPU), tmp_path, time.monotonic() + 60, again=True)
    layers.layers(run)
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
    monkeypatch.setattr(layers, "captured", refuses)
    status, rows = rehearse("layers")
    assert status == command.DONE
    without = [of for of, row in rows.items() if "device_ms" not in row]
    assert len(without) == 1 and without[0][1] != "plain" and rows[without[0]]["ratio"] > 0
