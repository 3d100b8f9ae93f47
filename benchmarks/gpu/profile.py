"""The stage `profile` of `make gpu`: where the time of a training step goes, and what single kernels reach.

    python -m benchmarks.gpu.profile BACKEND      # launches what the stage has Nsight Compute look at

Rows, by how their case begins:

    step:            plain's and ours: step_ms; kernels_ms that its kernels run; busy, their share of the step;
                     launches; the shares of the kernels' time by kind.
    kernels of …:    the kernels that take the most: share of the kernels' time, launches a step, us_a_launch.
    counters of …:   kernels of a layer, by Nsight Compute where it runs: us, MB_read and MB_written of memory; memory
                     and compute, per cent of the device's peaks; MB_at_least, what forward and backward have to move.
"""

from __future__ import annotations

import csv
import importlib
import io
import itertools
import pkgutil
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import cache

import torch

from bcos_kernels import selftest, triton_kernels, tuning
from bcos_kernels.selftest_cases import Case, conv2d, layer_norm, linear
from bcosification.evaluation.measuring import interleaved, summarized

from .. import floor
from .networks import KNOWN, steps_of
from .running import OutOfTime, Run, first_line, output_of

KINDS = {
    "products and convolutions of the library": r"gemm|cutlass|cudnn|wgrad|dgrad|fprop|conv|xmma|nvjet|splitk",
    "normalisation": r"batch_?norm|layer_?norm|bn_fw|bn_bw",
    "optimiser": r"multi_tensor|foreach",
    "copies": r"copy|memcpy|memset|nchwToNhwc|nhwcToNchw|transpose",
    "reductions": r"reduce|sum",
    "elementwise": r"elementwise|vectorized|pool|softmax|cat",
}
"""Kind of a kernel that is not ours → what its name has in it, the first that fits."""
OURS = "B-cos kernels"
MOST = 12


@cache
def _triton_names() -> frozenset[str]:
    modules = [importlib.import_module(f"{triton_kernels.__name__}.{found.name}")
               for found in pkgutil.iter_modules(triton_kernels.__path__)]  # fmt: skip
    return frozenset(name for module in modules for name in vars(module) if name.endswith("_kernel"))


def kind_of(kernel: str) -> str:
    """Kind of a kernel by its name; CUDA C++ of ours has its namespace in it."""
    if "bcos" in kernel or kernel in _triton_names():
        return OURS
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")


def kernel_times(
    step: Callable[[], object], steps: int, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Kernel (on a CPU: operation) → (milliseconds, launches) of one of ``steps`` steps, by torch's profiler; the one
    that takes the most first."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    found: dict[str, tuple[float, float]] = {}
    for event in profile.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent > 0:
            ms, launches = found.get(event.key[:120], (0.0, 0.0))
            found[event.key[:120]] = ms + spent / 1e3 / steps, launches + event.count / steps
    return dict(sorted(found.items(), key=lambda pair: -pair[1][0]))


def kernels_of(run: Run, name: str, precision: str, batch: int, size: int) -> None:
    """Rows of a network's training step, plain and ours."""
    label = f"step: {name}, {precision}, batch {batch}"
    if not run.due(label, "plain"):
        return
    steps = steps_of(run, name, batch, precision, size)
    times = summarized(interleaved(steps, rounds=2 if run.rehearsal else 9, device=run.device))
    for who in ("ours", "plain"):  # plain last: the case counts as measured by it
        kernels = kernel_times(steps[who], 1 if run.rehearsal else 3, run.device)
        total = sum(ms for ms, _ in kernels.values())
        shares: dict[str, float] = {}
        for kernel, (ms, _) in kernels.items():
            shares[kind_of(kernel)] = shares.get(kind_of(kernel), 0.0) + ms / total
        for kernel, (ms, launches) in itertools.islice(kernels.items(), MOST):
            run.add(f"kernels of {who}: {name}, {precision}, batch {batch}", kernel, share=ms / total,
                    launches=launches, us_a_launch=1e3 * ms / launches, kind=kind_of(kernel))  # fmt: skip
        step_ms = times[who]["median_ms"]
        run.add(
            label, who, step_ms=step_ms, ratio=times[who]["ratio"], kernels_ms=total, busy=total / step_ms,
            launches=sum(count for _, count in kernels.values()),
            **{f"share: {kind}": share for kind, share in sorted(shares.items(), key=lambda pair: -pair[1])},
        )  # fmt: skip


# --- Nsight Compute ---------------------------------------------------------------------------------------------------

MARK = "spin_kernel"
"""Launched before every case: the report has no other names for them."""
METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__bytes_read.sum": "MB_read",
    "dram__bytes_write.sum": "MB_written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute",
}
_SCALES = {"us": 1e-3, "MB_read": 1e-6, "MB_written": 1e-6}  # of nanoseconds and bytes


