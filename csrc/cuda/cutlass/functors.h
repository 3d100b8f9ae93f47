// What kernels of every architecture share on the device: the element type of a translation unit and the epilogues'
// elementwise mathematics.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/functional.h>
#include <cutlass/numeric_conversion.h>
#include <cutlass/numeric_types.h>

#include "../../math.h"

// One element type a translation unit.
#if defined(BCOS_FLOAT16)
#define BCOS_KERNEL_NAME(stem) stem##_float16
#else
#define BCOS_KERNEL_NAME(stem) stem##_bfloat16
#endif

namespace bcos::fused {

#if defined(BCOS_FLOAT16)
using Element = cutlass::half_t;
#else
using Element = cutlass::bfloat16_t;
#endif
constexpr int kAlignment = 8;  // elements in 16 bytes, which is what copies to shared memory move
constexpr auto kRounding = cutlass::FloatRoundStyle::round_to_nearest;

// y = a |a| / n with a = accumulator / |w|, all three factors in one functor: nothing is rounded in between.
template <class Fragment>
struct BcosScale {
  CUTLASS_HOST_DEVICE Fragment operator()(
      const Fragment& accumulator, const Fragment& reciprocal_n, const Fragment& reciprocal_weight_norm) const {
    Fragment y;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Fragment::kElements; i++) {
      y[i] = output_b2(accumulator[i] * reciprocal_weight_norm[i], reciprocal_n[i]);
    }
    return y;
  }
};

}  // namespace bcos::fused
