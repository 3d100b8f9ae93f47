// Gradient of a B-cos convolution's input for sm_80, stride 1: one kernel, the norm's part added on the way out.
//
// Math:     dx = conv_transposed(da, w) + x q,  q = the box-filtered (dL/dn)/n of every pixel. Where weights are
//           normalised, w is w/|w|. Without q (explanation mode) there is nothing to fuse: that is the library's.
// Shapes:   da (N, P, Q, O), w (O, R, S, C), x and dx (N, H, W, C), bfloat16 or float16, densely packed; q (N, H, W)
//           float32. C % 8 = O % 8 = 0, one group, R and S up to 32, less than 2^31 bytes a tensor. Stride 1 alone: with
//           others CUTLASS gives its rows another order, which visitor trees do not know.
// Grid:     as conv2d_forward_sm80.cu, tiles of 128 pixels x 128 input channels, reduced over R, S and O.
// Numerics: accumulator, q and sum in float32; dx is rounded once.
// Traffic:  reads da, w and x, writes dx; 2 N H W C R S O FLOPs.
#include "conv2d_sm80.h"

#include <cutlass/conv/kernel/default_conv2d_dgrad.h>

namespace bcos::fused {
namespace {

using Base = cutlass::conv::kernel::DefaultConv2dDgrad<
    Element, sm80::Nhwc, Element, sm80::Nhwc, Element, sm80::Nhwc, float, cutlass::arch::OpClassTensorOp,
    cutlass::arch::Sm80, sm80::Tile, sm80::WarpTile, sm80::Instruction, sm80::OwnEpilogue, sm80::Swizzle, sm80::kStages,
    cutlass::arch::OpMultiplyAdd, cutlass::conv::IteratorAlgorithm::kOptimized, cutlass::conv::StrideSupport::kUnity,
    kAlignment, kAlignment>::Kernel;
using Conv2dBackwardDxKernel = sm80::Conv2dKernel<Base, sm80::PlusScaledSource>;

std::string conv2d_backward_dx(const Conv2dBackwardDx& p, const Place& place) {
  const auto tree = sm80::plus_scaled_source(p.dx, p.window.c, p.x, p.q);
  return sm80::launch_conv2d<Conv2dBackwardDxKernel, sm80::PlusScaledSource>(tree, p.da, p.weight, p.window, place);
}

}  // namespace

const Kernel<Conv2dBackwardDx> BCOS_KERNEL_NAME(conv2d_backward_dx_sm80) =
    sm80::kernel_of<Conv2dBackwardDx, Conv2dBackwardDxKernel>(conv2d_backward_dx);

}  // namespace bcos::fused
