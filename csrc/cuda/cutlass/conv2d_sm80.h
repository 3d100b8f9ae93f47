// What the convolutions for sm_80 share: CUTLASS's implicit GEMM, whose own kernels know no visitor trees, with one behind it.
#pragma once

#include "sm80.h"

#include <cutlass/conv/conv2d_problem_size.h>
#include <cutlass/conv/convolution.h>
#include <cutlass/device_kernel.h>

#include <type_traits>

namespace bcos::fused::sm80 {

using Nhwc = cutlass::layout::TensorNHWC;
using OwnEpilogue = cutlass::epilogue::thread::LinearCombination<Element, kAlignment, float, float>;  // replaced

// Base: a convolution kernel of CUTLASS, whose main loop is taken and whose epilogue is replaced by the tree's. Packed
// pixels are rows to the tree: it sees a matrix of (pixels, channels).
template <class Base, class Tree>
struct Conv2dKernel {
  using MainLoop = typename Base::Mma;
  using Epilogue = visitors::EpilogueWithVisitorCallbacks<typename Base::Epilogue, Tree, kEpilogueStages>;
  static constexpr auto kKind = Base::kConvolutionalOperator;
  static constexpr int kThreadCount = 32 * MainLoop::WarpCount::kCount;
  static_assert(
      std::is_same_v<typename Base::Epilogue::OutputTileIterator::ThreadMap, typename Threads::Base>,
      "the tree's threads hold the elements that the epilogue hands to them");

  struct Params {
    cutlass::conv::Conv2dProblemSize problem;
    cutlass::gemm::GemmCoord tiles;
    int log_tile, iterations, iterations_per_channel;
    typename MainLoop::IteratorA::Params a;
    typename MainLoop::IteratorB::Params b;
    const Element *left, *weight;
    typename Tree::Params tree;
    cute::Shape<int, int, int> shape;  // rows, columns, 1
  };

  union SharedStorage {
    typename MainLoop::SharedStorage main_loop;
    typename Epilogue::SharedStorage epilogue;
  };

  CUTLASS_DEVICE void operator()(const Params& p, SharedStorage& shared) {
    const cutlass::gemm::GemmCoord tile = Swizzle{}.get_tile_offset(p.log_tile);
    if (tile.m() >= p.tiles.m() || tile.n() >= p.tiles.n()) return;
    const int thread = threadIdx.x, lane = threadIdx.x % 32;
    const int warp = cutlass::canonical_warp_idx_sync();  // known to the compiler to be one value a warp

    using Coordinate = cutlass::MatrixCoord;
    typename MainLoop::IteratorA a(p.a, p.problem, p.left, thread, Coordinate(tile.m() * Tile::kM, 0));
    typename MainLoop::IteratorB b(p.b, p.problem, p.weight, thread, Coordinate(0, tile.n() * Tile::kN));
    typename MainLoop::FragmentC accumulators;
    accumulators.clear();
    MainLoop main_loop(shared.main_loop, thread, warp, lane);
    main_loop(p.iterations, accumulators, a, b, accumulators, p.iterations_per_channel);

    Epilogue epilogue(p.tree, shared.epilogue, thread, warp, lane);
    epilogue(accumulators, {tile.m(), tile.n(), 0}, p.shape, thread);
  }
};

inline cutlass::conv::Conv2dProblemSize problem_of(const Window& w) {
  const auto i = [](int64_t size) { return static_cast<int>(size); };
  return {
      i(w.n), i(w.h), i(w.w), i(w.c), i(w.o), i(w.r), i(w.s), i(w.p), i(w.q), i(w.padding[0]), i(w.padding[1]),
      i(w.stride[0]), i(w.stride[1]), i(w.dilation[0]), i(w.dilation[1]), cutlass::conv::Mode::kCrossCorrelation};
}

// left: x, or da where the gradient is asked for.
template <class Device, class Tree>
std::string launch_conv2d(
    const typename Tree::Arguments& tree, const void* left, const void* weight, const Window& window, const Place& place) {
  using MainLoop = typename Device::MainLoop;
  const std::string wrong = wrong_device(place.device, 8, /*or_newer*/ true);
  if (!wrong.empty()) return wrong;
  const cutlass::conv::Conv2dProblemSize problem = problem_of(window);
  if (MainLoop::IteratorA::can_implement(problem) != cutlass::Status::kSuccess ||
      MainLoop::IteratorB::can_implement(problem) != cutlass::Status::kSuccess) {
    return "expected a window within the limits of the kernel's loads";
  }
  const Nhwc of_left = Nhwc::packed(cutlass::conv::implicit_gemm_tensor_a_extent(Device::kKind, problem));
  const Nhwc of_weight = Nhwc::packed(cutlass::conv::implicit_gemm_tensor_b_extent(Device::kKind, problem));
  const cutlass::gemm::GemmCoord size = cutlass::conv::implicit_gemm_problem_size(Device::kKind, problem);
  const cutlass::gemm::GemmCoord tiles = Swizzle::get_tiled_shape(size, {Tile::kM, Tile::kN, Tile::kK}, /*slices*/ 1);
  const auto algorithm = MainLoop::IteratorA::kIteratorAlgorithm;
  const typename Device::Params params{
      problem, tiles, Swizzle::get_log_tile(tiles),
      cutlass::conv::implicit_gemm_k_iterations(Device::kKind, Tile::kK, problem, algorithm),
      cutlass::conv::implicit_gemm_k_iterations_per_channel(Device::kKind, problem, algorithm),
      MainLoop::IteratorA::getParams(problem, of_left), typename MainLoop::IteratorB::Params(problem, of_weight),
      static_cast<const Element*>(left), static_cast<const Element*>(weight),
      Tree::to_underlying_arguments(size, tree, /*workspace*/ nullptr), {size.m(), size.n(), 1}};

  constexpr int kBytes = sizeof(typename Device::SharedStorage);
  const dim3 grid = Swizzle::get_grid_shape(tiles);
  if (grid.y > 65535) return "expected fewer than 2^23 outputs";
  const auto kernel = cutlass::Kernel<Device>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error == cudaSuccess) {
    kernel<<<grid, Device::kThreadCount, kBytes, static_cast<cudaStream_t>(place.stream)>>>(params);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? std::string() : std::string("the launch failed: ") + cudaGetErrorString(error);
}

}  // namespace bcos::fused::sm80
