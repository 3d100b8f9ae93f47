"""HeldOutput: the same output, without a gradient when explaining."""

import copy

import torch
from torch import nn

from bcosification.nn import HeldOutput, explanation_mode


class HeldLinear(HeldOutput, nn.Linear):
    pass


def test_the_output_is_held_in_explanation_mode_only():
    layer = HeldLinear(3, 4)
    plain = nn.Linear(3, 4)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, requires_grad=True)
    assert torch.equal(layer(x), plain(x)) and layer(x).requires_grad
    for held in (layer, copy.deepcopy(layer)):
        with explanation_mode(held):
            y = held(x)
        assert torch.equal(y, plain(x)) and not y.requires_grad
    assert layer(x).requires_grad
