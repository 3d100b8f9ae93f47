"""The Hugging Face Hub, offline: folders, what would be uploaded, what is downloaded, and the model card."""

import copy
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, ModelHubMixin

import bcosification
from bcosification import BcosifiedModel, bcosify
from bcosification.convert import hub
from bcosification.convert.hub import model_card
from tests.bcosification.convert.standard_networks import MEAN, STD, make, sequential, vit

UNREACHABLE = hub.unreachable  # conftest.py replaces it for all tests


@pytest.fixture
def converted():
    network, images = make("vit")
    return bcosify(network), images


def test_folders_are_read_as_load_reads_them(converted, tmp_path):
    model, images = converted
    assert model.save_pretrained(tmp_path / "m") is None
    assert sorted(os.listdir(tmp_path / "m")) == ["README.md", "config.json", "model.safetensors"]
    for loaded in (BcosifiedModel.from_pretrained(tmp_path / "m"), BcosifiedModel.from_pretrained(str(tmp_path / "m"))):
        assert isinstance(loaded, ModelHubMixin) and not loaded.training
        assert loaded.config == bcosification.load(tmp_path / "m").config == model.config
        with torch.no_grad():
            assert torch.equal(loaded(images), model(images))
    assert [module for module in loaded.modules() if isinstance(module, ModelHubMixin)] == [loaded]
    for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        with torch.no_grad():
            assert torch.equal(other(images), model(images))


def test_other_options_are_named(converted, tmp_path):
    converted[0].save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="expected options among revision, token, .*; got revison"):
        BcosifiedModel.from_pretrained(tmp_path, revison="v1")


def test_a_network_that_config_cannot_build_is_given(tmp_path):
    model = bcosify(sequential(), mean=MEAN, std=STD)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected model=, the standard network"):
        BcosifiedModel.from_pretrained(tmp_path)
    loaded = BcosifiedModel.from_pretrained(tmp_path, model=sequential())
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


class FakeApi:
    """Takes what would be uploaded."""

    uploads: list = []

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, private=None, exist_ok=False, **_):
        assert exist_ok
        FakeApi.private = private
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, repo_type, commit_message, **_):
        files = {str(path.relative_to(folder_path)): path.read_bytes() for path in Path(folder_path).rglob("*")}
        FakeApi.uploads.append((repo_id, repo_type, commit_message, files, self.token))
        return f"https://hub/{repo_id}/commit/1"


def test_what_push_to_hub_uploads_is_what_from_pretrained_reads(converted, tmp_path, monkeypatch):
    model, images = converted
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "uploads", [])
    card = {"license": "apache-2.0", "notes": "Trained on a laptop."}
    options = dict(private=True, token="t", commit_message="First", model_card_kwargs=card)
    assert model.push_to_hub("me/vit-bcos", **options) == "https://hub/me/vit-bcos/commit/1"
    ((repo, kind, message, files, token),) = FakeApi.uploads
    assert (repo, kind, message, token, FakeApi.private) == ("me/vit-bcos", "model", "First", "t", True)
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    text = files["README.md"].decode()
    assert ModelCard(text).data.license == "apache-2.0" and "Trained on a laptop." in text

    # And back, from a repository that holds more than it should.
    repository = tmp_path / "repository"
    repository.mkdir()
    for name, content in files.items():
        (repository / name).write_bytes(content)
    asked = []

    def snapshot_download(repo_id, *, allow_patterns, **options):
        asked.append((repo_id, options.get("revision")))
        folder = tmp_path / f"cache{len(asked)}"
        folder.mkdir()
        for file in (file for pattern in allow_patterns for file in repository.glob(pattern)):
            shutil.copy(file, folder)
        return str(folder)

    (repository / "pytorch_model.bin").write_bytes(b"a pickle")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(
        "huggingface_hub.hub_mixin.hf_hub_download", lambda repo_id, filename, **_: str(repository / filename)
    )
    loaded = BcosifiedModel.from_pretrained("me/vit-bcos", revision="v1")
    assert asked == [("me/vit-bcos", "v1")] and sorted(os.listdir(tmp_path / "cache1")) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    # What was loaded and changed is pushed as it is now, not as it was read.
    loaded.reset_classifier(3)
    loaded.save_pretrained(tmp_path / "vit3", push_to_hub=True, commit_message="Three classes")
    repo, _, message, files, _ = FakeApi.uploads[-1]
    assert (repo, message) == ("vit3", "Three classes") and json.loads(files["config.json"])["num_classes"] == 3


