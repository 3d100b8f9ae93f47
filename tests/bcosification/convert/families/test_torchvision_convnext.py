"""ConvNeXt: what each layer becomes, both places of the head, and what else a converted model has to go through."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torchvision.models import convnext_tiny
from torchvision.models.convnext import CNBlock, CNBlockConfig, ConvNeXt

from bcosification import bcosify, explain, fuse, load, reset_head, unfuse, verify
from bcosification import nn as bnn
from bcosification.convert.conversion import describe
from bcosification.convert.families import family_of
from bcosification.convert.families.torchvision_convnext import TorchvisionConvNeXt
from bcosification.convert.frozen_replay import frozen_replay
from bcosification.explanation.attribution import grad_cam
from tests.bcosification.convert.standard_networks import make, normalized, relative_error

EXACT = {"b": 1, "bias": "keep", "pool": "keep"}


def test_every_layer_becomes_what_it_should():
    network, _ = make("convnext")
    converted = bcosify(network)
    assert isinstance(converted.model, ConvNeXt) and converted.config["family"] == "torchvision_convnext"
    stem, norm = converted.model.features[0]
    assert (type(stem), stem.in_channels, stem.kernel_size, stem.stride) == (bnn.BcosConv2d, 6, (4, 4), (4, 4))
    weight = network.features[0][0].weight
    assert torch.equal(stem.weight, torch.cat([weight, -weight], 1) / 2)
    assert type(norm) is bnn.LayerNorm2d and norm.eps == 1e-6
    block = converted.model.features[1][0]
    assert type(block) is CNBlock
    assert [type(layer).__name__ for layer in block.block] == [
        "BcosConv2d", "Permute", "LayerNorm", "BcosLinear", "GELU", "BcosLinear", "Permute",
    ]  # fmt: skip
    assert all(type(block.block[i]) is kind for i, kind in ((2, bnn.LayerNorm), (4, bnn.GELU)))
    depthwise = block.block[0]
    assert (depthwise.kernel_size, depthwise.padding, depthwise.groups) == ((7, 7), (3, 3), 8)
    assert torch.equal(block.layer_scale, network.features[1][0].layer_scale)
    assert [type(layer) for layer in converted.model.features[2]] == [bnn.LayerNorm2d, bnn.BcosConv2d]
    assert [type(layer) for layer in converted.model.classifier] == [bnn.LayerNorm2d, nn.Flatten, bnn.BcosConv2d]
    assert [type(layer) for layer in bcosify(network, head="keep").model.classifier] == [
        bnn.LayerNorm2d, nn.Flatten, bnn.BcosLinear,
    ]  # fmt: skip
    names = {name for name in network.state_dict() if not name.endswith("bias")}
    assert set(converted.state_dict()) == {f"model.{name}" for name in names}


def test_the_head_before_pooling_normalises_and_classifies_every_position():
    network, images = make("convnext")
    converted = bcosify(network, **EXACT)
    with torch.no_grad():
        features = network.features(normalized(images))
        assert features.shape[2:] == (2, 2)
        expected = torch.stack([network.classifier(features[:, :, i, j, None, None]) for i in (0, 1) for j in (0, 1)])
        assert relative_error(converted(images), expected.mean(0)) < 1e-12
        # Not the original's function: more than a rounding error lies between the two.
        assert relative_error(converted(images), network(normalized(images))) > 1e-2
        # One position is its own mean.
        small = images[..., :8, :8]
        assert relative_error(converted(small), network(normalized(small))) < 1e-12


def test_verify_compares_with_the_head_kept_and_says_so():
    network, images = make("convnext")
    report = verify(network, bcosify(network), images)
    assert report.ok and report.equivalence.error < 1e-12
    (told,) = [text for text in report.equivalence.differs_by if "head=" in text]
    assert "mean over positions is taken after the classifier's LayerNorm" in told and told in str(report)
    assert {layer.name for layer in report.layers if "with the head kept" in layer.problem} == {
        "avgpool", "classifier.0", "classifier.1", "classifier.2",
    }  # fmt: skip
    report = verify(network, bcosify(network, head="keep"), images)
    assert report.ok and not [text for text in report.equivalence.differs_by if "head=" in text]
    assert not [layer.name for layer in report.layers if "with the head kept" in layer.problem]


def test_verify_finds_a_moved_head_that_is_never_called(monkeypatch):
    network, images = make("convnext")
    converted = bcosify(network)

    def forgets_the_norm(self, x):
        _, flatten, head = self.classifier
        return flatten(self.avgpool(head(self.features(x))))

    monkeypatch.setattr(type(converted.model).__mro__[1], "forward", forgets_the_norm)
    report = verify(network, converted, images)
    (failed,) = [layer for layer in report.layers if not layer.ok]
    assert not report.ok and failed.name == "classifier.0"
    assert failed.problem == "called 0 times, in the original 1 times"


def test_a_wrong_classifier_norm_is_found(monkeypatch):
    from bcosification.convert import rules

    def wrong(layer, options):
        new = right(layer, options)
        new.eps = 0.5
        return new

    key = "torchvision.models.convnext.LayerNorm2d"
    right = rules.RULES[key]
    monkeypatch.setitem(rules.RULES, key, wrong)
    network, images = make("convnext")
    report = verify(network, bcosify(network), images)
    assert not report.ok and not report.equivalence.ok
    failed = [layer.name for layer in report.layers if not layer.ok]
    assert failed[0] == "features.0.1" and "classifier.0" in failed


@pytest.mark.parametrize("memory", ["default", "low"])
def test_fusing_and_unfusing_change_nothing(memory):
    network, images = make("convnext")
    plain = bcosify(network)
    state = {key: value.clone() for key, value in plain.state_dict().items()}

    def gradients(model):
        model.zero_grad()
        model.train()
        torch.manual_seed(3)  # stochastic depth
        model(images).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected, explained = gradients(plain), explain(plain, images)
    fused = fuse(copy.deepcopy(plain), memory=memory)
    assert not fused.fusion_report.left
    for model in (fused, unfuse(fused)):
        assert set(model.state_dict()) == set(state)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(explain(model, images).weights, explained.weights, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("head", ["before_pool", "keep"])
def test_saved_loaded_and_with_another_head(head, tmp_path):
    network, images = make("convnext")
    model = bcosify(network, head=head)
    assert reset_head(model, 3) is model
    old = model.model.features[1][0].layer_scale
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    with torch.no_grad():
        assert loaded(images).shape == (2, 3) and torch.equal(loaded(images), model(images))
    assert torch.equal(loaded.model.features[1][0].layer_scale, old)
    replay = frozen_replay(loaded, loaded.encode(images))
    explanation = explain(loaded, images)
    assert relative_error(explanation.weights, replay.gradient(explanation.targets)) < 1e-9


@pytest.mark.parametrize(
    "blocks",
    [[(4, 8, 1), (8, None, 3)], [(4, None, 1), (4, 6, 2), (6, None, 1)], [(4, 4, 2), (4, 8, 1)]],
    ids=["usual", "stages without downsampling", "downsampling last"],
)
@pytest.mark.parametrize("probability", [0.0, 0.1, 1 / 3])
def test_the_architecture_is_told_for_other_structures(blocks, probability):
    network = ConvNeXt([CNBlockConfig(*block) for block in blocks], probability, num_classes=3)
    told = describe(TorchvisionConvNeXt(), network)
    assert told is not None and told["block_setting"] == [list(block) for block in blocks]
    assert told["stochastic_depth_prob"] == pytest.approx(probability, rel=1e-12)


def test_a_network_changed_by_hand_is_not_told_wrong():
    network, _ = make("convnext")
    network.features[0][1].eps = 1e-3
    assert describe(family_of(network), network) is None


def test_other_classifiers():
    network, images = make("convnext")
    norm, flatten, linear = network.classifier
    network.classifier = nn.Sequential(norm, flatten, nn.Dropout(0.5), linear).eval()
    with torch.no_grad():
        assert torch.equal(bcosify(network)(images), bcosify(make("convnext")[0])(images))
    network.classifier = nn.Sequential(norm, flatten, nn.Linear(12, 12).double(), linear)
    assert verify(network, bcosify(network), images).ok
    network.classifier = nn.Sequential(norm, flatten, nn.Unflatten(1, (12, 1)), nn.Flatten(), linear)
    with pytest.raises(ValueError, match=r"got Unflatten\(.*\) as 'classifier.2'; head='keep' leaves it"):
        bcosify(network)
    kept = bcosify(network, **EXACT, head="keep")
    assert relative_error(kept(images).detach(), network(normalized(images)).detach()) < 1e-12
    network.classifier = nn.Flatten()
    features = bcosify(network, **EXACT)
    assert features.num_classes is None and features.config["head"] is None
    assert relative_error(features(images).detach(), network(normalized(images)).detach()) < 1e-12


def test_blocks_outside_a_convnext_convert_too():
    network, images = make("convnext")
    backbone = nn.Sequential(network.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)).double()
    converted = bcosify(backbone, **EXACT, mean=0.5, std=0.25)
    assert relative_error(converted(images).detach(), backbone((images - 0.5) / 0.25).detach()) < 1e-12


def test_copied_pickled_and_compiled():
    network, images = make("convnext")
    converted = bcosify(network)
    with torch.no_grad():
        expected = converted(images)
        for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
            assert torch.equal(other(images), expected) and type(other.model) is type(converted.model)
        compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), expected)


def test_grad_cam_finds_the_features():
    network, images = make("convnext")
    maps = grad_cam(bcosify(network).eval(), images, [0, 1])
    assert maps.shape == (2, 20, 20) and maps.isfinite().all() and (maps >= 0).all()


def test_convnext_tiny_of_full_size():
    torch.manual_seed(0)
    network = convnext_tiny(weights=None).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = network(normalized(images))
        assert relative_error(bcosify(network, **EXACT, head="keep")(images), expected) < 1e-5
    converted = bcosify(network)
    assert converted.config["architecture"] is not None and converted.num_classes == 1000
    explanation = explain(converted, images, 7)
    assert explanation.weights.shape == (1, 6, 64, 64) and float(explanation.weights.abs().max()) > 0
    total = explanation.contributions.sum((1, 2)) + explanation.constant
    torch.testing.assert_close(total, explanation.logits[:, 7], rtol=1e-4, atol=1e-4)
