"""The CUDA backend on a CPU: its passes compiled with emulation.h instead of nvcc, its launchers as they are.

What a GPU alone shows is not seen here: races between blocks, speed. Indices, masks, alignment, sums over channels and
rows, missing barriers, the choice of kernels and the launchers' Python are.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path
from unittest import mock

import torch

from bcos_kernels import cuda, dispatch
from tests.bcos_kernels import harness

ROOT = Path(__file__).resolve().parents[3]
NAMESPACE = "bcos_kernels_cuda_emulated"
FLAGS = "-O1 -std=c++17 -fPIC -DBCOS_EMULATED -DTORCH_TARGET_VERSION=0x020b000000000000".split()


def _compile(compiler: list[str], sources: list[Path], output: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    objects = []
    for source in sources:
        objects.append(output.with_name(f"{output.stem}.{source.stem}.o"))
        includes = ["-I", str(Path(__file__).parent), "-isystem", str(torch_folder / "include")]
        command = [*compiler, *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(objects[-1])]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, f"{source.name}:\n{run.stderr[-6000:]}"
    part = output.with_suffix(f".{os.getpid()}")
    command = [*compiler, "-shared", *map(str, objects), f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    run = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-6000:]
    part.rename(output)
    for file in objects:
        file.unlink()


@cache
def load() -> Path:
    """Compile the emulation where that was not done for these sources, and load it."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.c[pu]*"))
    headers = sorted((ROOT / "csrc" / "cuda").glob("*.h"))
    headers += [ROOT / "csrc" / "math.h", Path(__file__).with_name("emulation.h")]
    compiler = harness.find_compiler()
    key = hashlib.sha256(" ".join([torch.__version__, *compiler, *FLAGS]).encode())
    for file in [*sources, *headers]:
        key.update(file.read_bytes())
    folder = ROOT / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{key.hexdigest()[:16]}.so"
    with open(folder / "lock", "w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(compiler, sources, library)
    torch.ops.load_library(str(library))
    return library


def traffic() -> tuple[int, int]:
    """Bytes of activations and weights that the passes have read and written since the last call."""
    read, written = ctypes.c_uint64(), ctypes.c_uint64()
    ctypes.CDLL(str(load())).bcos_emulated_traffic(ctypes.byref(read), ctypes.byref(written))
    return read.value, written.value


@contextlib.contextmanager
def backwards():
    """The threads of a block run in the other order."""
    library = ctypes.CDLL(str(load()))
    library.bcos_emulated_order(True)
    try:
        yield
    finally:
        library.bcos_emulated_order(False)


@contextlib.contextmanager
def emulated():
    """CPU tensors run on the emulated CUDA backend inside ``bcos_kernels.backend("cuda")``."""
    load()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(dispatch, "_accepts_device", lambda name, device: True))
        stack.enter_context(mock.patch.object(cuda, "unusable_reason", lambda: None))
        stack.enter_context(mock.patch.object(cuda, "_NAMESPACE", NAMESPACE))
        cuda._op.cache_clear()
        stack.callback(cuda._op.cache_clear)
        yield
