"""Compile the Triton kernels for a GPU that need not be there: python ahead_of_time.py ARCH [SEED]; a JSON row each.

The launchers run as they are, on CPU tensors that nobody reads. A stand-in for the driver names the target and every
launch ends after compilation, so what is compiled is what a GPU would run: same flags, same specialisation of strides
and alignments, same tiles. Registers, spills and shared memory are read from the machine code with Triton's cuobjdump.

With a SEED, kernels that resources.json has as they are now are not compiled but for a tenth of them, which the seed
picks: their rows are an id and null.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import json
import re
import subprocess
import sys
import tempfile
import textwrap
import zlib
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bcos_kernels import triton_kernels
from bcos_kernels.triton_kernels import descriptors
from bcos_kernels.triton_kernels.configs import CONFIGS, DESCRIPTOR_CONFIGS

USERS_OF_OFFSETS = (
    "linear", "conv2d", "conv2d_gradient", "batch_norm_uncentered", "conv2d_batch_norm", "layer_norm", "weights",
    "bcos_math", "descriptors", "conv2d_small_groups", "conv2d_small_groups_gradient",
)  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ROWS = Path(__file__).with_name("resources.json")


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


class Launch(NamedTuple):
    """A kernel's name, its arguments by name, launch keywords among them, and what was compiled for it."""

    kernel: str
    arguments: dict
    compiled: object  # None: not compiled, as it is known
    id: str = ""
    digest: str = ""


