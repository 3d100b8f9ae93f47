"""BcosifiedCLIP: open_clip's interface, the text tower, attention pooling, saving and loading."""

import copy
import json

import open_clip
import pytest
import torch
import torch.nn.functional as F

import bcosification
from bcosification import bcosify, load
from bcosification.convert.clip import StandardCLIP
from bcosification.convert.clip_texts import named_templates, tokenizer_of
from bcosification.convert.resolver import resolve
from tests.bcosification.small_clip import MEAN, STD, TEXTS, clip, error, images, normalized

TEMPLATES = ["a photo of {}.", "{}"]


def tokens(texts=TEXTS):
    return open_clip.SimpleTokenizer(context_length=12)(texts)


@pytest.mark.parametrize("custom", [False, True])
def test_the_text_tower_is_the_originals(custom):
    model = clip("vit", custom=custom)
    converted = bcosify(model)
    with torch.no_grad():
        for normalize in (False, True):
            expected = model.encode_text(tokens(), normalize=normalize)
            assert torch.equal(converted.encode_text(tokens(), normalize=normalize), expected)
        model.logit_scale.fill_(0)
        next(model.parameters()).zero_()
    assert converted.logit_scale.item() == pytest.approx(2.6593, abs=1e-4) and converted.logit_bias is None
    assert not any("visual" in name for name in converted.state_dict())
    biased = clip("vit", custom=custom)
    biased.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    assert bcosify(biased).logit_bias.item() == -10


def test_texts_are_embedded_as_open_clip_does():
    model = clip("vit")
    converted = bcosify(model).train()
    expected = F.normalize(model.encode_text(tokens()), dim=-1)
    torch.testing.assert_close(converted.encode_texts(TEXTS), expected)
    torch.testing.assert_close(converted.encode_texts(TEXTS[0]), expected[:1])
    assert converted.training and converted.text.training
    filled = [[template.format(text) for text in TEXTS] for template in TEMPLATES]
    parts = torch.stack([F.normalize(model.encode_text(tokens(texts)), dim=-1) for texts in filled])
    torch.testing.assert_close(converted.encode_texts(TEXTS, TEMPLATES), F.normalize(parts.mean(0), dim=-1))
    assert len(named_templates("openai")) == 80 and len(named_templates("simple")) == 7
    assert named_templates(None) == ["{}"] and named_templates("the {}") == ["the {}"]
    for wrong in (["no place"], [], ["{}", str.upper]):
        with pytest.raises(ValueError, match="templates: expected"):
            named_templates(wrong)
    with pytest.raises(ValueError, match="got .'opnai'.; did you mean openai.$"):
        named_templates("opnai")
    for wrong in ([], [3]):
        with pytest.raises(ValueError, match="texts: expected at least one text"):
            converted.encode_texts(wrong)


def test_the_classifier_gives_cosines():
    model, x = clip("resnet"), images("resnet")
    converted = bcosify(model)
    embeddings = model.encode_text(tokens()).detach()
    cosines = F.normalize(converted(x), dim=-1) @ F.normalize(embeddings, dim=-1).T
    torch.testing.assert_close(converted.classifier(TEXTS)(x), cosines)
    torch.testing.assert_close(converted.classifier(7 * embeddings)(x), cosines)
    torch.testing.assert_close(converted.classifier(TEXTS, scale=100.0)(x), 100 * cosines)
    with pytest.raises(ValueError, match=r"expected embeddings \(T, 10\) for this model, got \(3, 9\)"):
        converted.classifier(torch.randn(3, 9))(x)
    with pytest.raises(ValueError, match="expected texts with templates=, got embeddings"):
        converted.classifier(embeddings, "openai")
    with pytest.raises(ValueError, match="protocol: expected 'paper' or 'peer', got 'reference'"):
        converted.classifier(TEXTS, protocol="reference")


@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_unpool_compares_every_position(p):
    model, x = clip("resnet"), images("resnet")
    converted = bcosify(model)
    pooled = converted(x)
    assert converted.set_attention_pool("unpool", p=p) is converted
    texts = F.normalize(model.encode_text(tokens()), dim=-1)
    seen = []
    handle = converted.model.attnpool.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    cosines = converted.classifier(TEXTS)(x)
    handle.remove()
    pool = converted.model.attnpool
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for n in range(2):
        for i in range(2):
            for j in range(2):
                v = pool.v_proj.weight @ seen[0][n, :, i, j]
                a = pool.c_proj.weight @ v
                position = a * a.abs() / v.norm()
                l = texts @ (position / position.norm())  # noqa: E741
                expected[n] += l * l.abs() ** (p - 1) / 4
    assert error(cosines, expected) < 1e-10
    torch.testing.assert_close(converted(x), converted.image_features(x).mean(1))
    assert (converted.attention_pool, converted.power) == ("unpool", p)
    converted.set_attention_pool("pool")
    assert torch.equal(converted(x), pooled) and converted.power == p


def test_attention_pooling_that_is_not_there_or_not_known():
    converted = bcosify(clip("vit"))
    assert converted.attention_pool is None
    told = "a tower with the attention pooling of CLIP's ResNets, got .*VisionTransformer, which has none .*CoCa"
    with pytest.raises(ValueError, match=told):  # nothing of class tokens: CoCa's embedding is that of a pooling, too
        converted.set_attention_pool("unpool")
    converted = bcosify(clip("resnet"))
    with pytest.raises(ValueError, match="expected mode to be 'pool' or 'unpool', got 'max'"):
        converted.set_attention_pool("max")
    with pytest.raises(ValueError, match="expected p >= 1"):
        converted.set_attention_pool(p=0.5)


