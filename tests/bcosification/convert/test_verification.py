"""verify: says yes to exact conversions, and no to each kind of mistake, by the name of the layer."""

import copy
import json
import math
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from bcosification import bcosify, verify
from bcosification.convert import rules
from tests.bcosification.convert.standard_networks import (
    MEAN,
    NETWORKS,
    STD,
    make,
    normalized,
    relative_error,
    statistics_of,
    vit,
)


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_conversions_pass(name):
    network, images = make(name)
    converted = bcosify(network, **statistics_of(name))
    report = verify(network, converted, images)
    assert report.ok, str(report)
    assert report.equivalence.ok and report.equivalence.error < 1e-12 and report.equivalence.tolerance == 1e-10
    assert report.completeness.ok and report.completeness.error < 1e-12
    assert min(abs(value) for value in report.completeness.contributions) > 1e-6
    parametrized = [layer for layer in report.layers if "Bcos" in layer.becomes or "Norm" in layer.becomes]
    assert len(parametrized) > 5 or name == "sequential"
    assert all(layer.calls >= 1 and layer.error < 1e-12 for layer in parametrized)
    assert report.explanation.ok and report.explanation.error < 1e-9
    assert report.weights_changed == []
    for i in range(2):
        total = report.completeness.contributions[i] + report.completeness.constants[i]
        assert total == pytest.approx(report.completeness.logits[i], rel=1e-9)


@pytest.mark.parametrize("factor", [1e-9, 0, 1])
def test_checks_that_say_little_say_so(factor):
    """Where next to nothing of the image reaches the logits, contributions + constant is the constant."""
    name = "resnet, basic blocks"
    network, images = make(name)
    with torch.no_grad():
        network.fc.weight.mul_(factor)
    report = verify(network, bcosify(network, **statistics_of(name)), images)
    faint = report.completeness.share <= report.completeness.tolerance
    assert faint == ("which says little: contributions are" in str(report)) == (factor < 1)
    assert report.explanation.zero == ("W(x) is 0 everywhere" in str(report)) == (factor == 0)


@pytest.mark.parametrize(
    "options",
    [
        {"b": 1.5, "bias": "keep", "pool": "keep"},
        {"normalize_weight": True, "activation": "remove", "normalize_input": False},
        {"inverse": False, "head": "keep", "bias": "decay"},
    ],
)
def test_options_that_leave_the_originals_function_are_told(options):
    network, images = make("resnet, basic blocks")
    report = verify(network, bcosify(network, **options), images)
    assert report.ok, str(report)
    told = report.equivalence.differs_by
    assert f"b={options.get('b', 2):g}" in told
    assert ("average pooling" in told) == (options.get("pool") != "keep")
    assert ("normalize_weight=True" in told) == options.get("normalize_weight", False)
    assert ("bias='decay'" in told) == (options.get("bias") == "decay")
    changes = {difference.what: difference.change for difference in report.equivalence.differences}
    assert all(change > 0 for what, change in changes.items() if what != "bias='decay'"), changes
    assert changes.get("bias='decay'", 0.0) == 0.0  # to be decayed: still there
    assert report.biases if options.get("bias") else not report.biases


def test_each_difference_is_measured_alone():
    """Against conversions in which nothing but this one option is set."""
    network, images = make("resnet, basic blocks")
    report = verify(network, bcosify(network), images)
    exact = dict(b=1, bias="keep", pool="keep", logit_bias=None)
    alone = {
        "b=2": exact | {"b": 2},
        "bias='remove'": exact | {"bias": "remove"},
        "average pooling": exact | {"pool": "average"},
        f"logit bias {-math.log(4):.4g}": exact | {"logit_bias": -math.log(4)},
    }
    assert report.equivalence.differs_by == list(alone)
    with torch.no_grad():
        expected = network.eval()(normalized(images))
        for difference in report.equivalence.differences:
            got = bcosify(network, **alone[difference.what])(images)
            change = float(((got - expected).norm(dim=1) / expected.norm(dim=1)).max())
            assert difference.change == pytest.approx(change, rel=1e-6), difference
            assert difference.why


def test_the_originals_own_preprocessing_is_compared():
    network, images = make("vit")
    network, images = network.float(), images.float()
    converted = bcosify(network)
    report = verify(network, converted, images, normalized=normalized(images))
    assert report.ok and report.preprocessing.error < 1e-6 and "preprocessing:" in str(report)
    # what a library that reads images as BGR, or normalises by other numbers, would give
    for other in (normalized(images).flip(1), (images - 0.5) / 0.5):
        report = verify(network, converted, images, normalized=other)
        assert not report.ok and not report.preprocessing.ok and report.preprocessing.error > 0.1
        assert not report.equivalence.ok and report.equivalence.error_float64 < 1e-10
    assert verify(network, converted, images).preprocessing is None
    with pytest.raises(ValueError, match=r"expected normalized= to be images \(2, 3, 16, 16\), got \(1, 3, 16, 16\)"):
        verify(network, converted, images, normalized=images[:1])


