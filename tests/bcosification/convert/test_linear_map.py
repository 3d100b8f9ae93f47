"""W(x) and the constant: worked out by hand, and against each other on networks of all kinds."""

import threading

import pytest
import torch
from torch import nn
from torchvision.models.convnext import LayerNorm2d

from bcosification import bcosify
from bcosification import nn as bnn
from bcosification.convert.linear_map import dynamic_linear_map
from bcosification.nn import explanation_mode
from tests.bcosification.convert.standard_networks import NETWORKS, make, statistics_of


class Flat(nn.Module):
    """images -> logits through one linear layer on pixels."""

    def __init__(self, layer, *after):
        super().__init__()
        self.normalize, self.layer, self.after = bnn.Normalize([0.5, 0.5], [0.25, 0.25]), layer, nn.Sequential(*after)

    def forward(self, x):
        return self.after(self.layer(self.normalize(x).flatten(1)))


def test_map_by_hand():
    layer = bnn.BcosLinear(2, 2, bias=True, normalize_weight=False).double()
    layer.weight.data = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    layer.bias.data = torch.tensor([1.0, 0.0], dtype=torch.float64)
    model = Flat(layer, bnn.LogitBias(-7.0)).double()
    x = torch.tensor([0.75, 0.5], dtype=torch.float64).view(1, 2, 1, 1)
    # z = (1, 0), ‖z‖ = 1, a = 3 + 1 = 4, s = |a|/‖z‖ = 4: logit 16 - 7
    # W = s·w/std = (4·3/0.25, 0) = (48, 0); constant = -s·w·mean/std + s·bias - 7 = -24 + 4 - 7
    logits, weights, constant = dynamic_linear_map(model, x, torch.tensor([0]))
    assert logits[0, 0].item() == pytest.approx(9.0, abs=1e-9)
    assert weights.flatten().tolist() == pytest.approx([48.0, 0.0], abs=1e-8)
    assert constant.item() == pytest.approx(-27.0, abs=1e-8)


def test_plain_layers_and_the_peers_constants_count():
    plain = nn.Linear(2, 2).double()
    plain.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    plain.bias.data = torch.tensor([10.0, 20.0], dtype=torch.float64)

    class LogitLayer(nn.Module):  # as the peer's
        logit_bias, logit_temperature = 0.5, 2.0

        def forward(self, x):
            return x / self.logit_temperature + self.logit_bias

    model = Flat(plain, LogitLayer()).double()
    x = torch.rand(3, 2, 1, 1, dtype=torch.float64)
    _, weights, constant = dynamic_linear_map(model, x, torch.tensor([0, 1, 0]))
    assert weights.flatten().tolist() == pytest.approx([2.0, 4.0, 6.0, 8.0, 2.0, 4.0])
    # (-W mean/std + bias)/2 + 0.5 with W mean/std = (6, 14)
    assert constant.tolist() == pytest.approx([2.5, 3.5, 2.5])


def test_kept_centred_batch_norm_counts_with_its_mean():
    norm = nn.BatchNorm2d(2, eps=0.0).double()
    norm.running_mean = torch.tensor([1.0, 2.0], dtype=torch.float64)
    norm.running_var = torch.tensor([4.0, 4.0], dtype=torch.float64)
    norm.weight.data = torch.tensor([2.0, 6.0], dtype=torch.float64)
    norm.bias.data = torch.tensor([0.5, 0.25], dtype=torch.float64)
    model = nn.Sequential(norm, nn.Flatten())
    _, weights, constant = dynamic_linear_map(model, torch.ones(2, 2, 1, 1, dtype=torch.float64), torch.tensor([0, 1]))
    assert weights.flatten(1).tolist() == [[1.0, 0.0], [0.0, 3.0]]
    assert constant.tolist() == [0.5 - 1.0, 0.25 - 6.0]


@pytest.mark.parametrize("bias", ["remove", "keep"])
@pytest.mark.parametrize("name", NETWORKS)
def test_contributions_and_constant_add_up_to_the_logit(name, bias):
    network, images = make(name)
    model = bcosify(network, bias=bias, **statistics_of(name))
    x6 = model.encode(images)
    targets = torch.tensor([1, 3])
    logits, weights, constant = dynamic_linear_map(model, x6, targets)
    with explanation_mode(model):
        inputs = x6.clone().requires_grad_()
        direct = model(inputs)
        (expected,) = torch.autograd.grad(direct.gather(1, targets[:, None]).sum(), inputs)
    torch.testing.assert_close(logits, direct.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-13)
    contributions = (x6 * weights).sum((1, 2, 3))
    assert contributions.abs().min() > 1e-6  # a network that passes nothing on would satisfy anything
    chosen = logits.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(contributions + constant, chosen, rtol=1e-10, atol=1e-10)


