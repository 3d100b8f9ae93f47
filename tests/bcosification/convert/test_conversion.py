"""bcosify: exact at B = 1, equal at B = 2 to the same conversion with the peer's layers, and what it refuses."""

import copy
import itertools
import math
import pickle
import warnings

import bcos.common
import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock, ResNet

import bcosification
from bcosification import bcosify
from bcosification import nn as bnn
from bcosification.convert.families import Family, family_of, register
from bcosification.convert.families.base import FAMILIES
from bcosification.convert.preprocessing import detect
from bcosification.nn import explanation_mode
from tests.bcosification.convert import peer_conversion as peer
from tests.bcosification.convert.standard_networks import (
    CLASSES,
    LARGER,
    MEAN,
    NETWORKS,
    STD,
    basic_resnet,
    make,
    normalized,
    randomize,
    relative_error,
    sequential,
    statistics_of,
    vit,
)

EXACT = {"b": 1, "bias": "keep", "pool": "keep"}

PEERS = {
    "resnet, basic blocks": peer.PeerResNet,
    "resnet, grouped bottlenecks": peer.PeerResNet,
    "resnet, dilated": peer.PeerResNet,
    "densenet": peer.PeerDenseNet,
    "vit": peer.PeerViT,
}


# Pooling after the classifier's LayerNorm is another function; tests/.../families/test_torchvision_convnext.py has it.
CHANGED = {("convnext", "before_pool")}


@pytest.mark.parametrize(
    "name, head",
    [case for case in itertools.product([*NETWORKS, *LARGER], ["before_pool", "keep"]) if case not in CHANGED],
)
def test_exact_at_b_1_with_biases_and_max_pooling(name, head):
    network, images = make(name)
    converted = bcosify(network, **EXACT, head=head, **statistics_of(name))
    with torch.no_grad():
        expected = network(normalized(images))
        for given in (images, torch.cat([images, 1 - images], 1)):
            assert relative_error(converted(given), expected) < 1e-12
    assert converted.config["logit_bias"] is None


@pytest.mark.parametrize("name", ["resnet, basic blocks", "vit", "sequential"])
def test_exact_without_the_inverse(name):
    network, images = make(name)
    converted = bcosify(network, **EXACT, inverse=False, **statistics_of(name))
    with torch.no_grad():
        assert relative_error(converted(images), network(normalized(images))) < 1e-12
    with pytest.raises(ValueError, match=r"with C = 3, got \(2, 6, "):
        converted(torch.cat([images, 1 - images], 1))


def test_exact_resnet18_of_full_size_in_float64_and_float32():
    torch.manual_seed(0)
    network = randomize(resnet18())
    images = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = network(normalized(images))
        assert relative_error(bcosify(network, **EXACT)(images), expected) < 1e-12
        network, images = network.float(), images.float()
        assert relative_error(bcosify(network, **EXACT)(images), network(normalized(images))) < 1e-5


@pytest.mark.parametrize("name, b", [*((name, 2.0) for name in PEERS), ("densenet", 1.5), ("vit", 1.5)])
def test_logits_and_gradients_equal_the_same_conversion_of_the_peers_layers(name, b):
    network, images = make(name)
    theirs, ours = peer.PeerNetwork(PEERS[name], network, b), bcosify(network, b=b, logit_bias=None)
    x6 = torch.cat([images, 1 - images], 1)
    logits = theirs(x6)
    assert logits.abs().min() > 1e-8  # the signal has not died out
    assert relative_error(ours(images).detach(), logits.detach()) < 1e-6

    # training gradients, of the image and of a weight at either end
    grad = torch.randn(logits.shape, dtype=torch.float64)
    first = {"densenet": "features.conv0", "vit": "conv_proj"}.get(name, "conv1")
    last = {"densenet": "classifier", "vit": "heads.head"}.get(name, "fc")
    theirs_weights = [theirs.body.net.get_submodule(layer).linear.weight for layer in (first, last)]
    ours_weights = [ours.model.get_submodule(layer).weight for layer in (first, last)]
    inputs = x6.clone().requires_grad_()
    expected = torch.autograd.grad((theirs(inputs) * grad).sum(), [inputs, *theirs_weights])
    got = torch.autograd.grad((ours(inputs) * grad).sum(), [inputs, *ours_weights])
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) < 1e-6

    # explanation gradients
    inputs = x6.clone().requires_grad_()
    with bcos.common.explanation_mode(theirs):
        (expected,) = torch.autograd.grad(theirs(inputs)[:, 2].sum(), inputs)
    with explanation_mode(ours):
        (got,) = torch.autograd.grad(ours(inputs)[:, 2].sum(), inputs)
    assert relative_error(got, expected) < 1e-6


