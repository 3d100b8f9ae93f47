"""The tables of the documents are what the committed rows give, and what they give is right."""

import json

import pytest

from bcosification.convert.family_checks import family_reports
from benchmarks import render
from benchmarks.protocol import RESULTS, Results, load_rows

SUITES = ("training", "inference", "memory", "explanations", "layers_resnet50", "layers_densenet121", "layers_vit")


@pytest.mark.parametrize("name", render.DOCUMENTS)
def test_documents_are_up_to_date(name):
    text = (render.ROOT / name).read_text(encoding="utf-8")
    assert render.rendered(text) == text, f"{name} is not what the rows give: make bench-render"


def test_every_table_is_in_a_document():
    text = "".join((render.ROOT / name).read_text(encoding="utf-8") for name in render.DOCUMENTS)
    assert {match["name"] for match in render.MARKED.finditer(text)} == set(render.TABLES)


def test_committed_rows_are_whole():
    """Every row has its run; ratios are those of a contender of its case; baselines are 1."""
    for suite in SUITES:
        rows = load_rows(suite, RESULTS)
        assert len({(row["case"], row["contender"]) for row in rows}) == len(rows)
        for row in rows:
            assert {"date", "device", "threads", "torch", "commit"} <= set(row["run"])
            if "ratio" in row:
                assert row["ratio"] > 0 and (row["contender"] != "plain" or row["ratio"] == 1)


def _written(folder, suite, rows, **machine):
    results = Results(suite, folder)
    results.started = f"{suite} {len(list(folder.iterdir()))} {machine}"
    results.machine = {"device": "Abacus", "threads": 2, "capability": "WOOD", "torch": "2.99", "commit": "c0ffee",
                       "date": "2031-01-01", **machine}  # fmt: skip
    for case, contender, values in rows:
        results.add(case, contender, **values)


def _timed(ratio, milliseconds=1000.0, **more):
    return {"median_ms": milliseconds, "ratio": ratio, "ratio_q1": ratio * 0.9, "ratio_q3": ratio * 1.1, **more}


def test_a_table_of_networks(tmp_path):
    _written(
        tmp_path, "training",
        [
            ("resnet50", "plain", _timed(1.0, 2112.8)),
            ("resnet50", "peer", _timed(2.0)),
            ("resnet50", "ours", _timed(1.0404)),
            ("resnet50, batch 2", "ours", _timed(7.0)),
            ("convnext_tiny", "plain", _timed(1.0, 900.0)),
            ("convnext_tiny", "peer", _timed(2.5)),
            ("convnext_tiny", "ours", {"status": "not convertible yet", "reason": "no family"}),
            ("vit_s", "plain", _timed(1.0)),
        ],
    )  # fmt: skip
    assert render.training(tmp_path).splitlines() == [
        "|  | plain | `bcos` | bcosified | measured at |",
        "| --- | --- | --- | --- | --- |",
        "| ResNet-50, batch 8 | 1.00 (2,113 ms) | 2.00 (1.80–2.20) | 1.04 (0.94–1.14) | c0ffee, 2031-01-01 |",
        "| ConvNeXt-T, batch 4 | 1.00 (900 ms) | 2.50 (2.25–2.75) | not convertible yet | c0ffee, 2031-01-01 |",
        "",
        "On Abacus, 2 threads, WOOD, torch 2.99.",
    ]
    assert render.inference(tmp_path) == render.compilation(tmp_path) == "Not measured yet."


def test_rows_of_two_machines_say_which(tmp_path):
    _written(tmp_path, "training", [("resnet50", "plain", _timed(1.0)), ("resnet50", "ours", _timed(1.0))])
    _written(tmp_path, "training", [("resnet18", "plain", _timed(1.0)), ("resnet18", "ours", _timed(1.0))], threads=4)
    _written(tmp_path, "training", [("resnet18", "peer", _timed(2.0))], threads=4, commit="decade")
    text = render.training(tmp_path)
    assert "| c0ffee, 2031-01-01, machine 1; decade, 2031-01-01, machine 1 |" in text
    assert "| c0ffee, 2031-01-01, machine 2 |" in text
    assert text.endswith("On 1: Abacus, 4 threads, WOOD, torch 2.99; 2: Abacus, 2 threads, WOOD, torch 2.99.")


def test_memory_and_compilation(tmp_path):
    kept = [("resnet50", "plain", 100.0, 1.0), ("resnet50", "ours-low", 59.0, 0.59)]
    _written(tmp_path, "memory", [(case, who, {"kept_MiB": m, "kept_ratio": r}) for case, who, m, r in kept])
    assert "| ResNet-50, batch 8 | 1.00 (100 MiB) | 0.59 | c0ffee, 2031-01-01 |" in render.memory(tmp_path)
    assert render.peak(tmp_path) == "Not measured yet."
    rows = [("resnet50", "plain", _timed(1.0)), ("resnet50", "ours-compiled", _timed(1.0, compile_s=123.4))]
    _written(tmp_path, "training", rows)
    assert "| ResNet-50, batch 8 | 123 s | c0ffee, 2031-01-01 |" in render.compilation(tmp_path)


def test_explanations_are_rates(tmp_path):
    rows = [("plain", _timed(1.0, explanations_per_s=4.567)), ("peer", _timed(1.6)), ("ours", _timed(0.8))]
    _written(tmp_path, "explanations", [("resnet50, batch 1", who, values) for who, values in rows])
    line = render.explanations(tmp_path).splitlines()[2]
    assert line.startswith(
        "| ResNet-50, batch 1 | 1.00 (4.57 /s) | 0.62 (0.57–0.69) | – | – | 1.25 (1.14–1.39) | 2.00 |"
    )
    _written(tmp_path, "explanations", [("resnet50, batch 1", "ours", _timed(0.5))], commit="decade")
    assert " | 2.00 (1.82–2.22) | – | " in render.explanations(tmp_path)  # another run's peer is no comparison