@pytest.mark.parametrize("name", ["resnet", "vit, averaged"])
@pytest.mark.parametrize("custom", [False, True])
def test_saved_with_its_text_tower(name, custom, tmp_path):
    model, x = clip(name, custom=custom, quick_gelu=True), images(name)
    converted = bcosify(model, b=1.5)
    if name == "resnet":
        converted.set_attention_pool("unpool", p=3)
    converted.save_pretrained(tmp_path, with_text=True)
    loaded = load(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(x), converted(x))
        assert torch.equal(loaded.encode_texts(TEXTS), converted.encode_texts(TEXTS))
        assert torch.equal(loaded.classifier(TEXTS)(x), converted.classifier(TEXTS)(x))
    assert (loaded.attention_pool, loaded.power) == (converted.attention_pool, converted.power)
    assert torch.equal(loaded.logit_scale, converted.logit_scale) and loaded.config == converted.config
    loaded.save_pretrained(tmp_path / "again", with_text=True)  # what was loaded can be saved
    assert load(tmp_path / "again").state_dict().keys() == converted.state_dict().keys()


def test_saved_without_its_text_tower(tmp_path):
    model, x = clip("resnet"), images("resnet")
    converted = bcosify(model)
    converted.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())["text"]
    assert (told["class"], told["stored"], told["context_length"]) == ("open_clip.model.CLIP", False, 12)
    loaded = load(tmp_path)
    assert loaded.text is None and torch.equal(loaded(x), converted(x))
    assert torch.equal(loaded.logit_scale, converted.logit_scale)
    message = r"expected a model with a text tower, got one without \(that of open_clip.model.CLIP was not"
    with pytest.raises(ValueError, match=message):
        loaded.encode_texts(TEXTS)
    with pytest.raises(ValueError, match=message):
        bcosification.explain(loaded, x, text=TEXTS)
    with pytest.raises(ValueError, match=message):
        loaded.save_pretrained(tmp_path / "again", with_text=True)
    embeddings = converted.encode_texts(TEXTS)
    assert torch.equal(loaded.classifier(embeddings)(x), converted.classifier(embeddings)(x))
    loaded.attach_text(model)
    assert torch.equal(loaded.encode_texts(TEXTS), embeddings)
    assert torch.equal(load(tmp_path, model=model).encode_texts(TEXTS), embeddings)
    assert load(tmp_path, model=model.visual).text is None


def test_a_bare_tower_has_no_texts(tmp_path):
    converted = bcosify(clip("vit").visual)
    assert converted.text is None and converted.logit_scale is None and converted.config["text"] is None
    with pytest.raises(ValueError, match="it was made of a bare image tower"):
        converted.encode_texts(TEXTS)
    converted.save_pretrained(tmp_path)
    assert load(tmp_path).config["text"] is None


def test_what_can_be_attached():
    converted = bcosify(clip("vit"))
    with pytest.raises(ValueError, match="expected an open_clip model with a text tower, got open_clip.transformer"):
        converted.attach_text(clip("vit").visual)
    told = converted.config["text"] | {"vocab_size": 99}
    with pytest.raises(ValueError, match="expected a tokenizer .* for a vocabulary of 99"):
        tokenizer_of(told)
    converted.tokenizer = lambda texts: tokens(["a dog"] * len(texts))
    first, second = converted.encode_texts(["one", "two"])
    assert torch.equal(first, second)


def test_a_text_tower_that_cannot_be_described_is_named(tmp_path):
    model = clip("vit")
    model.ln_final = torch.nn.Sequential(model.ln_final)
    converted = bcosify(model)
    assert converted.config["text"]["architecture"] is None
    with pytest.raises(ValueError, match="expected a text tower that can be built again .* attach_text"):
        converted.save_pretrained(tmp_path, with_text=True)
    converted.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path, model=model).encode_texts(TEXTS), converted.encode_texts(TEXTS))


def test_names_of_open_clip(tmp_path, monkeypatch):
    """resolve's names reach config.json, and load builds from them what no description builds."""
    small = clip("vit").float()
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained=None: copy.deepcopy(small))
    network, info = resolve("open_clip:ViT-B-32/openai", pretrained=False)
    assert info["num_classes"] is None and info["preprocessing"]["mean"] == list(MEAN)
    converted = bcosify(network)
    assert converted.config["source"] == converted.config["text"]["model"] == "open_clip:ViT-B-32/openai"
    assert converted._tokenizer().context_length == 12
    converted.config["architecture"] = converted.config["text"]["architecture"] = None
    converted.save_pretrained(tmp_path, with_text=True)
    loaded = load(tmp_path)
    assert torch.equal(loaded.encode_texts(TEXTS), converted.encode_texts(TEXTS))


def test_the_standard_model_on_the_same_images():
    model, x = clip("resnet"), images("resnet")
    standard = StandardCLIP(model, MEAN, STD)
    torch.testing.assert_close(standard(x), model.encode_image(normalized(x)), rtol=1e-5, atol=1e-6)
    texts = F.normalize(model.encode_text(tokens()), dim=-1)
    cosines = F.normalize(standard(x), dim=-1) @ texts.T
    torch.testing.assert_close(standard.classifier(TEXTS)(x), cosines)
    torch.testing.assert_close(standard.encode_image(x, normalize=True), F.normalize(standard(x), dim=-1))
    tower = StandardCLIP(model.visual, MEAN, STD)
    torch.testing.assert_close(tower(x), standard(x))
    with pytest.raises(ValueError, match="expected a model with a text tower, got open_clip.modified_resnet"):
        tower.encode_texts(TEXTS)


def test_without_text_shares_everything_else():
    converted = bcosify(clip("vit"))
    bare = converted.without_text()
    assert bare.text is None and converted.text is not None and bare.model is converted.model
    assert {name for name, _ in bare.named_parameters()} == {
        name for name, _ in converted.named_parameters() if name.startswith("model.")
    }
