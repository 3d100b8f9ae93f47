// Launcher of layer normalisation; definitions in layer_norm.cpp.
#pragma once

#include <tuple>

#include "tensors.h"

namespace bcos::cpu {

// Over the last `dims` dimensions of x, weight and bias of their shape and any floating type.
// -> (y, mean, rstd, sum y^2), the latter three of the shape of the other dimensions, in the statistics type
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_forward(
    const Tensor& x, int64_t dims, const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool emits_squares);

// -> (dx, dweight, dbias), the latter two in the statistics type; what is not needed has no elements
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& dy, const Tensor& x, int64_t dims, const OptionalTensor& weight, const Tensor& mean, const Tensor& rstd,
    bool detach, bool need_dx, bool need_dweight, bool need_dbias);

}  // namespace bcos::cpu
