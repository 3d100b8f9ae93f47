"""bcosify evaluate and benchmark."""

import json

import torch
from PIL import Image

import bcosification
from bcosification.cli import main
from bcosification.evaluation import evaluate
from bcosification.train.data import build_datamodule, digits


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
