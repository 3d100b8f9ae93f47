"""LayerNorm2d against torchvision's, the peer's LayerNorm on moved channels, and the frozen affine map."""

import pytest
import torch
from bcos.modules import norms
from torchvision.models.convnext import LayerNorm2d as TorchvisionLayerNorm2d

from bcos_kernels import squares
from bcosification.nn import BcosConv2d, LayerNorm2d


def images(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("explaining", [False, True], ids=["plain", "explaining"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_against_the_peer_on_moved_channels(bias, explaining, memory_format):
    peer = norms.DetachableLayerNorm(6, bias=bias).double()
    ours = LayerNorm2d(6, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.uniform_(-1, 1)
    ours.load_state_dict(peer.state_dict())
    x = images(2, 6, 5, 4).to(memory_format=memory_format)
    direction = torch.randn_like(x)
    results = []
    for module in (ours, peer):
        module.set_explanation_mode(explaining)
        leaf = x.clone().requires_grad_()
        y = module(leaf) if module is ours else module(leaf.movedim(1, -1)).movedim(-1, 1)
        results.append((y, *torch.autograd.grad(y, (leaf, *module.parameters()), direction)))
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def test_against_torchvision_with_its_keys():
    theirs, ours = TorchvisionLayerNorm2d(6, eps=1e-6).double(), LayerNorm2d(6, eps=1e-6).double()
    for parameter in theirs.parameters():
        torch.nn.init.uniform_(parameter)
    ours.load_state_dict(theirs.state_dict())
    x = images(2, 6, 5, 4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    ours.set_explanation_mode()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_the_jacobian_by_hand():
    ours = LayerNorm2d(2, eps=0.0, elementwise_affine=False)
    ours.set_explanation_mode()
    x = torch.tensor([3.0, 7.0], dtype=torch.float64).view(1, 2, 1, 1)  # mean 5, standard deviation 2
    jacobian = torch.autograd.functional.jacobian(ours, x).view(2, 2)
    # (x - mean) / 2 with the mean not held: [1 - 1/2, -1/2] / 2; in training the gradient of ±1 is 0
    assert jacobian.tolist() == [[0.25, -0.25], [-0.25, 0.25]]
    ours.set_explanation_mode(False)
    assert torch.autograd.functional.jacobian(ours, x).abs().max() < 1e-12


def test_constant_gain_completes_the_affine_map():
    ours = LayerNorm2d(6, dtype=torch.float64)
    torch.nn.init.uniform_(ours.bias)
    ours.set_explanation_mode()
    gain = ours.constant_gain = torch.ones(2, dtype=torch.float64, requires_grad=True)
    x = images(2, 6, 5, 4).requires_grad_()
    y = ours(x)
    y[:, 3].sum().backward()
    assert torch.allclose(gain.grad, 20 * ours.bias[3].expand(2))
    assert torch.allclose((x * x.grad).sum((1, 2, 3)) + gain.grad, y[:, 3].sum((1, 2)), rtol=1e-10)
    ours.constant_gain = torch.tensor([0.0, 2.0], dtype=torch.float64)
    expected = y + torch.tensor([-1.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1) * ours.bias.view(1, 6, 1, 1)
    torch.testing.assert_close(ours(x), expected)


def test_layout_and_dtype_are_kept():
    x = images(2, 64, 3, 3).to(torch.bfloat16, memory_format=torch.channels_last)
    ours = LayerNorm2d(64, dtype=torch.bfloat16)
    plain = ours(x)
    ours.set_explanation_mode()
    for y in (plain, ours(x)):
        assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(x).float(), plain.float(), rtol=1e-2, atol=1e-2)


def test_other_shapes_are_named():
    with pytest.raises(ValueError, match=r"LayerNorm2d: expected x of shape \(N, C, H, W\), got \(6, 5, 4\)"):
        LayerNorm2d(6)(torch.rand(6, 5, 4))


@pytest.mark.parametrize("explaining", [False, True], ids=["plain", "explaining"])
def test_compiled(explaining):
    torch.compiler.reset()
    ours = LayerNorm2d(6, dtype=torch.float64)
    torch.nn.init.uniform_(ours.weight)
    ours.set_explanation_mode(explaining)
    x = images(2, 6, 5, 4).to(memory_format=torch.channels_last).requires_grad_()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    got, expected = (torch.autograd.grad(f(x).pow(3).sum(), (x, *ours.parameters())) for f in (compiled, ours))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_convolution_behind_it_takes_its_norms():
    ours, x = LayerNorm2d(8), images(2, 8, 6, 6).float().to(memory_format=torch.channels_last)
    layer = BcosConv2d(8, 5, 2, stride=2)
    y = ours(x)
    assert squares.squares_of(y, squares.CHANNELS) is not None
    torch.testing.assert_close(layer(y), layer(y.clone(memory_format=torch.channels_last)), rtol=1e-5, atol=1e-6)
