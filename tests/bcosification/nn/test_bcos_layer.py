"""What B-cos convolutions and linear layers share: exponent, keys, the effect of a kept bias."""

import pytest
import torch
from torch import nn

from bcosification.nn import BcosConv2d, BcosLinear


def conv(**options):
    return BcosConv2d(4, 6, 3, padding=1, dtype=torch.float64, **options)


def linear(**options):
    return BcosLinear(4, 6, dtype=torch.float64, **options)


def image():
    return torch.randn(3, 4, 5, 5, dtype=torch.float64)


def rows():
    return torch.randn(3, 7, 4, dtype=torch.float64)


LAYERS = pytest.mark.parametrize("make, sample", [(conv, image), (linear, rows)], ids=["conv2d", "linear"])


@LAYERS
def test_keys_and_view(make, sample):
    layer = make(bias=True)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert [name for name, _ in layer.named_modules()] == [""]
    assert layer.linear.weight is layer.weight
    assert layer.linear.bias is layer.bias
    with pytest.raises(AttributeError, match="weight and bias"):
        layer.linear.scale = 1
    replacement = nn.Parameter(torch.zeros_like(layer.weight))
    layer.linear.weight = replacement
    assert layer.weight is replacement


@LAYERS
@pytest.mark.parametrize("prefix", ["", "0."])
def test_loads_the_peers_keys(make, sample, prefix):
    source, target = make(bias=True), make(bias=True)
    module = target if not prefix else nn.Sequential(target)
    state = {f"{prefix}linear.{key}": value for key, value in source.state_dict().items()}
    assert module.load_state_dict(state) == ([], [])
    x = sample()
    assert torch.equal(target(x), source(x))
    assert list(state) == [f"{prefix}linear.weight", f"{prefix}linear.bias"], "the caller's dict was changed"
    state[f"{prefix}linear.other"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="Unexpected key.*linear.other"):
        module.load_state_dict(state)


@LAYERS
def test_a_tensor_exponent_is_the_general_form(make, sample):
    layer, x = make(b=1.7), sample()
    expected = layer(x)
    layer.set_b(1.7, buffer=True)
    assert list(layer.state_dict()) == ["weight"]
    assert torch.allclose(layer(x), expected, rtol=1e-12, atol=0)
    buffer = layer.b
    layer.set_b(1.2)
    assert layer.b is buffer and buffer.item() == 1.2
    layer.set_b(torch.tensor(1.3, dtype=torch.float64))
    assert layer.b is buffer and buffer.item() == 1.3
    layer.set_b(1.7, buffer=False)
    assert layer.b == 1.7 and not list(layer.buffers())
    assert torch.equal(layer(x), expected)


@LAYERS
def test_learnable_exponent(make, sample):
    layer, x = make(b=nn.Parameter(torch.tensor(1.5, dtype=torch.float64))), sample()
    assert list(layer.state_dict()) == ["b", "weight"] or set(layer.state_dict()) == {"b", "weight"}
    layer(x).sum().backward()
    step = 1e-5
    sides = []
    for value in (1.5 + step, 1.5 - step):
        other = make(b=value)
        other.load_state_dict({"weight": layer.weight.detach()})
        sides.append(other(x).sum().item())
    assert layer.b.grad.item() == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-6)
    # Below 1 it acts as 1, where the gradient stops.
    layer.set_b(0.5 + 1)  # writes into the parameter
    with torch.no_grad():
        layer.b.fill_(0.5)
    layer.b.grad = None
    y = layer(x)
    y.sum().backward()
    plain = make(b=1)
    plain.load_state_dict({"weight": layer.weight.detach()})
    assert torch.allclose(y, plain(x), rtol=1e-12)
    assert layer.b.grad.item() == 0


@LAYERS
@pytest.mark.parametrize("b", [0.99, 0, -1, float("nan"), float("inf")])
def test_exponent_below_one_is_an_error(make, sample, b):
    with pytest.raises(ValueError, match=f"expected b >= 1 and finite, got {b}"):
        make(b=b)
    layer = make()
    with pytest.raises(ValueError, match="expected b >= 1"):
        layer.set_b(b)
    assert layer.b == 2


@LAYERS
def test_wrong_exponents(make, sample):
    with pytest.raises(ValueError, match="0-dim"):
        make(b=torch.ones(2))
    with pytest.raises(TypeError, match="str"):
        make(b="two")
    with pytest.raises(ValueError, match="max_out"):
        make(max_out=0)


@LAYERS
@pytest.mark.parametrize("b", [1, 2, 1.6])
@pytest.mark.parametrize("max_out", [1, 3])
def test_constant_gain_is_the_effect_of_the_bias(make, sample, b, max_out):
    """In explanation mode y is affine, y = W x + c(gain): Σ x ⊙ ∂y/∂x + ∂y/∂gain = y for every sample."""
    layer, x = make(b=b, max_out=max_out, bias=True), sample().requires_grad_()
    layer.set_explanation_mode()
    plain = layer(x)
    layer.constant_gain = torch.ones(3, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, plain)
    direction = torch.randn_like(y)
    dx, dgain = torch.autograd.grad((y * direction).sum(), (x, layer.constant_gain))
    total = (x * dx).flatten(1).sum(1) + dgain
    assert torch.allclose(total, (y * direction).flatten(1).sum(1), rtol=1e-10)
    assert dgain.abs().min() > 0
    # And the constant itself, from the formula with the scale s = y/a.
    layer.constant_gain = None
    (dbias,) = torch.autograd.grad((layer(x) * direction).sum(), layer.bias)
    assert dgain.sum().item() == pytest.approx((dbias * layer.bias).sum().item(), rel=1e-10)


def test_constant_gain_of_one_sample_and_of_windows():
    layer = linear(bias=True)
    layer.set_explanation_mode()
    x = torch.randn(4, dtype=torch.float64)
    layer.constant_gain = torch.tensor([0.0], dtype=torch.float64)
    bias, weight = layer.bias.detach(), layer.weight.detach()
    a = x @ (weight / weight.norm(dim=1, keepdim=True)).T
    scale = (a + bias).abs() / x.norm()
    assert torch.allclose(layer(x), scale * a, rtol=1e-10)
    windows = torch.randn(6, 4, dtype=torch.float64)  # two images, three windows each
    layer.constant_gain = torch.tensor([1.0, 0.0], dtype=torch.float64)
    with_bias = layer(windows)
    layer.constant_gain = None
    assert torch.equal(with_bias[:3], layer(windows)[:3])
    assert not torch.allclose(with_bias[3:], layer(windows)[3:])
    layer.constant_gain = torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="constant_gain"):
        layer(windows)


@LAYERS
def test_zero_weight_rows_give_zero(make, sample):
    layer, x = make(), sample().requires_grad_()
    with torch.no_grad():
        layer.weight[0] = 0
    y = layer(x)
    y.square().sum().backward()
    unit = y.select(1 if y.dim() == 4 and make is conv else -1, 0)
    assert unit.abs().max() == 0
    assert layer.weight.grad[0].abs().max() == 0
    assert x.grad.isfinite().all() and layer.weight.grad.isfinite().all()