def test_biases_that_came_back_are_found():
    network, images = make("vit")
    converted = bcosify(network)
    assert verify(network, converted, images).biases == []
    converted.model.heads.head.bias = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    report = verify(network, converted, images)
    assert not report.ok and report.biases == ["model.heads.head.bias"]
    assert "biases left:         model.heads.head.bias" in str(report)
    kept = verify(network, bcosify(network, bias="keep"), images)
    assert kept.ok and "model.heads.head.bias" in kept.biases and "model.encoder.ln.bias" in kept.biases


def test_float32_has_its_own_tolerance():
    network, images = make("vit")
    network, images = network.float(), images.float()
    report = verify(network, bcosify(network), images)
    assert report.ok and report.equivalence.tolerance == 1e-4 and 1e-9 < report.equivalence.error < 1e-5


def test_float32_models_are_compared_in_float64_too():
    network, images = make("resnet, basic blocks")
    report = verify(network.float(), bcosify(network.float()), images.float())
    assert report.ok
    assert report.equivalence.error_float64 < 1e-12 < 1e-9 < report.equivalence.error
    assert report.equivalence.tolerance_float64 == 1e-10
    for layer in report.layers:
        if layer.error is not None:
            assert layer.error_float64 < 1e-12 and layer.largest < 1e-4
    assert "in float64" in str(report)
    network, images = make("resnet, basic blocks")
    report = verify(network, bcosify(network), images)
    assert report.equivalence.error_float64 is None and all(layer.error_float64 is None for layer in report.layers)


def test_an_error_that_float32_hides_is_found_in_float64(monkeypatch):
    monkeypatch.setitem(rules.RULES, "torch.nn.modules.linear.Linear", wrong_linear)  # wrong by 1e-6
    network, images = make("vit")
    report = verify(network.float(), bcosify(network.float()), images.float())
    assert not report.ok and report.equivalence.error < report.equivalence.tolerance
    assert report.equivalence.error_float64 > 1e-8
    failed = [entry for entry in report.layers if not entry.ok]
    assert failed[0].name == "encoder.layers.encoder_layer_0.mlp.0"
    assert failed[0].problem.startswith("in float64: output differs at B=1")


def test_half_precision_is_verified_in_float32():
    network, images = make("vit")
    network = network.bfloat16()
    report = verify(network, bcosify(network), images.float())
    assert report.ok and report.equivalence.tolerance == 1e-4


def test_fine_tuned_weights_are_told():
    network, images = make("vit")
    converted = bcosify(network)
    with torch.no_grad():
        converted.model.heads.head.weight.mul_(1.01)
    report = verify(network, converted, images)
    assert report.ok and report.weights_changed == ["model.heads.head.weight"]
    assert "1 tensors differ" in str(report)
    converted.reset_classifier(7)
    assert verify(network, converted, images).ok


def test_both_models_are_left_as_they_were():
    network, images = make("densenet")
    network.train()
    converted = bcosify(network)
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (network, converted)]
    verify(network, converted, images)
    for model, state in zip((network, converted), states, strict=True):
        assert all(module.training for module in model.modules())
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert not any(module._forward_hooks for module in model.modules())


class Unused(nn.Module):
    """Reads its projection's weight instead of calling it, and has a layer that nobody uses."""

    def __init__(self):
        super().__init__()
        self.stem, self.projection, self.spare = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(2, 2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x).mean((2, 3))
        return self.fc(nn.functional.linear(x, self.projection.weight, self.projection.bias))


def test_converted_layers_that_are_never_called_are_errors():
    network, images = Unused().double(), torch.rand(2, 3, 6, 6, dtype=torch.float64)
    converted = bcosify(network, mean=MEAN, std=STD, head="keep")
    report = verify(network, converted, images)
    assert not report.ok
    failed = {layer.name: layer.problem for layer in report.layers if not layer.ok}
    assert failed == {
        "projection": "a converted layer that is never called",
        "spare": "a converted layer that is never called",
    }
    assert "FAILED: a converted layer that is never called" in str(report)
    assert report.never_called == ["projection", "spare"]
    assert "never called:        projection, spare" in str(report)


