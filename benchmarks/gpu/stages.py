"""The stages of `make gpu` that are no file of their own: what each measures, and its rows.

Errors are fractions of what is allowed (bcos_kernels/selftest.py). Times are medians by CUDA events, contenders in
turn. A row of something wrong has status "wrong", of something that raised "failed", with the first line of why.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bcos_kernels import cutlass_build, selftest, selftest_cases, selftest_commands, tuning
from bcosification.evaluation.measuring import interleaved

from . import warm_up
from .cases import tuned_cases
from .guards import SKIPPED, guarded, repeated
from .running import OutOfTime, Run, first_line, output_of

# --- environment ------------------------------------------------------------------------------------------------------


def environment(run: Run) -> None:
    from bcos_kernels.__main__ import _text
    from bcos_kernels.__main__ import environment as report

    print(_text(report()), flush=True)
    fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    for name, command in {
        "nvidia-smi": ("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"),
        "nvcc": ("nvcc", "--version"),
        "compute-sanitizer": ("compute-sanitizer", "--version"),
        "ncu": ("ncu", "--version"),
    }.items():

        def look(command=command) -> dict:
            status, text = output_of(*command)
            lines = text.strip().splitlines()
            wanted = next((line for line in lines if "release" in line or "Version" in line), lines[0] if lines else "")
            return {"status": "there" if status == 0 else "missing", "says": wanted[:200]}

        run.attempt("tools", name, look)
    for name in ("torchvision", "bcos", "einops", "nvidia-cutlass"):
        try:
            values = {"status": "there", "says": importlib.metadata.version(name)}
        except importlib.metadata.PackageNotFoundError:
            values = {"status": "missing", "says": f"pip install {name}, or --wheels"}
        run.add("packages", name, **values)
    if run.device.type == "cuda":
        properties = torch.cuda.get_device_properties(run.device)
        run.add(
            "device", properties.name, multiprocessors=properties.multi_processor_count,
            memory_GiB=properties.total_memory / 2**30, L2_MiB=properties.L2_cache_size / 2**20,
        )  # fmt: skip

    def rate(make: Callable[[], Callable[[], object]], amount: float, unit: str) -> Callable[[], dict]:
        def measured() -> dict:
            run.free()
            with torch.no_grad():
                work = make()
                seconds = interleaved({"": work}, rounds=2 if run.rehearsal else 20, warmup=3, device=run.device)[""]
            middle = sorted(seconds)[len(seconds) // 2]
            return {"median_ms": middle * 1e3, unit: amount / middle}

        return measured

    count = 2**12 if run.rehearsal else 2**31  # 4 GiB of bfloat16, far beyond any L2
    edge = 64 if run.rehearsal else 8192

    def copying():
        source = torch.randn(count, dtype=torch.bfloat16, device=run.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def reading():
        source = torch.randn(count, dtype=torch.bfloat16, device=run.device)
        return lambda: source.sum(dtype=torch.float32)

    def multiplying(dtype):
        def made():
            left, right = (torch.randn(edge, edge, device=run.device).to(dtype) for _ in range(2))
            return lambda: left @ right

        return made

    run.attempt("bandwidth", "copy, read + written", rate(copying, 4 * count / 1e9, "GB_per_s"))
    run.attempt("bandwidth", "sum, read", rate(reading, 2 * count / 1e9, "GB_per_s"))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        run.attempt(f"matrix product {edge}^3", name, rate(multiplying(dtype), 2 * edge**3 / 1e12, "TFLOP_per_s"))
    with selftest._tf32(True):
        product = rate(multiplying(torch.float32), 2 * edge**3 / 1e12, "TFLOP_per_s")
        run.attempt(f"matrix product {edge}^3", "tf32", product)


# --- builds -----------------------------------------------------------------------------------------------------------


def builds(run: Run) -> None:
    """In place, and always: what an earlier run built may lie on another machine."""
    run.forget()
    stand_in = Path(tempfile.mkdtemp())
    if importlib.util.find_spec("pybind11") is None:  # its headers come with torch, and they are all that is asked for
        headers = str(Path(torch.__file__).parent / "include")
        (stand_in / "pybind11.py").write_text(f"def get_include():\n    return {headers!r}\n", encoding="utf-8")
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(stand_in)]))

    def build(*command: str) -> Callable[[], dict]:
        def work() -> dict:
            start = time.perf_counter()
            status, text = output_of(sys.executable, *command, timeout=max(run.left(), 1), PYTHONPATH=paths)
            print(text[-6000:], flush=True)
            if status == 124:
                raise OutOfTime(" ".join(command))
            last = text.strip().splitlines()[-1:] or [""]
            return {"status": "built" if status == 0 else "failed", "seconds": time.perf_counter() - start,
                    "reason": "" if status == 0 else last[0][:200]}  # fmt: skip

        return work

    if run.rehearsal:
        run.attempt("setup.py", "native", build("-c", "print('built')"))
        run.attempt("triton", "compiled side by side", partial(warm_up.side_by_side, run))
        return
    run.attempt("setup.py", "native", build("setup.py", "build_ext", "--inplace"))
    reason = cutlass_build.unbuildable_reason()
    if reason is not None:
        run.add("cutlass", "bfloat16", status="not run", reason=first_line(reason))
    else:
        jobs = str(max(1, min(8, (os.cpu_count() or 1) // 2)))
        run.attempt("cutlass", "bfloat16", build("-m", "bcos_kernels.cutlass_build", "--jobs", jobs))
    status, text = output_of(sys.executable, "-m", "bcos_kernels", "--json")  # asks anew what can be loaded
    if status == 0:
        for name, why in json.loads(text[text.index("{") : text.rindex("}") + 1])["backends"].items():
            run.add("backends", name, status="usable" if why is None else "not usable", reason=why or "")
    run.attempt("triton", "compiled side by side", partial(warm_up.side_by_side, run))


# --- tuning -----------------------------------------------------------------------------------------------------------


def _checked(run: Run, session: selftest_commands.Session, precisions: list[str]) -> None:
    """The session's checks: what the stage `correctness` has found with these sources on this device, else anew."""
    found = run.rows.of_stage("correctness")
    missing: dict[tuple[str, str], list[selftest_cases.Case]] = {}
    for case in selftest_cases.cases(quick=run.rehearsal):
        for precision in precisions:
            if precision == "tf32" and case.op in tuning.WITHOUT_PRODUCTS:
                continue
            rows = [found.get((f"{case.op} {precision}, {case}", name)) for name in session.backends]
            if None in rows:
                missing.setdefault((case.op, precision), []).append(case)
                continue
            session.results += [
                selftest.Result(case, precision, name, row["status"], row["fraction_of_allowed"], row["detail"])
                for name, row in zip(session.backends, rows, strict=True)
            ]
    print(f"{len(session.results)} checks are those of the stage correctness", flush=True)
    for (op, precision), todo in missing.items():
        if run.left() <= 0:
            raise OutOfTime(f"{op} {precision}")
        session.check(todo, [precision])


