// B-cos linear layer, B = 2, for Hopper, with the norms of x computed beside the products: nothing but x and w is read.
//
// Math:     a = x w^T / |w|,  n = |x| + 1e-12,  y = a |a| / n, as t |t| with t = a / sqrt(n); 1/|w| is given. n is not
//           written: a backward pass, which needs it, takes linear_forward.cu.
// Shapes:   x (M, K), w (N, K), y (M, N), bfloat16 or float16, rows contiguous; 1/|w| (N,) float32 or null (1).
//           K % 8 = N % 8 = 0, sizes below 2^31.
// Grid:     as linear_forward.cu; the norms of a tile's rows are computed once more for every tile of outputs.
// Numerics: accumulator, squares and scale in float32; y is rounded once.
// Traffic:  reads x and w, writes y; 2 M N K FLOPs, and of shared memory 16 KB more for every 128 x 128 x 64 products.
#include "launch.h"

#include "linear.h"
#include "norm_main_loop.h"

namespace bcos::fused {
namespace {

// t |t|, t = accumulator / |w|.
template <class Fragment>
struct SignedSquare {
  CUTLASS_HOST_DEVICE Fragment operator()(const Fragment& accumulator, const Fragment& reciprocal_weight_norm) const {
    Fragment y;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Fragment::kElements; i++) y[i] = output_b2(accumulator[i] * reciprocal_weight_norm[i], 1.f);
    return y;
  }
};

using Squared = fusion::Sm90EVT<
    fusion::Sm90Compute<SignedSquare, Element, float, kRounding>,
    fusion::Sm90AccFetch, PerColumn<LinearTile>>;

using Epilogue = LinearEpilogue<void, Squared>;
using MainLoop = NormMainLoop<LinearMainLoop<cutlass::layout::ColumnMajor, Epilogue>>;
using LinearNormForwardKernel = LinearKernel<MainLoop, Epilogue>;
using Operator = cutlass::gemm::device::GemmUniversalAdapter<LinearNormForwardKernel>;

std::string linear_norm_forward(const LinearForward& p, const Place& place) {
  auto arguments = linear_arguments<Operator>(p.y, p.x, p.weight, p.m, p.n, p.k);
  arguments.epilogue.thread = {{}, {p.reciprocal_weight_norm, 1.f}, {}};
  return launch<Operator>(arguments, place);
}

}  // namespace

const Kernel<LinearForward> BCOS_KERNEL_NAME(linear_norm_forward) =
    kernel_of<LinearForward, LinearNormForwardKernel>(linear_norm_forward);

}  // namespace bcos::fused
