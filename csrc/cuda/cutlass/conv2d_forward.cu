// B-cos convolution, B = 2, for Hopper: one kernel from x and w to y, an implicit GEMM (im2col in the loads).
//
// Math:     a = conv(x, w) / |w|,  y = a |a| / n; 1/n and 1/|w| are given.
// Shapes:   x (N, H, W, C), w (O, R, S, C), y (N, P, Q, O), bfloat16 or float16, densely packed; 1/n (N, P, Q), 1/|w| (O,)
//           or null (1), float32. C % 8 = O % 8 = 0, one group, strides up to 8, sizes and N P Q below 2^31.
// Grid:     one program a tile of 128 pixels x 128 outputs, reduced over R, S and C, 64 channels at a time; one warp group
//           loading (TMA in im2col mode: windows, strides and zero padding are the copy's), one multiplying (WGMMA).
// Numerics: accumulator, norms and scale in float32; y is rounded once.
// Traffic:  reads x and w, writes y; 2 N P Q O R S C FLOPs. Of x's tile each program reads every window, from the L2
//           cache where windows overlap.
#include "launch.h"

#include "conv2d.h"

namespace bcos::fused {
namespace {

constexpr auto kKind = cutlass::conv::Operator::kFprop;

using Epilogue = Conv2dEpilogue<void, ScaledByNorms<Conv2dTile>>;
using Conv2dForwardKernel = Conv2dKernel<kKind, Epilogue>;
using Operator = cutlass::conv::device::ConvUniversalAdapter<Conv2dForwardKernel>;

std::string conv2d_forward(const Conv2dForward& p, const Place& place) {
  typename Operator::Arguments arguments{};
  arguments.problem_shape = shape_of<kKind>(p.window);
  arguments.mainloop.ptr_A = static_cast<const Element*>(p.x);
  arguments.mainloop.ptr_B = static_cast<const Element*>(p.weight);
  arguments.epilogue.thread = scaled_by_norms<Conv2dTile>(p.reciprocal_n, p.reciprocal_weight_norm);
  arguments.epilogue.ptr_D = static_cast<Element*>(p.y);
  arguments.epilogue.dD = output_stride<typename Epilogue::StrideD>(arguments.problem_shape);
  return launch<Operator>(arguments, place);
}

}  // namespace

const Kernel<Conv2dForward> BCOS_KERNEL_NAME(conv2d_forward) = kernel_of<Conv2dForward, Conv2dForwardKernel>(conv2d_forward);

}  // namespace bcos::fused