def test_layers_that_the_converted_model_itself_does_not_call_are_errors():
    """A block that was taken out after the conversion: the copy at B = 1 is whole."""
    network, images = make("resnet, basic blocks")
    converted = bcosify(network, mean=MEAN, std=STD)
    converted.model.layer1[0].forward = lambda x: x
    report = verify(network, converted, images)
    failed = {layer.name: layer.problem for layer in report.layers if not layer.ok}
    assert set(failed) == {f"layer1.0.{name}" for name in ("conv1", "bn1", "conv2", "bn2")} and not report.ok
    assert set(failed.values()) == {"a converted layer that the converted model never calls"}
    assert report.never_called == list(failed)


@pytest.mark.parametrize("name, layer", [("layer1.0.conv1", nn.Conv2d(8, 8, 3, padding=1, bias=False)),
                                         ("maxpool", nn.MaxPool2d(3, 2, 1))])  # fmt: skip
def test_layers_that_are_no_longer_what_they_were_converted_to_are_errors(name, layer):
    network, images = make("resnet, basic blocks")
    converted = bcosify(network, mean=MEAN, std=STD)
    before = converted.model.get_submodule(name)
    if isinstance(layer, nn.Conv2d):
        layer = nn.Conv2d(before.in_channels, before.out_channels, 3, padding=1, bias=False)
    converted.model.set_submodule(name, layer.double())
    report = verify(network, converted, images)
    failed = {entry.name: entry.problem for entry in report.layers if not entry.ok}
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    assert failed == {name: f"is {kind} in the converted model, of another type than it was made"} and not report.ok


def wrong_batch_norm(layer, options):
    """Forgets the running mean."""
    bias = layer.bias.detach().clone()
    new = rules.batch_norm2d(layer, options)
    new.bias.data = bias
    return new


def wrong_linear(layer, options):
    new = rules.linear(layer, options)
    new.weight.data = new.weight.data * (1 + 1e-6)
    return new


@pytest.mark.parametrize(
    "key, wrong, name, layer",
    [
        ("torch.nn.modules.batchnorm.BatchNorm2d", wrong_batch_norm, "resnet, basic blocks", "bn1"),
        ("torch.nn.modules.linear.Linear", wrong_linear, "vit", "encoder.layers.encoder_layer_0.mlp.0"),
    ],
    ids=["BatchNorm2d", "Linear"],
)
def test_a_wrong_rule_is_found_at_the_first_layer_it_touches(monkeypatch, key, wrong, name, layer):
    monkeypatch.setitem(rules.RULES, key, wrong)
    network, images = make(name)
    report = verify(network, bcosify(network), images)
    assert not report.ok and not report.equivalence.ok
    failed = [entry for entry in report.layers if not entry.ok]
    assert failed[0].name == layer and "output differs at B=1" in failed[0].problem
    assert failed[0].error > 1e-7


class Hidden(nn.Module):
    """Adds a constant that no layer tells."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.stem(x).mean((2, 3))) + 0.5


def test_a_constant_that_nobody_accounts_for_breaks_completeness():
    network, images = Hidden().double(), torch.rand(2, 3, 6, 6, dtype=torch.float64)
    report = verify(network, bcosify(network, mean=MEAN, std=STD, head="keep"), images)
    assert report.equivalence.ok and not report.completeness.ok and not report.ok


class OwnAttention(nn.Module):
    """Attention written with functions and two linear layers: rules convert its layers and see nothing else."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 24)
        self.out, self.fc = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        return self.fc(self.out(torch.softmax(q @ k.mT, -1) @ v).mean(1))


def test_attention_that_is_not_held_constant_is_found():
    torch.manual_seed(0)
    network, images = OwnAttention().double(), torch.rand(2, 3, 6, 6, dtype=torch.float64)
    report = verify(network, bcosify(network, mean=MEAN, std=STD, head="keep"), images)
    assert report.equivalence.ok and all(layer.ok for layer in report.layers)
    assert not report.explanation.ok and report.explanation.error > 1e-3
    assert not report.ok


@pytest.mark.parametrize(
    "name, kind",
    [("resnet, basic blocks", "BcosConv2d"), ("vit", "GELU"), ("vit", "LayerNorm"), ("convnext", "LayerNorm2d")],
)
def test_a_layer_that_forgets_explanation_mode_is_found(name, kind):
    network, images = make(name)
    converted = bcosify(network)
    module = [module for module in converted.modules() if type(module).__name__ == kind][1]
    module.set_explanation_mode = lambda activate=True: None
    report = verify(network, converted, images)
    assert report.equivalence.ok and not report.explanation.ok and not report.ok


def test_kept_layers_are_listed():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(64, 3)).double()
    images = torch.rand(1, 3, 6, 6, dtype=torch.float64)
    with pytest.warns(UserWarning, match="1 layer without a rule is kept"):
        converted = bcosify(network, mean=MEAN, std=STD, on_unknown="keep")
    report = verify(network, converted, images)
    assert report.equivalence.ok
    kept = [layer for layer in report.layers if "kept without a rule" in layer.problem]
    assert [layer.name for layer in kept] == ["1"] == report.without_rule
    # softplus(0) is not 0: it is not linear, so contributions + constant cannot be the logit
    assert not report.completeness.ok and not report.ok


