// The passes around a product, over whole tensors in one of the two dense layouts; definitions in passes.cpp.
#pragma once

#include "tensors.h"

namespace bcos::cpu {

// sqrt of the box filter of sum_c x^2 + 1e-6: x (N, C, H, W) -> n (N, G, P, Q); squares: that sum, where it is known
// (one group), or null
void window_norms(const void* x, const void* squares, void* n, Type type, const Layout& input, const Window& window);
// the same, and the scaling with these norms
void window_norms_and_scale(
    const void* x, const void* squares, void* n, const ScaleArguments& s, Type type, const Layout& input, const Window& window);
// dx += x * (transposed box filter of q), or per row where the window is one pixel
void add_norm_gradient(void* dx, const void* x, const void* q, Type type, const Layout& input, const Window& window);
void row_norms(const void* x, void* n, Type type, int64_t rows, int64_t columns, bool linear);
void scale(const ScaleArguments& s, Type type);
void scale_backward(const ScaleBackwardArguments& s, Type type);
// Partial sums of dL/dB that scale_backward writes.
int64_t partial_sums(const Layout& layout);

// w / |w| per unit, in w's layout
Tensor normalized(const Tensor& w);
// dL/dw from dL/dw_hat, which may be wider than w; both dense in one layout
Tensor weight_norm_gradient(const Tensor& dw_hat, const Tensor& w);

bool is_one_pixel(const Window& w);

}  // namespace bcos::cpu
