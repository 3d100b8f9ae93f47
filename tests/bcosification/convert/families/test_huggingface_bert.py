"""Hugging Face's encoders with a sequence classifier, against themselves and against the frozen replay."""

import copy

import pytest
import torch
from torch import nn

import bcos_kernels
from bcosification import BcosifiedText, bcosify, fuse, load, verify
from bcosification import nn as bnn
from bcosification.convert.conversion import describe
from bcosification.convert.families import family_of
from bcosification.convert.frozen_replay import frozen_replay
from bcosification.convert.linear_map import dynamic_linear_map
from bcosification.nn import explanation_mode

transformers = pytest.importorskip("transformers", reason="the package transformers is not installed (extra: text)")
small_texts = pytest.importorskip("tests.bcosification.small_texts")
NAMES, classifier, error, inputs = (getattr(small_texts, n) for n in ("NAMES", "classifier", "error", "inputs"))

ATTENTIONS = ["sdpa", "eager"]
TARGETS = torch.tensor([1, 2])


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_exact_at_b_1_and_verified(name, attention):
    model, x = classifier(name, attention=attention), inputs(name)
    before = copy.deepcopy(model.state_dict())
    exact = bcosify(model, b=1, bias="keep")
    with torch.no_grad():
        expected = model(**x)
        got = exact(**x)
    assert type(got) is type(expected) and got.loss is None
    assert error(got.logits, expected.logits) < 1e-12
    converted = bcosify(model)
    assert type(converted) is BcosifiedText
    report = verify(model, converted, x)
    assert report.ok and report.equivalence.error < 1e-10 and report.explanation.error < 1e-8, str(report)
    assert report.never_called == [] and report.biases == [] and report.without_rule == []
    assert report.about["tokens"] == [2, 9]
    held = {"scale": 8, "held": 4, "attention": 2, "gelu": 2, "variance": 5}
    last = {"relu": 1} if name == "distilbert" else {"gate": 1}
    assert report.explanation.held == held | last
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_verified_in_float32_with_biases(name):
    model, x = classifier(name).float(), inputs(name)
    report = verify(model, bcosify(model, bias="keep"), x)
    assert report.ok, str(report)
    assert report.equivalence.error < 1e-5 and report.equivalence.error_float64 < 1e-10
    # Of two attentions, four projections and an output each; of an MLP two; the two layers of the head; five norms.
    assert len(report.biases) == 2 * (4 + 2) + 2 + 5


