"""The least that a layer can take on a device: bytes that have to move and products that have to be made, over rates
that were measured there. Bytes and FLOPs are counted, not measured.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bcos_kernels.selftest_cases import Case


class Work(NamedTuple):
    """bytes: every input read and every result written once. flops: two for a product and its addition."""

    bytes: int
    flops: int

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def milliseconds(self, gb_per_s: float, tflop_per_s: float) -> float:
        """The longer of moving and multiplying, each at its rate."""
        return max(self.bytes / gb_per_s / 1e6, self.flops / tflop_per_s / 1e9)


def output_shape(case: Case) -> tuple[int, ...]:
    """Shape of y of a layer's case."""
    x, weight, options = case.tensors["x"], case.tensors["weight"], case.options
    units = weight[0] // options.get("max_out", 1)
    if case.op.startswith("linear"):
        return x[0], units
    stride, padding, dilation = (options.get(k, v) for k, v in (("stride", 1), ("padding", 0), ("dilation", 1)))
    edges = zip(x[2:], weight[2:], strict=True)
    return x[0], units, *((edge + 2 * padding - dilation * (size - 1) - 1) // stride + 1 for edge, size in edges)


def of_layer(case: Case, itemsize: int) -> tuple[Work, Work]:
    """(forward, backward) of a linear layer or a convolution, ``itemsize`` bytes an element: the forward reads x and
    w and writes y; the backward reads ∂L/∂y, y, x and w and writes dx and dw, and makes two products of the forward's
    size. The norms cost no bytes (x is read anyway), and next to the products no FLOPs."""
    weight = case.tensors["weight"]
    x, w, y = math.prod(case.tensors["x"]), math.prod(weight), math.prod(output_shape(case))
    flops = 2 * y * case.options.get("max_out", 1) * math.prod(weight[1:])
    return Work(itemsize * (x + w + y), flops), Work(itemsize * 2 * (x + w + y), 2 * flops)


def of_step(model: nn.Module, shape: tuple[int, ...], itemsize: int, rates: tuple[float, float]) -> tuple[float, float]:
    """(forward, forward and backward) of a network in milliseconds: its convolutions and linear layers at the floor
    each, one after the other, everything between them for free; or all its FLOPs at the matrix rate, where that is
    more (attention is no such layer).

    Args:
        model: a plain network; it is copied to the device "meta". shape: of a batch of images.
        rates: GB/s and TFLOP/s, as measured.
    """
    model = copy.deepcopy(model).to("meta").train()
    layers: list[tuple[Work, Work]] = []

    def note(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        weight = tuple(layer.weight.shape)
        if isinstance(layer, nn.Linear):
            x = arguments[0].numel() // weight[1], weight[1]
            case = Case("linear", "", {"x": x, "weight": weight})
        else:
            options = {"stride": layer.stride[0], "padding": layer.padding[0], "dilation": layer.dilation[0]}
            case = Case("conv2d", "", {"x": tuple(arguments[0].shape), "weight": weight}, options)
        layers.append(of_layer(case, itemsize))

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_pre_hook(note)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(shape, device="meta"))
    # a backward makes two products for one of the forward; counted, those of a depthwise convolution would be a dense
    # one's
    flops = counter.get_total_flops(), 3 * counter.get_total_flops()
    forward = sum(work.milliseconds(*rates) for work, _ in layers)
    both = forward + sum(work.milliseconds(*rates) for _, work in layers)
    return tuple(max(ms, Work(0, n).milliseconds(*rates)) for ms, n in zip((forward, both), flops, strict=True))
