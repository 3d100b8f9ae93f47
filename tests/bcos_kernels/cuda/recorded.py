"""The CUTLASS kernels on a CPU: their launchers with a recorder for CUDA's runtime and driver (recorder.cpp), their PTX
in an interpreter (ptx.py, ptx_hopper.py), and the bounds of their numbers."""

from __future__ import annotations

import ctypes
import os
import subprocess
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_kernels import cutlass_build
from tests.bcos_kernels import harness
from tests.bcos_kernels.cuda import emulated, ptx, ptx_hopper
from tests.bcos_kernels.tolerances import assert_close_to_reference

ELEMENTS = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def unusable_reason() -> str | None:
    """What is missing here to build and record a kernel, or None."""
    return cutlass_build.unbuildable_reason() or (None if harness.has_compiler() else "no C++ compiler here")


# --- the structs of kernels.h -----------------------------------------------------------------------------------------


def _struct(name: str, pointers: str, sizes: str = "", windowed: bool = False) -> type[ctypes.Structure]:
    fields = [(pointer, ctypes.c_void_p) for pointer in pointers.split()]
    fields += [(size, ctypes.c_int64) for size in sizes.split()]
    if windowed:
        fields += [("sizes", ctypes.c_int64 * 9), ("steps", ctypes.c_int64 * 6)]  # n h w c o r s p q; stride, …
    return type(name, (ctypes.Structure,), {"_fields_": fields})


_linear_forward = _struct("LinearForward", "y x weight reciprocal_n reciprocal_weight_norm", "m n k")
_PROBLEMS = {
    "linear_forward": _linear_forward,
    "linear_norm_forward": _linear_forward,
    "linear_backward_dx": _struct("LinearBackwardDx", "dx da weight x q", "m n k"),
    "conv2d_forward": _struct("Conv2dForward", "y x weight reciprocal_n reciprocal_weight_norm", windowed=True),
    "conv2d_backward_dx": _struct("Conv2dBackwardDx", "dx da weight x q", windowed=True),
}


class _Launch(ctypes.Structure):
    _fields_ = [
        ("launched", ctypes.c_uint32), ("grid", ctypes.c_uint32 * 3), ("cluster", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32), ("shared", ctypes.c_uint32), ("parameters", ctypes.c_ubyte * 4096),
    ]  # fmt: skip


# --- building and running ---------------------------------------------------------------------------------------------


@cache
def _built(kind: str) -> tuple[ctypes.CDLL, str]:
    """The launcher of a kernel, recorded, and the kernel's PTX."""
    folder = cutlass_build.build([kind]).parent
    library, object_ = folder / f"recorded_{kind}.so", folder / f"{kind}.o"
    source = emulated.ROOT / "tests" / "bcos_kernels" / "cuda" / "recorder.cpp"
    part = library.with_suffix(f".{os.getpid()}")
    command = [*harness.find_compiler(), "-O1", "-std=c++17", "-shared", "-fPIC", "-Wl,-Bsymbolic", str(source)]
    subprocess.run([*command, str(object_), "-o", str(part)], check=True)  # symbolic: torch has loaded CUDA's runtime
    part.rename(library)
    recorder = ctypes.CDLL(str(library))
    recorder.bcos_record.restype = ctypes.c_char_p
    dump = [cutlass_build._cuobjdump(), "-ptx", str(object_)]
    return recorder, subprocess.run(dump, capture_output=True, text=True, check=True).stdout


def record(
    stem: str, dtype: torch.dtype, arguments: dict, parameter_bytes: int = 8, processors: int | None = None
) -> _Launch:
    """What a kernel's launcher launches.

    Args:
        stem: a kernel's name without its element type.
        dtype: its element type.
        arguments: fields of its struct.
        parameter_bytes: of the kernel's parameter.
        processors: of the device; default: an A100's, for Hopper an H200's.

    Raises:
        RuntimeError: what the launcher says.
    """
    launch, kind = _Launch(), f"{stem}_{ELEMENTS[dtype]}"
    problem = _PROBLEMS[stem.removesuffix("_sm80")](**arguments)
    processors = processors or (108 if stem.endswith("_sm80") else 132)
    given = ctypes.byref(problem), ctypes.c_int64(parameter_bytes), processors, ctypes.byref(launch)
    message = _built(kind)[0].bcos_record(kind.encode(), *given).decode()
    if message:
        raise RuntimeError(message)
    return launch


