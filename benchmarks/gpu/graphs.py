"""CUDA graphs for the stages of `make gpu`: what a device takes alone, without the time that launching does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache

import torch

WARMUP = 3  # calls before capturing: libraries allocate and choose what they run there, Triton compiles


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def capturing_stream(device: torch.device):
    """Context manager: on a GPU what runs inside runs on the stream that `captured` captures, after all that was begun
    before. A forward whose backward is to be captured alone has to: autograd runs a backward on its forward's stream.
    """
    if device.type != "cuda":
        yield
        return
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def captured(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``function`` captured once, as a call that replays it and gives what it returned. On a CPU, where there is
    nothing to capture, the function itself: what a rehearsal needs.

    The function has to do the same on every call, without waiting for the device.
    """
    if device.type != "cuda":
        return function
    with capturing_stream(device):
        for _ in range(WARMUP):
            function()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_stream(device)):
        kept = function()

    def replay() -> object:
        graph.replay()
        return kept

    return replay
