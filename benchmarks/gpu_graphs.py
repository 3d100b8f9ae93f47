"""CUDA graphs for the stages of benchmarks/gpu.py: what a device takes alone, without the time that launching does."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARMUP = 3  # calls on a side stream, before capturing: libraries allocate and choose what they run there


def captured(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``function`` captured once, as a call that replays it; what it returned is kept alive. On a CPU, where there is
    nothing to capture, the function itself: what a rehearsal needs.

    The function has to do the same on every call, without waiting for the device; gradients that it makes with
    `torch.autograd.grad` or accumulates are those of the capture's memory.
    """
    if device.type != "cuda":
        return function
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            function()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()

    def replay() -> object:
        graph.replay()
        return kept

    return replay
