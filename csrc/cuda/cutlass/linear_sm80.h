// What the linear layers for sm_80 share: CUTLASS's product with a visitor tree behind it, and its launch.
#pragma once

#include "sm80.h"

#include <cutlass/gemm/device/gemm_universal_adapter.h>

namespace bcos::fused::sm80 {

// LayoutOfB: of the weight as CUTLASS's B, a matrix of (products, outputs).
template <class LayoutOfB, class Tree>
using LinearKernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
    Element, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, kAlignment,
    Element, LayoutOfB, cutlass::ComplexTransform::kNone, kAlignment,
    Element, cutlass::layout::RowMajor, kAlignment, float, float,
    cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Tile, WarpTile, Instruction, Tree, Swizzle, kStages,
    cutlass::arch::OpMultiplyAdd, kEpilogueStages>::GemmKernel;

// out (rows, columns), which the tree stores, of left (rows, products) and the weight, whose rows are ldb values apart.
template <class Device, class Tree>
std::string launch_linear(
    const Tree& tree, const void* left, const void* weight, int64_t ldb, int64_t rows, int64_t columns, int64_t products,
    const Place& place) {
  const std::string wrong = wrong_device(place.device, 8, /*or_newer*/ true);
  if (!wrong.empty()) return wrong;
  using Operator = cutlass::gemm::device::GemmUniversalAdapter<Device>;
  const cutlass::gemm::GemmCoord size(static_cast<int>(rows), static_cast<int>(columns), static_cast<int>(products));
  // C, D and the strides of batches are nobody's: the tree loads and stores, and there is one batch
  typename Operator::Arguments arguments(
      cutlass::gemm::GemmUniversalMode::kGemm, size, /*batch_count*/ 1, tree, left, weight, /*C*/ nullptr, /*D*/ nullptr,
      /*batch strides*/ 0, 0, 0, 0, /*lda*/ products, ldb, /*ldc*/ columns, /*ldd*/ columns);
  if (Operator::can_implement(arguments) != cutlass::Status::kSuccess) {
    return "expected fewer than 2^23 outputs";
  }
  Operator op;
  const auto stream = static_cast<cudaStream_t>(place.stream);
  const cutlass::Status status = op.initialize(arguments, /*workspace*/ nullptr, stream);
  return said(status == cutlass::Status::kSuccess ? op.run(stream) : status);
}

}  // namespace bcos::fused::sm80
