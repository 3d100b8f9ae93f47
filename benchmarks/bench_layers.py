"""Layers, forward + backward (input and weight gradients), against the plain layer and the peer's eager layer.

pytest -q -s benchmarks/bench_layers.py
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

import bcos_kernels
from bcos_kernels import reference

from .protocol import Results, geometric_mean, interleaved, summarized
from .shapes import convolutions, linears

BATCH = int(os.environ.get("BCOS_BENCH_BATCH", "8"))
ROUNDS = int(os.environ.get("BCOS_BENCH_ROUNDS", "9"))


def peer_conv2d(x, weight, bias, stride, padding, dilation, groups):
    """The eager layer of the package bcos 0.1.3, as a function of an unnormalised weight (B-cosified models')."""
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    squares = x**2
    squares = squares.sum(1, keepdim=True) if groups == 1 else squares.unflatten(1, (groups, -1)).sum(2)
    kernel = weight.shape[2:]
    norm = F.avg_pool2d(squares, kernel, padding=padding, stride=stride) * (kernel[0] * kernel[1])
    norm = (norm + 1e-6).sqrt_()
    if groups > 1:
        norm = norm.repeat_interleave(out.shape[1] // groups, dim=1)
    return out.abs() / norm * out


def peer_linear(x, weight):
    out = F.linear(x, weight)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-12
    return out.abs() / norm * out


def step(function, inputs, dy):
    def run():
        y = function(*inputs)
        return torch.autograd.grad(y, inputs, dy)

    return run


def measure(results: Results, label: str, contenders: dict, inputs, dy, oracle) -> float:
    """Numbers first, then times; returns ours / plain."""
    double = [t.detach().double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(oracle(*double), double, dy.double())
    for got, reference_gradient in zip(step(contenders["ours"], inputs, dy)(), expected, strict=True):
        error = (got.double() - reference_gradient).norm() / reference_gradient.norm()
        assert error < (1e-5 if dy.dtype == torch.float32 else 1e-2), (label, error)
    times = interleaved({name: step(f, inputs, dy) for name, f in contenders.items()}, rounds=ROUNDS)
    summary = summarized(times)
    for name, values in summary.items():
        results.add(label, name, dtype=str(dy.dtype).removeprefix("torch."), batch=BATCH, **values)
    print(f"{label:48s}" + "  ".join(f"{n} {v['ratio']:.2f}" for n, v in summary.items()), flush=True)
    return summary["ours"]["ratio"]


@pytest.mark.parametrize("network", ["resnet50", "densenet121"])
def test_conv2d(network):
    torch.manual_seed(0)
    results = Results(f"layers_{network}")
    ratios = []
    for case in convolutions(network):
        x = torch.randn(BATCH, case["c"], *case["size"]).to(memory_format=torch.channels_last).requires_grad_()
        w = torch.randn(case["o"], case["c"] // case["groups"], *case["kernel"]) / (case["c"] * 9) ** 0.5
        w = w.to(memory_format=torch.channels_last).requires_grad_()
        options = (None, case["stride"], case["padding"], (1, 1), case["groups"])
        contenders = {
            "plain": lambda x, w, o=options: F.conv2d(x, w, *o),
            "peer": lambda x, w, o=options: peer_conv2d(x, w, *o),
            "ours": lambda x, w, o=options: bcos_kernels.conv2d(x, w, *o),
        }
        dy = torch.randn_like(contenders["plain"](x, w))
        oracle = lambda x, w, o=options: reference.conv2d(x, w, *o)  # noqa: E731
        ratios.append(measure(results, case["label"], contenders, (x, w), dy, oracle))
    print(f"{network}: geometric mean {geometric_mean(ratios):.3f}, worst {max(ratios):.2f}, {len(ratios)} shapes")


def test_linear():
    torch.manual_seed(0)
    results = Results("layers_vit")
    ratios = []
    for case in linears():
        x = torch.randn(BATCH * case["tokens"], case["k"], requires_grad=True)
        w = (torch.randn(case["n"], case["k"]) / case["k"] ** 0.5).requires_grad_()
        dy = torch.randn(BATCH * case["tokens"], case["n"])
        contenders = {"plain": F.linear, "peer": peer_linear, "ours": bcos_kernels.linear}
        ratios.append(measure(results, case["label"], contenders, (x, w), dy, reference.linear))
    print(f"ViT linears: geometric mean {geometric_mean(ratios):.3f}, worst {max(ratios):.2f}, {len(ratios)} shapes")