@cache
def source_digest(function: JITFunction) -> str:
    """Of a kernel and of all device functions and constants that it uses; comments and line numbers do not count."""
    found: dict[str, str] = {}

    def visit(function: JITFunction) -> None:
        name = f"{function.__module__}.{function.__name__}"
        if name in found:
            return
        tree = ast.parse(textwrap.dedent(function.src))
        body = tree.body[0].body
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            del body[0]
        found[name] = ast.dump(tree)
        for node in ast.walk(tree):
            value = function.fn.__globals__.get(node.id) if isinstance(node, ast.Name) else None
            if isinstance(value, JITFunction):
                visit(value)
            elif isinstance(value, (bool, int, float, str, tl.constexpr)):
                found[f"{name}: {node.id}"] = repr(value)

    visit(function)
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def specialisation(value: object) -> str:
    """What the compiler sees of an argument."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{'' if value.data_ptr() % 16 == 0 else ', unaligned'}"
    if hasattr(value, "block_shape"):
        return f"descriptor of {value.base.dtype} {value.block_shape}"
    if isinstance(value, int) and not isinstance(value, bool):
        return "one" if value == 1 else f"int{64 if abs(value) >= 2**31 else 32}{', 16' if value % 16 == 0 else ''}"
    return type(value).__name__


def collect_instead_of_launching(arch: int, seed: str | None = None) -> list[Launch]:
    """From now on a launch compiles and is appended to the list returned.

    Launches that differ in sizes and strides alone are compiled once, as the first one; with a seed, of those that are
    known only some.
    """
    collected: list[Launch] = []
    seen: set[tuple] = set()
    known = known_rows() if seed is not None else {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        types = tuple(a.dtype if isinstance(a, torch.Tensor) else None for a in args)
        key = (self.__name__, types, *sorted(kwargs.items()))
        if key in seen:
            return
        seen.add(key)
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        tile = "x".join(str(arguments[name]) for name in arguments if name.startswith("BLOCK_"))
        id = f"sm_{arch} {self.__name__} {tile} {zlib.crc32(repr(key).encode()):08x}"
        seen_by_compiler = [specialisation(a) for a in args], sorted(kwargs.items()), arch
        digest = hashlib.sha256(repr((source_digest(self), seen_by_compiler)).encode()).hexdigest()[:12]
        is_known = known.get(id, {}).get("digest") == digest and zlib.crc32(f"{seed} {id}".encode()) % 10
        compiled = None if is_known else run(self, *args, grid=grid, warmup=True, **kwargs)
        collected.append(Launch(self.__name__, arguments, compiled, id, digest))

    JITFunction.run = compile_only
    return collected


def linear(
    rows, outputs, inputs, dtype, b=2.0, b_tensor=False, normalize=False, max_out=1, bias=False, squares=False
) -> None:
    """Every kernel of a linear layer."""
    x = torch.empty(rows, inputs, dtype=dtype)
    weight = torch.empty(outputs * max_out, inputs, dtype=dtype)
    options = (weight.new_empty(weight.shape[0]) if bias else None, b, torch.empty(()) if b_tensor else None)
    y, n, a, index = triton_kernels.linear_forward(
        x, weight, *options, normalize, max_out, True, torch.empty(rows) if squares else None
    )
    triton_kernels.linear_backward(
        y, x, weight, *options, y, n, a, index, normalize, max_out, False, True, True, bias, b_tensor
    )


def linear_gelu(rows, outputs, inputs, dtype) -> None:
    """The kernels of a linear layer that know of the GELU behind it."""
    x, weight = torch.empty(rows, inputs, dtype=dtype), torch.empty(outputs, inputs, dtype=dtype)
    layer = (2.0, None, False, 1)
    kept = triton_kernels.linear_gelu_forward(x, weight, None, torch.empty(rows), *layer, True, True)
    h, _, y, n, a, index = kept
    triton_kernels.linear_gelu_backward(h, x, weight, None, y, n, a, index, *layer, False, True, False, False, False)


def _channels_last(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def conv2d(
    shape, outputs, kernel, dtype, stride=1, groups=1, b=2.0, b_tensor=False, normalize=False, max_out=1, bias=False,
    squares=False, dw=True, pixels_innermost=False,
) -> None:  # fmt: skip
    """Every kernel of a convolution, channels_last unless asked otherwise."""
    x = _channels_last(*shape, dtype=dtype)
    weight = _channels_last(outputs * max_out, shape[1] // groups, kernel, kernel, dtype=dtype)
    if pixels_innermost:
        x, weight = x.contiguous(), weight.contiguous()
    geometry = ((stride, stride), (kernel // 2, kernel // 2), (1, 1), groups)
    options = (
        weight.new_empty(weight.shape[0]) if bias else None, *geometry, b, torch.empty(()) if b_tensor else None
    )  # fmt: skip
    known = torch.empty(shape[0], *shape[2:]) if squares else None
    y, n, a, index = triton_kernels.conv2d_forward(x, weight, *options, normalize, max_out, True, known)
    triton_kernels.conv2d_backward(
        y, x, weight, *options, y, n, a, index, normalize, max_out, False, True, dw, bias, b_tensor
    )


def conv2d_dw(shape, outputs, dtype) -> None:
    """The kernels of ∂L/∂w of a convolution that reads single pixels: its result is small enough for every tile."""
    x = _channels_last(*shape, dtype=dtype)
    weight = torch.empty(outputs, shape[1], 1, 1, dtype=dtype)
    y = _channels_last(shape[0], outputs, *(-(-size // 2) for size in shape[2:]), dtype=dtype)
    options = ((2, 2), (0, 0), (1, 1), 1, 1.0, None)  # a stride: it would run as a linear layer else
    triton_kernels.conv2d_backward(
        y, x, weight, None, *options, None, y, y, y, False, 1, False, False, True, False, False
    )  # fmt: skip


def conv2d_batch_norm(shape, outputs, kernel, dtype, detach=False, squares=True, backward=True, groups=1) -> None:
    """The kernels of a convolution with known statistics, residual and ReLU behind it, and those of its gradient."""
    x = _channels_last(*shape, dtype=dtype)
    weight = _channels_last(outputs, shape[1] // groups, kernel, kernel, dtype=dtype)
    residual, vector = _channels_last(shape[0], outputs, *shape[2:], dtype=dtype), torch.empty(outputs)
    layer = ((1, 1), (kernel // 2, kernel // 2), (1, 1), groups, 2.0, None, False, 1)
    known = torch.empty(shape[0], *shape[2:]) if squares else None
    z, _, y, n, a, index, _, var = triton_kernels.conv2d_batch_norm_forward(
        x, weight, None, vector, vector, residual, vector, known, *layer, False, 1e-5, "relu", True, detach, True
    )
    for training, of_z in ((True, z), (False, None)) if backward and not detach else ((False, z),) * backward:
        triton_kernels.conv2d_batch_norm_backward(
            z, x, weight, None, vector, vector, of_z, y, n, a, index, vector, var, *layer, training, 1e-5, "relu",
            detach, True, False, False, False, not detach, not detach, of_z is not None,
        )  # fmt: skip


def batch_norm_uncentered(shape, dtype, channels_last=False, residual=False, activation=None, squares=False) -> None:
    """Every kernel of the batch normalisation."""
    x = torch.empty(shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    weight = torch.empty(shape[1])
    options = (x if residual else None, None, True, 1e-5, activation)
    y, mean, var, _ = triton_kernels.batch_norm_uncentered_forward(x, weight, weight, *options, squares)
    triton_kernels.batch_norm_uncentered_backward(
        y, x, y if residual else None, weight, weight, mean, var, True, 1e-5, activation, False, True, True, True,
        residual,
    )  # fmt: skip


def layer_norm(shape, dtype, dims=1, detach=False, squares=True) -> None:
    """Every kernel of the layer normalisation."""
    x = torch.empty(shape, dtype=dtype)
    weight = torch.empty(shape[len(shape) - dims :])
    y, mean, rstd, _ = triton_kernels.layer_norm_forward(x, dims, weight, weight, 1e-5, squares)
    triton_kernels.layer_norm_backward(y, x, dims, weight, weight, mean, rstd, detach, True, True, True)


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
        layer_norm((1, 1), torch.bfloat16)
        with offsets_of_64_bits():
            linear(256, 128, 128, torch.bfloat16, normalize=True, max_out=2)
            conv2d((16, 128, 8, 8), 128, 3, torch.bfloat16, stride=2, normalize=True, max_out=2)
            batch_norm_uncentered((4, 64, 8, 8), torch.bfloat16, residual=True, activation="relu")
            conv2d_batch_norm((16, 128, 4, 4), 128, 3, torch.bfloat16)
            conv2d((4, 64, 8, 8), 64, 7, torch.bfloat16, stride=2, groups=64, normalize=True, bias=True)
            conv2d((4, 64, 8, 8), 64, 3, torch.float32, groups=32, max_out=2, normalize=True, pixels_innermost=True)
            conv2d_batch_norm((4, 64, 8, 8), 64, 3, torch.bfloat16, groups=64)
            conv2d_batch_norm((4, 64, 8, 8), 64, 3, torch.bfloat16, groups=16, detach=True)
            conv2d((8, 96, 8, 8), 96, 3, torch.bfloat16, groups=4)
            linear_gelu(256, 128, 128, torch.bfloat16)
            layer_norm((64, 384), torch.bfloat16)
            layer_norm((3, 20000), torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        for rows, outputs, inputs in SIZES if thorough or dtype == torch.bfloat16 else SIZES[:1]:
            shape = (rows // 16, inputs, 4, 4)
            linear(rows, outputs, inputs, dtype)
            conv2d(shape, outputs, 3, dtype, dw=False)
            conv2d_dw((rows // 4, inputs, 4, 4), outputs, dtype)
        # what follows the scaling in the same kernel, norms from the sums of squares: the tiles with the most registers
        for rows, outputs, inputs in SIZES[:2] if dtype == torch.bfloat16 else SIZES[: int(thorough)]:
            shape = (rows // 16, inputs, 4, 4)
            linear_gelu(rows, outputs, inputs, dtype)
            conv2d_batch_norm(shape, outputs, 3, dtype, backward=False)
            conv2d_batch_norm(shape, outputs, 1, dtype, backward=False)
            conv2d_batch_norm(shape, outputs, 3, dtype, detach=True, backward=False)
        if thorough or dtype == torch.bfloat16:
            conv2d_batch_norm((16, 128, 4, 4), 128, 3, dtype, squares=False)
            conv2d_batch_norm((16, 128, 4, 4), 128, 3, dtype, detach=True)
        # flags: general B from a tensor, weight norm, max_out, bias; strides, groups, channels that fill no block
        linear(256, 128, 128, dtype, b_tensor=True, normalize=True, max_out=2, bias=True)
        conv2d((16, 128, 8, 8), 128, 3, dtype, stride=2, b_tensor=True, normalize=True, max_out=2, bias=True)
        conv2d((16, 6, 16, 16), 64, 7, dtype, stride=2)
        conv2d((16, 6, 16, 16), 64, 7, dtype, stride=2, squares=True, dw=False)
        conv2d((4, 64, 8, 8), 64, 7, dtype, groups=64)
        conv2d_batch_norm((4, 64, 8, 8), 64, 3, dtype, groups=64)
        if thorough or dtype == torch.bfloat16:
            conv2d((4, 64, 8, 8), 64, 3, dtype, groups=8)
            conv2d((8, 96, 8, 8), 96, 3, dtype, groups=4)
            conv2d((8, 40, 8, 8), 40, 3, dtype, b=1.5, normalize=True, bias=True)
            conv2d((16, 128, 4, 4), 128, 3, dtype, normalize=True, dw=False, pixels_innermost=True)
            conv2d_batch_norm((8, 64, 8, 8), 64, 3, dtype, groups=8, detach=True)
            conv2d((4, 64, 8, 8), 64, 3, dtype, groups=64, stride=2, b=1.5, normalize=True, bias=True)
            conv2d((4, 64, 8, 8), 64, 3, dtype, groups=16, pixels_innermost=True)
            conv2d_batch_norm((4, 64, 8, 8), 64, 3, dtype, groups=64, detach=True)
            # groups of few channels: their most units, several splits of many windows, flags
            conv2d((64, 64, 8, 8), 64, 3, dtype, groups=16, b=1.5, normalize=True, bias=True)
            conv2d((4, 64, 8, 8), 64, 11, dtype, groups=64, stride=2, b_tensor=True, max_out=4)
    for dtype in (torch.bfloat16, torch.float32) if thorough else (torch.bfloat16,):
        for squares in (False, True):
            batch_norm_uncentered(
                (4, 64, 8, 8), dtype, channels_last=True, residual=True, activation="relu", squares=squares
            )
            batch_norm_uncentered((4, 64, 32, 32), dtype, activation="relu", squares=squares)
        batch_norm_uncentered((4, 64, 8, 8), dtype, channels_last=True, activation="relu")
        batch_norm_uncentered((4, 64, 32, 32), dtype)
        for features in (96, 384, 1536, 4000) if thorough else (384, 4000):
            layer_norm((64, features), dtype)
        layer_norm((64, 384), dtype, detach=True, squares=False)
        layer_norm((3, 64, 20, 20), dtype, dims=3)
    if thorough:  # float16, tf32
        linear(256, 128, 128, torch.float16)
        torch.backends.cudnn.allow_tf32 = True
        conv2d((16, 128, 4, 4), 128, 3, torch.float32)


def launch_descriptors() -> None:
    """Every kernel of descriptors.py with every tile, and what may follow the scaling in the forward."""
    for rows, outputs, inputs in ((256, 128, 128), (256, 64, 64)):
        for squares in (False, True):
            linear(rows, outputs, inputs, torch.bfloat16, squares=squares)
        linear(rows, outputs, inputs, torch.float16, b=1.5, normalize=True, bias=True)
        linear_gelu(rows, outputs, inputs, torch.bfloat16)
        for detach in (False, True):
            conv2d_batch_norm((rows // 16, inputs, 4, 4), outputs, 1, torch.bfloat16, detach=detach, backward=False)
    for squares in (False, True):
        linear(132 * 128, 256, 64, torch.bfloat16, squares=squares)
    with offsets_of_64_bits():
        linear(256, 128, 128, torch.bfloat16, normalize=True)


def missing_tiles(collected: list[Launch], arch: int) -> dict[str, set[tuple[int, int]]]:
    """Kernel → tiles (BLOCK_M, BLOCK_N) of its table that it was not compiled with."""
    found: dict[str, set[tuple[int, int]]] = {}
    for kernel, arguments, *_ in collected:
        if "BLOCK_N" in arguments and "BLOCK_K" in arguments:
            found.setdefault(kernel, set()).add((arguments["BLOCK_M"], arguments["BLOCK_N"]))
    general = {c[:2] for (bits, _), c in CONFIGS.items() if bits == 16 or arch == 90}
    described = {DESCRIPTOR_CONFIGS[form][:2] for form in ("large", "tall")}
    missing = {k: (described if takes_descriptors(k) else general) - forms for k, forms in found.items()}
    if arch == 90:
        missing["with twice the columns"] = {DESCRIPTOR_CONFIGS["wide"][:2]} - found["linear_forward_persistent_kernel"]
    return {kernel: tiles for kernel, tiles in missing.items() if tiles}


def takes_descriptors(kernel: str) -> bool:
    return hasattr(descriptors, kernel) and kernel.endswith("_kernel")


def resources(compiled: object) -> dict[str, int]:
    """Registers a thread, bytes of stack (spills) and of local memory, from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    return {"registers": int(found[1]), "stack_bytes": int(found[2]), "local_bytes": int(found[3])}


