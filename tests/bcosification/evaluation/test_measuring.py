"""The protocol: who is called when, what is counted."""

import pytest
import torch

from bcosification.evaluation.measuring import bytes_kept, interleaved, machine, peak_bytes, summarized


def test_contenders_take_turns_and_the_order_rotates():
    calls = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = interleaved(runs, rounds=4, warmup=2)
    assert "".join(calls) == "abcabc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys("abc", 4)
    assert all(second >= 0 for seconds in times.values() for second in seconds)


def test_medians_ratios_and_quartiles():
    times = {"plain": [1.0, 2.0, 4.0, 2.0, 2.0], "ours": [2.0, 2.0, 2.0, 3.0, 5.0]}
    summary = summarized(times)
    assert summary["ours"] == {"median_ms": 2000.0, "ratio": 1.0, "ratio_q1": 1.0, "ratio_q3": 2.0}
    assert summary["plain"] == {"median_ms": 2000.0, "ratio": 1.0, "ratio_q1": 1.0, "ratio_q3": 1.0}
    assert summarized(times, "ours")["plain"]["ratio_q1"] == pytest.approx(0.5)


def test_bytes_kept_are_those_alive_after_the_forward():
    x = torch.rand(1000, requires_grad=True)

    def forward():
        torch.empty(5000)  # freed at once
        return x.exp()  # its own result is what its backward needs

    assert bytes_kept(forward) == 4000
    # cos keeps its input exp(x) beside the result; what a Function holds itself counts as well.
    assert bytes_kept(lambda: x.exp().cos()) == 8000


def test_peak_counts_what_is_alive_at_once():
    def run():
        a = torch.empty(1000)
        del a
        b = torch.empty(500)
        return b, torch.empty(250)

    assert peak_bytes(run) == 4000
    assert peak_bytes(lambda: [torch.empty(500), torch.empty(600)]) == 4400


def test_a_machine_is_named():
    told = machine()
    assert told["torch"] == torch.__version__ and told["threads"] == torch.get_num_threads()
    assert told["device"] and len(str(told["date"])) == 10
