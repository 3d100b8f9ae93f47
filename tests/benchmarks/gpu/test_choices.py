"""The stage `choices`: what it asks, and the tiles that it tries."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from bcos_kernels.triton_kernels import configs
from benchmarks.gpu import choices, command, running, warm_up
from tests.benchmarks.gpu.rows import CPU, rates_of, rows_of


def test_choices(rehearse):
    """Without Triton's interpreter: what the other backends can be asked."""
    status, rows = rehearse("choices")
    assert status == command.DONE
    label = "launching: resnet18, float32, batch 2"
    assert {who for case, who in rows if case == label} == {
        "plain", "plain, CUDA graph", "ours", "ours, CUDA graph"
    }  # fmt: skip
    assert rows[label, "ours"]["host_ms"] > 0 and "host_ms" not in rows[label, "ours, CUDA graph"]
    passes = {case for case, _ in rows if case.startswith("pass: ")}
    assert len(passes) == 8 and all(rows[case, "cpu"]["GB_per_s"] > 0 for case in passes)
    assert rows["norm and tiles", "triton"]["status"] == "not run"


def test_rates_of_passes_are_shares_of_the_copy_s(tmp_path):
    rates_of(tmp_path)
    run = running.Run(CPU, True, running.Rows("choices", tmp_path, CPU), tmp_path, time.monotonic() + 60)
    each = choices.passes(rehearsal=True)[0]
    choices.pass_of(run, each, ["reference", "cpu"])
    for row in rows_of("choices", tmp_path).values():
        assert row["share_of_copy"] == pytest.approx(row["GB_per_s"] / 10, rel=1e-3)
    forward = rows_of("choices", tmp_path)[f"pass: {each.case.op} float32, {each.case}, forward", "cpu"]
    assert forward["GB_per_s"] == pytest.approx(2 * 4 * 2 * 8 * 36 / forward["median_ms"] / 1e6, rel=1e-3)


def test_only_tiles_that_a_call_looks_up_are_tried():
    def looks_up():
        configs.config_for(1000, 1000, 64, torch.float32)

    assert choices._consulted(looks_up) == {(32, "large")}
    assert choices._consulted(lambda: configs.descriptor_config_for(1000, 48, 64, torch.bfloat16)) == {"tall"}
    tile = choices.TILES[32, "large"][0]
    with choices.tiles((32, "large"), tile):
        assert configs.config_for(1000, 1000, 64, torch.float32) == tile
    with choices.tiles("large", tile):
        assert configs.descriptor_config_for(1000, 128, 64, torch.bfloat16) == tile
    assert configs.config_for(1000, 1000, 64, torch.float32) != tile


def test_tiles_to_try_are_none_of_those_that_are_used():
    both = (configs.CONFIGS, choices.TILES), (configs.DESCRIPTOR_CONFIGS, choices.DESCRIPTOR_TILES)
    for table, tried in both:
        for form, tiles in tried.items():
            assert table[form] not in tiles and len(set(tiles)) == len(tiles)
            for tile in tiles:  # accumulators of 255 registers a thread at most, operands in 227 KB
                itemsize = 2 if isinstance(form, str) else form[0] // 8
                operands = (tile.block_m + tile.block_n) * tile.block_k * itemsize * tile.num_stages
                assert tile.block_m * tile.block_n / (32 * tile.num_warps) <= 128 and operands <= 227 * 1024


@pytest.mark.slow
def test_norms_and_tiles_in_the_interpreter(tmp_path):
    """In a process of its own: whether Triton interprets is decided when its kernels are defined."""
    program = f"""
import time, torch
from pathlib import Path
from benchmarks.gpu import choices, running
run = running.Run(torch.device("cpu"), True, running.Rows("choices", Path({str(tmp_path)!r}), torch.device("cpu")),
              Path({str(tmp_path)!r}), time.monotonic() + 100)
choices.norms_of(run, choices.norm_cases(True)[0])
for case, precision in choices.tiled_cases(True):
    choices.tiles_of(run, case, precision)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=running.ROOT, env=environment)
    rows = rows_of("choices", tmp_path)
    (norm,) = {case for case, _ in rows if case.startswith("norm: ")}
    assert {who for case, who in rows if case == norm} == {
        "library, product alone", "no norm", "norm in the main loop", "norm from the producer", "norm from a pass"
    }  # fmt: skip
    forward = {who for case, who in rows if case.startswith("tiles: ") and case.endswith("forward")}
    assert len(forward) == 1 + len(choices.TILES[32, "large"]) and "configs.py" in forward


def test_parts_of_the_warm_up_of_tiles(monkeypatch):
    launched = []

    def launch(case, precision, *where):
        tile = configs.CONFIGS[32, "large"]
        launched.append((case, precision, tile))

    monkeypatch.setattr(warm_up, "_launch", launch)
    for part in range(3):
        assert warm_up.main([str(part), "3", "--tiles", "--rehearse"]) == 0
    ((case, precision),) = choices.tiled_cases(True)
    tiles = [configs.CONFIGS[32, "large"], *choices.TILES[32, "large"]]
    assert launched == [(case, precision, tile) for tile in tiles]
