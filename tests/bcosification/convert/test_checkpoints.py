"""Saving and loading: round trips, and what is refused with a reason."""

import json
import os
import pickle
import stat

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from bcosification import bcosify, load
from bcosification import nn as bnn
from bcosification.convert.checkpoints import read_weights, require_writable, save_pretrained
from tests.bcosification.convert.standard_networks import LARGER, MEAN, NETWORKS, STD, make, statistics_of, vit

BUILT = [name for name in NETWORKS if name not in ("sequential", "vit, convolutional stem")]


@pytest.mark.parametrize("name, bias", [*((name, "remove") for name in [*BUILT, *LARGER]), ("densenet", "keep")])
def test_round_trip(name, bias, tmp_path):
    network, images = make(name)
    model = bcosify(network, b=1.75, bias=bias, pool="keep")
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = load(tmp_path / "new" / "folder")
    assert {p.dtype for p in loaded.parameters()} == {torch.float64} and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert loaded.config == model.config
    assert loaded.conversion == model.conversion and loaded.additive_parameters == model.additive_parameters


@pytest.mark.parametrize("name", ["sequential", "vit, convolutional stem"])
def test_round_trip_of_what_cannot_be_built_from_its_config(name, tmp_path):
    network, images = make(name)
    model = bcosify(network, **statistics_of(name))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected model=, the standard network of that class, got None"):
        load(tmp_path)
    template, _ = make(name, seed=5)
    state = {key: value.clone() for key, value in template.state_dict().items()}
    with torch.no_grad():
        assert torch.equal(load(tmp_path, model=template)(images), model(images))
    assert all(torch.equal(value, state[key]) for key, value in template.state_dict().items())


def test_round_trip_after_training_changed_things(tmp_path):
    network, images = make("vit")
    model = bcosify(network, bias="decay")
    model.reset_classifier(3)
    model.remove_biases()
    for module in model.modules():
        if isinstance(module, bnn.BcosLinear):
            module.set_b(1.25)
    model.model.conv_proj.set_b(nn.Parameter(torch.tensor(1.5, dtype=torch.float64)))
    model.config["class_names"] = ["a", "b", "c"]
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-12, atol=1e-12)
    assert isinstance(loaded.model.conv_proj.b, nn.Parameter) and loaded.model.conv_proj.b.item() == 1.5
    assert loaded.config["class_names"] == ["a", "b", "c"] and loaded.num_classes == 3
    assert loaded.config["options"]["b"] == 1.25


def test_layers_may_have_exponents_of_their_own(tmp_path):
    network, images = make("resnet, basic blocks")
    model = bcosify(network)
    model.model.layer2[0].conv1.set_b(1.5, buffer=True)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.model.layer2[0].conv1.b == 1.5 and loaded.model.conv1.b == 2.0
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-10, atol=1e-12)


def test_models_converted_in_another_dtype_are_saved_in_theirs(tmp_path):
    model = bcosify(vit()).half()
    model.save_pretrained(tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    assert {p.dtype for p in load(tmp_path).parameters()} == {torch.float16}


def test_files_are_readable_and_replaced_whole(tmp_path, monkeypatch):
    network, images = make("vit")
    model = bcosify(network)
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["README.md", "config.json", "model.safetensors"]
    mode = stat.S_IMODE((tmp_path / "config.json").stat().st_mode)
    assert mode == stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode)
    (tmp_path / "plain").write_text("")
    assert mode == stat.S_IMODE((tmp_path / "plain").stat().st_mode)  # the umask's, not mkstemp's
    (tmp_path / "plain").unlink()

    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def full_disk(state, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with torch.no_grad():
        model.model.heads.head.weight.zero_()
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_output_folders_that_cannot_be_written_are_named_first(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="expected the output folder to be a folder that can be written to.*file"):
        require_writable(tmp_path / "file")
    with pytest.raises(OSError, match="expected the output folder"):
        save_pretrained(bcosify(vit()), tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == ""
    with pytest.raises(TypeError, match="expected a model made by bcosify, got VisionTransformer"):
        save_pretrained(vit(), tmp_path)


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder written by save_pretrained"):
        load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="expected config.json in"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="to be JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(ValueError, match="with format 1, got None"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 1}')
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"expected model.safetensors .*pytorch_model.bin may hold pickled"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="expected a file of tensors .*, got an empty file"):
        load(tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    bcosify(vit()).save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="expected a safetensors file, got one that cannot be read"):
        load(tmp_path)


def test_another_architecture_is_named_key_by_key(tmp_path):
    bcosify(vit()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architecture"]["num_layers"] = 3
    config["architecture"]["mlp_dim"] = 25
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:
        load(tmp_path)
    text = str(caught.value)
    assert "missing" in text and "model.encoder.layers.encoder_layer_2.ln_1.weight" in text
    assert "mlp.0.weight: expected (25, 12), got (24, 12)" in text


def test_a_template_of_another_class_is_named(tmp_path):
    bcosify(vit()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="missing.*model.bn1.*unexpected.*model.class_token"):
        try:
            load(tmp_path, model=ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5))
        except ValueError as error:
            raise ValueError(str(error).replace("\n", " ")) from None


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_is_refused_and_not_executed(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Malicious()}, "weights.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="weights.pt: expected a file of tensors .* could run code .* refused"):
        read_weights("weights.pt")
    with open("plain.pt", "wb") as file:
        pickle.dump({"a": Malicious()}, file)
    with pytest.raises(ValueError, match="plain.pt: expected a file of tensors"):
        read_weights("plain.pt")
    assert not os.path.exists("executed")


def test_weights_files(tmp_path):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2)}
    for content in (tensors, {"state_dict": tensors, "epoch": 3}, {"model": tensors}):
        torch.save(content, tmp_path / "weights.pth")
        read = read_weights(tmp_path / "weights.pth")
        assert set(read) == {"a", "b"} and torch.equal(read["a"], tensors["a"])
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="got 1 entries without a tensor"):
        read_weights(tmp_path / "none.pt")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="page.pth: expected a file of tensors"):
        read_weights(tmp_path / "page.pth")
    with pytest.raises(FileNotFoundError, match="expected a weights file, found none"):
        read_weights(tmp_path / "missing.pt")


def test_shared_layers_are_saved(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.two, self.fc = self.one, nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(self.two(self.one(self.stem(x))).mean((2, 3)))

    model = bcosify(Twice(), mean=MEAN, std=STD, head="keep").eval()
    model.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 4, 4)
    with torch.no_grad():
        assert torch.equal(load(tmp_path, model=Twice())(images), model(images))
