"""BcosifiedText: called as the original, its loss, its tokenizer, what it refuses; names that stand for texts."""

import copy
import json
import os
import pickle

import pytest
import torch
import torch.nn.functional as F

from bcosification import BcosifiedModel, BcosifiedText, bcosify, load, resolve, verify
from bcosification.convert import text
from bcosification.convert.hub import model_card

transformers = pytest.importorskip("transformers", reason="the package transformers is not installed (extra: text)")
small_texts = pytest.importorskip("tests.bcosification.small_texts")
WORDS, classifier, inputs = (getattr(small_texts, n) for n in ("WORDS", "classifier", "inputs"))

TEXTS = ["the films is good", "very bad"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_texts.saved(tmp_path_factory.mktemp("bert"))


def test_called_as_the_original():
    original = classifier(attention="eager")
    model, x = bcosify(original, b=1, bias="keep"), inputs()
    options = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        got, expected = model(**x, **options), original(**x, **options)
        for name in ("hidden_states", "attentions"):
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
        assert list(got) == list(expected) == ["logits", "hidden_states", "attentions"]
        assert torch.equal(model(x["input_ids"], x["attention_mask"], x["token_type_ids"]).logits, got.logits)
        embedded = original.get_input_embeddings()(x["input_ids"])
        rest = {name: value for name, value in x.items() if name != "input_ids"}
        torch.testing.assert_close(model(inputs_embeds=embedded, **rest).logits, got.logits)
        (logits,) = model(**x, return_dict=False)
        assert torch.equal(logits, got.logits)
        loss, logits = model(**x, labels=torch.tensor([0, 1]), return_dict=False)
        assert loss.dim() == 0 and torch.equal(logits, got.logits)


def test_the_loss():
    model, x = bcosify(classifier()), inputs()
    labels = torch.tensor([2, 0])
    one_hot = torch.tensor([[0, 0, 1.0], [1, 0, 0]], dtype=torch.float64)
    output = model(**x, labels=labels)
    logits = output.logits
    # Written out: the mean of -log sigmoid(l) of the class and -log(1 - sigmoid(l)) of the others.
    p = torch.sigmoid(logits)
    by_hand = -(one_hot * p.log() + (1 - one_hot) * (1 - p).log()).mean()
    torch.testing.assert_close(output.loss, by_hand)
    torch.testing.assert_close(model(**x, labels=one_hot).loss, by_hand)
    assert output.keys() == {"loss", "logits"}
    single = bcosify(classifier(id2label={"0": "score"}))
    values = torch.tensor([0.5, -1.0])
    output = single(**x, labels=values)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], values.double()))
    assert single.config["logit_bias"] is None
    with pytest.raises(ValueError, match=r"expected labels \(2,\) of integers or \(2, 3\), got \(3,\)"):
        model(**x, labels=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"expected labels .*, got \(2,\) torch.float32"):
        model(**x, labels=values)


def test_the_logit_bias_is_in_the_logits():
    original, x = classifier(), inputs()
    with torch.no_grad():
        plain, biased = bcosify(original, logit_bias=None)(**x).logits, bcosify(original)(**x).logits
    torch.testing.assert_close(biased, plain - torch.log(torch.tensor(2.0, dtype=torch.float64)))


def wrong_inputs():
    ids = torch.ones(2, 5, dtype=torch.long)
    yield {}, ValueError, "expected input_ids or inputs_embeds, got neither"
    yield {"input_ids": ids, "inputs_embeds": torch.rand(2, 5, 16)}, ValueError, "got both"
    yield {"input_ids": torch.rand(2, 3, 8, 8)}, TypeError, r"got \(2, 3, 8, 8\) torch.float32; this model reads texts"
    image = torch.randint(0, 256, (2, 3, 8, 8))
    yield {"input_ids": image}, ValueError, r"expected input_ids \(N, T\), T >= 1, got \(2, 3, 8, 8\)"
    yield {"input_ids": ids[0]}, ValueError, r"got \(5,\) \(one text: input_ids\[None\]\)"
    yield {"input_ids": ids[:, :0]}, ValueError, r"T >= 1, got \(2, 0\)"
    yield {"input_ids": [[1, 2]]}, TypeError, "expected input_ids to be a tensor, got list .*return_tensors"
    yield {"input_ids": ids.repeat(1, 4)}, ValueError, "expected at most 16 tokens, .*, got 20"
    yield {"input_ids": ids * 40}, ValueError, r"expected input_ids in \[0, 39\], got 40 to 40"
    yield {"input_ids": -ids}, ValueError, r"expected input_ids in \[0, 39\], got -1 to -1"
    yield {"input_ids": ids, "token_type_ids": 2 * ids}, ValueError, r"token_type_ids in \[0, 1\], got 2 to 2"
    yield {"input_ids": ids, "attention_mask": ids[:, :4]}, ValueError, r"attention_mask \(2, 5\), got \(2, 4\)"
    yield {"input_ids": ids, "position_ids": ids[:, :3]}, ValueError, r"position_ids \(2, 5\), got \(2, 3\)"
    yield {"inputs_embeds": torch.rand(2, 5, 15)}, ValueError, r"inputs_embeds \(N, T, 16\), .* got \(2, 5, 15\)"


