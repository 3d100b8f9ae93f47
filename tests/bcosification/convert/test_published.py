"""The table of published weights against the package bcos, and the download of own files over file://."""

import hashlib
import json
import re

import bcos.models.pretrained
import numpy
import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from PIL import Image

import bcosification
from bcosification import list_pretrained, pretrained, resolve
from bcosification.convert import published
from bcosification.convert.peer_architectures import ARCHITECTURES, TOWERS
from bcosification.convert.preprocessing import OPENAI_MEAN, OPENAI_STD
from bcosification.models import SimpleViT, simple_vit_ti_patch16_224
from tests.bcosification.convert.b_cosification_clip import clip_tower, encoded
from tests.bcosification.convert.peer_networks import make_v2
from tests.bcosification.convert.standard_networks import MEAN, STD, relative_error


def test_every_published_file_of_b_cos_v2_is_in_the_table(monkeypatch):
    called = {}
    monkeypatch.setattr(
        bcos.models.pretrained,
        "_get_model",
        lambda name, *args, base_network="bcos_final", **kwargs: called.update({function: (base_network, name)}),
    )
    known = {name.removeprefix("bcos/"): entry for name, entry in list_pretrained().items() if name.startswith("bcos/")}
    for function in bcos.models.pretrained.list_available():
        getattr(bcos.models.pretrained, function)(pretrained=True)
    assert set(known) == set(called)
    for function, (base, name) in called.items():
        entry, url = known[function], bcos.models.pretrained.URLS[base][name]
        assert entry["url"] == url and len(entry["sha256"]) == 10
        assert entry["sha256"] == torch.hub.HASH_REGEX.search(url)[1]
        told = getattr(bcos.models.pretrained, function).__doc__
        assert f"|  {entry['top1']:.3f}%" in told and f"|  {entry['top5']:.3f}%" in told
        assert entry["arch"] in ARCHITECTURES and entry["layout"] == "bcos"
        assert entry["resize"] == (232 if base == "bcos_final_long" else 256) and entry["crop"] == 224
        assert "non-commercial" in entry["license"]


def test_what_is_not_known_of_b_cosifications_files_is_null():
    entries = {name: entry for name, entry in list_pretrained().items() if name.startswith("b-cosification/")}
    assert len(entries) == 14
    for name, entry in entries.items():
        assert entry["url"] is None and entry["sha256"] is None and entry["layout"] == "b-cosification"
        assert entry["arch"] in (TOWERS if "_clip_" in name else ARCHITECTURES)
        assert entry["page"].startswith("https://github.com/shrebox/B-cosification/releases/tag/")
    assert entries["b-cosification/resnet_50_V1"]["arch"] == "resnet50"


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """A function that publishes a state_dict under a name, in a table of its own, and torch.hub's cache emptied."""
    old, table = torch.hub.get_dir(), json.loads(published._TABLE.read_text())
    monkeypatch.setattr(published, "_table", lambda: table)
    torch.hub.set_dir(str(tmp_path / "hub"))

    def add(name, state, arch, **changes):
        path = tmp_path / "weights.pth"
        torch.save(state, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path = path.rename(tmp_path / f"{name.replace('/', '_')}-{digest[:10]}.pth")
        entry = {"url": path.as_uri(), "sha256": digest[:10], "arch": arch, "resize": 40, "top1": None, "top5": None}
        table["files"][name] = {**entry, **changes}
        return path

    yield add
    torch.hub.set_dir(old)


def test_downloaded_once_checked_and_loaded(publish, monkeypatch):
    peer, x = make_v2("resnet, basic blocks")
    monkeypatch.setitem(ARCHITECTURES, "small", lambda classes: small_resnet(classes))
    source = publish("bcos/small", peer.state_dict(), "small")
    model = pretrained("bcos/small", progress=False)
    with torch.no_grad():
        expected = peer(x)
        assert relative_error(model(x), expected) < 1e-6
        source.unlink()  # from the cache now
        assert relative_error(pretrained("bcos/small")(x), expected) < 1e-6
    assert model.config["source_weights"] == source.as_uri() and model.config["published_name"] == "bcos/small"
    assert model.transform.preprocessing.resize == 40 and model.transform.preprocessing.input_size == (224, 224)
    cached = published.published_file("bcos/small")
    assert cached.parent.name == "checkpoints"
    cached.write_bytes(cached.read_bytes() + b"x")
    with pytest.raises(ValueError, match="to have a SHA-256 that begins with .*delete it to download it again"):
        pretrained("bcos/small")
    cached.unlink()
    with pytest.raises(RuntimeError, match="bcos/small: expected to download file:.*URLError.*a copy put at"):
        pretrained("bcos/small", progress=False)


def small_resnet(classes):
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], classes)


