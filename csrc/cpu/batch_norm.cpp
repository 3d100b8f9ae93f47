// Launcher of the uncentered BatchNorm, forward and backward: y = act(x / sqrt(var + eps) w + bias + residual).
//
// Here is what is per channel only; the passes over activations are in batch_norm_kernels.cpp.
#include "batch_norm.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace bcos::cpu {
namespace {

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

template <class W>
void moments(const Tensor& x, const Layout& l, W* mean, W* var) {
  const Kernels& k = kernels(type_of(x));
  const void* px = x.data_ptr();
  if (!l.rows) {
    in_parallel(l.channels, l.images * l.pixels, [&](int64_t begin, int64_t end) {
      k.moments_planes(px, mean, var, l, begin, end);
    });
    return;
  }
  const int64_t rows = l.images * l.pixels, C = l.channels;
  const Chunks chunks(rows, C);
  std::vector<W> origin(C, W(0));
  std::vector<double> sums(chunks.count * 2 * C);
  const int64_t sample = std::min<int64_t>(rows, 16);  // their mean is near enough to the batch's not to cancel
  k.moments_rows(px, origin.data(), sums.data(), l, 0, sample);
  for (int64_t c = 0; c < C; c++) origin[c] = std::isfinite(sums[c]) ? static_cast<W>(sums[c] / sample) : W(0);
  chunks.each([&](int64_t i) {
    k.moments_rows(px, origin.data(), sums.data() + i * 2 * C, l, chunks.begin(i), chunks.end(i));
  });
  for (int64_t c = 0; c < C; c++) {
    double first = 0, second = 0;
    for (int64_t i = 0; i < chunks.count; i++) {
      first += sums[i * 2 * C + c];
      second += sums[i * 2 * C + C + c];
    }
    const double shift = first / rows, v = second / rows - shift * shift;
    mean[c] = static_cast<W>(origin[c] + shift);
    var[c] = static_cast<W>(v < 0 ? 0 : v);
  }
}

// y = x scale + shift; the backward's mask takes them from here too, so that it is the forward's.
template <class W>
void forward_factors(
    const OptionalTensor& weight, const OptionalTensor& bias, const W* var, double eps, int64_t channels,
    std::vector<W>* scale, std::vector<W>* shift) {
  scale->resize(channels);
  shift->assign(channels, W(0));
  for (int64_t c = 0; c < channels; c++) {
    (*scale)[c] = (weight.has_value() ? data<W>(weight)[c] : W(1)) / std::sqrt(var[c] + static_cast<W>(eps));
    if (bias.has_value()) (*shift)[c] = data<W>(bias)[c];
  }
}

template <class W>
void batch_norm_of(
    const Tensor& x, const Tensor& y, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& mean, const Tensor& var, bool training, double eps, bool relu,
    const Layout& l) {
  const Kernels& k = kernels(type_of(x));
  W* pvar = static_cast<W*>(var.data_ptr());
  if (training) moments<W>(x, l, data<W>(mean), pvar);
  std::vector<W> scale, shift;
  forward_factors(weight, bias, pvar, eps, l.channels, &scale, &shift);
  const BatchNormArguments s{x.data_ptr(), y.data_ptr(), data(residual), scale.data(), shift.data(), l, relu};
  if (l.rows) {
    in_parallel(l.images * l.pixels, l.channels, [&](int64_t begin, int64_t end) { k.batch_norm_rows(s, begin, end); });
  } else {
    in_parallel(l.images * l.channels, l.pixels, [&](int64_t begin, int64_t end) { k.batch_norm_planes(s, begin, end); });
  }
}

template <class W>
void batch_norm_backward_of(
    const Tensor& dy, const Tensor& x, const OptionalTensor& y, bool mask_from_x, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& mean, const Tensor& var, double eps, bool var_term, const OptionalTensor& dx, const OptionalTensor& dweight,
    const OptionalTensor& dbias, const OptionalTensor& dresidual, const Layout& l) {
  const Kernels& k = kernels(type_of(x));
  const int64_t C = l.channels, rows = l.images * l.pixels;
  const W* pvar = static_cast<const W*>(var.data_ptr());
  std::vector<W> inverse_std(C), scale(C), factor(C);
  for (int64_t c = 0; c < C; c++) {
    inverse_std[c] = 1 / std::sqrt(pvar[c] + static_cast<W>(eps));
    scale[c] = inverse_std[c] * (weight.has_value() ? data<W>(weight)[c] : W(1));
  }
  std::vector<W> mask_scale, mask_shift;
  if (mask_from_x) forward_factors(weight, bias, pvar, eps, C, &mask_scale, &mask_shift);
  BatchNormBackwardArguments s{};
  s.dy = dy.data_ptr();
  s.x = x.data_ptr();
  s.y = data(y);
  s.dresidual = data(dresidual);
  s.dx = data(dx);
  s.scale = scale.data();
  s.mask_scale = mask_from_x ? mask_scale.data() : nullptr;
  s.mask_shift = mask_from_x ? mask_shift.data() : nullptr;
  s.layout = l;
  if (var_term || dweight.has_value() || dbias.has_value() || dresidual.has_value()) {
    const Chunks chunks(rows, C);
    std::vector<double> sums((l.rows ? chunks.count : 1) * 2 * C);
    s.sums = sums.data();
    if (l.rows) {
      chunks.each([&](int64_t i) { k.batch_norm_reduce_rows(s, i, chunks.begin(i), chunks.end(i)); });
      for (int64_t i = 1; i < chunks.count; i++) {
        for (int64_t c = 0; c < 2 * C; c++) sums[c] += sums[i * 2 * C + c];
      }
    } else {
      in_parallel(C, rows, [&](int64_t begin, int64_t end) { k.batch_norm_reduce_planes(s, begin, end); });
    }
    for (int64_t c = 0; c < C; c++) {
      if (dbias.has_value()) data<W>(dbias)[c] = static_cast<W>(sums[c]);
      if (dweight.has_value()) data<W>(dweight)[c] = static_cast<W>(sums[C + c] * inverse_std[c]);
      factor[c] = static_cast<W>(-sums[C + c] * scale[c] * inverse_std[c] * inverse_std[c] / std::max<int64_t>(rows, 1));
    }
    if (dresidual.has_value()) {
      s.dy = dresidual->data_ptr();  // masked already: no need to read y again
      s.y = nullptr;
    }
  }
  if (!dx.has_value()) return;
  if (var_term) {
    s.factor = factor.data();
    s.mean = data<W>(mean);
  }
  if (l.rows) {
    in_parallel(rows, C, [&](int64_t begin, int64_t end) { k.batch_norm_backward_rows(s, begin, end); });
  } else {
    in_parallel(l.images * C, l.pixels, [&](int64_t begin, int64_t end) { k.batch_norm_backward_planes(s, begin, end); });
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm_forward(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    const OptionalTensor& running_var, bool training, double eps, bool relu) {
  const Dense d(x);
  const ScalarType type = wide(x.scalar_type());
  const Tensor y = empty_like(d.x, x.scalar_type()), var = d.new_vector();
  OptionalTensor mean;
  if (training) {
    mean = d.new_vector();
  } else {
    const OptionalTensor given = d.vector(running_var);
    check_size(*given, d.layout.channels, "running_var");
    std::memcpy(var.data_ptr(), given->data_ptr(), static_cast<size_t>(wide_bytes(d.layout.channels, type_of(x))));
  }
  if (d.x.numel() == 0) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    for (int64_t c = 0; training && c < d.layout.channels; c++) {
      for (void* p : {mean->data_ptr(), var.data_ptr()}) {
        type == ScalarType::Double ? static_cast<double*>(p)[c] = nan : static_cast<float*>(p)[c] = static_cast<float>(nan);
      }
    }
  } else {
    const OptionalTensor r = d.like(residual), w = d.vector(weight), b = d.vector(bias);
    if (r.has_value()) check_type(*r, x.scalar_type(), "residual");
    if (type == ScalarType::Double) {
      batch_norm_of<double>(d.x, y, r, w, b, mean, var, training, eps, relu, d.layout);
    } else {
      batch_norm_of<float>(d.x, y, r, w, b, mean, var, training, eps, relu, d.layout);
    }
  }
  return {y, mean.has_value() ? *mean : nothing(type), var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& var, bool training, double eps, bool relu, bool detach, bool need_dx, bool need_dweight,
    bool need_dbias, bool need_dresidual) {
  const Dense d(x);
  const ScalarType type = wide(x.scalar_type());
  const Tensor g = d.like(dy);
  check_type(g, x.scalar_type(), "dy");
  check_size(g, d.x.numel(), "dy");
  const auto zeros = [&] {
    Tensor v = d.new_vector();
    return torch::stable::zero_(v);
  };
  OptionalTensor dx, dweight, dbias, dresidual, mask;
  if (need_dx) dx = empty_like(d.x, x.scalar_type());
  if (need_dweight) dweight = zeros();
  if (need_dbias) dbias = zeros();
  if (need_dresidual) dresidual = relu ? empty_like(d.x, x.scalar_type()) : in_layout(torch::stable::clone(g), d.channels_last);
  const bool mask_from_x = relu && !y.has_value();
  STD_TORCH_CHECK(
      !(mask_from_x && need_dresidual), "bcos_kernels_cpp: expected y where there was a residual before the ReLU");
  if (relu) mask = d.like(y);
  if (d.x.numel() != 0) {
    const OptionalTensor w = d.vector(weight), b = d.vector(bias), m = training ? OptionalTensor(in_layout(mean, false)) : std::nullopt;
    const Tensor v = in_layout(var, false);
    check_type(v, type, "var");
    const bool var_term = training && !detach && need_dx;
    const OptionalTensor masked = relu ? dresidual : std::nullopt;
    if (type == ScalarType::Double) {
      batch_norm_backward_of<double>(
          g, d.x, mask, mask_from_x, w, b, m, v, eps, var_term, dx, dweight, dbias, masked, d.layout);
    } else {
      batch_norm_backward_of<float>(
          g, d.x, mask, mask_from_x, w, b, m, v, eps, var_term, dx, dweight, dbias, masked, d.layout);
    }
  }
  const auto or_nothing = [&](const OptionalTensor& t) { return t.has_value() ? *t : nothing(type); };
  return {or_nothing(dx), or_nothing(dweight), or_nothing(dbias), or_nothing(dresidual)};
}

}  // namespace bcos::cpu
