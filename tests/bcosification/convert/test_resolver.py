"""The resolver: what every kind of name stands for, and what it says when a name stands for nothing."""

import re
from urllib.error import URLError

import huggingface_hub
import open_clip
import pytest
import timm
import torch
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.models.resnet import ResNet

from bcosification import bcosify, load, resolve
from bcosification.convert import hub
from bcosification.convert.preprocessing import IMAGENET_MEAN
from tests.bcosification.convert.standard_networks import sequential, vit


@pytest.fixture
def images():
    return torch.rand(1, 3, 64, 64)


@pytest.mark.parametrize("spec", ["resnet18", "torchvision:resnet18"])
def test_torchvision(spec):
    network, info = resolve(spec, pretrained=False)
    assert type(network) is ResNet and not network.training
    assert info["spec"] == "torchvision:resnet18" and info["weights"] is None and info["num_classes"] == 1000
    assert info["preprocessing"]["mean"] == list(IMAGENET_MEAN) and info["converted"] is False
    assert resolve(spec, pretrained=False, num_classes=7)[0].fc.out_features == 7


@pytest.fixture
def published(monkeypatch):
    """torchvision's downloads, replaced by random weights."""
    torch.manual_seed(3)
    state = resnet18().state_dict()
    monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.__class__, "get_state_dict", lambda *_, **__: state)
    return state


def test_published_weights_and_a_new_head(published):
    network, info = resolve("resnet18")
    assert torch.equal(network.fc.weight, published["fc.weight"])
    assert info["weights"] == "ResNet18_Weights.IMAGENET1K_V1"
    assert info["preprocessing"]["resize"] == 256 and info["preprocessing"]["input_size"] == [224, 224]
    network, info = resolve("resnet18", num_classes=3, weights="IMAGENET1K_V1")
    assert torch.equal(network.conv1.weight, published["conv1.weight"])
    assert network.fc.weight.shape == (3, 512) and info["num_classes"] == 3
    assert bcosify(network).config["source"] == "torchvision:resnet18"


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.__class__, "get_state_dict", offline)
    with pytest.raises(RuntimeError, match=r"resnet18: expected to download .*no network.*pretrained=False"):
        resolve("resnet18")


def test_timm():
    network, info = resolve("timm:resnet10t", pretrained=False, num_classes=4)
    assert info["library"] == "timm" and info["num_classes"] == 4
    assert info["preprocessing"]["preprocessing_origin"] == "timm pretrained_cfg"
    assert network(torch.rand(1, 3, 64, 64)).shape == (1, 4)


