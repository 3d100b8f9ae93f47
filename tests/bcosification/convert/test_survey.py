"""The surveys of timm's and open_clip's models: rows, reasons, percentages."""

import json

import open_clip
import pytest
import timm

from bcosification.convert.survey import TIMM_GLOBS, summary, survey, survey_open_clip
from benchmarks.protocol import RESULTS


def test_rows_say_what_converts_and_why_not():
    names = ["lambda_resnet26t", "resnet10t", "resnet50_clip_gap", "convnext_atto", "vit_tiny_r_s16_p8_224"]
    rows = survey([names[0], "resnet10*t", *names[1:]], progress=False)
    found = {row.name: row for row in rows}
    assert list(found) == names and found["resnet10t"].pattern == "resnet10*t"
    failed = found["lambda_resnet26t"]
    assert not failed.converts and failed.pattern == failed.name and failed.family == "timm_byobnet"
    assert "LambdaLayer: what its forward does" in failed.reason and "stages" not in failed.reason
    good = found["resnet10t"]
    assert good.converts and good.bcos_layers == 15 and good.type == "ResNet"
    assert (good.head, good.head_move_changes, good.rebuilt_from) == ("before the pooling", "", "description")
    assert found["resnet50_clip_gap"].head == "none" and found["vit_tiny_r_s16_p8_224"].head == "where it is"
    assert "after the head's norm" in found["convnext_atto"].head_move_changes
    lines = summary(rows).splitlines()
    assert lines[0].split() == ["lambda_resnet26t", "0", "of", "1", "0.0", "%"]
    assert lines[5].split() == ["all", "4", "of", "5", "80.0", "%"] and lines[6].startswith("lambda_resnet26t: ")


def test_a_pattern_that_fits_nothing():
    with pytest.raises(ValueError, match="expected a pattern of timm's model names, got 'resnot\\*'"):
        survey(["resnot*"], progress=False)
    with pytest.raises(ValueError, match="expected a pattern of open_clip's model names, got 'RN5x"):
        survey_open_clip(["RN5x*"], progress=False)


def test_the_kept_rows_are_of_all_models_and_most_convert():
    content = json.loads((RESULTS / "timm_models.json").read_text())
    rows = content["rows"]
    for pattern in TIMM_GLOBS:
        group = [row for row in rows if row["pattern"] == pattern]
        assert sum(row["converts"] for row in group) >= 0.95 * len(group) > 0
        if content["run"]["timm"] == timm.__version__:
            assert {row["name"] for row in rows} >= set(timm.list_models(pattern))
    assert all(row["reason"] for row in rows if not row["converts"])
    assert all(row["ok"] and row["explanation_error"] < 1e-8 for row in content["verified"])


def test_open_clips_models_say_what_converts():
    names = ["RN50", "convnext_tiny", "coca_ViT-B-32", "ViT-B-16-SigLIP2", "MobileCLIP-S1", "roberta-ViT-B-32"]
    rows = {row.name: row for row in survey_open_clip(names, progress=False)}
    assert all(row.converts for row in rows.values())
    assert {row.family for row in rows.values()} == {"open_clip_resnet", "open_clip_vit", "open_clip_timm"}
    assert rows["convnext_tiny"].head == "before the pooling" and "norm" in rows["convnext_tiny"].head_move_changes
    assert rows["coca_ViT-B-32"].rebuilt_from == "description" and rows["RN50"].bcos_layers == 56
    (failed,) = survey_open_clip(["RN50"], progress=False, b=0.5)
    assert not failed.converts and failed.reason == "ValueError: bcosify: expected b >= 1 and finite, got 0.5"


def test_the_kept_rows_of_open_clip_are_what_the_page_says():
    content = json.loads((RESULTS / "open_clip_models.json").read_text())
    rows = content["rows"]
    if content["run"]["open_clip"] == open_clip.__version__:
        assert [row["name"] for row in rows] == open_clip.list_models()
    failed = [row["name"] for row in rows if not row["converts"]]
    assert all(row["reason"] for row in rows if not row["converts"])
    page = (RESULTS.parents[1] / "docs" / "families.md").read_text()
    told = f"all {len(rows)} models" if not failed else f"{len(rows) - len(failed)} of the {len(rows)} models"
    assert told in page and all(f"`{name}`" in page for name in failed)
