"""The one measurement protocol: same process, same inputs, contenders interleaved, warm-up first, medians.

`interleaved` times; `bytes_kept` counts what a forward leaves behind for the backward; `Results` writes one JSON row
per measurement. pytest-benchmark runs its cases one after the other, which on a shared machine compares different
minutes: so the suites here are pytest files that loop over contenders themselves.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(
    contenders: dict[str, Callable[[], object]], *, rounds: int = 9, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds per call of every contender, called in turn; the order rotates from round to round."""
    for _ in range(warmup):
        for run in contenders.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            contenders[name]()
            times[name].append(time.perf_counter() - start)
    return times


def summarized(times: dict[str, list[float]], baseline: str = "plain") -> dict[str, dict[str, float]]:
    """Median milliseconds, and the ratio to the baseline: of the medians, with the quartiles of the rounds' ratios."""
    result = {}
    for name, seconds in times.items():
        ratios = sorted(a / b for a, b in zip(seconds, times[baseline], strict=True))
        result[name] = {
            "median_ms": statistics.median(seconds) * 1e3,
            "ratio": statistics.median(seconds) / statistics.median(times[baseline]),
            "ratio_q1": ratios[len(ratios) // 4],
            "ratio_q3": ratios[-1 - len(ratios) // 4],
        }
    return result


def bytes_kept(forward: Callable[[], object]) -> int:
    """Allocator bytes alive after the forward minus before, its result held (CPU: the profiler's memory events)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = forward()
    events = profile.profiler.kineto_results.events()
    total = sum(event.nbytes() for event in events if event.name() == "[memory]")
    del result
    return total


def machine() -> dict[str, object]:
    """What a row has to say about where it was measured."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "device": processor,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


class Results:
    """Rows of one suite, benchmarks/results/<suite>.json: written after every case, so a cut-off run keeps its rows."""

    def __init__(self, suite: str):
        self.path = RESULTS / f"{suite}.json"
        self.machine = machine()
        self.rows: list[dict[str, object]] = []

    def add(self, case: str, contender: str, **values: object) -> None:
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}
        self.rows.append({"case": case, "contender": contender, **rounded})
        self.path.parent.mkdir(exist_ok=True)
        rows = ",\n  ".join(json.dumps(row) for row in self.rows)
        self.path.write_text(f'{{"machine": {json.dumps(self.machine)},\n "rows": [\n  {rows}\n ]}}\n')


def geometric_mean(values: list[float]) -> float:
    return statistics.geometric_mean(values)
