"""Chains of convolution and BatchNorm in timm's and torchvision's networks: how many are one op, the same numbers."""

import copy

import pytest
import torch
from torch import nn

import bcos_kernels
from bcosification import bcosify, explain, fuse, unfuse
from bcosification.convert.blocks import fuse_blocks
from bcosification.convert.fusion_report import FusionReport
from bcosification.nn import BatchNormUncentered2d, BcosConv2d
from tests.bcosification.convert import timm_networks, torchvision_networks

# label -> how many of its BatchNorms stand behind no convolution: before the blocks' first ones, behind the pooling
TIMM = {
    "resnet": 0,
    "resnet-d": 0,
    "resnet, effective squeeze": 0,
    "resnet, blur": 0,
    "efficientnet": 0,
    "efficientnet, same padding": 0,
    "efficientnet, edge": 0,
    "mobilenetv3": 0,
    "byobnet": 0,
    "byobnet, mlp head": 1,
    "regnet": 0,
    "regnet, z": 0,
    "resnet v2": 5,
}


def parted(model):
    """The model without any fusing: with hooks on its norms, every module runs on its own."""
    model = unfuse(copy.deepcopy(model))
    for module in model.modules():
        if isinstance(module, BatchNormUncentered2d):
            module.register_forward_hook(lambda *parts: None)
    return model


def steps(model, images, monkeypatch):
    """Logits, gradients of a training step, explanations, and how often the fused op ran in one forward pass."""
    calls = []
    original = bcos_kernels.conv2d_batch_norm
    model = copy.deepcopy(model)
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(bcos_kernels, "conv2d_batch_norm", lambda *a, **k: calls.append(1) or original(*a, **k))
        logits = model.eval()(images)
    weights = explain(model, images).weights
    model.train()
    targets = torch.linspace(0, 1, logits.numel()).view_as(logits).double()
    nn.functional.binary_cross_entropy_with_logits(model(images), targets).backward()
    found = {"logits": logits, "W(x)": weights}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return found | dict(model.named_buffers()), len(calls)


@pytest.mark.parametrize("head", ["before_pool", "keep"])
@pytest.mark.parametrize("label", TIMM)
def test_timms_chains_run_as_one_op_with_the_same_numbers(label, head, monkeypatch):
    network, images = timm_networks.make(label)
    converted = bcosify(network, head=head)
    report = fuse(converted).fusion_report
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    chains = norms - TIMM[label]
    assert (len(report.chains), len(report.apart)) == (chains, TIMM[label]) and chains > 7
    modules = dict(converted.named_modules())
    assert all(isinstance(modules[conv], BcosConv2d) for conv, _ in report.chains)
    fused, calls = steps(converted, images, monkeypatch)
    apart, none = steps(parted(converted), images, monkeypatch)
    assert (calls, none) == (chains, 0) and fused.keys() == apart.keys()
    for name, expected in apart.items():
        size = max(float(expected.double().norm()), 1e-12)
        assert float((fused[name].double() - expected.double()).norm()) < 1e-8 * size, name


@pytest.mark.parametrize("label", ["resnet", "resnet-d", "efficientnet", "mobilenetv3", "regnet", "byobnet"])
def test_every_blocks_addition_is_part_of_its_last_chain(label, monkeypatch):
    network, images = timm_networks.make(label)
    skips = [module for module in network.modules() if getattr(module, "has_skip", False)]
    skips += [m for m in network.modules() if type(m).__name__ in ("BasicBlock", "Bottleneck", "BottleneckBlock")]
    assert len(skips) > 1
    residuals = []
    original = bcos_kernels.conv2d_batch_norm

    def counted(*given, **options):
        residuals.append(options["residual"] is not None)
        return original(*given, **options)

    monkeypatch.setattr(bcos_kernels, "conv2d_batch_norm", counted)
    bcosify(network)(images)
    assert sum(residuals) == len(skips)


@pytest.mark.parametrize("label", ["mobilenet v2", "efficientnet v2", "googlenet", "regnet y", "mobilenet v3"])
def test_a_report_of_torchvisions_networks_says_what_runs(label, monkeypatch):
    network, images = torchvision_networks.make(label)
    converted = bcosify(network)
    report = fuse_blocks(converted)
    assert len(report.chains) > 3
    assert steps(converted, images, monkeypatch)[1] == len(report.chains)


def test_the_report_in_words():
    report = FusionReport(chains=[("a", "b")], apart=["c", "d", "e", "f"])
    assert str(report) == "1 of 5 BatchNorms run as one op with the convolution before them; apart: c, d, e and 1 more"
    other = FusionReport(fused=[("x", "A", "B")])
    other.extend(report)
    assert (other.chains, other.apart, other.fused) == (report.chains, report.apart, [("x", "A", "B")])
