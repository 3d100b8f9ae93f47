"""timm's families: exact at B = 1, explained as the frozen replay says, saved, trained, fused, and what is refused."""

import copy
import json
import pickle

import pytest
import timm
import torch
from timm.layers import GluMlp
from torch import nn

from bcosification import bcosify, explain, fuse, load, unfuse, verify
from bcosification import nn as bnn
from bcosification.convert.conversion import describe
from bcosification.convert.families import family_of
from bcosification.convert.frozen_replay import frozen_replay
from bcosification.convert.preprocessing import Preprocessing
from bcosification.convert.rules import NoRule, Options, find_rule
from tests.bcosification.convert.standard_networks import randomize, relative_error
from tests.bcosification.convert.timm_networks import NETWORKS, VARIANTS, make

EXACT = {"b": 1, "bias": "keep", "pool": "keep"}


def normalized(converted, images):
    found = Preprocessing.from_dict(converted.config)
    mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (found.mean, found.std))
    return (images - mean) / std


@pytest.mark.parametrize("label", [*NETWORKS, *VARIANTS])
def test_exact_at_b_1(label, monkeypatch):
    network, images = make(label)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # EvoNorm's deviations are in float32 otherwise
    expected = {}
    for head in ("before_pool", "keep"):
        converted = bcosify(network, **EXACT, head=head)
        with torch.no_grad():
            expected = network(normalized(converted, images))
            error = relative_error(converted(images), expected)
        if converted.config["head_before_pool"] and family_of(network).head_move_changes(network) is not None:
            assert error > 1e-8  # else the family says so without need
        else:
            assert error < 1e-10
    assert len(expected) == 2 and float(expected.std()) > 0


@pytest.mark.parametrize("label", [*NETWORKS, *VARIANTS])
def test_explanations_are_those_of_the_frozen_network(label):
    network, images = make(label)
    # With the biases, so that whatever adds a constant has to be known as one.
    converted = bcosify(network, bias="keep" if label in NETWORKS else "remove", logit_bias=-1.5)
    explanation = explain(converted, images)
    replay = frozen_replay(converted, converted.encode(images))
    assert replay.is_affine(1e-8) and replay.recorded["scale"] > 3
    expected = replay.gradient(explanation.targets)
    assert float(expected.abs().min(1).values.max()) > 0
    torch.testing.assert_close(explanation.weights, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))
    constant = replay.constant(explanation.targets)
    assert float((explanation.constant - constant).abs().max()) < 1e-8 * float(constant.abs().max())
    total = explanation.contributions.sum((1, 2)) + explanation.constant
    logits = explanation.logits.gather(1, explanation.targets[:, None])[:, 0]
    torch.testing.assert_close(total, logits, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("label", ["resnet-d", "vit, mean", "eva, SwiGLU", "efficientnet", "swin", "convnext v2"])
def test_the_comparison_with_the_frozen_network_would_find_a_gate_that_is_not_held(label, monkeypatch):
    network, images = make(label)
    converted = bcosify(network)
    replay = frozen_replay(converted, converted.encode(images))
    forgotten = {
        "resnet-d": bnn.BcosConv2d,
        "vit, mean": bnn.QKVLinear,
        "eva, SwiGLU": bnn.HeldOutput,
        "efficientnet": bnn.ScalingGate,
        "swin": bnn.QKVLinear,
        "convnext v2": bnn.GlobalResponseNorm,
    }[label]
    right = forgotten.set_explanation_mode
    monkeypatch.setattr(forgotten, "set_explanation_mode", lambda self, activate=True: right(self, False))
    explanation = explain(converted, images)
    # A gate's own slope may be small, but not as small as what explanations may differ by.
    assert relative_error(explanation.weights, replay.gradient(explanation.targets)) > 1e-8


_VERIFIED = ["resnet", "resnet v2", "byobnet, mlp head", "vit, mean", "convnext", "mixer", "swin v2", "swin v2, cr"]
_VERIFIED += ["resnet v2, filter response", "resnet v2, EvoNorm"]  # timm computes these norms in float32


@pytest.mark.parametrize("label", _VERIFIED)
def test_verify_says_ok(label):
    network, images = make(label)
    report = verify(network, bcosify(network), images)
    assert report.ok, str(report)


@pytest.mark.parametrize("label", NETWORKS)
def test_saved_and_loaded_with_another_head(label, tmp_path):
    network, images = make(label)
    converted = bcosify(network)
    assert converted.num_classes == 5 and converted.reset_classifier(3) is converted
    with torch.no_grad():
        expected = converted(images)
    assert expected.shape == (2, 3)
    converted.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    # What private functions made has no arguments that create_model takes.
    private = label in ("efficientnet", "mobilenetv3", "mixer")
    assert (told["architecture"] is None) == private
    loaded = load(tmp_path, model=network if private else None)
    with torch.no_grad():
        assert torch.equal(loaded(images), expected)
    assert loaded.transform.preprocessing == converted.transform.preprocessing


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenetv3_large_100", "mixer_s16_224", "vit_base_mci_224"])
def test_registered_models_are_described_by_name_and_arguments(name):
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=7, drop_path_rate=0.1)
    told = describe(family_of(network), network)
    arguments = told["arguments"]
    assert told["name"].partition(".")[0] == name
    assert (arguments["num_classes"], arguments["drop_path_rate"]) == (7, 0.1)
    network.blocks[0].drop_path_rate_by_hand = 1  # an attribute of the user's own is nothing
    assert describe(family_of(network), network) == told
    first = next(module for module in network.modules() if hasattr(module, "eps"))
    first.eps = 0.25
    assert describe(family_of(network), network) is None