def test_pixels_by_hand():
    layer = nn.Conv2d(1, 1, 1, bias=False)
    layer.weight.data = torch.tensor([[[[2.0]]]])
    network = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    network[3].weight.data = torch.tensor([[1.0], [-3.0]])
    converted = bcosify(network, b=2, mean=0.5, std=0.25)
    image = torch.tensor([[[[0.75, 0.25]]]])
    # z = ±1, patch (z, -z) of norm √2; first layer a = 2z, y = a|a|/√2 = ±2√2
    # head at each pixel: a = y·w, y·|y|·w|w|/|y| = y·w·|w|: ±2√2 and ∓18√2, averaged over the two pixels: 0
    logits = converted(image)
    assert logits.flatten().tolist() == pytest.approx([-math.log(1), -math.log(1)], abs=1e-6)
    one = converted(image[..., :1])
    assert one.flatten().tolist() == pytest.approx([2 * math.sqrt(2), -18 * math.sqrt(2)], rel=1e-5)
    # after the pooling instead: the mean over pixels is 0, so is the head's output
    kept = bcosify(network, b=2, mean=0.5, std=0.25, head="keep")
    assert kept(image[..., :1]).flatten().tolist() == pytest.approx([2 * math.sqrt(2), -18 * math.sqrt(2)], rel=1e-5)
    # two unlike pixels tell the two places of the head apart
    uneven = torch.tensor([[[[0.75, 0.5]]]])
    assert converted(uneven)[0, 0].item() == pytest.approx(math.sqrt(2), rel=1e-5)


def test_the_default_conversion_leaves_no_bias_and_adds_the_logit_bias():
    for name in NETWORKS:
        network, images = make(name)
        converted = bcosify(network, **statistics_of(name))
        assert not [key for key in converted.state_dict() if key.endswith("bias")]
        assert converted.logit_bias.logit_bias == pytest.approx(-math.log(CLASSES - 1))
        plain = bcosify(network, logit_bias=None, **statistics_of(name))
        with torch.no_grad():
            torch.testing.assert_close(converted(images), plain(images) - math.log(CLASSES - 1))


@pytest.mark.parametrize(
    "bias, given, expected",
    [
        ("remove", "auto", -math.log(4)),
        ("decay", "auto", -math.log(4)),
        ("keep", "auto", None),
        ("keep", 3, 3.0),
        ("remove", None, None),
        ("remove", -1.5, -1.5),
    ],
)
def test_logit_bias(bias, given, expected):
    converted = bcosify(vit(), bias=bias, logit_bias=given)
    assert converted.config["logit_bias"] == expected
    assert getattr(converted.logit_bias, "logit_bias", None) == expected


def test_biases_to_decay_are_there_and_can_be_removed():
    network, images = make("resnet, basic blocks")
    decaying, removed = bcosify(network, bias="decay"), bcosify(network)
    with torch.no_grad():
        assert not torch.allclose(decaying(images), removed(images))
        names = decaying.remove_biases()
        assert "model.bn1.bias" in names and "model.fc.bias" in names
        torch.testing.assert_close(decaying(images), removed(images))
    assert decaying.config["options"]["bias"] == "remove"


