// Launcher of the uncentered BatchNorm; definitions in batch_norm.cpp.
#pragma once

#include <tuple>

#include "tensors.h"

namespace bcos::cpu {

// weight, bias, running_var (C), of any floating type -> (y, mean (C) in training, var (C)); statistics type
std::tuple<Tensor, Tensor, Tensor> batch_norm_forward(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    const OptionalTensor& running_var, bool training, double eps, bool relu);

// y: the output, for the ReLU's mask; without it the mask is computed from x (not where there was a residual) -> (dx, dweight, dbias, dresidual), dweight and dbias in the statistics type;
// what is not needed has no elements
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& var, bool training, double eps, bool relu, bool detach, bool need_dx, bool need_dweight,
    bool need_dbias, bool need_dresidual);

}  // namespace bcos::cpu
