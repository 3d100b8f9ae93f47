"""The commands on CLIP models: distill, explain with texts, zero-shot evaluation, convert with the text tower."""

import copy
import json

import open_clip
import pytest
import torch
from PIL import Image

import bcosification
from bcosification.cli import main
from bcosification.convert.clip import StandardCLIP
from bcosification.evaluation import evaluate_zero_shot
from bcosification.train.data import build_datamodule, scenes
from tests.bcosification.small_clip import MEAN, STD, clip
from tests.bcosification.train.test_shards import shard

SPEC = "open_clip:RN50/openai"


def small_model():
    model = clip("resnet").float()
    told = dict(size=64, mean=MEAN, std=STD, interpolation="bicubic", resize_mode="shortest", mode="RGB", fill_color=0)
    open_clip.model.set_model_preprocess_cfg(model, told)
    return model


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    """open_clip's names give small models, so that nothing is downloaded."""
    model = small_model()
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained=None: copy.deepcopy(model))
    return model


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        model = small_model()
        patch.setattr(open_clip, "create_model", lambda name, pretrained=None: copy.deepcopy(model))
        folder = tmp_path_factory.mktemp("clip") / "run"
        tiny = "--data scenes --epochs 1 --batch-size 8 --limit-batches 2 --accelerator cpu --no-progress".split()
        assert main(["distill", "--model", SPEC, *tiny, "--lr", "1e-3", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def scene_files(tmp_path):
    val, files = scenes("val", count=4), []
    for i in range(2):
        path = tmp_path / "images" / f"scene{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(val.images[i].permute(1, 2, 0).numpy()).save(path)
        files.append(str(path))
    return files


def test_distill_resumes(run_folder, tmp_path, capsys):
    assert f"model: {SPEC}" in (run_folder / "config.yaml").read_text()
    model = bcosification.load(run_folder / "best")
    assert model.config["source"] == model.config["text"]["model"] == SPEC and model.text is None
    assert main(["distill", "--resume", "--out", str(run_folder)]) == 0
    out = capsys.readouterr().out
    assert "is complete; --resume --epochs N with N > 1" in out and "1 epoch; cosine with the teacher 0." in out
    assert main(["distill", "--resume", "--out", str(run_folder), "--logit-scale", "3"]) == 2
    assert "--logit-scale 10.0; got --logit-scale 3.0: another run" in capsys.readouterr().err
    out = ["--data", "scenes", "--out", str(tmp_path / "x")]
    assert main(["distill", *out]) == 2
    assert "expected --model" in capsys.readouterr().err
    assert main(["distill", "--model", "resnet18", "--no-pretrained", *out]) == 2
    message = "expected a CLIP model (open_clip:NAME/TAG, or transformers:NAME) or the folder of a converted one, got "
    assert f"{message}resnet18" in capsys.readouterr().err


def test_explain_with_texts(run_folder, scene_files, tmp_path, capsys):
    out = tmp_path / "pictures"
    texts = ["the digit seven", "a dog"]
    options = ["--out", str(out), "--text", *texts, "--text-model", SPEC]
    assert main(["explain", str(run_folder), *scene_files, *options, "--attention-pool", "unpool", "--power", "2"]) == 0
    told = capsys.readouterr().out
    assert "scene0.png: cosines with 'the digit seven' " in told and "NAME_textNUMBER_explanation.png" in told
    names = {f"scene{i}_{kind}.png" for i in range(2) for kind in ("image", *(
        f"text{t}_{what}" for t in range(2) for what in ("explanation", "contributions")))}  # fmt: skip
    assert {path.name for path in out.iterdir()} == names | {"explanations.json", "overview.png"}
    model = bcosification.load(run_folder / "best", model=open_clip.create_model("RN50"))
    model.set_attention_pool("unpool", p=2)
    images = torch.stack([model.transform(Image.open(file)) for file in scene_files])
    expected = bcosification.explain(model, images, text=texts)
    summary = json.loads((out / "explanations.json").read_text())
    for i in range(2):
        cosines = [entry["cosine"] for entry in summary[i]["texts"]]
        assert cosines == pytest.approx(expected.logits[i].tolist(), abs=1e-5)


def test_explain_says_what_is_missing(run_folder, scene_files, tmp_path, capsys):
    out = ["--out", str(tmp_path / "x")]
    for options, message in (
        ([], "expected --text for a CLIP model"),
        (["--text", "a dog"], f"which was saved without: --text-model {SPEC} reads it again (--with-text of convert"),
        (["--text", "a dog", "--text-model", SPEC, "--target", "3"], "expected"),
        (["--text", "a dog", "--text-model", SPEC, "--power", "0.5"], "expected p >= 1"),
        (["--text", "a dog", "--text-model", SPEC, "--templates", "no place"], "expected 'openai', 'simple', or texts"),
    ):
        assert main(["explain", str(run_folder), *scene_files, *out, *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_zero_shot_before_and_after(run_folder, small_models, tmp_path, capsys):
    names = tmp_path / "names.txt"
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    names.write_text("\n".join(words) + "\n")
    shared = ["--data", "scenes", "--zero-shot", "--class-names", str(names), "--templates", "the digit {}", "a {}"]
    assert main(["evaluate", SPEC, *shared, "--no-pretrained"]) == 0
    before = capsys.readouterr().out
    assert main(["evaluate", str(run_folder), *shared, "--text-model", SPEC]) == 0
    after = capsys.readouterr().out
    loader = build_datamodule("scenes", image_size=64, evaluation_only=True).val_dataloader()
    model = bcosification.load(run_folder / "best", model=small_models)
    standard = StandardCLIP(small_models, MEAN, STD)
    for text, network in ((before, standard), (after, model)):
        result = evaluate_zero_shot(network, loader, words, ["the digit {}", "a {}"], progress=False)
        assert text == f"images 600, top-1 {100 * result['top1']:.2f} %, top-5 {100 * result['top5']:.2f} %\n"


def test_zero_shot_says_what_is_missing(run_folder, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\n")
    for arguments, message in (
        ([str(run_folder)], "expected --zero-shot for a CLIP model"),
        ([SPEC], "expected --zero-shot for a CLIP model"),
        ([str(run_folder), "--zero-shot"], f"which was saved without: --text-model {SPEC} reads it again"),
        (
            ["resnet18", "--no-pretrained", "--zero-shot"],
            "--zero-shot: expected a CLIP model with its text tower (open_clip:NAME/TAG), got resnet18 (ResNet)",
        ),
        ([SPEC, "--zero-shot", "--class-names", str(names)], "--class-names: expected 10 names, one a line"),
    ):
        options = [] if "--no-pretrained" in arguments or str(run_folder) in arguments else ["--no-pretrained"]
        assert main(["evaluate", *arguments, *options, "--data", "scenes"]) == 2
        assert message in capsys.readouterr().err


def test_convert_and_verify(small_models, tmp_path, capsys):
    options = ["--no-pretrained", "--out", str(tmp_path / "c"), "--with-text", "--attention-pool", "unpool"]
    assert main(["convert", SPEC, *options]) == 0
    assert "bcosify distill --model" in capsys.readouterr().out
    loaded = bcosification.load(tmp_path / "c")
    assert loaded.attention_pool == "unpool"
    expected = bcosification.bcosify(small_models).encode_texts(["a dog"])
    torch.testing.assert_close(loaded.encode_texts(["a dog"]), expected)
    assert main(["verify", str(tmp_path / "c"), "--no-pretrained"]) == 0
    assert "attention pooling without positional embedding and biases" in capsys.readouterr().out
    assert main(["convert", "resnet18", "--no-pretrained", "--out", str(tmp_path / "d"), "--with-text"]) == 2
    assert "--with-text: expected a CLIP model, got resnet18" in capsys.readouterr().err


def test_what_texts_a_folder_of_random_weights_has(scene_files, small_models, tmp_path, capsys):
    folder = tmp_path / "random"
    assert main(["convert", SPEC, "--no-pretrained", "--out", str(folder)]) == 0
    explain = ["explain", str(folder), *scene_files, "--out", str(tmp_path / "x"), "--text", "a dog"]
    assert main(explain) == 2
    error = capsys.readouterr().err
    assert "made of open_clip:RN50 with random weights" in error and "--with-text of convert and distill" in error
    assert "--text-model open_clip:RN50/TAG takes pretrained ones" in error
    bare = tmp_path / "bare"
    bcosification.bcosify(small_models.visual).save_pretrained(bare)
    assert main(["explain", str(bare), *explain[2:]]) == 2
    error = capsys.readouterr().err
    assert f"got {bare}, which was made of a bare image tower: --text-model takes the open_clip model" in error


def test_the_attention_pool_of_a_model_without_one_is_refused_by_its_name(tmp_path, capsys):
    arguments = ["convert", "resnet18", "--no-pretrained", "--out", str(tmp_path / "x"), "--attention-pool", "unpool"]
    assert main(arguments) == 2
    assert "--attention-pool: expected a CLIP model, got resnet18 (torchvision" in capsys.readouterr().err


def test_benchmark_of_a_tower(run_folder, tmp_path, capsys):
    options = ["--batch", "2", "--rounds", "1", "--no-compile", "--device", "cpu"]
    for spec in (SPEC, str(run_folder)):
        assert main(["benchmark", spec, *options, "--json", str(tmp_path / "rows.json")]) == 0
        out = capsys.readouterr().out
        assert "its embeddings are compared with 1,000 random directions" in out
        rows = json.loads((tmp_path / "rows.json").read_text())
        assert rows["settings"]["texts"] == 1000 and len(rows["rows"]) == 9
        assert all(row["images_per_s"] > 0 for row in rows["rows"])
    assert main(["benchmark", SPEC, *options, "--size", "48"]) == 2
    assert "expected a size that the model takes, got 48 x 48" in capsys.readouterr().err


def test_distil_from_shards(tmp_path, capsys):
    for name, count in (("0", 9), ("1", 5)):
        shard(tmp_path / "shards" / f"{name}.tar", range(count))
    tiny = "--epochs 1 --batch-size 4 --accelerator cpu --no-progress --num-workers 0".split()
    data = f"{tmp_path}/shards/{{0..1}}.tar"
    assert main(["distill", "--model", SPEC, *tiny, "--data", data, "--out", str(tmp_path / "run")]) == 0
    assert "images to train on" in capsys.readouterr().out
    assert main(["finetune", "--model", "resnet18", "--no-pretrained", *tiny, "--data", data, "--out", "x"]) == 2
    assert "read without labels: distill takes them" in capsys.readouterr().err


def test_what_trains_classifiers_takes_no_clip(tmp_path, capsys):
    run = ["--data", "digits", "--out", str(tmp_path / "x"), "--no-pretrained"]
    for command in ("finetune", "sweep"):
        assert main([command, "--model", SPEC, *run]) == 2
        error = capsys.readouterr().err
        assert f"error: expected a classifier of images, got {SPEC} (open_clip." in error, error
        assert "which has no classes; distill trains CLIP's image towers" in error


def test_a_misspelt_name_of_templates_is_told_before_a_model_is_read(run_folder, scene_files, monkeypatch, capsys):
    monkeypatch.setattr(bcosification, "load", lambda *a, **k: pytest.fail("the model was read first"))
    monkeypatch.setattr("bcosification.convert.resolver.resolve", lambda *a, **k: pytest.fail("the model was read"))
    for command in (
        ["explain", str(run_folder), *scene_files, "--out", "x", "--text", "a dog"],
        ["evaluate", SPEC, "--data", "digits", "--zero-shot"],
    ):
        assert main([*command, "--templates", "opnai"]) == 2
        error = capsys.readouterr().err
        assert "error: --templates: expected 'openai', 'simple', or texts" in error
        assert "got ['opnai']; did you mean openai?" in error
