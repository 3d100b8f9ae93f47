"""Every Triton kernel compiles for every GPU generation with every tile, and spills no register. Needs no GPU.

resources.json has what each takes. Compiled are the kernels that differ from it, or that it lacks, and a tenth of the
others; their rows have to agree. BCOS_TEST_AOT=all (`make test-aot`) compiles all of them, and wants a row of each.
`python -m tests.bcos_kernels.triton.test_ahead_of_time` writes the rows anew: it compiles what differs, with
BCOS_TEST_AOT=all everything.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bcos_kernels import tuning

ARCHES = (80, 90, 100)
PROGRAM = Path(__file__).with_name("ahead_of_time.py")
ROWS = Path(__file__).with_name("resources.json")
ROOT = PROGRAM.parents[3]
ALL = os.environ.get("BCOS_TEST_AOT") == "all"
SEED = os.environ.get("BCOS_TEST_AOT_SEED") or tuning.fingerprint("triton")
ANEW = "python -m tests.bcos_kernels.triton.test_ahead_of_time"

# ptxas gives up a few registers, outside the loops, where that lets one more block onto a multiprocessor (with
# maxnreg=255 the same kernels have no stack at all); near the limit of 255 nothing was gained by a spill
TRADED_BYTES, REGISTER_LIMIT = 16, 240


def rows_of(arch: int, *seed: str) -> dict[str, dict | None]:
    """Id → row, null for a kernel that was not compiled."""
    # a process of its own: it swaps Triton's driver, and must not inherit the interpreter
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), environment.get("PYTHONPATH", "")))
    command = [sys.executable, "-W", "ignore", str(PROGRAM), str(arch), *seed]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, f"sm_{arch}:\n{run.stderr[-6000:]}"
    return dict(json.loads(line) for line in run.stdout.splitlines())


def committed() -> tuple[str, dict[str, dict]]:
    """(the Triton that compiled them, rows by id)."""
    content = json.loads(ROWS.read_text(encoding="utf-8"))
    return content["triton"], content["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHES)
def test_compiles_without_spills(arch, record_property):
    by, known = committed()
    found = rows_of(arch) if ALL else rows_of(arch, SEED)
    compiled = {id: row for id, row in found.items() if row is not None}
    rows = {id: row or known[id] for id, row in found.items()}
    record_property("rows", rows)
    most = max(row["registers"] for row in rows.values())
    print(f"sm_{arch}: {len(compiled)} of {len(rows)} kernels compiled (seed {SEED}), at most {most} registers")

    spilling = [
        (id, row)
        for id, row in rows.items()
        if row["local_bytes"] or row["stack_bytes"] > (TRADED_BYTES if row["registers"] < REGISTER_LIMIT else 0)
    ]
    assert not spilling, f"sm_{arch} spills:\n" + "\n".join(map(str, spilling))
    described = {id for id in rows if id.split()[1].endswith(("_persistent_kernel", "_descriptor_kernel"))}
    too_much = [id for id, row in rows.items() if row["shared_bytes"] > (227 if id in described else 100) * 1024]
    assert not too_much, f"sm_{arch}, more shared memory than there is:\n" + "\n".join(too_much)
    assert bool(described) == (arch >= 90) and all(rows[id]["tma_loads"] for id in described), f"sm_{arch}: no TMA"
    if arch == 90:
        # a warp group multiplies 64 rows at a time
        products = {id: row for id, row in rows.items() if row["bits"] == 16 and row["product_rows"] >= 64}
        slow = [id for id, row in products.items() if not row["wgmma"]]
        assert products and not slow, "no warp-group products:\n" + "\n".join(slow)

    if by == tuning.versions()["triton"]:  # another one allocates as it likes
        same = {id for id, row in compiled.items() if known.get(id, {}).get("digest") == row["digest"]}
        differing = [(id, known[id], rows[id]) for id in same if rows[id] != known[id]]
        assert not differing, "not as committed, though the source is:\n" + "\n".join(map(str, differing))
        if ALL:
            mine = {id for id in known if id.startswith(f"sm_{arch} ")}
            stale = sorted(mine ^ set(rows) | set(compiled) - same)
            assert not stale, f"rows to be written anew ({ANEW}):\n" + "\n".join(stale)


def test_a_tenth_of_what_is_known_is_compiled():
    """By the ids alone: which tenth changes with the seed, and over seeds every kernel has its turn."""
    from zlib import crc32

    ids = list(committed()[1])
    tenths = [{id for id in ids if crc32(f"{seed} {id}".encode()) % 10 == 0} for seed in range(100)]
    assert all(0.04 * len(ids) < len(tenth) < 0.18 * len(ids) for tenth in tenths)
    assert set().union(*tenths) == set(ids)


KERNEL = '''
import triton
import triton.language as tl

SCALE = tl.constexpr(2)


@triton.jit
def scaled(x):
    """Doc."""
    return x * SCALE


@triton.jit
def scale_kernel(out_ptr, x_ptr, BLOCK: tl.constexpr):
    """Doc."""
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, scaled(tl.load(x_ptr + i)))
'''


@pytest.mark.parametrize(
    "old, new, same",
    [("Doc.", "Other words.", True), ("    i = tl", "    # a remark\n    i = tl", True),
     ("SCALE = tl", "\n\nSCALE = tl", True), ("x * SCALE", "x + SCALE", False), ("constexpr(2)", "constexpr(3)", False),
     ("out_ptr + i", "out_ptr + 2 * i", False)],
)  # fmt: skip
def test_a_digest_is_of_what_is_compiled(old, new, same, tmp_path):
    """Of the kernel, its device functions and its constants; not of words and places."""
    from tests.bcos_kernels.triton.ahead_of_time import source_digest

    def digest(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        spec = importlib.util.spec_from_file_location("kernels", tmp_path / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return source_digest(module.scale_kernel)

    assert old in KERNEL
    assert (digest("one", KERNEL) == digest("other", KERNEL.replace(old, new))) == same


if __name__ == "__main__":
    known = committed()[1] if ROWS.exists() else {}
    found = {id: row for arch in ARCHES for id, row in rows_of(arch, *(() if ALL else (SEED,))).items()}
    rows = {id: row or known[id] for id, row in found.items()}
    lines = ",\n".join(f"    {json.dumps(id)}: {json.dumps(row)}" for id, row in sorted(rows.items()))
    head = json.dumps({"triton": tuning.versions()["triton"]})[:-1]
    ROWS.write_text(f'{head}, "rows": {{\n{lines}\n}}}}\n', encoding="utf-8")
    print(f"{len(rows)} kernels, at most {max(row['registers'] for row in rows.values())} registers: {ROWS}")
