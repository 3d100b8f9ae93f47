// B-cos linear layer, B = 2, for sm_80: one kernel from x and w to y.
//
// Math:     a = x w^T / |w|,  y = a |a| / n; 1/n and 1/|w| are given.
// Shapes:   x (M, K), w (N, K), y (M, N), bfloat16 or float16, rows contiguous; 1/n (M,), 1/|w| (N,) or null (1), float32.
//           K % 8 = N % 8 = 0, sizes below 2^31.
// Grid:     one program a tile of 128 rows x 128 outputs, four warps of 64 x 64 (mma.sync), three stages of 32 values of K
//           on their way to shared memory (cp.async).
// Numerics: accumulator, norms and scale in float32; y is rounded once.
// Traffic:  reads x and w, writes y; 2 M N K FLOPs.
#include "linear_sm80.h"

namespace bcos::fused {
namespace {

using LinearForwardKernel = sm80::LinearKernel<cutlass::layout::ColumnMajor, sm80::ScaledByNorms>;

std::string linear_forward(const LinearForward& p, const Place& place) {
  const auto tree = sm80::scaled_by_norms(p.y, p.n, p.reciprocal_n, p.reciprocal_weight_norm);
  return sm80::launch_linear<LinearForwardKernel>(
      tree, p.x, p.weight, /*ldb*/ p.k, p.m, /*columns*/ p.n, /*products*/ p.k, place);
}

}  // namespace

const Kernel<LinearForward> BCOS_KERNEL_NAME(linear_forward_sm80) =
    sm80::kernel_of<LinearForward, LinearForwardKernel>(linear_forward);

}  // namespace bcos::fused
