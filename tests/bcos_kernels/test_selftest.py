"""The selftest passes what is right, finds what is wrong, and writes rows that say so."""

from __future__ import annotations

import argparse
import json
import types

import pytest
import torch

import bcos_kernels
import bcos_kernels.cpu
from bcos_kernels import (
    cutlass,
    cutlass_build,
    dispatch,
    reference,
    selftest,
    selftest_cases,
    selftest_commands,
    tuning,
)
from bcos_kernels.__main__ import main
from tests.bcos_kernels import harness

CPU = torch.device("cpu")
HERE = ("NVIDIA Abacus", "sm_99")
on_the_cpu_backend = pytest.mark.parametrize("backend", [harness.BACKENDS[1]])


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("BCOS_TUNING_CACHE", str(tmp_path / "tables"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return tmp_path / "tables"


def case_of(op: str, name: str = "") -> selftest_cases.Case:
    return next(case for case in selftest_cases.cases() if case.op == op and case.name.startswith(name))


# --- cases ------------------------------------------------------------------------------------------------------------


def test_cases_have_names_of_their_own_and_every_op_has_some():
    every, quick = selftest_cases.cases(), selftest_cases.cases(quick=True)
    names = [(case.op, str(case)) for case in every]
    assert len(set(names)) == len(names)
    assert {case.op for case in quick} == {case.op for case in every} == {op for op, _ in tuning._CLASSES}
    assert {str(case) for case in quick} < {str(case) for case in every}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_reference_is_right_in_all_cases(precision):
    for case in selftest_cases.cases():
        (result,) = selftest.check(case, precision, ["reference"], CPU)
        assert result.status == "right", (case, result.detail)


@on_the_cpu_backend
def test_a_backend_is_right(backend):
    for case in selftest_cases.cases():
        (result,) = selftest.check(case, "float32", [backend], CPU)
        assert result.status == "right", (case, result.detail)


def test_inputs_are_what_a_case_says():
    zeros = selftest.inputs(case_of("linear", "zeros"), "float32", CPU)
    assert not zeros["x"][0].any() and zeros["x"][1].all()
    large = selftest.inputs(case_of("conv2d", "inputs of 1e4"), "float16", CPU)
    assert large["x"].dtype == torch.float16 and 5e3 < large["x"].float().std() < 2e4
    assert large["x"].is_contiguous(memory_format=torch.channels_last)
    whole = selftest.inputs(case_of("linear", "max_out 2"), "bfloat16", CPU)
    assert torch.equal(whole["weight"].float().norm(dim=1), torch.full((58,), 4.0))
    fused = selftest.inputs(case_of("conv2d_batch_norm", "training, residual"), "bfloat16", CPU)
    assert fused["residual"].shape == (2, 13, 9, 7) and fused["running_var"].dtype == torch.float32
    again = selftest.inputs(case_of("conv2d", "inputs of 1e4"), "float16", CPU)
    assert torch.equal(again["x"], large["x"])


# --- wrong numbers are found ------------------------------------------------------------------------------------------


def scaled(launch, place: int, by: float):
    def launcher(*arguments):
        results = list(launch(*arguments))
        results[place] = results[place] * by
        return tuple(results)

    return launcher


@on_the_cpu_backend
@pytest.mark.parametrize(
    "which, place, output", [("forward", 0, "y"), ("backward", 0, "dx"), ("backward", 1, "dweight")]
)
def test_a_part_in_a_thousand_is_wrong(backend, which, place, output, monkeypatch):
    launch = getattr(bcos_kernels.cpu, f"linear_{which}")
    monkeypatch.setattr(bcos_kernels.cpu, f"linear_{which}", scaled(launch, place, 1.001))
    (result,) = selftest.check(case_of("linear"), "float32", [backend], CPU)
    assert result.status == "wrong" and result.bad and result.fraction > 10
    assert result.detail.startswith(f"{output}: error 0.00")


@on_the_cpu_backend
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_wrong(backend, value, monkeypatch):
    launch = bcos_kernels.cpu.linear_forward
    monkeypatch.setattr(bcos_kernels.cpu, "linear_forward", scaled(launch, 0, value))
    (result,) = selftest.check(case_of("linear"), "float32", [backend], CPU)
    assert result.status == "wrong" and result.row()["fraction_of_allowed"] is None


@on_the_cpu_backend
@pytest.mark.parametrize(
    "error, status",
    [(RuntimeError("no kernel image\nfor this"), "failed"), (NotImplementedError("not built"), "not built"),
     (torch.OutOfMemoryError("no room"), "out of memory")],
)  # fmt: skip
def test_what_raises_is_told(backend, error, status, monkeypatch):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(bcos_kernels.cpu, "linear_forward", fail)
    first, second = selftest.check(case_of("linear"), "float32", [backend, "reference"], CPU)
    assert (first.status, second.status) == (status, "right")
    assert first.bad == (status == "failed") and "\n" not in first.detail


def test_a_learnable_exponent_s_gradient_is_held_to_its_terms():
    """Its sum may cancel: what counts is how large the terms are."""
    case = case_of("linear", "learnable B")
    tensors = selftest.inputs(case, "float32", CPU)
    dy = torch.randn(37, 29)
    expected, terms = selftest._oracle(case, tensors, dy)
    assert terms.shape == dy.shape and torch.allclose(terms.sum(), expected["db"])
    double = {name: t.double().requires_grad_() for name, t in tensors.items()}
    y = reference.linear(**double)
    assert torch.allclose(torch.autograd.grad(y, double["b"], dy.double())[0], expected["db"])


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_on_a_cpu(tmp_path, capsys, folder):
    assert main(["selftest", "--quick", "--device", "cpu", "--json", str(tmp_path / "found.json")]) == 0
    out = capsys.readouterr().out
    assert "all right" in out and "linear_gelu" in out and "right, " in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ok"] and found["device"] == "cpu" and found["table"] is None and found["problems"] == []
    assert {row["status"] for row in found["results"]} == {"right"}
    assert {row["backend"] for row in found["results"]} == set(selftest.usable(CPU)) == set(found["backends"])
    assert not folder.exists()


@on_the_cpu_backend
def test_the_command_where_something_is_wrong(backend, monkeypatch, capsys):
    launch = bcos_kernels.cpu.linear_forward
    monkeypatch.setattr(bcos_kernels.cpu, "linear_forward", scaled(launch, 0, 1.01))
    assert main(["selftest", "--quick", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "WRONG in 4 of 4" in captured.out and "wrong: cpu, B = 2: x 37x45, weight 29x45: y: " in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("command", [["selftest", "--device", "cuda"], ["tune", "resnet18"]])
def test_without_a_gpu_the_commands_say_so(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    said = "no CUDA device here" if command[0] == "selftest" else "nothing to tune on cpu"
    assert said in capsys.readouterr().err


def test_cutlass_is_built_where_that_is_asked_for(monkeypatch, capsys):
    """All kernels for the device, before their library is loaded; a build that fails, or another device, ends it."""
    parser, built = argparse.ArgumentParser(), []
    monkeypatch.setattr(cutlass_build, "build", lambda kinds, verbose: built.append(kinds))
    monkeypatch.setattr(cutlass, "unusable_reason", types.SimpleNamespace(cache_clear=lambda: built.append("forget")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    selftest_commands._build_cutlass(parser, torch.device("cuda", 0))
    assert built == [tuple(kind for kind in cutlass_build.KINDS if "_sm80_" in kind), "forget"]

    def fail(kinds, verbose):
        raise RuntimeError("cutlass_build: expected nvcc\nin full")

    monkeypatch.setattr(cutlass_build, "build", fail)
    for device, said in (("cuda", "--cutlass: cutlass_build: expected nvcc\n"), ("cpu", "8.0 and later, got cpu")):
        with pytest.raises(SystemExit):
            selftest_commands._build_cutlass(parser, torch.device(device))
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["selftest", "--quick", "--device", "cpu", "--cutlass"])
    assert "capability 8.0 and later, got cpu" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["selftest", "tune"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "tuning table" in out and "--json FILE" in out


# --- times and rows, on what stands for a GPU -------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """The CPU in the place of a GPU, where "triton" is the CPU backend and takes half of the reference's time."""
    backends = {"triton": bcos_kernels.cpu}
    module = dispatch._module
    monkeypatch.setattr(dispatch, "_module", lambda name: backends[name] if name in backends else module(name))
    monkeypatch.setattr(dispatch, "_accepts_device", lambda name, device: True)
    monkeypatch.setattr(tuning, "identity", lambda device: HERE)

    def milliseconds(runs, rounds, warmup=3):
        for run in runs.values():
            run()
        return {name: {"triton": 1.0, "reference": 2.0}[name] for name in runs}

    monkeypatch.setattr(selftest, "_milliseconds", milliseconds)
    said: list[str] = []
    session = selftest_commands.Session(CPU, ["reference", "triton"], said.append)
    return types.SimpleNamespace(session=session, said=said)


CASES = [
    selftest_cases.linear("layer", 20, 16, 12),
    selftest_cases.conv2d("block", (2, 8, 6, 6), 8, 3, padding=1, op="conv2d_batch_norm", training=True),
]


@on_the_cpu_backend
def test_what_is_right_and_fastest_is_unlocked(backend, gpu):
    gpu.session.time(CASES, ["bfloat16"])
    path = gpu.session.unlock()
    assert gpu.session.ok and path == tuning.folder() / "nvidia_abacus.json"
    table = tuning.assembled(*HERE)
    assert {key[:3] for key in table} == {
        ("linear", "forward", "bfloat16"), ("linear", "backward", "bfloat16"),
        ("conv2d_batch_norm", "forward", "bfloat16"),
    }  # fmt: skip
    assert set(table.values()) == {("triton", "reference")}
    of_block = next(row for row in tuning.read(path)["rows"] if row["op"] == "conv2d_batch_norm")
    assert of_block["median_ms"] == {"triton": 2.0, "reference": 4.0}  # forward and backward together
    assert of_block["example"] == "block: x 2x8x6x6, weight 8x8x3x3"
    # the very key under which dispatch will look
    x, w = torch.randn(20, 16).bfloat16(), torch.randn(12, 16).bfloat16()
    assert tuning.key("linear", "forward", (x, w, None, 2.0, None, False, 1, True, None)) in table


@on_the_cpu_backend
def test_what_is_wrong_at_a_shape_gets_no_row(backend, gpu, monkeypatch):
    monkeypatch.setattr(bcos_kernels.cpu, "linear_forward", scaled(bcos_kernels.cpu.linear_forward, 0, 1.1))
    gpu.session.time(CASES[:1], ["bfloat16"])
    gpu.session.unlock()
    assert not gpu.session.ok and any("wrong: triton, layer" in line for line in gpu.said)
    assert set(tuning.assembled(*HERE).values()) == {("reference",)}
    assert all(row["wrong"] == ["triton"] for row in gpu.session.rows)


@on_the_cpu_backend
def test_what_is_wrong_with_an_option_gets_no_row_for_any_shape(backend, gpu, monkeypatch):
    launch = bcos_kernels.cpu.linear_forward

    def wrong_with_units(*arguments):
        results = launch(*arguments)
        return (results[0] * 1.1, *results[1:]) if arguments[5] else results

    monkeypatch.setattr(bcos_kernels.cpu, "linear_forward", wrong_with_units)
    gpu.session.time(CASES[:1], ["bfloat16"])
    gpu.session.check([case_of("linear", "B = 2, unit weights")], ["bfloat16"])
    assert gpu.session.rows[0]["backends"] == ["triton", "reference"]
    gpu.session.unlock()
    assert set(tuning.assembled(*HERE).values()) == {("reference",)}


def test_a_table_that_cannot_be_written_is_a_problem(gpu, monkeypatch):
    monkeypatch.setenv("BCOS_TUNING_CACHE", "off")
    session = selftest_commands.Session(CPU, ["reference"], gpu.said.append)
    session.time(CASES[:1], ["bfloat16"])
    assert session.unlock() is None and not session.ok
    assert "could not be written" in session.problems[0]


# --- shapes of networks -----------------------------------------------------------------------------------------------


def test_shapes_of_a_network():
    pytest.importorskip("torchvision")
    found = {str(case): case for case in selftest_cases.network_cases("resnet18", 4, 64)}
    stem = found["resnet18: x 4x6x64x64, weight 64x6x7x7"]
    assert stem.op == "conv2d_batch_norm" and stem.options["stride"] == 2 and stem.options["padding"] == 3
    assert found["resnet18: x 4x64x16x16, weight 64x64x3x3"].options["training"]
    assert found["resnet18: x 4x512, weight 1000x512"].op == "linear"
    assert not any(case.op == "batch_norm_uncentered" for case in found.values())  # all behind a convolution
    vit = selftest_cases.network_cases("vit_b_16", 1)
    assert {case.op for case in vit} == {"conv2d", "linear", "linear_gelu", "layer_norm"}
    assert {case.tensors["x"] for case in vit if case.op == "layer_norm"} == {(1, 197, 768)}
    convnext = selftest_cases.network_cases("convnext_tiny", 1, 64)
    norms = {c.tensors["x"]: c.options.get("channels_first", False) for c in convnext if c.op == "layer_norm"}
    assert norms[1, 96, 16, 16] and not norms[1, 16, 16, 96]  # torchvision's LayerNorm2d, and a block's LayerNorm
    assert [case.tensors["weight"] for case in vit if case.op == "linear_gelu"] == [(3072, 768)]


def test_shapes_of_a_file(tmp_path):
    path = tmp_path / "mine.json"
    entries = [
        {"op": "conv2d", "x": [2, 8, 6, 6], "weight": [16, 4, 3, 3], "groups": 2, "padding": 1, "max_out": 2},
        {"op": "linear_gelu", "x": [10, 16], "weight": [32, 16], "b": 1.5, "bias": True},
        {"op": "batch_norm_uncentered", "x": [2, 8, 6, 6], "training": True, "residual": True},
        {"op": "layer_norm", "x": [2, 8, 6], "dims": 2, "eps": 1e-6},
    ]
    path.write_text(json.dumps(entries))
    conv, linear, norm, layer_norm = selftest_cases.cases_of_file(path)
    assert conv.tensors == {"x": (2, 8, 6, 6), "weight": (16, 4, 3, 3)} and conv.options["groups"] == 2
    assert linear.tensors["bias"] == (32,) and linear.options == {"b": 1.5}
    assert norm.tensors["residual"] == (2, 8, 6, 6)
    assert layer_norm.tensors["weight"] == (8, 6) and layer_norm.options == {"normalized_shape": (8, 6), "eps": 1e-6}
    for case in (conv, linear, norm, layer_norm):
        (result,) = selftest.check(case, "float32", ["reference"], CPU)
        assert result.status == "right", result.detail
    path.write_text('[{"op": "conv9d", "x": [1]}]')
    with pytest.raises(ValueError, match="mine.json: expected op, x, weight .*conv9d"):
        selftest_cases.cases_of_file(path)