def test_head_before_pooling_keeps_its_name_and_weight():
    network = basic_resnet()
    converted = bcosify(network)
    head = converted.model.fc
    assert type(head) is bnn.BcosConv2d
    assert torch.equal(head.weight, network.fc.weight[:, :, None, None])
    assert bcosify(network, head="keep").model.fc.weight.shape == network.fc.weight.shape
    assert isinstance(converted.model, ResNet)


def test_b_cos_v2_flavour():
    network, images = make("densenet")
    converted = bcosify(network, activation="remove", normalize_weight=True, normalize_input=False)
    assert not [m for m in converted.modules() if isinstance(m, (nn.ReLU, nn.GELU, bnn.Normalize))]
    layers = [m for m in converted.modules() if isinstance(m, bnn.BcosConv2d)]
    assert len(layers) == 17 and all(layer.normalize_weight for layer in layers)
    with torch.no_grad():
        before = converted(images)
        layers[3].weight.mul_(3)
        torch.testing.assert_close(converted(images), before)  # a normalised weight's length does not matter
        reference = converted.model(torch.cat([images, 1 - images], 1)) - math.log(CLASSES - 1)
        torch.testing.assert_close(converted(images), reference)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_model_is_left_alone_and_nothing_is_shared(name):
    network, images = make(name)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    structure, kind = repr(network), type(network)
    converted = bcosify(network, **statistics_of(name))
    with torch.no_grad():
        for tensor in [*converted.parameters(), *converted.buffers()]:
            tensor.fill_(0)
    assert repr(network) == structure and type(network) is kind
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert not {id(module) for module in network.modules()} & {id(module) for module in converted.modules()}


def test_dtype_mode_and_trainability_are_kept():
    network = basic_resnet().bfloat16().train()
    network.layer1.eval()
    network.layer2.requires_grad_(False)
    converted = bcosify(network)
    assert {p.dtype for p in converted.parameters()} == {torch.bfloat16}
    assert converted.training and converted.model.layer2.training
    assert not any(module.training for module in converted.model.layer1.modules())
    assert not any(p.requires_grad for p in converted.model.layer2.parameters())
    assert all(p.requires_grad for p in converted.model.layer3.parameters())
    assert converted.eval()(torch.rand(1, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_gradients_and_training_steps():
    network, images = make("vit")
    converted = bcosify(network).train()
    before = {name: p.detach().clone() for name, p in converted.named_parameters()}
    torch.optim.SGD(converted.parameters(), lr=0.1).zero_grad()
    converted(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in converted.parameters())
    torch.optim.SGD(converted.parameters(), lr=0.1).step()
    assert all(not torch.equal(p, before[name]) for name, p in converted.named_parameters())


def test_copies_and_pickles_of_converted_models():
    network, images = make("densenet")
    converted = bcosify(network)
    with torch.no_grad():
        for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
            assert torch.equal(other(images), converted(images))
            assert type(other.model) is type(converted.model)


def test_compiles_without_graph_breaks():
    network, images = make("sequential")
    converted = bcosify(network, mean=MEAN, std=STD)
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), converted(images))


def test_state_dict_names_follow_the_network():
    network, _ = make("resnet, basic blocks")
    names = {name for name in network.state_dict() if not name.endswith("bias")}
    assert set(bcosify(network).state_dict()) == {f"model.{name}" for name in names}


def test_a_layer_in_two_places_stays_one_layer():
    shared = nn.Conv2d(4, 4, 1)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two, self.fc = nn.Conv2d(3, 4, 1), shared, shared, nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.two(self.one(self.stem(x))).mean((2, 3)))

    network = Twice().double()
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    converted = bcosify(network, **EXACT, head="keep", mean=MEAN, std=STD)
    assert converted.model.one is converted.model.two and type(converted.model.one) is bnn.BcosConv2d
    assert relative_error(converted(images).detach(), network(normalized(images)).detach()) < 1e-12


