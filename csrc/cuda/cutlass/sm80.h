// What the kernels for sm_80 share: tiles, the epilogues as visitor trees of CUTLASS 2, and what went wrong in a launch.
#pragma once

// In this order: the visitors include nothing of what they use.
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include <cstdint>
#include <string>

#include "devices.h"
#include "functors.h"
#include "kernels.h"

namespace bcos::fused::sm80 {

using Tile = cutlass::gemm::GemmShape<128, 128, 32>;
using WarpTile = cutlass::gemm::GemmShape<64, 64, 32>;  // four warps
using Instruction = cutlass::gemm::GemmShape<16, 8, 16>;
// 48 KB of shared memory: two programs share a multiprocessor also where it has 100 KB (8.6, 8.9); registers allow two.
constexpr int kStages = 3;
constexpr int kEpilogueStages = 1;
// Neighbouring programs take neighbouring tiles of outputs, 8 wide, so that the rows that they share stay in the cache.
using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>;

namespace visitors = cutlass::epilogue::threadblock;

// Which elements of a tile a thread holds in the epilogue.
using Threads = visitors::OutputTileThreadLayout<Tile, WarpTile, Element, kAlignment, kEpilogueStages>;
using RowMajor = cute::Stride<int64_t, cute::_1, cute::_0>;
using PerRow =
    visitors::VisitorColBroadcast<Threads, float, cute::Stride<cute::_1, cute::_0, cute::_0>, /*or a default*/ false>;
using PerColumn = visitors::VisitorRowBroadcast<Threads, float, cute::Stride<cute::_0, cute::_1, cute::_0>>;

template <template <class> class Function, class... Inputs>
using Stored = visitors::Sm80EVT<
    visitors::VisitorAuxStore<Threads, Element, kRounding, RowMajor>,
    visitors::Sm80EVT<visitors::VisitorCompute<Function, Element, float, kRounding>, Inputs...>>;

using ScaledByNorms = Stored<BcosScale, visitors::VisitorAccFetch, PerRow, PerColumn>;

inline ScaledByNorms::Arguments scaled_by_norms(
    void* y, int64_t columns, const float* reciprocal_n, const float* reciprocal_weight_norm) {
  return {{{}, {reciprocal_n}, {reciprocal_weight_norm, 1.f}, {}}, {static_cast<Element*>(y), {columns, {}, {}}}};
}

// accumulator + x q with q per row.
using PlusScaledSource = Stored<
    cutlass::homogeneous_multiply_add, PerRow, visitors::VisitorAuxLoad<Threads, Element, RowMajor>,
    visitors::VisitorAccFetch>;

inline PlusScaledSource::Arguments plus_scaled_source(void* dx, int64_t columns, const void* x, const float* q) {
  Element* source = static_cast<Element*>(const_cast<void*>(x));  // CUTLASS loads through a pointer to non-const
  const RowMajor rows{columns, {}, {}};
  return {{{q}, {source, Element(0), rows}, {}, {}}, {static_cast<Element*>(dx), rows}};
}

// Of a kernel that CUTLASS has enqueued, or not.
inline std::string said(cutlass::Status status) {
  if (status == cutlass::Status::kSuccess) return {};
  return std::string("the launch failed: ") + cutlass::cutlassGetStatusString(status);
}

template <class Problem, class Device>
constexpr Kernel<Problem> kernel_of(std::string (*launcher)(const Problem&, const Place&)) {
  return {
      launcher, static_cast<int32_t>(Device::kThreadCount), kStages,
      static_cast<int32_t>(sizeof(typename Device::SharedStorage))};
}

}  // namespace bcos::fused::sm80
