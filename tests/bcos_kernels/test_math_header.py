"""csrc/math.h, compiled by the C++ compiler alone, against the formulas in float64."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.bcos_kernels.harness import find_compiler, has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here")

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = "-O3 -std=c++17 -shared -fPIC -fno-math-errno -fno-trapping-math -ffp-contract=fast -fopenmp-simd".split()
VARIANTS = {
    "plain": [],
    # as the kernels include it: a namespace per instruction set, and multiplications fused into additions
    "avx2": ["-DBCOS_ISA=avx2", "-mavx2", "-mfma"],
}

SOURCE = """
#include "math.h"
#define FOR_TYPE(T, NAME)                                                                                            \\
  extern "C" void power_##NAME(const T* c, const T* e, T* y, int n) {                                                \\
    for (int i = 0; i < n; i++) y[i] = bcos::cosine_power(c[i], e[i]);                                               \\
  }                                                                                                                  \\
  extern "C" void logarithm_##NAME(const T* c, T* y, int n) {                                                        \\
    for (int i = 0; i < n; i++) y[i] = bcos::natural_logarithm(c[i]);                                                \\
  }                                                                                                                  \\
  extern "C" void output_b2_##NAME(const T* a, const T* r, T* y, int n) {                                            \\
    for (int i = 0; i < n; i++) y[i] = bcos::output_b2(a[i], r[i]);                                                  \\
  }                                                                                                                  \\
  extern "C" void output_general_##NAME(const T* a, const T* r, const T* e, T* y, int n) {                           \\
    for (int i = 0; i < n; i++) y[i] = bcos::output_general(a[i], r[i], e[i]);                                       \\
  }                                                                                                                  \\
  extern "C" void from_y_##NAME(const T* g, const T* y, const T* r, bool detach, T* da, T* dn, int n) {              \\
    for (int i = 0; i < n; i++) {                                                                                    \\
      const auto t = bcos::gradients_b2_from_y(g[i], y[i], r[i], detach);                                            \\
      da[i] = t.da, dn[i] = t.dn;                                                                                    \\
    }                                                                                                                \\
  }                                                                                                                  \\
  extern "C" void from_a_##NAME(const T* g, const T* a, const T* r, bool detach, T* da, T* dn, int n) {              \\
    for (int i = 0; i < n; i++) {                                                                                    \\
      const auto t = bcos::gradients_b2_from_a(g[i], a[i], r[i], detach);                                            \\
      da[i] = t.da, dn[i] = t.dn;                                                                                    \\
    }                                                                                                                \\
  }                                                                                                                  \\
  extern "C" void general_##NAME(                                                                                    \\
      const T* g, const T* a, const T* r, const T* e, bool detach, T* da, T* dn, T* db, int n) {                     \\
    for (int i = 0; i < n; i++) {                                                                                    \\
      const auto t = bcos::gradients_general(g[i], a[i], r[i], e[i], detach);                                        \\
      da[i] = t.da, dn[i] = t.dn, db[i] = t.db;                                                                      \\
    }                                                                                                                \\
  }
FOR_TYPE(float, float32)
FOR_TYPE(double, float64)
"""


def _runs_here(variant: str) -> bool:
    return variant == "plain" or torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(v, marks=pytest.mark.skipif(not _runs_here(v), reason=f"{platform.machine()} does not run it"))
        for v in VARIANTS
    ],
)
def library(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("math")
    (folder / "math_test.cpp").write_text(SOURCE)
    command = [*find_compiler(), *FLAGS, *VARIANTS[request.param], "-Wall", "-Wextra", "-Werror", "-iquote", str(CSRC)]
    built = subprocess.run(
        [*command, str(folder / "math_test.cpp"), "-o", str(folder / "math_test.so")], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(folder / "math_test.so"))


def _call(library, name: str, dtype, arguments, outputs: int) -> list[np.ndarray]:
    """Arrays by pointer, flags as they are; the outputs follow, then the count."""
    arrays = [np.ascontiguousarray(v, dtype=dtype) if isinstance(v, np.ndarray) else v for v in arguments]
    count = next(v.size for v in arrays if isinstance(v, np.ndarray))
    results = [np.empty(count, dtype=dtype) for _ in range(outputs)]
    passed = [
        v.ctypes.data_as(ctypes.c_void_p) if isinstance(v, np.ndarray) else ctypes.c_bool(v)
        for v in (*arrays, *results)
    ]
    getattr(library, f"{name}_{np.dtype(dtype).name}")(*passed, ctypes.c_int(count))
    return results


def _grid(dtype, *axes) -> list[np.ndarray]:
    """Every combination of the axes' values, as ``dtype`` rounds them."""
    return [g.ravel() for g in np.meshgrid(*(np.array(axis, dtype=dtype) for axis in axes), indexing="ij")]


