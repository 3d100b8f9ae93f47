// Gradient of a B-cos linear layer's input for Hopper: one kernel, the norm's part added on the way out.
//
// Math:     dx = da w + x q,  q = (dL/dn)/n of every row. Where weights are normalised, w is w/|w|. Without q (explanation
//           mode) there is nothing to fuse: that is the library's.
// Shapes:   da (M, N), w (N, K), x and dx (M, K), bfloat16 or float16, rows contiguous; q (M,) float32. K % 8 = N % 8 = 0,
//           sizes below 2^31.
// Grid:     persistent, clusters of two programs; a program takes tiles of 128 rows x 128 inputs, reduced over N, 64
//           outputs at a time, one warp group loading (TMA; the tile of w is multicast to the cluster and transposed by
//           WGMMA's descriptor), two multiplying (WGMMA, 64 rows each). The tile of x is loaded while products run.
// Numerics: accumulator, q and sum in float32; dx is rounded once.
// Traffic:  reads da, w and x, writes dx; 2 M N K FLOPs.
#include "launch.h"

#include "linear.h"

namespace bcos::fused {
namespace {

using Epilogue = LinearEpilogue<Element, PlusScaledSource<LinearTile>>;
using MainLoop = LinearMainLoop<cutlass::layout::RowMajor, Epilogue>;
using LinearBackwardDxKernel = LinearKernel<MainLoop, Epilogue>;
using Operator = cutlass::gemm::device::GemmUniversalAdapter<LinearBackwardDxKernel>;

std::string linear_backward_dx(const LinearBackwardDx& p, const Place& place) {
  auto arguments = linear_arguments<Operator>(p.dx, p.da, p.weight, p.m, /*columns*/ p.k, /*products*/ p.n);
  arguments.epilogue.thread = plus_scaled_source<LinearTile>(p.q);
  arguments.epilogue.ptr_C = static_cast<const Element*>(p.x);
  arguments.epilogue.dC = arguments.epilogue.dD;
  return launch<Operator>(arguments, place);
}

}  // namespace

const Kernel<LinearBackwardDx> BCOS_KERNEL_NAME(linear_backward_dx) =
    kernel_of<LinearBackwardDx, LinearBackwardDxKernel>(linear_backward_dx);

}  // namespace bcos::fused