def test_the_report_as_json_and_table():
    network, images = make("vit")
    report = verify(network, bcosify(network), images)
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["ok"] is True and content["equivalence"]["error"] == report.equivalence.error
    assert len(content["layers"]) == len(report.layers)
    table = str(report).splitlines()
    assert table[0].split()[:4] == ["layer", "was", "becomes", "calls"]
    assert table[1].split()[:4] == ["conv_proj", "Conv2d", "BcosConv2d", "1"]
    assert table[-1] == "verified: ok"
    report.equivalence.error = math.inf
    assert report.to_dict()["equivalence"]["error"] is None


class _Page(HTMLParser):
    """Tags that are opened and not closed, links to elsewhere, and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_as_a_page(tmp_path):
    network, images = make("convnext")
    report = verify(network.float(), bcosify(network.float()), images.float(), normalized=normalized(images).float())
    report.save(json=tmp_path / "report.json", html=tmp_path / "report.html")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    text = (tmp_path / "report.html").read_text()
    assert text == report.to_html()
    parsed = _Page()
    parsed.feed(text)
    assert parsed.open == [] and parsed.links == []
    assert "url(" not in text and "@import" not in text and "<script" not in text
    told = " ".join(parsed.text)
    for layer in report.layers:
        assert layer.name in told and (layer.error is None or f"{layer.error:.1e}" in told)
    for difference in report.equivalence.differences:
        assert difference.what in told and difference.why in told and f"{difference.change:.1e}" in told
    assert '<span class="good">passed' in text and '<span class="bad">' not in text
    assert f"{report.explanation.largest:.1e}" in told and f"{report.explanation.held['gelu']} gelu" in told


def test_the_page_shows_what_failed_and_escapes_names():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3)).double()
    images = torch.rand(1, 3, 6, 6, dtype=torch.float64)
    report = verify(network, bcosify(network, mean=MEAN, std=STD), images)
    assert '<tr class="failed">' not in report.to_html()
    report.ok, report.layers[0].ok, report.layers[0].problem = False, False, "a < b & c"
    report.layers[0].error = math.nan
    text = report.to_html()
    assert text.count('<tr class="failed">') == 1 and "a &lt; b &amp; c" in text and "a < b" not in text
    assert '<span class="error over"><i style="width:100.0%">' in text and "nan" in text
    assert "<h1>Verification of torch.nn.modules.container.Sequential: <span class=\"bad\">failed</span></h1>" in text


def test_models_that_do_not_belong_together_are_named():
    network, images = make("vit")
    converted = bcosify(network)
    other, _ = make("densenet")
    with pytest.raises(ValueError, match="expected a conversion of .*DenseNet, got one of .*VisionTransformer"):
        verify(other, converted, images)
    with pytest.raises(ValueError, match=r"model.encoder.pos_embedding \(1, 17, 12\) is \(1, 5, 12\) in a fresh one"):
        small = vit()
        small.image_size, small.encoder.pos_embedding = 8, nn.Parameter(torch.zeros(1, 5, 12))
        verify(small.double(), converted, images)
    deeper = vit()
    deeper.encoder.layers.append(copy.deepcopy(deeper.encoder.layers[-1]))
    with pytest.raises(ValueError, match=r"but model.encoder.layers.\d.* of a fresh one is not in it"):
        verify(deeper.double(), converted, images)
    with pytest.raises(TypeError, match="expected the standard model first, got BcosifiedModel"):
        verify(converted, network, images)
    with pytest.raises(TypeError, match="expected a model made by bcosify second, got VisionTransformer"):
        verify(network, network, images)


@pytest.mark.parametrize(
    "images, error, message",
    [
        (torch.rand(1, 6, 16, 16), ValueError, r"expected images \(N, 3, H, W\) in \[0, 1\], N >= 1, got \(1, 6"),
        (torch.rand(0, 3, 16, 16), ValueError, r"got \(0, 3, 16, 16\)"),
        (torch.full((1, 3, 16, 16), -1.0), ValueError, "not normalised, got values from -1 to -1"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), TypeError, "got torch.uint8"),
    ],
)
def test_wrong_images_are_named(images, error, message):
    network, _ = make("vit")
    with pytest.raises(error, match=message):
        verify(network, bcosify(network), images)


def test_images_are_normalised_for_the_original():
    network, images = make("vit")
    converted = bcosify(network, b=1, bias="keep", pool="keep", mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7))
    assert verify(network, converted, images).ok
    assert relative_error(converted(images).detach(), network(normalized(images)).detach()) > 1e-3