@pytest.mark.parametrize(("given", "kind", "message"), list(wrong_inputs()))
def test_wrong_inputs_are_named(given, kind, message):
    with pytest.raises(kind, match=message):
        bcosify(classifier())(**given)


def test_roberta_has_fewer_tokens_than_positions():
    assert bcosify(classifier("roberta")).config["max_tokens"] == 14  # of 16: they begin behind the padding's, 1
    with pytest.raises(ValueError, match="expected at most 14 tokens"):
        bcosify(classifier("roberta"))(torch.ones(1, 15, dtype=torch.long))


def test_what_there_is_of_images_says_so():
    model = bcosify(classifier())
    for call in (lambda: model.transform, lambda: model.channels, lambda: model.encode(torch.rand(1, 3, 8, 8))):
        with pytest.raises(TypeError, match="expected a model of images, got .*BertForSequenceClassification"):
            call()


def test_copies_and_compiled():
    model, x = bcosify(classifier()), inputs()
    with torch.no_grad():
        expected = model(**x).logits
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(copied(**x).logits, expected)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**x).logits, expected)


def test_under_autocast_and_in_half_precision():
    model, x = bcosify(classifier()).float().train(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**x, labels=torch.tensor([0, 1]))
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    exact = model.eval()(**x).logits
    half = copy.deepcopy(model).bfloat16()
    torch.testing.assert_close(half(**x).logits.float(), exact, rtol=0.1, atol=0.05)
    assert verify(classifier().bfloat16(), bcosify(classifier()).bfloat16(), x).ok


# --- the tokenizer, names and folders -------------------------------------------------------------------------------


