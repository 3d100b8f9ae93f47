"""ConstantEmbedding: an nn.Embedding whose output counts as a constant of the explanation."""

import copy

import pytest
import torch
from torch import nn

from bcosification.nn import ConstantEmbedding, explanation_mode


def test_it_is_an_embedding():
    layer = ConstantEmbedding(7, 4, padding_idx=2)
    plain = nn.Embedding(7, 4, padding_idx=2)
    plain.load_state_dict(layer.state_dict())
    ids = torch.tensor([[0, 3, 2], [6, 6, 1]])
    for embedding in (layer, copy.deepcopy(layer)):
        y = embedding(ids)
        assert torch.equal(y, plain(ids)) and y.requires_grad
        with explanation_mode(embedding):
            assert torch.equal(embedding(ids), plain(ids))


@pytest.mark.parametrize("rows", [1, 3])
def test_its_gain_is_one_of_each_sample(rows):
    layer = ConstantEmbedding(7, 4).double()
    ids = torch.randint(7, (rows, 5), generator=torch.Generator().manual_seed(0))
    gain = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64, requires_grad=True)
    layer.constant_gain = gain
    y = layer(ids)
    expected = torch.stack([g * layer.weight[ids[min(n, rows - 1)]] for n, g in enumerate([1, 2, -3])])
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), gain)
    torch.testing.assert_close(gradient, layer.weight[ids].sum((1, 2)).expand(3), rtol=1e-12, atol=0)
    layer.constant_gain = None
    assert layer(ids).shape == (rows, 5, 4)


def test_a_gain_of_another_batch_is_an_error():
    layer = ConstantEmbedding(7, 4)
    layer.constant_gain = torch.ones(3)
    with pytest.raises(ValueError, match="ConstantEmbedding: expected constant_gain"):
        layer(torch.zeros(4, 5, dtype=torch.long))
