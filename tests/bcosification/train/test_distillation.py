"""Distillation runs end to end on a small CLIP model: loss by hand, resuming, what is stored, folders of images."""

import copy
import csv
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from open_clip.loss import SigLipLoss
from PIL import Image

import bcosification
from bcosification import DistillConfig, bcosify, distill
from bcosification.convert.clip import StandardCLIP
from bcosification.train.data import build_datamodule, check_source
from bcosification.train.lightning_module import DistillationModule
from tests.bcosification.convert.b_cosification_clip import clip_tower
from tests.bcosification.convert.families.test_open_clip_timm import POOLED, coca, whole
from tests.bcosification.small_clip import MEAN, STD, TEXTS, clip
from tests.bcosification.train.small import STATISTICS, small_network


def small(name="resnet"):
    return clip(name).float()


def config(output, **changes):
    options = dict(
        data="scenes", output=str(output), epochs=3, batch_size=8, limit_batches=2, lr=1e-3, progress=False,
        accelerator="cpu",
    )  # fmt: skip
    return DistillConfig(**(options | changes))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_what_it_says(tmp_path, capsys):
    model = small()
    before = copy.deepcopy(model.state_dict())
    result = distill(config(tmp_path / "run", with_text=True), model=model)
    assert equal(before, model.state_dict())
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "metrics.csv", "training_curves.png", "backends.json", "last.ckpt", "last", "best",
    }  # fmt: skip
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    assert [float(row["val_cosine"]) for row in rows] == [row["val_cosine"] for row in result.history]
    assert result.best == max(row["val_cosine"] for row in result.history) and "val_top1" not in rows[0]
    told = yaml.safe_load((folder / "config.yaml").read_text())
    assert (told["loss"], told["agc"], told["logit_scale"], told["logit_bias"]) == ("siglip", 0.01, 10.0, -10.0)
    out = capsys.readouterr().out
    assert "labels not used" in out and "validation: loss" in out and ", cosine 0." in out
    last = bcosification.load(folder / "last")
    assert equal(last.state_dict(), result.model.state_dict())
    texts = bcosify(model).encode_texts(TEXTS)
    torch.testing.assert_close(last.encode_texts(TEXTS), texts)
    torch.testing.assert_close(result.model.encode_texts(TEXTS), texts)
    # The cosine in the file is that of the weights in the folder, measured by other code.
    best = bcosification.load(folder / "best")
    teacher = StandardCLIP(model, MEAN, STD)
    loader = build_datamodule("scenes", image_size=64, batch_size=8, labelled=False).val_dataloader()
    with torch.no_grad():
        cosines = [F.cosine_similarity(best(x), teacher(x)) for (x, _), _ in zip(loader, range(2), strict=False)]
    assert torch.cat(cosines).mean().item() == pytest.approx(result.best, abs=1e-5)


def test_the_student_comes_closer_to_its_teacher(tmp_path):
    model = small("vit")
    result = distill(config(tmp_path / "run", limit_batches=12, epochs=4, lr=3e-3, b=1.5), model=model)
    for name in ("train_loss", "val_loss"):
        assert result.history[-1][name] < result.history[0][name] - 0.1