def looked_at() -> list[Case]:
    """Layers whose kernels are looked at: bound by memory, by products, and in between."""
    batch, tokens = 256, 197 * 256
    block = {"op": "conv2d_batch_norm", "activation": "relu", "training": True}
    return [
        linear("ViT-B, MLP 1", tokens, 768, 3072),
        conv2d("1x1", (batch, 64, 56, 56), 256, 1),
        conv2d("3x3", (batch, 256, 14, 14), 256, 3, padding=1),
        conv2d("1x1, BatchNorm", (batch, 64, 56, 56), 256, 1, **block),
        conv2d("depthwise 7x7", (batch, 96, 56, 56), 96, 7, groups=96, padding=3),
        layer_norm("ViT-B", (tokens, 768)),
    ]


def launches(backend: str, device: torch.device, cases: Sequence[Case]) -> None:
    """What the profiler looks at: a mark, then the forward and the backward of a case; before that once to warm up."""
    from .choices import calls_of

    for case in cases:
        forward, backward = calls_of(device, case, "bfloat16", backend)
        for call in (forward, backward):
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)
        forward()
        backward()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def counters(report: str, cases: Sequence[Case]) -> list[tuple[Case, str, dict[str, float]]]:
    """(case, kernel, values) of a report of Nsight Compute: --csv --page raw --print-units base."""
    lines = report[report.index('"ID"') :].splitlines()
    rows = list(csv.DictReader(io.StringIO("\n".join(line for line in lines if line.startswith('"')))))
    found: list[tuple[Case, str, dict[str, float]]] = []
    at = -1
    for row in rows:
        if not row["ID"]:  # the units
            continue
        if MARK in row["Kernel Name"]:
            at += 1
        elif 0 <= at < len(cases):
            values = {}
            for metric, name in METRICS.items():
                text = row.get(metric, "").replace(",", "")
                if text:
                    values[name] = float(text) * _SCALES.get(name, 1.0)
            found.append((cases[at], re.sub(r"\(.*", "", row["Kernel Name"])[:100], values))
    return found


def looked_at_by_ncu(run: Run, backend: str) -> None:
    label = f"counters: {backend}"
    if not run.due(label):
        return
    cases = looked_at()
    command = [
        "ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw", "--print-units",
        "base", "--metrics", ",".join(METRICS), sys.executable, "-m", "benchmarks.gpu.profile", backend,
    ]  # fmt: skip
    status, report = output_of(*command, timeout=max(run.left(), 1))
    if status == 124:
        raise OutOfTime(label)
    if '"ID"' not in report:
        run.add(label, "ncu", status="not run", reason=first_line(report.strip().splitlines()[-1] if report else ""))
        return
    found = counters(report, cases)
    for case, kernel, values in found:
        least = {}
        if "weight" in case.tensors and case.op in ("linear", "conv2d"):
            forward, backward = floor.of_layer(case, 2)
            least = {"MB_at_least": (forward.bytes + backward.bytes) / 1e6}
        run.add(f"counters of {backend}: {case.op}, {case}", kernel, **values, **least)
    run.add(label, "ncu", status="done" if found else "failed", kernels=len(found))


def profile(run: Run) -> None:
    if run.rehearsal:
        kernels_of(run, "resnet18", "float32", 2, 64)
    else:
        for name in ("resnet50", "vit_b", "convnext_tiny"):
            kernels_of(run, name, "bfloat16", KNOWN[name].batch, 224)
            run.free()
    if shutil.which("ncu") is None or run.device.type != "cuda":
        run.add("counters", "all", status="not run", reason="no ncu here" if run.device.type == "cuda" else "no GPU")
        return
    for backend in [name for name in selftest.usable(run.device) if name in tuning.KERNELS]:
        looked_at_by_ncu(run, backend)


def main(argv: Sequence[str] | None = None) -> int:
    (backend,) = argv if argv is not None else sys.argv[1:]
    launches(backend, torch.device("cuda"), looked_at())
    return 0


if __name__ == "__main__":
    sys.exit(main())