def instructions(compiled: object) -> dict[str, bool]:
    """Whether products run as Hopper's warp-group instructions, and whether tiles are copied by descriptors."""
    ptx = compiled.asm["ptx"]
    return {"wgmma": "wgmma.mma_async" in ptx, "tma_loads": "cp.async.bulk.tensor" in ptx}


def row_of(launch: Launch) -> dict[str, object]:
    compiled, arguments = launch.compiled, launch.arguments
    x = arguments.get("x_ptr", arguments.get("x_desc"))
    # products of so many rows at once, in so many bits; 0 where there are none
    rows = arguments["BLOCK_M"] if x is not None and arguments.get("BLOCK_K") and "BLOCK_N" in arguments else 0
    return {
        "digest": launch.digest, **resources(compiled), "shared_bytes": compiled.metadata.shared,
        "product_rows": rows, "bits": 8 * getattr(x, "base", x).dtype.itemsize if rows else 0, **instructions(compiled),
    }  # fmt: skip


def known_rows() -> dict[str, dict]:
    """The committed rows by id; none where another Triton has compiled them."""
    content = json.loads(ROWS.read_text(encoding="utf-8")) if ROWS.exists() else {}
    return content["rows"] if content.get("triton") == triton.__version__ else {}


def main(arch: int, seed: str | None = None) -> None:
    driver.set_active(StandInDriver(arch))
    collected = collect_instead_of_launching(arch, seed)
    # about 0.8 s of a core a kernel: everything for one GPU, for the others what uses their tensor cores
    with mock.patch.object(descriptors, "config_of", lambda *arguments: None):
        launch_everything(thorough=arch == 90)
    launch_descriptors()
    for launch in collected:
        print(json.dumps([launch.id, None if launch.compiled is None else row_of(launch)]))
    missing = missing_tiles(collected, arch)
    if missing:
        raise SystemExit(f"not compiled with tiles: {missing}")


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
