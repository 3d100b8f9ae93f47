// Element types of the kernels: how a stored value becomes the float or double that is computed with, and back.
// Included by *_kernels.cpp only, inside one instruction set's namespace.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../math.h"
#include "kernels.h"

namespace bcos::cpu::BCOS_ISA {

struct BFloat16 {
  uint16_t bits;
};
using Half = _Float16;

template <class S>
struct Statistics {
  using type = float;
};
template <>
struct Statistics<double> {
  using type = double;
};
template <class S>
using Wide = typename Statistics<S>::type;

inline float load(float v) { return v; }
inline double load(double v) { return v; }
inline float load(Half v) { return static_cast<float>(v); }
inline float load(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

template <class S>
inline S store(Wide<S> v) {
  if constexpr (std::is_same_v<S, BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    return {static_cast<uint16_t>(v == v ? rounded : 0x7fc0u)};
  } else {
    return static_cast<S>(v);
  }
}

}  // namespace bcos::cpu::BCOS_ISA

// One entry of the table for every element type.
#define BCOS_FOR_TYPE(type, S, ...)                       \
  switch (type) {                                         \
    case Type::float32: { using S = float; __VA_ARGS__; } break;    \
    case Type::float64: { using S = double; __VA_ARGS__; } break;   \
    case Type::bfloat16: { using S = BFloat16; __VA_ARGS__; } break; \
    case Type::float16: { using S = Half; __VA_ARGS__; } break;     \
  }
