// Element types of the kernels and 16-byte packs of them; how a kernel is launched.
//
// Without nvcc this includes an emulation of the few things of CUDA that the kernels use (threads, barriers, shuffles),
// which the tests compile them with: they then run on a CPU, slowly, with the same indices.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define BCOS_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#include "emulation.h"
#endif

#include "../math.h"
#include "kernels.h"

namespace bcos::cuda {

struct BFloat16 {
  uint16_t bits;
};
#if defined(__CUDACC__)
using Half = __half;
#else
using Half = _Float16;
#endif

__device__ inline float load(float v) { return v; }
__device__ inline float load(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
__device__ inline float load(Half v) {
#if defined(__CUDACC__)
  return __half2float(v);
#else
  return static_cast<float>(v);
#endif
}

template <class S>
__device__ inline S store(float v) {
  if constexpr (std::is_same_v<S, BFloat16>) {
#if defined(__CUDACC__)
    const __nv_bfloat16 rounded = __float2bfloat16_rn(v);
    BFloat16 result;
    std::memcpy(&result, &rounded, 2);
    return result;
#else
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(v == v ? rounded : 0x7fffu)};
#endif
  } else if constexpr (std::is_same_v<S, Half>) {
#if defined(__CUDACC__)
    return __float2half_rn(v);
#else
    return static_cast<Half>(v);
#endif
  } else {
    return v;
  }
}

template <class S, int V>
struct alignas(sizeof(S) * V) Pack {
  S of[V];
};

#if defined(__CUDACC__)
#define BCOS_COUNT(direction, p, bytes)
#else
#define BCOS_COUNT(direction, p, bytes) emulation::count(&emulation::machine().direction, p, bytes)
#endif

template <int V, class S>
__device__ inline Pack<S, V> read(const S* p) {
  BCOS_COUNT(bytes_read, p, sizeof(S) * V);
  return *reinterpret_cast<const Pack<S, V>*>(p);
}
template <int V, class S>
__device__ inline void write(S* p, const Pack<S, V>& pack) {
  BCOS_COUNT(bytes_written, p, sizeof(S) * V);
  *reinterpret_cast<Pack<S, V>*>(p) = pack;
}

// Elements that one access can take, 16 bytes at most: `count` and every pointer given have to be multiples of it.
inline int vector_width(int64_t element_bytes, int64_t count, std::initializer_list<const void*> pointers) {
  uintptr_t low = static_cast<uintptr_t>(count * element_bytes) | 16;
  for (const void* p : pointers) low |= reinterpret_cast<uintptr_t>(p);
  const int64_t bytes = static_cast<int64_t>(low & (~low + 1));  // the largest power of two that divides them all
  return bytes <= element_bytes ? 1 : static_cast<int>(bytes / element_bytes);
}

}  // namespace bcos::cuda

// One instantiation for every element type and vector width (1, or that of 16 bytes): S and V inside.
#define BCOS_FOR_WIDTH(T, width, ...)        \
  {                                          \
    using S = T;                             \
    if ((width) * sizeof(S) == 16) {         \
      constexpr int V = 16 / sizeof(S);      \
      __VA_ARGS__;                           \
    } else {                                 \
      constexpr int V = 1;                   \
      __VA_ARGS__;                           \
    }                                        \
  }
#define BCOS_FOR_TYPE(type, width, ...)                                       \
  switch (type) {                                                             \
    case Type::float32: BCOS_FOR_WIDTH(float, width, __VA_ARGS__) break;      \
    case Type::bfloat16: BCOS_FOR_WIDTH(BFloat16, width, __VA_ARGS__) break;  \
    case Type::float16: BCOS_FOR_WIDTH(Half, width, __VA_ARGS__) break;       \
  }