def test_the_layer_that_reads_the_image_must_be_in_one_place():
    network = Own()
    network.other = network.stem
    with pytest.raises(ValueError, match="expected the layer that reads the image in one place, got 'stem', 'other'"):
        bcosify(network, head="keep", mean=MEAN, std=STD)


def test_one_channel_and_scalar_statistics():
    network = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)).double()
    images = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    converted = bcosify(network, **EXACT, mean=0.25, std=[0.5])
    assert relative_error(converted(images).detach(), network((images - 0.25) / 0.5).detach()) < 1e-12
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).double()
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    converted = bcosify(network, **EXACT, mean=MEAN, std=STD)
    assert relative_error(converted(images).detach(), network(normalized(images)).detach()) < 1e-12


def test_where_the_preprocessing_comes_from():
    network = sequential()
    network.pretrained_cfg = {
        "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 192, 160), "crop_pct": 0.8,
        "interpolation": "bicubic",
    }  # fmt: skip
    config = bcosify(network).config
    assert (config["mean"], config["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (config["input_size"], config["resize"], config["interpolation"]) == ([192, 160], 200, "bicubic")
    config = bcosify(network, mean=MEAN).config
    assert (config["mean"], config["std"]) == (list(MEAN), [0.4, 0.5, 0.6])
    assert config["preprocessing_origin"] == "timm pretrained_cfg; given: mean"
    config = bcosify(vit()).config
    assert (config["mean"], config["std"], config["input_size"]) == (list(MEAN), list(STD), [16, 16])


def test_statistics_are_required_where_nothing_tells_them():
    with pytest.raises(ValueError, match="expected mean= and std="):
        bcosify(sequential())
    with pytest.raises(ValueError, match="expected mean= and std=.*got mean=0.5 and std=None"):
        bcosify(sequential(), mean=0.5)
    with pytest.raises(ValueError, match=r"std > 0"):
        bcosify(sequential(), mean=0.5, std=0.0)
    with pytest.raises(ValueError, match="channel of '0', which reads 3, got 2"):
        bcosify(sequential(), mean=(0.5, 0.5), std=(0.5, 0.5))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"b": 0.5}, "expected b >= 1 and finite, got 0.5"),
        ({"b": math.nan}, "expected b >= 1 and finite, got nan"),
        ({"bias": "drop"}, "expected bias to be one of 'remove', 'keep', 'decay', got 'drop'"),
        ({"pool": "max"}, "expected pool to be one of 'average', 'keep', got 'max'"),
        ({"head": "after"}, "expected head to be one of 'before_pool', 'keep', got 'after'"),
        ({"activation": "gelu"}, "expected activation to be one of 'keep', 'remove', got 'gelu'"),
        ({"on_unknown": "skip"}, "expected on_unknown to be one of 'error', 'keep', got 'skip'"),
        ({"logit_bias": "none"}, "expected logit_bias to be 'auto', None or a number, got 'none'"),
        ({"logit_bias": math.inf}, "expected logit_bias to be finite, got inf"),
    ],
)
def test_unknown_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        bcosify(vit(), **options)


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got dict"):
        bcosify({})
    with pytest.raises(TypeError, match="expected b to be a number, got str"):
        bcosify(vit(), b="2")
    with pytest.raises(TypeError, match="expected inverse to be True or False, got 1"):
        bcosify(vit(), inverse=1)


class Odd(nn.Module):
    """Holds a parameter of its own and a layer of an unknown type."""

    def __init__(self):
        super().__init__()
        self.stem, self.scale, self.act = nn.Conv2d(3, 4, 1), nn.Parameter(torch.ones(4, 1, 1)), nn.Softsign()

    def forward(self, x):
        return self.act(self.stem(x) * self.scale)