def test_the_transform_is_the_peers(publish, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "small", small_resnet)
    publish("bcos/small", make_v2("resnet, basic blocks")[0].state_dict(), "small", resize=232)
    transform = pretrained("bcos/small", progress=False).transform
    pixels = numpy.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=numpy.uint8)
    image = Image.fromarray(pixels)
    from bcos.data.presets import ImageNetClassificationPresetEval

    expected = ImageNetClassificationPresetEval(crop_size=224, resize_size=232, is_bcos=True)(image)
    assert torch.equal(transform(image), expected[:3])


def test_a_download_of_another_hash_is_not_kept(publish):
    publish("bcos/other", make_v2("densenet")[0].state_dict(), "densenet121", sha256="0123456789")
    with pytest.raises(ValueError, match='invalid hash value .expected "0123456789".*was not kept'):
        pretrained("bcos/other", progress=False)
    folder = published.Path(torch.hub.get_dir()) / "checkpoints"
    assert list(folder.iterdir()) == []


def test_without_a_known_hash_nothing_is_checked(publish, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "small", small_resnet)
    publish("bcos/unknown", make_v2("resnet, basic blocks")[0].state_dict(), "small", sha256=None)
    assert pretrained("bcos/unknown", progress=False).num_classes == 5
    assert pretrained("bcos/unknown", progress=False).num_classes == 5


def test_standard_networks_and_their_names_for_the_resolver(publish, tmp_path):
    torch.manual_seed(0)
    network = simple_vit_ti_patch16_224(num_classes=3).eval()
    publish("bcos/standard_simple_vit_ti_patch16_224", network.state_dict(), "simple_vit_ti_patch16_224", resize=256)
    images = torch.rand(1, 3, 32, 32)
    model = pretrained("bcos/standard_simple_vit_ti_patch16_224", progress=False)
    resolved, info = resolve("bcosification:simple_vit_ti_patch16_224")
    assert type(model) is SimpleViT and info["weights"].startswith("file:") and info["preprocessing"]["resize"] == 256
    with torch.no_grad():
        assert torch.equal(model(images), network(images)) and torch.equal(resolved(images), network(images))
    assert resolve("bcosification:simple_vit_ti_patch16_224", num_classes=7)[0].linear_head.linear.out_features == 7
    image = Image.fromarray(numpy.full((256, 256, 3), 51, dtype=numpy.uint8))
    normalized = model.transform(image)[:, 0, 0]
    torch.testing.assert_close(normalized, (0.2 - torch.tensor(MEAN)) / torch.tensor(STD))
    assert repr(model.transform).endswith("bilinear, normalize=True)")
    converted = bcosification.bcosify(model)
    assert converted.config["source"] == "bcosification:simple_vit_ti_patch16_224"
    assert torch.equal(converted.transform(image), torch.full((3, 224, 224), 51 / 255)), "normalised inside the model"


def test_names_and_addresses_that_are_not_known():
    with pytest.raises(ValueError, match="a name of list_pretrained.., got 'bcos/resnet51'; near: .*bcos/resnet50"):
        pretrained("bcos/resnet51")
    with pytest.raises(ValueError, match="got 'vgg11_bnu'; near: bcos/vgg11_bnu"):
        pretrained("vgg11_bnu")
    expected = (
        "expected the address of its file, which is not known to this package: download it from "
        "https://github.com/shrebox/B-cosification/releases/tag/v0.0.1-checkpoints and read it with "
        "bcosification.load_peer(FILE, arch='densenet121', layout='b-cosification')"
    )
    with pytest.raises(RuntimeError, match=re.escape(expected)):
        pretrained("b-cosification/densenet_121")
    with pytest.raises(RuntimeError, match=r"v0.0.2-CLIP-checkpoints and read it with .*\(FILE, arch='RN50', layout="):
        pretrained("b-cosification/resnet_50_clip_CC3M")


def test_a_clip_tower_is_prepared_as_clips_are(publish, monkeypatch):
    peer = clip_tower()
    monkeypatch.setitem(TOWERS, "small", lambda size: ModifiedResNet([1, 2, 1, 1], size, 4, 64, 8))
    publish("b-cosification/small_clip_", peer.state_dict(), "small", resize=224)
    model = pretrained("b-cosification/small_clip_", progress=False)
    assert (tuple(model.config["mean"]), tuple(model.config["std"])) == (OPENAI_MEAN, OPENAI_STD)
    assert model.transform.preprocessing.interpolation == "bicubic" and model.config["resize"] == 224
    x = encoded()
    with torch.no_grad():
        assert relative_error(model(x), peer(x)) < 1e-10
