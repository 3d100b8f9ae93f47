"""Builds the CUTLASS kernels of csrc/cuda/cutlass on request: ``python -m bcos_kernels.cutlass_build --help``.

A kernel takes up to a minute or two of a core and 4 GB of memory, so that installing the package builds none. Each is
one translation unit for one element type; objects lie in a cache named after everything they are made from, and what
a library holds is what was asked for so far. No GPU is needed. Nothing is looked for, and nothing is run, at import.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda" / "cutlass"
LIBRARY = "libbcos_kernels_cutlass.so"

_ELEMENTS = {"bfloat16": [], "float16": ["-DBCOS_FLOAT16"]}
_HOPPER = ("linear_forward", "linear_norm_forward", "linear_backward_dx", "conv2d_forward", "conv2d_backward_dx")
_SM80 = ("linear_forward_sm80", "linear_backward_dx_sm80", "conv2d_forward_sm80", "conv2d_backward_dx_sm80")
KINDS = {f"{stem}_{element}": (stem, flags) for element, flags in _ELEMENTS.items() for stem in (*_HOPPER, *_SM80)}

# The "a" matters: plain sm_90 has no WGMMA, and CUTLASS's kernels compile to a message there. What is written for sm_80
# also runs on what came later, from its PTX where the machine code is another (10.0, 12.0); Hopper's PTX is there for
# the tests, which run it on a CPU.
_ARCHITECTURES = dict.fromkeys(_HOPPER, "-gencode=arch=compute_90a,code=[sm_90a,compute_90a]") | dict.fromkeys(
    _SM80, "-gencode=arch=compute_80,code=[sm_80,compute_80]"
)
# NDEBUG matters too: with assertions in it, device code waits for every WGMMA.
_KERNEL_FLAGS = (
    "-std=c++17 -O3 -DNDEBUG --expt-relaxed-constexpr -Xptxas=-v "
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden"
).split()
_TORCH_TARGET_VERSION = "0x020b000000000000"  # LibTorch's stable ABI as of 2.11
_OPS_FLAGS = (
    f"-std=c++17 -O2 -DNDEBUG -DUSE_CUDA -DTORCH_TARGET_VERSION={_TORCH_TARGET_VERSION} "
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden"
).split()
_LINK_FLAGS = "-shared -cudart=shared -Xlinker=-z,defs -Xlinker=--allow-shlib-undefined".split()

_CUTLASS_ADVICE = (
    "pip install --no-deps nvidia-cutlass==4.2.0.0, "
    "or set BCOS_CUTLASS_INCLUDE to the folder include/ of a CUTLASS checkout"
)


def kinds_for(capability: tuple[int, int] | None) -> tuple[str, ...]:
    """The kernels that a device of this compute capability takes, or all (None)."""
    if capability is None:
        return tuple(KINDS)
    stems = _HOPPER if capability == (9, 0) else _SM80 if capability >= (8, 0) else ()
    return tuple(kind for kind, (stem, _) in KINDS.items() if stem in stems)


def default_kinds() -> tuple[str, ...]:
    """Those for bfloat16; of those, where there is a GPU, what it takes."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    return tuple(kind for kind in kinds_for(capability) if kind.endswith("_bfloat16"))


@dataclass(frozen=True)
class _Tools:
    nvcc: str
    nvcc_version: str
    includes: tuple[Path, ...]
    cutlass_version: str
    torch: Path