def test_layers_without_a_rule_are_all_named():
    network = nn.Sequential(Odd(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softplus(), nn.Linear(4, 2))
    with pytest.raises(ValueError) as caught:
        bcosify(network, mean=MEAN, std=STD)
    text = str(caught.value)
    assert "got 3 without one" in text
    for part in (".Odd: it holds the parameters scale: 0\n",
                 "torch.nn.modules.activation.Softsign: no rule for this type: 0.act\n",
                 "torch.nn.modules.activation.Softplus: no rule for this type: 3\n", "on_unknown='keep'"):  # fmt: skip
        assert part in text


def test_everything_in_the_way_is_told_at_once():
    network = Own()
    network.one, network.two = nn.Softplus(), nn.Sequential(nn.Softplus())
    network.__class__ = type("Own", (Own,), {"__module__": "torchvision.models.own", "forward": Own.forward})
    with pytest.raises(ValueError) as caught:
        bcosify(network)  # torchvision's: mean and std are known
    text = str(caught.value)
    assert ".Own cannot be converted like this:\n- no family knows the forward" in text
    assert "expected head='keep'" in text and "mean=" not in text
    assert "\n  torch.nn.modules.activation.Softplus: no rule for this type: one, two.0\n" in text
    with pytest.raises(ValueError) as caught:
        bcosify(nn.Sequential(Odd(), nn.Flatten(), nn.Linear(64, 2)), std=0.5)
    text = str(caught.value)
    assert "- expected mean= and std=" in text and "got mean=None and std=0.5" in text
    assert "torch.nn.modules.activation.Softsign: no rule for this type: 0.act" in text and "on_unknown='keep'" in text


def test_torchvisions_classifiers_know_their_statistics():
    from torchvision.models import segmentation, squeezenet1_1

    network = squeezenet1_1(num_classes=3)
    config = bcosify(network, head="keep").config
    assert (config["mean"], config["std"], config["resize"]) == (list(MEAN), list(STD), 256)
    assert detect(segmentation.lraspp_mobilenet_v3_large(weights_backbone=None), None, None) is None


def test_layers_without_a_rule_can_be_kept(tmp_path):
    network = nn.Sequential(Odd(), nn.Flatten(), nn.Linear(64, 2)).double()
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match="2 layers without a rule are kept"):
        converted = bcosify(network, **EXACT, mean=MEAN, std=STD, on_unknown="keep")
    assert relative_error(converted(images).detach(), network(normalized(images)).detach()) < 1e-12
    assert [entry["name"] for entry in converted.config["kept"]] == ["0", "0.act"]
    converted.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once, not at every load
        loaded = bcosification.load(tmp_path, model=network)
    assert loaded.config["kept"] == converted.config["kept"]


@pytest.mark.parametrize(
    "wrap, expected",
    [(nn.utils.parametrizations.weight_norm, "Parametrized"), (nn.utils.spectral_norm, "hooks")],
)
def test_reparametrized_layers_have_no_rule(wrap, expected):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), wrap(nn.Linear(4, 2)))
    with pytest.raises(ValueError, match=rf"without one:\n(.*\n)*.*{expected}.*: 2(\.|\n)"):
        bcosify(network, mean=MEAN, std=STD)


def test_transformer_layers_with_a_fast_path_have_no_rule():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.TransformerEncoderLayer(4, 2))
    with pytest.raises(ValueError, match="TransformerEncoderLayer: its fast path .*: 1\n"):
        bcosify(network, mean=MEAN, std=STD)


def test_what_is_converted_already_is_refused():
    converted = bcosify(vit())
    with pytest.raises(ValueError, match="already B-cosified"):
        bcosify(converted)
    with pytest.raises(ValueError, match="submodule 'conv_proj' is bcosification.nn.conv2d.BcosConv2d, which is B-cos"):
        bcosify(converted.model)


