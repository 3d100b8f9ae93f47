"""Families told and verified: the examples are converted, and a family that is wrong is found."""

import json

import pytest
import torch
from torch import nn

import bcos_kernels
from bcosification import BcosifiedCLIP, bcosify, explain
from bcosification.cli import main
from bcosification.convert.families import FAMILIES, Family, family_of, register
from bcosification.convert.family_checks import family_reports, randomized
from bcosification.convert.rules import type_name
from bcosification.evaluation.benchmarking import Step, fallback

FOUND = sorted({family.name for family in FAMILIES.values()})
OF_TEXTS = {family.name for family in FAMILIES.values() if family.reads_text}  # test_huggingface_bert.py trains these


def test_every_family_is_told_once():
    reports = family_reports()
    assert [report.name for report in reports] == [*FOUND, "generic"]
    assert all(report.title and report.converts and report.keeps and report.ok is None for report in reports)
    assert sorted(name for report in reports for name in report.classes) == sorted(FAMILIES)
    with pytest.raises(ValueError, match="expected names among the .* that `bcosify families` lists, got nothing$"):
        family_reports(["nothing"])


def test_names_by_their_parts():
    swin = family_reports(["timm Swin Transformer V2"])
    assert [report.name for report in swin] == ["timm_swin_v2", "timm_swin_v2_cr"]
    assert {report.name for report in family_reports(["bert"])} >= {"huggingface_bert", "huggingface_roberta"}
    assert [report.name for report in family_reports(["sequential"])] == ["sequential"]


@pytest.mark.parametrize("name", [*FOUND, "generic"])
def test_examples_are_of_their_family_and_verified(name):
    family = Family() if name == "generic" else next(f for f in FAMILIES.values() if f.name == name)
    example = family.example()
    assert example is not None, "write Family.example()"
    assert family_of(example).name == name
    assert name == "generic" or type_name(type(example)) in FAMILIES
    assert sum(parameter.numel() for parameter in example.parameters()) < 5e6
    (report,) = family_reports([name], check=True)
    assert report.ok, report.problem
    assert report.equivalence < 1e-12 and report.explanation < 1e-8 and report.completeness < 1e-10
    assert report.layers >= 2
    assert report.contributions > 1e-6, "nothing of the image reaches the logit: completeness would hold anyway"


@pytest.mark.skipif(bcos_kernels.backends()["cpu"] is not None, reason="no CPU kernels here")
@pytest.mark.parametrize("name", [name for name in [*FOUND, "generic"] if name not in OF_TEXTS])
def test_training_steps_and_explanations_of_every_family_run_on_kernels(name):
    """In float32, forward and backward: nothing on the fallback, which computes the same in plain PyTorch."""
    family = Family() if name == "generic" else next(f for f in FAMILIES.values() if f.name == name)
    torch.manual_seed(0)
    model = bcosify(family.example(), **family.example_options)
    size = family.example_size or model.config["input_size"] or (64, 64)
    images = torch.rand(2, 3, *size)
    step = Step(model, images, torch.arange(2))
    with bcos_kernels.timed() as seconds:
        step()
        explain(model, images, **({"text": torch.eye(12)[:2]} if isinstance(model, BcosifiedCLIP) else {}))
    assert {backend for _, backend in seconds} == {"cpu"}, seconds
    ops = {op for op, _ in seconds}
    assert ops & {"conv2d", "conv2d_batch_norm", "linear"} and any(op.endswith("_backward") for op in ops), ops
    assert fallback(step) == {"fallback_share": 0.0, "fallback_ops": []}


def test_randomized_models_have_no_trivial_tensor():
    for name in ("torchvision_resnet", "torchvision_convnext", "torchvision_vit"):
        model = randomized(next(f for f in FAMILIES.values() if f.name == name).example())
        assert not model.training
        for key, value in model.state_dict().items():
            if value.is_floating_point() and value.numel() > 1:
                assert value.dtype == torch.float64 and value.std() > 1e-4, key
                assert not torch.isclose(value, torch.ones_like(value)).all(), key


class Net(nn.Module):
    """Its pooling is the maximum: a head that moves before it is another function."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.stem(x).amax((2, 3)))


class MovedNet:
    def forward(self, x):
        return self.fc(self.stem(x)).amax((2, 3))


@pytest.fixture
def wrong_family():
    from bcosification.convert.families import HeadBeforePool, change_class

    class Moved(HeadBeforePool):
        forward = MovedNet.forward

    @register(type_name(Net))
    class NetFamily(Family):
        """Moves the head, though it may not."""

        name, example_options = "net", {"mean": 0.5, "std": 0.25}

        def moves_head(self, model):
            return True

        def prepare(self, model, options, head_moves):
            return change_class(model, Moved) if head_moves else model

        def example(self):
            return Net()

    yield
    del FAMILIES[type_name(Net)]


def test_a_wrong_family_fails(wrong_family, tmp_path, capsys):
    (report,) = family_reports(["net"], check=True)
    assert report.ok is False and report.equivalence > 1e-3 and "equivalence at B=1: error" in report.problem
    assert main(["families", "--check", "net", "--json", str(tmp_path / "f.json")]) == 1
    assert "FAILED" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "f.json").read_text())["families"]
    assert row["ok"] is False and row["classes"] == [type_name(Net)]


def test_a_family_without_an_example_or_its_library_is_not_checked(wrong_family, monkeypatch):
    monkeypatch.setattr(type(FAMILIES[type_name(Net)]), "example", lambda self: None)
    (report,) = family_reports(["net"], check=True)
    assert report.ok is None and report.problem == "not checked: the family has no example"

    def missing(self):
        raise ModuleNotFoundError("No module named 'netlib'", name="netlib")

    monkeypatch.setattr(type(FAMILIES[type_name(Net)]), "example", missing)
    (report,) = family_reports(["net"], check=True)
    assert report.ok is None and report.problem == "not checked: No module named 'netlib'"


def test_the_command_lists_families(tmp_path, capsys):
    assert main(["families", "--json", str(tmp_path / "f.json")]) == 0
    out = capsys.readouterr().out
    for report in family_reports():
        assert f"{report.title} ({report.name})\n" in out
    assert "verified" not in out
    assert [row["name"] for row in json.loads((tmp_path / "f.json").read_text())["families"]] == [*FOUND, "generic"]
    assert main(["families", "--check", "torchvision_vit"]) == 0
    assert "  verified  ok: error at B = 1 " in capsys.readouterr().out
    assert main(["families", "nothing"]) == 2
    assert "expected names among" in capsys.readouterr().err
