// Launcher of the uncentered BatchNorm, forward and backward: y = act(x / sqrt(var + eps) w + bias + residual).
//
// Here is what is per channel only; the passes over activations are in batch_norm_kernels.cpp.
#include "batch_norm.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace bcos::cpu {
template <class W>
void Moments<W>::add(const Kernels& k, int64_t chunk, const void* rows, int64_t count) {
  if (count == 0) return;
  const int64_t C = channels_;
  Part& part = parts_[chunk];
  const Layout l{1, count, C, 1, true};
  if (part.rows == 0) {
    part.origin.assign(C, W(0));
    part.sums.assign(2 * C, 0.0);
    const int64_t sample = std::min<int64_t>(count, 16);  // their mean is near enough to the whole's not to cancel
    k.moments_rows(rows, part.origin.data(), part.sums.data(), l, 0, sample);
    for (int64_t c = 0; c < C; c++) {
      part.origin[c] = std::isfinite(part.sums[c]) ? static_cast<W>(part.sums[c] / sample) : W(0);
    }
    part.sums.assign(2 * C, 0.0);
  }
  k.moments_rows(rows, part.origin.data(), part.sums.data(), l, 0, count);
  part.rows += count;
}

template <class W>
void Moments<W>::join(W* mean, W* var) const {
  for (int64_t c = 0; c < channels_; c++) {
    double rows = 0, center = 0, squares = 0;  // Chan, Golub, LeVeque
    for (const Part& part : parts_) {
      if (part.rows == 0) continue;
      const double count = static_cast<double>(part.rows), shift = part.sums[c] / count;
      const double mine = part.origin[c] + shift, apart = mine - center, together = rows + count;
      squares += part.sums[channels_ + c] - count * shift * shift + apart * apart * rows * count / together;
      center += apart * count / together;
      rows = together;
    }
    const double v = squares / rows;
    mean[c] = static_cast<W>(center);
    var[c] = static_cast<W>(v < 0 ? 0 : v);
  }
}

template class Moments<float>;
template class Moments<double>;

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
template void forward_factors(
    const OptionalTensor&, const OptionalTensor&, const float*, double, int64_t, std::vector<float>*, std::vector<float>*);
template void forward_factors(
    const OptionalTensor&, const OptionalTensor&, const double*, double, int64_t, std::vector<double>*, std::vector<double>*);

void normalize(const BatchNormArguments& s, Type type) {
  const Kernels& k = kernels(type);
  const Layout& l = s.layout;
  if (l.rows) {
    in_parallel(l.images * l.pixels, l.channels, [&](int64_t begin, int64_t end) { k.batch_norm_rows(s, begin, end); });
    return;
  }
  in_parallel(l.images * l.channels, l.pixels, [&](int64_t begin, int64_t end) { k.batch_norm_planes(s, begin, end); });
  if (s.squares == nullptr) return;
  in_parallel(l.images, l.channels * l.pixels, [&](int64_t begin, int64_t end) {
    k.sum_squares_planes(s.y, s.squares, l, begin, end);
  });
}

template <class W>
void BatchNormPull<W>::reduce(const BatchNormGiven& in) {
  const Kernels& k = kernels(type_of(in.x));
  const Layout& l = in.layout;
  const int64_t C = l.channels, rows = l.images * l.pixels;
  const W* var = static_cast<const W*>(in.var.data_ptr());
  std::vector<W> inverse_std(C);
  scale.resize(C);
  for (int64_t c = 0; c < C; c++) {
    inverse_std[c] = 1 / std::sqrt(var[c] + static_cast<W>(in.eps));
    scale[c] = inverse_std[c] * (in.weight.has_value() ? data<W>(in.weight)[c] : W(1));
  }
  if (in.mask_from_x) forward_factors(in.weight, in.bias, var, in.eps, C, &mask_scale, &mask_shift);
  s.dy = in.dy.data_ptr();
  s.x = in.x.data_ptr();
  s.y = data(in.y);
  s.dresidual = data(in.dresidual);
  s.scale = scale.data();
  s.mask_scale = in.mask_from_x ? mask_scale.data() : nullptr;
  s.mask_shift = in.mask_from_x ? mask_shift.data() : nullptr;
  s.layout = l;
  if (!(in.var_term || in.dweight.has_value() || in.dbias.has_value() || in.dresidual.has_value())) return;
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
  s.sums = nullptr;
  factor.resize(C);
  for (int64_t c = 0; c < C; c++) {
    if (in.dbias.has_value()) data<W>(in.dbias)[c] = static_cast<W>(sums[c]);
    if (in.dweight.has_value()) data<W>(in.dweight)[c] = static_cast<W>(sums[C + c] * inverse_std[c]);
    factor[c] = static_cast<W>(-sums[C + c] * scale[c] * inverse_std[c] * inverse_std[c] / std::max<int64_t>(rows, 1));
  }
  if (in.dresidual.has_value()) {
    s.dy = in.dresidual->data_ptr();  // masked already: no need to read y again
    s.y = nullptr;
  }
  if (in.var_term) {
    s.factor = factor.data();
    s.mean = data<W>(in.mean);
  }
}

