"""Times on a GPU, by events that are stood in for."""

from __future__ import annotations

import types

import pytest
import torch

from bcos_kernels import selftest
from bcosification.evaluation import measuring


@pytest.fixture
def events(monkeypatch):
    """Events of a device whose clock a call of `tick` moves on; `waits` counts how often the host waited."""
    clock = types.SimpleNamespace(ms=0.0, waits=0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream=None):
            self.at = clock.ms

        def elapsed_time(self, end):
            return end.at - self.at

    def wait(device=None):
        clock.waits += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    return clock


def ticking(clock, ms):
    def run():
        clock.ms += ms

    return run


def test_suites_time_by_events_and_wait_once_a_round(events):
    runs = {"plain": ticking(events, 2.0), "ours": ticking(events, 3.0)}
    times = measuring.interleaved(runs, rounds=4, warmup=1, device=torch.device("cuda"))
    assert times == {"plain": [0.002] * 4, "ours": [0.003] * 4} and events.waits == 1 + 4


def test_the_selftest_times_by_events_and_waits_once(events):
    runs = {"reference": ticking(events, 2.0), "triton": ticking(events, 3.0)}
    assert selftest._milliseconds(runs, rounds=5) == {"reference": 2.0, "triton": 3.0} and events.waits == 1
