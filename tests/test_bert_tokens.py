"""examples/bert_tokens.py: a small BERT learns, is converted, and shows which word decided."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import bcosification

pytest.importorskip("transformers", reason="the package transformers is not installed (extra: text)")

FILE = Path(__file__).parents[1] / "examples" / "bert_tokens.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("bert_tokens", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reviews_are_decided_by_one_word(example):
    texts, labels, words = example.reviews(200, seed=3)
    deciding = {*example.GOOD, *example.BAD}
    assert 0.3 < sum(labels) / 200 < 0.7
    for text, label, word in zip(texts, labels, words, strict=True):
        assert [w for w in text.split() if w in deciding] == [word]
        assert label == (word in example.GOOD) and 6 <= len(text.split()) <= 14
    assert example.reviews(5, 1) == example.reviews(5, 1) != example.reviews(5, 2)


def test_the_deciding_word_has_the_largest_contribution(example, tmp_path, monkeypatch, capsys):
    """Chance is one in the number of tokens, about 9 %; an explanation has to find the word in nearly all reviews."""
    arguments = ["--out", str(tmp_path), "--steps", "200", "--finetune-steps", "100"]
    monkeypatch.setattr(sys, "argv", ["bert_tokens.py", *arguments])
    example.main()
    out = capsys.readouterr().out
    assert "verified: True" in out and (tmp_path / "table.md").read_text() in out + "\n"
    model = bcosification.load(tmp_path / "fine-tuned")
    tokenizer = model.tokenizer
    measured = example.measure(model, tokenizer)
    assert measured["accuracy"] > 0.97 and measured["chance"] < 0.12
    assert measured["deciding word first"] > 0.9
    # Not by the place alone: of a class that a review is not of, the word takes from the logit.
    texts, labels, words = example.reviews(50, seed=7)
    other = bcosification.explain(model, model.tokenize(texts), [1 - label for label in labels])
    deciding = torch.tensor(tokenizer.convert_tokens_to_ids(words))[:, None]
    assert (other.contributions[other.input_ids == deciding] < 0).double().mean() > 0.9
    told = json.loads((tmp_path / "explanations.json").read_text())
    assert len(told) == 12 and "<section>" in (tmp_path / "explanations.html").read_text()