template struct BatchNormPull<float>;
template struct BatchNormPull<double>;

namespace {

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
  const Chunks chunks(l.images * l.pixels, l.channels);
  Moments<W> sums(chunks.count, l.channels);
  const int64_t bytes_a_row = l.channels * bytes_of(type_of(x));
  chunks.each([&](int64_t i) {
    const char* rows = static_cast<const char*>(px) + chunks.begin(i) * bytes_a_row;
    sums.add(k, i, rows, chunks.end(i) - chunks.begin(i));
  });
  sums.join(mean, var);
}

template <class W>
void batch_norm_of(
    const Tensor& x, const Tensor& y, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& mean, const Tensor& var, const OptionalTensor& squares,
    bool training, double eps, bool relu, const Layout& l) {
  W* pvar = static_cast<W*>(var.data_ptr());
  if (training) moments<W>(x, l, data<W>(mean), pvar);
  std::vector<W> scale, shift;
  forward_factors(weight, bias, pvar, eps, l.channels, &scale, &shift);
  normalize({x.data_ptr(), y.data_ptr(), data(residual), scale.data(), shift.data(), data(squares), l, relu}, type_of(x));
}

template <class W>
void batch_norm_backward_of(const BatchNormGiven& in, const OptionalTensor& dx) {
  BatchNormPull<W> pull;
  pull.reduce(in);
  if (!dx.has_value()) return;
  BatchNormBackwardArguments& s = pull.s;
  s.dx = data(dx);
  const Kernels& k = kernels(type_of(in.x));
  const Layout& l = in.layout;
  if (l.rows) {
    in_parallel(l.images * l.pixels, l.channels, [&](int64_t begin, int64_t end) {
      k.batch_norm_backward_rows(s, begin, end);
    });
  } else {
    in_parallel(l.images * l.channels, l.pixels, [&](int64_t begin, int64_t end) {
      k.batch_norm_backward_planes(s, begin, end);
    });
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_forward(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    const OptionalTensor& running_var, bool training, double eps, bool relu, bool emits_squares) {
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
  OptionalTensor squares;
  if (emits_squares) {
    STD_TORCH_CHECK(x.dim() == 4, "bcos_kernels_cpp: expected x of 4 dimensions where squares are wanted, got ", x.dim());
    squares = empty({x.size(0), x.size(2), x.size(3)}, type);
  }
  if (d.x.numel() == 0) {
    if (squares.has_value()) squares = torch::stable::zero_(*squares);
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
      batch_norm_of<double>(d.x, y, r, w, b, mean, var, squares, training, eps, relu, d.layout);
    } else {
      batch_norm_of<float>(d.x, y, r, w, b, mean, var, squares, training, eps, relu, d.layout);
    }
  }
  return {y, mean.has_value() ? *mean : nothing(type), var, squares.has_value() ? *squares : nothing(type)};
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
    const BatchNormGiven given{
        g, d.x, mask, w, b, m, v, eps, mask_from_x, var_term, dweight, dbias, relu ? dresidual : std::nullopt, d.layout};
    type == ScalarType::Double ? batch_norm_backward_of<double>(given, dx) : batch_norm_backward_of<float>(given, dx);
  }
  const auto or_nothing = [&](const OptionalTensor& t) { return t.has_value() ? *t : nothing(type); };
  return {or_nothing(dx), or_nothing(dweight), or_nothing(dbias), or_nothing(dresidual)};
}

}  // namespace bcos::cpu