def test_wrappers_are_refused_by_name():
    network = vit()
    with pytest.raises(TypeError, match="OptimizedModule; convert its ._orig_mod"):
        bcosify(torch.compile(network))
    with pytest.raises(TypeError, match="DataParallel; convert its .module"):
        bcosify(nn.DataParallel(network))
    with pytest.raises(TypeError, match="GraphModule; convert the model before it was traced"):
        bcosify(torch.fx.symbolic_trace(sequential()), mean=MEAN, std=STD)


def test_a_distributed_model_is_refused_by_name():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match="got DistributedDataParallel; convert its .module"):
            bcosify(nn.parallel.DistributedDataParallel(vit()))
    finally:
        torch.distributed.destroy_process_group()


def test_tied_weights_are_refused_by_name():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4))
    network[3].weight = network[2].weight
    with pytest.raises(ValueError, match="got '2.weight' and '3.weight', which are one tensor"):
        bcosify(network, mean=MEAN, std=STD)
    network[3].weight = nn.Parameter(network[2].weight.data)
    with pytest.raises(ValueError, match="got '2.weight' and '3.weight', which are one tensor"):
        bcosify(network, mean=MEAN, std=STD)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.stem(x).mean((2, 3)))


def test_heads_of_unknown_networks_are_not_moved():
    with pytest.raises(ValueError, match=r"no family knows the forward of .*\.Own.*head='keep'"):
        bcosify(Own(), mean=MEAN, std=STD)
    converted = bcosify(Own(), mean=MEAN, std=STD, head="keep")
    assert converted.config["head"] == "fc" and converted.num_classes == 2


def test_a_family_can_be_registered(monkeypatch):
    monkeypatch.setattr("bcosification.convert.families.base.FAMILIES", dict(FAMILIES))

    @register(f"{Own.__module__}.{Own.__qualname__}")
    class OwnFamily(Family):
        name, preprocessing = "own", "imagenet"

        def input_layer(self, model):
            return "stem"

        def head(self, model):
            return "fc"

        def moves_head(self, model):
            return False

    network, images = randomize(Own()), torch.rand(2, 3, 5, 5, dtype=torch.float64)
    converted = bcosify(network, **EXACT)
    assert converted.config["family"] == "own"
    assert relative_error(converted(images).detach(), network(normalized(images)).detach()) < 1e-12


def test_subclasses_count_as_their_base_only_if_they_compute_the_same():
    class Wider(ResNet):
        def __init__(self):
            super().__init__(BasicBlock, [1, 1, 1, 1], num_classes=3)

    class Different(Wider):
        def forward(self, x):
            return super().forward(x) + 1

    assert family_of(Wider()).name == "torchvision_resnet"
    assert family_of(Different()).name == "generic"
    network, images = randomize(Wider()), torch.rand(1, 3, 32, 32, dtype=torch.float64)
    converted = bcosify(network, **EXACT)
    assert relative_error(converted(images).detach(), network(normalized(images)).detach()) < 1e-12


def test_public_names():
    for name in bcosification.__all__:
        assert getattr(bcosification, name) is not None
    for name in ("bcosify", "explain", "fuse", "unfuse", "verify", "load", "reset_head", "resolve", "evaluate"):
        assert callable(getattr(bcosification, name)), name
    with pytest.raises(AttributeError, match="no attribute 'bcosifi'"):
        _ = bcosification.bcosifi


def test_layers_that_wait_for_their_first_input_are_named():
    network = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))
    with pytest.raises(ValueError, match=r"parameters are there, submodule '0' is LazyConv2d, .* call the model once"):
        bcosify(network, mean=0.5, std=0.5)
    images = torch.rand(2, 3, 8, 8)
    network.eval()(images)
    assert bcosify(network, mean=0.5, std=0.5)(images).shape == (2, 5)


@pytest.mark.parametrize("name", ["resnet10t", "test_vit"])
def test_models_without_logits_are_refused(name):
    timm = pytest.importorskip("timm")
    network = timm.create_model(name, features_only=True)
    with pytest.raises(ValueError, match="gives logits, .* got timm's Feature.*Net, .* without features_only=True"):
        bcosify(network)