TINY = {np.float32: [1e-45, 1e-40, 1.2e-38], np.float64: [5e-324, 1e-310, 2.3e-308]}
MAGNITUDES = [0.0, 1e-30, 1e-20, 1e-9, 1e-6, 3e-4, 0.01, 0.3, 0.5, 0.999999, 1.0, 1.5, 2.0, 3.7, 11.0, 100.0, 1e4, 7e6]
NORMS = [1e-12, 1e-6, 1e-3, 0.02, 0.7, 1.0, 3.0, 40.0, 1e4, 6e7]
EXPONENTS = [0.0, 0.01, 0.25, 0.5, 0.7, 1.0, 1.3, 2.0, 3.0, 4.1, 9.0]  # B − 1
DTYPES = [np.float32, np.float64]


def _signed(dtype) -> list[float]:
    magnitudes = [*MAGNITUDES, *TINY[dtype]]
    return [*magnitudes, *(-m for m in magnitudes)]


def _check(got: np.ndarray, expected: np.ndarray, ulps, dtype) -> None:
    """Within ``ulps`` units of relative error (or of the smallest normal number, as denormals may be flushed); what is
    beyond the largest number is infinite, and at that border either is right."""
    info = np.finfo(dtype)
    limit = float(info.max)
    assert not np.isnan(got).any()
    assert np.isinf(got[np.abs(expected) > limit * (1 + 1e-4)]).all()
    inside = np.abs(expected) < limit * (1 - 1e-4)
    error = np.abs(got[inside].astype(np.float64) - expected[inside])
    allowed = (np.broadcast_to(ulps, expected.shape) * info.eps * np.abs(expected))[inside] + 2 * float(info.tiny)
    worst = np.argmax(error / allowed)
    assert (error <= allowed).all(), f"{got[inside][worst]}, not {expected[inside][worst]}: {(error / allowed)[worst]}"


