"""How speed and memory are measured: contenders in turn, medians, ratios with their spread, bytes of the allocator.

One protocol for `bcosify benchmark` and the suites of the repository: same process, same inputs, warm-up first, the
order of the contenders rotated from round to round, so that what else happens on a machine meets all of them.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

__all__ = ["bytes_kept", "fallback_share", "interleaved", "machine", "peak_bytes", "summarized"]

Runs = Mapping[str, Callable[[], object]]


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _mark(device: torch.device | None) -> float | torch.cuda.Event:
    """Now: on the host's clock, or on a CUDA device an event in its current stream, which nothing waits for."""
    if device is None or device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def interleaved(
    contenders: Runs, *, rounds: int = 9, warmup: int = 2, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Seconds per call of every contender, called in turn; the order rotates from round to round.

    Args:
        contenders: what to call, by name.
        rounds: timed calls of each, default 9. warmup: calls before them, default 2.
        device: where it is a CUDA device, its events tell the time, and it is waited for after every round: calls
            follow each other on it without a gap, as steps do, unless launching them takes longer than they do.

    Returns:
        name → `rounds` times in seconds, in the order of the rounds: entries of one index belong together.
    """
    for _ in range(warmup):
        for run in contenders.values():
            run()
    marks: dict[str, list[tuple]] = {name: [] for name in contenders}
    names = list(contenders)
    _wait(device)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = _mark(device)
            contenders[name]()
            marks[name].append((start, _mark(device)))
        _wait(device)
    return {name: [_seconds(*pair) for pair in pairs] for name, pairs in marks.items()}


def summarized(times: Mapping[str, list[float]], baseline: str = "plain") -> dict[str, dict[str, float]]:
    """Median milliseconds, and the ratio to the baseline: of the medians, with the quartiles of the rounds' ratios.

    Returns:
        name → median_ms, ratio, ratio_q1, ratio_q3.
    """
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


def fallback_share(seconds: Mapping[tuple[str, str], float]) -> dict[str, object]:
    """What ran without a kernel, of what `bcos_kernels.timed` told: (op, backend) → seconds.

    Returns:
        fallback_share: of the time in B-cos layers and norms, that on the backend "reference" (0 without any such
        time); fallback_ops: names of the ops that ran there.
    """
    total = sum(seconds.values())
    slow = {op: value for (op, backend), value in seconds.items() if backend == "reference"}
    return {"fallback_share": sum(slow.values()) / total if total else 0.0, "fallback_ops": sorted(slow)}


def _allocations(run: Callable[[], object]) -> list[int]:
    """Bytes that the CPU allocator hands out (+) and gets back (−) while ``run`` runs, its result held, in order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes to stderr when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    del result
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def bytes_kept(forward: Callable[[], object], device: torch.device | None = None) -> int:
    """Allocator bytes alive after the forward minus before, its result held.

    On a CPU the profiler's memory events tell (saved-tensor hooks would miss what an autograd Function holds itself),
    on a CUDA device its allocator.
    """
    if device is None or device.type != "cuda":
        return sum(_allocations(forward))
    before = torch.cuda.memory_allocated(device)
    result = forward()
    kept = torch.cuda.memory_allocated(device) - before
    del result
    return kept


def peak_bytes(run: Callable[[], object], device: torch.device | None = None) -> int:
    """The most allocator bytes alive at once while ``run`` runs, beyond those alive before it."""
    if device is None or device.type != "cuda":
        alive, peak = 0, 0
        for change in _allocations(run):
            alive += change
            peak = max(peak, alive)
        return peak
    _wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def machine(device: torch.device | None = None) -> dict[str, object]:
    """Where and when: date, device, threads and instruction set of a CPU, versions of torch and Python."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    if device is not None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
