"""BcosConv2d against the peer's, and against its formula where the peer does something else."""

import copy

import bcos.modules
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bcosification
from bcosification.nn import BcosConv2d

CASES = {
    "1x1": dict(kernel_size=1),
    "3x3": dict(kernel_size=3, padding=1),
    "7x7 stride 2": dict(kernel_size=7, stride=2, padding=3),
    "oblong": dict(kernel_size=(3, 1), padding=(1, 0), stride=(1, 2)),
    "grouped": dict(kernel_size=3, padding=1, groups=2),
    "dilated": dict(kernel_size=3, padding=2, dilation=2),
    "max out": dict(kernel_size=3, padding=1, max_out=2),
    "grouped max out": dict(kernel_size=3, groups=2, max_out=3),
    "b 1": dict(kernel_size=3, b=1),
    "b 1.25": dict(kernel_size=3, padding=1, b=1.25),
    "b 3": dict(kernel_size=3, padding=1, b=3),
}


@pytest.mark.filterwarnings("ignore:dilation > 1")
@pytest.mark.parametrize("explaining", [False, True], ids=["training", "explaining"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_peer(case, explaining):
    peer = bcos.modules.BcosConv2d(4, 6, **CASES[case]).double()
    ours = BcosConv2d(4, 6, dtype=torch.float64, **CASES[case])
    ours.load_state_dict(peer.state_dict())
    peer.set_explanation_mode(explaining)
    ours.set_explanation_mode(explaining)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(mine), peer(theirs)
    direction = torch.randn_like(expected)
    dx, dw = torch.autograd.grad(y, (mine, ours.weight), direction)
    dx_peer, dw_peer = torch.autograd.grad(expected, (theirs, peer.linear.weight), direction)
    for name, a, b in (("y", y, expected), ("dx", dx, dx_peer), ("dw", dw, dw_peer)):
        assert (a - b).norm() <= 1e-11 * b.norm(), name


def test_b_cosification_form_has_no_weight_norm_and_may_have_a_bias():
    layer = BcosConv2d(3, 5, 3, padding="same", bias=True, normalize_weight=False, dtype=torch.float64)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    a = F.conv2d(x, layer.weight, layer.bias, padding=1)
    n = (F.conv2d(x.square(), torch.ones(1, 3, 3, 3, dtype=x.dtype), padding=1) + 1e-6).sqrt()
    assert torch.allclose(layer(x), a * a.abs() / n, rtol=1e-11)


def test_other_paddings_use_the_padded_patch():
    layer = BcosConv2d(3, 5, 3, padding=1, padding_mode="reflect", normalize_weight=False, dtype=torch.float64)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    a = F.conv2d(padded, layer.weight)
    n = (F.conv2d(padded.square(), torch.ones(1, 3, 3, 3, dtype=x.dtype)) + 1e-6).sqrt()
    assert torch.allclose(layer(x), a * a.abs() / n, rtol=1e-11)


@pytest.mark.parametrize("options", [dict(bias=False), dict(bias=True), dict(groups=2), dict(max_out=2)], ids=str)
def test_initialised_as_torch_does(options):
    plain = dict(options)
    units = 6 * plain.pop("max_out", 1)
    torch.manual_seed(3)
    expected = nn.Conv2d(4, units, 3, **{"bias": False, **plain})
    torch.manual_seed(3)
    layer = BcosConv2d(4, 6, 3, **options)
    assert torch.equal(layer.weight, expected.weight)
    assert (layer.bias is None) == (expected.bias is None)
    if layer.bias is not None:
        assert torch.equal(layer.bias, expected.bias)


def test_attributes_and_unbatched_input():
    layer = BcosConv2d(4, 6, (3, 5), stride=2, padding=(1, 2), dilation=1, groups=2, b=1.5, max_out=2)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(layer, name) == getattr(nn.Conv2d(4, 6, (3, 5), 2, (1, 2), 1, 2), name), name
    assert (layer.padding_mode, layer.b, layer.max_out, layer.detach, layer.normalize_weight) == (
        "zeros", 1.5, 2, False, True
    )  # fmt: skip
    x = torch.randn(4, 8, 8)
    assert torch.allclose(layer(x), layer(x[None])[0])
    assert "b=1.5, max_out=2, normalize_weight=True" in repr(layer)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(groups=3), "in_channels divisible by groups, got 4 and 3"),
        (dict(groups=4), "out_channels divisible by groups, got 6 and 4"),
        (dict(groups=0), "groups to be an int >= 1, got 0"),
        (dict(padding_mode="mirror"), "padding_mode to be one of zeros, reflect, replicate, circular, got 'mirror'"),
        (dict(padding="full"), "'same' or 'valid', got 'full'"),
        (dict(padding="same", stride=2), "stride 1 with padding='same'"),
        (dict(stride=0), "stride to be an int or a pair of ints >= 1, got 0"),
        (dict(padding=(1, 2, 3)), "padding to be an int or a pair of ints >= 0"),
        (dict(kernel_size=0), "kernel_size"),
        (dict(max_out=1.5), "max_out"),
        (dict(b=0.5), "b >= 1 and finite, got 0.5"),
    ],
    ids=str,
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        BcosConv2d(4, 6, **options)


def test_copies_and_compiles():
    layer = BcosConv2d(3, 4, 3, padding=1, b=1.5)
    x = torch.randn(1, 3, 5, 5)
    twin = copy.deepcopy(layer)
    assert twin.weight is not layer.weight and torch.equal(twin(x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), layer(x), rtol=1e-6)
    layer.set_explanation_mode()
    assert torch.allclose(compiled(x), layer(x), rtol=1e-6)


@pytest.mark.parametrize("padding", [0, (2, 1), "same", "valid"], ids=str)
@pytest.mark.parametrize("dilation", [1, (2, 3)], ids=str)
def test_the_shape_of_the_output(padding, dilation):
    for stride in (1,) if padding == "same" else (1, (3, 2)):
        conv = BcosConv2d(2, 6, (3, 2), stride=stride, padding=padding, dilation=dilation)
        for shape in ((4, 2, 11, 12), (2, 9, 10)):
            x = torch.randn(shape)
            assert conv.output_shape(conv.padded(x)) == conv(x).shape


def test_the_shape_of_the_output_of_a_peer_s_layer_that_was_taken_over():
    """Its numbers stay ints."""
    peer = nn.Sequential(bcos.modules.BcosConv2d(2, 6, 3, stride=2, padding=1))
    conv, x = bcosification.fuse(peer)[0], torch.randn(4, 2, 11, 12)
    assert conv.output_shape(x) == conv(x).shape
