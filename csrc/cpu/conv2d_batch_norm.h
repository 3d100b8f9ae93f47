// Launcher of the B-cos convolution with an uncentered BatchNorm behind it; definitions in conv2d_batch_norm.cpp.
#pragma once

#include "layers.h"

namespace bcos::cpu {

// y = B-cos convolution for B = 2, z = act(y / sqrt(var + eps) norm_weight + norm_bias + residual); channels innermost,
// float16 excepted. keeps: 0 nothing, 1 what a backward in training or explanation mode takes; with running statistics and
// `detach` that is the slope instead of y.
// -> (z, squares, y, slope, n, mean, var); what is not wanted has no elements
using ConvolvedNormalized = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
ConvolvedNormalized conv2d_batch_norm_forward(
    const Tensor& x, const OptionalTensor& squares, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_var, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
    const OptionalTensor& residual, int64_t s0, int64_t s1, int64_t p0, int64_t p1, int64_t d0, int64_t d1,
    int64_t groups, bool normalize_weight, bool training, double eps, bool relu, bool keep, bool detach,
    bool emits_squares);

// z: for the ReLU's mask where there was a residual. From slope alone only dx, dw, dbias and dresidual can be had.
// -> (dx, dw, dbias, dnorm_weight, dnorm_bias, dresidual), those of the normalisation in the statistics type
using ConvolvedNormalizedGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
ConvolvedNormalizedGradients conv2d_batch_norm_backward(
    const Tensor& dz, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, const OptionalTensor& z, const OptionalTensor& y, const Tensor& slope,
    const Tensor& n, const Tensor& mean, const Tensor& var, int64_t s0, int64_t s1, int64_t p0, int64_t p1, int64_t d0,
    int64_t d1, int64_t groups, bool normalize_weight, bool training, double eps, bool relu, bool detach, bool need_dx,
    bool need_dw, bool need_dbias, bool need_dnorm_weight, bool need_dnorm_bias, bool need_dresidual);

}  // namespace bcos::cpu
