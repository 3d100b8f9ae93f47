// Uncentered batch normalisation with residual and ReLU.
//
//   forward   moments: mean and biased variance per channel (one read of x);
//             y = relu(x scale + shift + residual), scale = w/sqrt(var + eps)
//   backward  reduce: g = dy where y > 0; sum g, sum g x per channel (g written where a residual wants it);
//             apply: dx = g scale + factor (x - mean), factor = -(sum g x) scale / (var + eps) / count in training
//
// squares, sum_c y^2 of a row, is what the norms of the next layer are made of.
//
// Sums are taken in float over blocks of 16 rows about an origin near the mean, and in double across blocks.
#include "element.h"

namespace bcos::cpu::BCOS_ISA {
namespace {

constexpr int64_t kRows = 16;       // rows of a block
constexpr int64_t kChannels = 256;  // channels of a block: two float buffers of it stay in L1

template <class S>
void moments_rows(const void* x_, const void* origin_, double* sums, Layout l, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const int64_t C = l.channels;
  W first[kChannels], second[kChannels];
  for (int64_t r0 = begin; r0 < end; r0 += kRows) {
    const int64_t r1 = r0 + kRows < end ? r0 + kRows : end;
    for (int64_t c0 = 0; c0 < C; c0 += kChannels) {
      const int64_t count = C - c0 < kChannels ? C - c0 : kChannels;
      const W* __restrict origin = static_cast<const W*>(origin_) + c0;
      for (int64_t c = 0; c < count; c++) first[c] = second[c] = 0;
      for (int64_t r = r0; r < r1; r++) {
        const S* __restrict x = static_cast<const S*>(x_) + r * C + c0;
#pragma omp simd
        for (int64_t c = 0; c < count; c++) {
          const W d = load(x[c]) - origin[c];
          first[c] += d;
          second[c] += d * d;
        }
      }
      for (int64_t c = 0; c < count; c++) {
        sums[c0 + c] += first[c];
        sums[C + c0 + c] += second[c];
      }
    }
  }
}

template <class S>
void moments_planes(const void* x_, void* mean_, void* var_, Layout l, int64_t begin, int64_t end) {
  using W = Wide<S>;
  for (int64_t c = begin; c < end; c++) {
    const int64_t sample = l.pixels < 16 ? l.pixels : 16;
    W origin = 0;
    for (int64_t p = 0; p < sample; p++) origin += load(static_cast<const S*>(x_)[c * l.pixels + p]);
    origin = std::isfinite(origin) ? origin / sample : W(0);
    double first = 0, second = 0;
    for (int64_t image = 0; image < l.images; image++) {
      const S* __restrict x = static_cast<const S*>(x_) + (image * l.channels + c) * l.pixels;
      for (int64_t p0 = 0; p0 < l.pixels; p0 += 1024) {
        const int64_t p1 = p0 + 1024 < l.pixels ? p0 + 1024 : l.pixels;
        W a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
        for (int64_t p = p0; p < p1; p++) {
          const W d = load(x[p]) - origin;
          a += d;
          b += d * d;
        }
        first += a;
        second += b;
      }
    }
    const double count = static_cast<double>(l.images * l.pixels), shift = first / count;
    const double var = second / count - shift * shift;
    static_cast<W*>(mean_)[c] = static_cast<W>(origin + shift);
    static_cast<W*>(var_)[c] = static_cast<W>(var < 0 ? 0 : var);
  }
}

template <class W>
inline W relu(W v) {
  return v < 0 ? W(0) : v;  // NaN stays NaN
}

template <class S, bool has_residual, bool has_relu, bool has_squares>
void forward_rows(const BatchNormArguments& s, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const int64_t C = s.layout.channels;
  const W* __restrict scale = static_cast<const W*>(s.scale);
  const W* __restrict shift = static_cast<const W*>(s.shift);
  for (int64_t r = begin; r < end; r++) {
    const S* __restrict x = static_cast<const S*>(s.x) + r * C;
    const S* __restrict residual = has_residual ? static_cast<const S*>(s.residual) + r * C : x;
    S* __restrict y = static_cast<S*>(s.y) + r * C;
    W squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < C; c++) {
      W v = load(x[c]) * scale[c] + shift[c];
      if constexpr (has_residual) v += load(residual[c]);
      if constexpr (has_relu) v = relu(v);
      y[c] = store<S>(v);
      if constexpr (has_squares) squares += load(y[c]) * load(y[c]);
    }
    if constexpr (has_squares) static_cast<W*>(s.squares)[r] = squares;
  }
}

template <class S, bool has_residual, bool has_relu>
void forward_planes(const BatchNormArguments& s, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const int64_t P = s.layout.pixels;
  for (int64_t plane = begin; plane < end; plane++) {
    const int64_t c = plane % s.layout.channels;
    const W scale = static_cast<const W*>(s.scale)[c], shift = static_cast<const W*>(s.shift)[c];
    const S* __restrict x = static_cast<const S*>(s.x) + plane * P;
    const S* __restrict residual = has_residual ? static_cast<const S*>(s.residual) + plane * P : x;
    S* __restrict y = static_cast<S*>(s.y) + plane * P;
#pragma omp simd
    for (int64_t p = 0; p < P; p++) {
      W v = load(x[p]) * scale + shift;
      if constexpr (has_residual) v += load(residual[p]);
      if constexpr (has_relu) v = relu(v);
      y[p] = store<S>(v);
    }
  }
}

template <class S, bool has_residual, bool has_relu>
void forward_rows_of(const BatchNormArguments& s, int64_t begin, int64_t end) {
  s.squares != nullptr ? forward_rows<S, has_residual, has_relu, true>(s, begin, end)
                       : forward_rows<S, has_residual, has_relu, false>(s, begin, end);
}
template <class S>
void batch_norm_rows(const BatchNormArguments& s, int64_t begin, int64_t end) {
  if (s.residual != nullptr) {
    return s.relu ? forward_rows_of<S, true, true>(s, begin, end) : forward_rows_of<S, true, false>(s, begin, end);
  }
  return s.relu ? forward_rows_of<S, false, true>(s, begin, end) : forward_rows_of<S, false, false>(s, begin, end);
}
template <class S>
void batch_norm_planes(const BatchNormArguments& s, int64_t begin, int64_t end) {
  if (s.residual != nullptr) return s.relu ? forward_planes<S, true, true>(s, begin, end) : forward_planes<S, true, false>(s, begin, end);
  return s.relu ? forward_planes<S, false, true>(s, begin, end) : forward_planes<S, false, false>(s, begin, end);
}

// Where the ReLU's mask comes from: nowhere, the output, or the input by the forward's own formula, which saves reading
// the output (not with a residual).
enum class Mask { none, output, input };

inline Mask mask_of(const BatchNormBackwardArguments& s) {
  return s.mask_scale != nullptr ? Mask::input : s.y != nullptr ? Mask::output : Mask::none;
}

// The gradient behind the ReLU. A NaN passes it on, as in torch's.
template <class S, Mask mask>
inline Wide<S> masked(Wide<S> g, S x, S y, Wide<S> scale, Wide<S> shift) {
  using W = Wide<S>;
  if constexpr (mask == Mask::output) return load(y) <= 0 ? W(0) : g;
  if constexpr (mask == Mask::input) {
    const W v = load(x) * scale + shift;
    return load(store<S>(relu(v))) <= 0 ? W(0) : g;  // as it was stored: float16 rounds small values to 0
  }
  return g;
}

template <class S, Mask mask, bool writes>
void reduce_rows(const BatchNormBackwardArguments& s, int64_t chunk, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const int64_t C = s.layout.channels;
  double* sums = s.sums + chunk * 2 * C;
  const W* __restrict scale = static_cast<const W*>(mask == Mask::input ? s.mask_scale : s.scale);
  const W* __restrict shift = static_cast<const W*>(mask == Mask::input ? s.mask_shift : s.scale);
  W first[kChannels], second[kChannels];
  for (int64_t c = 0; c < 2 * C; c++) sums[c] = 0;
  for (int64_t r0 = begin; r0 < end; r0 += kRows) {
    const int64_t r1 = r0 + kRows < end ? r0 + kRows : end;
    for (int64_t c0 = 0; c0 < C; c0 += kChannels) {
      const int64_t count = C - c0 < kChannels ? C - c0 : kChannels;
      for (int64_t c = 0; c < count; c++) first[c] = second[c] = 0;
      for (int64_t r = r0; r < r1; r++) {
        const S* __restrict dy = static_cast<const S*>(s.dy) + r * C + c0;
        const S* __restrict x = static_cast<const S*>(s.x) + r * C + c0;
        const S* __restrict y = mask == Mask::output ? static_cast<const S*>(s.y) + r * C + c0 : dy;
        S* __restrict out = writes ? static_cast<S*>(s.dresidual) + r * C + c0 : nullptr;
#pragma omp simd
        for (int64_t c = 0; c < count; c++) {
          const W g = masked<S, mask>(load(dy[c]), x[c], y[c], scale[c0 + c], shift[c0 + c]);
          if constexpr (writes) out[c] = store<S>(g);
          first[c] += g;
          second[c] += g * load(x[c]);
        }
      }
      for (int64_t c = 0; c < count; c++) {
        sums[c0 + c] += first[c];
        sums[C + c0 + c] += second[c];
      }
    }
  }
}

template <class S>
void batch_norm_reduce_rows(const BatchNormBackwardArguments& s, int64_t chunk, int64_t begin, int64_t end) {
  switch (mask_of(s)) {
    case Mask::none: return reduce_rows<S, Mask::none, false>(s, chunk, begin, end);
    case Mask::input: return reduce_rows<S, Mask::input, false>(s, chunk, begin, end);
    case Mask::output: break;
  }
  if (s.dresidual == nullptr) return reduce_rows<S, Mask::output, false>(s, chunk, begin, end);
  return reduce_rows<S, Mask::output, true>(s, chunk, begin, end);
}

template <class S, Mask mask, bool writes>
void reduce_planes(const BatchNormBackwardArguments& s, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const int64_t P = s.layout.pixels, C = s.layout.channels;
  for (int64_t c = begin; c < end; c++) {
    const W scale = mask == Mask::input ? static_cast<const W*>(s.mask_scale)[c] : W(0);
    const W shift = mask == Mask::input ? static_cast<const W*>(s.mask_shift)[c] : W(0);
    double first = 0, second = 0;
    for (int64_t image = 0; image < s.layout.images; image++) {
      const int64_t at = (image * C + c) * P;
      const S* __restrict dy = static_cast<const S*>(s.dy) + at;
      const S* __restrict x = static_cast<const S*>(s.x) + at;
      const S* __restrict y = mask == Mask::output ? static_cast<const S*>(s.y) + at : dy;
      S* __restrict out = writes ? static_cast<S*>(s.dresidual) + at : nullptr;
      for (int64_t p0 = 0; p0 < P; p0 += 1024) {
        const int64_t p1 = p0 + 1024 < P ? p0 + 1024 : P;
        W a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
        for (int64_t p = p0; p < p1; p++) {
          const W g = masked<S, mask>(load(dy[p]), x[p], y[p], scale, shift);
          if constexpr (writes) out[p] = store<S>(g);
          a += g;
          b += g * load(x[p]);
        }
        first += a;
        second += b;
      }
    }
    s.sums[c] = first;
    s.sums[C + c] = second;
  }
}

template <class S>
void batch_norm_reduce_planes(const BatchNormBackwardArguments& s, int64_t begin, int64_t end) {
  switch (mask_of(s)) {
    case Mask::none: return reduce_planes<S, Mask::none, false>(s, begin, end);
    case Mask::input: return reduce_planes<S, Mask::input, false>(s, begin, end);
    case Mask::output: break;
  }
  if (s.dresidual == nullptr) return reduce_planes<S, Mask::output, false>(s, begin, end);
  return reduce_planes<S, Mask::output, true>(s, begin, end);
}

template <class S, Mask mask, bool with_x>
void apply_rows(const BatchNormBackwardArguments& s, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const int64_t C = s.layout.channels;
  const W* __restrict scale = static_cast<const W*>(s.scale);
  const W* __restrict factor = static_cast<const W*>(s.factor);
  const W* __restrict mean = static_cast<const W*>(s.mean);
  const W* __restrict mask_scale = static_cast<const W*>(mask == Mask::input ? s.mask_scale : s.scale);
  const W* __restrict mask_shift = static_cast<const W*>(mask == Mask::input ? s.mask_shift : s.scale);
  for (int64_t r = begin; r < end; r++) {
    const S* __restrict dy = static_cast<const S*>(s.dy) + r * C;
    const S* __restrict x = with_x || mask == Mask::input ? static_cast<const S*>(s.x) + r * C : dy;
    const S* __restrict y = mask == Mask::output ? static_cast<const S*>(s.y) + r * C : dy;
    S* __restrict dx = static_cast<S*>(s.dx) + r * C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) {
      const W g = masked<S, mask>(load(dy[c]), x[c], y[c], mask_scale[c], mask_shift[c]);
      W v = g * scale[c];
      if constexpr (with_x) v += factor[c] * (load(x[c]) - mean[c]);
      dx[c] = store<S>(v);
    }
  }
}

