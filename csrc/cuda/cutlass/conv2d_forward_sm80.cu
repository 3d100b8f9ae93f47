// B-cos convolution, B = 2, for sm_80: one kernel from x and w to y, an implicit GEMM (im2col in the loads).
//
// Math:     a = conv(x, w) / |w|,  y = a |a| / n; 1/n and 1/|w| are given.
// Shapes:   x (N, H, W, C), w (O, R, S, C), y (N, P, Q, O), bfloat16 or float16, densely packed; 1/n (N, P, Q), 1/|w| (O,)
//           or null (1), float32. C % 8 = O % 8 = 0, one group, R and S up to 32, less than 2^31 bytes a tensor.
// Grid:     one program a tile of 128 pixels x 128 outputs, four warps of 64 x 64 (mma.sync), reduced over R, S and C, three
//           stages of 32 channels on their way to shared memory (cp.async, predicated where a window leaves the image).
// Numerics: accumulator, norms and scale in float32; y is rounded once.
// Traffic:  reads x and w, writes y; 2 N P Q O R S C FLOPs. Of x's tile each program reads every window, from the L2
//           cache where windows overlap.
#include "conv2d_sm80.h"

#include <cutlass/conv/kernel/default_conv2d_fprop.h>

namespace bcos::fused {
namespace {

using Base = cutlass::conv::kernel::DefaultConv2dFprop<
    Element, sm80::Nhwc, Element, sm80::Nhwc, Element, sm80::Nhwc, float, cutlass::arch::OpClassTensorOp,
    cutlass::arch::Sm80, sm80::Tile, sm80::WarpTile, sm80::Instruction, sm80::OwnEpilogue, sm80::Swizzle, sm80::kStages,
    cutlass::arch::OpMultiplyAdd, cutlass::conv::IteratorAlgorithm::kOptimized, cutlass::conv::StrideSupport::kStrided,
    kAlignment, kAlignment>::Kernel;
using Conv2dForwardKernel = sm80::Conv2dKernel<Base, sm80::ScaledByNorms>;

std::string conv2d_forward(const Conv2dForward& p, const Place& place) {
  const auto tree = sm80::scaled_by_norms(p.y, p.window.o, p.reciprocal_n, p.reciprocal_weight_norm);
  return sm80::launch_conv2d<Conv2dForwardKernel, sm80::ScaledByNorms>(tree, p.x, p.weight, p.window, place);
}

}  // namespace

const Kernel<Conv2dForward> BCOS_KERNEL_NAME(conv2d_forward_sm80) =
    sm80::kernel_of<Conv2dForward, Conv2dForwardKernel>(conv2d_forward);

}  // namespace bcos::fused
