// What the convolutions share: tiles, CUTLASS's collectives, its description of a window and of channels_last outputs.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/conv/convnd_problem_shape.hpp>
#include <cutlass/conv/convolution.h>
#include <cutlass/conv/device/conv_universal_adapter.hpp>
#include <cutlass/conv/kernel/conv_universal.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>

#include "epilogue.h"
#include "kernels.h"

namespace bcos::fused {

using Conv2dTile = cute::Shape<cute::_128, cute::_128, cute::Shape<cute::_64>>;
using Conv2dCluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
using Conv2dLayout = cutlass::layout::TensorNHWC;

// Source: the type of the tensor that the tree fetches, void for none.
template <class Source, class Tree>
using Conv2dEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Conv2dTile, Conv2dCluster,
    cutlass::epilogue::collective::EpilogueTileAuto, float, float,
    Source, Conv2dLayout, kAlignment, Element, Conv2dLayout, kAlignment,
    cutlass::epilogue::TmaWarpSpecialized, Tree>::CollectiveOp;

// As many stages as fit: the kernel takes one tile a program, so that the epilogue's tensors lie where the stages did.
template <cutlass::conv::Operator kind, class Epilogue>
using Conv2dMainLoop = typename cutlass::conv::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, kind,
    Element, Conv2dLayout, kAlignment, Element, Conv2dLayout, kAlignment, float, Conv2dTile, Conv2dCluster,
    cutlass::conv::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::PipelineStorage))>,
    cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;

template <cutlass::conv::Operator kind, class Epilogue>
using Conv2dKernel = cutlass::conv::kernel::ConvUniversal<
    cutlass::conv::ConvProblemShape<kind, 2>, Conv2dMainLoop<kind, Epilogue>, Epilogue>;

template <cutlass::conv::Operator kind>
cutlass::conv::ConvProblemShape<kind, 2> shape_of(const Window& w) {
  using Shape = cutlass::conv::ConvProblemShape<kind, 2>;
  const auto i = [](int64_t size) { return static_cast<int>(size); };
  const auto pair = [&](const int64_t (&v)[2]) { return typename Shape::SpatialExtent{i(v[0]), i(v[1])}; };
  const typename Shape::TensorExtent x{i(w.n), i(w.h), i(w.w), i(w.c)}, weight{i(w.o), i(w.r), i(w.s), i(w.c)};
  return Shape(
      cutlass::conv::Mode::kCrossCorrelation, x, weight, /*lower*/ pair(w.padding), /*upper*/ pair(w.padding),
      pair(w.stride), pair(w.dilation), /*groups*/ 1);
}

// Strides of the output, ((width, height, image), channel, batch).
template <class Stride, class Shape>
Stride output_stride(const Shape& shape) {
  Stride stride{};
  cute::get<0, 0>(stride) = shape.stride_C[2];
  cute::get<0, 1>(stride) = shape.stride_C[1];
  cute::get<0, 2>(stride) = shape.stride_C[0];
  return stride;
}

}  // namespace bcos::fused
