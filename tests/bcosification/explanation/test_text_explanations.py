"""Explanations of CLIP models for texts: the frozen replay, completeness, the reference's protocol, pictures."""

import functools
import json
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bcosification import bcosify, explain
from bcosification.convert.frozen_replay import frozen_replay
from bcosification.convert.linear_map import dynamic_linear_map
from bcosification.explanation import TextExplanation, bcos_contributions
from bcosification.nn import explanation_mode
from tests.bcosification.small_clip import TEXTS, clip, error, images

MODELS = {
    "resnet, pool": ("resnet", {}, ("pool", 1)),
    "resnet, unpool": ("resnet", {}, ("unpool", 1)),
    "resnet, unpool, p = 3": ("resnet", {}, ("unpool", 3)),
    "resnet, pool, biases kept, general b": ("resnet", dict(bias="keep", b=1.5), ("pool", 1)),
    "resnet, unpool, biases kept": ("resnet", dict(bias="keep"), ("unpool", 2.5)),
    "vit": ("vit", {}, None),
    "vit, biases kept": ("vit", dict(bias="keep"), None),
    "vit, averaged": ("vit, averaged", {}, None),
    "vit, weights normalised": ("vit", dict(normalize_weight=True, activation="remove"), None),
}


@functools.cache
def build(case):
    name, options, pool = MODELS[case]
    model = bcosify(clip(name, quick_gelu="vit" in case), **options)
    if pool is not None:
        model.set_attention_pool(pool[0], p=pool[1])
    return model, images(name)