def _power(c: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.power(c.astype(np.float64), exponent.astype(np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_power_and_logarithm(library, dtype):
    values = np.concatenate([np.geomspace(1e-6, 1e19, 4001), 1 + np.linspace(-1e-3, 1e-3, 2001), [1.0, 2.0, 0.5, 3e38]])
    c, exponent = _grid(dtype, values, EXPONENTS)
    (got,) = _call(library, "power", dtype, (c, exponent), 1)
    _check(got, _power(c, exponent), 2.5 + exponent.astype(np.float64), dtype)
    (got,) = _call(library, "logarithm", dtype, (c,), 1)
    _check(got, np.log(c.astype(np.float64)), 3, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_power_of_what_is_not_finite(library, dtype):
    exponent = np.array([0.5, 1.0, 2.0, 9.0], dtype)
    (got,) = _call(library, "power", dtype, (np.full(4, np.inf, dtype), exponent), 1)
    assert (got == np.inf).all()
    (got,) = _call(library, "power", dtype, (np.full(4, np.nan, dtype), exponent), 1)
    assert np.isnan(got).all()
    (got,) = _call(library, "power", dtype, (np.array([np.inf, 1e-6, 1.0, 3e38], dtype), np.zeros(4, dtype)), 1)
    assert (got == 1).all()
    (got,) = _call(library, "logarithm", dtype, (np.array([np.inf, np.nan], dtype),), 1)
    assert got[0] == np.inf and np.isnan(got[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs(library, dtype):
    a, n, exponent = _grid(dtype, _signed(dtype), NORMS, EXPONENTS)
    reciprocal = (1 / n).astype(dtype)
    wide_a, ratio = a.astype(np.float64), np.abs(a.astype(np.float64)) * reciprocal.astype(np.float64)
    (got,) = _call(library, "output_b2", dtype, (a, reciprocal), 1)
    _check(got, wide_a * ratio, 2, dtype)
    (got,) = _call(library, "output_general", dtype, (a, reciprocal, exponent), 1)
    # an ulp of c is (B − 1) ulps of its power, and there are two of them
    with np.errstate(all="ignore"):
        _check(got, wide_a * _power(ratio + 1e-6, exponent), 4 + 3 * exponent.astype(np.float64), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("detach", [False, True])
def test_gradients(library, dtype, detach):
    a, n, exponent, g = _grid(dtype, _signed(dtype), NORMS, EXPONENTS, [-1.3, 0.0, 2.0])
    reciprocal = (1 / n).astype(dtype)
    wide_g, wide_a, wide_r = (v.astype(np.float64) for v in (g, a, reciprocal))
    ratio, factor = np.abs(wide_a) * wide_r, 1 if detach else 2

    da, dn = _call(library, "from_a", dtype, (g, a, reciprocal, detach), 2)
    _check(da, factor * wide_g * ratio, 2, dtype)
    _check(dn, -wide_g * wide_a * ratio, 3, dtype)

    # the same from y, where y has not lost its bits to underflow
    y = (wide_a * ratio).astype(dtype)
    kept = (np.abs(y) >= np.finfo(dtype).tiny) | (a == 0)
    da, dn = _call(library, "from_y", dtype, (g[kept], y[kept], reciprocal[kept], detach), 2)
    _check(da, (factor * wide_g * ratio)[kept], 4, dtype)
    _check(dn, -(wide_g * wide_a * ratio)[kept], 3, dtype)

    da, dn, db = _call(library, "general", dtype, (g, a, reciprocal, exponent, detach), 3)
    e = exponent.astype(np.float64)
    with np.errstate(all="ignore"):
        scale, slope = _power(ratio + 1e-6, e), e * _power(ratio + 1e-6, e - 1) * ratio
        logarithm = np.log(ratio + 1e-6)
    # infinite scales times a zero gradient are no number, there as here
    kept = (scale + slope) * np.maximum(1, np.abs(wide_a)) < np.finfo(dtype).max / 100
    assert kept.mean() > 0.8
    da, dn, db, g, a, e, scale, slope, logarithm = (
        v[kept] for v in (da, dn, db, wide_g, wide_a, e, scale, slope, logarithm)
    )
    ulps = 8 + 3 * e
    if detach:
        _check(da, g * scale, ulps, dtype)
        assert not dn.any() and not db.any()
        return
    _check(da, g * (scale + slope), ulps, dtype)
    _check(dn, -g * a * slope, ulps, dtype)
    # near c = 1 an ulp of c is an ulp of 1 in its logarithm
    _check(db, g * a * scale * logarithm, ulps + 2 / np.maximum(np.abs(logarithm), 1e-9), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan(library, dtype):
    nan, one = np.array([np.nan], dtype), np.array([1.0], dtype)
    half = np.array([0.5], dtype)
    for a, r in ((nan, one), (one, nan), (nan, nan)):
        assert np.isnan(_call(library, "output_b2", dtype, (a, r), 1)[0]).all()
        assert np.isnan(_call(library, "output_general", dtype, (a, r, half), 1)[0]).all()
        for detach in (False, True):
            assert np.isnan(_call(library, "from_a", dtype, (one, a, r, detach), 2)[0]).all()
            assert np.isnan(_call(library, "from_y", dtype, (one, a, r, detach), 2)[0]).all()
            assert np.isnan(_call(library, "general", dtype, (one, a, r, half, detach), 3)[0]).all()
    for name, more in (("from_a", ()), ("from_y", ()), ("general", (half,))):
        outputs = _call(library, name, dtype, (nan, one, one, *more, False), 3 if more else 2)
        assert all(np.isnan(v).all() for v in outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_outputs(library, dtype):
    """An overflowed product stays infinite, with its sign."""
    a, r = np.array([np.inf, -np.inf], dtype), np.array([0.5, 0.5], dtype)
    assert (_call(library, "output_b2", dtype, (a, r), 1)[0] == a).all()
    for b in EXPONENTS:
        assert (_call(library, "output_general", dtype, (a, r, np.full(2, b, dtype)), 1)[0] == a).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero(library, dtype):
    """A zero pre-scale output gives 0 and finite gradients, at any norm."""
    a, n, exponent = _grid(dtype, [0.0, -0.0], NORMS, EXPONENTS)
    g, r = np.ones_like(a), (1 / n).astype(dtype)
    assert not _call(library, "output_b2", dtype, (a, r), 1)[0].any()
    assert not _call(library, "output_general", dtype, (a, r, exponent), 1)[0].any()
    for name in ("from_a", "from_y"):
        assert not any(v.any() for v in _call(library, name, dtype, (g, a, r, False), 2))
    da, dn, db = _call(library, "general", dtype, (g, a, r, exponent, False), 3)
    _check(da, _power(np.full_like(a, 1e-6), exponent), 4 + 2 * exponent.astype(np.float64), dtype)
    assert not dn.any() and not db.any()
