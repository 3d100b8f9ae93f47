"""Norms with an activation behind them: against the two in turn, and inside fused chains."""

import pytest
import torch
from torch import nn

from bcosification import nn as bnn
from bcosification.convert.blocks import convolution_norm_activation, norm_activation

ACTS = {"relu": nn.ReLU, "none": nn.Identity, "silu": bnn.SiLU, "relu in place": lambda: nn.ReLU(inplace=True)}


def norm_and_act(act, drop=None, training=False):
    norm = bnn.BatchNormUncentered2d(4).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    norm.running_var.uniform_(0.5, 2)
    both = bnn.BatchNormAct2d(4, act=ACTS[act](), drop=drop).double()
    both.load_state_dict(norm.state_dict())
    return norm.train(training), both.train(training)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_whatever_is_fused_with_it_comes_after_its_activation(act, training, residual, activation):
    norm, both = norm_and_act(act, training=training)
    conv = bnn.BcosConv2d(3, 4, 3, padding=1).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    added = torch.randn(2, 4, 5, 5, dtype=torch.float64) if residual else None
    expected = ACTS[act]()(norm(conv(x)))
    expected = expected if added is None else expected + added
    expected = expected.relu() if activation else expected
    grad = torch.randn_like(expected)
    slope = torch.autograd.grad(expected, x, grad)[0]
    relu = nn.ReLU() if activation else None
    for call in (
        lambda: norm_activation(both, relu, conv(x), added),
        lambda: convolution_norm_activation(conv, both, relu, x, added),
        lambda: convolution_norm_activation(conv, both, relu, x, added, recompute=True),
    ):
        y = call()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], slope)


def test_a_hook_of_its_activation_is_called_and_a_dropout_runs():
    norm, both = norm_and_act("relu")
    conv, x = bnn.BcosConv2d(3, 4, 1).double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    seen = []
    both.act.register_forward_hook(lambda *parts: seen.append(parts[-1]))
    torch.testing.assert_close(convolution_norm_activation(conv, both, None, x), norm(conv(x)).relu())
    assert len(seen) == 1
    _, dropping = norm_and_act("relu", nn.Dropout(1.0), training=True)
    assert not convolution_norm_activation(conv, dropping, None, x).any()


@pytest.mark.parametrize("name, arguments", [("GroupNorm", (2, 4)), ("LayerNorm", (5,)), ("LayerNorm2d", (4,))])
def test_other_norms(name, arguments):
    norm = getattr(bnn, name)(*arguments).double()
    kind = {"GroupNorm": "GroupNormAct", "LayerNorm": "LayerNormAct", "LayerNorm2d": "LayerNormAct2d"}[name]
    both = getattr(bnn, kind)(*arguments, act=bnn.GELU()).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    both.load_state_dict(norm.state_dict())
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(both(x), nn.functional.gelu(norm(x)))


def test_the_synchronised_form_keeps_the_activation():
    _, both = norm_and_act("silu")
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected = both(x)
    model = bnn.SyncBatchNormUncentered2d.convert_sync_batchnorm(nn.Sequential(both, bnn.BatchNormUncentered2d(4)))
    assert [type(layer) for layer in model] == [bnn.SyncBatchNormAct2d, bnn.SyncBatchNormUncentered2d]
    torch.testing.assert_close(model[0](x), expected)