def test_layers_are_geometric_means(tmp_path):
    shapes = [("a", 1.0), ("b", 4.0)]
    rows = [(case, who, _timed(ratio if who == "ours" else 1.0)) for case, ratio in shapes for who in ("plain", "ours")]
    _written(tmp_path, "layers_vit", rows)
    _written(tmp_path, "layers_vit_bfloat16", [*rows, ("a", "peer-compiled", _timed(3.0))])
    lines = render.layers(tmp_path).splitlines()
    assert lines[0] == "| forward + backward | `bcos`, compiled | ours | our worst | measured at |"
    assert lines[2].startswith("| B-cos linears of ViT-Ti/S/B/L (2 shapes) | – | 2.00 (1.80–2.20) | 4.00 | ")
    assert lines[3].startswith(
        "| B-cos linears of ViT-Ti/S/B/L, bfloat16 (2 shapes) | 3.00 (2.70–3.30), 1 shapes | 2.00 (1.80–2.20) | 4.00 | "
    )


def test_what_stands_between_markers_is_replaced(tmp_path):
    _written(tmp_path, "training", [("resnet50", "plain", _timed(1.0)), ("resnet50", "ours", _timed(1.5))])
    text = "a\n<!-- benchmark:training -->\nold\n<!-- /benchmark -->\nb\n"
    new = render.rendered(text, tmp_path)
    assert new.startswith("a\n<!-- benchmark:training -->\n\n| ") and new.endswith(".\n\n<!-- /benchmark -->\nb\n")
    assert "old" not in new and "1.50 (1.35–1.65)" in new and render.rendered(new, tmp_path) == new
    with pytest.raises(ValueError, match="benchmark:speed: expected one of training, "):
        render.rendered(text.replace("training", "speed"), tmp_path)
    with pytest.raises(ValueError, match="expected <!-- /benchmark --> after every"):
        render.rendered(text.replace("<!-- /benchmark -->", ""), tmp_path)


def test_check_tells_a_stale_document(tmp_path, monkeypatch, capsys):
    (tmp_path / "README.md").write_text("<!-- benchmark:peak -->\nold\n<!-- /benchmark -->\n", encoding="utf-8")
    monkeypatch.setattr(render, "ROOT", tmp_path)
    monkeypatch.setattr(render, "DOCUMENTS", ("README.md",))
    assert render.main(["--check"]) == 1
    assert capsys.readouterr().out == "README.md is not up to date: make bench-render\n"
    assert "old" in (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "docs" / "images").mkdir(parents=True)
    assert render.main([]) == 0 and render.main(["--check"]) == 0
    assert "old" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_plots(tmp_path):
    from matplotlib.image import imread

    ratios = {"plain": 1.0, "peer": 2.0, "ours": 1.5}
    rows = [(case, who, _timed(ratio)) for case in ("resnet50", "vit_s") for who, ratio in ratios.items()]
    assert not render.draw_networks(tmp_path / "networks.png", tmp_path)
    assert not render.draw_layers(tmp_path / "layers.png", tmp_path)
    _written(tmp_path, "training", rows)
    _written(tmp_path, "layers_vit", rows)
    assert render.draw_networks(tmp_path / "networks.png", tmp_path)
    assert render.draw_layers(tmp_path / "layers.png", tmp_path)
    blue = (0x1F / 255, 0x77 / 255, 0xB4 / 255)  # the colour of ours is in both
    for name in ("networks", "layers"):
        picture = imread(tmp_path / f"{name}.png")[..., :3]
        assert (abs(picture - blue).max(-1) < 0.01).sum() > 20


def test_the_table_of_families(tmp_path):
    assert render.families(tmp_path) == render.conversions(tmp_path) == "Not verified yet."
    told = {"converts": "all", "keeps": "ReLUs", "cannot": "", "problem": "", "ok": True}
    rows = [
        {"title": "A", **told, "equivalence": 1.26e-15, "explanation": 3e-14},
        {"title": "B", **told, "cannot": "fly", "ok": False, "equivalence": 0.5, "explanation": 3e-14},
        {"title": "C", **told, "ok": None, "problem": "not checked: no timm", "equivalence": None, "explanation": None},
    ]
    content = {"machine": {"date": "2031-01-01", "torch": "2.99"}, "families": rows}
    (tmp_path / "families.json").write_text(json.dumps(content))
    assert render.families(tmp_path).splitlines() == [
        "| models | error at B = 1 | error of W(x) |",
        "| --- | --- | --- |",
        "| A | 1e-15 | 3e-14 |",
        "| B | 5e-01 **failed** | 3e-14 |",
        "| C | not checked: no timm | – |",
        "",
        "Small models with random weights, in float64, verified on 2031-01-01 with torch 2.99.",
    ]
    assert render.conversions(tmp_path).splitlines() == [
        "| models | become B-cos, or constant in explanations | stay | cannot |",
        "| --- | --- | --- | --- |",
        "| A | all | ReLUs | – |",
        "| B | all | ReLUs | fly |",
        "| C | all | ReLUs | – |",
    ]


def test_the_table_of_families_has_all_of_them():
    """After a new family: bcosify families --check --json benchmarks/results/families.json, and make bench-render."""
    told = json.loads((RESULTS / "families.json").read_text(encoding="utf-8"))["families"]
    now = [report.to_dict() for report in family_reports()]
    assert [{key: row[key] for key in ("name", "title", "classes", "converts", "keeps", "cannot")} for row in told] == [
        {key: row[key] for key in ("name", "title", "classes", "converts", "keeps", "cannot")} for row in now
    ]
    assert all(row["ok"] for row in told)
