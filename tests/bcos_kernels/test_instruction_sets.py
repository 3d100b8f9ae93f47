"""Every instruction set that was compiled in and that this machine has gives the reference's numbers."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bcos_kernels
from bcos_kernels import reference
from tests.bcos_kernels import harness
from tests.bcos_kernels.instruction_set_worker import results
from tests.bcos_kernels.tolerances import assert_close_to_reference

ROOT = Path(__file__).resolve().parents[2]
SETS = ["baseline", "avx2", "avx512"]


def _best() -> str:
    """The best set of this machine; "" where there is no compiled code at all."""
    if bcos_kernels.backends()["cpu"] is not None:
        return "baseline" if harness.has_compiler() else ""  # without the library the tests fail
    from bcos_kernels import _C

    return _C.cpu_capability()


def _cases() -> list:
    best = _best()
    usable = SETS[: SETS.index(best) + 1] if best else []
    reason = f"this machine runs {best or 'no compiled code'}"
    return [s if s in usable else pytest.param(s, marks=pytest.mark.skip(reason=reason)) for s in SETS]


@functools.cache
def oracle(dtype: str) -> tuple[dict, dict]:
    dtype = harness.DTYPES[dtype]
    return results(reference, dtype, wide=True), results(reference, dtype)


@pytest.mark.parametrize("narrowing", ["product", "convolution"])
@pytest.mark.parametrize("instructions", _cases())
def test_numbers(instructions, narrowing, tmp_path):
    chosen = {"BCOS_CPU_CAPABILITY": instructions, "BCOS_CPU_NARROWING": narrowing}
    environment = os.environ | chosen | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.bcos_kernels.instruction_set_worker", str(tmp_path / "results.pt")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found = torch.load(tmp_path / "results.pt", weights_only=True)
    assert found["capability"] == instructions
    for dtype, mine in found["results"].items():
        exact, eager = oracle(dtype)
        assert mine.keys() == exact.keys() and len(mine) > 30
        for name, value in mine.items():
            assert_close_to_reference(f"{name}, {dtype}", value, eager[name], exact[name], harness.DTYPES[dtype])


@pytest.mark.skipif(not _best(), reason="no C++ compiler here, and nothing is built")
def test_the_environment_lowers_and_never_raises():
    from bcos_kernels import _C

    # the module alone, which needs no torch
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('_C', {_C.__file__!r}); m = u.module_from_spec(s); "
        "s.loader.exec_module(m); print(m.cpu_capability())"
    )

    def capability(value: str) -> str:
        environment = os.environ | {"BCOS_CPU_CAPABILITY": value}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    best = capability("")
    assert best in SETS
    assert capability("avx512") == best and capability("nonsense") == best
    assert capability("baseline") == "baseline"
