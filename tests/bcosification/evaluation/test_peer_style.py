"""The eager formulas against the package bcos itself, and against the definition where bcos has no such option."""

import bcos.modules as peer
import pytest
import torch
from torch import nn

import bcos_kernels
import bcosification
from bcosification import nn as bnn
from bcosification.evaluation.peer_style import peer_style
from tests.bcosification import tiny_networks

SHAPE = dict(in_channels=8, out_channels=12, kernel_size=3)
CONVOLUTIONS = {
    "default": {},
    "strided": dict(stride=2, padding=1),
    "groups": dict(padding=1, groups=4),
    "max_out": dict(max_out=2),
    "general_b": dict(b=1.5, padding=1),
    "b_1": dict(b=1),
}


def gradients(layer, x):
    x = x.detach().requires_grad_()
    y = layer(x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("explaining", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_those_of_bcos(name, explaining):
    torch.manual_seed(0)
    theirs = peer.BcosConv2d(**SHAPE, **CONVOLUTIONS[name]).double()
    ours = bnn.BcosConv2d(**SHAPE, **CONVOLUTIONS[name]).double()
    ours.load_state_dict(theirs.state_dict())
    eager = peer_style(ours)
    for layer in (theirs, eager):
        layer.set_explanation_mode(explaining)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    same(gradients(eager, x), gradients(theirs, x))


@pytest.mark.parametrize("explaining", [False, True])
@pytest.mark.parametrize("options", [{}, dict(max_out=2), dict(b=2.5)], ids=str)
def test_linear_layers_are_those_of_bcos(options, explaining):
    torch.manual_seed(0)
    theirs, ours = peer.BcosLinear(8, 5, **options).double(), bnn.BcosLinear(8, 5, **options).double()
    ours.load_state_dict(theirs.state_dict())
    eager = peer_style(ours)
    for layer in (theirs, eager):
        layer.set_explanation_mode(explaining)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    same(gradients(eager, x), gradients(theirs, x))


@pytest.mark.parametrize(
    "options",
    [
        dict(dilation=2, padding=2, groups=2),
        dict(padding="same", bias=True),
        dict(padding="valid", normalize_weight=False),
        dict(padding=1, padding_mode="reflect"),
        dict(padding="same", padding_mode="circular", dilation=2),
        dict(padding=(2, 1), b=nn.Parameter(torch.tensor(1.7, dtype=torch.float64))),
    ],
    ids=str,
)
def test_other_options_are_the_definition(options):
    torch.manual_seed(0)
    layer = bnn.BcosConv2d(**SHAPE, **options).double()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    with bcos_kernels.backend("reference"):
        expected = gradients(layer, x)
    same(gradients(peer_style(layer), x), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norms_are_those_of_bcos(training, momentum):
    torch.manual_seed(0)
    theirs = peer.norms.BatchNormUncentered2d(6, momentum=momentum).double()
    nn.init.uniform_(theirs.weight)
    nn.init.uniform_(theirs.bias)
    theirs.running_var.uniform_(0.5, 2)
    ours = bnn.BatchNormUncentered2d(6, momentum=momentum).double()
    ours.load_state_dict(theirs.state_dict())
    eager = peer_style(ours)
    for layer in (theirs.train(training), eager.train(training)):
        for _ in range(2):
            same_input = torch.randn(3, 6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            layer(same_input)
    x = torch.randn(3, 6, 4, 4, dtype=torch.float64)
    same(gradients(eager, x), gradients(theirs, x))
    same([eager.running_var, eager.num_batches_tracked], [theirs.running_var, theirs.num_batches_tracked])


@pytest.mark.parametrize("explaining", [False, True])
@pytest.mark.parametrize("channels_first", [False, True])
def test_layer_norms_are_those_of_bcos(channels_first, explaining):
    torch.manual_seed(0)
    theirs = peer.norms.DetachableLayerNorm(6).double()
    nn.init.uniform_(theirs.weight)
    nn.init.uniform_(theirs.bias)
    ours = (bnn.LayerNorm2d if channels_first else bnn.LayerNorm)(6).double()
    ours.load_state_dict(theirs.state_dict())
    eager = peer_style(ours)
    for layer in (theirs, eager):
        layer.set_explanation_mode(explaining)
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    moved = nn.Sequential(Moved((0, 2, 3, 1)), theirs, Moved((0, 3, 1, 2)))
    if not channels_first:
        x, moved = x.movedim(1, -1), theirs
    same(gradients(eager, x), gradients(moved, x))


class Moved(nn.Module):
    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.permute(self.dims)


@pytest.mark.parametrize("name", ["own_convnet", "own_transformer", "peer_convnet"])
def test_whole_networks_keep_their_function_and_run_no_kernel_of_ours(name, monkeypatch):
    """Peers' networks are fused first; blocks are unfused by peer_style."""
    model, images = tiny_networks.build(name), tiny_networks.images()
    if name.startswith("peer"):
        bcosification.fuse(model)
    expected = gradients(model, images)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    eager = peer_style(model)

    def refuse(*arguments, **options):
        raise AssertionError("a kernel of ours ran")

    monkeypatch.setattr(bcos_kernels.dispatch, "run", refuse)
    with pytest.raises(AssertionError, match="a kernel of ours ran"):
        gradients(model, images)
    same(gradients(eager, images), expected)
    assert eager.state_dict().keys() == before.keys()
    same(model.state_dict().values(), before.values())


def test_a_head_that_normalises_every_position():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    torch.manual_seed(0)
    model = bcosification.bcosify(ConvNeXt([CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], num_classes=5).eval())
    model, images = model.double(), torch.rand(2, 3, 40, 32, dtype=torch.float64)
    same(gradients(peer_style(model), images), gradients(model, images))
