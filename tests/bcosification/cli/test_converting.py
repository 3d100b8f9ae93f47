"""bcosify convert and verify."""

import json

import torch
from torchvision.models import resnet18

import bcosification
from bcosification.cli import main


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