template <class S, Mask mask>
void apply_rows_of(const BatchNormBackwardArguments& s, int64_t begin, int64_t end) {
  s.factor != nullptr ? apply_rows<S, mask, true>(s, begin, end) : apply_rows<S, mask, false>(s, begin, end);
}

template <class S>
void batch_norm_backward_rows(const BatchNormBackwardArguments& s, int64_t begin, int64_t end) {
  switch (mask_of(s)) {
    case Mask::none: return apply_rows_of<S, Mask::none>(s, begin, end);
    case Mask::output: return apply_rows_of<S, Mask::output>(s, begin, end);
    case Mask::input: return apply_rows_of<S, Mask::input>(s, begin, end);
  }
}

template <class S, Mask mask, bool with_x>
void apply_planes(const BatchNormBackwardArguments& s, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const int64_t P = s.layout.pixels;
  for (int64_t plane = begin; plane < end; plane++) {
    const int64_t c = plane % s.layout.channels, at = plane * P;
    const W scale = static_cast<const W*>(s.scale)[c];
    const W factor = with_x ? static_cast<const W*>(s.factor)[c] : W(0);
    const W mean = with_x ? static_cast<const W*>(s.mean)[c] : W(0);
    const S* __restrict dy = static_cast<const S*>(s.dy) + at;
    const W mask_scale = mask == Mask::input ? static_cast<const W*>(s.mask_scale)[c] : W(0);
    const W mask_shift = mask == Mask::input ? static_cast<const W*>(s.mask_shift)[c] : W(0);
    const S* __restrict x = with_x || mask == Mask::input ? static_cast<const S*>(s.x) + at : dy;
    const S* __restrict y = mask == Mask::output ? static_cast<const S*>(s.y) + at : dy;
    S* __restrict dx = static_cast<S*>(s.dx) + at;
#pragma omp simd
    for (int64_t p = 0; p < P; p++) {
      const W g = masked<S, mask>(load(dy[p]), x[p], y[p], mask_scale, mask_shift);
      W v = g * scale;
      if constexpr (with_x) v += factor * (load(x[p]) - mean);
      dx[p] = store<S>(v);
    }
  }
}

