"""LogitBias against the peer's LogitLayer."""

import math

import bcos.modules
import pytest
import torch

from bcosification.nn import LogitBias


@pytest.mark.parametrize("bias", [None, -2.5])
@pytest.mark.parametrize("temperature", [None, 0.5])
def test_against_the_peer(bias, temperature):
    x = torch.randn(3, 7)
    expected = bcos.modules.LogitLayer(temperature, bias)(x)
    assert torch.equal(LogitBias(bias, temperature)(x), expected)


def test_auto_is_the_prior_of_one_class():
    module = LogitBias("auto", num_classes=10)
    assert torch.sigmoid(module(torch.zeros(2, 10))).mean().item() == pytest.approx(0.1)
    assert module.logit_bias == -math.log(9)
    assert not module.state_dict()
    module.constant_gain = torch.tensor([0.0, 2.0])
    assert torch.allclose(module(torch.zeros(2, 10)), torch.tensor([[0.0], [-2 * math.log(9)]]).expand(2, 10))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(bias="auto"), "num_classes >= 2 with bias='auto', got None"),
        (dict(bias="auto", num_classes=1), "num_classes >= 2"),
        (dict(bias="prior"), "'auto', got 'prior'"),
        (dict(temperature=0), "temperature > 0, got 0"),
    ],
    ids=str,
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        LogitBias(**options)
