"""The oracle of explanations, and that it notices every single missing detach."""

import pytest
import torch
from bcos import modules as peer
from torch import nn

from bcosification import fuse
from bcosification.convert.frozen_replay import frozen_replay
from bcosification.nn import explanation_mode
from tests.bcosification import tiny_networks
from tests.bcosification.convert.b_cosification_standins import BcosifyConv2d, BcosifyLinear, MyGELU
from tests.bcosification.tiny_networks import build

TARGETS = torch.tensor([1, 4, 0])
AGREES = 1e-10  # relative to the largest weight; both sides are float64


def weights_by_autograd(model, x6, targets=TARGETS):
    x6 = x6.clone().requires_grad_()
    return torch.autograd.grad(model(x6).gather(1, targets[:, None]).sum(), x6)[0]


def error(weights, oracle):
    return float((weights - oracle).abs().max() / oracle.abs().max())


@pytest.fixture(params=tiny_networks.NETWORKS)
def network(request):
    return build(request.param)


def dynamic_modules(name):
    """Names of the modules of a network that have something to detach in eval mode."""
    for path, module in build(name).named_modules():
        kind = type(module).__name__
        fixed = kind in ("AddInverse", "Normalize", "LogitBias") or getattr(module, "running_var", None) is not None
        if hasattr(module, "set_explanation_mode") and not fixed:
            yield path


def test_the_recording_is_the_model(network):
    x6 = tiny_networks.images()
    torch.testing.assert_close(frozen_replay(network, x6).logits(), network(x6), rtol=1e-10, atol=1e-12)


def test_the_frozen_function_is_affine_and_its_gradient_is_the_explanation(network):
    x6 = tiny_networks.images()
    replay = frozen_replay(network, x6)
    assert replay.is_affine()
    gradient = replay.gradient(TARGETS)
    with explanation_mode(network):
        assert error(weights_by_autograd(network, x6), gradient) < AGREES
    # Outside explanation mode the gradient is another one: the comparison means something.
    assert error(weights_by_autograd(network, x6), gradient) > 1e-2
    # An affine function's gradient, without autograd.
    direction = torch.rand(x6.shape, generator=torch.Generator().manual_seed(2), dtype=x6.dtype)
    along = (replay.logits(x6 + direction) - replay.logits(x6)).gather(1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), along, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        (gradient * x6).sum((1, 2, 3)) + replay.constant(TARGETS), network(x6).gather(1, TARGETS[:, None])[:, 0]
    )


@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name in tiny_networks.NETWORKS for path in dynamic_modules(name)]
)
def test_one_missing_detach_is_noticed(name, path):
    network, x6 = build(name), tiny_networks.images()
    oracle = frozen_replay(network, x6).gradient(TARGETS)
    with explanation_mode(network):
        network.get_submodule(path).detach = False
        assert error(weights_by_autograd(network, x6), oracle) > 1e-5


