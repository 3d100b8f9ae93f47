"""Whole networks on the emulated CUDA backend give what they give on the CPU's: training, inference, explanations."""

from __future__ import annotations

import copy

import pytest
import torch

import bcos_kernels
import bcosification
from bcosification.evaluation.benchmarking import Step, gradient_error
from tests.bcos_kernels import harness
from tests.bcos_kernels.cuda.emulated import emulated
from tests.bcosification.contract import networks

pytestmark = pytest.mark.skipif(not harness.has_compiler(), reason="no C++ compiler here")
BOUND = 2e-3  # float32, through a whole network, whose ReLUs near zero tip this way or that


@pytest.fixture(scope="module", params=networks.SMALL)
def network(request):
    name = request.param
    model = networks.converted(name, torch.float32).to(memory_format=torch.channels_last)
    images = networks.images(name, count=4, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    return model, images


def on_both(run) -> tuple:
    with bcos_kernels.backend("cpu"):
        expected = run()
    with emulated(), bcos_kernels.backend("cuda"):
        got = run()
        assert set(bcos_kernels.dispatched().values()) == {"cuda"}
    return got, expected


@pytest.mark.parametrize("memory", ["default", "low"])
def test_a_training_step(network, memory):
    model, images = network

    def run():
        bcos_kernels.dispatch._last_run.clear()
        mine = bcosification.fuse(copy.deepcopy(model), memory=memory)
        return Step(mine, images, torch.arange(len(images))).gradients()

    got, expected = on_both(run)
    assert gradient_error(got, expected) < BOUND


def test_logits_and_explanations(network):
    model, images = network

    def run():
        bcos_kernels.dispatch._last_run.clear()
        explanation = bcosification.explain(model, images)
        with torch.no_grad():
            return {"logits": model.eval()(images), "weights": explanation.weights, "constant": explanation.constant}

    got, expected = on_both(run)
    assert gradient_error(got, expected) < BOUND