def test_predicted_class_is_the_default():
    network, images = make("vit")
    model = bcosify(network)
    x6 = model.encode(images)
    logits, weights, constant = dynamic_linear_map(model, x6)
    chosen = dynamic_linear_map(model, x6, logits.argmax(1))
    assert torch.equal(weights, chosen[1]) and torch.equal(constant, chosen[2])


def test_samples_do_not_depend_on_one_another():
    network, images = make("densenet")
    model = bcosify(network, bias="keep")
    x6, targets = model.encode(images), torch.tensor([0, 4])
    together = dynamic_linear_map(model, x6, targets)
    for i in range(2):
        alone = dynamic_linear_map(model, x6[i : i + 1], targets[i : i + 1])
        for got, expected in zip(alone, together, strict=True):
            torch.testing.assert_close(got[0], expected[i], rtol=1e-9, atol=1e-12)


def test_everything_is_left_as_it_was():
    network, images = make("vit")
    model = bcosify(network).train()
    model.model.encoder.ln.eval()
    modes = [module.training for module in model.modules()]
    model.logit_bias.set_explanation_mode(True)
    with torch.no_grad():
        logits, weights, constant = dynamic_linear_map(model, model.encode(images))
    assert not (logits.requires_grad or weights.requires_grad or constant.requires_grad)
    assert [module.training for module in model.modules()] == modes
    switched = [module for module in model.modules() if getattr(module, "is_in_explanation_mode", False)]
    assert switched == [model.logit_bias]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(getattr(module, "constant_gain", None) is None for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_everything_is_left_as_it_was_after_an_error():
    network, _ = make("vit")
    model = bcosify(network).train()
    with pytest.raises(ValueError, match="its own: 16 x 16.*, got 12 x 12: Wrong image height"):
        dynamic_linear_map(model, torch.rand(1, 6, 12, 12, dtype=torch.float64))
    assert all(module.training for module in model.modules())
    assert all(getattr(module, "constant_gain", None) is None for module in model.modules())
    assert not any(getattr(module, "is_in_explanation_mode", False) for module in model.modules())


def test_additive_parameters_count_inside_other_modules_too():
    network, images = make("vit")
    model = bcosify(network)
    x6 = model.encode(images)
    expected = dynamic_linear_map(model, x6)
    assert expected[2].abs().min() > 1e-3
    for got, wanted in zip(dynamic_linear_map(nn.Sequential(model, bnn.LogitBias(2.0)), x6), expected, strict=True):
        torch.testing.assert_close(got, wanted if got.dim() == 4 else wanted + 2.0)


def test_inference_mode_and_compiled_models_are_served():
    network, images = make("vit")
    model = bcosify(network)
    x6 = model.encode(images)
    expected = dynamic_linear_map(model, x6)
    with torch.inference_mode():
        got = dynamic_linear_map(torch.compile(model, backend="eager"), x6.clone())
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_concurrent_calls_do_not_disturb_each_other():
    network, images = make("vit")
    model = bcosify(network, bias="keep")
    x6 = model.encode(images)
    expected = {target: dynamic_linear_map(model, x6, torch.full((2,), target)) for target in range(4)}
    results = {}

    def work(target):
        for _ in range(5):
            results[target] = dynamic_linear_map(model, x6, torch.full((2,), target))

    threads = [threading.Thread(target=work, args=(target,)) for target in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for target, parts in expected.items():
        for one, other in zip(results[target], parts, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_bad_arguments_are_named():
    network, images = make("vit")
    model = bcosify(network)
    x6 = model.encode(images)
    with pytest.raises(TypeError, match="expected floating point images, got torch.uint8"):
        dynamic_linear_map(model, torch.zeros(1, 6, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"expected targets in \[0, 4\], got 5$"):
        dynamic_linear_map(model, x6, torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"expected targets \(2,\) or \(2, T\) of integers, got \(3,\)"):
        dynamic_linear_map(model, x6, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"expected the model to return logits \(2, classes\), got \(2, 6, 16, 16\)"):
        dynamic_linear_map(nn.Identity(), x6)


def test_the_bias_of_a_plain_layer_norm_on_channels_first_maps():
    norm = LayerNorm2d(5)
    nn.init.uniform_(norm.bias)
    model = nn.Sequential(nn.Conv2d(6, 5, 1, bias=False), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    targets = torch.tensor([1, 3])
    _, _, constant = dynamic_linear_map(model, torch.rand(2, 6, 4, 5, dtype=torch.float64), targets)
    torch.testing.assert_close(constant, norm.bias[targets].detach())
