"""Explanations of converted torchvision networks, peers' networks and fused ones, against the frozen replay."""

import copy
import functools

import pytest
import torch
from bcos.models import densenet as peer_densenet
from bcos.models import resnet as peer_resnet
from bcos.modules import norms
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vision_transformer import VisionTransformer

from bcosification import bcosify, fuse
from bcosification.convert.frozen_replay import frozen_replay
from bcosification.explanation import explain
from bcosification.nn import explanation_mode

TARGETS = torch.tensor([1, 4])


def images():
    return torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def calibrated(model):
    """Norms with statistics of real activations, and affine parameters that are not 0 and 1."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, -0.3, 0.3)
            parameter.data += 0.8
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.momentum = 1.0
    with torch.no_grad():
        channels = next(p for p in model.parameters() if p.dim() == 4).shape[1]
        x = torch.rand(8, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        model.double().train()(x if channels == 3 else torch.cat([x, 1 - x], 1))
    return model.eval()


def vision_transformer():
    vit = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
    nn.init.normal_(vit.heads.head.weight)
    nn.init.normal_(vit.class_token)
    return vit


def convnext():
    network = ConvNeXt([CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], 0.1, layer_scale=0.7, num_classes=5)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    return network


PeerNorm = norms.NoBias(norms.BatchNormUncentered2d)
ORIGINALS = {
    "resnet": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5),
    "resnext": lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, groups=2, width_per_group=16),
    "densenet": lambda: DenseNet(4, (2, 2), 8, bn_size=2, num_classes=5),
    "vit": vision_transformer,
    "convnext": convnext,
}
PEERS = {
    "peer_resnet": lambda: peer_resnet.BcosResNet(
        peer_resnet.BasicBlock, [1, 1, 1], num_classes=5, inplanes=8, norm_layer=PeerNorm
    ),
    "peer_bottlenecks": lambda: peer_resnet.BcosResNet(
        peer_resnet.Bottleneck, [1, 1, 1], num_classes=5, inplanes=8, small_inputs=True
    ),
    "peer_densenet": lambda: peer_densenet.BcosDenseNet(
        growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=5, norm_layer=PeerNorm
    ),
}
OPTIONS = {
    "default": {},
    "biases and max pooling kept": {"bias": "keep", "pool": "keep"},
    "b2_normalised": {"normalize_weight": True, "activation": "remove", "normalize_input": False},
    "general b, head kept": {"b": 1.5, "head": "keep"},
}
CASES = [
    *(f"{name}: {options}" for name in ("resnet", "densenet", "vit", "convnext") for options in OPTIONS),
    "resnext: default",
    *(f"{name}{fused}" for name in PEERS for fused in ("", ", fused")),
]
EVERY_KIND = ["resnet: default", "densenet: default", "vit: default", "convnext: default", "peer_resnet, fused"]


@functools.cache
def _build(case):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if ":" in case:
            name, options = case.split(": ")
            return bcosify(calibrated(ORIGINALS[name]()), **OPTIONS[options])
        model = calibrated(PEERS[case.removesuffix(", fused")]())
        return fuse(model) if case.endswith("fused") else model


def build(case):
    return copy.deepcopy(_build(case))


def error(got, expected):
    return float((got - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("case", CASES)
def test_weights_and_constant(case):
    model, x = build(case), images()
    explanation = explain(model, x, TARGETS)
    replay = frozen_replay(model, explanation.images)
    assert replay.is_affine()
    assert error(replay.logits(), model(explanation.images)) < 1e-9
    assert error(explanation.weights, replay.gradient(TARGETS)) < 1e-9
    constant = replay.constant(TARGETS)
    assert float((explanation.constant - constant).abs().max()) < 1e-9 * (1 + float(constant.abs().max()))


@pytest.mark.parametrize("case", EVERY_KIND)
def test_in_float32(case):
    """What a user gets: float32, through whatever backend is the fastest."""
    model = build(case).float()
    explanation = explain(model, images().float(), TARGETS)
    replay = frozen_replay(model, explanation.images)
    assert error(explanation.weights, replay.gradient(TARGETS)) < 1e-3
    torch.testing.assert_close(explanation.constant.double(), replay.constant(TARGETS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", EVERY_KIND)
def test_every_missing_detach_is_noticed(case):
    model, x = build(case), images()
    x6 = torch.cat([x, 1 - x], 1)
    oracle = frozen_replay(model, x6).gradient(TARGETS)
    tried = set()
    for path, module in model.named_modules():
        kind = type(module).__name__
        fixed = ("AddInverse", "Normalize", "LogitBias", "BatchNormUncentered2d")
        if kind in fixed or not hasattr(module, "set_explanation_mode"):
            continue
        with explanation_mode(model):
            module.detach = False
            leaf = x6.clone().requires_grad_()
            weights = torch.autograd.grad(model(leaf).gather(1, TARGETS[:, None]).sum(), leaf)[0]
        assert error(weights, oracle) > 1e-5, f"{path} ({kind}) without its detach went unnoticed"
        tried.add(kind)
    expected = {
        "resnet: default": {"BcosConv2d"},
        "densenet: default": {"BcosConv2d"},
        "convnext: default": {"BcosConv2d", "BcosLinear", "LayerNorm", "LayerNorm2d", "GELU"},
        "vit: default": {"BcosConv2d", "BcosLinear", "LayerNorm", "MultiheadAttention", "GELU"},
        "peer_resnet, fused": {"PeerBcosConv2d"},
    }
    assert tried == expected[case]


def test_images_of_a_wrapper_without_inverse():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = bcosify(calibrated(ORIGINALS["resnet"]()), inverse=False)
    explanation = explain(model, images(), TARGETS)
    assert explanation.weights.shape == (2, 3, 32, 32)
    replay = frozen_replay(model, images())
    assert error(explanation.weights, replay.gradient(TARGETS)) < 1e-9
    torch.testing.assert_close(explanation.constant, replay.constant(TARGETS))
    with pytest.raises(ValueError, match=r"\(6, H, W\), got \(3, 32, 32\)"):
        explanation.image(0)
    assert explanation.contribution_map(0).shape == (32, 32, 4)


def test_fusing_does_not_change_explanations():
    plain, fused = (explain(build(f"peer_resnet{suffix}"), images()) for suffix in ("", ", fused"))
    assert error(fused.weights, plain.weights) < 1e-9
    torch.testing.assert_close(fused.constant, plain.constant)