def test_the_loss_is_siglips():
    student, teacher = bcosify(small()), StandardCLIP(small(), MEAN, STD)
    module = DistillationModule(student, teacher, logit_scale=7.0, logit_bias=-3.0)
    module.siglip = SigLipLoss()
    images = torch.rand(3, 3, 64, 64)
    logged = {}
    module.log = lambda name, value, **_: logged.setdefault(name, float(value))
    loss = module.training_step((images, torch.zeros(3)), 0)
    a, b = F.normalize(module.model(images), dim=-1), F.normalize(teacher(images), dim=-1)
    expected = 0.0
    for i in range(3):
        for j in range(3):
            logit = 7 * (a[i] @ b[j]).item() - 3
            expected += math.log1p(math.exp(-logit if i == j else logit)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-4) and logged == {"train_loss": loss.item()}
    module.validation_step((images, torch.zeros(3)), 0)
    assert logged["val_cosine"] == pytest.approx(float((a * b).sum(1).mean()), rel=1e-5)
    # Only the image tower is trained and in the state.
    assert {name.split(".")[0] for name in module.state_dict()} == {"model"}
    assert not any("text" in name or "logit" in name for name in module.state_dict())
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    "changes", [dict(), dict(b_epochs=2.5, bias="decay", bias_epochs=1.5, optimizer="adamw", weight_decay=0.05)]
)
def test_resumed_equals_uninterrupted(tmp_path, changes, monkeypatch):
    whole = distill(config(tmp_path / "whole", **changes), model=small())

    class Stop(Exception):
        pass

    step = DistillationModule.training_step

    def stopping(self, batch, batch_idx):
        if self.trainer.current_epoch == 2 and batch_idx == 1:
            raise Stop
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DistillationModule, "training_step", stopping)
    with pytest.raises(Stop):
        distill(config(tmp_path / "parts", **changes), model=small())
    monkeypatch.undo()
    torch.manual_seed(99)
    resumed = distill(config(tmp_path / "parts", **changes), model=small(), resume=True)
    assert equal(whole.model.state_dict(), resumed.model.state_dict())
    for name in ("train_loss", "val_loss", "val_cosine"):
        assert [row[name] for row in whole.history] == [row[name] for row in resumed.history]
    with pytest.raises(ValueError, match="distill: expected the options of the run .*logit_scale=10.0; got"):
        distill(config(tmp_path / "parts", **changes, logit_scale=5.0), model=small(), resume=True)


