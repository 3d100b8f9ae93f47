// The epilogues: what happens to an accumulator on its way out, as CUTLASS visitor trees.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/functional.h>
#include <cutlass/numeric_types.h>

#include "../../math.h"

// One element type a translation unit.
#if defined(BCOS_FLOAT16)
#define BCOS_KERNEL_NAME(stem) stem##_float16
#else
#define BCOS_KERNEL_NAME(stem) stem##_bfloat16
#endif

namespace bcos::hopper {

#if defined(BCOS_FLOAT16)
using Element = cutlass::half_t;
#else
using Element = cutlass::bfloat16_t;
#endif
constexpr int kAlignment = 8;  // elements in the 16 bytes that the tensor memory accelerator moves

namespace fusion = cutlass::epilogue::fusion;

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

template <class Tile>
using PerRow = fusion::Sm90ColBroadcast<0, Tile, float, float>;
template <class Tile>
using PerColumn = fusion::Sm90RowBroadcast<0, Tile, float, float>;

template <class Tile>
using ScaledByNorms = fusion::Sm90EVT<
    fusion::Sm90Compute<BcosScale, Element, float, cutlass::FloatRoundStyle::round_to_nearest>,
    fusion::Sm90AccFetch,
    PerRow<Tile>,
    PerColumn<Tile>>;

template <class Tile>
typename ScaledByNorms<Tile>::Arguments scaled_by_norms(const float* reciprocal_n, const float* reciprocal_weight_norm) {
  return {{}, {reciprocal_n}, {reciprocal_weight_norm, 1.f}, {}};
}

// accumulator + x q with q per row, x fetched as the source.
template <class Tile>
using PlusScaledSource = fusion::Sm90EVT<
    fusion::Sm90Compute<cutlass::homogeneous_multiply_add, Element, float, cutlass::FloatRoundStyle::round_to_nearest>,
    PerRow<Tile>, fusion::Sm90SrcFetch<Element>, fusion::Sm90AccFetch>;

template <class Tile>
typename PlusScaledSource<Tile>::Arguments plus_scaled_source(const float* q) {
  return {{q}, {}, {}, {}};
}

}  // namespace bcos::hopper
