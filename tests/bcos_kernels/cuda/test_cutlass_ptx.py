"""What the CUTLASS kernels for sm_80 compute, without a GPU: their launchers with a recorder for CUDA's runtime, their
PTX in an interpreter (ptx.py). Of the kernels' own parts that leaves what ptxas makes of the PTX, and races.

nvcc takes a third of a minute a kernel; the environment variable BCOS_TEST_CUDA_BUILD=all adds those for float16.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_kernels import cutlass_build
from tests.bcos_kernels import harness
from tests.bcos_kernels.cuda import emulated, ptx
from tests.bcos_kernels.tolerances import assert_close_to_reference

_reason = cutlass_build.unbuildable_reason() or (None if harness.has_compiler() else "no C++ compiler here")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_reason is not None, reason=f"CUTLASS kernels cannot be built here: {_reason}"),
]
FLOAT16 = pytest.mark.skipif(
    os.environ.get("BCOS_TEST_CUDA_BUILD") != "all", reason="a minute of nvcc: BCOS_TEST_CUDA_BUILD=all compiles all"
)
ELEMENTS = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=FLOAT16)], ids=str)


# --- the structs of kernels.h -----------------------------------------------------------------------------------------


def _struct(name: str, pointers: str, sizes: str = "", windowed: bool = False) -> type[ctypes.Structure]:
    fields = [(pointer, ctypes.c_void_p) for pointer in pointers.split()]
    fields += [(size, ctypes.c_int64) for size in sizes.split()]
    if windowed:
        fields += [("sizes", ctypes.c_int64 * 9), ("steps", ctypes.c_int64 * 6)]  # n h w c o r s p q; stride, …
    return type(name, (ctypes.Structure,), {"_fields_": fields})


PROBLEMS = {
    "linear_forward": _struct("LinearForward", "y x weight reciprocal_n reciprocal_weight_norm", "m n k"),
    "linear_backward_dx": _struct("LinearBackwardDx", "dx da weight x q", "m n k"),
    "conv2d_forward": _struct("Conv2dForward", "y x weight reciprocal_n reciprocal_weight_norm", windowed=True),
    "conv2d_backward_dx": _struct("Conv2dBackwardDx", "dx da weight x q", windowed=True),
}


class Launch(ctypes.Structure):
    _fields_ = [
        ("launched", ctypes.c_uint32), ("grid", ctypes.c_uint32 * 3), ("threads", ctypes.c_uint32),
        ("shared", ctypes.c_uint32), ("parameters", ctypes.c_ubyte * 4096),
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


def record(kind: str, problem: ctypes.Structure, parameter_bytes: int) -> Launch:
    launch = Launch()
    arguments = kind.encode(), ctypes.byref(problem), ctypes.c_int64(parameter_bytes), ctypes.byref(launch)
    message = _built(kind)[0].bcos_record(*arguments).decode()
    if message:
        raise RuntimeError(message)
    return launch


def run(stem: str, out: Tensor, tensors: dict[str, Tensor | None], change=lambda text: text, **sizes) -> Tensor:
    """``out`` as the kernel fills it. ``change`` is made to its PTX before that."""
    kind = f"{stem}_sm80_{ELEMENTS[out.dtype]}"
    program = ptx.parse(change(_built(kind)[1]))
    present = {name: t for name, t in tensors.items() if t is not None}
    output = next(iter(PROBLEMS[stem]._fields_))[0]
    pointers = {name: t.data_ptr() for name, t in present.items()} | {output: out.data_ptr()}
    launch = record(kind, PROBLEMS[stem](**pointers, **sizes), program.parameter_bytes)
    assert launch.launched == 1
    out.fill_(float("nan"))
    arrays = {}
    for t in (out, *present.values()):
        rows = t.permute(0, 2, 3, 1) if t.dim() == 4 and t.shape[1] > 1 else t  # a view of the memory as it lies
        arrays[t.data_ptr()] = rows.contiguous().view(torch.uint8).numpy().reshape(-1)
        assert arrays[t.data_ptr()].ctypes.data == t.data_ptr()
    parameters = bytes(launch.parameters[: program.parameter_bytes])
    ptx.run(program, parameters, ptx.Memory(arrays), tuple(launch.grid), launch.threads, launch.shared)
    return out


def tensor(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    made = harness.randn(shape, seed, dtype)
    return made.contiguous(memory_format=torch.channels_last) if made.dim() == 4 else made


# --- numbers ----------------------------------------------------------------------------------------------------------

SIZES = [  # rows, outputs, features
    (128, 128, 32),  # a tile
    (150, 136, 72),  # 2 x 2 tiles, cut in each direction
    (1, 8, 8),
    (257, 776, 8),  # 3 x 7 tiles: programs beyond the last
    (64, 64, 264),  # many stages
]


@dtypes
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_linear(m, n, k, dtype):
    x, weight = tensor((m, k), 1, dtype), tensor((n, k), 2, dtype)
    reciprocal_n, norms = torch.rand(m) + 0.5, torch.rand(n) + 0.5
    sizes = dict(m=m, n=n, k=k)
    a = x.double() @ weight.double().t()
    for reciprocal_weight_norm in (None, norms):
        scaled = a if reciprocal_weight_norm is None else a * norms.double()
        given = dict(x=x, weight=weight, reciprocal_n=reciprocal_n, reciprocal_weight_norm=reciprocal_weight_norm)
        y = run("linear_forward", torch.empty(m, n, dtype=dtype), given, **sizes)
        exact = scaled * scaled.abs() * reciprocal_n.double()[:, None]
        assert_close_to_reference("y", y, exact.to(dtype), exact, dtype)
    da, q = tensor((m, n), 3, dtype), torch.randn(m)
    given = dict(da=da, weight=weight, x=x, q=q)
    dx = run("linear_backward_dx", torch.empty(m, k, dtype=dtype), given, **sizes)
    exact = da.double() @ weight.double() + x.double() * q.double()[:, None]
    assert_close_to_reference("dx", dx, exact.to(dtype), exact, dtype)


WINDOWS = {  # images, channels, outputs, height, width, kernel, stride, padding, dilation
    "a tile": (1, 32, 128, 8, 16, (1, 1), (1, 1), (0, 0), (1, 1)),
    "3x3": (2, 16, 24, 9, 7, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3, more than a tile": (2, 72, 136, 9, 10, (3, 3), (1, 1), (1, 1), (1, 1)),
    "7x7 /2": (1, 8, 16, 17, 13, (7, 7), (2, 2), (3, 3), (1, 1)),
    "/3 by 1, no padding": (1, 8, 8, 11, 6, (2, 3), (3, 1), (0, 0), (1, 1)),
    "dilated": (1, 40, 8, 12, 11, (3, 2), (1, 1), (2, 1), (2, 3)),
    "1x1, padded": (1, 8, 8, 3, 4, (1, 1), (1, 1), (1, 2), (1, 1)),
    "one pixel": (3, 8, 8, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
}


@dtypes
@pytest.mark.parametrize("name", WINDOWS)
def test_conv2d(name, dtype):
    images, channels, outputs, height, width, kernel, stride, padding, dilation = WINDOWS[name]
    x, weight = tensor((images, channels, height, width), 1, dtype), tensor((outputs, channels, *kernel), 2, dtype)
    a = F.conv2d(x.double(), weight.double(), None, stride, padding, dilation)
    sizes = (ctypes.c_int64 * 9)(images, height, width, channels, outputs, *kernel, *a.shape[2:])
    window = dict(sizes=sizes, steps=(ctypes.c_int64 * 6)(*stride, *padding, *dilation))
    reciprocal_n, norms = torch.rand(images, 1, *a.shape[2:]) + 0.5, torch.rand(outputs) + 0.5
    for reciprocal_weight_norm in (None, norms):
        scaled = a if reciprocal_weight_norm is None else a * norms.double()[:, None, None]
        given = dict(x=x, weight=weight, reciprocal_n=reciprocal_n, reciprocal_weight_norm=reciprocal_weight_norm)
        y = run("conv2d_forward", tensor(tuple(a.shape), 5, dtype), given, **window)
        exact = scaled * scaled.abs() * reciprocal_n.double()
        assert_close_to_reference("y", y, exact.to(dtype), exact, dtype)
    if stride != (1, 1):
        with pytest.raises(RuntimeError, match="expected a window within the limits"):
            run("conv2d_backward_dx", torch.empty_like(x), {}, **window)
        return
    da, q = tensor(tuple(a.shape), 3, dtype), torch.randn(images, 1, height, width)
    dx = run("conv2d_backward_dx", torch.empty_like(x), dict(da=da, weight=weight, x=x, q=q), **window)
    options = (None, stride, padding, dilation, False, (0, 0), 1, [True, False, False])
    exact = torch.ops.aten.convolution_backward(da.double(), x.double(), weight.double(), *options)[0]
    exact = exact + x.double() * q.double()
    assert_close_to_reference("dx", dx, exact.to(dtype), exact, dtype)


# --- the interpreter sees what it is meant to see ---------------------------------------------------------------------


def _linear(change):
    x, weight = tensor((8, 264), 1, torch.bfloat16), tensor((8, 264), 2, torch.bfloat16)
    given = dict(x=x, weight=weight, reciprocal_n=torch.ones(8))
    exact = x.double() @ weight.double().t()
    y = run("linear_forward", torch.empty(8, 8, dtype=torch.bfloat16), given, change, m=8, n=8, k=264)
    return float((y.double() - exact * exact.abs()).norm() / (exact * exact.abs()).norm())


def test_a_wait_for_copies_that_is_missing_is_seen():
    assert _linear(lambda text: text) < 1e-2
    late = _linear(lambda text: text.replace("cp.async.wait_group 1;", "cp.async.wait_group 2;"))
    assert not late < 1e-2  # NaN: nothing has been written there


def test_an_access_outside_of_a_tensor_is_seen():
    """Of the row beyond the last, say, where the predicate of a store is lost."""
    with pytest.raises(RuntimeError, match="st.global.* outside of all arrays"):
        _linear(lambda text: text.replace("@p st.global", "st.global"))


def test_an_instruction_that_is_not_known_is_an_error():
    with pytest.raises(NotImplementedError, match="ptx: prmt"):
        _linear(lambda text: text.replace("bar.sync", "prmt.b32", 1))


def test_what_a_launcher_refuses_is_told():
    """Windows beyond the masks of the loads."""
    window = dict(sizes=(ctypes.c_int64 * 9)(1, 1, 40, 8, 8, 1, 33, 1, 8), steps=(ctypes.c_int64 * 6)(1, 1, 0, 0, 1, 1))
    with pytest.raises(RuntimeError, match="expected a window within the limits of the kernel's loads"):
        record("conv2d_forward_sm80_bfloat16", PROBLEMS["conv2d_forward"](**window), 8)


def test_rounding_is_to_the_nearest_to_even():
    values = np.array([1.0, 1.00390625, 1.01171875, -2.5e-41, 3.4e38, 65520.0], np.float32)
    expected = torch.from_numpy(values)
    for kind, dtype in (("bf16x2", torch.bfloat16), ("f16x2", torch.float16)):
        with np.errstate(over="ignore"):
            got = ptx._narrow(values, kind)
        assert (got == expected.to(dtype).view(torch.int16).numpy().view(np.uint16)).all(), kind