def _find_nvcc() -> tuple[str, str]:
    """nvcc's path and release ("13.0")."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [shutil.which("nvcc", path=str(Path(home, "bin"))) for home in homes] + [shutil.which("nvcc")]
    nvcc = next(filter(None, candidates), None)
    if nvcc is None:
        raise RuntimeError(
            "cutlass_build: expected nvcc in CUDA_HOME or on PATH, found none. It comes with the CUDA toolkit "
            "(developer.nvidia.com/cuda-downloads)"
        )
    run = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+)\.(\d+)", run.stdout)
    if found is None:
        said = run.stdout + run.stderr
        raise RuntimeError(f"cutlass_build: expected {nvcc} --version to tell a release, got {said!r}")
    of_torch = torch.version.cuda
    if of_torch is None or of_torch.partition(".")[0] != found[1]:
        raise RuntimeError(
            f"cutlass_build: expected torch and nvcc of one major CUDA version, got torch {torch.__version__} "
            f"(CUDA {of_torch}) and {nvcc} {found[1]}.{found[2]}"
        )
    return nvcc, f"{found[1]}.{found[2]}"


def _find_cutlass() -> tuple[tuple[Path, ...], str]:
    """The include folders of CUTLASS's headers and their version."""
    named = os.environ.get("BCOS_CUTLASS_INCLUDE")
    if named:
        include = Path(named)
    else:
        spec = importlib.util.find_spec("cutlass_library")  # what the distribution nvidia-cutlass installs
        if spec is None or not spec.submodule_search_locations:
            raise RuntimeError(f"cutlass_build: expected CUTLASS's headers, found none. Run {_CUTLASS_ADVICE}")
        include = Path(spec.submodule_search_locations[0], "source", "include")
    version = include / "cutlass" / "version.h"
    utilities = include.parent / "tools" / "util" / "include"
    if not version.exists() or not utilities.exists():
        raise RuntimeError(
            f"cutlass_build: expected {version} and {utilities}, found no such files. Run {_CUTLASS_ADVICE}"
        )
    numbers = dict(re.findall(r"#define CUTLASS_(MAJOR|MINOR|PATCH) (\d+)", version.read_text()))
    return (include, utilities), ".".join(numbers[part] for part in ("MAJOR", "MINOR", "PATCH"))


def _find_tools() -> _Tools:
    if not SOURCES.is_dir():
        raise RuntimeError(
            f"cutlass_build: expected the kernels' sources in {SOURCES}, which only a checkout of the repository has. "
            "Install from one: pip install -e ."
        )
    nvcc, nvcc_version = _find_nvcc()
    includes, cutlass_version = _find_cutlass()
    return _Tools(nvcc, nvcc_version, includes, cutlass_version, Path(torch.__file__).parent)


def unbuildable_reason() -> str | None:
    """Why nothing can be built here (a missing tool, named with where to get it), or None."""
    try:
        _find_tools()
    except RuntimeError as error:
        return str(error)
    return None


def built() -> Path | None:
    """The library as it lies in the cache, or None: nothing is built here."""
    try:
        library = _cache_folder(_find_tools()) / LIBRARY
    except RuntimeError:
        return None
    return library if library.exists() else None


