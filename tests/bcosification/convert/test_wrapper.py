"""The B-cosified model's own parts: encoding, range warning, transform, new heads."""

import math
import warnings

import numpy
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import ResNet18_Weights, Swin_V2_T_Weights
from torchvision.transforms import functional as tv

from bcosification import bcosify, explain, reset_head
from bcosification import nn as bnn
from bcosification.convert.preprocessing import ImageTransform, Preprocessing, from_open_clip, from_torchvision
from tests.bcosification.convert.standard_networks import MEAN, STD, make, sequential, vit


@pytest.fixture
def model():
    torch.manual_seed(0)
    return bcosify(vit()).eval()


def test_encoding(model):
    images = torch.rand(2, 3, 16, 16)
    x6 = model.encode(images)
    assert torch.equal(x6, torch.cat([images, 1 - images], 1))
    assert model.encode(x6) is x6
    mean, std = torch.tensor(MEAN).view(-1, 1, 1), torch.tensor(STD).view(-1, 1, 1)
    z = (images - mean) / std
    torch.testing.assert_close(model.normalize(x6), torch.cat([z, -z], 1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "images, error, message",
    [
        (torch.rand(2, 4, 16, 16), ValueError, r"with C = 3 or 6, got \(2, 4, 16, 16\)"),
        (torch.rand(3, 16, 16), ValueError, r"got \(3, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), TypeError, "expected floating point images .* torch.uint8"),
        ([0.5], TypeError, "expected a tensor of images .* got list"),
    ],
)
def test_wrong_images_are_named(model, images, error, message):
    with pytest.raises(error, match=message):
        model(images)


def test_images_out_of_range_warn_once(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.rand(1, 3, 16, 16))
        model(torch.full((1, 3, 16, 16), 1.005))
        model(torch.empty(0, 3, 16, 16))
    with pytest.warns(UserWarning, match=r"expected images in \[0, 1\], got values from -2.1 to 0.4"):
        model(torch.linspace(-2.1, 0.4, 768).view(1, 3, 16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.full((1, 3, 16, 16), 5.0))


def test_vmap_and_tracing_are_not_asked_for_values(model):
    images = torch.rand(3, 3, 16, 16) * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.func.vmap(lambda image: model.encode(image[None])[0])(images)


@pytest.mark.parametrize("size", [(300, 260), (200, 500), (60, 50), (256, 256)])
@pytest.mark.parametrize(
    "weights", [ResNet18_Weights.IMAGENET1K_V1, Swin_V2_T_Weights.IMAGENET1K_V1], ids=["bilinear", "bicubic"]
)
def test_transform_equals_torchvisions_preset(size, weights):
    pixels = numpy.random.default_rng(0).integers(0, 256, (*size, 3), dtype=numpy.uint8)
    image = Image.fromarray(pixels)
    preset = weights.transforms()
    got = ImageTransform(from_torchvision(preset, "test"))(image)
    mean, std = torch.tensor(preset.mean).view(-1, 1, 1), torch.tensor(preset.std).view(-1, 1, 1)
    assert got.dtype == torch.float32 and got.min() >= 0 and got.max() <= 1
    torch.testing.assert_close((got - mean) / std, preset(image), atol=1e-5, rtol=1e-5)


def test_transform_of_other_kinds_of_images(model):
    p = Preprocessing((0.5,), (0.5,), input_size=(4, 6), resize=8)
    assert ImageTransform(p)(Image.new("RGBA", (16, 8), (255, 0, 0, 9))).shape == (1, 4, 6)
    gray = model.transform(Image.new("L", (40, 30), 51))
    assert gray.shape == (3, 16, 16)
    torch.testing.assert_close(gray, torch.full((3, 16, 16), 0.2))
    squashed = Preprocessing(MEAN, STD, input_size=(4, 8), crop="squash", interpolation="nearest")
    halves = Image.fromarray(numpy.repeat(numpy.array([[[0] * 3, [255] * 3]], numpy.uint8), 2, 0))
    expected = torch.cat([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)], 2)
    assert torch.equal(ImageTransform(squashed)(halves), expected)
    free = bcosify(sequential(), mean=MEAN, std=STD).transform(Image.new("RGB", (5, 7)))
    assert free.shape == (3, 7, 5)
    with pytest.raises(TypeError, match="expected a PIL image, got Tensor"):
        model.transform(torch.rand(3, 4, 4))


def test_transform_pads_small_images_as_torchvision_does():
    pixels = numpy.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=numpy.uint8)
    got = ImageTransform(Preprocessing(MEAN, STD, input_size=(8, 6)))(Image.fromarray(pixels))
    expected = tv.center_crop(torch.from_numpy(pixels).permute(2, 0, 1), [8, 6]) / 255
    torch.testing.assert_close(got, expected)


def test_open_clip_preprocessing():
    config = {"size": 224, "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    p = from_open_clip(config)
    assert (p.input_size, p.resize, p.crop, p.interpolation) == ((224, 224), 224, "center", "bicubic")
    p = from_open_clip({**config, "size": (128, 96), "resize_mode": "squash"})
    assert (p.input_size, p.resize, p.crop) == ((128, 96), None, "squash")
    assert Preprocessing.from_dict(p.to_dict()) == p


@pytest.mark.parametrize("name", ["resnet, basic blocks", "vit", "densenet", "convnext"])
@pytest.mark.parametrize("bias", ["remove", "keep"])
def test_reset_head(name, bias):
    network, images = make(name)
    converted = bcosify(network, b=1.5, bias=bias)
    old = converted.model.get_submodule(converted.config["head"])
    rest = {key: value for key, value in converted.state_dict().items() if converted.config["head"] not in key}
    torch.manual_seed(0)
    assert reset_head(converted, 9) is converted
    head = converted.model.get_submodule(converted.config["head"])
    assert type(head) is type(old) and head is not old and head.b == 1.5
    assert (head.bias is None) == (bias == "remove")
    assert converted(images).shape == (2, 9) and converted.num_classes == 9
    assert converted.config["logit_bias"] == (None if bias == "keep" else -math.log(8))
    assert head.weight.dtype == torch.float64 and head.weight.std() > 0
    bound = 1 / math.sqrt(head.weight[0].numel())
    assert head.weight.abs().max() <= bound and head.weight.abs().max() > 0.9 * bound
    assert all(torch.equal(converted.state_dict()[key], value) for key, value in rest.items())


def test_reset_classifier_and_chosen_logit_biases():
    converted = bcosify(vit(), logit_bias=-3.0)
    assert converted.reset_classifier(2) is converted
    assert converted.logit_bias.logit_bias == -3.0
    converted = bcosify(vit())
    assert converted.reset_classifier(1).config["logit_bias"] is None
    assert converted.reset_classifier(3).logit_bias.logit_bias == pytest.approx(-math.log(2))


def test_reset_head_refuses():
    with pytest.raises(TypeError, match="expected a model made by bcosify, got VisionTransformer"):
        reset_head(vit(), 3)
    with pytest.raises(ValueError, match="expected num_classes to be an int >= 1, got 0"):
        reset_head(bcosify(vit()), 0)
    features = bcosify(nn.Sequential(nn.Conv2d(3, 4, 1)), mean=MEAN, std=STD)
    assert features.num_classes is None and isinstance(features.logit_bias, nn.Identity)
    with pytest.raises(ValueError, match="expected a model with a classification head"):
        reset_head(features, 3)


def test_parts_are_of_the_package():
    converted = bcosify(vit())
    assert isinstance(converted.add_inverse, bnn.AddInverse) and isinstance(converted.normalize, bnn.Normalize)
    converted = bcosify(vit(), inverse=False, normalize_input=False)
    assert isinstance(converted.add_inverse, nn.Identity) and isinstance(converted.normalize, nn.Identity)
    assert converted.model.conv_proj.in_channels == 3


def test_the_warning_of_a_range_names_the_callers_line(model):
    with pytest.warns(UserWarning, match=r"expected images in \[0, 1\]") as told:
        model(torch.full((1, 3, 16, 16), 5.0))
    assert [warning.filename for warning in told] == [__file__]
    with pytest.warns(UserWarning, match=r"expected images in \[0, 1\]") as told:
        explain(bcosify(vit()), torch.full((1, 3, 16, 16), 5.0))
    assert [warning.filename for warning in told] == [__file__]
