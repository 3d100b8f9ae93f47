"""The CUDA library as nvcc has built it: for every architecture, without spills, with no more registers than before.

Needs nvcc, no GPU. `python -m tests.bcos_kernels.cuda.test_build` writes the rows anew.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from bcos_kernels import cuda, dispatch

ROWS = Path(__file__).with_name("resources.json")
SOURCES = Path(__file__).resolve().parents[3] / "csrc" / "cuda"
KERNELS = {
    "norm": ["segment_norms", "norms_of_squares", "window_norms", "add_norm_term", "normalize_weight",
             "weight_norm_backward"],
    "scale": ["scale", "scale_maximum", "scale_backward", "scale_backward_maximum", "scale_gelu",
              "scale_gelu_backward"],
    "batch_norm": ["moments", "moments_finish", "factors", "normalize_sums", "normalize_sums_finish", "normalize",
                   "normalize_backward", "slope_backward"],
    "layer_norm": ["layer_norm", "layer_norm_backward", "layer_norm_sums", "layer_norm_sums_finish"],
}  # fmt: skip
MORE_REGISTERS = 8  # what another version of nvcc may take


def _nvcc() -> str | None:
    return shutil.which("nvcc")


pytestmark = pytest.mark.skipif(_nvcc() is None, reason="no nvcc here")


def _cuobjdump() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@cache
def resources() -> dict[str, dict[str, int]]:
    """ "sm_90 scale_kernel<…>" → registers a thread, bytes of stack (spills), static shared memory, local memory."""
    command = [str(_cuobjdump()), "-res-usage", str(cuda._LIBRARY)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, arch = {}, None
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\d+\w?)", line):
            arch = match[1]
        elif match := re.search(r"Function (\S+):", line):
            function = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            numbers = dict(zip(("registers", "stack", "shared", "local"), map(int, match.groups()), strict=True))
            found[f"{arch} {function}"] = numbers
    return found


def _short(mangled: str) -> str:
    return re.search(r"\d+([a-z_]+?)_kernel", mangled)[1]


def test_the_library_is_built():
    assert dispatch.build_report().get("cuda") is None and cuda._LIBRARY.exists(), dispatch.build_report().get("cuda")


def test_the_library_loads_without_a_gpu():
    """Its ops are there; what they need of torch_cuda is found."""
    code = f"import torch; torch.ops.load_library({str(cuda._LIBRARY)!r}); "
    code += "print(torch.ops.bcos_kernels_cuda.scale.default)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "bcos_kernels_cuda.scale.default", run.stderr


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_kernel_is_there_without_spills(arch):
    mine = {name: row for name, row in resources().items() if name.startswith(f"{arch} ")}
    assert {_short(name) for name in mine} == {kernel for kernels in KERNELS.values() for kernel in kernels}
    spilling = {name: row for name, row in mine.items() if row["stack"] or row["local"]}
    assert not spilling, spilling
    # 256 threads: with 128 registers two blocks share a multiprocessor, which a pass over memory needs at least
    assert max(row["registers"] for row in mine.values()) <= 128


def test_the_same_source_builds_for_blackwell(tmp_path):
    """As `make wheel` builds all of it."""
    command = [
        _nvcc(),
        *"-O3 -std=c++17 --expt-relaxed-constexpr -Xptxas -v -gencode=arch=compute_100,code=sm_100".split(),
    ]
    run = subprocess.run(
        [*command, "-c", str(SOURCES / "norm.cu"), "-o", str(tmp_path / "norm.o")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "0 bytes spill stores" in run.stderr and not re.search(r"[1-9]\d* bytes spill", run.stderr)


def summary() -> dict[str, dict[str, int]]:
    """ "sm_90 scale" → how many variants of a kernel there are, and the most that one of them takes."""
    found: dict[str, dict[str, int]] = {}
    for name, row in resources().items():
        of_kernel = found.setdefault(f"{name.split()[0]} {_short(name)}", {"variants": 0, "registers": 0, "shared": 0})
        of_kernel["variants"] += 1
        for key in ("registers", "shared"):
            of_kernel[key] = max(of_kernel[key], row[key])
    return dict(sorted(found.items()))


def test_no_kernel_takes_more_than_before():
    before, now = json.loads(ROWS.read_text())["rows"], summary()
    for name, row in now.items():
        assert row["variants"] == before[name]["variants"], (name, "python -m tests.bcos_kernels.cuda.test_build")
        assert row["registers"] <= before[name]["registers"] + MORE_REGISTERS, (name, row, before[name])
        assert row["shared"] <= before[name]["shared"], (name, row, before[name])


if __name__ == "__main__":
    text = subprocess.run([_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in summary().items())
    version = re.search(r"V([\d.]+)", text)[1]
    ROWS.write_text(f'{{"nvcc": "{version}", "rows": {{\n{rows}\n}}}}\n')
    print(f"{len(resources())} kernels, at most {max(r['registers'] for r in resources().values())} registers: {ROWS}")
