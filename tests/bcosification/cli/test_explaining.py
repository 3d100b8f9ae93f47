"""bcosify explain: pictures, and images that cannot be read."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import bcosification
from bcosification.cli import main


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
