"""bcosify finetune on real digits: runs, resuming, recipes."""

import re
import shutil

import pytest
from PIL import Image

import bcosification
from bcosification import resolve
from bcosification.cli import main
from bcosification.train import finetuning
from bcosification.train.configuration import FinetuneConfig, load_recipe, recipes
from bcosification.train.run_folder import saved_config


def test_finetune_writes_the_configuration_that_was_asked_for(run_folder):
    text = (run_folder / "config.yaml").read_text()
    for line in ("model: resnet18", "lr: 0.001", "batch_size: 8", "pretrained: false", "limit_batches: 2"):
        assert line in text
    assert (run_folder / "last" / "model.safetensors").is_file()


def test_resume_needs_the_folder_alone(run_folder, capsys):
    assert main(["finetune", "--resume", "--out", str(run_folder)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"the run in {run_folder} is complete; --resume --epochs N with N > 1 goes on with it\n")
    assert "\n1 epoch; validation top-1" in out


def test_resume_refuses_other_options_by_name(run_folder, capsys):
    changed = ["--lr", "0.5", "--optimizer", "adamw", "--agc", "0.1", "--head", "keep", "--recipe", "scenes"]
    assert main(["finetune", "--resume", "--out", str(run_folder), *changed]) == 2
    error = capsys.readouterr().err
    theirs, ours = re.search(r"the run that is resumed \(.*config.yaml\), (.*); got (.*): another run", error).groups()
    before = ["--model resnet18", "--data digits", "--batch-size 8", "--lr 0.001", "--optimizer adam"]
    before += ["--warmup-epochs 0.0", "no --agc", "no --head"]
    now = ["--model torchvision:resnet18", "--data scenes", "--batch-size 64", "--lr 0.5", "--optimizer adamw"]
    now += ["--warmup-epochs 0.5", "--agc 0.1", "--head keep"]
    assert (theirs.split(", "), ours.split(", ")) == (before, now)
    assert main(["finetune", "--resume", "--out", str(run_folder), "--no-augment"]) == 2
    assert "config.yaml), no --no-augment; got --no-augment: another run" in capsys.readouterr().err
    assert main(["finetune", "--resume", "--out", str(run_folder), "--num-workers", "0", "--seed", "0"]) == 0


def test_going_on_with_a_complete_run(run_folder, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    assert main(["finetune", "--resume", "--out", str(folder), "--epochs", "2", "--no-progress"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("going on after epoch 1 of 2\n") and "\n2 epochs; validation" in out
    assert re.findall(r"^epoch (\d) of 2: training: loss", out, re.M) == ["2"]
    assert main(["finetune", "--resume", "--out", str(folder), "--epochs", "1"]) == 2
    assert "expected --epochs >= 2, which the run in" in capsys.readouterr().err


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_taken(name, tmp_path, monkeypatch):
    """The recipe's values and the command line's reach the run; a tiny run of two recipes is another test."""
    seen = []

    def take(config, *, resume):
        config.check()
        seen.append(config)
        row = {"epoch": 1, "val_top1": 0.5}
        return finetuning.FinetuneResult(tmp_path, [row], None, 0.5, [])

    monkeypatch.setattr(finetuning, "finetune", take)
    out = str(tmp_path / "run")
    assert main(["finetune", "--recipe", name, "--data", "digits", "--out", out, "--seed", "7"]) == 0
    values = load_recipe(name) | {"data": "digits", "output": out, "seed": 7}
    assert seen == [FinetuneConfig(**values)]
    assert resolve(values["model"], pretrained=False)[1]["library"] == "torchvision"


@pytest.mark.parametrize("name", ["digits", "imagenet_resnet18"])
def test_a_recipe_runs(name, tmp_path, capsys):
    tiny = "--no-pretrained --epochs 1 --limit-batches 2 --batch-size 4 --accelerator cpu --no-progress".split()
    folder = tmp_path / "run"
    assert main(["finetune", "--recipe", name, "--data", "digits", "--out", str(folder), *tiny]) == 0
    config = saved_config(folder)
    assert (config.agc, config.lr) == ((0.01, 1e-4) if name.startswith("imagenet") else (None, 1e-3))
    model = bcosification.load(folder / "best")
    assert model.num_classes == 10 and all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert re.search(r"^epoch 1 of 1: training: loss \d.*; validation: loss \d", capsys.readouterr().out, re.M)


def test_conversion_options_reach_a_run(tmp_path):
    folder = tmp_path / "run"
    tiny = "--no-pretrained --epochs 1 --limit-batches 1 --batch-size 4 --accelerator cpu --data digits".split()
    options = "--pool keep --head keep --mean 0.5 0.5 0.5 --b 1.5".split()
    assert main(["finetune", "--model", "resnet18", *tiny, *options, "--out", str(folder)]) == 0
    config = bcosification.load(folder / "last").config
    assert {name: config["options"][name] for name in ("pool", "head", "b")} == {
        "pool": "keep",
        "head": "keep",
        "b": 1.5,
    }
    assert config["mean"] == [0.5] * 3 and config["std"] == [0.229, 0.224, 0.225]
    again = tmp_path / "again"  # from that model: with the B that it has, whatever the default is
    assert main(["finetune", "--model", str(folder), *tiny, "--out", str(again)]) == 0
    assert bcosification.load(again / "last").config["options"]["b"] == 1.5
    assert main(["finetune", "--model", str(folder), *tiny, "--b", "2", "--out", str(tmp_path / "other")]) == 2


def test_interrupt_tells_how_to_go_on(monkeypatch, capsys):
    def interrupted(config, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning, "finetune", interrupted)
    assert main(["finetune", "--model", "resnet18", "--data", "digits", "--out", "runs/a"]) == 130
    assert "bcosify finetune --resume --out runs/a" in capsys.readouterr().err


def test_data_that_have_moved_are_asked_for_by_the_option(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), "red").save(tmp_path / "data" / part / name / "0.png")
    tiny = ["--epochs", "1", "--batch-size", "2", "--accelerator", "cpu", "--no-progress", "--num-workers", "0"]
    model = ["--model", "resnet18", "--no-pretrained", "--image-size", "32"]
    assert main(["finetune", *model, "--data", "data", "--out", "run", *tiny]) == 0
    (tmp_path / "data").rename(tmp_path / "moved")
    again = ["finetune", "--resume", "--out", "run", "--epochs", "2"]
    assert main(again) == 2
    error = capsys.readouterr().err
    assert f"error: --data: expected one of digits, scenes, or a folder of images, got '{tmp_path}/data'" in error
    assert "the run in run was trained on it: --data tells where it is now" in error
    assert main([*again, "--data", "moved"]) == 0