def _cache_folder(tools: _Tools) -> Path:
    """Named after what objects are made from: sources, flags, versions, the ABI of torch."""
    made_from = hashlib.sha256()
    for path in sorted([*SOURCES.iterdir(), SOURCES.parents[1] / "math.h"]):
        made_from.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    flags = [KINDS, _ARCHITECTURES, _KERNEL_FLAGS, _OPS_FLAGS, _LINK_FLAGS]
    made_from.update(json.dumps([flags, tools.nvcc_version, tools.cutlass_version, _TORCH_TARGET_VERSION]).encode())
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "bcos_kernels", f"cutlass-{made_from.hexdigest()[:16]}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One builder of a cache at a time; another process waits, and then finds everything built."""
    import fcntl  # POSIX alone has it, and nothing else builds here

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: list[str], output: Path) -> None:
    """Runs a command that makes ``output`` (appended to it): that appears whole or not at all, messages beside it."""
    part = output.with_name(f"{output.name}.part")
    run = subprocess.run([*command, "-o", str(part)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode != 0:
        part.unlink(missing_ok=True)
        raise RuntimeError(f"cutlass_build: could not make {output.name}:\n{shlex.join(command)}\n{run.stdout[-8000:]}")
    output.with_suffix(".log").write_text(run.stdout)
    part.replace(output)


def _compile_command(tools: _Tools, name: str) -> list[str]:
    if name == "ops":
        includes = ["-isystem", str(tools.torch / "include")]
        return [tools.nvcc, *_OPS_FLAGS, *includes, "-c", str(SOURCES / "ops.cpp")]
    stem, flags = KINDS[name]
    includes = [argument for folder in tools.includes for argument in ("-isystem", str(folder))]
    return [tools.nvcc, *_KERNEL_FLAGS, _ARCHITECTURES[stem], *flags, *includes, "-c", str(SOURCES / f"{stem}.cu")]


def build(kinds: Sequence[str] | None = None, jobs: int = 1, verbose: bool = False) -> Path:
    """Builds kernels that the cache lacks and the library of all kernels in it.

    Args:
        kinds: names from `KINDS`; `default_kinds` by default.
        jobs: compilations at a time, of up to 4 GB of memory each.
        verbose: print what is compiled and how long it took.

    Returns:
        The library, for ``torch.ops.load_library``: ops ``bcos_kernels_cutlass::linear_forward`` etc.

    Raises:
        ValueError: an unknown kind.
        RuntimeError: nvcc, CUTLASS's headers or the sources are missing, or something does not compile.
    """
    kinds = list(default_kinds() if kinds is None else kinds)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"build: expected kinds among {', '.join(KINDS)}, got {', '.join(unknown)}")
    tools = _find_tools()
    folder = _cache_folder(tools)
    library = folder / LIBRARY
    with _locked(folder):
        missing = [name for name in ("ops", *kinds) if not (folder / f"{name}.o").exists()]

        def compile_one(name: str) -> None:
            started = time.monotonic()
            _run(_compile_command(tools, name), folder / f"{name}.o")
            if verbose:
                print(f"compiled {name} in {time.monotonic() - started:.0f} s", flush=True)

        if verbose and missing:
            print(f"compiling {', '.join(missing)} into {folder}, {jobs} at a time", flush=True)
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(compile_one, missing))
        objects = sorted(folder.glob("*.o"))
        if not library.exists() or any(o.stat().st_mtime_ns > library.stat().st_mtime_ns for o in objects):
            torch_libraries = [f"-L{tools.torch / 'lib'}", "-ltorch_cuda", "-ltorch_cpu", "-lc10"]
            _run([tools.nvcc, *_LINK_FLAGS, *map(str, objects), *torch_libraries], library)
    if verbose:
        print(library, flush=True)
    return library


def parse_ptxas(messages: str) -> dict[str, int]:
    """Registers a thread, bytes of stack, spills and static shared memory of the one kernel that ptxas -v tells of."""
    kernels = re.findall(r"Compiling entry function '(\w+)'", messages)
    if len(kernels) != 1:
        raise RuntimeError(f"cutlass_build: expected ptxas to tell of one kernel, got {len(kernels)}")
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", messages)
    registers = re.search(r"Used (\d+) registers", messages)
    static = re.search(r"(\d+) bytes smem", messages)
    return {
        "registers": int(registers[1]),
        "stack_bytes": int(stack[1]),
        "spill_store_bytes": int(stack[2]),
        "spill_load_bytes": int(stack[3]),
        "static_shared_bytes": int(static[1]) if static else 0,
    }


def _cuobjdump() -> str:
    """Triton's, else the toolkit's."""
    spec = importlib.util.find_spec("triton")
    folders = [Path(spec.submodule_search_locations[0], "backends", "nvidia", "bin")] if spec is not None else []
    found = [shutil.which("cuobjdump", path=str(folder)) for folder in folders] + [shutil.which("cuobjdump")]
    program = next(filter(None, found), None)
    if program is None:
        raise RuntimeError("cutlass_build: expected cuobjdump of Triton or on PATH, found none")
    return program


