"""Compile the Triton kernels for a GPU that need not be there: python ahead_of_time.py ARCH, one JSON row a kernel.

The launchers run as they are, on CPU tensors that nobody reads. A stand-in for the driver names the target and every
launch ends after compilation, so what is compiled is what a GPU would run: same flags, same specialisation of strides
and alignments, same tiles. Registers, spills and shared memory are read from the machine code with Triton's cuobjdump.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bcos_kernels import triton_kernels
from bcos_kernels.triton_kernels.configs import CONFIGS

USERS_OF_OFFSETS = ("linear", "conv2d", "batch_norm_uncentered", "weights")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class StandInDriver:
    """What compilation asks of a driver."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def collect_instead_of_launching() -> list[tuple[str, dict, object]]:
    """From now on a launch compiles and appends (kernel, launch keywords, compiled kernel) to the list returned.

    Launches that differ in sizes and strides alone are compiled once, as the first one.
    """
    collected: list[tuple[str, dict, object]] = []
    seen: set[tuple] = set()
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        types = tuple(a.dtype if isinstance(a, torch.Tensor) else None for a in args)
        key = (self.__name__, types, *sorted(kwargs.items()))
        if key in seen:
            return None
        seen.add(key)
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        collected.append((self.__name__, kwargs, compiled))
        return compiled

    JITFunction.run = compile_only
    return collected


def linear(rows, outputs, inputs, dtype, b=2.0, b_tensor=False, normalize=False, max_out=1, bias=False) -> None:
    """Every kernel of a linear layer."""
    x = torch.empty(rows, inputs, dtype=dtype)
    weight = torch.empty(outputs * max_out, inputs, dtype=dtype)
    options = (weight.new_empty(weight.shape[0]) if bias else None, b, torch.empty(()) if b_tensor else None)
    y, n, a, index = triton_kernels.linear_forward(x, weight, *options, normalize, max_out, True)
    triton_kernels.linear_backward(
        y, x, weight, *options, y, n, a, index, normalize, max_out, False, True, True, bias, b_tensor
    )


def conv2d(
    shape, outputs, kernel, dtype, stride=1, groups=1, b=2.0, b_tensor=False, normalize=False, max_out=1, bias=False,
    dw=True,
) -> None:  # fmt: skip
    """Every kernel of a convolution, channels_last."""
    x = torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.empty(outputs * max_out, shape[1] // groups, kernel, kernel, dtype=dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    geometry = ((stride, stride), (kernel // 2, kernel // 2), (1, 1), groups)
    options = (
        weight.new_empty(weight.shape[0]) if bias else None, *geometry, b, torch.empty(()) if b_tensor else None
    )  # fmt: skip
    y, n, a, index = triton_kernels.conv2d_forward(x, weight, *options, normalize, max_out, True)
    triton_kernels.conv2d_backward(
        y, x, weight, *options, y, n, a, index, normalize, max_out, False, True, dw, bias, b_tensor
    )


def conv2d_dw(shape, outputs, dtype) -> None:
    """The kernels of ∂L/∂w of a 1x1 convolution: its result is small enough for every tile."""
    x = torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.empty(outputs, shape[1], 1, 1, dtype=dtype)
    y = torch.empty(shape[0], outputs, *shape[2:], dtype=dtype).contiguous(memory_format=torch.channels_last)
    options = ((1, 1), (0, 0), (1, 1), 1, 1.0, None)
    triton_kernels.conv2d_backward(
        y, x, weight, None, *options, None, y, y, y, False, 1, False, False, True, False, False
    )  # fmt: skip


def batch_norm_uncentered(shape, dtype, channels_last=False, residual=False, activation=None) -> None:
    """Every kernel of the batch normalisation."""
    x = torch.empty(shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    weight = torch.empty(shape[1])
    options = (x if residual else None, None, True, 1e-5, activation)
    y, mean, var = triton_kernels.batch_norm_uncentered_forward(x, weight, weight, *options)
    triton_kernels.batch_norm_uncentered_backward(
        y, x, y, weight, weight, mean, var, True, 1e-5, activation, False, True, True, True, residual
    )


@contextlib.contextmanager
def offsets_of_64_bits():
    """Launches as with tensors of more than 2³¹ elements."""
    modules = [importlib.import_module(f"bcos_kernels.triton_kernels.{name}") for name in USERS_OF_OFFSETS]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "index64", lambda *tensors: True))
        yield


