// B-cos linear layer, B = 2, for Hopper: one kernel from x and w to y.
//
// Math:     a = x w^T / |w|,  y = a |a| / n; 1/n and 1/|w| are given.
// Shapes:   x (M, K), w (N, K), y (M, N), bfloat16 or float16, rows contiguous; 1/n (M,), 1/|w| (N,) or null (1), float32.
//           K % 8 = N % 8 = 0, sizes below 2^31.
// Grid:     persistent, clusters of two programs; a program takes tiles of 128 rows x 128 outputs, one warp group loading
//           (TMA; the tile of w is multicast to the cluster), two multiplying (WGMMA, 64 rows each).
// Numerics: accumulator, norms and scale in float32; y is rounded once.
// Traffic:  reads x and w, writes y; 2 M N K FLOPs.
#include "launch.h"

#include "linear.h"

namespace bcos::fused {
namespace {

using Epilogue = LinearEpilogue<void, ScaledByNorms<LinearTile>>;
using MainLoop = LinearMainLoop<cutlass::layout::ColumnMajor, Epilogue>;
using LinearForwardKernel = LinearKernel<MainLoop, Epilogue>;
using Operator = cutlass::gemm::device::GemmUniversalAdapter<LinearForwardKernel>;

std::string linear_forward(const LinearForward& p, const Place& place) {
  auto arguments = linear_arguments<Operator>(p.y, p.x, p.weight, p.m, p.n, p.k);
  arguments.epilogue.thread = scaled_by_norms<LinearTile>(p.reciprocal_n, p.reciprocal_weight_norm);
  return launch<Operator>(arguments, place);
}

}  // namespace

const Kernel<LinearForward> BCOS_KERNEL_NAME(linear_forward) = kernel_of<LinearForward, LinearForwardKernel>(linear_forward);

}  // namespace bcos::fused
