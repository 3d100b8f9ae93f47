"""The CUTLASS kernels: that they compile into what they are meant to be, and that their ops refuse what they
cannot compute. No GPU is needed for that; what they compute is compared on one, and, from their PTX, in
cuda/test_cutlass_ptx.py.

nvcc takes a minute a kernel, so that one matrix product and one convolution for Hopper and one of each for sm_80 are
compiled by default; the environment variable BCOS_TEST_CUDA_BUILD=all adds the others.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bcos_kernels import cutlass_build

ROWS = json.loads(Path(__file__).with_name("cutlass_resources.json").read_text())
ALWAYS = tuple(f"{op}_forward{suffix}_bfloat16" for op in ("linear", "conv2d") for suffix in ("", "_sm80"))
ALL = os.environ.get("BCOS_TEST_CUDA_BUILD") == "all"

_reason = cutlass_build.unbuildable_reason()
buildable = pytest.mark.skipif(_reason is not None, reason=f"CUTLASS kernels cannot be built here: {_reason}")
on_request = pytest.mark.skipif(not ALL, reason="a minute of nvcc: BCOS_TEST_CUDA_BUILD=all compiles every kernel")


# ---- the build, with a stand-in for nvcc ----

NVCC = """#!{python}
import pathlib, sys
arguments = sys.argv[1:]
folder = pathlib.Path(__file__).parent
if arguments == ["--version"]:
    print("Cuda compilation tools, release {release}, V{release}.0")
    sys.exit()
output = pathlib.Path(arguments[arguments.index("-o") + 1])
with open(folder / "calls", "a") as calls:
    calls.write(output.name + "\\n")
output.write_text(" ".join(arguments))
if any((folder / "broken").exists() and argument.endswith("conv2d_forward.cu") for argument in arguments):
    print("conv2d_forward.cu(1): error: a reason")
    sys.exit(2)