def test_open_clip_names_are_checked():
    with pytest.raises(ValueError, match="ViT-B-32/TAG with TAG one of .*openai.*, got 'nothing'"):
        resolve("open_clip:ViT-B-32/nothing")
    with pytest.raises(ValueError, match=r"\(open_clip.list_models\(\) has .*, got 'ViT-B-33'; .*ViT-B-32"):
        resolve("open_clip:ViT-B-33/openai")
    with pytest.raises(ValueError, match="neither num_classes"):
        resolve("open_clip:ViT-B-32/openai", num_classes=3)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_unknown_names_come_with_near_ones(library):
    with pytest.raises(ValueError, match=rf"of a {library} model \(.*, got 'resnet188'; did you mean .*resnet18\b"):
        resolve(f"{library}:resnet188")


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(TypeError, match="expected a name, folder or file, got None"):
        resolve(None)
    with pytest.raises(ValueError, match="expected num_classes to be an int >= 1, got 0"):
        resolve("resnet18", num_classes=0)
    with pytest.raises(ValueError, match="expected weights to be a file or one of IMAGENET1K_V1, DEFAULT, got 'V9'"):
        resolve("resnet18", weights="V9")
    with pytest.raises(ValueError, match="expected arch= with a weights file only"):
        resolve("resnet18", arch="resnet18")
    with pytest.raises(ValueError, match="expected model= with a folder or file only"):
        resolve("resnet18", model=vit())
    with pytest.raises(FileNotFoundError, match="expected a folder or file, found none at './missing'"):
        resolve("./missing")
    with pytest.raises(FileNotFoundError, match="expected config.json"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    "spec, error, message",
    [
        ("foo:bar", ValueError, "among torchvision:, .* transformers:, bcosification: .*, got 'foo:bar' with 'foo:'$"),
        ("torchvison:resnet18", ValueError, "with 'torchvison:'; did you mean torchvision:resnet18"),
        ("torchvision:", ValueError, "expected the name of a torchvision model .*, got ''"),
        ("runs/r18/best", FileNotFoundError, "expected a folder or file, found none at 'runs/r18/best'"),
        ("nothing", ValueError, "expected the name of a torchvision model .*, got 'nothing'$"),
        ("bare", FileNotFoundError, r"expected config.json in bare \(save_pretrained, .*\), found an empty folder"),
        ("full", FileNotFoundError, "expected config.json in full .*, found only a.txt"),
        ("run", FileNotFoundError, "expected config.json in run .*, found none there, but in run/best, run/last"),
        ("file", ValueError, "expected tensors|expected a file of tensors"),
    ],
)
def test_what_stands_for_nothing_is_told(tmp_path, monkeypatch, spec, error, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("bare", "full", "run/best", "run/last"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("full/a.txt", "run/best/config.json", "run/last/config.json", "file"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(error, match=message):
        resolve(spec, arch="resnet18" if spec == "file" else None, pretrained=False)


def test_a_folder_does_not_hide_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()
    assert resolve("resnet18", pretrained=False)[1]["spec"] == "torchvision:resnet18"


def test_conversions_remember_their_weights(tmp_path, published):
    path = tmp_path / "weights.pth"
    torch.save(resnet18(num_classes=4).state_dict(), path)
    for arguments, expected in (
        (dict(spec="resnet18"), "ResNet18_Weights.IMAGENET1K_V1"),
        (dict(spec="resnet18", pretrained=False), None),
        (dict(spec=str(path), arch="resnet18"), str(path)),
    ):
        config = bcosify(resolve(**arguments)[0]).config
        assert (config["source"], config["source_weights"]) == ("torchvision:resnet18", expected)


def test_folders(tmp_path):
    torch.manual_seed(0)
    network, _ = resolve("resnet18", pretrained=False, num_classes=6)
    model = bcosify(network).eval()
    model.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 64, 64)
    loaded, info = resolve(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert info["converted"] and info["num_classes"] == 6 and info["name"] == "torchvision:resnet18"
    assert resolve(str(tmp_path), num_classes=2)[0](images).shape == (1, 2)
    with pytest.raises(ValueError, match="expected no arch= with a folder, got 'resnet18'"):
        resolve(str(tmp_path), arch="resnet18")


def test_a_source_rebuilds_what_no_family_describes(tmp_path):
    torch.manual_seed(0)
    network, _ = resolve("torchvision:squeezenet1_1", pretrained=False, num_classes=3)
    model = bcosify(network, head="keep", mean=0.5, std=0.25).eval()
    model.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(images), model(images))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_files(tmp_path, suffix):
    from safetensors.torch import save_file

    network = vit()
    path = str(tmp_path / f"weights{suffix}")
    state = resnet18(num_classes=4).state_dict()
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    else:
        save_file(state, path)
    loaded, info = resolve(path, arch="resnet18")
    assert loaded.fc.out_features == 4 and torch.equal(loaded.fc.weight, state["fc.weight"])
    assert info["weights"] == path and info["spec"] == "torchvision:resnet18"
    loaded, _ = resolve("resnet18", weights=path, num_classes=9)
    assert loaded.fc.out_features == 9 and torch.equal(loaded.conv1.weight, state["conv1.weight"])
    own = nn.Sequential(resnet18(num_classes=4))
    with pytest.raises(ValueError, match=r"missing \(122\): 0.bn1.bias.*\n.*unexpected \(122\): bn1.bias"):
        resolve(path, model=own)
    assert torch.equal(resolve(path, model=own[0])[0].fc.weight, state["fc.weight"])
    assert not torch.equal(own[0].fc.weight, state["fc.weight"])
    with pytest.raises(ValueError, match=r"expected arch=NAME with a weights file \(or model=.*, got neither"):
        resolve(path)
    with pytest.raises(ValueError, match="got both"):
        resolve(path, arch="resnet18", model=network)
    message = r"expected weights of torchvision:resnet34 \(ResNet\), got another architecture's"
    with pytest.raises(ValueError, match=message):
        resolve(path, arch="resnet34")
    with pytest.raises(ValueError, match=message):
        resolve("resnet34", weights=path)


def test_published_densenet_files_have_older_names(tmp_path):
    import re

    from torchvision.models import densenet121

    state = densenet121(num_classes=2).state_dict()
    older = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name): value for name, value in state.items()}
    assert set(older) != set(state)
    torch.save(older, tmp_path / "densenet121.pth")
    loaded, _ = resolve(str(tmp_path / "densenet121.pth"), arch="densenet121")
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_a_converted_models_file_asks_for_its_folder(tmp_path):
    bcosify(sequential(), mean=0.5, std=0.5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a standard model's weights, got a converted one's: give its folder"):
        resolve(str(tmp_path / "model.safetensors"), model=sequential())


@pytest.mark.parametrize(
    "spec, meant",
    [
        ("timm/resnet18", "timm:resnet18"),
        ("open_clip/RN50/openai", "open_clip:RN50/openai"),
        ("RN50/openai", "open_clip:RN50/openai"),
        ("ViT-B-32", "open_clip:ViT-B-32/TAG"),
        ("timm.resnet18", "timm:resnet18"),
        ("torchvision.models.resnet18", "torchvision:resnet18"),
        ("resnet18.a1_in1k", "timm:resnet18.a1_in1k"),
        ("torchvision:simple_vit_s_patch16_224", "bcosification:simple_vit_s_patch16_224"),
        ("Resnet34", "resnet34"),
    ],
)
def test_what_was_meant(spec, meant):
    with pytest.raises((ValueError, FileNotFoundError), match=rf"; did you mean {re.escape(meant)}( or |,|\?$)"):
        resolve(spec)


def test_names_of_published_models_are_told():
    with pytest.raises(FileNotFoundError, match=r"bcosification.pretrained\('bcos/resnet50'\) in Python"):
        resolve("bcos/resnet50")
    with pytest.raises(ValueError, match="TAG one of openai, .* and [0-9]+ more, got 'opena'; did you mean .*/openai"):
        resolve("open_clip:ViT-B-32/opena")


@pytest.mark.parametrize("spec, repository", [
    ("timm:resnet10t", "timm/resnet10t.c3_in1k"), ("open_clip:RN50/openai", "timm/resnet50_clip.openai"),
])  # fmt: skip
def test_a_hub_out_of_reach_is_told_at_once(spec, repository, monkeypatch, tmp_path):
    """Not after the retries of huggingface_hub, which take most of a minute; a cached file is the library's to find."""
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: asked.append(a) or resnet18())
    monkeypatch.setattr(open_clip, "create_model", lambda *a, **k: asked.append(a) or resnet18())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "unreachable", lambda address: "no route to host")
    with pytest.raises(RuntimeError, match=f"{spec}: expected to download {repository} .* cannot be reached .no route"):
        resolve(spec)
    monkeypatch.setattr(hub, "unreachable", lambda address: pytest.fail("offline: nothing is looked for"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match="HF_HUB_OFFLINE is set.* pretrained=False random weights"):
        resolve(spec)
    assert asked == []
    (tmp_path / f"models--{repository.replace('/', '--')}" / "snapshots" / "1").mkdir(parents=True)
    resolve(spec)
    assert len(asked) == 1


def test_random_weights_that_were_asked_for_are_no_warning(caplog):
    network, info = resolve("open_clip:ViT-S-32-alt", pretrained=False)
    assert info["weights"] is None and callable(network.encode_image) and caplog.records == []
    open_clip.create_model("ViT-S-32-alt", pretrained=None)
    assert "No pretrained weights loaded" in caplog.text  # else the above would say nothing
    with pytest.raises(ValueError, match="of which open_clip has none for ViT-S-32-alt; pretrained=False gives random"):
        resolve("open_clip:ViT-S-32-alt")


def test_bcosify_of_a_name_tells_of_resolve():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got str \(resolve\('resnet18'\)\[0\] gives"):
        bcosify("resnet18")
