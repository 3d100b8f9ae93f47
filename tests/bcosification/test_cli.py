"""The command bcosify: runs on real digits, help without extras, errors without tracebacks."""

import argparse
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import resnet18

import bcosification
from bcosification import cli_options, resolve
from bcosification.cli import main
from bcosification.convert import resolver
from bcosification.convert.rules import RULES
from bcosification.evaluation import evaluate
from bcosification.train import finetuning
from bcosification.train.data import build_datamodule, digits
from bcosification.train.finetuning import FinetuneConfig, load_recipe, recipes

COMMANDS = ["finetune", "distill", "explain", "evaluate", "convert", "verify", "families", "sweep", "benchmark"]
# A folder and a file that are there, whatever they hold: what is checked next is the options.
HERE = [str(Path(__file__).parent), __file__, "--out", "x"]
TINY = "--model resnet18 --no-pretrained --data digits --out x".split()
EXTRAS = (
    "lightning torchmetrics torchvision timm open_clip webdataset sklearn safetensors yaml matplotlib captum PIL tqdm"
).split()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A short run of the command: ResNet-18 from random weights, two steps on digits."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    arguments = "--model resnet18 --no-pretrained --data digits --epochs 1 --batch-size 8 --limit-batches 2 --lr 1e-3"
    assert main(["finetune", *arguments.split(), "--out", str(folder), "--accelerator", "cpu", "--no-progress"]) == 0
    return folder


@pytest.fixture
def digit_files(tmp_path):
    val = digits("val")
    files = []
    for i in range(3):
        path = tmp_path / "images" / f"digit{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(val.images[i].permute(1, 2, 0).numpy()).save(path)
        files.append(path)
    return files


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
    config = finetuning.saved_config(folder)
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


def test_explain_writes_the_pictures_of_the_library(run_folder, digit_files, tmp_path, capsys):
    out = tmp_path / "pictures"
    code = main(["explain", "--model", str(run_folder), *map(str, digit_files), "--out", str(out), "--target", "7"])
    assert code == 0
    kinds = ("image", "explanation", "contributions")
    expected = {f"digit{i}_{kind}.png" for i in range(3) for kind in kinds} | {"explanations.json", "overview.png"}
    assert {path.name for path in out.iterdir()} == expected
    model = bcosification.load(run_folder / "best")
    images = torch.stack([model.transform(Image.open(path)) for path in digit_files])
    explanation = bcosification.explain(model, images, 7)
    for i in range(3):
        picture = np.asarray(Image.open(out / f"digit{i}_explanation.png")) / 255
        assert picture.shape == (224, 224, 4)  # 32 x 32, each pixel 7 x 7
        assert np.abs(picture[3::7, 3::7] - explanation.image(i, smooth=1)).max() < 0.6 / 255
        image = np.asarray(Image.open(out / f"digit{i}_image.png"))[3::7, 3::7, :3] / 255
        assert np.abs(image - images[i].permute(1, 2, 0).numpy()).max() < 1e-6
    summary = json.loads((out / "explanations.json").read_text())
    assert [entry["target"] for entry in summary] == [7, 7, 7]
    assert summary[0]["logit"] == pytest.approx(explanation.logits[0, 7].item(), rel=1e-4)
    assert len(re.findall(r"digit\d.png: class 7", capsys.readouterr().out)) == 3


def test_explain_leaves_out_what_it_cannot_read(run_folder, digit_files, tmp_path, capsys):
    broken = digit_files[0].with_name("broken.png")
    broken.write_bytes(digit_files[0].read_bytes()[:80])
    out = tmp_path / "pictures"
    # In a folder: left out and listed. Named itself: likewise, and the exit code tells, after the rest is done.
    for names, code in (([broken.parent], 0), ([*digit_files, broken], 1), ([broken, *digit_files], 1)):
        shutil.rmtree(out, ignore_errors=True)
        assert main(["explain", "--model", str(run_folder), *map(str, names), "--out", str(out)]) == code
        error = capsys.readouterr().err
        assert "left out, as 1 of 4 images could not be read:" in error and f"  {broken}: " in error
        assert len(json.loads((out / "explanations.json").read_text())) == 3
    assert main(["explain", "--model", str(run_folder), str(broken), "--out", str(tmp_path / "none")]) == 2
    assert "none of 1 can be read" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_explain_refuses_a_missing_file_before_it_starts(run_folder, digit_files, tmp_path, capsys):
    out = tmp_path / "pictures"
    assert main(["explain", str(run_folder), str(digit_files[0]), "nowhere.png", "--out", str(out)]) == 2
    assert "IMAGE: expected an image file or a folder, found neither at nowhere.png" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("size, factor", [(None, 7), (0, 1), (32, 1), (100, 4)])
