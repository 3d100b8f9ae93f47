// Which instruction set of the ones compiled in this machine can run: one rule for the op library, which picks its
// kernels by it, and for module.cpp, which reports it. Header only, free of torch and Python.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace bcos {

enum class Capability : int { baseline = 0, avx2 = 1, avx512 = 2 };

struct CpuFeatures {
  bool avx2 = false, fma = false, f16c = false;
  bool avx512f = false, avx512bw = false, avx512vl = false, avx512dq = false;
};

// What the processor and the operating system (which has to save the wide registers) support.
inline CpuFeatures cpu_features() {
  CpuFeatures f;
#if defined(__x86_64__)
  __builtin_cpu_init();
  f.avx2 = __builtin_cpu_supports("avx2");
  f.fma = __builtin_cpu_supports("fma");
  f.avx512f = __builtin_cpu_supports("avx512f");
  f.avx512bw = __builtin_cpu_supports("avx512bw");
  f.avx512vl = __builtin_cpu_supports("avx512vl");
  f.avx512dq = __builtin_cpu_supports("avx512dq");
  // Older compilers do not know the name "f16c": leaf 1, ECX bit 29. Its registers are AVX's, so avx2 settles the
  // operating system's side.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx)) f.f16c = f.avx2 && ((ecx >> 29) & 1u);
#endif
  return f;
}

// The best set that this machine runs and that was compiled in (BCOS_HAVE_AVX2, BCOS_HAVE_AVX512). The environment
// variable BCOS_CPU_CAPABILITY=baseline|avx2 lowers it, for tests and for comparing; it never raises it.
inline Capability cpu_capability() {
  const CpuFeatures f = cpu_features();
  Capability best = Capability::baseline;
  const bool has_avx2 = f.avx2 && f.fma && f.f16c;
  const bool has_avx512 = has_avx2 && f.avx512f && f.avx512bw && f.avx512vl && f.avx512dq;
#if defined(BCOS_HAVE_AVX2)
  if (has_avx2) best = Capability::avx2;
#endif
#if defined(BCOS_HAVE_AVX512)
  if (has_avx512) best = Capability::avx512;
#endif
  (void)has_avx2;
  (void)has_avx512;
  if (const char* cap = std::getenv("BCOS_CPU_CAPABILITY")) {
    if (std::strcmp(cap, "baseline") == 0) best = Capability::baseline;
    if (std::strcmp(cap, "avx2") == 0 && best == Capability::avx512) best = Capability::avx2;
  }
  return best;
}

inline bool is_amd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

inline const char* name(Capability capability) {
  switch (capability) {
    case Capability::avx512: return "avx512";
    case Capability::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace bcos
