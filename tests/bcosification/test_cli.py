"""The command bcosify: runs on real digits, help without extras, errors without tracebacks."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import bcosification
from bcosification.cli import main
from bcosification.evaluation import evaluate
from bcosification.train.data import build_datamodule, digits
from bcosification.train.finetuning import FinetuneConfig

COMMANDS = ["finetune", "explain", "evaluate", "convert", "verify"]
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
    assert "1 epochs; val top-1" in capsys.readouterr().out
    assert main(["finetune", "--resume", "--out", str(run_folder), "--lr", "0.5"]) == 2
    assert "--resume: expected lr as in" in capsys.readouterr().err


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
    assert main(["explain", "--model", str(run_folder), str(broken.parent), "--out", str(out)]) == 0
    error = capsys.readouterr().err
    assert str(broken) in error and "1 of 4 images could not be read" in error
    assert len(json.loads((out / "explanations.json").read_text())) == 3
    assert main(["explain", "--model", str(run_folder), str(broken), "--out", str(tmp_path / "none")]) == 2
    assert "none of 1 can be read" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


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


def test_verify_reports_and_tells_by_its_exit_code(monkeypatch, capsys):
    import bcosification.convert.verification as verification

    class Report:
        ok = True

        def __str__(self):
            return "all the same"

    seen = []

    def verify(original, converted, images):
        seen.append((original, converted, images))
        return Report()

    monkeypatch.setattr(verification, "verify", verify)
    monkeypatch.setattr(bcosification, "verify", verify, raising=False)
    assert main(["verify", "resnet18", "--no-pretrained", "--images", "3"]) == 0
    assert "all the same" in capsys.readouterr().out
    original, converted, images = seen[0]
    assert images.shape == (3, 3, 224, 224) and 0 <= images.min() and images.max() <= 1
    assert isinstance(converted, bcosification.BcosifiedModel)
    assert torch.equal(original.layer1[0].conv1.weight, converted.model.layer1[0].conv1.weight)
    Report.ok = False
    assert main(["verify", "resnet18", "--no-pretrained"]) == 1


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
    ],
)
def test_missing_extra_is_named(arguments, extra):
    done = _without(EXTRAS, *arguments)
    assert done.returncode == 1
    assert f"pip install 'bcos-kernels[{extra}]'" in done.stderr and "Traceback" not in done.stderr


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
        (["finetune", "--model", "resnet18", "--data", "digits", "--out", "x", "--b", "0.5"], "expected b >= 1"),
        (["explain", "--model", "nowhere/", "image.png", "--out", "x"], "nowhere"),
        (["explain", "--model", "resnet18", "--no-pretrained", "image.png", "--out", "x"], "got the standard network"),
        (["evaluate", "--data", "digits"], "expected one MODEL, got 0"),
        (["convert", "resnet18", "--no-pretrained", "--out", "x", "--b", "0"], "expected b >= 1"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith(f"bcosify {arguments[0]}: error: ")
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


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
