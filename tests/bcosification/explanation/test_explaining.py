"""`explain` against the frozen replay, and what it leaves alone."""

import json
import threading

import numpy as np
import pytest
import torch
from bcos.common import BcosUtilMixin
from PIL import Image
from torch import nn

from bcosification.convert.frozen_replay import frozen_replay
from bcosification.explanation import Explanation, explain
from bcosification.nn import Normalize, explanation_mode
from tests.bcosification import tiny_networks
from tests.bcosification.tiny_networks import CLASSES, SIZE, build

TARGETS = [1, 4, 0]


@pytest.fixture(params=tiny_networks.NETWORKS)
def network(request):
    return build(request.param)


def assert_same(first, second, **tolerances):
    for name in ("images", "logits", "targets", "weights", "contributions", "constant"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), **tolerances)


def test_weights_and_constant_are_those_of_the_frozen_replay(network):
    x6 = tiny_networks.images()
    explanation, oracle = explain(network, x6, TARGETS), frozen_replay(network, x6)
    torch.testing.assert_close(explanation.weights, oracle.gradient(TARGETS), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(explanation.constant, oracle.constant(TARGETS), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(explanation.logits, network(x6))
    torch.testing.assert_close(explanation.contributions, (x6 * oracle.gradient(TARGETS)).sum(1))
    chosen = explanation.logits[torch.arange(3), explanation.targets]
    torch.testing.assert_close(explanation.contributions.sum((1, 2)) + explanation.constant, chosen)
    assert explanation.targets.tolist() == TARGETS and len(explanation) == 3


def test_without_targets_the_predictions_are_explained(network):
    x6 = tiny_networks.images(4)
    predicted = network(x6).argmax(1)
    assert_same(explain(network, x6), explain(network, x6, predicted), rtol=0, atol=0)


@pytest.mark.parametrize(
    "targets", [2, torch.tensor(2), [2, 2, 2], torch.tensor([2, 2, 2], dtype=torch.int32), np.array([2, 2, 2])]
)
def test_forms_of_targets(targets):
    network, x6 = build("own_convnet"), tiny_networks.images()
    assert_same(explain(network, x6, targets), explain(network, x6, [2] * 3), rtol=0, atol=0)


def test_three_channels_are_encoded(network):
    x6 = tiny_networks.images()
    assert_same(explain(network, x6[:, :3], 1), explain(network, x6, 1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["peer_convnet", "own_transformer"])
def test_batches_give_what_single_images_give(name):
    network, x6 = build(name), tiny_networks.images(5)
    whole = explain(network, x6)
    assert_same(explain(network, x6, batch_size=2), whole, rtol=1e-9, atol=1e-12)
    third = explain(network, x6[2:3])
    assert_same(third, whole[2], rtol=1e-9, atol=1e-12)
    assert_same(whole[[2, 4]], explain(network, x6[[2, 4]]), rtol=1e-9, atol=1e-12)


def test_images_of_another_dtype_are_explained_in_the_models():
    network, x6 = build("peer_convnet"), tiny_networks.images()
    explanation = explain(network, x6.float(), 0)
    assert explanation.weights.dtype == torch.float64
    torch.testing.assert_close(explanation.weights, explain(network, x6.float().double(), 0).weights)
    low = explanation.to(torch.float32)
    assert low.weights.dtype == low.logits.dtype == torch.float32 and low.targets.dtype == torch.int64
    torch.testing.assert_close(low.weights, explanation.weights.float(), rtol=0, atol=0)


def test_the_model_and_the_images_are_left_alone(network):
    network.train()
    network.get_submodule(next(name for name, _ in network.named_children())).eval()
    frozen = next(network.parameters()).requires_grad_(False)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: m.training for name, m in network.named_modules()}
    state = {key: value.clone() for key, value in network.state_dict().items()}
    x6 = tiny_networks.images().requires_grad_()
    explanation = explain(network, x6, 0)
    assert {name: m.training for name, m in network.named_modules()} == before
    assert not any(getattr(m, "detach", False) for m in network.modules())
    assert all(bool((p.grad == 1).all()) for p in network.parameters())
    assert all(p.requires_grad == (p is not frozen) for p in network.parameters())
    assert all(bool((value == state[key]).all()) for key, value in network.state_dict().items())
    assert x6.grad is None and x6.requires_grad
    for name in ("images", "logits", "weights", "contributions", "constant"):
        assert not getattr(explanation, name).requires_grad


def test_what_does_not_add_up_is_told():
    network, x6 = build("own_transformer"), tiny_networks.images()
    network.additive_parameters = ["class_token"]
    with pytest.warns(UserWarning, match=r"contributions \+ constant = logit, got"):
        explain(network, x6)
    gated = nn.Sequential(build("peer_convnet"), nn.Softplus())
    with pytest.warns(UserWarning, match="not linear in explanation mode"):
        explain(gated, x6)


def test_what_adds_up_is_not_warned_of(network, recwarn):
    explain(network.float(), tiny_networks.images().float())
    assert not [str(w.message) for w in recwarn if "constant = logit" in str(w.message)]


def test_training_mode_does_not_change_the_explanation():
    network = nn.Sequential(build("peer_convnet"), nn.Dropout(0.5)).train()
    assert_same(explain(network, tiny_networks.images(), 1), explain(network.eval(), tiny_networks.images(), 1))


def test_inside_explanation_mode_the_mode_stays_on(network):
    x6 = tiny_networks.images()
    outside = explain(network, x6, 1)
    with explanation_mode(network):
        assert_same(explain(network, x6, 1), outside, rtol=0, atol=0)
        assert all(m.is_in_explanation_mode for m in network.modules() if hasattr(m, "is_in_explanation_mode"))
    assert not any(getattr(m, "detach", False) for m in network.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off(mode):
    network, x6 = build("own_convnet"), tiny_networks.images()
    with mode():
        inside = explain(network, x6.clone(), 1)
    assert_same(inside, explain(network, x6, 1), rtol=0, atol=0)


def test_modes_are_restored_after_an_error():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = build("own_convnet")

        def forward(self, x):
            self.network(x)
            raise RuntimeError("in the middle")

    model = Fails().train()
    with pytest.raises(RuntimeError, match="in the middle"):
        explain(model, tiny_networks.images())
    assert all(m.training for m in model.modules()) and not any(getattr(m, "detach", False) for m in model.modules())


def test_concurrent_explanations():
    network = build("own_transformer").train()
    batches = [tiny_networks.images(2, seed=seed) for seed in range(6)]
    expected = [explain(network, x6, 1) for x6 in batches]
    results, start = {}, threading.Barrier(len(batches))

    def work(index):
        start.wait()
        results[index] = [explain(network, batches[index], 1, batch_size=1) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, explanations in results.items():
        for explanation in explanations:
            assert_same(explanation, expected[index], rtol=1e-9, atol=1e-12)
    assert len(results) == len(batches)
    assert all(m.training for m in network.modules()) and not any(
        m.detach for m in network.modules() if m is not network and hasattr(m, "detach")
    )


@pytest.mark.parametrize(("smooth", "percentile"), [(15, 99.5), (3, 99.5), (None, 90.0), (0, 100), (1, 50.0)])
def test_the_picture_is_the_peers(network, smooth, percentile):
    x6 = tiny_networks.images()
    explanation = explain(network, x6, TARGETS)
    for i in range(3):
        picture = explanation.image(i, smooth=smooth, percentile=percentile)
        assert picture.dtype == np.float32 and picture.shape == (16, 16, 4)
        assert picture.min() >= 0 and picture.max() <= 1
        peer = BcosUtilMixin.gradient_to_image(
            x6[i].float(), explanation.weights[i].float(), smooth=smooth, alpha_percentile=percentile
        )
        np.testing.assert_allclose(picture, peer, rtol=0, atol=1e-6)


def test_against_the_peers_own_explain():
    class Peer(BcosUtilMixin, nn.Sequential):
        pass

    network, x6 = Peer(build("peer_convnet").float()).eval(), tiny_networks.images(1).float()
    theirs = network.explain(x6.clone().requires_grad_())
    ours = explain(network, x6)
    assert ours.targets.item() == theirs["prediction"]
    torch.testing.assert_close(ours.weights, theirs["dynamic_linear_weights"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours.contributions, theirs["contribution_map"], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(ours.image(0), theirs["explanation"], atol=1e-5)


def test_save(tmp_path):
    network, x6 = build("peer_convnet").float(), tiny_networks.images(2).float()
    explanation = explain(network, x6, [1, 3])
    files = explanation.save(tmp_path / "new", names=["cat", "dog"], class_names=list("abcde"), smooth=3)
    assert sorted(path.name for path in files) == sorted(path.name for path in (tmp_path / "new").iterdir())
    picture = np.asarray(Image.open(tmp_path / "new" / "dog_explanation.png"), dtype=np.float32) / 255
    assert picture.shape == (224, 224, 4)  # 16 x 16, each pixel 14 x 14
    picture = picture[7::14, 7::14]
    np.testing.assert_allclose(picture, explanation.image(1, smooth=3), atol=0.5 / 255 + 1e-6)
    explanation.save(tmp_path / "small", names=["cat", "dog"], size=None)
    image = np.asarray(Image.open(tmp_path / "small" / "cat_image.png"), dtype=np.float32) / 255
    np.testing.assert_allclose(image[..., :3], x6[0, :3].permute(1, 2, 0).numpy(), atol=0.5 / 255 + 1e-6)
    summary = json.loads((tmp_path / "new" / "explanations.json").read_text())
    assert [(entry["name"], entry["target_name"]) for entry in summary] == [("cat", "b"), ("dog", "d")]
    for entry in summary:
        assert entry["contributions"] + entry["constant"] == pytest.approx(entry["logit"], abs=1e-4)


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a"], "2 different names"), (["a", "a"], "2 different names"), (["a", "../b"], "without folders")],
)
def test_save_refuses_names(tmp_path, names, message):
    explanation = explain(build("peer_convnet"), tiny_networks.images(2), 0)
    with pytest.raises(ValueError, match=message):
        explanation.save(tmp_path / "out", names=names)
    with pytest.raises(ValueError, match="expected size >= 0, got -5"):
        explanation.save(tmp_path / "out", size=-5)
    assert not (tmp_path / "out").exists()


def test_save_where_a_file_stands(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        explain(build("peer_convnet"), tiny_networks.images(1), 0).save(tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.rand(6, 16, 16)}, ValueError, r"got \(6, 16, 16\) \(one image: images\[None\]\)"),
        ({"images": torch.rand(2, 4, 16, 16)}, ValueError, "3 channels, or 6 .* got 4 channels"),
        ({"images": torch.rand(0, 6, 16, 16)}, ValueError, "at least one image"),
        ({"images": torch.zeros(1, 6, 16, 16, dtype=torch.uint8)}, TypeError, "floating-point images .* torch.uint8"),
        ({"images": np.zeros((1, 6, 16, 16))}, TypeError, "as a tensor, got ndarray"),
        ({"targets": CLASSES}, ValueError, r"^explain: expected targets in \[0, 4\], got"),
        ({"targets": -1}, ValueError, r"^explain: expected targets in \[0, 4\], got"),
        ({"targets": [0, 1]}, ValueError, r"shape \(3,\), got \(2,\)"),
        ({"targets": [0.5] * 3}, TypeError, "integer targets"),
        ({"targets": torch.tensor([True, False, True])}, TypeError, "integer targets"),
        ({"targets": "cat"}, TypeError, "int, a list of ints or a tensor"),
        ({"batch_size": 0}, ValueError, "batch_size >= 1, got 0"),
        ({"model": nn.Sequential(nn.Conv2d(6, 5, 16), nn.Flatten())}, ValueError, "expected a B-cos model"),
        (
            {"model": nn.Sequential(Normalize([0.5] * 6, [1] * 6), nn.Conv2d(6, 5, 16), nn.Flatten())},
            ValueError,
            "expected a B-cos model",
        ),
    ],
)
def test_bad_input(change, error, message):
    call = {"model": build("peer_convnet"), "images": tiny_networks.images(), "targets": None} | change
    with pytest.raises(error, match=message):
        explain(**call)
    assert not any(getattr(m, "detach", False) for m in call["model"].modules())


def test_index_out_of_range():
    explanation = explain(build("peer_convnet"), tiny_networks.images(2), 0)
    assert isinstance(explanation[-1], Explanation)
    with pytest.raises(IndexError, match="below 2, got 2"):
        explanation[2]


def test_images_out_of_range_are_told_of_models_that_do_not_tell_themselves(recwarn):
    network = build("peer_convnet")
    explain(network, torch.rand(1, 3, SIZE, SIZE, dtype=torch.float64), 0)
    assert not [w for w in recwarn if "in [0, 1]" in str(w.message)]
    with pytest.warns(UserWarning, match=r"explain: expected images in \[0, 1\], got values from .*; they are encoded"):
        explain(network, 255 * torch.rand(1, 3, SIZE, SIZE, dtype=torch.float64), 0)
