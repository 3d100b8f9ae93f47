"""Help without extras, missing packages, wrong options: told in one line, nothing written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bcosification.cli import main
from bcosification.train.configuration import FinetuneConfig

COMMANDS = ["finetune", "distill", "explain", "evaluate", "convert", "verify", "families", "sweep", "benchmark"]

# A folder and a file that are there, whatever they hold: what is checked next is the options.
HERE = [str(Path(__file__).parent), __file__, "--out", "x"]

TINY = "--model resnet18 --no-pretrained --data digits --out x".split()

EXTRAS = (
    "lightning torchmetrics torchvision timm open_clip webdataset sklearn safetensors yaml matplotlib captum PIL tqdm"
).split()


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
        (
            ["evaluate", "vit_b_16", "--no-pretrained", "--data", "digits", "--image-size", "100"],
            "--image-size: expected a size that vit_b_16 takes (its own: 224 x 224), got 100",
        ),
        (["evaluate", "resnet18", "--data", "digits", "--image-size", "0"], "expected --image-size >= 1, got 0"),
        (["evaluate", "resnet18", "--data", "digits", "--batch-size", "0"], "error: expected --batch-size >= 1, got 0"),
        (["evaluate", "resnet18", "--data", "digits", "--num-workers", "-1"], "expected --num-workers >= 0, got -1"),
        (["explain", *HERE[:2], "--batch-size", "0", "--out", "x"], "error: expected --batch-size >= 1, got 0"),
        (["explain", *HERE[:2], "--out", f"{__file__}"], "error: --out: expected a folder, got"),
        (["convert", f"{__file__}", "--out", "x"], "expected a file of tensors (safetensors, or torch.save"),
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


def test_without_a_command_the_help_is_printed(capsys):
    assert main([]) == 2
    assert "finetune" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["finetun", "--model", "x"], "expected one of finetune, distill, .*, got 'finetun'; did you mean finetune?"),
        (["finetune", "--optimizer", "adan"], "expected one of adam, adamw, got 'adan'; did you mean adam or adamw?"),
        (["finetune", "--lerning-rate", "1"], "got --lerning-rate 1; did you mean --lr?"),
        (["finetune", "--wieghts=a", "--pol", "keep"], "got --wieghts=a --pol keep; did you mean --weights or --pool?"),
        (["verify", "resnet18", "--qqq"], "expected options that --help tells, got --qqq$"),
        (["verify", "resnet18", "resnet34"], "expected options that --help tells, got resnet34$"),
    ],
)  # fmt: skip
def test_misspelt_commands_and_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert re.search(message.replace("?", r"\?"), last), last
    command = arguments[0] if arguments[0] in COMMANDS else ""
    assert last.startswith(f"bcosify {command}: error: " if command else "bcosify: error: ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["convert", "timm/resnet18", "--out", "x"], "found none at 'timm/resnet18'; did you mean timm:resnet18?"),
        (["finetune", "--model", "small", "--data", "digits", "--out", "x"], "small is the network of sweep's demo"),
        (["finetune", "--model", "resnet18", "--data", "digit", "--out", "x"], "got 'digit'; did you mean digits?"),
        (["finetune", "--recipe", "digts", "--out", "x"], "got 'digts'; did you mean digits?"),
        (["families", "torchvision_resnt"], "lists, got torchvision_resnt; did you mean torchvision_resnet or"),
        (
            ["distill", "--model", "ViT-B-32", "--data", "digits", "--out", "x"],
            "the folder of a converted one, got ViT-B-32; did you mean open_clip:ViT-B-32/TAG?",
        ),
        (
            ["distill", "--model", "ViT-S-32-alt", "--data", "digits", "--out", "x"],
            "the folder of a converted one, got ViT-S-32-alt; did you mean open_clip:ViT-S-32-alt?",
        ),
        (
            ["distill", "--model", "open_clip:ViT-S-32-alt", "--data", "digits", "--out", "x"],
            "of which open_clip has none for ViT-S-32-alt; --no-pretrained gives random ones",
        ),
        (["verify", "vit_tiny_patch16_224"], "got 'vit_tiny_patch16_224'; did you mean timm:vit_tiny_patch16_224?"),
    ],
)
def test_misspelt_names(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", ["bcosification.cli families", "bcosification.cli --version", "bcos_kernels"])
def test_a_reader_that_leaves_ends_a_command_quietly(arguments):
    """As `bcosify families | head` does, whose head has read enough."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", *arguments.split()], stdout=output, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_told(monkeypatch, capsys):
    def broken(*_, **__):
        raise BrokenPipeError("of a loading process")

    monkeypatch.setattr("bcosification.convert.family_checks.family_reports", broken)
    assert main(["families"]) == 2
    assert "bcosify families: error: of a loading process" in capsys.readouterr().err
