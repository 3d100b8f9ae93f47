"""Conversion rules against values worked out by hand."""

import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import nn
from torchvision.ops.misc import SqueezeExcitation

from bcosification import nn as bnn
from bcosification.convert import rules
from bcosification.convert.rules import NoRule, Options, double_input_channels, find_rule, remove_biases, rule

KEEP = Options(b=1.0, bias="keep")


def convert(layer, options=KEEP):
    return find_rule(layer)(layer, options)


def test_batch_norm_bias_takes_over_the_running_mean():
    layer = nn.BatchNorm2d(2, eps=0.0).double().eval()
    layer.weight.data = torch.tensor([2.0, -1.0], dtype=torch.float64)
    layer.bias.data = torch.tensor([1.0, 0.5], dtype=torch.float64)
    layer.running_mean = torch.tensor([3.0, 4.0], dtype=torch.float64)
    layer.running_var = torch.tensor([4.0, 16.0], dtype=torch.float64)
    new = convert(layer)
    assert type(new) is bnn.BatchNormUncentered2d
    # bias - mean / std * weight: 1 - 3/2·2 = -2 and 0.5 + 4/4·1 = 1.5
    assert new.bias.tolist() == [-2.0, 1.5]
    assert new.weight.tolist() == [2.0, -1.0]
    assert new.running_mean.tolist() == [3.0, 4.0] and new.running_var.tolist() == [4.0, 16.0]
    x = torch.tensor([[[[6.0]], [[8.0]]]], dtype=torch.float64)
    assert new(x).flatten().tolist() == [4.0, -0.5]  # 6/2·2 - 2 and -8/4 + 1.5
    assert torch.equal(new(x), layer(x))


def test_batch_norm_without_affine_parameters_gets_a_bias_and_no_weight():
    layer = nn.BatchNorm2d(3, affine=False).double().eval()
    layer.running_mean.uniform_(1, 2)
    layer.running_var.uniform_(1, 2)
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    new = convert(layer)
    assert new.weight is None
    torch.testing.assert_close(new(x), layer(x), rtol=0, atol=1e-14)


def test_sync_batch_norm_keeps_synchronising():
    layer = nn.SyncBatchNorm(3).double().eval()
    layer.running_mean.uniform_(1, 2)
    layer.running_var.uniform_(1, 2)
    nn.init.normal_(layer.bias)
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    new = convert(layer)
    assert type(new) is bnn.SyncBatchNormUncentered2d and new.process_group is layer.process_group
    torch.testing.assert_close(new(x), layer(x), rtol=0, atol=1e-14)


def test_batch_norm_in_half_precision_computes_its_bias_in_float32():
    layer = nn.BatchNorm2d(1).eval()
    layer.running_mean.fill_(3.0)
    layer.running_var.fill_(0.3)
    expected = -3.0 / (0.3 + 1e-5) ** 0.5
    new = convert(layer.bfloat16())
    assert new.bias.dtype == torch.bfloat16
    assert new.bias.item() == pytest.approx(expected, rel=4e-3)  # half an ulp each of the variance and the result


def test_batch_norm_without_statistics_has_no_rule():
    with pytest.raises(NoRule, match="running statistics"):
        convert(nn.BatchNorm2d(3, track_running_stats=False))


def test_doubled_input_channels_read_the_image_and_its_negative():
    layer = nn.Conv2d(1, 1, (1, 2), bias=False)
    layer.weight.data = torch.tensor([[[[2.0, 6.0]]]])
    double_input_channels(layer)
    assert layer.in_channels == 2
    assert layer.weight.flatten().tolist() == [1.0, 3.0, -1.0, -3.0]
    z = torch.tensor([[[[5.0, 7.0]]]])
    assert layer(torch.cat([z, -z], 1)).item() == 2 * 5 + 6 * 7


def test_doubled_linear_input_pairs_whole_planes():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[2.0, 4.0, 6.0, 8.0]])
    double_input_channels(layer)
    assert layer.in_features == 8
    assert layer.weight.tolist() == [[1.0, 2.0, 3.0, 4.0, -1.0, -2.0, -3.0, -4.0]]


def test_doubling_a_grouped_convolution_has_no_rule():
    with pytest.raises(NoRule, match="3 groups"):
        double_input_channels(nn.Conv2d(3, 3, 1, groups=3))


def test_max_pooling_becomes_average_pooling_that_counts_its_padding():
    new = convert(nn.MaxPool2d(2, stride=2, padding=1))
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    # every window holds one pixel and three zeros of padding
    assert new(x).flatten().tolist() == [0.25, 0.5, 0.75, 1.0]


def test_max_pooling_keeps_stride_and_ceil_mode():
    x = torch.arange(25.0).view(1, 1, 5, 5)
    layer = nn.MaxPool2d(2, ceil_mode=True)
    new = convert(layer)
    assert new(x).shape == layer(x).shape == (1, 1, 3, 3)
    assert new(x)[0, 0, 0, 0].item() == (0 + 1 + 5 + 6) / 4
    assert convert(layer, Options(pool="keep")) is layer


@pytest.mark.parametrize("arguments", [{"dilation": 2}, {"return_indices": True}])
def test_max_pooling_that_averaging_cannot_replace(arguments):
    with pytest.raises(NoRule, match=next(iter(arguments))):
        convert(nn.MaxPool2d(2, **arguments))


