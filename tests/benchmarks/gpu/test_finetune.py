"""The stage `finetune`, rehearsed on the CPU; runs that go wrong."""

from __future__ import annotations

import torch

from benchmarks.gpu import command, finetune
from tests.benchmarks.gpu.rows import CPU


def test_finetune(rehearse):
    status, rows = rehearse("finetune")
    assert status == command.DONE
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
    training = finetune.Training(torch.nn.Linear(2, 2), CPU, None)
    training.losses, training.memory = [torch.tensor(1.0), torch.tensor(0.9)], [1000, 1004]
    assert training.wrong() == ""
    training.memory.append(1000 + 2**20)
    assert training.wrong() == "memory that grows: 1.0 MiB from the first steps on"
    training.losses.append(torch.tensor(float("nan")))
    assert training.wrong() == "a loss that is not finite"
