"""The stage `networks`, rehearsed on the CPU; what is measured, and what is not there."""

from __future__ import annotations

import time

import torch

from benchmarks import networks as contenders
from benchmarks.gpu import command, networks, running
from tests.benchmarks.gpu.rows import CPU, rows_of


def test_networks(rehearse):
    status, rows = rehearse("networks")
    assert status == command.DONE
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
    build = networks.Models.build

    def off(models, contender):
        model = build(models, contender)
        if contender == "fused-peer":
            with torch.no_grad():
                next(model.parameters()).mul_(1.1)  # its first layer normalises weights: not seen
                list(model.parameters())[1].mul_(1.1)
        return model

    monkeypatch.setattr(networks.Models, "build", off)
    status, rows = rehearse("networks")
    assert status == command.WRONG
    assert rows["resnet18, float32, batch 2, package bcos", "bcos, fused"]["status"] == "wrong"


def test_networks_without_the_package(rehearse, monkeypatch):
    def missing(models):
        raise contenders.NotHere("needs bcos", "pip install bcos")

    monkeypatch.setattr(networks.Models, "peer", missing)
    status, rows = rehearse("networks")
    assert status == command.DONE
    assert rows["resnet18, float32, batch 2, package bcos", "bcos"]["reason"] == "needs bcos: pip install bcos"


def test_the_networks_that_are_measured():
    """All of section 10's, at every precision; what needs no compiler first."""
    every = list(networks.plan())
    assert len(set(every)) == len(every) and {name for name, _, _ in every} == set(networks.KNOWN)
    assert {(name, precision) for name, precision, group in every if group == "eager"} == {
        (name, precision) for name in networks.KNOWN for precision in ("bfloat16", "tf32", "float32")
    }
    first = [group for _, _, group in every[: len(networks.KNOWN)]]
    assert set(first) == {"eager"}
    assert all(name in contenders.NETWORKS for name, _, group in every if group == networks.PACKAGE)


def test_a_network_whose_library_is_not_there(tmp_path, monkeypatch):
    network = networks.Measured(list, 2, needs="no_such_library")
    monkeypatch.setattr(networks, "REHEARSED", {"resnet18": network})
    run = running.Run(CPU, True, running.Rows("networks", tmp_path, CPU), tmp_path, time.monotonic() + 60)
    networks.networks(run)
    row = rows_of("networks", tmp_path)["resnet18, float32, batch 2, eager", "all"]
    assert (row["status"], row["reason"]) == ("not run", "needs no_such_library") and not run.wrong


def test_clip_s_tower_is_measured_as_it_is_converted():
    """The one network of the stage that is no classifier: by a small model of its kind."""
    from tests.bcosification.small_clip import clip

    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    model = networks.converted_of(clip("resnet"), images)
    variances = [norm.running_var for norm in model.modules() if getattr(norm, "running_var", None) is not None]
    assert variances and all((var != 1).any() for var in variances)