def test_a_card_of_ones_own_is_kept(converted, tmp_path):
    model, _ = converted
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_card_tells_what_the_model_is(monkeypatch):
    model = bcosify(vit())
    card = ModelCard(model_card(model))  # huggingface_hub reads its metadata
    assert card.data.library_name == "bcosification" and card.data.pipeline_tag == "image-classification"
    assert card.data.license == "other" and card.data.base_model is None
    assert "not fine-tuned since the conversion" in card.text and "16 × 16 pixels" in card.text
    assert "the licence of a `torchvision.models.vision_transformer.VisionTransformer` holds" in card.text
    changed = sum(entry["was"] != entry["becomes"] for entry in model.conversion)
    assert f"{changed} layers became" in card.text and "B = 2; biases: remove" in card.text
    model.config |= {"source": "torchvision:vit_b_16", "source_weights": None}
    card = ModelCard(model_card(model))
    assert card.data.license is None and "license" not in card.text.partition("---\n\n")[0]
    assert "(weights: random)" in card.text and "start from random ones, so nobody else's licence" in card.text
    assert ModelCard(model_card(model, license="mit")).data.license == "mit"
    model.config |= {"source": "timm:vit_tiny_patch16_224.augreg_in21k", "source_weights": "vit"}
    model.config |= {"finetuned_on": "birds", "class_names": ["jay", "wren"]}
    card = ModelCard(model.generate_model_card().content)
    assert card.data.base_model == "timm/vit_tiny_patch16_224.augreg_in21k"
    assert "fine-tuned on `birds`" in card.text and "not fine-tuned" not in card.text and "(jay, wren)" in card.text
    given = ModelCard(model_card(model, base_model="me/x", license="mit"))
    assert (given.data.base_model, given.data.license) == ("me/x", "mit") and "## Licence\n\n`mit`." in given.text
    code = card.text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    features = bcosify(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)), mean=MEAN, std=STD, b=1, bias="keep")
    card = ModelCard(model_card(features))
    assert card.data.pipeline_tag == "image-feature-extraction" and "not fine-tuned" not in card.text


def test_the_cards_code_runs(converted, tmp_path, monkeypatch):
    from PIL import Image

    model, _ = converted
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("m")
    Image.new("RGB", (40, 30), (200, 30, 90)).save("photo.jpg")
    code = (tmp_path / "m" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    model.float().save_pretrained("m")
    found = {}
    exec(code.replace("REPOSITORY_OR_FOLDER", "m"), found)
    total = found["explanation"].contributions.sum((1, 2)) + found["explanation"].constant
    torch.testing.assert_close(total, found["logits"].amax(1), rtol=1e-4, atol=1e-4)
    assert list(Path("pictures").glob("*.png"))


def test_without_huggingface_hub_folders_work_and_the_rest_names_the_pip_line(converted, tmp_path):
    model, _ = converted
    model.save_pretrained(tmp_path / "m")
    code = f"""
import sys
sys.modules["huggingface_hub"] = None
import bcosification
model = bcosification.BcosifiedModel.from_pretrained({str(tmp_path / "m")!r})
model.save_pretrained({str(tmp_path / "again")!r})
for call in (lambda: model.push_to_hub("me/x"), lambda: model.generate_model_card(),
             lambda: bcosification.BcosifiedModel.from_pretrained("me/x"),
             lambda: model.save_pretrained({str(tmp_path / "again")!r}, push_to_hub=True)):
    try:
        call()
    except RuntimeError as error:
        assert "pip install huggingface_hub" in str(error), error
    else:
        raise AssertionError("expected a RuntimeError that names the pip line")
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "done", done.stderr
    assert (tmp_path / "again" / "README.md").is_file()


def test_only_weights_and_configuration_are_read():
    assert hub.REPOSITORY_FILES == ("config.json", "model.safetensors")
    assert hub.TOKENIZER_FILES == ("tokenizer/*.json", "tokenizer/*.txt")


def test_what_can_be_reached(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert UNREACHABLE(f"http://127.0.0.1:{port}/models") is None
    told = UNREACHABLE(f"http://127.0.0.1:{port}")
    assert told and "refused" in told.lower()
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")  # who knows what it can reach
    assert UNREACHABLE(f"http://127.0.0.1:{port}") is None


def test_a_repository_out_of_reach_is_told_at_once(monkeypatch):
    monkeypatch.setattr(hub, "unreachable", lambda address: "no route to host")
    with pytest.raises(RuntimeError, match=r"from_pretrained\('me/none'\): expected to download me/none .*no route"):
        BcosifiedModel.from_pretrained("me/none")
