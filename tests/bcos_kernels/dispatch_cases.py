"""Small calls of the ops, and a dispatcher that has seen nothing yet: for the tests of dispatch.py."""

from __future__ import annotations

import pytest
import torch

import bcos_kernels
from bcos_kernels import dispatch
from tests.bcos_kernels import harness

CPU = harness.BACKENDS[1]  # "cpu", skipped only where it cannot have been built


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Every test begins with nothing dispatched and nothing warned about."""
    monkeypatch.setattr(dispatch, "_last_run", {})
    monkeypatch.setattr(dispatch, "_warned", set())


def linear(b: float = 2.0):
    x, weight = harness.randn((5, 6), 1, torch.float32), harness.randn((4, 6), 2, torch.float32)
    return bcos_kernels.linear(x.requires_grad_(), weight.requires_grad_(), b=b)


def conv2d(b: float = 2.0):
    x, weight = harness.randn((2, 4, 6, 6), 1, torch.float32), harness.randn((5, 4, 3, 3), 2, torch.float32)
    return bcos_kernels.conv2d(x.requires_grad_(), weight.requires_grad_(), b=b)


def batch_norm_uncentered(training: bool = True):
    x, running_var = harness.randn((2, 4, 3, 3), 1, torch.float32).requires_grad_(), torch.ones(4)
    return bcos_kernels.batch_norm_uncentered(x, running_var, training=training)


def conv2d_batch_norm():
    x, weight = harness.randn((2, 4, 6, 6), 1, torch.float32), harness.randn((5, 4, 3, 3), 2, torch.float32)
    x, weight = x.to(memory_format=torch.channels_last).requires_grad_(), weight.requires_grad_()
    return bcos_kernels.conv2d_batch_norm(x, weight, running_var=torch.ones(5), training=False, activation="relu")


def layer_norm():
    return bcos_kernels.layer_norm(harness.randn((5, 6), 1, torch.float32).requires_grad_(), 6)


OPS = {
    "linear": linear,
    "conv2d": conv2d,
    "batch_norm_uncentered": batch_norm_uncentered,
    "conv2d_batch_norm": conv2d_batch_norm,
    "layer_norm": layer_norm,
}
