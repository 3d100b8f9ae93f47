// Gradient of a B-cos convolution's input for Hopper, stride 1: one kernel, the norm's part added on the way out.
//
// Math:     dx = conv_transposed(da, w) + x q,  q = the box-filtered (dL/dn)/n of every pixel. Where weights are
//           normalised, w is w/|w|. Without q (explanation mode) there is nothing to fuse: that is the library's.
// Shapes:   da (N, P, Q, O), w (O, R, S, C), x and dx (N, H, W, C), bfloat16 or float16, densely packed; q (N, H, W)
//           float32. C % 8 = O % 8 = 0, one group, sizes and N H W below 2^31. Stride 1 alone: with others CUTLASS's
//           kernel for this architecture accepts the problem and computes something else.
// Grid:     one program a tile of 128 pixels x 128 input channels, reduced over R, S and O, 64 outputs at a time; one warp
//           group loading (TMA in im2col mode over da), one multiplying (WGMMA).
// Numerics: accumulator, q and sum in float32; dx is rounded once.
// Traffic:  reads da, w and x, writes dx; 2 N H W C R S O FLOPs.
#include "launch.h"

#include "conv2d.h"

namespace bcos::fused {
namespace {

constexpr auto kKind = cutlass::conv::Operator::kDgrad;

using Epilogue = Conv2dEpilogue<Element, PlusScaledSource<Conv2dTile>>;
using Conv2dBackwardDxKernel = Conv2dKernel<kKind, Epilogue>;
using Operator = cutlass::conv::device::ConvUniversalAdapter<Conv2dBackwardDxKernel>;

std::string conv2d_backward_dx(const Conv2dBackwardDx& p, const Place& place) {
  typename Operator::Arguments arguments{};
  arguments.problem_shape = shape_of<kKind>(p.window);
  arguments.mainloop.ptr_A = static_cast<const Element*>(p.da);
  arguments.mainloop.ptr_B = static_cast<const Element*>(p.weight);
  arguments.epilogue.thread = plus_scaled_source<Conv2dTile>(p.q);
  arguments.epilogue.ptr_C = static_cast<const Element*>(p.x);
  arguments.epilogue.dC = output_stride<typename Epilogue::StrideC>(arguments.problem_shape);
  arguments.epilogue.ptr_D = static_cast<Element*>(p.dx);
  arguments.epilogue.dD = output_stride<typename Epilogue::StrideD>(arguments.problem_shape);
  return launch<Operator>(arguments, place);
}

}  // namespace

const Kernel<Conv2dBackwardDx> BCOS_KERNEL_NAME(conv2d_backward_dx) =
    kernel_of<Conv2dBackwardDx, Conv2dBackwardDxKernel>(conv2d_backward_dx);

}  // namespace bcos::fused