def test_a_vit_told_to_pool_otherwise_is_described_as_it_is():
    network = timm.create_model("vit_tiny_patch16_224", **NETWORKS["vit"][1], num_classes=5)
    network.reset_classifier(5, global_pool="avg")
    told = describe(family_of(network), network)
    assert told is None or family_of(network).build(told).global_pool == "avg"


@pytest.mark.parametrize("label", NETWORKS)
def test_a_fused_training_step(label):
    network, images = make(label)
    plain = bcosify(network)
    targets = torch.tensor([[0.0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).double()
    gradients = []
    for fused in (False, True):
        model = copy.deepcopy(plain)
        model = fuse(model) if fused else unfuse(model)
        model.train()
        torch.manual_seed(0)
        nn.functional.binary_cross_entropy_with_logits(model(images), targets).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(float(gradient.norm()) for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.isfinite(gradient).all(), name
        error = float((gradients[1][name] - gradient).norm())
        assert error < 1e-6 * float(gradient.norm()) + 1e-12 * largest, name
    model = fuse(plain.float()).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    nn.functional.binary_cross_entropy_with_logits(model(images.float()), targets.float()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    optimizer.step()
    assert any(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("label", ["resnet", "efficientnet", "byobnet"])
def test_blocks_are_fused_and_explain_the_same(label):
    network, images = make(label)
    converted = bcosify(network)
    report = fuse(unfuse(converted)).fusion_report
    assert len(report.fused) > 4
    with torch.no_grad():
        expected = converted(images)
    weights = explain(converted, images).weights
    plain = unfuse(converted)
    with torch.no_grad():
        torch.testing.assert_close(plain(images), expected, rtol=1e-10, atol=1e-14)
    size = float(weights.abs().max())
    torch.testing.assert_close(explain(plain, images).weights, weights, rtol=1e-9, atol=1e-12 * size)


def test_copied_and_pickled():
    for label in ("resnet", "swin", "eva, SwiGLU", "efficientnet", "convnext", "byobnet, attention pooling"):
        network, images = make(label)
        converted = bcosify(network)
        with torch.no_grad():
            expected = converted(images)
            for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
                assert torch.equal(other(images), expected)


def test_a_vit_of_any_image_size_explains_its_resampled_positions():
    network = timm.create_model("vit_tiny_patch16_224", **NETWORKS["vit"][1], num_classes=5, dynamic_img_size=True)
    images = torch.rand(2, 3, 20, 24, dtype=torch.float64)
    converted = bcosify(randomize(network), bias="keep")
    explanation = explain(converted, images)
    replay = frozen_replay(converted, converted.encode(images))
    assert relative_error(explanation.weights, replay.gradient(explanation.targets)) < 1e-9
    # timm resamples in float32
    assert relative_error(explanation.constant, replay.constant(explanation.targets)) < 1e-5


def test_what_layers_become():
    converted = bcosify(make("eva, SwiGLU")[0]).model
    block = converted.blocks[0]
    assert type(block.attn.proj) is bnn.BcosLinear and type(block.norm1) is bnn.LayerNorm
    assert [type(getattr(block.mlp, name)) for name in ("fc1_x", "fc1_g", "fc2")] == [
        bnn.BcosLinear, nn.Linear, bnn.BcosLinear,
    ]  # fmt: skip
    assert block.mlp.fc1_x.bias is None and block.mlp.fc1_g.bias is not None  # what makes a gate keeps its bias
    network = make("efficientnet")[0]
    converted = bcosify(network).model
    assert type(converted.classifier) is bnn.BcosConv2d and converted.conv_stem.in_channels == 6
    se = converted.blocks[0][0].se
    assert isinstance(se, bnn.ScalingGate) and type(se.conv_reduce) is nn.Conv2d and se.conv_reduce.bias is not None
    assert type(converted.blocks[0][0].bn1) is bnn.BatchNormAct2d and type(converted.bn2.act) is bnn.SiLU
    assert set(bcosify(network, bias="keep").state_dict()) == {f"model.{name}" for name in network.state_dict()}
    mixer = bcosify(make("mixer")[0]).model.blocks[0]
    assert type(mixer.mlp_tokens.fc1) is type(mixer.mlp_channels.fc2) is bnn.BcosLinear


def test_standardised_weights_are_standardised_once():
    network, _ = make("vit on resnet v2")
    conv = network.patch_embed.backbone.conv
    converted = bcosify(network).model.patch_embed.backbone.conv
    assert type(conv).__name__ == "StdConv2dSame" and type(converted) is bnn.BcosConv2dSame
    flat = conv.weight.flatten(1)
    standard = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, unbiased=False, keepdim=True) + conv.eps).sqrt()
    standard = standard.view_as(conv.weight)
    torch.testing.assert_close(converted.weight, torch.cat([standard, -standard], 1) / 2)


def test_gated_mlps_hold_their_gate():
    torch.manual_seed(0)
    for arguments in ({}, {"gate_last": False, "act_layer": nn.SiLU}, {"use_conv": True}):
        layer = GluMlp(6, 8, 4, **arguments).double()
        x = torch.randn(2, 6, 3, 3, dtype=torch.float64) if "use_conv" in arguments else torch.randn(2, 5, 6).double()
        new = find_rule(layer)(copy.deepcopy(layer), Options(b=1.0, bias="keep"))
        torch.testing.assert_close(new(x), layer(x))
        with bnn.explanation_mode(new):
            dim = 1 if "use_conv" in arguments else -1
            first, second = layer.fc1(x).chunk(2, dim)
            gate = layer.act(second if layer.gate_last else first).detach()
            expected = layer.fc2((first if layer.gate_last else second) * gate)
            inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
            got = new(inputs[0])
            first, second = layer.fc1(inputs[1]).chunk(2, dim)
            expected = layer.fc2((first if layer.gate_last else second) * gate)
            grad = torch.randn_like(expected)
            for one, other in zip(
                torch.autograd.grad(got, inputs[0], grad), torch.autograd.grad(expected, inputs[1], grad), strict=True
            ):
                torch.testing.assert_close(one, other)


def test_activations_can_go_but_gates_stay():
    network, images = make("eva, SwiGLU")
    kept, removed = bcosify(network), bcosify(network, activation="remove")
    with torch.no_grad():
        assert torch.equal(kept(images), removed(images))  # its only activations are gates
    removed = bcosify(make("efficientnet")[0], activation="remove").model
    assert type(removed.bn2.act) is nn.Identity and type(removed.blocks[0][0].se.gate) is nn.Sigmoid


@pytest.mark.parametrize("applies", [True, False])
@pytest.mark.parametrize("kind", ["EvoNorm2dS0", "EvoNorm2dS0a"])
def test_evo_norms_hold_gate_and_deviation(kind, applies):
    torch.manual_seed(0)
    layer = getattr(timm.layers.evo_norm, kind)(8, groups=2, apply_act=applies)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    new = find_rule(layer)(copy.deepcopy(layer), Options(b=1.0, bias="keep"))
    torch.testing.assert_close(new(x), layer(x))
    with bnn.explanation_mode(new):
        y = new(x)
    torch.testing.assert_close(y, layer(x))
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope * x, y - layer.bias.view(-1, 1, 1))  # nothing but x's factor and the bias


@pytest.mark.parametrize("rectifies", [True, False])
def test_the_threshold_of_a_filter_response_norm_is_a_constant(rectifies):
    from timm.layers.filter_response_norm import FilterResponseNormAct2d, FilterResponseNormTlu2d

    torch.manual_seed(0)
    for layer in (FilterResponseNormTlu2d(3, apply_act=rectifies), FilterResponseNormAct2d(3, apply_act=rectifies)):
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        x = torch.randn(2, 3, 4, 4, requires_grad=True)
        weight, bias, tau = layer.weight, layer.bias, getattr(layer, "tau", None)
        new = find_rule(layer)(copy.deepcopy(layer), Options(b=1.0, bias="keep"))
        torch.testing.assert_close(new(x), layer(x))
        scale = (weight.view(-1, 1, 1) / (x.square().mean((2, 3), keepdim=True) + layer.eps).sqrt()).detach()
        gain = torch.ones(2, requires_grad=True)
        with bnn.explanation_mode(new):
            for module in new.modules():
                module.constant_gain = gain
            y = new(x)
        torch.testing.assert_close(y, layer(x))
        least = -torch.inf if not rectifies else 0.0 if tau is None else tau.view(-1, 1, 1)
        passes = (x * scale + bias.view(-1, 1, 1) > least).float()
        direct, of_gain = torch.autograd.grad(y.sum(), [x, gain])
        torch.testing.assert_close(direct, passes * scale)
        constant = passes * bias.view(-1, 1, 1) + (0 if tau is None else (1 - passes) * tau.view(-1, 1, 1))
        torch.testing.assert_close(of_gain, constant.expand_as(x).sum((1, 2, 3)))


def test_the_threshold_of_a_filter_response_norm_goes_with_the_biases():
    network, images = make("resnet v2, filter response")
    assert "model.stem.norm1.act.bias" in bcosify(network, bias="keep").state_dict()
    converted = bcosify(network)
    assert not any(name.endswith("bias") for name in converted.state_dict())
    explanation = explain(converted, images)
    # Nothing is left that adds but the input's normalisation and the logit bias.
    weights = explanation.weights.unflatten(1, (2, 3))
    mean = torch.tensor(converted.config["mean"], dtype=torch.float64)
    mean = torch.stack([mean, 1 - mean])
    constant = -(weights.sum((-1, -2)) * mean).sum((1, 2)) + converted.config["logit_bias"]
    torch.testing.assert_close(explanation.constant, constant, rtol=1e-9, atol=1e-9)


def test_unknown_forwards_and_layers_are_refused():
    with torch.device("meta"):
        network = timm.create_model("lambda_resnet26rpt_256")
    with pytest.raises(ValueError, match="(?s)SelfAttnBlock: what its forward does .* is not known.*lambda_layer.Lamb"):
        bcosify(network, head="keep")
    with pytest.warns(UserWarning, match="without a rule are kept"):
        bcosify(network, head="keep", on_unknown="keep")
    with torch.device("meta"):
        network = timm.create_model("resnet18", global_pool="catavgmax")
    with pytest.raises(ValueError, match="(?s)pool_type='catavgmax'; head='keep' leaves it.*by a maximum has no"):
        bcosify(network)
    with torch.device("meta"):
        network = timm.create_model("vit_tiny_patch16_224", global_pool="max")
    with pytest.raises(ValueError, match="expected global_pool='avg', 'token', 'map' or '', .* got 'max'"):
        bcosify(network)
    layer = nn.ConstantPad2d(1, 0.5)
    with pytest.raises(NoRule, match="pads with 0.5"):
        find_rule(layer)(layer, Options())


def test_a_class_of_ones_own_in_a_timm_model_is_not_taken_for_timms():
    class Doubling(timm.layers.Attention):
        def forward(self, x, **masks):
            return 2 * super().forward(x, **masks)

    network, images = make("vit")
    network.blocks[0].attn.__class__ = Doubling
    converted = bcosify(network, **EXACT)  # layer by layer, its own forward runs
    with torch.no_grad():
        assert relative_error(converted(images), network(normalized(converted, images))) < 1e-10
    report = verify(network, bcosify(network), images)
    assert not report.ok and not report.explanation.ok  # nobody held its queries and keys


def test_preprocessing_of_a_model_made_for_another_size():
    network = timm.create_model("vit_tiny_patch16_224", img_size=96, embed_dim=12, depth=1, num_heads=2)
    found = bcosify(network).transform.preprocessing
    assert found.input_size == (96, 96) and found.resize == int(96 / 0.9) and found.mean == (0.5, 0.5, 0.5)
    assert bcosify(timm.create_model("resnet10t")).transform.preprocessing.input_size == (176, 176)
