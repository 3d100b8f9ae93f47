"""Layers, forward + backward (input and weight gradients), and the forward alone, against the plain layer.

    pytest -q -s benchmarks/bench_layers.py
    BCOS_BENCH_CONTENDERS=eager BCOS_BENCH_DTYPE=bfloat16 pytest -q -s benchmarks/bench_layers.py -k resnet50

Every distinct convolution of ResNet-50 and DenseNet-121, every B-cos linear of the ViTs. peer: the eager layer of the
package bcos. Rows of layers_<network>.json (…_bfloat16.json): median_ms, ratio and its quartiles of forward + backward;
forward_ms and forward_ratio, of a forward that keeps what its backward needs.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bcos_kernels
from bcos_kernels import reference
from bcosification.evaluation.measuring import interleaved, summarized

from .protocol import Results, Settings, chosen, dtype, geometric_mean
from .shapes import convolutions, linears

CONTENDERS = ("plain", "plain-compiled", "peer", "peer-compiled", "ours", "ours-compiled")
DEFAULT = ("plain", "peer", "peer-compiled", "ours")  # compiling is ten seconds a shape and contender on two cores


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


def measure(results: Results, label: str, layers: dict, inputs, dy, oracle, settings: Settings) -> dict[str, float]:
    """Numbers first, then times; returns the ratios to plain. `layers`: plain, peer and ours as functions."""
    torch.compiler.reset()
    double = [t.detach().double().requires_grad_() for t in inputs]
    plain = {"plain": torch.autograd.grad(layers["plain"](*double), double, dy.double())}
    bcos = torch.autograd.grad(oracle(*double), double, dy.double())
    functions = {}
    for name in chosen(CONTENDERS, DEFAULT):
        kind, _, how = name.partition("-")
        functions[name] = torch.compile(layers[kind], dynamic=False) if how else layers[kind]
        for got, expected in zip(step(functions[name], inputs, dy)(), plain.get(kind, bcos), strict=True):
            error = (got.double() - expected).norm() / expected.norm()
            assert error < (1e-5 if dy.dtype == torch.float32 else 1e-2), (label, name, error)
    summary = summarized(
        interleaved({name: step(f, inputs, dy) for name, f in functions.items()}, rounds=settings.rounds)
    )
    forward = summarized(
        interleaved({name: lambda f=f: f(*inputs) for name, f in functions.items()}, rounds=settings.rounds)
    )
    for name, values in summary.items():
        results.add(label, name, dtype=str(dy.dtype).removeprefix("torch."), batch=settings.batch, **values,
                    forward_ms=forward[name]["median_ms"], forward_ratio=forward[name]["ratio"])  # fmt: skip
    print(f"{label:48s}" + "  ".join(f"{n} {v['ratio']:.2f}" for n, v in summary.items()), flush=True)
    return {name: values["ratio"] for name, values in summary.items()}


def conclude(title: str, ratios: list[dict[str, float]]) -> None:
    for name in ratios[0]:
        values = [ratio[name] for ratio in ratios]
        print(f"{title}: {name}: geometric mean {geometric_mean(values):.3f}, worst {max(values):.2f}, {len(values)} "
              "shapes", flush=True)  # fmt: skip


def suite(name: str) -> tuple[Results, torch.dtype, Settings]:
    kind, of = dtype()
    return Results(f"layers_{name}" + ("" if kind == "float32" else f"_{kind}")), of, Settings.read(batch=8, rounds=9)


@pytest.mark.parametrize("network", ["resnet50", "densenet121"])
def test_conv2d(network):
    torch.manual_seed(0)
    results, of, settings = suite(network)
    ratios = []
    for case in convolutions(network, settings.size):
        x = torch.randn(settings.batch, case["c"], *case["size"], dtype=of)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        w = torch.randn(case["o"], case["c"] // case["groups"], *case["kernel"]) / (case["c"] * 9) ** 0.5
        w = w.to(of, memory_format=torch.channels_last).requires_grad_()
        options = (None, case["stride"], case["padding"], (1, 1), case["groups"])
        layers = {
            "plain": lambda x, w, o=options: F.conv2d(x, w, *o),
            "peer": lambda x, w, o=options: peer_conv2d(x, w, *o),
            "ours": lambda x, w, o=options: bcos_kernels.conv2d(x, w, *o),
        }
        dy = torch.randn_like(layers["plain"](x, w))
        oracle = lambda x, w, o=options: reference.conv2d(x, w, *o)  # noqa: E731
        ratios.append(measure(results, case["label"] + settings.label, layers, (x, w), dy, oracle, settings))
    conclude(network, ratios)


def test_linear():
    torch.manual_seed(0)
    results, of, settings = suite("vit")
    ratios = []
    for case in linears():
        x = torch.randn(settings.batch * case["tokens"], case["k"], dtype=of, requires_grad=True)
        w = (torch.randn(case["n"], case["k"]) / case["k"] ** 0.5).to(of).requires_grad_()
        dy = torch.randn(settings.batch * case["tokens"], case["n"], dtype=of)
        layers = {"plain": F.linear, "peer": peer_linear, "ours": bcos_kernels.linear}
        label = case["label"] + settings.label
        ratios.append(measure(results, label, layers, (x, w), dy, reference.linear, settings))
    conclude("ViT linears", ratios)
