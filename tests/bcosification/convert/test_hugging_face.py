"""`transformers:` names: CLIP's image towers, what is refused, what is printed, and a Hub out of reach."""

import re

import huggingface_hub
import pytest
import torch

from bcosification import bcosify, load, resolve
from bcosification.convert import hub
from bcosification.convert.text import read_tokenizer

transformers = pytest.importorskip("transformers", reason="the package transformers is not installed (extra: text)")

SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
VISION = dict(**SIZES, image_size=16, patch_size=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of save_pretrained of CLIP in four shapes, and of a ViT."""
    folder = tmp_path_factory.mktemp("clip")
    text = dict(**SIZES, vocab_size=20, max_position_embeddings=8, bos_token_id=0, eos_token_id=1)
    both = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=6)
    vision = transformers.CLIPVisionConfig(**VISION, projection_dim=6)
    for model in (
        transformers.CLIPModel(both),
        transformers.CLIPForImageClassification(both),
        transformers.CLIPVisionModel(vision),
        transformers.CLIPVisionModelWithProjection(vision),
        transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)),
    ):
        model.save_pretrained(folder / type(model).__name__)
    return folder


@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPVisionModelWithProjection"])
def test_the_image_tower_of_clip(folders, tmp_path, kind):
    spec = f"transformers:{folders / kind}"
    tower, info = resolve(spec)
    assert type(tower) is transformers.CLIPVisionModelWithProjection and not tower.training
    assert info["spec"] == spec and info["weights"] and info["num_classes"] is None
    assert info["preprocessing"]["input_size"] == [16, 16]
    whole = getattr(transformers, kind).from_pretrained(folders / kind).eval()
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        if kind == "CLIPModel":
            expected = whole.visual_projection(whole.vision_model(x).pooler_output)
        else:
            expected = whole(x).image_embeds
        assert torch.equal(tower(x).image_embeds, expected)
        converted = bcosify(tower)
        assert converted.config["source"] == spec
        converted.save_pretrained(tmp_path / "m")
        assert torch.equal(load(tmp_path / "m")(x), converted(x))


def test_random_weights_of_the_tower(folders):
    spec = f"transformers:{folders / 'CLIPModel'}"
    (tower, info), (pretrained, _) = resolve(spec, pretrained=False), resolve(spec)
    assert info["weights"] is None and tower.visual_projection.weight.shape == (6, 16)
    assert not torch.equal(tower.visual_projection.weight, pretrained.visual_projection.weight)


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("CLIPVisionModel", {}, "of CLIP's image tower and its projection, got CLIPVisionModel's without visual_proj"),
        ("CLIPForImageClassification", {}, "got CLIPForImageClassification's without visual_projection.weight"),
        ("CLIPModel", {"num_classes": 3}, "expected no num_classes, as CLIP has no classifier, got 3"),
        ("CLIPModel", {"weights": "x"}, "expected the weights to be those of the name or folder, got 'x'"),
        ("ViTForImageClassification", {}, r"\(CLIPVisionModelWithProjection\), got ViTForImageClassification$"),
    ],
)
def test_what_is_refused(folders, kind, options, message):
    with pytest.raises(ValueError, match=rf"transformers:{folders / kind}: .*{message}"):
        resolve(f"transformers:{folders / kind}", **options)


@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPVisionModel", "CLIPForImageClassification"])
def test_bcosify_tells_which_class_of_clip_it_takes(folders, kind):
    model = getattr(transformers, kind).from_pretrained(folders / kind)
    with pytest.raises(ValueError, match=rf"expected CLIP's image tower .*, CLIPVisionModelWithProjection .*{kind}$"):
        bcosify(model)


@pytest.mark.parametrize("name", ["/nowhere/there", "./there", "a/b/c"])
def test_paths_at_which_nothing_is(name):
    with pytest.raises(FileNotFoundError, match=f"transformers:{name}: .*NAME or USER/NAME.*, found no such folder"):
        resolve(f"transformers:{name}")


def test_nothing_is_printed(folders, capfd):
    """Neither transformers' bar nor its list of weights that are left out (of CLIPModel the text tower's)."""
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    resolve(f"transformers:{folders / 'CLIPModel'}")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert before[1], "the bar would not have been shown anyway"
    transformers.CLIPModel.from_pretrained(folders / "CLIPModel")
    assert "Loading weights" in capfd.readouterr().err


@pytest.mark.parametrize("options", [{}, {"pretrained": False}])
def test_a_hub_out_of_reach_is_told_at_once(options, monkeypatch, tmp_path):
    """Not after the retries of huggingface_hub, which take most of a minute; of random weights, too, whose
    configuration has to be downloaded."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name: pytest.fail("it was asked for"))
    monkeypatch.setattr(hub, "unreachable", lambda address: "no route to host")
    told = "transformers:me/bert: expected to download me/bert .*no route.*; transformers:FOLDER takes a folder of"
    with pytest.raises(RuntimeError, match=told):
        resolve("transformers:me/bert", **options)


def test_a_tokenizer_out_of_reach_is_told_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "unreachable", lambda address: "no route to host")
    told = re.escape("tokenizer: expected to download me/bert from the Hugging Face Hub, but")
    with pytest.raises(RuntimeError, match=told):
        read_tokenizer("me/bert")
    with pytest.raises(ValueError, match="expected one of transformers at 'me/bert'"):
        read_tokenizer("me/bert", local_files_only=True)
