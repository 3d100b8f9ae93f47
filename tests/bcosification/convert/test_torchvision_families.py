"""Every family of torchvision's classifiers: exact at B = 1, explained exactly, saved, trained, given another head."""

import copy
import pickle
import warnings

import pytest
import torch
import torchvision
from torch import nn

from bcosification import bcosify, explain, fuse, load, reset_head, verify
from bcosification import nn as bnn
from bcosification.convert.conversion import describe
from bcosification.convert.families import FAMILIES, family_of
from bcosification.convert.frozen_replay import frozen_replay
from bcosification.convert.linear_map import dynamic_linear_map
from bcosification.nn import explanation_mode
from bcosification.nn.modes import constant_modules
from tests.bcosification.convert.standard_networks import CLASSES, normalized, relative_error
from tests.bcosification.convert.torchvision_networks import BY_CLASS, NETWORKS, make

EXACT = {"b": 1, "bias": "keep", "pool": "keep"}

# The classifiers of these have an activation or a LayerNorm in front of the head.
CHANGED = {"mobilenet v3", "maxvit"}

# nothing in them is dynamic in eval mode
FIXED = (bnn.AddInverse, bnn.BatchNormUncentered2d, bnn.Normalize, bnn.LogitBias)


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_at_b_1_with_biases_and_max_pooling(name):
    network, images = make(name)
    with torch.no_grad():
        expected = network(normalized(images))
        kept, moved = (bcosify(network, **EXACT, head=head) for head in ("keep", "before_pool"))
        assert relative_error(kept(images), expected) < 1e-10
        assert relative_error(kept(torch.cat([images, 1 - images], 1)), expected) < 1e-10
        if name in CHANGED:
            assert family_of(network).head_move_changes(network) is not None
            assert relative_error(moved(images), expected) > 1e-3
        else:
            assert relative_error(moved(images), expected) < 1e-10


@pytest.mark.parametrize("bias", ["remove", "keep"])
@pytest.mark.parametrize("name", NETWORKS)
def test_explanations_equal_the_oracle(name, bias):
    network, images = make(name)
    model = bcosify(network, bias=bias)
    x6 = model.encode(images)
    targets = model(x6).argmax(1)
    replay = frozen_replay(model, x6)
    assert replay.is_affine()
    oracle = replay.gradient(targets)
    assert oracle.abs().amax((1, 2, 3)).min() > 1e-6  # the signal has not died out
    logits, weights, constant = dynamic_linear_map(model, x6, targets)
    largest = oracle.abs().amax((1, 2, 3), keepdim=True)
    assert ((weights - oracle).abs() / largest).max() < 1e-6
    torch.testing.assert_close(constant, replay.constant(targets), rtol=1e-8, atol=1e-10)
    chosen = logits.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close((weights * x6).sum((1, 2, 3)) + constant, chosen, rtol=1e-9, atol=1e-10)
    plain = x6.clone().requires_grad_()
    (other,) = torch.autograd.grad(model(plain).gather(1, targets[:, None]).sum(), plain)
    assert relative_error(other, oracle) > 1e-2  # without explanation mode it is another gradient


@pytest.mark.parametrize("name", NETWORKS)
def test_a_missing_detach_of_any_kind_is_noticed(name):
    network, images = make(name)
    model = bcosify(network)
    x6 = model.encode(images)
    targets = model(x6).argmax(1)
    oracle = frozen_replay(model, x6).gradient(targets)
    kinds = {}
    for path, module in model.named_modules():
        if isinstance(module, bnn.DetachableModule) and not isinstance(module, FIXED):
            kinds[type(module)] = path  # the last one of each kind
    assert bnn.BcosConv2d in kinds
    for path in kinds.values():
        with explanation_mode(model):
            model.get_submodule(path).detach = False
            x = x6.clone().requires_grad_()
            (weights,) = torch.autograd.grad(model(x).gather(1, targets[:, None]).sum(), x)
        assert relative_error(weights, oracle) > 1e-5, path