# Sizes whose three products (forward, dx, dw) take every form of tile between them: (rows, outputs, inputs).
SIZES = (
    (256, 128, 128), (256, 64, 64), (256, 64, 16), (256, 16, 32), (256, 16, 16), (32, 128, 128), (16, 16, 32),
    (16, 32, 16),
)  # fmt: skip


def launch_everything(thorough: bool) -> None:
    """Every kernel with every tile for bfloat16, and what else the launchers choose between; for float32 every tile if
    ``thorough``, else the largest."""
    torch.backends.cudnn.allow_tf32 = False
    if thorough:
        # sizes of 1 are constants to the compiler, so they come first, before anything alike
        linear(1, 1, 1, torch.bfloat16, b_tensor=True, normalize=True, max_out=3, bias=True)
        conv2d((1, 1, 1, 1), 1, 1, torch.bfloat16, b_tensor=True, normalize=True, max_out=3, bias=True)
        batch_norm_uncentered((1, 1, 1, 1), torch.bfloat16)
        with offsets_of_64_bits():
            linear(256, 128, 128, torch.bfloat16, normalize=True, max_out=2)
            conv2d((16, 128, 8, 8), 128, 3, torch.bfloat16, stride=2, normalize=True, max_out=2)
            batch_norm_uncentered((4, 64, 8, 8), torch.bfloat16, residual=True, activation="relu")
    for dtype in (torch.bfloat16, torch.float32):
        for rows, outputs, inputs in SIZES if thorough or dtype == torch.bfloat16 else SIZES[:1]:
            linear(rows, outputs, inputs, dtype)
            conv2d((rows // 16, inputs, 4, 4), outputs, 3, dtype, dw=False)
            conv2d_dw((rows // 16, inputs, 4, 4), outputs, dtype)
        # flags: general B from a tensor, weight norm, max_out, bias; strides, groups, channels that fill no block
        linear(256, 128, 128, dtype, b_tensor=True, normalize=True, max_out=2, bias=True)
        conv2d((16, 128, 8, 8), 128, 3, dtype, stride=2, b_tensor=True, normalize=True, max_out=2, bias=True)
        conv2d((16, 6, 16, 16), 64, 7, dtype, stride=2)
        conv2d((4, 64, 8, 8), 64, 7, dtype, groups=64)
    for dtype in (torch.bfloat16, torch.float32) if thorough else (torch.bfloat16,):
        batch_norm_uncentered((4, 64, 8, 8), dtype, channels_last=True, residual=True, activation="relu")
        batch_norm_uncentered((4, 64, 32, 32), dtype)
    if thorough:  # float16, tf32
        linear(256, 128, 128, torch.float16)
        torch.backends.cudnn.allow_tf32 = True
        conv2d((16, 128, 4, 4), 128, 3, torch.float32)


def forms_launched(collected: list[tuple[str, dict, object]]) -> dict[str, set[tuple[int, int]]]:
    """Kernel → (BLOCK_M, BLOCK_N) it was compiled for."""
    found: dict[str, set[tuple[int, int]]] = {}
    for name, keywords, _ in collected:
        if "BLOCK_N" in keywords and "BLOCK_K" in keywords:
            found.setdefault(name, set()).add((keywords["BLOCK_M"], keywords["BLOCK_N"]))
    return found


def resources(compiled: object) -> dict[str, int]:
    """Registers a thread, bytes of stack (spills) and of local memory, from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    return {"registers": int(found[1]), "stack_bytes": int(found[2]), "local_bytes": int(found[3])}


def main(arch: int) -> None:
    driver.set_active(StandInDriver(arch))
    collected = collect_instead_of_launching()
    # about 0.8 s of a core a kernel: everything for one GPU, for the others what uses their tensor cores
    launch_everything(thorough=arch == 90)
    for name, keywords, compiled in collected:
        row = {"arch": arch, "triton": triton.__version__, "kernel": name, **resources(compiled)}
        row |= {"shared_bytes": compiled.metadata.shared, "num_warps": compiled.metadata.num_warps}
        print(json.dumps(row | {k: v for k, v in keywords.items() if k.isupper()}))
    tiles = {c[:2] for (bits, _), c in CONFIGS.items() if bits == 16 or arch == 90}
    for name, forms in forms_launched(collected).items():
        missing = tiles - forms
        if missing:
            raise SystemExit(f"{name}: not compiled with tiles {sorted(missing)}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