def test_explain_enlarges_small_pictures(run_folder, digit_files, tmp_path, capsys, size, factor):
    option = [] if size is None else ["--size", str(size)]
    assert main(["explain", str(run_folder), str(digit_files[0]), "--out", str(tmp_path / "out"), *option]) == 0
    drawn = np.asarray(Image.open(tmp_path / "out" / "digit0_image.png"))[..., :3]
    original = np.asarray(Image.open(digit_files[0]))
    assert np.array_equal(drawn, original.repeat(factor, 0).repeat(factor, 1))
    out = capsys.readouterr().out
    assert f"{32 * factor} x {32 * factor} pixels" in out
    assert ("the network sees 32 x 32, each drawn" in out) == (factor > 1)


def test_explain_two_files_of_one_name(run_folder, digit_files, tmp_path):
    other = tmp_path / "other" / digit_files[0].name
    other.parent.mkdir()
    other.write_bytes(digit_files[1].read_bytes())
    out = tmp_path / "pictures"
    assert main(["explain", str(run_folder), str(digit_files[0]), str(other), "--out", str(out)]) == 0
    assert {"digit0_image.png", "digit0_2_image.png"} <= {path.name for path in out.iterdir()}


def test_evaluate_is_the_librarys(run_folder, capsys):
    assert main(["evaluate", str(run_folder / "last"), "--data", "digits"]) == 0
    out = capsys.readouterr().out
    model = bcosification.load(run_folder / "last")
    expected = evaluate(model, build_datamodule("digits").val_dataloader(), progress=False)
    assert out.startswith(
        f"images {expected['images']}, top-1 {100 * expected['top1']:.2f} %, top-5 {100 * expected['top5']:.2f} %"
    )


def test_evaluate_numbers_classes_as_the_model_does(run_folder, tmp_path, capsys):
    val = digits("val")
    chosen = [int((val.labels == label).nonzero()[0]) for label in (3, 8)]
    for i in chosen:
        path = tmp_path / "data" / str(int(val.labels[i])) / "x.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(val.images[i].permute(1, 2, 0).numpy()).save(path)
    assert main(["evaluate", str(run_folder), "--data", str(tmp_path / "data"), "--num-workers", "0"]) == 0
    model = bcosification.load(run_folder / "best")
    with torch.no_grad():
        right = (model(val.tensors()[0][chosen]).argmax(1) == torch.tensor([3, 8])).float().mean()
    assert f"images 2, top-1 {100 * right:.2f} %" in capsys.readouterr().out


