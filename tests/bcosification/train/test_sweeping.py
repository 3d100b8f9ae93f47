"""The sweep: which runs there are, what its rows say, that it goes on after a kill, and its figure."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import bcosification
from bcosification.cli import main
from bcosification.explanation import bcos_contributions
from bcosification.train import sweeping
from bcosification.train.data import digits
from bcosification.train.finetuning import FinetuneConfig
from bcosification.train.sweeping import DEMO, QUESTIONS, sweep, variants
from tests.bcosification.train.small import STATISTICS, small_network


def test_the_choices_are_those_of_the_papers():
    found = variants(QUESTIONS, [3, 1, 2], epochs=6)
    assert [variant.name for variant in found] == [
        "B-cosified", "B = 1", "B = 3", "biases kept", "biases decayed", "biases removed, B raised",
        "biases decayed, B raised", "3 channels", "input not normalised", "weights normalised", "no activations",
    ]  # fmt: skip
    by_name = {variant.name: variant for variant in found}
    # What belongs to several questions runs once.
    assert by_name["B-cosified"].labels == {"b": "B = 2", "biases": "removed at once", "design": "B-cosified"}
    assert by_name["B = 1"].labels == {"b": "B = 1", "design": "B = 1"} and by_name["B = 1"].options == {"b": 1.0}
    assert by_name["biases kept"].labels == {"biases": "kept", "design": "biases kept"}
    assert by_name["biases decayed, B raised"].options == {"bias": "decay", "bias_epochs": 3.0, "b_epochs": 3.0}
    # Six design choices, each alone.
    design = [variant for variant in found if "design" in variant.labels and variant.options]
    assert len(design) == 6
    changed = [{**variant.options, **variant.options.get("conversion", {})} for variant in design]
    names = {name for options in changed for name in options if name != "conversion"}
    assert names == {"b", "bias", "inverse", "normalize_input", "normalize_weight", "activation"}
    assert all(len(options) - ("conversion" in options) == 1 for options in changed)
    for variant in found:  # all are runs that finetune takes
        config = FinetuneConfig(model="resnet18", data="digits", output="x", epochs=6)
        dataclasses.replace(config, **variant.options).check()
    assert [variant.name for variant in variants(["b"], [2.0], 1)] == ["B-cosified"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ask": ["nothing"]}, "sweep: expected ask in"),
        ({"b_values": [0.5]}, r"sweep: expected b_values >= 1, got \(0.5,\)"),
        ({"seeds": 0}, "sweep: expected seeds >= 1, got 0"),
        ({"b": 1.5}, "sweep: expected b, bias and their schedules as they are by default, got {'b': 1.5"),
        ({"lr": -1}, "expected lr > 0"),
    ],
)
def test_what_makes_no_sense_is_told_before_anything_runs(change, message, tmp_path):
    fields = {field.name for field in dataclasses.fields(FinetuneConfig)}
    config = FinetuneConfig(model="small", data="digits", output=str(tmp_path / "x"))
    config = dataclasses.replace(config, **{name: value for name, value in change.items() if name in fields})
    with pytest.raises(ValueError, match=message):
        sweep(config, **{name: value for name, value in change.items() if name not in fields})
    assert not (tmp_path / "x").exists()


def tiny(folder, **options):
    values = dict(data="digits", output=str(folder), epochs=2, batch_size=64, lr=5e-3, limit_batches=8, model="own")
    return FinetuneConfig(**values, conversion=dict(STATISTICS), accelerator="cpu", **options)


@pytest.fixture(scope="module")
def network():
    return small_network()


class Game:
    """In place of the game of grids, for networks that are not sure of anything: the share of the positive
    contributions that lies in the left half of the first image, where something is positive."""

    def __init__(self, model, images, labels, attribute, *, count, rescale):
        assert not rescale and len(images) == len(labels) == 359
        positive = attribute(model, images[:1], labels[:1]).clamp(min=0)
        if not positive.any():
            raise ValueError("grid_pointing_game: expected confident images")
        self.mean, self.count = float(positive[..., :16].sum() / positive.sum()), count

    def __len__(self):
        return 4 * self.count


@pytest.fixture(scope="module")
def swept(tmp_path_factory, network):
    folder = tmp_path_factory.mktemp("sweep") / "out"
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeping, "grid_pointing_game", Game)
        options = dict(network=network, pretrain_epochs=3, grids=2, say=said.append)
        result = sweep(tiny(folder), ask=["biases", "design"], **options)
    return result, said, folder


def test_rows_say_what_the_runs_say(swept, network):
    result, said, folder = swept
    assert [row["variant"] for row in result.rows] == [v.name for v in variants(["biases", "design"], [2.0], 2)]
    assert len(said) == len(result.rows) + 1 and said[0].startswith("standard network: accuracy ")
    assert json.loads((folder / "sweep.json").read_text())["rows"] == result.rows
    images, _ = digits("val").tensors()
    standard = copy.deepcopy(network).eval()
    standard.load_state_dict(sweeping.read_weights(folder / "standard.safetensors"))
    assert any(not torch.equal(a, b) for a, b in zip(standard.parameters(), network.parameters(), strict=True))
    with torch.no_grad():
        correct = standard((images - 0.5) / 0.5).argmax(1) == digits("val").labels
    assert result.standard["top1"] == pytest.approx(correct.double().mean().item(), abs=1e-6)
    by_name = {row["variant"]: row for row in result.rows}
    for name, row in by_name.items():
        model = bcosification.load(folder / "runs" / f"{slug(name)}-seed0" / "last", model=network)
        with torch.no_grad():
            correct = model(images).argmax(1) == digits("val").labels
        assert row["top1"] == pytest.approx(correct.double().mean().item(), abs=1e-6), name
        if row["gridpg"] is not None:
            game = Game(model, images, digits("val").labels, bcos_contributions, count=2, rescale=False)
            assert row["gridpg"] == pytest.approx(game.mean, abs=1e-5) and row["grids"] == 2, name
    assert sum(row["gridpg"] is not None for row in result.rows) > 5
    # The conversion with 3 channels, or normalised weights, … against the standard network before any training.
    for name, options in (
        ("B-cosified", {}), ("3 channels", {"inverse": False}), ("biases kept", {"bias": "keep"}),
        ("biases removed, B raised", {"b": 1.0}), ("weights normalised", {"normalize_weight": True}),
    ):  # fmt: skip
        converted = bcosification.bcosify(standard, **STATISTICS, logit_bias=None, **options)
        with torch.no_grad():
            expected, got = standard((images[:128] - 0.5) / 0.5), converted(images[:128])
        assert by_name[name]["change"] == pytest.approx(((got - expected).norm() / expected.norm()).item(), rel=1e-4)
        assert by_name[name]["same_class"] == (got.argmax(1) == expected.argmax(1)).double().mean().item()


def test_what_each_choice_does_alone(swept, network):
    """6 channels keep what the network computes; each of the others does not."""
    result, _, folder = swept
    standard = copy.deepcopy(network).eval()
    standard.load_state_dict(sweeping.read_weights(folder / "standard.safetensors"))
    images = digits("val").tensors()[0][:128]
    exact = {**STATISTICS, "inverse": False, "b": 1, "bias": "keep", "pool": "keep", "head": "keep"} | {
        "logit_bias": None
    }
    alone = {row["choice"]: row for row in result.standard["alone"]}
    assert list(alone)[0] == "6 channels" and len(alone) == 7
    assert alone["6 channels"]["change"] < 1e-5 and alone["6 channels"]["same_class"] == 1
    assert alone["average pooling"]["change"] < 1e-5  # this network has no max pooling
    with torch.no_grad():
        expected = standard((images - 0.5) / 0.5)
        for choice, one in (
            ("input not normalised", {"normalize_input": False}), ("weights normalised", {"normalize_weight": True}),
            ("no activations", {"activation": "remove"}), ("B = 2", {"b": 2}), ("no biases", {"bias": "remove"}),
        ):  # fmt: skip
            got = bcosification.bcosify(standard, **{**exact, **one})(images)
            change = ((got - expected).norm() / expected.norm()).item()
            assert alone[choice]["change"] == pytest.approx(change, rel=1e-4) and change > 0.01, choice
            assert alone[choice]["same_class"] == (got.argmax(1) == expected.argmax(1)).double().mean().item()


def slug(name):
    return name.lower().replace(", ", "-").replace(" = ", "-").replace(" ", "-")


def test_the_options_reach_the_runs(swept, network):
    _, _, folder = swept

    def config(name):
        return bcosification.load(folder / "runs" / f"{slug(name)}-seed0" / "last", model=network).config["options"]

    assert config("3 channels")["inverse"] is False and config("B-cosified")["inverse"] is True
    assert config("input not normalised")["normalize_input"] is False
    assert config("weights normalised")["normalize_weight"] is True
    assert config("no activations")["activation"] == "remove"
    assert config("B = 1")["b"] == 1 and config("biases kept")["bias"] == "keep"
    assert config("biases decayed")["bias"] == "remove"  # they are gone by now
    assert config("biases decayed, B raised")["b"] == 2


def test_the_table_and_the_figure(swept):
    result, _, folder = swept
    table = str(result).splitlines()
    assert table[0].split("  ")[0] == "choice" and table[len(result.rows) + 1] == ""
    assert table[len(result.rows) + 3].split("  ")[0] == "6 channels" and len(table) == len(result.rows) + 10
    row = result.rows[0]
    assert table[1].startswith("B-cosified") and f"{100 * row['top1']:.1f}" in table[1]
    text = (folder / "sweep.md").read_text()
    assert text == result.markdown() and f"| {row['change']:.2g} |" in text and "1 seed;" in text
    picture = np.asarray(Image.open(folder / "sweep.png"))
    assert picture.std() > 10 and picture.shape[1] > 1000


def test_nothing_is_measured_twice_and_questions_can_be_added(swept, network, tmp_path, monkeypatch):
    import shutil

    _, _, folder = swept
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    before = json.loads((again / "sweep.json").read_text())["rows"]
    ran = []
    run = sweeping._run

    def counted(config, network, variant, seed, grids, output):
        ran.append((variant.name, seed))
        return run(config, network, variant, seed, grids, output)

    monkeypatch.setattr(sweeping, "_run", counted)
    options = dict(network=network, pretrain_epochs=3, grids=2, say=lambda text: None)
    result = sweep(tiny(again), ask=["biases", "design"], **options)
    assert ran == [] and result.rows == before
    result = sweep(tiny(again), ask=QUESTIONS, b_values=[1, 1.5, 2], **options)
    assert ran == [("B = 1.5", 0)]
    assert {row["variant"]: row["labels"] for row in result.rows}["B-cosified"] == {
        "b": "B = 2", "biases": "removed at once", "design": "B-cosified",
    }  # fmt: skip
    result = sweep(tiny(again), ask=["b"], b_values=[2], seeds=2, **options)
    assert ran[1:] == [("B-cosified", 1)]
    assert "±" in str(result).splitlines()[1]
    with pytest.raises(
        ValueError, match=r"sweep: expected the settings of the sweep in .*, lr=0.005; got lr=0.1: ?|got lr"
    ):
        sweep(dataclasses.replace(tiny(again), lr=0.1), **options)


def test_fewer_grids_than_asked_for_are_taken(monkeypatch):
    asked = []

    def game(model, images, labels, attribute, *, count, rescale):
        asked.append((count, rescale))
        if count is not None or len(asked) > 2:
            raise ValueError("grid_pointing_game: expected confident images …")
        return "a game"

    monkeypatch.setattr(sweeping, "grid_pointing_game", game)
    network = bcosification.bcosify(small_network(), **STATISTICS)
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    assert sweeping._grid_pointing_game(network, images, labels, 5) == "a game"
    assert asked == [(5, False), (None, False)]
    assert sweeping._grid_pointing_game(network, images, labels, 5) is None


def test_a_sweep_that_is_killed_goes_on_where_it_was(network, tmp_path, monkeypatch):
    """Killed in the second epoch of the second run: the rows are those of a sweep that was not."""
    from bcosification.train import training

    options = dict(network=network, ask=["b"], b_values=[1, 2], grids=2, say=lambda text: None)
    whole = sweep(tiny(tmp_path / "whole"), **options)

    class Killed(BaseException):
        pass

    epochs = []
    write = training.save_model

    def killed(model, folder):
        write(model, folder)
        epochs.append(folder)
        if len(epochs) == 3:  # after the first epoch of the second run
            raise Killed

    monkeypatch.setattr(training, "save_model", killed)
    with pytest.raises(Killed):
        sweep(tiny(tmp_path / "killed"), **options)
    assert len(json.loads((tmp_path / "killed" / "sweep.json").read_text())["rows"]) == 1
    monkeypatch.setattr(training, "save_model", write)
    result = sweep(tiny(tmp_path / "killed"), **options)
    for got, expected in zip(result.rows, whole.rows, strict=True):
        assert {**got, "seconds": 0} == {**expected, "seconds": 0}


def test_own_networks_are_left_alone_and_get_a_head_for_the_data(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(*small_network()[:-1], nn.Linear(8, 4))
    state = copy.deepcopy(network.state_dict())
    config = dataclasses.replace(tiny(tmp_path), epochs=1, limit_batches=2)
    result = sweep(config, network=network, ask=["b"], b_values=[2], pretrain_epochs=1, say=lambda text: None)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())
    assert sweeping.read_weights(tmp_path / "standard.safetensors")["7.weight"].shape == (10, 8)
    assert result.standard["top1"] is not None
    result = sweep(
        dataclasses.replace(config, output=str(tmp_path / "b")), network=network, ask=["b"], b_values=[2],
        say=lambda text: None,
    )  # fmt: skip
    assert list(result.standard) == ["alone"] and result.rows[0]["change"] > 0  # 4 classes: no accuracy on 10


def test_the_command(monkeypatch, tmp_path, capsys):
    tiny_options = "--epochs 1 --limit-batches 1 --batch-size 8 --accelerator cpu --pretrain-epochs 1".split()
    out = str(tmp_path / "s")
    assert main(["sweep", "--out", out, "--ask", "b", "--b-values", "2", *tiny_options]) == 0
    printed = capsys.readouterr().out
    assert "1 of 1: B-cosified: accuracy " in printed and "choice" in printed and "sweep.png" in printed
    settings = json.loads((tmp_path / "s" / "sweep.json").read_text())["settings"]
    assert settings["model"] == DEMO["model"] and settings["data"] == DEMO["data"] and settings["lr"] == DEMO["lr"]
    assert settings["epochs"] == 1 and settings["pretrain_epochs"] == 1
    assert main(["sweep", "--out", out, "--ask", "b", *tiny_options, "--lr", "1"]) == 2
    assert "expected the settings of the sweep in" in capsys.readouterr().err
    assert main(["sweep", "--out", str(tmp_path / "t"), "--model", "resnet18"]) == 2
    assert "expected --data" in capsys.readouterr().err
    assert main(["sweep", "--out", str(tmp_path / "t"), "--b-values", "0.5"]) == 2
    assert "expected --b-values >= 1" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
