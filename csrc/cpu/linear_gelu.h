// Launcher of the B-cos linear layer with a GELU behind it; definitions in linear_gelu.cpp.
#pragma once

#include "layers.h"

namespace bcos::cpu {

// h = GELU(y) (the exact one) of y, the B-cos linear layer for B = 2; not float16.
// -> (h, sum h^2 per row, y where `keep`, n); what is not wanted has no elements
Outputs linear_gelu_forward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& squares,
    bool normalize_weight, bool keep, bool emits_squares);
// h of the y that a forward kept, to the same bits
Tensor linear_gelu_again(const Tensor& y);
// -> (dx, dw, dbias)
std::tuple<Tensor, Tensor, Tensor> linear_gelu_backward(
    const Tensor& dh, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& y, const Tensor& n,
    bool normalize_weight, bool detach, bool need_dx, bool need_dw, bool need_dbias);

}  // namespace bcos::cpu
