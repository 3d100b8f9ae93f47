"""Every Triton kernel compiles for every GPU generation with every tile, and spills no register. Needs no GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ARCHES = (80, 90, 100)
PROGRAM = Path(__file__).with_name("ahead_of_time.py")
ROOT = PROGRAM.parents[3]


# ptxas gives up a few registers, outside the loops, where that lets one more block onto a multiprocessor (with
# maxnreg=255 the same kernels have no stack at all); near the limit of 255 nothing was gained by a spill
TRADED_BYTES, REGISTER_LIMIT = 16, 240


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
def test_compiles_without_spills(arch, record_property):
    # a process of its own: it swaps Triton's driver, and must not inherit the interpreter
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), environment.get("PYTHONPATH", "")))
    command = [sys.executable, "-W", "ignore", str(PROGRAM), str(arch)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, f"sm_{arch}:\n{run.stderr[-6000:]}"
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    record_property("rows", rows)
    print(f"sm_{arch}: {len(rows)} kernels, at most {max(row['registers'] for row in rows)} registers a thread")
    spilling = [
        row
        for row in rows
        if row["local_bytes"] or row["stack_bytes"] > (TRADED_BYTES if row["registers"] < REGISTER_LIMIT else 0)
    ]
    assert not spilling, f"sm_{arch} spills:\n" + "\n".join(map(str, spilling))
    described = [row for row in rows if re.search("_(persistent|descriptor)_kernel$", row["kernel"])]
    too_much = [row for row in rows if row["shared_bytes"] > (227 if row in described else 100) * 1024]
    assert not too_much, f"sm_{arch}, more shared memory than there is:\n" + "\n".join(map(str, too_much))
    assert bool(described) == (arch >= 90) and all(row["tma_loads"] for row in described), f"sm_{arch}: no TMA"
    if arch == 90:
        # a warp group multiplies 64 rows at a time
        products = [r for r in rows if r["bits"] == 16 and r.get("BLOCK_K", 0) and r["BLOCK_M"] >= 64]
        slow = [row for row in products if not row["wgmma"]]
        assert products and not slow, "no warp-group products:\n" + "\n".join(map(str, slow))
