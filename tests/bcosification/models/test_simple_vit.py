"""SimpleViT and ViT_c against B-cos v2's standard networks: names, shapes, numbers, weights files."""

import warnings

import bcos.models.vit
import pytest
import torch
from bcos.modules import DetachableGNLayerNorm2d
from torch import nn

from bcosification import models, resolve
from bcosification.models import CONSTRUCTORS, SimpleViT
from tests.bcosification.convert.peer_networks import make_standard, randomize

STEM = [8, 8, 12, 12, 16]
SMALL = dict(num_classes=5, dim=64, depth=2, heads=1, mlp_dim=24)


def small(stem, **changes):
    sizes = dict(image_size=32, patch_size=1, conv_stem=STEM) if stem else dict(image_size=32, patch_size=8)
    return SimpleViT(**{**sizes, **SMALL, **changes})


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_names_and_shapes_are_those_of_the_published_standard_networks(name):
    layers = dict(linear_layer=nn.Linear, conv2d_layer=nn.Conv2d, norm_layer=nn.LayerNorm, act_layer=nn.GELU)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = getattr(bcos.models.vit, name)(channels=3, norm2d_layer=DetachableGNLayerNorm2d, **layers)
        own = getattr(models, name)()
    expected = {key: value.shape for key, value in peer.state_dict().items()}
    assert {key: value.shape for key, value in own.state_dict().items()} == expected
    assert own.heads == peer.transformer[0].attn.heads and own.image_size == 224
    strides = [m.stride for m in peer.modules() if isinstance(m, nn.Conv2d)]
    assert [m.stride for m in own.modules() if isinstance(m, nn.Conv2d)] == strides
    for kind in (nn.LayerNorm, nn.GroupNorm):
        assert {m.eps for m in own.modules() if isinstance(m, kind)} <= {1e-5}


@pytest.mark.parametrize("stem", [False, True])
def test_the_same_numbers_as_the_peer(stem):
    peer, x = make_standard("vitc" if stem else "simple_vit")
    peer.__class__ = bcos.models.vit.SimpleViT  # its own forward: the head after the mean
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    own = small(stem).double().eval()
    assert own.load_state_dict(peer.state_dict()) == ([], [])
    for size in ((32, 32), (32, 48)):  # positions follow the image
        part = torch.cat([images, images], 3)[..., : size[0], : size[1]].requires_grad_()
        expected = torch.autograd.grad(peer(part)[:, 1].sum(), part)[0]
        got = torch.autograd.grad(own(part)[:, 1].sum(), part)[0]
        torch.testing.assert_close(own(part), peer(part), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-14)
        assert expected.abs().max() > 1e-4


def test_weights_from_a_file_or_a_dict(tmp_path):
    source = randomize(models.simple_vit_ti_patch16_224(num_classes=3, image_size=32)).float()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = source(images)
        read = models.simple_vit_ti_patch16_224(num_classes=3, image_size=64, weights=tmp_path / "weights.pth")
        assert torch.equal(read.eval()(images), expected) and read.image_size == 64
        copied = models.simple_vit_ti_patch16_224(3, weights=source.state_dict())
        assert torch.equal(copied.eval()(images), expected)
        next(copied.parameters()).add_(1)
        assert torch.equal(source(images), expected), "the caller's tensors are not shared"
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in read.parameters())
    network, info = resolve("bcosification:simple_vit_ti_patch16_224", weights=str(tmp_path / "weights.pth"))
    assert info["num_classes"] == 3 and info["preprocessing"]["input_size"] == [224, 224]
    assert info["preprocessing"]["resize"] == 256
    with torch.no_grad():
        assert torch.equal(network(images), expected)


def test_weights_that_do_not_fit_are_told():
    state = models.vitc_ti_patch1_14(num_classes=3).state_dict()
    state["head.weight"] = state.pop("linear_head.linear.weight")
    with pytest.raises(ValueError) as error:
        models.vitc_ti_patch1_14(num_classes=4, weights=state)
    assert "expected weights of vitc_ti_patch1_14 (SimpleViT)" in str(error.value)
    assert "missing (1): linear_head.linear.weight" in str(error.value)
    assert "unexpected (1): head.weight" in str(error.value)
    assert "linear_head.linear.bias: expected (4,), got (3,)" in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 30}, r"image_size to be a multiple of 8 .*got 30"),
        ({"dim": 10}, "dim to be a multiple of 4 and >= 8, got 10"),
        ({"heads": 0}, "got 64 with 0 heads"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        small(False, **changes)


def test_images_that_patches_do_not_fit():
    with pytest.raises(ValueError, match="H and W multiples of the patch size 8, got .1, 3, 32, 30."):
        small(False)(torch.rand(1, 3, 32, 30))


def test_resolved_by_name():
    network, info = resolve("bcosification:vitc_ti_patch1_14", pretrained=False, num_classes=7)
    assert type(network) is SimpleViT and info["num_classes"] == 7 and info["library"] == "bcosification"
    network, info = resolve("simple_vit_ti_patch16_224", pretrained=False, num_classes=7)
    assert network.dim == 192 and info["spec"] == "bcosification:simple_vit_ti_patch16_224"
    with pytest.raises(ValueError, match="name of a bcosification model .*, got 'vitc_t_patch1_14'; did you mean vitc"):
        resolve("bcosification:vitc_t_patch1_14", pretrained=False)