@pytest.mark.parametrize("case", MODELS)
def test_weights_and_constants_are_those_of_the_frozen_replay(case):
    model, x = build(case)
    explanation = explain(model, x, text=TEXTS, templates="simple")
    classifier = model.classifier(TEXTS, "simple")
    replay = frozen_replay(classifier, explanation.images)
    assert replay.is_affine() and error(replay.logits(), classifier(x)) < 1e-9
    size = tuple(x.shape[2:])
    assert explanation.logits.shape == (2, 3) and explanation.weights.shape == (2, 3, 6, *size)
    assert explanation.contributions.shape == (2, 3, *size) and explanation.constant.shape == (2, 3)
    for t in range(3):
        assert error(explanation.weights[:, t], replay.gradient(t)) < 1e-9
        torch.testing.assert_close(explanation.constant[:, t], replay.constant(t), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(explanation.logits, classifier(x))
    # Completeness: contributions + constant = the cosine.
    total = explanation.contributions.sum((2, 3)) + explanation.constant
    torch.testing.assert_close(total, explanation.logits, rtol=1e-10, atol=1e-12)
    contributions = (explanation.images[:, None] * explanation.weights).sum(2)
    torch.testing.assert_close(explanation.contributions, contributions)


@pytest.mark.parametrize("case", ["resnet, pool", "resnet, unpool, p = 3", "vit"])
def test_every_missing_detach_is_noticed(case):
    model, x = build(case)
    classifier = model.classifier(TEXTS)
    x6 = torch.cat([x, 1 - x], 1)
    oracle = frozen_replay(classifier, x6).gradient(1)
    tried = set()
    for path, module in classifier.named_modules():
        kind = type(module).__name__
        if kind in ("AddInverse", "Normalize", "BatchNormUncentered2d") or not hasattr(module, "set_explanation_mode"):
            continue
        unused = {"resnet, pool": ("c_proj", "attnpool.norm", "position_mean"), "vit": ("position_mean",)}
        unused |= {"resnet, unpool, p = 3": ("attnpool", "l2_norm")}
        if path.endswith(unused[case]):
            continue
        with explanation_mode(classifier):
            module.detach = False
            leaf = x6.clone().requires_grad_()
            weights = torch.autograd.grad(classifier(leaf)[:, 1].sum(), leaf)[0]
        assert error(weights, oracle) > 1e-6, f"{path} ({kind}) without its detach went unnoticed"
        tried.add(kind)
    assert tried == {
        "resnet, pool": {"BcosConv2d", "AttentionPool2d", "L2Norm"},
        "resnet, unpool, p = 3": {"BcosConv2d", "BcosLinear", "L2Norm", "PositionMean"},
        "vit": {"BcosConv2d", "BcosLinear", "LayerNorm", "MultiheadAttention", "QuickGELU", "L2Norm"},
    }[case]


@pytest.mark.parametrize("case", ["resnet, pool", "resnet, unpool", "resnet, unpool, p = 3"])
def test_the_peers_protocol(case):
    """The reference's code: position norms constant, the last normalisation not, |l|^(p-1) constant."""
    model, x = build(case)
    texts = model.encode_texts(TEXTS)
    leaf = torch.cat([x, 1 - x], 1).requires_grad_()
    with explanation_mode(model):
        features = model.image_features(leaf)
    features = features / features.norm(dim=-1, keepdim=True)
    logits = features @ texts.T
    if features.dim() == 3:
        logits = (logits * logits.abs().detach() ** (model.power - 1)).mean(1)
    explanation = explain(model, x, text=TEXTS, protocol="peer")
    for t in range(3):
        (expected,) = torch.autograd.grad(logits[:, t].sum(), leaf, retain_graph=True)
        assert error(explanation.weights[:, t], expected) < 1e-9
    total = explanation.contributions.sum((2, 3)) + explanation.constant
    assert total.abs().max() < 1e-12 < 1e-3 < explanation.logits.abs().max()
    # The paper's way points elsewhere.
    assert error(explain(model, x, text=TEXTS).weights, explanation.weights) > 1e-3


def test_forms_of_texts():
    model, x = build("vit")
    whole = explain(model, x, text=TEXTS)
    assert isinstance(whole, TextExplanation) and whole.texts == tuple(TEXTS) and len(whole) == 2
    assert whole.targets.tolist() == [[0, 1, 2]] * 2
    single = explain(model, x, text=TEXTS[1])
    torch.testing.assert_close(single.weights, whole.weights[:, 1:2])
    given = explain(model, x, text=model.encode_texts(TEXTS) * 5)
    torch.testing.assert_close(given.weights, whole.weights)
    assert given.texts == ("text 0", "text 1", "text 2")
    torch.testing.assert_close(explain(model, x, text=TEXTS, batch_size=1).weights, whole.weights)
    part = whole[1]
    assert isinstance(part, TextExplanation) and part.texts == whole.texts
    torch.testing.assert_close(part.weights, whole.weights[1:])
    assert whole.to(torch.float32).weights.dtype == torch.float32


def test_a_classifier_of_texts_is_a_bcos_model_like_any_other():
    model, x = build("resnet, unpool")
    classifier = model.classifier(TEXTS, scale=10.0)
    explanation, of_texts = explain(classifier, x, [2, 0]), explain(model, x, text=TEXTS)
    torch.testing.assert_close(explanation.weights[0], 10 * of_texts.weights[0, 2])
    torch.testing.assert_close(explanation.constant[1], 10 * of_texts.constant[1, 0])
    torch.testing.assert_close(bcos_contributions(classifier, x, 1), 10 * of_texts.contributions[:, 1])
    targets = torch.tensor([[0, 2], [1, 1]])
    _, weights, constant = dynamic_linear_map(classifier, explanation.images, targets)
    for n, t in ((0, 0), (0, 1), (1, 0), (1, 1)):
        torch.testing.assert_close(weights[n, t], 10 * of_texts.weights[n, targets[n, t]])
        torch.testing.assert_close(constant[n, t], 10 * of_texts.constant[n, targets[n, t]])


def test_what_is_refused():
    model, x = build("vit")
    with pytest.raises(ValueError, match=r"expected text= \(texts, or embeddings \(T, D\)\) for a CLIP model"):
        explain(model, x)
    with pytest.raises(ValueError, match="expected targets= or text=, got both"):
        explain(model, x, 1, text=TEXTS)
    with pytest.raises(ValueError, match="expected a B-cosified CLIP model with text=, got ZeroShotClassifier"):
        explain(model.classifier(TEXTS), x, text=TEXTS)
    for wrong in ([], [1], ["a", 2]):
        with pytest.raises(ValueError, match="expected text= as texts or a tensor"):
            explain(model, x, text=wrong)
    with pytest.raises(ValueError, match=r"expected texts, or floating point embeddings \(T, D\)"):
        explain(model, x, text=torch.zeros(10))
    with pytest.raises(ValueError, match=r"expected targets \(2,\) or \(2, T\) of integers"):
        dynamic_linear_map(model.classifier(TEXTS), torch.cat([x, 1 - x], 1), torch.zeros(2, 0, dtype=torch.long))


def test_the_model_is_left_alone_and_threads_take_turns():
    model, x = build("resnet, unpool, p = 3")
    model.train()
    expected = explain(model, x, text=TEXTS)
    assert model.training and all(module.training for module in model.modules())
    assert not any(getattr(module, "detach", False) for module in model.modules())
    results = [None] * 4

    def work(i):
        results[i] = explain(model, x, text=TEXTS)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        torch.testing.assert_close(result.weights, expected.weights)
        torch.testing.assert_close(result.constant, expected.constant)
    assert all(getattr(module, "constant_gain", None) is None for module in model.modules())
    model.eval()


def test_pictures_of_every_text(tmp_path):
    model, x = build("vit")
    explanation = explain(model, x, text=TEXTS)
    picture = explanation.image(1, smooth=3, text=TEXTS[2])
    assert np.array_equal(picture, explanation.image(1, smooth=3, text=2))
    assert not np.array_equal(picture, explanation.image(1, smooth=3))
    assert picture.shape == (32, 32, 4)
    with pytest.raises(ValueError, match="expected one of the texts"):
        explanation.image(0, text="a horse")
    files = explanation.save(tmp_path, names=["a", "b"], smooth=3, size=32)
    kinds = ["image"] + [f"text{t}_{kind}" for t in range(3) for kind in ("explanation", "contributions")]
    assert {f.name for f in files} == {f"{n}_{kind}.png" for n in "ab" for kind in kinds} | {"explanations.json"}
    assert Image.open(tmp_path / "a_text1_explanation.png").size == (32, 32)
    summary = json.loads((tmp_path / "explanations.json").read_text())
    told = summary[1]["texts"][2]
    assert told["text"] == TEXTS[2]
    assert told["contributions"] + told["constant"] == pytest.approx(told["cosine"], abs=1e-9)
    figure = explanation.figure(smooth=3)
    assert len(figure.axes) == 2 * 7 and figure.axes[1].get_title().startswith("a photo of the digit")


def test_in_float32():
    model = bcosify(clip("resnet").float())
    x = images("resnet").float()
    explanation = explain(model, x, text=TEXTS)
    replay = frozen_replay(model.classifier(TEXTS), explanation.images)
    for t in range(3):
        assert error(explanation.weights[:, t].double(), replay.gradient(t)) < 1e-3
    cosines = F.normalize(model(x), dim=-1) @ model.encode_texts(TEXTS).T
    torch.testing.assert_close(explanation.logits, cosines, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", ["values", "channels"])
def test_images_are_looked_at_before_texts_are_encoded(wrong, monkeypatch):
    """Of a thousand classes and eighty templates the texts take minutes."""
    model, x = bcosify(clip("vit")), images("vit")
    monkeypatch.setattr(model, "encode_texts", lambda *a, **k: pytest.fail("the texts were encoded first"))
    if wrong == "channels":
        with pytest.raises(ValueError, match=r"with C = 3 or 6, got \(2, 4, 32, 32\)"):
            explain(model, torch.rand(2, 4, 32, 32, dtype=torch.float64), text=TEXTS)
    else:
        with pytest.warns(UserWarning, match=r"expected images in \[0, 1\], got values from"):
            with pytest.raises(pytest.fail.Exception):
                explain(model, 255 * x, text=TEXTS)
