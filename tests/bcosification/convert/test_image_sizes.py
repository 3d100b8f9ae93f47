"""Images of a size or dtype that a network does not take: told as that, and nothing else is."""

import pytest
import torch
from torch import nn

from bcosification import bcosify, explain, verify
from tests.bcosification import small_clip
from tests.bcosification.convert.standard_networks import MEAN, STD, vit

timm = pytest.importorskip("timm", reason="the package timm is not installed (extra: train)")


def torchvision_vit():
    return vit().double(), 16


def timm_vit():
    network = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, num_heads=2, depth=1)
    return network.double().eval(), 16


def open_clip_vit():
    return small_clip.clip("vit"), 32


@pytest.fixture(params=[torchvision_vit, timm_vit, open_clip_vit], ids=["torchvision", "timm", "open_clip"])
def network(request):
    """A network, and the one edge of images that it takes."""
    return request.param()


def of(height, width, **options):
    return torch.rand(1, 3, height, width, dtype=torch.float64, **options)


def test_the_size_is_told(network):
    original, edge = network
    model = bcosify(original)
    texts = {"text": torch.rand(2, 10, dtype=torch.float64)} if hasattr(model, "encode_image") else {}
    told = rf"expected images of a size that .* takes \(its own: {edge} x {edge}, .*\), got 24 x 40: \S+"
    for call in (
        lambda images: model(images),
        lambda images: model.train()(images),
        lambda images: model(torch.cat([images, 1 - images], 1)),
        lambda images: explain(model, images, **texts),
        lambda images: verify(original, model, images),
    ):
        with pytest.raises(ValueError, match=told) as raised:
            call(of(24, 40))
        assert isinstance(raised.value.__cause__, (AssertionError, RuntimeError, ValueError))
        model.eval()
    assert model(of(edge, edge)).shape[0] == 1


def test_a_network_that_takes_every_size_is_told_what_is_too_small():
    original = nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    model = bcosify(original, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="^conv2d: expected padded height"):  # no size of its own to compare with
        model(torch.rand(1, 3, 4, 9))
    model.config["input_size"] = [16, 16]
    with pytest.raises(ValueError, match=r"\(its own: 16 x 16, .*\), got 4 x 9: conv2d: expected"):
        model(torch.rand(1, 3, 4, 9))
    assert model(torch.rand(1, 3, 9, 5)).shape == (1, 3)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), torch.OutOfMemoryError("too many")])
def test_other_errors_stay_what_they_are(network, error, monkeypatch):
    """Of a batch of a size that is not the network's own, and of one that is."""
    original, edge = network
    model = bcosify(original)

    def broken(inputs):
        if inputs.shape[0] > 1:  # the networks' own would fail before
            raise error
        return inputs.mean((2, 3))

    monkeypatch.setattr(model.model, "forward", broken)
    for size in (edge, 24):
        with pytest.raises(type(error)) as raised:
            model(of(size, size).expand(2, -1, -1, -1))
        assert raised.value is error


def test_another_dtype_is_told(network):
    original, edge = network
    model = bcosify(original)
    told = r"expected images of the model's dtype, torch.float64, got torch.float32 \(images.to"
    with pytest.raises(TypeError, match=told) as raised:
        model(of(edge, edge).float())
    assert raised.value.__cause__ is not None
    with torch.autocast("cpu", torch.bfloat16):  # which makes them fit
        bcosify(original.float())(of(edge, edge).bfloat16())


def test_where_both_are_wrong_the_networks_own_error_stays(network):
    model = bcosify(network[0])
    with pytest.raises((AssertionError, TypeError)) as raised:
        model(of(24, 24).float())
    assert raised.value.__cause__ is None and "BcosifiedModel" not in str(raised.value)