@pytest.mark.parametrize(
    "layer",
    [
        nn.SiLU(True),
        nn.Hardswish(),
        nn.Mish(),
        nn.ReLU6(True),
        nn.Hardtanh(-2),
        nn.LeakyReLU(0.2),
        nn.PReLU(6, 0.1),
        nn.GELU("tanh"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_plain_activations_are_frozen_as_a_factor(layer):
    model, x6 = nn.Sequential(layer, nn.Flatten()).double(), 8 * tiny_networks.images() - 4
    x6[:, :, :2] = 0  # where a factor y / x could not be computed
    replay = frozen_replay(model, x6)
    assert replay.is_affine() and replay.constant([0, 0, 0]).abs().max() == 0
    with torch.no_grad():
        torch.testing.assert_close(replay.logits(2 * x6), 2 * model(x6.clone()), rtol=1e-12, atol=1e-14)


def test_every_kind_of_value_was_recorded():
    kinds = [set(frozen_replay(build(name), tiny_networks.images()).recorded) for name in tiny_networks.NETWORKS]
    assert set.union(*kinds) == {"scale", "max_out", "relu", "gelu", "gate", "variance", "attention", "pooling"}


def test_shared_modules_are_recorded_per_call():
    # One ReLU, called twice.
    assert frozen_replay(build("peer_convnet"), tiny_networks.images()).recorded["relu"] == 2


def test_the_model_is_left_alone(network):
    network.train()
    x6 = tiny_networks.images()
    forwards = {path: module.forward for path, module in network.named_modules()}
    state = {key: value.clone() for key, value in network.state_dict().items()}
    with explanation_mode(network):
        assert frozen_replay(network, x6).is_affine()  # the copy is not in explanation mode, nor in training mode
        assert all(m.is_in_explanation_mode for m in network.modules() if hasattr(m, "set_explanation_mode"))
    assert all(m.training for m in network.modules())
    assert {path: module.forward for path, module in network.named_modules()} == forwards
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(
    "layer",
    [nn.Sigmoid(), nn.Softplus(), nn.LocalResponseNorm(2)],
    ids=lambda layer: type(layer).__name__,
)
def test_an_unknown_dynamic_layer_is_not_passed_off_as_affine(layer):
    model = nn.Sequential(nn.Conv2d(6, 4, 1), layer, nn.Flatten(), nn.LazyLinear(3))
    model(tiny_networks.images().float())
    assert not frozen_replay(model, tiny_networks.images()).is_affine()


def test_plain_layers_are_frozen_too():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True, norm_first=True)
    model = nn.Sequential(
        nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.GroupNorm(2, 8), nn.Flatten(2)
    )
    classifier = nn.Linear(9, 3)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.block, self.classifier = model, block, classifier

        def forward(self, x):
            return self.classifier(self.block(self.model(x).mT).mT).mean(1)

    net, x6 = Net().double().eval(), tiny_networks.images()
    replay = frozen_replay(net, x6)
    torch.testing.assert_close(replay.logits(), net(x6))
    assert replay.is_affine()
    assert set(replay.recorded) == {"relu", "pooling", "variance", "gelu", "attention"}


class BCosified(nn.Module):
    """B-cosification's layers, with every kind of exponent that they know."""

    def __init__(self):
        super().__init__()
        clamped = {"clamping": True, "b": nn.Parameter(torch.tensor(1.7))}
        self.conv = nn.Sequential(
            BcosifyConv2d(6, 8, 3, linear_bias=True, **clamped),
            BcosifyConv2d(8, 8, 3, stride=2, b_loss=True, b=nn.Parameter(torch.tensor(-0.6))),
            MyGELU(),
        )
        self.linear = nn.Sequential(
            BcosifyLinear(8, 8, linear_bias=True, b=1),
            BcosifyLinear(8, 8, b=2, max_out=2),
            BcosifyLinear(8, 5, **clamped),
        )

    def forward(self, x):
        return self.linear(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("fused", [False, True])
def test_b_cosifications_layers(fused):
    torch.manual_seed(0)
    network, x6 = BCosified().double().eval(), tiny_networks.images()
    network = fuse(network) if fused else network
    replay = frozen_replay(network, x6)
    torch.testing.assert_close(replay.logits(), network(x6), rtol=1e-9, atol=1e-12)
    assert replay.is_affine() and replay.recorded == {"scale": 4, "gelu": 1, "max_out": 1}
    with explanation_mode(network):
        assert error(weights_by_autograd(network, x6), replay.gradient(TARGETS)) < AGREES
        network.conv[2].detach = False
        assert error(weights_by_autograd(network, x6), replay.gradient(TARGETS)) > 1e-5


def test_scaled_convolutions_of_the_peer():
    torch.manual_seed(0)
    with pytest.warns(DeprecationWarning):
        network = nn.Sequential(peer.BcosConv2dWithScale(6, 5, 3, scale=0.3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network, x6 = network.double(), tiny_networks.images()
    for model in (network, fuse(network)):
        replay = frozen_replay(model, x6)
        torch.testing.assert_close(replay.logits(), model(x6), rtol=1e-9, atol=1e-12)
        with explanation_mode(model):
            assert error(weights_by_autograd(model, x6), replay.gradient(TARGETS)) < AGREES


def test_a_forward_that_depends_on_values_is_refused():
    class Depends(nn.Module):
        def forward(self, x):
            return (x.relu() if x.sum() > 0 else x).flatten(1)

    replay = frozen_replay(Depends(), tiny_networks.images())
    with pytest.raises(RuntimeError, match="depends on the values"):
        replay.logits(-tiny_networks.images())


def test_other_shapes_are_refused():
    replay = frozen_replay(build("peer_convnet"), tiny_networks.images())
    with pytest.raises(ValueError, match=r"recorded shape \(3, 6, 16, 16\), got \(2, 6, 16, 16\)"):
        replay.logits(tiny_networks.images(2))
    with pytest.raises(ValueError, match="N, C, H, W"):
        frozen_replay(build("peer_convnet"), tiny_networks.images()[0])
