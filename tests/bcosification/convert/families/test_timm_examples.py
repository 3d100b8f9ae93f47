"""Every timm family by its own example: exact at B = 1, explained as the frozen replay says, saved, fused."""

import copy

import pytest
import torch

import bcos_kernels
from bcosification import bcosify, explain, fuse, load
from bcosification.convert.families import FAMILIES
from bcosification.convert.family_checks import randomized
from bcosification.convert.frozen_replay import frozen_replay
from bcosification.convert.preprocessing import Preprocessing
from tests.bcosification.convert.standard_networks import relative_error

TIMM = {family.name: family for kind, family in FAMILIES.items() if kind.startswith("timm.")}
MADE: dict = {}


def made(name):
    """The example of a family, random, in float64, made once, and two images."""
    if name not in MADE:
        torch.manual_seed(0)
        MADE[name] = randomized(TIMM[name].example())
    size = TIMM[name].example_size or TIMM[name].input_size(MADE[name])
    images = torch.rand(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return MADE[name], images


@pytest.mark.parametrize("name", TIMM)
def test_exact_at_b_1(name):
    network, images = made(name)
    for head in ("before_pool", "keep"):
        converted = bcosify(
            network, **{**TIMM[name].example_options, "b": 1, "bias": "keep", "pool": "keep", "head": head}
        )
        found = Preprocessing.from_dict(converted.config)
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (found.mean, found.std))
        with torch.no_grad():
            expected = TIMM[name].output(network((images - mean) / std))
            error = relative_error(converted(images), expected)
        moved = converted.config["head_before_pool"] and TIMM[name].head_move_changes(network) is not None
        assert error > 1e-8 if moved else error < 1e-10
        assert float(expected.std()) > 0


@pytest.mark.parametrize("name", TIMM)
def test_explanations_are_those_of_the_frozen_network(name):
    network, images = made(name)
    converted = bcosify(network, **{**TIMM[name].example_options, "bias": "keep", "logit_bias": -1.5})
    explanation = explain(converted, images)
    replay = frozen_replay(converted, converted.encode(images))
    assert replay.is_affine(1e-8) and replay.recorded["scale"] > 3
    expected = replay.gradient(explanation.targets)
    size = float(expected.abs().max())
    torch.testing.assert_close(explanation.weights, expected, rtol=1e-7, atol=1e-9 * size)
    constant = replay.constant(explanation.targets)
    assert float((explanation.constant - constant).abs().max()) < 1e-8 * float(constant.abs().max())


@pytest.mark.parametrize("name", TIMM)
def test_saved_loaded_and_fused(name, tmp_path, monkeypatch):
    network, images = made(name)
    converted = bcosify(network, **TIMM[name].example_options)
    with torch.no_grad():
        expected = converted(images)
    converted.save_pretrained(tmp_path)
    loaded = load(tmp_path, model=None if converted.config["architecture"] else network)
    with torch.no_grad():
        assert torch.equal(loaded(images), expected)
    calls = []
    original = bcos_kernels.conv2d_batch_norm
    monkeypatch.setattr(bcos_kernels, "conv2d_batch_norm", lambda *a, **k: calls.append(1) or original(*a, **k))
    report = fuse(converted).fusion_report
    with torch.no_grad():
        copy.deepcopy(converted)(images)
    assert len(calls) == len(report.chains)
