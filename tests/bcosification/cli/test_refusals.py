"""Files and models that the commands refuse: broken ones, pickles, what cannot be converted."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18

import bcosification
from bcosification.cli import main
from bcosification.convert import resolver


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