def run(
    stem: str, out: Tensor, tensors: dict[str, Tensor | None], sizes: dict, change=None, processors=None, **order
) -> Tensor:
    """``out`` as the kernel fills it.

    Args:
        stem: a kernel's name without its element type, which is that of ``out``.
        out: the output, of which every element is NaN before.
        tensors: the struct's pointers by name; None for null.
        sizes: the struct's other fields.
        change: made to the PTX before it runs, a function of the text.
        processors: of the device, see `record`.
        order: of Hopper's, see `ptx_hopper.run`: ``early_loads``, ``early_reads``, ``together``, ``seed``.
    """
    text = _built(f"{stem}_{ELEMENTS[out.dtype]}")[1]
    program = ptx.parse(change(text) if change is not None else text)
    present = {name: t for name, t in tensors.items() if t is not None}
    output = _PROBLEMS[stem.removesuffix("_sm80")]._fields_[0][0]
    pointers = {name: t.data_ptr() for name, t in present.items()} | {output: out.data_ptr()}
    launch = record(stem, out.dtype, pointers | sizes, program.parameter_bytes, processors)
    assert launch.launched == 1
    out.fill_(float("nan"))
    arrays = {}
    for t in (out, *present.values()):
        rows = t.permute(0, 2, 3, 1) if t.dim() == 4 and t.shape[1] > 1 else t  # a view of the memory as it lies
        arrays[t.data_ptr()] = rows.contiguous().view(torch.uint8).numpy().reshape(-1)
        assert arrays[t.data_ptr()].ctypes.data == t.data_ptr()
    parameters = bytes(launch.parameters[: program.parameter_bytes])
    given = program, parameters, ptx.Memory(arrays), tuple(launch.grid), launch.threads, launch.shared
    if stem.endswith("_sm80"):
        ptx.run(*given, **order)
    else:
        ptx_hopper.run(*given, tuple(launch.cluster), **order)
    return out


def tensor(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    made = harness.randn(shape, seed, dtype)
    return made.contiguous(memory_format=torch.channels_last) if made.dim() == 4 else made


def window(images, channels, outputs, height, width, kernel, stride, padding, dilation) -> dict:
    """The fields of a window's struct."""
    p, q = (
        (size + 2 * pad - step * (extent - 1) - 1) // by + 1
        for size, pad, step, extent, by in zip((height, width), padding, dilation, kernel, stride, strict=True)
    )
    sizes = (ctypes.c_int64 * 9)(images, height, width, channels, outputs, *kernel, p, q)
    return dict(sizes=sizes, steps=(ctypes.c_int64 * 6)(*stride, *padding, *dilation))


# --- numbers ----------------------------------------------------------------------------------------------------------


def check_linear(stem: str, m: int, n: int, k: int, dtype: torch.dtype, unit_weights: bool = False, **options) -> None:
    """A kernel of linear layers against float64. ``unit_weights``: with 1/|w|; other options: of `run`."""
    sizes = dict(m=m, n=n, k=k)
    x, weight = tensor((m, k), 1, dtype), tensor((n, k), 2, dtype)
    if "backward" in stem:
        da, q = tensor((m, n), 3, dtype), torch.randn(m)
        given = dict(da=da, weight=weight, x=x, q=q)
        dx = run(stem, torch.empty(m, k, dtype=dtype), given, sizes, **options)
        exact = da.double() @ weight.double() + x.double() * q.double()[:, None]
        assert_close_to_reference("dx", dx, exact.to(dtype), exact, dtype)
        return
    reciprocal_n, norms = torch.rand(m) + 0.5, torch.rand(n) + 0.5 if unit_weights else None
    a = x.double() @ weight.double().t()
    a = a if norms is None else a * norms.double()
    given = dict(x=x, weight=weight, reciprocal_weight_norm=norms)
    if "norm" in stem:
        scale = 1 / (x.double().norm(dim=1) + 1e-12)
    else:
        given["reciprocal_n"], scale = reciprocal_n, reciprocal_n.double()
    y = run(stem, torch.empty(m, n, dtype=dtype), given, sizes, **options)
    exact = a * a.abs() * scale[:, None]
    assert_close_to_reference("y", y, exact.to(dtype), exact, dtype)


def check_conv2d(stem: str, case: tuple, dtype: torch.dtype, unit_weights: bool = False, **options) -> None:
    """A kernel of convolutions against float64; ``case``: the arguments of `window`."""
    images, channels, outputs, height, width, kernel, *geometry = case
    x, weight = tensor((images, channels, height, width), 1, dtype), tensor((outputs, channels, *kernel), 2, dtype)
    a = F.conv2d(x.double(), weight.double(), None, *geometry)
    if "backward" in stem:
        da, q = tensor(tuple(a.shape), 3, dtype), torch.randn(images, 1, height, width)
        given = dict(da=da, weight=weight, x=x, q=q)
        dx = run(stem, torch.empty_like(x), given, window(*case), **options)
        arguments = (None, *geometry, False, (0, 0), 1, [True, False, False])
        exact = torch.ops.aten.convolution_backward(da.double(), x.double(), weight.double(), *arguments)[0]
        exact = exact + x.double() * q.double()
        assert_close_to_reference("dx", dx, exact.to(dtype), exact, dtype)
        return
    norms = torch.rand(outputs) + 0.5 if unit_weights else None
    reciprocal_n = torch.rand(images, 1, *a.shape[2:]) + 0.5
    a = a if norms is None else a * norms.double()[:, None, None]
    given = dict(x=x, weight=weight, reciprocal_n=reciprocal_n, reciprocal_weight_norm=norms)
    y = run(stem, tensor(tuple(a.shape), 5, dtype), given, window(*case), **options)
    exact = a * a.abs() * reciprocal_n.double()
    assert_close_to_reference("y", y, exact.to(dtype), exact, dtype)