def test_linear_computes_the_b_cos_transform_of_the_same_weight():
    layer = nn.Linear(2, 1)
    layer.weight.data = torch.tensor([[3.0, 4.0]])
    layer.bias.data = torch.tensor([5.0])
    x = torch.tensor([[0.6, 0.8]])
    assert convert(layer)(x).item() == pytest.approx(10.0)  # B = 1: w·x + bias = 5 + 5
    assert convert(layer, Options(b=2.0))(x).item() == pytest.approx(100.0)  # a·|a|/‖x‖ with a = 10
    # normalised weights: (w/5)·x + bias = 1 + 5, times itself
    assert convert(layer, Options(b=2.0, normalize_weight=True))(x).item() == pytest.approx(36.0)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=2),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect", bias=False),
        nn.Conv2d(4, 6, 1, padding_mode="circular"),
    ],
    ids=["strided", "same", "circular"],
)
def test_convolutions_keep_every_argument(layer):
    layer = layer.double()
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    new = convert(layer)
    torch.testing.assert_close(new(x), layer(x), rtol=1e-12, atol=1e-12)
    assert new.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(6), nn.LayerNorm((3, 6), elementwise_affine=False), nn.LayerNorm(6, 0.1)]
)
def test_layer_norm_is_the_same(layer):
    layer = layer.double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(convert(layer)(x), layer(x), rtol=1e-12, atol=1e-12)


def test_group_norm_is_the_same():
    layer = nn.GroupNorm(2, 6, eps=0.1).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(convert(layer)(x), layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("arguments", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 4, "vdim": 6}])
def test_attention_is_replaced_whole_and_is_the_same_at_b_1(arguments):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, **arguments).double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    query = torch.randn(3, 5, 8, dtype=torch.float64)
    key = torch.randn(3, 5, arguments.get("kdim", 8), dtype=torch.float64)
    value = torch.randn(3, 5, arguments.get("vdim", 8), dtype=torch.float64)
    new = convert(layer)
    got, expected = new(query, key, value), layer(query, key, value)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-12, atol=1e-12)
    assert type(new.out_proj) is bnn.BcosLinear
    assert set(new.state_dict()) == set(layer.state_dict())


@pytest.mark.parametrize("arguments", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_attention_with_keys_of_its_own_has_no_rule(arguments):
    with pytest.raises(NoRule, match="add_bias_kv"):
        convert(nn.MultiheadAttention(8, 2, **arguments))


def test_activations_stay_or_go():
    x = torch.tensor([-1.0, 2.0])
    removed = Options(activation="remove")
    for layer in (nn.ReLU(), nn.LeakyReLU(), nn.PReLU(), nn.GELU(), nn.GELU("tanh")):
        torch.testing.assert_close(convert(layer)(x), layer(x))
        assert torch.equal(convert(layer, removed)(x), x)


GATED = {
    nn.SiLU: bnn.SiLU,
    nn.Hardswish: bnn.Hardswish,
    nn.Mish: bnn.Mish,
    nn.ReLU6: bnn.ReLU6,
    QuickGELU: bnn.QuickGELU,
}


@pytest.mark.parametrize("kind", GATED, ids=lambda kind: kind.__name__)
def test_gated_activations_become_those_with_constant_gates(kind):
    x = torch.linspace(-9, 9, 50, dtype=torch.float64)
    new = convert(kind())
    assert type(new) is GATED[kind]
    torch.testing.assert_close(new(x), kind()(x), rtol=1e-14, atol=0)
    assert torch.equal(convert(kind(), Options(activation="remove"))(x), x)
    if kind is not QuickGELU:
        assert convert(kind(inplace=True)).inplace and not new.inplace


def test_squeeze_excitation_keeps_its_layers_and_their_biases():
    layer = SqueezeExcitation(6, 2, scale_activation=nn.Hardsigmoid)
    parts = dict(layer.named_children())
    new = convert(layer, Options())
    assert type(new) is bnn.SqueezeExcitation and dict(new.named_children()) == parts
    x = torch.randn(2, 6, 3, 3)
    assert torch.equal(new(x), layer(x))
    assert remove_biases(nn.Sequential(new, convert(nn.Conv2d(6, 2, 1)))) == ["1.bias"]
    assert new.fc1.bias is not None and new.fc2.bias is not None


def test_train_mode_and_requires_grad_are_kept():
    for layer in (nn.Linear(2, 3), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(2), nn.LayerNorm(2), nn.GELU(), nn.MaxPool2d(2)):
        for training in (True, False):
            layer.train(training)
            layer.requires_grad_(training)
            new = convert(layer)
            assert new.training is training
            assert all(parameter.requires_grad is training for parameter in new.parameters())


def test_remove_biases_names_what_it_removes():
    model = nn.Sequential(
        convert(nn.Conv2d(3, 4, 1)), convert(nn.BatchNorm2d(4)), convert(nn.Linear(4, 2, bias=False)),
        convert(nn.MultiheadAttention(4, 2)), convert(nn.LayerNorm(4)),
    )  # fmt: skip
    assert remove_biases(model) == ["0.bias", "1.bias", "3.in_proj_bias", "3.out_proj.bias", "4.bias"]
    assert not [name for name, _ in model.named_parameters() if "bias" in name]


def test_a_rule_can_be_added_by_class_or_name(monkeypatch):
    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))

    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    layer = Double()
    assert find_rule(layer) is None
    for key in (Double, rules.type_name(Double)):
        rules.RULES.pop(rules.type_name(Double), None)
        rule(key)(lambda layer, options: nn.Identity())
        assert type(convert(layer)) is nn.Identity