@pytest.mark.parametrize("act", ["gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
def test_other_activations(act):
    model = classifier(hidden_act=act)
    assert verify(model, bcosify(model), inputs()).ok


def test_what_each_layer_becomes():
    model = classifier()
    converted = bcosify(model)
    becomes = {entry["name"]: entry["becomes"].rpartition(".")[2] for entry in converted.conversion}
    layer, bert = "bert.encoder.layer.0.", "bert."
    for name, kind in {
        f"{bert}embeddings.word_embeddings": "Embedding",
        f"{bert}embeddings.position_embeddings": "ConstantEmbedding",
        f"{bert}embeddings.token_type_embeddings": "ConstantEmbedding",
        f"{layer}attention.self.value": "Linear",
        f"{layer}attention.output.dense": "BcosLinear",
        f"{layer}intermediate.dense": "BcosLinear",
        f"{layer}intermediate.intermediate_act_fn": "GELU",
        f"{layer}output.dense": "BcosLinear",
        f"{layer}output.LayerNorm": "LayerNorm",
        f"{bert}pooler.dense": "BcosLinear",
        f"{bert}pooler.activation": "Tanh",
        "classifier": "BcosLinear",
    }.items():
        assert becomes[name] == kind, name
    attention = converted.model.bert.encoder.layer[0].attention.self
    for projection in (attention.query, attention.key):
        assert isinstance(projection, nn.Linear) and isinstance(projection, bnn.HeldOutput)
        assert not isinstance(projection, bnn.BcosLinear) and projection.bias is None
    assert converted.config["options"]["inverse"] is False and converted.config["max_tokens"] == 16
    assert converted.config["logit_bias"] == pytest.approx(-torch.log(torch.tensor(2.0)).item())
    tanh = bcosify(classifier("roberta")).model.classifier.activation
    assert type(tanh) is bnn.Tanh
    removed = bcosify(classifier("distilbert"), activation="remove").model
    assert type(removed.activation) is nn.Identity


@pytest.mark.parametrize("options", [{"b": 1.5}, {"normalize_weight": True}, {"activation": "remove"}])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_other_options_are_verified(name, options):
    model = classifier(name)
    report = verify(model, bcosify(model, **options), inputs(name))
    assert report.ok, str(report)


@pytest.mark.parametrize("name", NAMES)
def test_the_function_of_embeddings_is_the_model(name):
    """Positions included, which RoBERTa makes of the tokens' numbers."""
    x = inputs(name)
    converted = bcosify(classifier(name))
    function, embeddings = converted.on_embeddings(x)
    assert embeddings.shape == (2, 9, 16) and not embeddings.requires_grad
    with torch.no_grad():
        assert error(function(embeddings), converted(**x).logits) < 1e-12
        alone = {key: value[:1] for key, value in x.items()}
        assert error(function(embeddings)[:1], converted(**alone).logits) < 1e-9


def weights_by_autograd(function, embeddings):
    leaf = embeddings.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).gather(1, TARGETS[:, None]).sum(), leaf)[0]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_every_missing_detach_is_noticed(name, attention):
    converted = bcosify(classifier(name, attention=attention), bias="keep")
    function, embeddings = converted.on_embeddings(inputs(name))
    oracle = frozen_replay(function, embeddings).gradient(TARGETS)
    with explanation_mode(function):
        assert error(weights_by_autograd(function, embeddings), oracle) < 1e-10
    tried = []
    for path, module in function.named_modules():
        kind = type(module).__name__
        if kind in ("LogitBias", "ConstantEmbedding") or not hasattr(module, "set_explanation_mode"):
            continue
        with explanation_mode(function):
            module.detach = False
            got = error(weights_by_autograd(function, embeddings), oracle)
        assert got > 1e-6, f"{path} ({kind}) without its detach went unnoticed"
        tried.append(kind)
    counts = {"BcosLinear": 8, "Linear": 4, "LayerNorm": 5, "GELU": 2, "Tanh": 1}
    if name == "distilbert":
        del counts["Tanh"]
    assert {kind: tried.count(kind) for kind in set(tried)} == counts


def test_verify_fails_where_something_is_not_held(monkeypatch):
    model = classifier()
    converted = bcosify(model)
    monkeypatch.setattr(bnn.HeldOutput, "forward", lambda self, x: nn.Linear.forward(self, x))
    report = verify(model, converted, inputs())
    assert not report.ok and not report.explanation.ok and report.equivalence.ok
    assert report.explanation.error > 1e-3 and "explanations" in str(report)


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(name, tmp_path):
    model, x = classifier(name), inputs(name)
    assert describe(family_of(model), model)["vocab_size"] == 40
    converted = bcosify(model, b=1.5)
    converted.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is BcosifiedText and loaded.config == converted.config
    with torch.no_grad():
        assert torch.equal(loaded(**x).logits, converted(**x).logits)
    assert verify(model, loaded, x).ok


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_of_defaults_is_saved_too(name, tmp_path):
    """transformers leaves out of a configuration what is its default, two classes for one."""
    kind = small_texts.family(name)
    model = getattr(transformers, kind.model_name())(kind.configuration()(**kind.sizes)).eval()
    converted, x = bcosify(model), inputs(name)
    converted.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(**x).logits, converted(**x).logits)


def test_a_new_head_is_saved_too(tmp_path):
    converted, x = bcosify(classifier()).reset_classifier(5), inputs()
    converted.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    with torch.no_grad():
        assert loaded(**x).logits.shape == (2, 5)
        assert torch.equal(loaded(**x).logits, converted(**x).logits)
    assert loaded.config["logit_bias"] == pytest.approx(-torch.log(torch.tensor(4.0)).item())


# --- training -------------------------------------------------------------------------------------------------------


