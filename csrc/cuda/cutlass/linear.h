// What the linear layers share: tiles, CUTLASS's collectives, and arguments.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

#include "epilogue.h"
#include "kernels.h"

namespace bcos::fused {

using LinearTile = cute::Shape<cute::_128, cute::_128, cute::_64>;
using LinearCluster = cute::Shape<cute::_2, cute::_1, cute::_1>;

// Source: the type of the matrix that the tree fetches, void for none.
template <class Source, class Tree>
using LinearEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, LinearTile, LinearCluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float,
    Source, cutlass::layout::RowMajor, kAlignment, Element, cutlass::layout::RowMajor, kAlignment,
    cutlass::epilogue::TmaWarpSpecializedCooperative, Tree>::CollectiveOp;

// LayoutOfB: of the weight as CUTLASS's B, a matrix of (products, outputs).
template <class LayoutOfB, class Epilogue>
using LinearMainLoop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp,
    Element, cutlass::layout::RowMajor, kAlignment, Element, LayoutOfB, kAlignment, float,
    LinearTile, LinearCluster,
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;

template <class MainLoop, class Epilogue>
using LinearKernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, MainLoop, Epilogue>;

// out (m, n) = left (m, k) times weight, but for the epilogue's tree and source.
template <class Operator>
typename Operator::Arguments linear_arguments(
    void* out, const void* left, const void* weight, int64_t rows, int64_t columns, int64_t products) {
  using Device = typename Operator::GemmKernel;
  const int m = static_cast<int>(rows), n = static_cast<int>(columns), k = static_cast<int>(products);
  typename Operator::Arguments arguments{};
  arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  arguments.problem_shape = cute::make_shape(m, n, k, 1);
  arguments.mainloop.ptr_A = static_cast<const Element*>(left);
  arguments.mainloop.dA = cutlass::make_cute_packed_stride(typename Device::StrideA{}, cute::make_shape(m, k, 1));
  arguments.mainloop.ptr_B = static_cast<const Element*>(weight);
  arguments.mainloop.dB = cutlass::make_cute_packed_stride(typename Device::StrideB{}, cute::make_shape(n, k, 1));
  arguments.epilogue.ptr_D = static_cast<Element*>(out);
  arguments.epilogue.dD = cutlass::make_cute_packed_stride(typename Device::StrideD{}, cute::make_shape(m, n, 1));
  return arguments;
}

}  // namespace bcos::fused