# Matrix products of a warp group and of a warp; tiles copied by the tensor memory accelerator, those of its im2col
# mode, its stores; asynchronous copies of a thread.
_INSTRUCTIONS = {
    "wgmma": r"\bHGMMA\.",
    "mma": r"\bHMMA\.",
    "tma_loads": r"\bUTMALDG\.",
    "im2col_loads": r"\bUTMALDG\S*\.IM2COL",
    "tma_stores": r"\bUTMASTG\.",
    "async_copies": r"\bLDGSTS\.",
}


def _launch_parameters(library: Path) -> dict[str, dict[str, int]]:
    """Kind → threads, stages, bytes of dynamic shared memory, as the library says itself. It is asked in a process of
    its own: a library that is loaded here could not be replaced by one with more kernels."""
    program = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.bcos_kernels_cutlass.kernels())"
    run = subprocess.run([sys.executable, "-c", program, str(library)], capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"cutlass_build: {library} does not load:\n{run.stderr[-4000:]}")
    rows = [line.split() for line in run.stdout.splitlines() if line]
    names = ("threads", "stages", "shared_bytes")
    return {kind: dict(zip(names, map(int, numbers), strict=True)) for kind, *numbers in rows}


def resources(kinds: Sequence[str] | None = None) -> list[dict]:
    """What kernels use, a dict each, building what is missing: registers, stack and spills from ptxas; threads, stages
    and dynamic shared memory from the library; counts of instructions from the machine code."""
    kinds = list(default_kinds() if kinds is None else kinds)
    library = build(kinds)
    parameters = _launch_parameters(library)
    tools = _find_tools()
    rows = []
    for kind in kinds:
        messages = (library.parent / f"{kind}.log").read_text()
        command = [_cuobjdump(), "-sass", str(library.parent / f"{kind}.o")]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        row = {"kind": kind, "nvcc": tools.nvcc_version, "cutlass": tools.cutlass_version}
        row |= parse_ptxas(messages) | parameters[kind]
        row["serialised"] = "wgmma.mma_async instructions are serialized" in messages
        rows.append(row | {name: len(re.findall(pattern, sass)) for name, pattern in _INSTRUCTIONS.items()})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bcos_kernels.cutlass_build",
        description="Compile the CUTLASS kernels (for sm_90a; those named _sm80 for sm_80 and later) into the cache "
        "and print the library's path. It needs nvcc of torch's major CUDA version and CUTLASS's headers, and no GPU. "
        "A kernel for Hopper takes about a minute of a core and up to 4 GB of memory, one for sm_80 a third of that.",
        epilog=f"Headers: {_CUTLASS_ADVICE}. Cache: $XDG_CACHE_HOME/bcos_kernels (~/.cache/bcos_kernels).",
    )
    parser.add_argument(
        "--kinds", nargs="+", metavar="KIND", choices=[*KINDS, "all"],
        help="kernels to compile, see --list, or all (default: those for bfloat16, and where there is a GPU what it "
        "takes of them)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time (default: 1)")
    parser.add_argument("--list", action="store_true", help="list the kinds and which are built; compile nothing")
    parser.add_argument("--resources", action="store_true", help="also print a JSON row a kernel: registers, spills, …")
    options = parser.parse_args(argv)
    kinds = list(KINDS) if options.kinds and "all" in options.kinds else options.kinds or list(default_kinds())
    try:
        if options.list:
            reason = unbuildable_reason()
            folder = None if reason else _cache_folder(_find_tools())
            for kind in KINDS:
                print(f"{kind:<36}{'built' if folder and (folder / f'{kind}.o').exists() else 'not built'}")
            print(f"cannot be built here: {reason}" if reason else folder)
            return 0
        build(kinds, options.jobs, verbose=True)
        if options.resources:
            print("\n".join(map(json.dumps, resources(kinds))))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