def gradients(model, x):
    model.zero_grad()
    loss = model(**x, labels=TARGETS).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_a_training_step(name):
    """Every parameter learns, and the kernels' gradients are those of the reference."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    off = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0} if name == "distilbert" else off
    model, x = bcosify(classifier(name, **off)).float().train(), inputs(name)
    loss, got = gradients(model, x)
    with bcos_kernels.backend("reference"):
        reference_loss, expected = gradients(model, x)
    torch.testing.assert_close(loss, reference_loss, rtol=1e-5, atol=1e-6)
    assert set(got) == set(expected) == {name for name, _ in model.named_parameters()} and loss.isfinite()
    for parameter, gradient in got.items():
        assert gradient.isfinite().all(), parameter
        difference, size = (float(t.norm()) for t in (gradient - expected[parameter], expected[parameter]))
        assert difference <= 1e-4 * size + 1e-7, parameter
        if not parameter.endswith(("key.weight", "token_type_embeddings.weight")):
            assert gradient.any(), parameter
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer.step()
    with torch.no_grad():
        assert model(**x, labels=TARGETS).loss < loss


@pytest.mark.skipif(bcos_kernels.backends()["cpu"] is not None, reason="no CPU kernels here")
@pytest.mark.parametrize("name", NAMES)
def test_steps_and_explanations_run_on_kernels(name):
    model, x = bcosify(classifier(name)).float().train(), inputs(name)
    with bcos_kernels.timed() as seconds:
        gradients(model, x)
        function, embeddings = model.on_embeddings(x)
        dynamic_linear_map(function, embeddings)
    assert {backend for _, backend in seconds} == {"cpu"}, seconds
    expected = {"linear", "linear_gelu", "layer_norm", "linear_backward", "linear_gelu_backward"}
    assert expected <= {op for op, _ in seconds}


@pytest.mark.parametrize("name", NAMES)
def test_fused_and_low_memory_blocks_compute_the_same(name):
    model, x = bcosify(classifier(name)).eval(), inputs(name)
    assert "Fused" in repr(model)
    loss, expected = gradients(model, x)
    low = fuse(copy.deepcopy(model), memory="low")
    low_loss, got = gradients(low, x)
    torch.testing.assert_close(low_loss, loss, rtol=1e-12, atol=0)
    # A hook makes the two layers run one after the other.
    apart, calls = copy.deepcopy(model), []
    for module in apart.modules():
        if type(module) is bnn.GELU:
            module.register_forward_hook(lambda *_: calls.append(1))
    _, separate = gradients(apart, x)
    assert len(calls) == 2
    for parameter, gradient in expected.items():
        torch.testing.assert_close(got[parameter], gradient, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(separate[parameter], gradient, rtol=1e-9, atol=1e-12)


def test_the_librarys_switches_work_inside():
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, x = bcosify(classifier(**off)).train(), inputs()
    loss, expected = gradients(model, x)
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # transformers has renamed it
    getattr(model.model, next(name for name in names if hasattr(model.model, name)))()
    layers, calls = model.model.bert.encoder.layer, []
    for layer in layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    again, got = gradients(model, x)
    assert all(layer.gradient_checkpointing for layer in layers)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(got[parameter], gradient, rtol=1e-9, atol=1e-12)
    model.model.set_attn_implementation("eager")
    torch.testing.assert_close(gradients(model, x)[0], loss, rtol=1e-9, atol=0)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertModel", "BertForTokenClassification", "BertForPreTraining"])
def test_a_model_without_a_sequence_classifier_is_refused(kind):
    model = getattr(transformers, kind)(classifier().config)
    with pytest.raises(ValueError, match=f"expected an encoder with a sequence classifier .*BertForSequence.*{kind}"):
        bcosify(model)


def test_decoders_are_refused():
    with pytest.raises(ValueError, match="expected an encoder, got BertForSequenceClassification with is_decoder=True"):
        bcosify(classifier(is_decoder=True))


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_other_attentions_are_refused(attention):
    model = classifier()
    model.config._attn_implementation = attention
    with pytest.raises(ValueError, match=f"attn_implementation .*'eager', 'sdpa'.*{attention}.*set_attn_impl"):
        bcosify(model)


def test_an_attention_of_ones_own_is_refused():
    class Own(type(classifier().bert.encoder.layer[0].attention.self)):
        def forward(self, x, *_, **__):
            return self.value(x), None

    model = classifier()
    model.bert.encoder.layer[1].attention.self.__class__ = Own
    with pytest.raises(ValueError, match="expected attentions of the class .*BertSelfAttention.*Own"):
        bcosify(model)


@pytest.mark.parametrize("options", [{"mean": 0.5}, {"std": (0.2, 0.2, 0.2)}])
def test_options_of_images_are_refused(options):
    with pytest.raises(ValueError, match="expected no mean= and std= for .*BertForSequenceClassification"):
        bcosify(classifier(), **options)
