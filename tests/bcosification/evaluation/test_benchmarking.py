"""The benchmark of a user's own model: what is in its table, and that wrong numbers are never timed."""

import copy
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.vision_transformer import VisionTransformer

import bcos_kernels
import bcos_kernels.cpu
import bcosification
from bcosification.evaluation import benchmark, benchmarking
from bcosification.evaluation.benchmarking import (
    CONTENDERS,
    Step,
    aligned,
    explain_one_by_one,
    gradient_error,
    input_gradient,
)
from bcosification.evaluation.measuring import bytes_kept
from bcosification.evaluation.peer_style import EagerBcosConv2d, peer_style
from bcosification.explanation.explaining import encode
from bcosification.train.miniature import MEAN, STD, small_resnet
from tests.bcosification.small_clip import clip
from tests.bcosification.small_clip import images as clip_images

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
QUICK = dict(rounds=1, progress=False)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    network = small_resnet(16, num_classes=5)  # torch's own convolutions of 4 channels corrupt the heap
    return network, bcosification.bcosify(network, mean=MEAN, std=STD)


@pytest.fixture
def eager_compiler(monkeypatch):
    """torch.compile without inductor: traced, and run as it is."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiler(model, backend="eager"))


def test_every_contender_has_its_rows(pair, eager_compiler):
    network, converted = pair
    result = benchmark(network, converted, IMAGES, contenders=tuple(CONTENDERS), **QUICK)
    eager = {"plain", "peer", "ours"}
    took_part = {task: {row["contender"] for row in result.rows if row["task"] == task} for task in benchmarking.TASKS}
    compiled = {f"{name}-compiled" for name in eager}
    assert took_part == {"training": set(CONTENDERS), "inference": eager | compiled, "explanation": eager}
    for row in result.rows:
        assert row["images_per_s"] == pytest.approx(3 / row["median_ms"] * 1e3)
        base = next(r for r in result.rows if r["task"] == row["task"] and r["contender"] == "plain")
        assert row["ratio"] == pytest.approx(row["median_ms"] / base["median_ms"])
    kept = {row["contender"]: row["kept_MiB"] for row in result.rows if row["task"] == "training"}
    step = Step(copy.deepcopy(converted), IMAGES, torch.arange(3))
    assert kept["ours"] == pytest.approx(bytes_kept(step.loss) / 2**20, rel=0.02)
    assert kept["peer"] > 1.5 * kept["ours"] > 1.5 * kept["ours-low"]


def test_explanations_of_the_first_images(pair, monkeypatch):
    network, converted = pair
    seen = []
    monkeypatch.setattr(benchmarking, "explain", lambda model, x, **o: (seen.append(x), explain(model, x, **o))[1])
    explain = bcosification.explain
    result = benchmark(network, converted, IMAGES, contenders=("plain", "peer", "ours"), explained=2, **QUICK)
    assert all(torch.equal(x, IMAGES[:2]) for x in seen[1:]) and len(seen) > 2  # the first checks numbers
    for row in result.rows:
        images = 2 if row["task"] == "explanation" else 3
        assert row["images_per_s"] == pytest.approx(images / row["median_ms"] * 1e3)
    assert result.settings["explained"] == 2 and "Explanations of 2 images: of plain" in str(result)


def test_the_share_of_the_fallback_is_told(pair, monkeypatch):
    network, converted = pair

    def told():
        result = benchmark(network, converted, IMAGES, contenders=("plain", "ours"), **QUICK)
        return {row["task"]: row for row in result.rows if row["contender"] == "ours"}, str(result)

    with bcos_kernels.backend("reference"):
        rows, text = told()
    assert all(row["fallback_share"] == 1 for row in rows.values())
    assert "plain PyTorch: training 100 %, inference 100 %, explanation 100 % (" in text

    if bcos_kernels.backends()["cpu"] is not None:
        pytest.skip("no CPU kernels here, so that everything is a fallback")
    rows, text = told()
    assert all(row["fallback_share"] == 0 and row["fallback_ops"] == [] for row in rows.values())
    assert "plain PyTorch: training 0 %, inference 0 %, explanation 0 %." in text

    def refuse(*_):
        raise NotImplementedError("not built")

    monkeypatch.setattr(bcos_kernels.cpu, "batch_norm_uncentered_forward", refuse)  # not part of a fused block: none
    monkeypatch.setattr(bcos_kernels.cpu, "conv2d_backward", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows, text = told()
    assert rows["inference"]["fallback_share"] == 0
    assert 0 < rows["training"]["fallback_share"] < 1 and rows["training"]["fallback_ops"] == ["conv2d_backward"]
    assert f"training {100 * rows['training']['fallback_share']:.0f} %" in text and "(conv2d_backward)." in text


@pytest.mark.parametrize(
    "rounds, told",
    [
        (1, "time relative to plain, of one round: --rounds 5"),
        (2, "time relative to plain [smallest and largest of 2 rounds]."),
        (5, "time relative to plain [quartiles of 5 rounds]."),
    ],
)
def test_the_table_tells_what_its_brackets_hold(pair, rounds, told):
    network, converted = pair
    result = benchmark(network, converted, IMAGES, contenders=("plain", "ours"), **(QUICK | {"rounds": rounds}))
    text = str(result)
    assert told in text
    ours = next(line for line in text.splitlines() if line.startswith("ours "))
    assert ours.count("[") == (3 if rounds > 1 else 0)
    if rounds == 2:
        row = next(row for row in result.rows if (row["task"], row["contender"]) == ("inference", "ours"))
        assert f"[{row['ratio_q1']:.2f}, {row['ratio_q3']:.2f}]" in ours and row["ratio_q1"] <= row["ratio_q3"]


def test_the_models_are_left_alone(pair):
    network, converted = pair
    before = [value.clone() for model in pair for value in model.state_dict().values()]
    modes = [module.training for model in pair for module in model.modules()]
    benchmark(network, converted, IMAGES, contenders=("plain", "ours"), **QUICK)
    after = [value for model in pair for value in model.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert modes == [module.training for model in pair for module in model.modules()]
    assert all(p.grad is None for model in pair for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet", "vit"])
@pytest.mark.parametrize("whole", [True, False])
def test_an_image_tower_is_measured_as_a_classifier_of_directions(name, whole, eager_compiler):
    model = clip(name).float()
    original = model if whole else model.visual
    converted = bcosification.bcosify(original)
    before = copy.deepcopy(converted.state_dict())
    images = clip_images(name, 3).float()
    result = benchmark(original, converted, images, contenders=("plain", "peer", "ours", "ours-compiled"), **QUICK)
    assert {row["task"] for row in result.rows} == set(benchmarking.TASKS) and result.settings["texts"] == 1000
    assert not any("failed" in row for row in result.rows) and "1,000 random directions" in str(result)
    assert converted.state_dict().keys() == before.keys()
    # What is timed: cosines of both towers with the same directions, which depend on the weights.
    plain, ours = benchmarking._as_classifiers(original, converted, images)
    torch.testing.assert_close(plain.directions, ours.embeddings)
    with torch.no_grad():
        tower = model.visual
        expected = F.normalize(tower(images), dim=-1) @ plain.directions.T
        torch.testing.assert_close(plain(images), expected)
        torch.testing.assert_close(ours(images), F.normalize(converted(images), dim=-1) @ plain.directions.T)
    assert ours(images).shape == (3, 1000) and ours.model.text is None
    with pytest.raises(ValueError, match="expected a size that the model takes, got 40 x 40"):
        benchmark(original, converted, torch.rand(1, 3, 40, 40), contenders=("plain", "ours"), **QUICK)


def test_the_table(pair, capsys):
    network, converted = pair
    result = benchmark(network, converted, IMAGES, contenders=("peer", "ours", "ours-low"), rounds=2, progress=True)
    progress = capsys.readouterr().err
    assert progress.startswith("checking numbers") and len(re.findall(r"about \d+ s$", progress, re.M)) == 3
    text = str(result)
    assert text.startswith("batch 3 of 32 x 32 pixels, float32, on ") and "relative to peer-style, eager [" in text
    row = next(row for row in result.rows if row["contender"] == "ours" and row["task"] == "inference")
    line = next(line for line in text.splitlines() if line.startswith("ours  "))
    assert f"{row['ratio']:.2f} [{row['ratio_q1']:.2f}, {row['ratio_q3']:.2f}]" in line
    low = next(line for line in text.splitlines() if line.startswith("ours, memory=low"))
    assert low.count("–") == 2  # inference and explanation
    assert result.to_dict()["rows"] == result.rows and result.to_dict()["settings"]["baseline"] == "peer"


def test_columns_are_aligned():
    assert aligned([["", "a"], ["long", "1"], ["x", "100"]]) == ["        a", "long    1", "x     100"]


def test_a_transformer_under_autocast():
    torch.manual_seed(0)
    network = VisionTransformer(
        image_size=32, patch_size=16, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )
    converted = bcosification.bcosify(network)
    result = benchmark(network, converted, IMAGES, contenders=("plain", "peer", "ours"), dtype="bfloat16", **QUICK)
    assert len(result.rows) == 9 and ", bfloat16, on " in str(result)


def test_wrong_numbers_are_not_timed(pair, monkeypatch):
    norm = EagerBcosConv2d._norm
    monkeypatch.setattr(EagerBcosConv2d, "_norm", lambda self, x: 1.01 * norm(self, x))
    monkeypatch.setattr(benchmarking, "interleaved", lambda *a, **o: pytest.fail("something was timed"))
    with pytest.raises(RuntimeError, match=r"our explanations .* got an error of \d.\de-02; nothing was timed"):
        benchmark(*pair, IMAGES, contenders=("plain", "ours"), **QUICK)


@pytest.mark.parametrize("task", ["training", "inference"])
def test_a_compiled_model_with_other_numbers_is_not_timed(pair, monkeypatch, task):
    def wrong(model):
        def forward(module, inputs, output):
            return output * 2 if module.training == (task == "training") else output

        model.register_forward_hook(forward)
        return model

    monkeypatch.setattr(torch, "compile", wrong)
    what = "gradients" if task == "training" else "logits"
    with pytest.raises(RuntimeError, match=f"expected the {what} of 'ours-compiled' to be those of the same model"):
        benchmark(*pair, IMAGES, contenders=("plain", "ours-compiled"), **QUICK)


def test_a_compiler_that_fails_ends_one_contender(pair, monkeypatch):
    def broken(model):
        raise RuntimeError("no C++ compiler\nat length")

    monkeypatch.setattr(torch, "compile", broken)
    result = benchmark(*pair, IMAGES, contenders=("plain", "ours-compiled", "ours"), **QUICK)
    failed = [(row["task"], row["failed"]) for row in result.rows if "failed" in row]
    assert failed == [(task, "RuntimeError: no C++ compiler") for task in ("training", "inference")]
    assert "ours, compiled, training: failed: RuntimeError: no C++ compiler" in str(result)
    assert len([row for row in result.rows if row["contender"] == "ours"]) == 3


def test_explanations_one_by_one_are_those_of_explain(pair):
    converted = bcosification.bcosify(pair[0].eval(), mean=MEAN, std=STD).eval()
    expected = bcosification.explain(converted, IMAGES).weights
    eager = peer_style(converted)
    got = explain_one_by_one(eager, encode(eager, IMAGES))
    assert (got - expected).norm() < 1e-5 * expected.norm()
    outside = input_gradient(eager, encode(eager, IMAGES))  # of the network, in which the scales depend on the image
    assert (outside - expected).norm() > 0.1 * expected.norm()


def test_the_error_is_relative_to_all_gradients_together():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert gradient_error({"a": a, "b": b}, {"a": a, "b": b}) == 0
    assert gradient_error({"a": a, "b": b + 0.5}, {"a": a, "b": b}) == pytest.approx(0.5**0.5 / 5)
    assert gradient_error({"a": a}, {"a": a, "b": b}) == float("inf")
    assert gradient_error({"a": a}, {"a": 0 * a}) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(contenders=("plain", "mine")), "contenders: expected different ones of plain, .* got plain, mine"),
        (dict(contenders=("ours", "ours")), "got ours, ours"),
        (dict(contenders=()), "got none"),
        (dict(rounds=0), "expected rounds >= 1, got 0"),
        (dict(explained=0), "explained: expected 1 to 1, the images that there are, got 0"),
        (dict(explained=2), "explained: expected 1 to 1, the images that there are, got 2"),
        (dict(dtype="int8"), "dtype: expected one of float32, bfloat16, float16, got 'int8'"),
        (dict(size=2), "expected a size that the model takes, got 2 x 2: "),
    ],
)
def test_bad_input(options, message):
    network = VisionTransformer(
        image_size=32, patch_size=16, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )
    converted = bcosification.bcosify(network)
    size = options.pop("size", 32)
    with pytest.raises(ValueError, match=message):
        benchmark(network, converted, torch.rand(1, 3, size, size), **{"progress": False, **options})
