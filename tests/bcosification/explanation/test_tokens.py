"""Explanations of texts: contributions of tokens against the frozen replay, padding, pictures, files."""

import json
import re
import threading

import pytest
import torch

from bcosification import bcosify, explain
from bcosification.convert.frozen_replay import frozen_replay
from bcosification.explanation import Explanation, TokenExplanation

pytest.importorskip("transformers", reason="the package transformers is not installed (extra: text)")
small_texts = pytest.importorskip("tests.bcosification.small_texts")
NAMES, WORDS, classifier, error, inputs = (
    getattr(small_texts, n) for n in ("NAMES", "WORDS", "classifier", "error", "inputs")
)

TARGETS = torch.tensor([2, 0])


@pytest.mark.parametrize("bias", ["remove", "keep"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_against_the_replay(name, attention, bias):
    model, x = bcosify(classifier(name, attention=attention), bias=bias), inputs(name)
    explanation = explain(model, x, TARGETS)
    assert type(explanation) is TokenExplanation and len(explanation) == 2
    function, embeddings = model.on_embeddings(x)
    replay = frozen_replay(function, embeddings)
    assert replay.is_affine()
    assert torch.equal(explanation.embeddings, embeddings) and torch.equal(explanation.targets, TARGETS)
    assert error(explanation.weights, replay.gradient(TARGETS)) < 1e-9
    torch.testing.assert_close(explanation.constant, replay.constant(TARGETS), rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(explanation.logits, model(**x).logits, rtol=1e-9, atol=1e-12)
    by_hand = (explanation.embeddings * explanation.weights).sum(2)
    torch.testing.assert_close(explanation.contributions, by_hand, rtol=1e-12, atol=1e-14)
    explained = explanation.logits.gather(1, TARGETS[:, None])[:, 0]
    total = explanation.contributions.sum(1) + explanation.constant
    torch.testing.assert_close(total, explained, rtol=1e-9, atol=1e-11)
    assert explanation.contributions.abs().sum(1).min() > 1e-4  # it is not the constant alone
    # Nothing comes of padding, whatever is written there.
    assert explanation.contributions[1, 6:].eq(0).all() and explanation.weights[1, 6:].eq(0).all()
    assert explanation.contributions[0].ne(0).all()


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name):
    model, x = bcosify(classifier(name)), inputs(name)
    alone = explain(model, {key: value[1:, :6] for key, value in x.items()}, 1)
    padded = explain(model, x, 1)[1]
    torch.testing.assert_close(padded.contributions[:, :6], alone.contributions, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(padded.constant, alone.constant, rtol=1e-8, atol=1e-12)


def test_the_constant_is_that_of_positions_and_segments():
    """With these embeddings zero and biases gone, the words and the logit bias are all there is."""
    original = classifier()
    with torch.no_grad():
        for part in ("position_embeddings", "token_type_embeddings"):
            getattr(original.bert.embeddings, part).weight.zero_()
    model = bcosify(original)
    bias = model.config["logit_bias"]
    torch.testing.assert_close(explain(model, inputs()).constant, torch.full((2,), bias, dtype=torch.float64))
    # A word can also be told as a position: then it is constant, and its contribution gone.
    moved, x = bcosify(classifier()), {key: value[:1] for key, value in inputs().items()}
    before = explain(moved, x, 1)
    with torch.no_grad():
        position = torch.arange(9)
        moved.model.bert.embeddings.position_embeddings.weight[position] += moved.word_embeddings(x["input_ids"][0])
        moved.word_embeddings.weight.zero_()
    after = explain(moved, x, 1)
    torch.testing.assert_close(after.constant, before.constant + before.contributions.sum(1), rtol=1e-9, atol=1e-11)
    assert after.contributions.eq(0).all()


def test_in_float32_and_in_batches():
    model, x = bcosify(classifier()), inputs()
    exact = explain(model, x, TARGETS)
    got = explain(model.float(), x, TARGETS)
    assert got.weights.dtype == torch.float32 and error(got.weights.double(), exact.weights) < 1e-4
    torch.testing.assert_close(explain(model, x, TARGETS, batch_size=1).contributions, got.contributions)
    with pytest.raises(ValueError, match="expected batch_size >= 1, got 0"):
        explain(model, x, batch_size=0)


def test_forms_of_inputs_and_targets():
    model, x = bcosify(classifier()), inputs()
    predicted = explain(model, x)
    assert torch.equal(predicted.targets, predicted.logits.argmax(1))
    assert explain(model, x, 2).targets.tolist() == [2, 2] and explain(model, x, [2, 0]).targets.tolist() == [2, 0]
    unmasked = explain(model, {"input_ids": x["input_ids"]}, TARGETS)
    assert unmasked.contributions[1, 6:].ne(0).all() and unmasked.attention_mask.eq(1).all()
    shifted = explain(model, {**x, "position_ids": torch.arange(9)[None]}, TARGETS)
    torch.testing.assert_close(shifted.weights, explain(model, x, TARGETS).weights)
    assert not torch.equal(explain(model, {**x, "position_ids": torch.arange(3, 12)[None]}, 1).logits, shifted.logits)
    with torch.inference_mode():
        torch.testing.assert_close(explain(model, x, TARGETS).weights, shifted.weights)
    with pytest.raises(ValueError, match=r"expected targets in \[0, 2\], got 3"):
        explain(model, x, 3)
    with pytest.raises(TypeError, match="expected the mapping that a tokenizer returns .*, got a tensor"):
        explain(model, torch.rand(2, 3, 8, 8))
    with pytest.raises(TypeError, match="expected the mapping that a tokenizer returns .*, got str"):
        explain(model, "a good film")
    with pytest.raises(ValueError, match="expected no text=, templates= and protocol="):
        explain(model, x, text="a good film")
    with pytest.raises(ValueError, match="input_ids and, optionally, .*; got input_ids, labels"):
        explain(model, {"input_ids": x["input_ids"], "labels": TARGETS})
    with pytest.raises(ValueError, match="at least one token each, got none, or a masked one"):
        explain(model, {**x, "attention_mask": torch.zeros_like(x["attention_mask"])})


def test_the_model_is_left_as_it_was():
    model, x = bcosify(classifier()).train(), inputs()
    explain(model, x)
    assert all(module.training for module in model.modules())
    assert not any(getattr(module, "is_in_explanation_mode", False) for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(getattr(module, "constant_gain", None) is None for module in model.modules())
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(explain(compiled, x).weights, explain(model, x).weights)


def test_from_several_threads():
    model, x = bcosify(classifier()), inputs()
    expected, got = [explain(model, x, t).weights for t in range(3)], [None] * 3

    def run(t):
        got[t] = explain(model, x, t).weights

    threads = [threading.Thread(target=run, args=(t,)) for t in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for t in range(3):
        torch.testing.assert_close(got[t], expected[t])


@pytest.fixture
def explanation(tmp_path):
    labels = {"0": "bad & ugly", "1": "good"}
    model = bcosify(classifier(vocab_size=len(WORDS), id2label=labels))
    model.tokenizer = small_texts.tokenizer(tmp_path)
    return explain(model, model.tokenize(["the films is <good>", "very bad"]), 0)


def test_tokens_in_words(explanation):
    assert explanation.tokens[0] == ("[CLS]", "the", "film", "##s", "is", "[UNK]", "good", "[UNK]", "[SEP]")
    assert explanation.tokens[1] == ("[CLS]", "very", "bad", "[SEP]", *["[PAD]"] * 5)
    pairs = explanation.pairs(1)
    assert [token for token, _ in pairs] == ["[CLS]", "very", "bad", "[SEP]"]
    assert [value for _, value in pairs] == explanation.contributions[1, :4].tolist()
    assert [token for token, _ in explanation.pairs(1, list("abcdefghi"))] == list("abcd")
    with pytest.raises(ValueError, match="expected 9 tokens for text 1, got 2"):
        explanation.pairs(1, ["a", "b"])
    lines = explanation.table(1).splitlines()
    assert lines[2].split()[:2] == ["very", f"{pairs[1][1]:+.4g}"]
    assert lines[-2].split() == ["constant", f"{float(explanation.constant[1]):+.4g}"]
    assert lines[-1].endswith("bad & ugly") and f"{float(explanation.logits[1, 0]):+.4g}" in lines[-1]
    strongest = max(range(4), key=lambda t: abs(pairs[t][1]))
    assert [i for i, line in enumerate(lines) if re.search(r"[+-]{20}$", line)] == [strongest + 1]
    none = explain(bcosify(classifier()), inputs())
    assert none.tokens[0] == tuple(map(str, none.input_ids[0].tolist())) and none.class_name(1) == "class 1"


def test_html(explanation):
    html = explanation.html(0, ["<b>", *explanation.tokens[0][1:]])
    assert "&lt;b&gt;" in html and "<b>[" not in html and "bad &amp; ugly" in html
    spans = re.findall(r'rgba\((\d+), \d+, \d+, ([\d.]+)\)" title="([+-][^"]+)"', html)
    assert len(spans) == 9
    values = explanation.contributions[0]
    for (red, strength, told), value in zip(spans, values.tolist(), strict=True):
        assert red == ("214" if value > 0 else "31")
        assert float(told) == pytest.approx(value, rel=1e-3)
        assert float(strength) == pytest.approx(0.75 * abs(value) / float(values.abs().max()), abs=1e-3)
    page = explanation.page("A <title>")
    assert page.startswith("<!DOCTYPE html>") and page.count("<section>") == 2 and "A &lt;title&gt;" in page
    assert "http" not in page and "<script" not in page
    assert explanation._repr_html_().count("<section>") == 2


def test_saved_files(explanation, tmp_path):
    files = explanation.save(tmp_path / "out")
    assert [file.name for file in files] == ["explanations.html", "explanations.json", "0000.png", "0001.png"]
    assert all(file.stat().st_size > 0 for file in files) and files[0].read_text() == explanation.page()
    first, second = json.loads(files[1].read_text())
    assert first["target_name"] == "bad & ugly" and first["predicted"] == int(explanation.logits[0].argmax())
    assert [entry["token"] for entry in second["tokens"]] == ["[CLS]", "very", "bad", "[SEP]"]
    assert second["contributions"] + second["constant"] == pytest.approx(second["logit"])
    assert len(explanation.save(tmp_path / "less", figures=False)) == 2
    bars = explanation.figure(1).axes[0]
    assert [bar.get_width() for bar in bars.patches] == explanation.contributions[1, :4].tolist()
    assert [label.get_text() for label in bars.get_yticklabels()] == ["[CLS]", "very", "bad", "[SEP]"]


def test_parts_and_moves(explanation):
    one = explanation[1]
    assert len(one) == 1 and one.tokens == explanation.tokens[1:] and torch.equal(one.logits, explanation.logits[1:])
    assert explanation[::-1].tokens == explanation.tokens[::-1] and len(explanation[[0, 0, 1]]) == 3
    with pytest.raises(IndexError, match="expected an index below 2, got 2"):
        explanation[2]
    half = explanation.to(torch.float32)
    assert half.weights.dtype == torch.float32 and half.input_ids.dtype == half.targets.dtype == torch.int64
    assert "2 texts, targets [0, 0]" in repr(explanation)
    assert not isinstance(explanation, Explanation)
