// Launchers of the two B-cos layers; definitions in layers.cpp.
#pragma once

#include <tuple>

#include "layer.h"

namespace bcos::cpu {

// (y, norms, a where it is kept, winning unit where it is kept); what is not kept has no elements
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// squares: sum_c x^2 per row or pixel of x, in the norms' type, where the pass that wrote x has left it (one group)
Outputs linear_forward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t mode, double exponent,
    bool normalize_weight, int64_t max_out, const OptionalTensor& squares, bool keep);
Gradients linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t mode, double exponent,
    const OptionalTensor& y, const Tensor& n, const Tensor& a, const Tensor& index, bool normalize_weight,
    int64_t max_out, bool detach, bool need_dx, bool need_dw, bool need_dbias, bool need_db);
Outputs conv2d_forward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t s0, int64_t s1, int64_t p0, int64_t p1,
    int64_t d0, int64_t d1, int64_t groups, int64_t mode, double exponent, bool normalize_weight, int64_t max_out,
    const OptionalTensor& squares, bool keep);
Gradients conv2d_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t s0, int64_t s1,
    int64_t p0, int64_t p1, int64_t d0, int64_t d1, int64_t groups, int64_t mode, double exponent,
    const OptionalTensor& y, const Tensor& n, const Tensor& a, const Tensor& index, bool normalize_weight,
    int64_t max_out, bool detach, bool need_dx, bool need_dw, bool need_dbias, bool need_db);

}  // namespace bcos::cpu
