"""What a run tells of the backends that its B-cos layers ran on."""

import json
import re
import warnings

import pytest
import torch

import bcos_kernels
import bcosification
from bcosification.cli import main
from bcosification.train.backend_times import BackendTimes, told
from bcosification.train.configuration import FinetuneConfig
from bcosification.train.finetuning import finetune
from bcosification.train.lightning_module import ClassificationModule
from bcosification.train.training import train
from tests.bcosification.train.small import STATISTICS, small_data, small_network

needs_kernels = pytest.mark.skipif(
    bcos_kernels.backends()["cpu"] is not None, reason="no CPU kernels here: everything runs on the reference"
)


def _run(output, **changes):
    options = dict(
        data="digits", epochs=1, batch_size=8, limit_batches=6, lr=1e-3, progress=None, conversion=STATISTICS,
        accelerator="cpu",
    )  # fmt: skip
    return finetune(FinetuneConfig(output=str(output), **(options | changes)), model=small_network())


@needs_kernels
def test_a_run_on_kernels_warns_of_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without a kernel.*")
        found = _run(tmp_path / "run").backends
    assert (found["fallback_share"], found["fallback_ops"], found["steps"]) == (0, [], 3)
    assert {name for runs in found["seconds"].values() for name in runs} == {"cpu"}
    assert {"conv2d", "conv2d_backward"} <= found["seconds"].keys()
    assert all(value > 0 for runs in found["seconds"].values() for value in runs.values())
    assert json.loads((tmp_path / "run" / "backends.json").read_text()) == found
    assert told(found) == (
        "share of the time in B-cos layers and norms that ran on the fallback, plain PyTorch: 0 %; measured in 3 "
        "training steps on cpu"
    )
    # A run that is complete already tells what was measured then.
    config = FinetuneConfig(
        data="digits", output=str(tmp_path / "run"), epochs=1, batch_size=8, limit_batches=6, lr=1e-3, progress=None,
        conversion=STATISTICS, accelerator="cpu",
    )  # fmt: skip
    assert finetune(config, model=small_network(), resume=True).backends == found


@needs_kernels
def test_what_runs_on_the_reference_is_named(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise NotImplementedError("not built")

    monkeypatch.setattr(bcos_kernels.cpu, "conv2d_backward", refuse)
    with pytest.warns(RuntimeWarning, match="without a kernel on cpu, where there are kernels: conv2d_backward, .* %"):
        found = _run(tmp_path / "run").backends
    assert found["fallback_ops"] == ["conv2d_backward"] and found["seconds"]["conv2d_backward"].keys() == {"reference"}
    slow = found["seconds"]["conv2d_backward"]["reference"]
    total = sum(value for runs in found["seconds"].values() for value in runs.values())
    assert found["fallback_share"] == pytest.approx(slow / total) and 0 < found["fallback_share"] < 1

    tiny = "--model resnet18 --no-pretrained --data digits --epochs 1 --batch-size 4 --limit-batches 2".split()
    assert main(["finetune", *tiny, "--out", str(tmp_path / "cli"), "--accelerator", "cpu", "--no-progress"]) == 0
    out, err = capsys.readouterr()
    told = r"share of .*, plain PyTorch: (\d+|under 1) % \(conv2d_backward\); measured in 1 training step on cpu"
    assert re.fullmatch(told, out.splitlines()[-1])
    assert "bcosify finetune: warning: ops ran without a kernel on cpu" in err


def test_without_kernels_the_reason_is_told(tmp_path, monkeypatch):
    """Nothing is expected to run on kernels that are not there: no warning, but the report says why."""
    there = bcos_kernels.backends()
    monkeypatch.setattr(bcos_kernels, "backends", lambda: {**there, "cpu": "not built: no compiler"})
    with bcos_kernels.backend("reference"), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without a kernel.*")
        found = _run(tmp_path / "run").backends
    assert found["fallback_share"] == 1 and set(found["fallback_ops"]) == found["seconds"].keys()
    assert told(found).endswith("measured in 3 training steps on cpu; cpu: not built: no compiler")
    assert "plain PyTorch: 100 % (batch_norm" in told(found)


@pytest.mark.parametrize("batches, steps", [(1, 1), (2, 1), (3, 2), (8, 3)])
def test_the_first_step_is_left_out_and_timing_ends(batches, steps):
    module = ClassificationModule(bcosification.bcosify(small_network(), **STATISTICS), 10)
    times, running = BackendTimes(), []
    step = module.training_step

    def watched(batch, batch_idx):
        running.append(bcos_kernels.dispatch._marks is not None)
        return step(batch, batch_idx)

    module.training_step = watched
    train(module, small_data(count=2 * batches, batch_size=2), epochs=2, callbacks=[times], accelerator="cpu",
          progress=None)  # fmt: skip
    first = min(1, batches - 1)
    assert running == [first <= i < first + steps for i in range(batches)] + [False] * batches
    assert times.found["steps"] == steps and bcos_kernels.dispatch._marks is None


def test_an_error_ends_the_timing(monkeypatch):
    module = ClassificationModule(bcosification.bcosify(small_network(), **STATISTICS), 10)
    step = module.training_step

    def failing(batch, batch_idx):
        if batch_idx == 2:
            raise ArithmeticError("stop")
        return step(batch, batch_idx)

    module.training_step = failing
    times = BackendTimes()
    with pytest.raises(ArithmeticError):
        train(module, small_data(), epochs=1, callbacks=[times], accelerator="cpu", progress=None)
    assert times.found is None and bcos_kernels.dispatch._marks is None
    with bcos_kernels.timed() as seconds:
        pass
    assert seconds == {}


def test_a_run_inside_a_timing_of_ones_own(tmp_path):
    with bcos_kernels.timed() as seconds:
        assert _run(tmp_path / "run").backends is None
    assert ("conv2d", "cpu") in seconds or ("conv2d", "reference") in seconds
    assert not (tmp_path / "run" / "backends.json").exists()


def test_networks_without_ops_have_no_share():
    times = BackendTimes()
    module = ClassificationModule(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10)), 10)
    module.model(torch.zeros(1, 3, 32, 32))
    train(module, small_data(), epochs=1, callbacks=[times], accelerator="cpu", progress=None)
    assert times.found is None