def test_a_folder_by_its_name(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    network, info = resolve(f"transformers:{folder.name}")  # a relative one is kept as the whole path
    assert info["library"] == "transformers" and info["num_classes"] == 2 and info["preprocessing"] is None
    assert info["spec"] == f"transformers:{folder}" and os.path.isabs(info["weights"])
    model = bcosify(network)
    assert model.config["tokenizer"] == str(folder) and model.config["source"] == info["spec"]
    encoded = model.tokenize(TEXTS)
    assert encoded["input_ids"].tolist() == model.tokenizer(TEXTS, padding=True)["input_ids"]
    with pytest.warns(UserWarning, match="at most 16 tokens, got 42 in text 0"):
        assert model.tokenize("good " * 40)["input_ids"].shape == (1, 16)
    pair = model.tokenize(["good"], text_pair=["bad"])
    assert pair["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
    direct = bcosify(transformers.BertForSequenceClassification.from_pretrained(folder))
    assert direct.config["tokenizer"] == str(folder) and direct.config["source"] is None
    assert direct.config["class_names"] == ["negative", "positive"]


def test_the_tokenizer_is_saved_with_the_model(folder, tmp_path, monkeypatch):
    model = bcosify(resolve(f"transformers:{folder}")[0])
    model.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["tokenizer"] == str(folder) and config["max_tokens"] == 16
    loaded = load(tmp_path / "m")
    asked, read = [], text.read_tokenizer
    monkeypatch.setattr(text, "read_tokenizer", lambda name, **options: asked.append(name) or read(name, **options))
    x = loaded.tokenize(TEXTS)
    assert asked == [str(tmp_path / "m" / "tokenizer")]
    with torch.no_grad():
        assert torch.equal(loaded(**x).logits, model.eval()(**model.tokenize(TEXTS)).logits)
    again = BcosifiedModel.from_pretrained(tmp_path / "m")
    assert type(again) is BcosifiedText and again.tokenize(TEXTS)["input_ids"].tolist() == x["input_ids"].tolist()


def test_without_a_tokenizer(tmp_path, monkeypatch):
    model = bcosify(classifier())
    with pytest.raises(ValueError, match="expected model.tokenizer = a tokenizer of transformers, as none is known"):
        model.tokenize(TEXTS)
    model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m" / "tokenizer").exists() and load(tmp_path / "m").config["tokenizer"] is None
    model.config["tokenizer"] = str(tmp_path)  # where none is
    with pytest.raises(ValueError, match=f"tokenizer: expected one of transformers at '{tmp_path}', got "):
        model.tokenize(TEXTS)
    asked = []

    def read(name, local_files_only=False):
        asked.append(local_files_only)
        raise ValueError(name)

    monkeypatch.setattr(text, "read_tokenizer", read)
    model.config["tokenizer"] = "somebody/model"
    model.save_pretrained(tmp_path / "n")  # nothing is downloaded for that
    assert model.tokens_of(torch.tensor([[1, 2]])) == [["1", "2"]] and asked == [True, True]


def test_weights_without_a_classifier_are_refused(tmp_path):
    network = classifier(id2label={"0": "a", "1": "b"})
    transformers.BertForMaskedLM(network.config).save_pretrained(tmp_path / "mlm")
    with pytest.raises(ValueError, match="got BertForMaskedLM's without .*classifier.weight; num_classes= gives"):
        resolve(f"transformers:{tmp_path / 'mlm'}")
    body, info = resolve(f"transformers:{tmp_path / 'mlm'}", num_classes=4)
    assert info["num_classes"] == 4 and bcosify(body).num_classes == 4


def test_another_number_of_classes_and_random_weights(folder):
    network, info = resolve(f"transformers:{folder}", num_classes=5)
    assert info["num_classes"] == 5 and network.classifier.weight.shape == (5, 16)
    own = resolve(f"transformers:{folder}")[0].bert.state_dict()
    assert all(torch.equal(own[name], value) for name, value in network.bert.state_dict().items())
    random, info = resolve(f"transformers:{folder}", pretrained=False)
    assert info["weights"] is None and not torch.equal(random.classifier.weight, network.classifier.weight[:2])


def test_names_that_stand_for_nothing(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected the weights to be those of the name or folder, got 'IMAGENET1K_V1'"):
        resolve(f"transformers:{folder}", weights="IMAGENET1K_V1")
    with pytest.raises(ValueError, match="expected a classifier of texts .*, got Unrecognized model"):
        resolve(f"transformers:{tmp_path}")

    def unreachable(name):
        raise OSError("We couldn't connect\nCheck")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
        with pytest.raises(RuntimeError, match="transformers:a/b: .* got OSError: We couldn't connect$"):
            resolve("transformers:a/b")
    with pytest.raises(ValueError, match=f"of a Hugging Face model: bcosify it as transformers:{folder}"):
        load(folder)
    transformers.ViTConfig(hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="expected a classifier of texts .*, got ViTConfig"):
        resolve(f"transformers:{tmp_path / 'vit'}")


def test_the_model_card(folder, tmp_path, monkeypatch):
    model = bcosify(resolve(f"transformers:{folder}")[0])
    model.save_pretrained(tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    assert 'pipeline_tag: "text-classification"' in card and "base_model" not in card and "image" not in card
    assert "texts: up to 16 tokens" in card and "classes: 2 (negative, positive)" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code.replace("REPOSITORY_OR_FOLDER", "m"), found)
    total = found["explanation"].contributions.sum(1) + found["explanation"].constant
    torch.testing.assert_close(total, found["logits"].amax(1), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "pictures" / "explanations.html").is_file()
    model.config["source"] = "transformers:somebody/bert"
    assert 'base_model: "somebody/bert"' in model_card(model)


def test_texts_that_are_cut_are_told(folder, recwarn):
    model = bcosify(resolve(f"transformers:{folder}")[0])
    limit = model.config["max_tokens"]
    model.tokenize(["good " * (limit - 2), "bad"])  # with the two tokens around it, just as many
    assert not [w for w in recwarn if "tokenize" in str(w.message)]
    told = rf"at most {limit} tokens, got {limit + 3} in text 1 \(and too many in 1 other"
    with pytest.warns(UserWarning, match=told):
        encoded = model.tokenize(["bad", "good " * (limit + 1), "good " * limit])
    assert encoded["input_ids"].shape == (3, limit)


@pytest.mark.parametrize("labels, error, message", [
    ([0, 1], TypeError, "expected labels as a tensor, got list"),
    (torch.tensor([0, 3]), ValueError, "expected labels from 0 to 2, got 0 to 3"),
    (torch.tensor([0, -100]), ValueError, "expected labels from 0 to 2, got -100 to 0"),
])  # fmt: skip
def test_labels_that_are_none(labels, error, message):
    with pytest.raises(error, match=message):
        bcosify(classifier())(**inputs(), labels=labels)


def test_other_models_of_texts_are_refused_as_such():
    config = transformers.ElectraConfig(vocab_size=30, hidden_size=8, embedding_size=8, num_hidden_layers=1,
                                        num_attention_heads=2, intermediate_size=16)  # fmt: skip
    with pytest.raises(ValueError, match="expected an encoder with a sequence .*, got transformers.*Electra"):
        bcosify(transformers.ElectraForSequenceClassification(config))


def test_a_regression_of_several_numbers_is_no_classifier():
    with pytest.raises(ValueError, match="problem_type='regression' and 3 outputs"):
        bcosify(classifier(problem_type="regression"))


def test_what_is_for_images():
    """The encoding and the normalisation have nothing to act on, as by default; mean and std are refused."""
    model = classifier()
    expected = bcosify(model).config["options"]
    assert not expected["inverse"] and not expected["normalize_input"]
    for given in (False, True):
        assert bcosify(model, inverse=given, normalize_input=given).config["options"] == expected
    with pytest.raises(ValueError, match="expected no mean= and std= for transformers.*Bert.*, which reads no images"):
        bcosify(model, mean=0.5)
