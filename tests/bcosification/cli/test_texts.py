"""The commands on classifiers of texts: convert, verify and explain; those of images say that they are."""

import json
from pathlib import Path

import pytest
import torch

import bcosification
from bcosification.cli import main

pytest.importorskip("transformers", reason="the package transformers is not installed (extra: text)")
small_texts = pytest.importorskip("tests.bcosification.small_texts")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return small_texts.saved(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "bert"
    assert main(["convert", f"transformers:{original}", "--bias", "keep", "--out", str(folder)]) == 0
    return folder


def test_convert(original, converted, capsys):
    names = sorted(path.name for path in converted.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors", "tokenizer"]
    model = bcosification.load(converted)
    assert type(model) is bcosification.BcosifiedText and model.config["source"] == f"transformers:{original}"
    assert model.config["options"]["bias"] == "keep" and model.config["class_names"] == ["negative", "positive"]
    own = bcosification.bcosify(bcosification.resolve(f"transformers:{original}")[0], bias="keep")
    x = model.tokenize(["a good film", "not very dull"])
    with torch.no_grad():
        assert torch.equal(model(**x).logits, own(**x).logits)
    capsys.readouterr()
    assert main(["convert", str(original), "--out", str(converted.parent / "other")]) == 2
    assert f"bcosify it as transformers:{original}" in capsys.readouterr().err


def test_convert_says_how_to_fine_tune(original, tmp_path, capsys):
    assert main(["convert", f"transformers:{original}", "--out", str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    assert "BertForSequenceClassification: 22 of 33 layers converted, 8 of them to B-cos layers" in out
    assert "model(**inputs, labels=labels).loss" in out and "bcosify finetune" not in out
    assert main(["convert", f"transformers:{original}", "--mean", "0.5", "--out", str(tmp_path / "n")]) == 2
    assert "expected no --mean and --std for" in capsys.readouterr().err


def test_explain(converted, tmp_path, capsys):
    texts = ["the films is good", "very <bad>"]
    command = ["explain", str(converted), "--text", *texts, "--target", "positive", "--out", str(tmp_path)]
    assert main(command) == 0
    out = capsys.readouterr().out
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["0000.png", "0001.png", "explanations.html", "explanations.json"]
    model = bcosification.load(converted)
    explanation = bcosification.explain(model, model.tokenize(texts), 1)
    for i, entry in enumerate(json.loads((tmp_path / "explanations.json").read_text())):
        assert entry["target_name"] == "positive" and explanation.table(i) in out and repr(texts[i]) in out
        told = {"token": "good", "contribution": pytest.approx(float(explanation.contributions[0, 5]))}
        assert i or told in entry["tokens"]
    assert (tmp_path / "explanations.html").read_text() == explanation.page()
    assert main(["explain", "--model", str(converted), "x.png", "--out", str(tmp_path / "o")]) == 2
    assert "expected --text TEXT [TEXT ...]" in capsys.readouterr().err and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "expected --text TEXT"),
        (["--text", "good", "--target", "neutral"], "--target to be a class number below 2 or one of negative, posi"),
        (["--text", "good", "--templates", "openai"], "expected no --templates for"),
        (["--text", "good", "--power", "2"], "which is no CLIP model"),
    ],
)
def test_explain_refuses(converted, tmp_path, capsys, more, message):
    assert main(["explain", str(converted), *more, "--out", str(tmp_path / "o")]) == 2
    assert message in capsys.readouterr().err


def test_verify(original, converted, tmp_path, capsys):
    assert main(["verify", str(converted), "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]) == 0
    assert "verified: ok" in capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["ok"] and report["about"]["tokens"] == [2, 16] and "tokens" in (tmp_path / "r.html").read_text()
    assert main(["verify", f"transformers:{original}", "--b", "1.5", "--images", "3"]) == 0
    # Weights of another model are told.
    changed = bcosification.load(converted)
    with torch.no_grad():
        changed.model.classifier.weight += 1
    changed.save_pretrained(tmp_path / "changed")
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "changed")]) == 0
    assert "1 tensors differ from a fresh conversion" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["evaluate", "finetune", "benchmark"])
def test_commands_of_images_refuse(converted, tmp_path, capsys, command):
    more = {
        "evaluate": ["--data", "digits"],
        "finetune": ["--model", str(converted), "--bias", "keep", "--data", "digits", "--out", str(tmp_path / "run")],
        "benchmark": ["--no-compile"],
    }[command]
    first = [] if command == "finetune" else [str(converted)]
    assert main([command, *first, *more]) == 2
    assert "reads texts" in capsys.readouterr().err and not Path(tmp_path / "run" / "last").exists()


def test_random_texts_differ_in_length_and_avoid_padding(converted):
    from bcosification.cli.texts import random_tokens

    x = random_tokens(8, bcosification.load(converted))
    lengths = x["attention_mask"].sum(1)
    assert x["input_ids"].shape == (8, 16) and lengths.unique().numel() > 1 and lengths.min() >= 8
    assert torch.equal(x["input_ids"] != 0, x["attention_mask"].bool()) and x["token_type_ids"].max() == 1
