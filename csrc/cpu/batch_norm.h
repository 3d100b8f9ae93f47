// Launcher of the uncentered BatchNorm; definitions in batch_norm.cpp.
#pragma once

#include <tuple>
#include <vector>

#include "tensors.h"

namespace bcos::cpu {

// x in a dense layout, and what it is.
struct Dense {
  Tensor x;
  Layout layout;
  bool channels_last;

  explicit Dense(const Tensor& given) : x(given) {
    channels_last = is_channels_last(given);
    x = in_layout(given, channels_last);
    const int64_t images = x.size(0), channels = x.size(1);
    const int64_t pixels = images * channels == 0 ? 0 : x.numel() / (images * channels);
    layout = Layout{images, pixels, channels, 1, channels_last || pixels == 1};
  }
  Tensor like(const Tensor& t) const { return in_layout(t, channels_last); }
  OptionalTensor like(const OptionalTensor& t) const { return t.has_value() ? OptionalTensor(like(*t)) : std::nullopt; }
  OptionalTensor vector(const OptionalTensor& t) const {
    if (!t.has_value()) return std::nullopt;
    const ScalarType type = wide(x.scalar_type());
    return in_layout(t->scalar_type() == type ? *t : torch::stable::to(*t, type), false);
  }
  Tensor new_vector() const { return empty({layout.channels}, wide(x.scalar_type())); }
};

// Mean and biased variance per channel of rows that come in pieces, chunk by chunk: sums about an origin near the mean,
// of every chunk its own.
template <class W>
class Moments {
 public:
  Moments(int64_t chunks, int64_t channels) : channels_(channels), parts_(chunks) {}
  // `count` rows more; one thread per chunk.
  void add(const Kernels& k, int64_t chunk, const void* rows, int64_t count);
  void join(W* mean, W* var) const;

 private:
  struct Part {
    std::vector<W> origin;
    std::vector<double> sums;
    int64_t rows = 0;
  };
  int64_t channels_;
  std::vector<Part> parts_;
};

// y = x scale + shift, per channel
template <class W>
void forward_factors(
    const OptionalTensor& weight, const OptionalTensor& bias, const W* var, double eps, int64_t channels,
    std::vector<W>* scale, std::vector<W>* shift);

// y from x, over the whole tensor
void normalize(const BatchNormArguments& s, Type type);

// What a backward is given, dense in one layout. y: the output, for the ReLU's mask, or none; mask_from_x: the mask by the
// forward's formula. dweight, dbias, dresidual: outputs, where they are needed.
struct BatchNormGiven {
  Tensor dy, x;
  OptionalTensor y, weight, bias, mean;
  Tensor var;
  double eps;
  bool mask_from_x, var_term;
  OptionalTensor dweight, dbias, dresidual;
  Layout layout;
};

// The backward's first pass, and what its second one takes: dL/dx = (masked dy) scale + factor (x - mean).
template <class W>
struct BatchNormPull {
  std::vector<W> scale, factor, mask_scale, mask_shift;
  BatchNormBackwardArguments s{};
  void reduce(const BatchNormGiven& given);
};

// squares: sum_c y^2 per (image, pixel), for the norms of the next layer, where `emits_squares`
// weight, bias, running_var (C), of any floating type -> (y, mean (C) in training, var (C), squares); statistics type
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_forward(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    const OptionalTensor& running_var, bool training, double eps, bool relu, bool emits_squares);

// y: the output, for the ReLU's mask; without it the mask is computed from x (not where there was a residual)
// -> (dx, dweight, dbias, dresidual), dweight and dbias in the statistics type; what is not needed has no elements
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& var, bool training, double eps, bool relu, bool detach, bool need_dx, bool need_dweight,
    bool need_dbias, bool need_dresidual);

}  // namespace bcos::cpu
