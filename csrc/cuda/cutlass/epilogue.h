// The epilogues for Hopper: what happens to an accumulator on its way out, as CUTLASS visitor trees.
#pragma once

#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>

#include "functors.h"

namespace bcos::fused {

namespace fusion = cutlass::epilogue::fusion;

template <class Tile>
using PerRow = fusion::Sm90ColBroadcast<0, Tile, float, float>;
template <class Tile>
using PerColumn = fusion::Sm90RowBroadcast<0, Tile, float, float>;

template <class Tile>
using ScaledByNorms = fusion::Sm90EVT<
    fusion::Sm90Compute<BcosScale, Element, float, kRounding>,
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
    fusion::Sm90Compute<cutlass::homogeneous_multiply_add, Element, float, kRounding>,
    PerRow<Tile>, fusion::Sm90SrcFetch<Element>, fusion::Sm90AccFetch>;

template <class Tile>
typename PlusScaledSource<Tile>::Arguments plus_scaled_source(const float* q) {
  return {{q}, {}, {}, {}};
}

}  // namespace bcos::fused