def test_convert_then_load(tmp_path, capsys):
    out = tmp_path / "converted"
    assert main(["convert", "resnet18", "--no-pretrained", "--out", str(out), "--b", "1.5", "--pool", "keep"]) == 0
    model = bcosification.load(out)
    assert model.config["options"]["b"] == 1.5 and isinstance(model.model.maxpool, torch.nn.MaxPool2d)
    assert main(["convert", "resnet18", "--no-pretrained", "--out", str(out)]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err


def test_verify_reports_and_tells_by_its_exit_code(monkeypatch, tmp_path, capsys):
    class Report:
        ok = True

        def __str__(self):
            return "all the same"

        def save(self, **files):
            seen.append(files)

    seen = []

    def verify(original, converted, images, *, normalized):
        seen.append((original, converted, images, normalized))
        return Report()

    monkeypatch.setattr(bcosification, "verify", verify)
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    assert main(["verify", "resnet18", "--no-pretrained", "--images", "3", *files]) == 0
    assert "all the same" in capsys.readouterr().out
    (original, converted, images, normalized), saved = seen
    assert saved == {"json": tmp_path / "r.json", "html": tmp_path / "r.html"}
    assert images.shape == (3, 3, 224, 224) and 0 <= images.min() and images.max() <= 1 and images.std() > 0.1
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(normalized, (images - mean) / std, rtol=1e-5, atol=1e-5)
    assert isinstance(converted, bcosification.BcosifiedModel)
    assert torch.equal(original.layer1[0].conv1.weight, converted.model.layer1[0].conv1.weight)
    Report.ok = False
    assert main(["verify", "resnet18", "--no-pretrained", "--mean", "0.4"]) == 2
    assert main(["verify", "resnet18", "--no-pretrained", "--mean", "0.4", "0.5", "0.6"]) == 1
    assert seen[-2][3] is None  # the converted model normalises otherwise, as it was told to


def test_verify_of_a_folder(tmp_path, capsys):
    """Against what the folder was made of, when config.json tells it; against --original always."""
    torch.manual_seed(5)
    weights = tmp_path / "weights.pth"
    torch.save(resnet18(num_classes=4).state_dict(), weights)
    out = tmp_path / "converted"
    assert main(["convert", str(weights), "--arch", "resnet18", "--b", "1.5", "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    config["input_size"] = [64, 64]  # a quarter of the pixels, for the test's time
    (out / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    files = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    assert main(["verify", str(out), "--images", "1", *files]) == 0
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["about"]["images"] == [1, 3, 64, 64]
    assert "Verification of torchvision:resnet18" in (tmp_path / "r.html").read_text()
    assert printed.startswith(f"{out}, compared with torchvision:resnet18, weights: {weights}\n")
    assert "b=1.5" in printed and "verified: ok" in printed and "differ from a fresh conversion" not in printed
    assert main(["verify", str(out), "--original", "resnet18", "--no-pretrained", "--images", "1"]) == 0
    assert "differ from a fresh conversion" in capsys.readouterr().out
    assert main(["verify", str(out), "--original", "resnet34", "--no-pretrained", "--images", "1"]) == 2
    assert main(["verify", str(out), "--b", "2", "--pool", "keep"]) == 2
    assert "converted already, got --b, --pool" in capsys.readouterr().err
    assert main(["verify", "resnet18", "--no-pretrained", "--original", "resnet18"]) == 2
    assert "--original: expected a folder" in capsys.readouterr().err
    del config["source"]
    (out / "config.json").write_text(json.dumps(config))
    assert main(["verify", str(out)]) == 2
    assert "expected --original with the standard model that" in capsys.readouterr().err
    assert main(["convert", str(out), "--out", str(tmp_path / "again")]) == 2
    assert "holds a converted one; finetune, explain, evaluate and verify take it" in capsys.readouterr().err


def test_verify_of_a_run(run_folder, capsys):
    assert main(["verify", str(run_folder), "--images", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{run_folder / 'best'}, compared with torchvision:resnet18, weights: random\n")


def test_benchmark_prints_a_table_and_writes_it(tmp_path, capsys):
    file = tmp_path / "numbers.json"
    # of 2 images of 32 pixels the last stage would normalise 2 values, and gradients in float32 be off by a third
    tiny = "--batch 4 --size 64 --rounds 1 --no-compile --b 1.5 --device cpu".split()
    assert main(["benchmark", "resnet18", *tiny, "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("resnet18, batch 4 of 64 x 64 pixels, float32, on ")
    rows = [line.split("  ")[0] for line in out.splitlines()[3:6]]
    assert rows == ["plain", "peer-style, eager", "ours"]
    assert "training: 1 x (plain; peer-style, eager; ours): about" in err and "Downloading" not in err
    written = json.loads(file.read_text())
    assert (written["model"], written["settings"]["contenders"]) == ("resnet18", ["plain", "peer", "ours"])
    assert {(row["task"], row["contender"]) for row in written["rows"]} == {
        (task, name) for task in ("training", "inference", "explanation") for name in ("plain", "peer", "ours")
    }


def test_benchmark_of_a_run(run_folder, tmp_path, capsys):
    assert main(["benchmark", str(run_folder), "--contenders", "ours, ours-low", "--rounds", "1", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{run_folder}, batch 2 of 32 x 32 pixels") and "relative to ours [" in out
    assert main(["benchmark", str(run_folder), "--b", "2"]) == 2
    assert "converted already, got --b" in capsys.readouterr().err


# --- help and errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_with_its_default(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"usage: bcosify {command}" in text
    if command == "finetune":
        defaults = FinetuneConfig()
        assert f"(default: {defaults.epochs})" in text and f"(default: {defaults.lr:g})" in text
        assert "imagenet_resnet50" in text


def _without(modules, *arguments):
    code = (
        "import sys\n"
        f"for name in {list(modules)!r}: sys.modules[name] = None\n"
        "from bcosification.cli import main\n"
        f"sys.exit(main({list(arguments)!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_help_needs_no_extra():
    done = _without(EXTRAS, "finetune", "--help")
    assert done.returncode == 0 and "usage: bcosify finetune" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments, extra",
    [
        (["finetune", "--model", "resnet18", "--data", "digits", "--out", "never-made"], "train"),
        (["evaluate", "resnet18", "--data", "digits"], "train"),
        (["convert", "resnet18", "--out", "never-made"], "train"),
        (["verify", "resnet18"], "train"),
        (["explain", "runs/a", "image.png", "--out", "never-made"], "explain"),
    ],
)
def test_missing_extra_is_named(arguments, extra):
    done = _without(EXTRAS, *arguments)
    assert done.returncode == 1
    assert f"pip install 'bcos-kernels[{extra}]'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command, package, extra",
    [
        ("finetune", "lightning", "train"), ("finetune", "yaml", "train"), ("finetune", "safetensors", "train"),
        ("finetune", "sklearn", "train"), ("evaluate", "torchmetrics", "train"), ("evaluate", "tqdm", "train"),
        ("convert", "safetensors", "train"), ("convert", "torchvision", "train"), ("explain", "matplotlib", "explain"),
        ("explain", "PIL", "explain"), ("explain", "safetensors", "explain"),
    ],
)  # fmt: skip
def test_every_missing_package_is_told_before_anything_is_done(command, package, extra, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    arguments = {
        "finetune": ["--model", "resnet18", "--data", "digits", "--out", "x"],
        "evaluate": ["resnet18", "--data", "digits"],
        "convert": ["resnet18", "--no-pretrained", "--out", "x"],
        "explain": ["runs/a", "image.png", "--out", "x"],
    }[command]
    assert main([command, *arguments]) == 1
    error = capsys.readouterr().err
    assert package.replace("sk", "scikit-") in error and "Traceback" not in error
    assert f"pip install 'bcos-kernels[{extra}]'" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["finetune"], "expected --model"),
        (["finetune", "--model", "resnet18", "--data", "digits"], "expected --out"),
        (["finetune", "--recipe", "nothing", "--out", "x"], "expected a YAML file or one of digits"),
        (["finetune", "--resume"], "--resume: expected --out"),
        (["finetune", "--resume", "--out", "nowhere"], "expected the folder of an earlier run"),
        (["finetune", "--model", "resnet18", "--data", "nowhere", "--out", "x", "--no-pretrained"], "got 'nowhere'"),
        (["finetune", "--model", "resnet1", "--data", "digits", "--out", "x"], "resnet1"),
        (["finetune", "--model", "resnet18", "--data", "digits", "--out", "x", "--b", "0.5"], "expected --b >= 1"),
        (
            ["explain", "--model", "nowhere/", "i.png", "--out", "x"],
            "MODEL: expected a folder that finetune, distill or convert",
        ),
        (
            ["explain", "resnet18", "image.png", "--out", "x"],
            "got 'resnet18', where no folder is; of a standard network",
        ),
        (["explain", "run", "--out", "x"], "expected MODEL and at least one IMAGE, got 'run' alone"),
        (
            ["explain", *HERE, "--smooth", "4"],
            "expected --smooth to be odd and >= 1, or 0 for none, got 4",
        ),
        (["explain", *HERE, "--percentile", "0"], "expected --percentile > 0 and <= 100, got 0.0"),
        (["explain", *HERE, "--size", "-1"], "expected --size >= 0, got -1"),
        (["finetune", *TINY, "--lr", "-1"], "expected --lr > 0, got -1.0"),
        (["finetune", *TINY, "--b-epochs", "30"], "expected --b-epochs between 0 and the number of epochs, 10, got 30"),
        (["finetune", *TINY, "--bias", "decay"], "expected --bias-epochs > 0 with --bias decay, got 0.0"),
        (["finetune", *TINY, "--agc", "1", "--clip-norm", "2"], "expected --agc or --clip-norm, got both: 1.0 and 2.0"),
        (["finetune", *TINY, "--precision", "bf17"], "expected --precision to be one of 32-true, bf16-mixed, 16-mixed"),
        (["finetune", *TINY, "--accelerator", "tpu"], "expected --accelerator to be one of auto, "),
        (["finetune", *TINY, "--devices", "two"], "expected --devices to be a number >= 1, auto, "),
        (
            ["finetune", *TINY, "--head", "keep", "--std", "0"],
            "expected as many values in --mean as in --std, got 3 and 1",
        ),
        (["convert", "foo:bar", "--out", "x"], "prefix among torchvision:, timm:, open_clip:"),
        (["convert", "weights.pth", "--out", "x"], "found none at 'weights.pth'"),
        (["convert", "resnet18", "--arch", "resnet18", "--out", "x"], "expected --arch with a weights file only"),
        (["convert", "resnet18", "--no-pretrained", "--mean", "nan", "--out", "x"], "expected --mean to be one finite"),
        (["evaluate", "nothing/", "--data", "digits"], "expected a folder or file, found none at 'nothing/'"),
        (["verify", "resnet18", "--images", "0"], "expected --images >= 1, got 0"),
        (["verify", "resnet18", "--html", "nowhere/x.html"], "--html: expected a file in a folder that is there"),
        (["evaluate", "--data", "digits"], "expected one MODEL, got 0"),
        (
            ["evaluate", "resnet18", "--data", "nowhere"],
            "--data: expected one of digits, scenes, or a folder of images",
        ),
        (
            ["evaluate", "resnet18", "--data", "digits", "--device", "abacus"],
            "--device: expected a device that is usable",
        ),
        (["convert", "resnet18", "--no-pretrained", "--out", "x", "--b", "0"], "expected --b >= 1"),
        (["benchmark", "resnet18", "--batch", "0"], "expected --batch >= 1, got 0"),
        (["benchmark", "resnet18", "--rounds", "0"], "expected --rounds >= 1, got 0"),
        (["benchmark", "resnet18", "--contenders", "plain,us"], "--contenders: expected different ones of plain, "),
        (
            ["benchmark", "resnet18", "--contenders", "ours-compiled", "--no-compile"],
            "--no-compile: expected a contender that is not compiled, got ours-compiled",
        ),
        (["benchmark", "resnet18", "--json", "nowhere/x.json"], "--json: expected a file in a folder that is there"),
        (["benchmark", "resnet18", "--device", "abacus"], "--device: expected a device that is usable"),
        (
            ["benchmark", "vit_b_16", "--size", "60", "--batch", "1", "--no-compile"],
            "expected a size that the model takes, got 60 x 60: Wrong image height! Expected 224 but got 60!",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith(f"bcosify {arguments[0]}: error: ")
    assert "Traceback" not in error
    assert not re.search(r"\b(?!finetune\b)[a-z_]+=", error), "an error speaks Python"
    assert list(tmp_path.iterdir()) == []


def test_messages_name_options(monkeypatch):
    """How every way in which the library writes a parameter reads for a user of the command."""
    commands = {}
    monkeypatch.setattr(
        argparse.ArgumentParser, "set_defaults", lambda self, **d: commands.update({d["run"]: d["parser"]})
    )
    cli_options.parser({name: name for name in COMMANDS})
    for command, text, expected in (
        ("convert", "bcosify: expected mean= and std=, got mean=None and std=0.5",
         "expected --mean and --std, got no --mean and --std 0.5"),
        ("convert", "bcosify: on_unknown='keep' leaves them", "--on-unknown keep leaves them"),
        ("convert", "resolve: weights=FILE or pretrained=False, not pretrained=True",
         "--weights FILE or --no-pretrained, not no --no-pretrained"),
        ("convert", "expected model=, a network, or inverse=False", "expected model= in Python, a network, or "
         "inverse=False in Python"),
        ("explain", "load: expected model=, the network, got None", "expected model= in Python, the network, got None"),
        ("finetune", "finetune: expected model='a'; got mean=[0.5, 0.5]", "expected --model a; got --mean [0.5, 0.5]"),
        ("finetune", "output: expected a folder, got x", "--out: expected a folder, got x"),
        ("finetune", "data: expected one of these", "--data: expected one of these"),
        ("finetune", "recipe mine: expected lr to be float", "recipe mine: expected lr to be float"),
        ("finetune", "data/mean=3: no 'b=2' in x.mean=4 there", "data/mean=3: no 'b=2' in x.mean=4 there"),
        ("explain", "explain: expected targets in (0, 1)", "expected --target in (0, 1)"),
        ("verify", "verify: expected images (N, 3, H, W) in [0, 1]", "expected images (N, 3, H, W) in [0, 1]"),
    ):  # fmt: skip
        assert cli_options.in_options(text, commands[command]) == expected


def test_warnings_are_one_line_with_options(tmp_path, capsys):
    arguments = ["convert", "squeezenet1_1", "--no-pretrained", "--head", "keep", "--out", str(tmp_path / "x")]
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(RULES, "torch.nn.modules.pooling.AdaptiveAvgPool2d")
        assert main([*arguments, "--on-unknown", "keep"]) == 0
    error = capsys.readouterr().err
    assert error.startswith("bcosify convert: warning: 1 layer without a rule is kept as it is; explanations may not")


@pytest.mark.parametrize("out", ["file", "file/run", "circle/run", "/dev/null/run"])
def test_an_unusable_output_ends_a_run_at_once(tmp_path, out):
    """In a process of its own, without torch: it ends before anything heavy is imported, and writes nothing."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    before = sorted(tmp_path.iterdir())
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from bcosification.cli import main\n"
        f"sys.exit(main(['finetune', '--model', 'resnet18', '--data', 'digits', '--out', {out!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("bcosify finetune: error: --out: expected a folder")
    assert done.stderr.count("\n") == 1 and "Downloading" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "file").read_text() == "mine"


def test_debug_shows_the_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", "--resume", "--out", "nowhere", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_weights_of_another_architecture_and_pickles_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv.weight": torch.zeros(3)}, "other.pth")
    assert main(["convert", "resnet18", "--weights", "other.pth", "--out", "x"]) == 2
    assert "other.pth" in capsys.readouterr().err
    torch.save(torch.nn.Linear(2, 2), "module.pth")
    assert main(["convert", "resnet18", "--weights", "module.pth", "--out", "x"]) == 2
    assert "pickle" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


class Malicious:
    """Its pickle makes a folder when it is read."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def _bad_checkpoint(kind):
    """The name of a file that is no weights file, in the current folder."""
    state = resnet18(num_classes=4).state_dict()
    if kind.startswith("truncated"):
        name = "weights.safetensors" if kind.endswith("safetensors") else "weights.pth"
        save_file(state, name) if name.endswith("safetensors") else torch.save(state, name)
        content = Path(name).read_bytes()
        Path(name).write_bytes(content[: len(content) // 2])
        return name
    content = {"state_dict": {**state, "fc.bias": Malicious()}}
    if kind == "pickle":
        Path("weights.pth").write_bytes(pickle.dumps(content))
    elif kind == "empty":
        Path("weights.pth").write_bytes(b"")
    else:
        torch.save(content, "weights.pth", _use_new_zipfile_serialization=kind == "zip")
    return "weights.pth"


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "empty", "truncated pth", "truncated safetensors"])
@pytest.mark.parametrize(
    "command",
    [
        "convert FILE --arch resnet18 --out x",
        "convert resnet18 --weights FILE --out x",
        "verify FILE --arch resnet18",
        "finetune --model resnet18 --weights FILE --data digits --out x",
        "evaluate FILE --arch resnet18 --data digits",
        "sweep --model FILE --arch resnet18 --data digits --out x",
    ],
)
def test_checkpoints_that_are_broken_or_hold_code_are_refused(kind, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = _bad_checkpoint(kind)
    assert main(command.replace("FILE", file).split()) == 2
    error = capsys.readouterr().err
    assert f"{file}: expected a " in error and "Traceback" not in error and "weights_only" not in error
    if kind in ("zip", "legacy", "pickle"):
        assert "could run code when it is read, so it is refused" in error
    assert [path.name for path in tmp_path.iterdir()] == [file], "something was executed, or written"


def test_broken_folders_and_runs_are_refused(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    best = run_folder / "best"
    for broken in ("truncated", "pickled", "json"):
        folder = tmp_path / broken
        shutil.copytree(best, folder)
        weights = folder / "model.safetensors"
        if broken == "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
            message = "model.safetensors: expected a safetensors file, got one that cannot be read"
        elif broken == "pickled":
            weights.unlink()
            torch.save({"a": Malicious()}, folder / "pytorch_model.bin")
            message = "pytorch_model.bin may hold pickled objects and is not read"
        else:
            (folder / "config.json").write_text("{")
            message = "config.json to be JSON"
        for command in ("evaluate {} --data digits", "verify {}", "benchmark {}"):
            assert main(command.format(folder).split()) == 2
            assert message in capsys.readouterr().err
    for broken in ("truncated", "malicious"):
        folder = tmp_path / f"{broken}-run"
        shutil.copytree(run_folder, folder)
        if broken == "truncated":
            content = (folder / "last.ckpt").read_bytes()
            (folder / "last.ckpt").write_bytes(content[: len(content) // 2])
        else:
            torch.save({"epoch": 0, "state_dict": Malicious()}, folder / "last.ckpt")
        assert main(["finetune", "--resume", "--out", str(folder), "--epochs", "2"]) == 2
        error = capsys.readouterr().err
        assert "last.ckpt: expected a checkpoint of finetune, got " in error
        assert "Traceback" not in error and "weights_only" not in error
    assert not (tmp_path / "executed").exists()


class Unknown(torch.nn.Sequential):
    """A network that no family knows: its forward is its own."""

    def forward(self, x):
        return super().forward(x)


def _no_standard_network(kind):
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Softplus() if kind == "unknown" else torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4),
    )  # fmt: skip
    if kind == "no family":
        return Unknown(*network)
    if kind == "tied":
        network[5].weight = network[4].weight
    if kind == "converted":
        return bcosification.bcosify(network, mean=0.5, std=0.5).model
    if kind == "compiled":
        return torch.compile(network)
    return torch.nn.DataParallel(network) if kind == "parallel" else network


@pytest.mark.parametrize("command", ["convert x --out y", "verify x", "benchmark x", "finetune --model x --data digits "
                                     "--out y --no-pretrained"])  # fmt: skip
@pytest.mark.parametrize(
    "kind, messages",
    [
        ("unknown", ["without one:\n  torch.nn.modules.activation.Softplus: no rule for this type: 1\n",
                     "--on-unknown keep leaves them as they are", "convert.rules.rule", "convert.families.register"]),
        ("no family", [f"no family knows the forward of {__name__}.Unknown, so its head", "expected --head keep, or a "
                       "family registered for this class, got --head before_pool"]),
        ("tied", ["every layer to have its own parameters, got '4.weight' and '5.weight', which are one tensor (tied"]),
        ("converted", ["submodule '0' is bcosification.nn.conv2d.BcosConv2d, which is B-cos already"]),
        ("compiled", ["a plain model, got OptimizedModule; convert its ._orig_mod"]),
        ("parallel", ["a plain model, got DataParallel; convert its .module"]),
    ],
)  # fmt: skip
def test_models_that_cannot_be_converted_are_told(kind, messages, command, tmp_path, monkeypatch, capsys):
    def library(name, num_classes, pretrained, weights):
        return _no_standard_network(kind), {"library": "torchvision", "name": name, "weights": None}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(resolver.LIBRARIES, "torchvision", library)
    # DataParallel and compiled models hide which layer is the head.
    assert main([*command.split(), "--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5"]) == 2
    error = capsys.readouterr().err
    for message in messages:
        assert message in error, error
    assert "Traceback" not in error and list(tmp_path.iterdir()) == []


def test_interrupt_tells_how_to_go_on(monkeypatch, capsys):
    import bcosification.train.finetuning as finetuning

    def interrupted(config, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning, "finetune", interrupted)
    assert main(["finetune", "--model", "resnet18", "--data", "digits", "--out", "runs/a"]) == 130
    assert "bcosify finetune --resume --out runs/a" in capsys.readouterr().err


def test_without_a_command_the_help_is_printed(capsys):
    assert main([]) == 2
    assert "finetune" in capsys.readouterr().out
