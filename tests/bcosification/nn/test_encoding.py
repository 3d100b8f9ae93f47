"""[x, 1 − x] and the normalisation in front of a model."""

import pytest
import torch

from bcosification.nn import AddInverse, Normalize


def test_add_inverse():
    x = torch.rand(2, 3, 4, 5)
    y = AddInverse()(x)
    assert torch.equal(y[:, :3], x) and torch.equal(y[:, 3:], 1 - x)
    assert torch.equal(AddInverse()(x[0]), y[0])
    assert torch.equal(AddInverse(dim=-1)(x)[..., 5:], 1 - x)


def test_normalize_is_per_channel_and_keeps_out_of_the_state():
    x = torch.rand(2, 2, 3, 3, dtype=torch.float64)
    module = Normalize((0.25, 0.5), (0.5, 2.0))
    y = module(x)
    assert torch.allclose(y[:, 0], (x[:, 0] - 0.25) / 0.5) and torch.allclose(y[:, 1], (x[:, 1] - 0.5) / 2)
    assert torch.equal(module(x[0]), y[0])
    assert not module.state_dict()
    assert Normalize((0.25,), (0.5,), inverse=True).mean.tolist() == [0.25, 0.75]
    assert Normalize((0.25,), (0.5,), inverse=True).std.tolist() == [0.5, 0.5]


def test_the_inverse_of_the_mean_makes_the_sum_of_both_halves_vanish():
    x = torch.rand(1, 3, 2, 2, dtype=torch.float64)
    module = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), inverse=True)
    y = module(AddInverse()(x))
    assert torch.allclose(y[:, :3], -y[:, 3:], atol=1e-6)


def test_constant_gain_scales_the_mean():
    module = Normalize((0.25,), (0.5,))
    x = torch.rand(2, 1, 2, 2)
    module.constant_gain = torch.tensor([1.0, 0.0])
    y = module(x)
    assert torch.allclose(y[0], (x[0] - 0.25) / 0.5) and torch.allclose(y[1], x[1] / 0.5)


@pytest.mark.parametrize(
    "mean, std, message",
    [((0.5,), (1.0, 1.0), "same length"), ((), (), "same length"), ((0.5,), (0.0,), "every std > 0")],
    ids=str,
)
def test_bad_arguments(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Normalize(mean, std)
    with pytest.raises(ValueError, match=r"expected x of shape \(N, 1, H, W\), got \(2, 3, 4, 4\)"):
        Normalize((0.5,), (1.0,))(torch.zeros(2, 3, 4, 4))


def test_the_inverse_has_an_explanation_mode_that_changes_nothing():
    module, x = AddInverse(), torch.rand(2, 3, 4, 4)
    expected = module(x)
    assert module.is_in_explanation_mode is False
    module.set_explanation_mode()
    assert module.is_in_explanation_mode is True and torch.equal(module(x), expected)
    module.set_explanation_mode(False)
    assert module.is_in_explanation_mode is False
