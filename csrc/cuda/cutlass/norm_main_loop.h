// CUTLASS's warp-specialised main loop for Hopper, which multiplies A by B, and the norms of A's rows beside it.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include "../../math.h"

namespace bcos::fused {

// A drop-in for Base, a main loop whose operands lie in shared memory: the accumulator comes out as a / sqrt(n) instead of
// a, n the norm of the row, so that t |t| of what comes out is a |a| / n.
//
// While a stage's products run, the warps that wait for them read the stage's A into registers, in the layout of an MMA that
// takes A from there: a thread then holds values of the very rows that its accumulators belong to, and what is left is a
// sum over the four threads of a row.
template <class Base>
struct NormMainLoop : Base {
  template <class Accumulator>
  CUTLASS_DEVICE void mma(
      typename Base::MainloopPipeline pipeline, typename Base::PipelineState stage, Accumulator& accumulator, int k_tiles,
      int thread, typename Base::TensorStorage& shared, const typename Base::Params&) {
    using namespace cute;
    using Element = typename Base::ElementA;
    using TiledMma = typename Base::TiledMma;
    constexpr int kGroup = cutlass::NumThreadsPerWarpGroup, kGroups = size(TiledMma{}) / kGroup;
    static_assert(is_rmem<Accumulator>::value, "accumulators lie in registers");

    Tensor all_a = make_tensor(make_smem_ptr(shared.smem_A.data()), typename Base::SmemLayoutA{});  // (M, K, stages)
    Tensor all_b = make_tensor(make_smem_ptr(shared.smem_B.data()), typename Base::SmemLayoutB{});  // (N, K, stages)
    TiledMma tiled_mma;
    auto slice = tiled_mma.get_slice(__shfl_sync(0xffffffff, thread / kGroup, 0) * kGroup);
    Tensor a = slice.make_fragment_A(slice.partition_A(all_a));  // descriptors (MMA, MMA_M, MMA_K, stages)
    Tensor b = slice.make_fragment_B(slice.partition_B(all_b));

    using FromRegisters = decltype(make_tiled_mma(
        GMMA::rs_op_selector<Element, Element, float, typename Base::TileShape, GMMA::Major::K, GMMA::Major::K>(),
        Layout<Shape<Int<kGroups>, _1, _1>>{}));
    FromRegisters from_registers;
    auto tiled_copy = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, from_registers);
    auto copy_slice = tiled_copy.get_thread_slice(thread);
    Tensor source = copy_slice.partition_S(as_position_independent_swizzle_tensor(all_a));  // (copy, M, K, stages)
    // (MMA, MMA_M, MMA_K)
    Tensor values = from_registers.get_thread_slice(thread).partition_fragment_A(all_a(_, _, Int<0>{}));
    Tensor target = copy_slice.retile_D(values);
    // Of values and accumulators, the second bit of the first index tells rows i and i + 8 of 16 apart.
    constexpr int kRows = decltype(size<1>(values))::value;
    float squares[kRows][2] = {};

    auto released = stage;
    tiled_mma.accumulate_ = GMMA::ScaleOut::Zero;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int tile = 0; tile < k_tiles; tile++) {
      pipeline.consumer_wait(stage, pipeline.consumer_try_wait(stage));
      warpgroup_fence_operand(accumulator);
      warpgroup_arrive();
      CUTLASS_PRAGMA_UNROLL
      for (int k = 0; k < size<2>(a); k++) {
        cute::gemm(tiled_mma, a(_, _, k, stage.index()), b(_, _, k, stage.index()), accumulator);
        tiled_mma.accumulate_ = GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();

      cute::copy(tiled_copy, source(_, _, _, stage.index()), target);
      CUTLASS_PRAGMA_UNROLL
      for (int k = 0; k < size<2>(values); k++) {
        CUTLASS_PRAGMA_UNROLL
        for (int m = 0; m < kRows; m++) {
          CUTLASS_PRAGMA_UNROLL
          for (int i = 0; i < size<0>(values); i++) {
            const float v = static_cast<float>(values(i, m, k));
            squares[m][(i >> 1) & 1] += v * v;
          }
        }
      }

      warpgroup_wait<1>();  // the stage before this one is multiplied, and read
      warpgroup_fence_operand(accumulator);
      if (tile > 0) {
        pipeline.consumer_release(released);
        ++released;
      }
      ++stage;
    }

    warpgroup_wait<0>();
    warpgroup_fence_operand(accumulator);
    CUTLASS_PRAGMA_UNROLL
    for (int m = 0; m < kRows; m++) {
      float scale[2];
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < 2; row++) {
        float total = squares[m][row];
        total += __shfl_xor_sync(0xffffffff, total, 1);
        total += __shfl_xor_sync(0xffffffff, total, 2);
        scale[row] = 1.f / sqrtf(sqrtf(total) + static_cast<float>(kLinearNormEps));
      }
      CUTLASS_PRAGMA_UNROLL
      for (int n = 0; n < size<2>(accumulator); n++) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < size<0>(accumulator); i++) accumulator(i, m, n) *= scale[(i >> 1) & 1];
      }
    }
  }
};

}  // namespace bcos::fused