@pytest.mark.parametrize("name", NETWORKS)
def test_verified_saved_loaded_and_copied(name, tmp_path):
    network, images = make(name)
    model = bcosify(network)
    report = verify(network, model, images[:1])
    assert report.ok, str(report)
    assert not [layer for layer in report.layers if layer.calls == 0 and layer.was != layer.becomes]
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, model=make(name, seed=1)[0] if name in BY_CLASS else None)
    with torch.no_grad():
        expected = model(images)
        for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(images), expected)
    assert loaded.config == model.config


@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step_of_fused_layers(name):
    network, images = make(name)
    model = fuse(bcosify(network)).train()
    torch.manual_seed(2)  # dropout, stochastic depth
    loss = nn.functional.binary_cross_entropy_with_logits(model(images), torch.eye(CLASSES)[:2].double())
    loss.backward()
    assert loss.isfinite()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert any(not torch.equal(parameter, before[key]) for key, parameter in model.named_parameters())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["inception v3", "swin v2", "mobilenet v3"])
def test_low_memory_gives_the_same_gradients(name):
    network, images = make(name)
    gradients = []
    for memory in ("default", "low"):
        model = fuse(bcosify(network), memory=memory).train()
        torch.manual_seed(2)
        model(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12 * float(one.abs().max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_another_head(name):
    network, images = make(name)
    model = bcosify(network)
    kind = type(model.model.get_submodule(model.config["head"]))
    assert reset_head(model, 3) is model and model.num_classes == 3
    assert type(model.model.get_submodule(model.config["head"])) is kind is bnn.BcosConv2d
    explanation = explain(model, images)
    assert explanation.logits.shape == (2, 3)
    replay = frozen_replay(model, model.encode(images))
    assert relative_error(explanation.weights, replay.gradient(explanation.targets)) < 1e-6 or (
        not explanation.weights.any() and not replay.gradient(explanation.targets).any()
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_only_gates_keep_biases(name):
    network, _ = make(name)
    model = bcosify(network, bias="decay")
    model.remove_biases()
    inside = constant_modules(model)
    for prefix, module in model.named_modules():
        if module not in inside:
            assert getattr(module, "bias", None) is None and getattr(module, "in_proj_bias", None) is None, prefix
    assert set(model.state_dict()) == set(bcosify(network).state_dict())
    squeezes = any(type(module) is bnn.SqueezeExcitation for module in model.modules())
    assert squeezes == any(key.endswith("fc1.bias") for key in model.state_dict())


@pytest.mark.parametrize("name", NETWORKS)
def test_options_reach_functions_too(name):
    network, images = make(name)
    model = bcosify(network, activation="remove", pool="average")
    assert not [m for m in model.modules() if isinstance(m, (nn.ReLU, nn.MaxPool2d, bnn.GatedActivation, bnn.GELU))
                and m not in constant_modules(model)]  # fmt: skip
    recorded = frozen_replay(model, model.encode(images[:1])).recorded
    squeezes = sum(isinstance(module, bnn.ScalingGate) for module in model.modules())
    # SwinV2 makes its position bias by a network with a ReLU, which is a constant
    makes_bias = sum(hasattr(module, "cpb_mlp") for module in model.modules())
    assert recorded["gate"] == squeezes and recorded["relu"] == makes_bias
    assert not recorded["gelu"] and not recorded["pooling"]
    kept = frozen_replay(bcosify(network, pool="keep"), model.encode(images[:1])).recorded
    assert kept["pooling"] == {
        "alexnet": 3, "vgg": 2, "vgg, batch norm": 2, "squeezenet": 3, "googlenet": 13, "inception v3": 4,
        "shufflenet v2": 1,
    }.get(name, 0)  # fmt: skip


@pytest.mark.parametrize("name", ["alexnet", "vgg, batch norm"])
def test_larger_images_are_classified_at_every_position(name):
    network, images = make(name)
    size = {"alexnet": 255, "vgg, batch norm": 36}[name]
    images = torch.rand(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        features = network.features(normalized(images))
        rows, columns = network.avgpool.output_size
        windows = features.unfold(2, rows, 1).unfold(3, columns, 1)  # (N, C, places, places, rows, columns)
        assert windows.shape[2] > 1
        each = windows.permute(2, 3, 0, 1, 4, 5).flatten(0, 1)
        expected = torch.stack([network.classifier(window.flatten(1)) for window in each]).mean(0)
        moved, kept = bcosify(network, **EXACT), bcosify(network, **EXACT, head="keep")
        assert relative_error(moved(images), expected) < 1e-10
        assert relative_error(kept(images), network(normalized(images))) < 1e-10
        assert relative_error(moved(images), kept(images)) > 1e-3
        small = torch.nn.functional.interpolate(images, scale_factor=0.5)  # a smaller map is spread, as before
        assert relative_error(moved(small), network(normalized(small))) < 1e-10
    report = verify(network, bcosify(network), images)
    assert report.ok and any("every position" in text for text in report.equivalence.differs_by)
    flat = torch.rand(1, 3, size, 8 * images.shape[-1] // 16, dtype=torch.float64)
    with torch.no_grad():  # high enough, not wide enough: spread to the width that the layers were made for
        features = network.features(normalized(flat))
        spread = nn.functional.adaptive_avg_pool2d(features, (features.shape[2], columns))
        each = spread.unfold(2, rows, 1).permute(2, 0, 1, 4, 3)
        expected = torch.stack([network.classifier(window.flatten(1)) for window in each]).mean(0)
        assert features.shape[3] < columns and relative_error(moved(flat), expected) < 1e-10


@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize("name", ["inception v3", "googlenet"])
def test_the_input_is_transformed_as_the_original_does(name, inverse):
    network, images = make(name)
    for transforms in (True, False):
        network.transform_input = transforms
        converted = bcosify(network, **EXACT, inverse=inverse)
        with torch.no_grad():
            assert relative_error(converted(images), network(normalized(images))) < 1e-10
        assert isinstance(converted.model.input_transform, bnn.Normalize) == transforms
    converted = bcosify(network).train()
    assert converted(images).shape == (2, CLASSES)  # logits alone, without auxiliary ones
    assert not [key for key in converted.state_dict() if "aux" in key.lower()]


def test_swins_windows_are_masked_where_they_were_shifted():
    network, _ = make("swin")
    attention = network.features[1][1].attn
    assert attention.shift_size == [2, 2]
    converted = bcosify(network, **EXACT).model.features[1][1].attn
    assert type(converted.qkv) is bnn.QKVLinear and type(converted.proj) is bnn.BcosLinear
    with torch.no_grad():
        for height, width in ((8, 8), (11, 6), (4, 9), (8, 3), (2, 3)):  # padded, and windows as large as the map
            x = torch.randn(2, height, width, 8, dtype=torch.float64)
            torch.testing.assert_close(converted(x), attention(x), rtol=1e-12, atol=1e-13)


def test_swins_projections_have_to_be_plain():
    network, _ = make("swin")
    nn.utils.parametrizations.weight_norm(network.features[1][0].attn.proj)
    with pytest.raises(ValueError, match=r"its proj is not a plain nn.Linear.*: features.1.0.attn"):
        bcosify(network)


def test_swin_v2s_position_bias_stays_as_it_is():
    network, _ = make("swin v2")
    converted = bcosify(network)
    attention = converted.model.features[1][0].attn
    assert [type(layer) for layer in attention.cpb_mlp] == [nn.Linear, nn.ReLU, nn.Linear]
    assert attention.cpb_mlp[0].bias is not None and not attention.qkv.key_bias
    with torch.no_grad():
        expected = network.features[1][0].attn.get_relative_position_bias()
        assert torch.equal(attention.get_relative_position_bias(), expected)


def test_compiles_without_graph_breaks():
    network, images = make("swin v2")
    converted = bcosify(network)
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), converted(images))


def library_models():
    """(constructor's name, options): what torchvision ships, the smaller half of each family and its odd ones."""
    names = """alexnet vgg11 vgg13_bn squeezenet1_0 squeezenet1_1 googlenet inception_v3 mobilenet_v2
        mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet1_3 shufflenet_v2_x0_5 shufflenet_v2_x1_5
        efficientnet_b0 efficientnet_b3 efficientnet_b5 efficientnet_v2_s regnet_x_400mf regnet_y_400mf regnet_y_1_6gf
        swin_t swin_v2_s maxvit_t resnet18 resnext50_32x4d densenet121 convnext_tiny vit_b_16""".split()
    rest = [
        ("googlenet", {"aux_logits": False, "transform_input": True}),
        ("mobilenet_v2", {"width_mult": 1.4}),
        ("mobilenet_v2", {"width_mult": 0.35}),
        ("mobilenet_v3_large", {"dilated": True, "reduced_tail": True}),
    ]
    return [(name, {}) for name in names] + rest


@pytest.mark.parametrize("name, options", library_models(), ids=lambda value: str(value))
def test_the_librarys_own_models_are_described(name, options):
    if name in ("googlenet", "inception_v3"):
        options = {**options, "init_weights": False}
    constructor = getattr(torchvision.models, name)
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # regnet's constructor reads values
        network = constructor(weights=None, **options)
        if name == "inception_v3":
            network.fc = nn.Linear(2048, 7)  # and not the auxiliary classifier
    told = describe(family_of(network), network)
    assert told is not None
    with torch.device("meta"):
        rebuilt = family_of(network).build(told)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    assert {key: value.shape for key, value in rebuilt.state_dict().items()} == shapes
    plain = vars(network)
    for key, value in vars(rebuilt).items():
        if isinstance(value, (int, float, str, tuple, list)) and key != "training":
            assert plain[key] == value, key


def test_every_family_says_what_it_does():
    titles = {family.name: family.title for family in FAMILIES.values()}
    assert len(set(titles.values())) == len(titles)
    for family in FAMILIES.values():
        for text in (family.title, family.converts, family.keeps, family.cannot):
            assert isinstance(text, str) and len(text) < 120
        assert family.title and family.converts


def test_heads_that_were_changed_by_hand():
    network, images = make("mobilenet v2")
    network.classifier = nn.Identity()
    features = bcosify(network, **EXACT)
    assert features.num_classes is None and features.config["head"] is None
    with torch.no_grad():
        assert relative_error(features(images), network(normalized(images))) < 1e-10
    network, images = make("mobilenet v2")
    network.classifier.insert(1, nn.Linear(1280, 6).double())
    network.classifier[2] = nn.Linear(6, CLASSES).double()
    with torch.no_grad():
        assert relative_error(bcosify(network, **EXACT)(images), network(normalized(images))) < 1e-10
    network.classifier[1] = nn.Softplus()
    with pytest.raises(ValueError, match=r"got Softplus\(.*\) as 'classifier.1'; head='keep' leaves it"):
        bcosify(network)
    network, _ = make("regnet x")
    network.fc = nn.Sequential(nn.Dropout(), nn.Linear(24, 2))
    assert bcosify(network).config["head"] == "fc.1"
    network, _ = make("vgg")
    network.classifier[1] = nn.Softplus()
    with pytest.raises(ValueError, match=r"got Softplus\(.*\) as 'classifier.1'; head='keep' leaves it"):
        bcosify(network)


def test_inputs_sizes():
    for name, size in (("inception v3", (299, 299)), ("swin v2", (256, 256)), ("maxvit", (32, 32))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert tuple(bcosify(make(name)[0]).config["input_size"]) == size