def test_what_is_refused(tmp_path):
    for changes, message in (
        (dict(loss="bce"), r"distill: expected loss in \('siglip',\), got 'bce'"),
        (dict(logit_scale=0.0), "distill: expected logit_scale > 0, got 0.0"),
        (dict(clip_norm=1.0), "distill: expected agc= or clip_norm=, got both"),
        (dict(image_size=48),
         r"distill: expected image_size to be one that CLIP and its teacher can take \(their own: 32 x 32\), got 48"),
        (dict(data="nowhere"), "data: expected one of digits, scenes, or a folder of images"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            distill(config(tmp_path / "run", **changes), model=small("vit"))
    with pytest.raises(ValueError, match=r"expected a CLIP model \(open_clip:NAME/TAG, .*\) .*, got resnet18"):
        distill(config(tmp_path / "run", model="resnet18", pretrained=False))
    classifier = bcosify(small_network(), **STATISTICS)
    with pytest.raises(ValueError, match="or the folder of a converted one, got BcosifiedModel, a conversion of torch"):
        distill(config(tmp_path / "run"), model=classifier)
    assert not (tmp_path / "run").exists()


def test_a_converted_student_and_another_teacher(tmp_path, monkeypatch):
    model, other = small(), clip("resnet", seed=5).float()
    student = bcosify(model)
    student.config["source"] = "open_clip:RN50/openai"
    asked = []

    def resolve(spec, **options):
        asked.append(spec)
        return (model if spec == "open_clip:RN50/openai" else other), {}

    monkeypatch.setattr("bcosification.convert.resolver.resolve", resolve)
    result = distill(config(tmp_path / "own", epochs=1), model=student)
    assert asked == ["open_clip:RN50/openai"] and len(result.history) == 1
    first = distill(config(tmp_path / "other", epochs=1, teacher="open_clip:RN50/cc12m"), model=small())
    assert asked[1:] == ["open_clip:RN50/cc12m"]
    assert first.history[0]["val_cosine"] != result.history[0]["val_cosine"]


@pytest.mark.parametrize("kind", ["siglip", "coca"])
def test_timms_towers_and_cocas_are_distilled(kind, tmp_path):
    model = (whole("ViT-B-16-SigLIP") if kind == "siglip" else coca(**POOLED)).float()
    result = distill(config(tmp_path / "run", epochs=1), model=model)
    size = 16 if kind == "siglip" else 32
    assert result.model.config["input_size"] == [size, size] and -1 <= result.best <= 1
    images = torch.rand(2, 3, size, size)
    last = bcosification.load(tmp_path / "run" / "last", model=model)
    with torch.no_grad():
        assert torch.equal(last(images), result.model(images))
    assert last.logit_scale.item() == model.logit_scale.item()
    assert (last.logit_bias is None) == (kind == "coca"), "SigLIP's own, not that of the loss"


def test_a_peers_tower_is_trained_on(tmp_path, monkeypatch):
    whole_model = small()
    student = bcosification.load_peer({k: v.float() for k, v in clip_tower((1, 1, 1, 1)).state_dict().items()})
    student.config["text"] = {**bcosify(whole_model).config["text"], "model": "open_clip:RN50/openai"}
    monkeypatch.setattr("bcosification.convert.resolver.resolve", lambda spec, **_: ({
        "open_clip:RN50/openai": whole_model}[spec], {}))  # fmt: skip
    student.save_pretrained(tmp_path / "student")
    result = distill(config(tmp_path / "run", epochs=1), model=bcosification.load(tmp_path / "student"))
    assert math.isfinite(result.best) and result.model.config["peer_layout"] == "b-cosification"


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def test_folders_of_images_without_labels(tmp_path):
    for i in range(40):
        picture(tmp_path / "flat" / ("deep/er" if i % 2 else "") / f"{i}.png", i)
    (tmp_path / "flat" / "broken.jpg").write_bytes(b"no image")
    data = build_datamodule(tmp_path / "flat", image_size=32, batch_size=4, labelled=False)
    paths = [{path for path, _ in part.samples} for part in (data.train, data.val)]
    assert not paths[0] & paths[1] and len(paths[0] | paths[1]) == 40 and len(paths[1]) in (1, 2)
    assert [path.rpartition("/")[2] for path, _ in data.unreadable] == ["broken.jpg"]
    again = build_datamodule(tmp_path / "flat", image_size=32, labelled=False)
    assert {path for path, _ in again.val.samples} == paths[1]
    assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 32, 32)
    for i in range(3):
        picture(tmp_path / "split" / ("val" if i == 0 else "train") / f"{i}.png", i)
    data = build_datamodule(tmp_path / "split", image_size=32, labelled=False)
    assert (len(data.train), len(data.val)) == (2, 1) and data.what == "labels not used"
    (tmp_path / "empty").mkdir()
    check_source(tmp_path / "empty", labelled=False)
    with pytest.raises(FileNotFoundError, match="expected at least two images .* in it, found 0"):
        build_datamodule(tmp_path / "empty", labelled=False)


def test_a_folder_is_distilled_from(tmp_path):
    for i in range(12):
        picture(tmp_path / "images" / f"{i}.png", i)
    result = distill(config(tmp_path / "run", data=str(tmp_path / "images"), epochs=1, num_workers=0), model=small())
    assert result.history[0]["step"] == 1 and math.isfinite(result.best)
    assert result.model.config["input_size"] == [64, 64] and result.model.config["interpolation"] == "bicubic"


def test_a_size_that_only_the_student_takes_is_refused(tmp_path):
    """A converted ResNet has no positional embedding, its teacher has one for 64 pixels."""
    with pytest.raises(ValueError, match="distill: expected image_size to be one that CLIP and its teacher can take"):
        distill(config(tmp_path / "run", image_size=96), model=small())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["resnet18", "timm:resnet18", "torchvision:resnet18"])
def test_what_is_no_clip_model_is_refused_before_anything_is_loaded(model, tmp_path):
    with pytest.raises(ValueError, match=rf"distill: expected a CLIP model \(open_clip:NAME/TAG, .*\) .* got {model}"):
        distill(config(tmp_path / "run", model=model))
    assert not (tmp_path / "run").exists()
