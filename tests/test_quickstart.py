"""examples/quickstart.py runs, and what it prints is true."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import bcos_kernels

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.OUT = str(tmp_path_factory.mktemp("quickstart"))
    return module


def test_swapping_in_changes_no_number(quickstart):
    before, after = quickstart.swap_in()
    assert (after - before).norm() < 1e-4 * before.norm()
    assert before.std() > 0


def test_b_cosify_explain_and_measure(quickstart, capsys):
    result = quickstart.b_cosify()
    assert "the same as before at B = 1: True" in capsys.readouterr().out
    assert len(result.history) == 1 and (result.output / "best" / "model.safetensors").is_file()
    explanation = quickstart.explain(result)
    total = explanation.contributions.sum((1, 2)) + explanation.constant
    logit = explanation.logits.gather(1, explanation.targets[:, None])[:, 0]
    assert torch.allclose(total, logit, rtol=1e-4, atol=1e-4)
    assert len(list(Path(quickstart.OUT, "pictures").glob("*_explanation.png"))) == 8
    game = quickstart.measure(result)
    assert len(game) == 16 and 0 < game.mean < 1 and 0.05 < game.chance < 0.5


def test_build_on_it(quickstart):
    with bcos_kernels.backend("reference"):
        torch.manual_seed(0)
        logits, grad = quickstart.build_on_it()
    torch.manual_seed(0)
    other, other_grad = quickstart.build_on_it()
    assert torch.allclose(logits, other, rtol=1e-4, atol=1e-5)
    assert torch.allclose(grad, other_grad, rtol=1e-4, atol=1e-7)


def test_without_the_package_bcos_its_part_is_left_out(quickstart, monkeypatch, capsys):
    others = ("b_cosify", "explain", "measure", "build_on_it")
    called = []
    for name in others:
        monkeypatch.setattr(quickstart, name, lambda *_, name=name: called.append(name))
    monkeypatch.setitem(sys.modules, "bcos", None)
    quickstart.main()
    assert capsys.readouterr().out == (
        "fused: left out, as the package bcos is not installed (pip install bcos==0.1.3)\n"
    )
    assert called == list(others)
    monkeypatch.undo()
    for name in (*others, "swap_in"):
        monkeypatch.setattr(quickstart, name, lambda *_, name=name: called.append(name))
    quickstart.main()
    assert called == [*others, "swap_in", *others]