"""


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder with an nvcc that writes down what it is asked for, headers that are none, and a cache of its own."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(NVCC.format(python=sys.executable, release=torch.version.cuda or "13.0"))
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    include = tmp_path / "headers" / "include"
    (include / "cutlass").mkdir(parents=True)
    (include.parent / "tools" / "util" / "include").mkdir(parents=True)
    numbers = zip(("MAJOR", "MINOR", "PATCH"), (4, 2, 0), strict=True)
    (include / "cutlass" / "version.h").write_text("".join(f"#define CUTLASS_{part} {n}\n" for part, n in numbers))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("BCOS_CUTLASS_INCLUDE", str(include))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.version, "cuda", torch.version.cuda or "13.0")
    return nvcc.parent


def calls(tools: Path) -> list[str]:
    """What nvcc has been asked for since the last call."""
    written = tools / "calls"
    names = [name.removesuffix(".part") for name in written.read_text().split()] if written.exists() else []
    written.unlink(missing_ok=True)
    return names


def test_builds_once_and_adds_to_the_library(tools):
    library = cutlass_build.build(["linear_forward_bfloat16"])
    assert calls(tools) == ["ops.o", "linear_forward_bfloat16.o", library.name]
    cutlass_build.build(["linear_forward_bfloat16"])
    assert calls(tools) == []
    assert cutlass_build.build(["conv2d_forward_float16"]) == library
    assert calls(tools) == ["conv2d_forward_float16.o", library.name]
    # nvcc's stand-in wrote its arguments down: what the library was linked from
    assert {"ops.o", "linear_forward_bfloat16.o", "conv2d_forward_float16.o"} <= {
        Path(argument).name for argument in library.read_text().split()
    }


def test_two_builders_compile_once(tools):
    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(cutlass_build.build, [["linear_forward_bfloat16"]] * 2))) == 1
    assert calls(tools) == ["ops.o", "linear_forward_bfloat16.o", cutlass_build.LIBRARY]


def test_what_does_not_compile_leaves_nothing(tools):
    (tools / "broken").touch()
    with pytest.raises(RuntimeError, match="could not make conv2d_forward_bfloat16.o(.|\n)*error: a reason"):
        cutlass_build.build(["conv2d_forward_bfloat16"])
    folder = cutlass_build._cache_folder(cutlass_build._find_tools())
    assert {path.name for path in folder.iterdir()} == {"lock", "ops.o", "ops.log"}
    (tools / "broken").unlink()
    assert cutlass_build.build(["conv2d_forward_bfloat16"]).exists()


def test_cache_is_named_after_headers_and_compiler(tools, monkeypatch):
    folders = [cutlass_build._cache_folder(cutlass_build._find_tools())]
    header = Path(os.environ["BCOS_CUTLASS_INCLUDE"], "cutlass", "version.h")
    header.write_text(header.read_text().replace("MINOR 2", "MINOR 3"))
    folders.append(cutlass_build._cache_folder(cutlass_build._find_tools()))
    monkeypatch.setattr(cutlass_build, "_KERNEL_FLAGS", [*cutlass_build._KERNEL_FLAGS, "-lineinfo"])
    folders.append(cutlass_build._cache_folder(cutlass_build._find_tools()))
    assert len(set(folders)) == 3
    assert {folder.parent for folder in folders} == {Path(os.environ["XDG_CACHE_HOME"], "bcos_kernels")}


def test_missing_tools_are_named(tools, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "9.0")
    with pytest.raises(RuntimeError, match="expected torch and nvcc of one major CUDA version, got torch .* 9.0"):
        cutlass_build.build()
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tools))  # has no bin/nvcc
    with pytest.raises(RuntimeError, match="expected nvcc in CUDA_HOME or on PATH, found none.*toolkit"):
        cutlass_build.build()
    assert "expected nvcc" in cutlass_build.unbuildable_reason()


def test_missing_headers_are_named(tools, monkeypatch):
    monkeypatch.setenv("BCOS_CUTLASS_INCLUDE", str(tools))
    with pytest.raises(RuntimeError, match="pip install --no-deps nvidia-cutlass"):
        cutlass_build.build()


def test_unknown_kinds_are_refused(tools):
    with pytest.raises(ValueError, match="expected kinds among linear_forward_bfloat16, .*, got linear"):
        cutlass_build.build(["linear"])


def test_command_line(tools, capsys):
    assert cutlass_build.main(["--kinds", "linear_forward_float16"]) == 0
    printed = capsys.readouterr().out
    assert "compiled linear_forward_float16 in" in printed and printed.rstrip().endswith(cutlass_build.LIBRARY)
    assert cutlass_build.main(["--list"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["linear_forward_float16", "built"] in lines and ["conv2d_forward_bfloat16", "not built"] in lines
    assert ["conv2d_backward_dx_sm80_bfloat16", "not built"] in lines
    (tools / "broken").touch()
    assert cutlass_build.main(["--kinds", "conv2d_forward_bfloat16"]) == 1
    assert "error: a reason" in capsys.readouterr().err


def test_what_is_compiled_unless_kernels_are_named(monkeypatch):
    """bfloat16 for the GPU that is here, or for every one."""
    found = {}
    for capability in (None, (7, 5), (8, 6), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=capability: here is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda here=capability: here)
        found[capability] = set(cutlass_build.default_kinds())
    assert all(kind.endswith("_bfloat16") for kinds in found.values() for kind in kinds)
    assert all("_sm80_" not in kind for kind in found[(9, 0)]) and all("_sm80_" in kind for kind in found[(8, 6)])
    assert found[(8, 6)] == found[(12, 0)] and found[None] == found[(8, 6)] | found[(9, 0)] and not found[(7, 5)]
    assert (len(found[(8, 6)]), len(found[(9, 0)])) == (4, 5)


def test_nothing_runs_at_import():
    program = (
        "import subprocess, torch\n"
        "def refuse(*args, **kwargs): raise AssertionError(args)\n"
        "subprocess.Popen = subprocess.run = refuse\n"
        "import bcos_kernels.cutlass_build\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_ptxas_messages_are_read():
    messages = (
        "ptxas info    : 0 bytes gmem\n"
        "ptxas info    : Compiling entry function '_ZN7cutlass13device_kernelE' for 'sm_90a'\n"
        "ptxas info    : Function properties for _ZN7cutlass13device_kernelE\n"
        "    24 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 3 barriers, 24 bytes cumulative stack size, 512 bytes smem\n"
    )
    assert cutlass_build.parse_ptxas(messages) == {
        "registers": 168,
        "stack_bytes": 24,
        "spill_store_bytes": 8,
        "spill_load_bytes": 12,
        "static_shared_bytes": 512,
    }
    with pytest.raises(RuntimeError, match="one kernel, got 2"):
        cutlass_build.parse_ptxas(messages * 2)


# ---- what nvcc makes of the kernels ----


@buildable
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in ALWAYS else on_request) for kind in cutlass_build.KINDS]
)
def test_kernel_compiles_to_what_it_is_meant_to_be(kind):
    (row,) = cutlass_build.resources([kind])
    print(json.dumps(row))
    assert row["stack_bytes"] == row["spill_store_bytes"] == row["spill_load_bytes"] == 0, row
    if "_sm80_" in kind:
        assert row["mma"] > 0 and row["async_copies"] > 0, row
        assert row["wgmma"] == row["tma_loads"] == row["tma_stores"] == 0, row
        # two programs a multiprocessor, with 100 KB (8.6, 8.9) of which a program costs one more and 65536 registers
        assert 2 * (row["shared_bytes"] + 1024) <= 100 * 1024 and 2 * row["threads"] * row["registers"] <= 65536, row
    else:
        assert row["wgmma"] > 0 and not row["serialised"], row
        assert row["tma_loads"] > 0 and row["tma_stores"] > 0, row
        assert (row["im2col_loads"] > 0) == kind.startswith("conv2d"), row
        assert row["shared_bytes"] <= 227 * 1024, row
    committed = next(committed for committed in ROWS if committed["kind"] == kind)
    if all(committed[tool] == row[tool] for tool in ("nvcc", "cutlass")):  # another compiler allocates as it likes
        assert row == committed


# norm_main_loop.h sums squares of A's fragments and scales accumulators by them: the second bit of an index has to tell
# the same two rows apart in both, and four neighbouring threads have to hold those rows whole.
ROWS_OF_FRAGMENTS = """
#include <cute/tensor.hpp>
#include <cutlass/kernel_hardware_info.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cstdio>
#include <set>
#include <utility>