def tune(run: Run) -> None:
    """Checks, then rows of the tuning table, for the selftest's shapes and those of two networks; saved one by one."""
    session = selftest_commands.Session(run.device, selftest.usable(run.device), lambda text: print(text, flush=True))
    every = selftest.precisions(run.device, quick=run.rehearsal)
    _checked(run, session, every)
    for result in session.results:
        if result.bad:
            run.add(f"{result.case.op} {result.precision}, {result.case}", result.backend, status=result.status,
                    reason=result.detail)  # fmt: skip
    run.add("checks", "all", status="right" if session.ok else "wrong", checks=len(session.results))
    if run.rehearsal:
        return
    for case in tuned_cases():
        for dtype in ("bfloat16", "float32"):
            label = f"{case.op} {dtype}, {case}"
            if not run.due(label):
                continue
            before = len(session.times)
            session.time([case], [dtype])
            run.free()
            session.save()
            if len(session.times) == before:
                run.add(label, "all", status="not run", reason="no right numbers, or too little memory to check them")
            for found in session.times[before:]:
                values = {f"{name}_ms": ms for name, ms in found["median_ms"].items()}
                run.add(label, found["direction"], fastest=found["fastest"], **values)
    session.unlock()
    run.add("auto, forward and backward together", "auto", status="right" if session.ok else "wrong")


# --- sanitizer --------------------------------------------------------------------------------------------------------


def sanitizer(run: Run) -> None:
    """Guard bands and repeats for every backend; then the toolkit's checkers, on a small set of calls."""
    backends = [name for name in selftest.usable(run.device) if name != "reference" or run.rehearsal]
    precision = "float32" if run.rehearsal else "bfloat16"
    repeats = 3 if run.rehearsal else 50
    for backend in backends:
        for case in selftest_cases.cases(quick=run.rehearsal):
            label = f"{case.op} {precision}, {case}"
            run.attempt(f"guard bands: {label}", backend,
                     lambda c=case, b=backend: guarded(c, precision, b, run.device))  # fmt: skip
            run.attempt(f"{repeats} repeats: {label}", backend,
                     lambda c=case, b=backend: repeated(c, precision, b, run.device, repeats))  # fmt: skip
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        run.add("compute-sanitizer", "all", status="not run", reason="no compute-sanitizer here")
        return
    for checker in ("memcheck", "racecheck", "initcheck"):
        for backend in [name for name in backends if name in tuning.KERNELS]:
            run.attempt(checker, backend, lambda t=checker, b=backend: _sanitized(run, tool, t, b))


def _sanitized(run: Run, tool: str, checker: str, backend: str) -> dict:
    log = run.out / f"gpu_{checker}_{backend.replace(':', '_')}.log"
    command = [
        tool, "--tool", checker, "--error-exitcode", "86", "--log-file", str(log), sys.executable, "-m",
        "benchmarks.gpu.guards", backend,
    ]  # fmt: skip
    # no cache of blocks: it would hide what lies outside of a tensor
    status, text = output_of(*command, timeout=max(run.left(), 1), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if status == 124:
        raise OutOfTime(f"{checker}, {backend}")
    text = (log.read_text(errors="replace") if log.is_file() else "") + text
    summary = next((line.strip("= ") for line in reversed(text.splitlines()) if "SUMMARY" in line), "")
    if "not supported" in text:
        return {"status": "not run", "reason": "the device refuses it"}
    skipped = [line.removeprefix(SKIPPED) for line in text.splitlines() if line.startswith(SKIPPED)]
    seen = {"skipped": "; ".join(skipped)} if skipped else {}
    if status == 0:
        return {"status": "right", "says": summary[:200], **seen}
    return {"status": "wrong" if status == 86 else "failed", "says": summary[:200] or first_line(text), **seen}
