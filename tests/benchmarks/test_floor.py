"""What is counted of layers and networks."""

from __future__ import annotations

import pytest
import torch

from bcos_kernels import selftest_cases
from benchmarks import floor


def test_work_of_layers():
    forward, backward = floor.of_layer(selftest_cases.conv2d("", (2, 16, 9, 7), 24, 3, stride=2, padding=1), 2)
    x, w, y = 2 * 16 * 63, 24 * 16 * 9, 2 * 24 * 5 * 4
    assert forward == (2 * (x + w + y), 2 * y * 16 * 9) and backward == (2 * forward.bytes, 2 * forward.flops)
    maximum, _ = floor.of_layer(selftest_cases.linear("", 10, 16, 8, max_out=2), 4)
    assert maximum == (4 * (160 + 256 + 80), 2 * 10 * 16 * 16)
    depthwise = selftest_cases.conv2d("", (1, 8, 5, 5), 8, 3, groups=8, dilation=2, padding=2)
    assert floor.output_shape(depthwise) == (1, 8, 5, 5) and floor.of_layer(depthwise, 4)[0].flops == 2 * 200 * 9
    assert floor.Work(10**9, 10**12).milliseconds(1000, 10) == pytest.approx(100)
    assert floor.Work(10**9, 10**9).milliseconds(1000, 10) == pytest.approx(1)


def test_the_floor_of_a_step():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5)
    )
    works = [floor.of_layer(selftest_cases.conv2d("", (4, 3, 6, 6), 8, 3, padding=1), 4),
             floor.of_layer(selftest_cases.linear("", 4, 288, 5), 4)]  # fmt: skip
    for rates in ((1.0, 1e9), (1e9, 1.0)):  # bound by memory, by products
        forward, step = floor.of_step(network, (4, 3, 6, 6), 4, rates)
        assert forward == pytest.approx(sum(work.milliseconds(*rates) for work, _ in works))
        assert step == pytest.approx(sum(work.milliseconds(*rates) for pair in works for work in pair))
    assert next(network.parameters()).device.type == "cpu"


def test_the_floor_of_a_step_counts_attention():
    attention = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    attention.self_attn.in_proj_weight.requires_grad_()
    forward, step = floor.of_step(attention, (2, 7, 16), 4, (1e9, 1.0))
    linears = 2 * 14 * (2 * 16 * 32)
    assert forward * 1e9 > linears + 2 * 14 * 3 * 16 * 16 and step == pytest.approx(3 * forward)