int main() {
  using namespace cute;
  using T = cutlass::bfloat16_t;
  using Tile = Shape<_128, _128, _64>;
  constexpr auto K = GMMA::Major::K;
  using Groups = Layout<Shape<_2, _1, _1>>;
  auto multiply = make_tiled_mma(GMMA::ss_op_selector<T, T, float, Tile, K, K>(), Groups{});
  auto from_registers = make_tiled_mma(GMMA::rs_op_selector<T, T, float, Tile, K, K>(), Groups{});
  Tensor of_a = make_identity_tensor(make_shape(_128{}, _64{}));
  Tensor of_c = make_identity_tensor(make_shape(_128{}, _128{}));
  std::set<std::pair<int, int>> held[64];
  int compared = 0, wrong = 0;
  for (int thread = 0; thread < 256; thread++) {
    auto a = from_registers.get_thread_slice(thread).partition_A(of_a);
    auto c = multiply.get_thread_slice(thread).partition_C(of_c);
    for (int i = 0; i < size<0>(a); i++) {
      for (int k = 0; k < size<2>(a); k++) {
        held[thread / 4].insert({int(get<0>(a(i, 0, k))), int(get<1>(a(i, 0, k)))});
        for (int j = 0; j < size<0>(c); j++, compared++) {
          wrong += (((i >> 1) & 1) == ((j >> 1) & 1)) != (get<0>(a(i, 0, k)) == get<0>(c(j, 0, 0)));
        }
      }
    }
    wrong += size<1>(a) != 1 || size<1>(c) != 1 || size<2>(c) != 1;
  }
  for (const auto& values : held) wrong += values.size() != 2 * 64;
  std::printf("compared %d wrong %d", compared, wrong);
}
"""


@buildable
@on_request
@pytest.mark.slow
def test_norms_are_of_the_accumulators_rows(tmp_path):
    tools = cutlass_build._find_tools()
    source, program = tmp_path / "rows.cu", tmp_path / "rows"
    source.write_text(ROWS_OF_FRAGMENTS)
    flags = "-std=c++17 -O1 -DNDEBUG --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a".split()
    includes = [argument for folder in tools.includes for argument in ("-isystem", str(folder))]
    subprocess.run([tools.nvcc, *flags, *includes, str(source), "-o", str(program)], check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    assert run.stdout == f"compared {256 * 8 * 4 * 64} wrong 0"


# ---- what the ops refuse: on the meta device they check and allocate, without a GPU ----


def _kinds_to_run() -> tuple[str, ...]:
    """Hopper runs all, those for sm_80 from their PTX."""
    if not torch.cuda.is_available():
        return ()
    capability = torch.cuda.get_device_capability()
    return cutlass_build.kinds_for(None if capability == (9, 0) else capability)


both = pytest.mark.parametrize("suffix", ["", "_sm80"])  # of an op's name


@pytest.fixture(scope="module")
def ops():
    """The ops, without kernels where there is nothing to run them."""
    torch.ops.load_library(str(cutlass_build.build(_kinds_to_run())))
    return torch.ops.bcos_kernels_cutlass


def matrix(rows, columns, dtype=torch.bfloat16, device="meta"):
    return torch.empty(rows, columns, dtype=dtype, device=device)


def images(*sizes, dtype=torch.bfloat16, device="meta"):
    return torch.empty(sizes, dtype=dtype, device=device, memory_format=torch.channels_last)


def values(*sizes, device="meta"):
    return torch.empty(sizes, device=device)


def op(ops, stem, suffix):
    return getattr(ops, f"{stem}{suffix}")


@buildable
@both
def test_ops_tell_shapes_and_kernels(ops, suffix):
    y = op(ops, "linear_forward", suffix)(matrix(6, 64), matrix(24, 64), values(6), values(24))
    assert y.shape == (6, 24) and y.dtype == torch.bfloat16
    y = ops.linear_norm_forward(matrix(6, 64, torch.float16), matrix(24, 64, torch.float16), None)
    assert y.shape == (6, 24) and y.dtype == torch.float16
    dx = op(ops, "linear_backward_dx", suffix)(matrix(6, 24), matrix(24, 64), matrix(6, 64), values(6))
    assert dx.shape == (6, 64) and dx.dtype == torch.bfloat16
    forward, backward_dx = (op(ops, stem, suffix) for stem in ("conv2d_forward", "conv2d_backward_dx"))
    y = forward(images(2, 8, 9, 7), images(16, 8, 3, 3), values(2, 5, 4), None, 2, 2, 1, 1, 1, 1)
    assert y.shape == (2, 16, 5, 4) and y.is_contiguous(memory_format=torch.channels_last)
    x, da = images(2, 8, 9, 7), images(2, 16, 9, 7)
    dx = backward_dx(da, images(16, 8, 3, 3), x, values(2, 9, 7), 1, 1, 1, 1, 1, 1)
    assert dx.shape == x.shape and dx.is_contiguous(memory_format=torch.channels_last)
    assert {line.split()[0] for line in ops.kernels().splitlines()} <= set(cutlass_build.KINDS)


@buildable
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((matrix(6, 64), matrix(24, 32), values(6)), r"weight.size\(1\) == x.size\(1\).*got 32 and 64"),
        ((matrix(6, 60), matrix(24, 60), values(6)), r"in_features\) to be a positive multiple of 8, got 60"),
        ((matrix(6, 64), matrix(20, 64), values(6)), r"out_features\) to be a positive multiple of 8, got 20"),
        ((matrix(6, 64), matrix(24, 64), values(5)), r"expected 6 elements of reciprocal_n, got \(5\)"),
        ((matrix(6, 64), matrix(24, 64), values(6).half()), "expected reciprocal_n in float32, .* got Half"),
        ((matrix(6, 64, torch.float32), matrix(24, 64), values(6)), "x in bfloat16 or float16, got Float"),
        ((matrix(6, 64), matrix(24, 64, torch.float16), values(6)), "operands of one type.*weight in Half"),
        ((matrix(6, 128)[:, :64], matrix(24, 64), values(6)), "expected x contiguous"),
        ((images(1, 8, 6, 64), matrix(24, 64), values(6)), r"expected x of 2 dimensions, got \(1, 8, 6, 64\)"),
    ],
)
@both
def test_linear_refuses(ops, suffix, arguments, message):
    said = f"linear_forward{suffix}: expected .*{message.removeprefix('expected ')}"
    with pytest.raises(RuntimeError, match=said):
        op(ops, "linear_forward", suffix)(*arguments, None)


@buildable
@pytest.mark.parametrize(
    ("x", "weight", "window", "message"),
    [
        (images(2, 12, 9, 7), images(16, 12, 3, 3), (1, 1, 1, 1, 1, 1), r"in_channels\) to be a positive multiple"),
        (images(2, 8, 9, 7), images(12, 8, 3, 3), (1, 1, 1, 1, 1, 1), r"out_channels\) to be a positive multiple"),
        (images(2, 16, 9, 7), images(16, 8, 3, 3), (1, 1, 1, 1, 1, 1), "one group.*got 8 and 16"),
        (images(2, 8, 9, 7), images(16, 8, 3, 3), (1, 0, 1, 1, 1, 1), r"strides >= 1, got \(1, 0\)"),
        (images(2, 8, 9, 7), images(16, 8, 3, 3), (1, 1, -1, 1, 1, 1), r"padding >= 0, got \(-1, 1\)"),
        (images(2, 8, 9, 7), images(16, 8, 3, 3), (1, 1, 1, 1, 1, 0), r"dilation >= 1, got \(1, 0\)"),
        (images(2, 8, 2, 7), images(16, 8, 5, 3), (1, 1, 1, 1, 1, 1), "a window within the padded image"),
        (images(2, 8, 9, 7).contiguous(), images(16, 8, 3, 3), (1, 1, 1, 1, 1, 1), "x densely packed in channels"),
        (images(2, 8, 9, 7), images(16, 8, 3, 3).contiguous(), (1, 1, 1, 1, 1, 1), "weight densely packed"),
    ],
)
@both
def test_conv2d_refuses(ops, suffix, x, weight, window, message):
    with pytest.raises(RuntimeError, match=f"conv2d_forward{suffix}: expected .*{message}"):
        op(ops, "conv2d_forward", suffix)(x, weight, values(126), None, *window)
    with pytest.raises(RuntimeError, match=f"conv2d_backward_dx{suffix}: expected .*{message}"):
        op(ops, "conv2d_backward_dx", suffix)(images(2, 16, 9, 7), weight, x, values(126), *window)


@buildable
def test_conv2d_s_limits_are_the_architecture_s(ops):
    """What Hopper's tensor memory accelerator and what sm_80's loads address."""
    strided = images(2, 8, 9, 7), images(16, 8, 3, 3), values(2), None, 9, 9, 0, 0, 1, 1
    with pytest.raises(RuntimeError, match=r"strides from 1 to 8, got \(9, 9\)"):
        ops.conv2d_forward(*strided)
    assert ops.conv2d_forward_sm80(*strided).shape == (2, 16, 1, 1)
    wide = images(2, 8, 9, 40), images(16, 8, 1, 33), values(2 * 9 * 8), None, 1, 1, 0, 0, 1, 1
    assert ops.conv2d_forward(*wide).shape == (2, 16, 9, 8)
    with pytest.raises(RuntimeError, match=r"a window of up to 32 x 32, got weight \(16, 8, 1, 33\)"):
        ops.conv2d_forward_sm80(*wide)
    large = images(1, 512, 1024, 2048), images(8, 512, 1, 1), values(1, 1024, 2048), None, 1, 1, 0, 0, 1, 1
    assert ops.conv2d_forward(*large).shape == (1, 8, 1024, 2048)
    with pytest.raises(RuntimeError, match=r"tensors of less than 2\^31 bytes, got one of 2147483648"):
        ops.conv2d_forward_sm80(*large)


@buildable
@both
def test_linear_backward_dx_refuses(ops, suffix):
    x, weight, da = matrix(6, 64), matrix(24, 64), matrix(6, 24)
    backward_dx, name = op(ops, "linear_backward_dx", suffix), f"linear_backward_dx{suffix}"
    with pytest.raises(RuntimeError, match=rf"{name}: expected da \(6, 24\), got \(6, 32\)"):
        backward_dx(matrix(6, 32), weight, x, values(6))
    with pytest.raises(RuntimeError, match=f"{name}: expected all operands of one type.*da in Half"):
        backward_dx(matrix(6, 24, torch.float16), weight, x, values(6))
    with pytest.raises(RuntimeError, match=f"{name}: expected da contiguous"):
        backward_dx(matrix(24, 6).t(), weight, x, values(6))
    with pytest.raises(RuntimeError, match=rf"{name}: expected 6 elements of q, got \(24\)"):
        backward_dx(da, weight, x, values(24))
    with pytest.raises(RuntimeError, match=rf"{name}: .*out_features\) to be .* multiple of 8, got 20"):
        backward_dx(matrix(6, 20), matrix(20, 64), x, values(6))


@buildable
@both
def test_conv2d_backward_dx_refuses(ops, suffix):
    x, weight = images(2, 8, 9, 7), images(16, 8, 3, 3)
    backward_dx = op(ops, "conv2d_backward_dx", suffix)
    # for Hopper accepted by CUTLASS, and computed wrongly
    with pytest.raises(RuntimeError, match=rf"conv2d_backward_dx{suffix}: expected stride \(1, 1\).*got \(2, 2\)"):
        backward_dx(images(2, 16, 5, 4), weight, x, values(126), 2, 2, 1, 1, 1, 1)
    with pytest.raises(RuntimeError, match=r"expected da \(2, 16, 9, 7\), got \(2, 16, 9, 6\)"):
        backward_dx(images(2, 16, 9, 6), weight, x, values(126), 1, 1, 1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="expected 126 elements of q, got"):
        backward_dx(images(2, 16, 9, 7), weight, x, values(125), 1, 1, 1, 1, 1, 1)


# ---- what they compute, on a GPU ----

_capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
architectures = pytest.mark.parametrize(
    "suffix",
    [
        pytest.param("", marks=pytest.mark.skipif(_capability != (9, 0), reason="needs compute capability 9.0")),
        pytest.param("_sm80", marks=pytest.mark.skipif(_capability < (8, 0), reason="needs compute capability 8.0")),
    ],
)
TYPES = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the norm


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@buildable
@architectures
@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(256, 256, 256), (1, 8, 8), (1000, 1000, 72), (0, 8, 8), (4096, 1536, 384)])
def test_linear_on_gpu(ops, suffix, m, n, k, normalize, dtype):
    torch.manual_seed(0)
    x, weight = (torch.randn(rows, k, device="cuda", dtype=dtype) for rows in (m, n))
    reciprocal_n = 1 / x.double().norm(dim=1)
    reciprocal_weight_norm = 1 / weight.double().norm(dim=1) if normalize else None
    a = x.double() @ weight.double().T * (reciprocal_weight_norm if normalize else 1)
    given = reciprocal_weight_norm.float() if normalize else None
    made = [op(ops, "linear_forward", suffix)(x, weight, reciprocal_n.float(), given)]
    if not suffix:
        made.append(ops.linear_norm_forward(x, weight, given))
    for y in made:
        assert y.shape == (m, n)
        assert m == 0 or error(y, a * a.abs() * reciprocal_n[:, None]) < TYPES[dtype]
    da, q = torch.randn_like(made[0]), torch.randn(m, device="cuda")
    dx = op(ops, "linear_backward_dx", suffix)(da, weight, x, q)
    assert dx.shape == (m, k)
    assert m == 0 or error(dx, da.double() @ weight.double() + x.double() * q.double()[:, None]) < TYPES[dtype]


WINDOWS = [  # images, channels, outputs, height, width, window, stride, padding, dilation
    (2, 64, 64, 56, 56, 3, 1, 1, 1),
    (2, 64, 128, 28, 28, 3, 2, 1, 1),
    (1, 256, 64, 14, 14, 1, 1, 0, 1),
    (3, 8, 8, 9, 7, 3, 1, 0, 1),
    (2, 16, 24, 17, 13, 7, 2, 3, 1),
    (1, 72, 40, 20, 20, 3, 1, 2, 2),
    (1, 8, 8, 1, 1, 1, 1, 0, 1),
    (1, 128, 136, 16, 16, 1, 2, 0, 1),
]  # fmt: skip


@buildable
@architectures
@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_conv2d_on_gpu(ops, suffix, case, dtype):
    torch.manual_seed(0)
    n, c, o, h, w, size, stride, padding, dilation = case
    options = {"device": "cuda", "dtype": dtype}
    x = torch.randn(n, c, h, w, **options).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(o, c, size, size, **options).contiguous(memory_format=torch.channels_last)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    window = (stride, stride, padding, padding, dilation, dilation)
    a = F.conv2d(x.double(), weight.double(), **geometry)
    squares = x.double().square().sum(1, keepdim=True)
    norm = (F.conv2d(squares, squares.new_ones(1, 1, size, size), **geometry) + 1e-6).sqrt()
    y = op(ops, "conv2d_forward", suffix)(x, weight, (1 / norm).float(), None, *window)
    assert error(y, a * a.abs() / norm) < TYPES[dtype]
    reciprocal_weight_norm = 1 / weight.double().flatten(1).norm(dim=1)
    y = op(ops, "conv2d_forward", suffix)(x, weight, (1 / norm).float(), reciprocal_weight_norm.float(), *window)
    a = a * reciprocal_weight_norm[:, None, None]
    assert error(y, a * a.abs() / norm) < TYPES[dtype]
    if stride == 1:
        da = torch.randn_like(y)
        q = torch.randn(n, h, w, device="cuda")
        dx = op(ops, "conv2d_backward_dx", suffix)(da, weight, x, q, *window)
        expected = F.conv_transpose2d(da.double(), weight.double(), **geometry)
        assert error(dx, expected + x.double() * q[:, None]) < TYPES[dtype]