template <class S, Mask mask>
void apply_planes_of(const BatchNormBackwardArguments& s, int64_t begin, int64_t end) {
  s.factor != nullptr ? apply_planes<S, mask, true>(s, begin, end) : apply_planes<S, mask, false>(s, begin, end);
}

template <class S>
void batch_norm_backward_planes(const BatchNormBackwardArguments& s, int64_t begin, int64_t end) {
  switch (mask_of(s)) {
    case Mask::none: return apply_planes_of<S, Mask::none>(s, begin, end);
    case Mask::output: return apply_planes_of<S, Mask::output>(s, begin, end);
    case Mask::input: return apply_planes_of<S, Mask::input>(s, begin, end);
  }
}

}  // namespace

void register_batch_norm(Kernels* table, Type type) {
  BCOS_FOR_TYPE(type, S, {
    table->moments_rows = moments_rows<S>;
    table->moments_planes = moments_planes<S>;
    table->batch_norm_rows = batch_norm_rows<S>;
    table->batch_norm_planes = batch_norm_planes<S>;
    table->batch_norm_reduce_rows = batch_norm_reduce_rows<S>;
    table->batch_norm_reduce_planes = batch_norm_reduce_planes<S>;
    table->batch_norm_backward_rows = batch_norm_backward_rows<S>;
    table->batch_norm_backward_planes = batch_norm_backward_planes<S>;
  })
}

}  // namespace bcos::cpu::BCOS_ISA
