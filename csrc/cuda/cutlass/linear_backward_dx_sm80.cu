// Gradient of a B-cos linear layer's input for sm_80: one kernel, the norm's part added on the way out.
//
// Math:     dx = da w + x q,  q = (dL/dn)/n of every row. Where weights are normalised, w is w/|w|. Without q (explanation
//           mode) there is nothing to fuse: that is the library's.
// Shapes:   da (M, N), w (N, K), x and dx (M, K), bfloat16 or float16, rows contiguous; q (M,) float32. K % 8 = N % 8 = 0,
//           sizes below 2^31.
// Grid:     as linear_forward_sm80.cu, tiles of 128 rows x 128 inputs, reduced over N.
// Numerics: accumulator, q and sum in float32; dx is rounded once.
// Traffic:  reads da, w and x, writes dx; 2 M N K FLOPs.
#include "linear_sm80.h"

namespace bcos::fused {
namespace {

using LinearBackwardDxKernel = sm80::LinearKernel<cutlass::layout::RowMajor, sm80::PlusScaledSource>;

std::string linear_backward_dx(const LinearBackwardDx& p, const Place& place) {
  const auto tree = sm80::plus_scaled_source(p.dx, p.k, p.x, p.q);
  return sm80::launch_linear<LinearBackwardDxKernel>(
      tree, p.da, p.weight, /*ldb*/ p.k, p.m, /*columns*/ p.k, /*products*/ p.n, place);
}

}  // namespace

const Kernel<LinearBackwardDx> BCOS_KERNEL_NAME(linear_backward_dx_sm80) =
    sm80::kernel_of<LinearBackwardDx, LinearBackwardDxKernel>(linear_backward_dx);

}  // namespace bcos::fused
