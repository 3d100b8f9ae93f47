"""Compiles the Triton kernels that later stages launch, side by side.

    python -m benchmarks.gpu.warm_up PART PARTS [--tiles] [--rehearse]

Triton compiles a kernel where it is first launched, seconds of one core each, and keeps it on disk. Stages launch one
case after the other; on a machine that is lent for minutes, with cores to spare, compiling would be most of them. Here
PARTS processes launch a share of the cases each, and what they compute is thrown away: the stages check it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

import bcos_kernels
from bcos_kernels import selftest, selftest_cases, tuning

from . import choices
from .cases import layer_cases, tuned_cases
from .running import ROOT, OutOfTime, Run

PARTS = 12
"""Processes at most: each has a context on the GPU, half a GiB of its memory."""


def calls(rehearsal: bool = False) -> list[tuple[selftest_cases.Case, str]]:
    """(case, precision) of everything that the stages ask of a backend; neighbours share most of their kernels."""
    checked = [
        (case, precision)
        for precision in (("float32",) if rehearsal else ("bfloat16", "float16", "float32", "tf32"))
        for case in selftest_cases.cases(quick=rehearsal)
        if not (precision == "tf32" and case.op in tuning.WITHOUT_PRODUCTS)
    ]
    if rehearsal:
        return checked[:4]
    timed = [
        (case, tuning.precision(case.op, dtype))
        for dtype in (torch.bfloat16, torch.float32)
        for case in (*tuned_cases(), *layer_cases())  # at their own sizes: tiles are chosen by them
    ]
    return sorted(checked + timed, key=lambda call: (call[0].op, call[1]))


def tiled_calls(rehearsal: bool = False) -> list[tuple[selftest_cases.Case, str, str]]:
    """(case, precision, tile) of the stage `choices`."""
    return [(*of, name) for of in choices.tiled_cases(rehearsal) for name in choices.variants(of[1])]


def _launch(case: selftest_cases.Case, precision: str, backend: str, device: torch.device) -> None:
    function = getattr(bcos_kernels.functional, case.op)
    with selftest._tf32(precision == "tf32"), selftest.exactly(backend):
        tensors = selftest.inputs(case, precision, device)
        with torch.no_grad():
            like = function(**{name: t.clone() for name, t in tensors.items()}, **case.options)
        selftest._outputs(function, case, tensors, torch.randn_like(like))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.warm_up", description=__doc__.partition("\n\n")[0])
    parser.add_argument("part", type=int)
    parser.add_argument("parts", type=int)
    parser.add_argument("--tiles", action="store_true", help="what the stage choices launches, tile by tile")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, a few calls of the definition")
    options = parser.parse_args(argv)
    if not 0 <= options.part < options.parts:
        parser.error(f"expected 0 <= PART < PARTS, got {options.part} and {options.parts}")
    device = torch.device("cpu" if options.rehearse else "cuda")
    backend = "reference" if options.rehearse else "triton"
    every = tiled_calls(options.rehearse) if options.tiles else [(*call, None) for call in calls(options.rehearse)]
    share = every[len(every) * options.part // options.parts : len(every) * (options.part + 1) // options.parts]
    raised = 0
    start = time.perf_counter()
    for case, precision, tile in share:
        variant = choices.variants(precision)[tile] if tile else None
        try:
            with choices.tiles(*variant) if variant else contextlib.nullcontext():
                _launch(case, precision, backend, device)
        except NotImplementedError:
            pass
        except Exception as error:  # whatever it is, the stage of this case meets it again and makes a row of it
            raised += 1
            print(f"{case.op} {precision}, {case}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    print(f"{len(share)} calls, {raised} raised, {time.perf_counter() - start:.1f} s", flush=True)
    return 0


def side_by_side(run: Run, *options: str) -> dict:
    """All parts at once, each in a process that has the options; a row of how that went."""
    parts = 2 if run.rehearsal else max(1, min(PARTS, (os.cpu_count() or 1) - 2))
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.gpu.warm_up"]
    extra = [*options, *(["--rehearse"] if run.rehearsal else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*command, str(part), str(parts), *extra], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for part in range(parts)
    ]  # fmt: skip
    found: list[tuple[int, str]] = []
    try:
        for process in running:
            output, _ = process.communicate(timeout=max(run.left(), 1))
            found.append((process.returncode, output.strip()))
    except subprocess.TimeoutExpired:
        raise OutOfTime("the kernels are all compiled") from None
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    crashed = [output.splitlines()[-1:] or [""] for status, output in found if status]
    print("\n".join(output for _, output in found), flush=True)
    values = {"processes": parts, "seconds": time.perf_counter() - start}
    if crashed:  # a process may be ended by what a kernel did; what it left out is compiled where it is launched
        values |= {"crashed": len(crashed), "reason": crashed[0][0][:200]}
    return {"status": "incomplete" if crashed else "compiled", **values}


if __name__ == "__main__":
    sys.exit(main())
