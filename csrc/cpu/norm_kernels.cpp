// Norms of patches and rows, their gradient, and weight normalisation.
//
//   linear  n = |x| + 1e-12 per row
//   conv    n = sqrt(box filter of sum_c x^2 + 1e-6) per window and group: x is read once, the rest is one channel wide
//   gradient of the norm: dx + x * (transposed box filter of q), q = (dL/dn)/n
//   weights w_hat = w/|w| per unit, dw = (dw_hat - w_hat (w_hat . dw_hat))/|w|; a unit of norm 0 gives 0
//
// Traffic: sum_squares reads x; add_norm_term reads x and dx and writes their sum; the maps are 1/C of an activation.
#include "groups.h"

namespace bcos::cpu::BCOS_ISA {
namespace {

// Sum of squares of n contiguous values; W accumulators, reassociated by the compiler.
template <class S>
inline Wide<S> sum_squares(const S* __restrict x, int64_t n) {
  using W = Wide<S>;
  W sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) {
    const W v = load(x[i]);
    sum += v * v;
  }
  return sum;
}

template <class S>
void norm_rows(const void* x_, void* n_, int64_t columns, bool linear, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const S* x = static_cast<const S*>(x_);
  W* n = static_cast<W*>(n_);
  const W inside = linear ? W(0) : W(kConvNormEps), outside = linear ? W(kLinearNormEps) : W(0);
  for (int64_t r = begin; r < end; r++) n[r] = std::sqrt(sum_squares(x + r * columns, columns) + inside) + outside;
}

template <class S>
void norms_of_squares(const void* squares_, void* n_, bool linear, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const W* squares = static_cast<const W*>(squares_);  // may be n itself
  W* n = static_cast<W*>(n_);
  const W inside = linear ? W(0) : W(kConvNormEps), outside = linear ? W(kLinearNormEps) : W(0);
#pragma omp simd
  for (int64_t r = begin; r < end; r++) n[r] = std::sqrt(squares[r] + inside) + outside;
}

// Rows of a few channels (images): vectors go across rows instead of along one.
template <class S, int C>
void sum_squares_short_rows(const S* __restrict x, Wide<S>* __restrict map, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t r = begin; r < end; r++) {
    Wide<S> sum = 0;
    for (int c = 0; c < C; c++) {
      const Wide<S> v = load(x[r * C + c]);
      sum += v * v;
    }
    map[r] = sum;
  }
}
template <class S, int C>
void add_norm_term_short_rows(
    S* out, const S* dx, const S* __restrict x, const Wide<S>* __restrict map, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t r = begin; r < end; r++) {
    for (int c = 0; c < C; c++) out[r * C + c] = store<S>(load(dx[r * C + c]) + load(x[r * C + c]) * map[r]);
  }
}

template <class S>
void sum_squares_rows(const void* x_, void* map_, Layout l, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const S* x = static_cast<const S*>(x_);
  W* map = static_cast<W*>(map_);
  if (l.groups == 1) {
    switch (l.channels) {
      case 1: return sum_squares_short_rows<S, 1>(x, map, begin, end);
      case 3: return sum_squares_short_rows<S, 3>(x, map, begin, end);
      case 6: return sum_squares_short_rows<S, 6>(x, map, begin, end);
      default: break;
    }
  }
  const int64_t per_group = l.channels / l.groups;
  for (int64_t r = begin; r < end; r++) {
    for (int64_t g = 0; g < l.groups; g++) {
      map[r * l.groups + g] = sum_squares(x + r * l.channels + g * per_group, per_group);
    }
  }
}

template <class S>
void sum_squares_planes(const void* x_, void* map_, Layout l, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const S* x = static_cast<const S*>(x_);
  W* map = static_cast<W*>(map_);
  const int64_t per_group = l.channels / l.groups;
  for (int64_t item = begin; item < end; item++) {  // (image, group)
    W* __restrict out = map + item * l.pixels;
    for (int64_t p = 0; p < l.pixels; p++) out[p] = 0;
    for (int64_t c = 0; c < per_group; c++) {
      const S* __restrict plane = x + (item * per_group + c) * l.pixels;
#pragma omp simd
      for (int64_t p = 0; p < l.pixels; p++) {
        const W v = load(plane[p]);
        out[p] += v * v;
      }
    }
  }
}

// First and one past the last window position o with 0 <= o * stride + offset < size.
inline void valid_range(int64_t offset, int64_t stride, int64_t size, int64_t count, int64_t* first, int64_t* last) {
  *first = offset >= 0 ? 0 : (-offset + stride - 1) / stride;
  *last = offset >= size ? 0 : (size - 1 - offset) / stride + 1;
  if (*last > count) *last = count;
  if (*first > *last) *first = *last;
}

// Box filter, columns then rows; scratch: one (height, out_width) map per item.
template <class S>
void window_norm(const void* map_, void* n_, void* scratch_, const Window& w, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const bool pointwise = w.kernel[0] * w.kernel[1] == 1 && w.padding[0] == 0 && w.padding[1] == 0 &&
                         w.stride[0] == 1 && w.stride[1] == 1;
  for (int64_t item = begin; item < end; item++) {
    const W* map = static_cast<const W*>(map_) + item * w.height * w.width;
    W* __restrict n = static_cast<W*>(n_) + item * w.out_height * w.out_width;
    const int64_t count = w.out_height * w.out_width;
    if (pointwise) {
      for (int64_t i = 0; i < count; i++) n[i] = std::sqrt(map[i] + W(kConvNormEps));
      continue;
    }
    W* __restrict sums = static_cast<W*>(scratch_) + item * w.height * w.out_width;
    for (int64_t h = 0; h < w.height; h++) {
      W* __restrict out = sums + h * w.out_width;
      const W* __restrict row = map + h * w.width;
      for (int64_t q = 0; q < w.out_width; q++) out[q] = 0;
      for (int64_t k = 0; k < w.kernel[1]; k++) {
        const int64_t offset = k * w.dilation[1] - w.padding[1];
        int64_t first, last;
        valid_range(offset, w.stride[1], w.width, w.out_width, &first, &last);
        for (int64_t q = first; q < last; q++) out[q] += row[q * w.stride[1] + offset];
      }
    }
    for (int64_t p = 0; p < w.out_height; p++) {
      W* __restrict out = n + p * w.out_width;
      for (int64_t q = 0; q < w.out_width; q++) out[q] = 0;
      for (int64_t k = 0; k < w.kernel[0]; k++) {
        const int64_t h = p * w.stride[0] + k * w.dilation[0] - w.padding[0];
        if (h < 0 || h >= w.height) continue;
        const W* __restrict row = sums + h * w.out_width;
        for (int64_t q = 0; q < w.out_width; q++) out[q] += row[q];
      }
    }
    for (int64_t i = 0; i < count; i++) n[i] = std::sqrt(n[i] + W(kConvNormEps));
  }
}

// The transposed box filter: rows, then columns.
template <class S>
void window_spread(const void* q_, void* map_, void* scratch_, const Window& w, int64_t begin, int64_t end) {
  using W = Wide<S>;
  for (int64_t item = begin; item < end; item++) {
    const W* q_map = static_cast<const W*>(q_) + item * w.out_height * w.out_width;
    W* map = static_cast<W*>(map_) + item * w.height * w.width;
    W* sums = static_cast<W*>(scratch_) + item * w.height * w.out_width;
    for (int64_t i = 0; i < w.height * w.out_width; i++) sums[i] = 0;
    for (int64_t p = 0; p < w.out_height; p++) {
      const W* __restrict row = q_map + p * w.out_width;
      for (int64_t k = 0; k < w.kernel[0]; k++) {
        const int64_t h = p * w.stride[0] + k * w.dilation[0] - w.padding[0];
        if (h < 0 || h >= w.height) continue;
        W* __restrict out = sums + h * w.out_width;
        for (int64_t q = 0; q < w.out_width; q++) out[q] += row[q];
      }
    }
    for (int64_t h = 0; h < w.height; h++) {
      const W* __restrict row = sums + h * w.out_width;
      W* __restrict out = map + h * w.width;
      for (int64_t i = 0; i < w.width; i++) out[i] = 0;
      for (int64_t k = 0; k < w.kernel[1]; k++) {
        const int64_t offset = k * w.dilation[1] - w.padding[1];
        int64_t first, last;
        valid_range(offset, w.stride[1], w.width, w.out_width, &first, &last);
        for (int64_t q = first; q < last; q++) out[q * w.stride[1] + offset] += row[q];
      }
    }
  }
}

// Shifts a row of windows by a tap: f(first window, first pixel, number of them) for runs that lie together in both, all
// of the row where the stride is 1.
template <class F>
inline void for_tap(const Window& w, int64_t tap, const F& f) {
  const int64_t offset = tap * w.dilation[1] - w.padding[1];
  int64_t first, last;
  valid_range(offset, w.stride[1], w.width, w.out_width, &first, &last);
  if (w.stride[1] == 1) {
    if (last > first) f(first, first + offset, last - first);
    return;
  }
  for (int64_t q = first; q < last; q++) f(q, q * w.stride[1] + offset, 1);
}

// Box filter with the groups innermost, so that vectors go along them. of_x: one channel a group, whose squares are taken
// here. scratch: (width, groups).
template <class S, class From>
void window_norm_rows_of(
    const From* from, bool square, Wide<S>* n, Wide<S>* __restrict sums, const Window& w, int64_t G, int64_t begin, int64_t end) {
  using W = Wide<S>;
  for (int64_t item = begin; item < end; item++) {  // (image, p)
    const int64_t image = item / w.out_height, p = item % w.out_height, count = w.width * G;
    for (int64_t i = 0; i < count; i++) sums[i] = 0;
    for (int64_t k = 0; k < w.kernel[0]; k++) {
      const int64_t h = p * w.stride[0] + k * w.dilation[0] - w.padding[0];
      if (h < 0 || h >= w.height) continue;
      const From* __restrict row = from + (image * w.height + h) * count;
      if (square) {
#pragma omp simd
        for (int64_t i = 0; i < count; i++) sums[i] += static_cast<W>(load(row[i])) * static_cast<W>(load(row[i]));
      } else {
#pragma omp simd
        for (int64_t i = 0; i < count; i++) sums[i] += static_cast<W>(load(row[i]));
      }
    }
    W* __restrict out = n + item * w.out_width * G;
    for (int64_t i = 0; i < w.out_width * G; i++) out[i] = 0;
    for (int64_t k = 0; k < w.kernel[1]; k++) {
      for_tap(w, k, [&](int64_t q, int64_t pixel, int64_t run) {
        W* __restrict to = out + q * G;
        const W* __restrict add = sums + pixel * G;
#pragma omp simd
        for (int64_t i = 0; i < run * G; i++) to[i] += add[i];
      });
    }
#pragma omp simd
    for (int64_t i = 0; i < w.out_width * G; i++) out[i] = std::sqrt(out[i] + W(kConvNormEps));
  }
}

template <class S>
void window_norm_rows(
    const void* from, bool of_x, void* n, void* scratch, const Window& w, int64_t groups, int64_t begin, int64_t end) {
  using W = Wide<S>;
  W *to = static_cast<W*>(n), *sums = static_cast<W*>(scratch);
  if (of_x) return window_norm_rows_of<S>(static_cast<const S*>(from), true, to, sums, w, groups, begin, end);
  window_norm_rows_of<S>(static_cast<const W*>(from), false, to, sums, w, groups, begin, end);
}

// dx += x * factor, one factor for per_group channels.
template <class S>
void add_products(S* __restrict dx, const S* __restrict x, const Wide<S>* __restrict factor, int64_t groups, int64_t per_group) {
  using W = Wide<S>;
  const Layout l{1, 1, groups * per_group, groups, true};
  if (per_group == 1) {
#pragma omp simd
    for (int64_t i = 0; i < groups; i++) dx[i] = store<S>(load(dx[i]) + load(x[i]) * factor[i]);
  } else if (has_short_groups(l)) {
    W factors[kBlock];
    for_blocks_of_groups(l, [&](int64_t group, int64_t first, int64_t count, int64_t channels) {
      repeat(factors, factor + group, count, per_group);
#pragma omp simd
      for (int64_t c = 0; c < channels; c++) dx[first + c] = store<S>(load(dx[first + c]) + load(x[first + c]) * factors[c]);
    });
  } else {
    for (int64_t g = 0; g < groups; g++) {
      const W value = factor[g];
#pragma omp simd
      for (int64_t c = g * per_group; c < (g + 1) * per_group; c++) dx[c] = store<S>(load(dx[c]) + load(x[c]) * value);
    }
  }
}

// dx += x * (transposed box filter of q), groups innermost. scratch: (out_width + width, groups).
template <class S>
void window_spread_rows(
    const void* q_, void* dx_, const void* x_, void* scratch, const Window& w, Layout l, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const int64_t G = l.groups, per_group = l.channels / G, windows = w.out_width * G, pixels = w.width * G;
  W* __restrict sums = static_cast<W*>(scratch);
  W* __restrict map = sums + windows;
  for (int64_t item = begin; item < end; item++) {  // (image, h)
    const int64_t image = item / w.height, h = item % w.height;
    for (int64_t i = 0; i < windows; i++) sums[i] = 0;
    for (int64_t k = 0; k < w.kernel[0]; k++) {
      const int64_t at = h + w.padding[0] - k * w.dilation[0], p = at / w.stride[0];
      if (at < 0 || at % w.stride[0] != 0 || p >= w.out_height) continue;
      const W* __restrict row = static_cast<const W*>(q_) + (image * w.out_height + p) * windows;
#pragma omp simd
      for (int64_t i = 0; i < windows; i++) sums[i] += row[i];
    }
    for (int64_t i = 0; i < pixels; i++) map[i] = 0;
    for (int64_t k = 0; k < w.kernel[1]; k++) {
      for_tap(w, k, [&](int64_t q, int64_t pixel, int64_t run) {
        W* __restrict to = map + pixel * G;
        const W* __restrict add = sums + q * G;
#pragma omp simd
        for (int64_t i = 0; i < run * G; i++) to[i] += add[i];
      });
    }
    S* __restrict dx = static_cast<S*>(dx_) + item * w.width * l.channels;
    const S* __restrict x = static_cast<const S*>(x_) + item * w.width * l.channels;
    add_products(dx, x, map, pixels, per_group);
  }
}

template <class S>
void add_norm_term_rows(
    void* out_, const void* dx_, const void* x_, const void* map_, Layout l, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const W* map = static_cast<const W*>(map_);
  if (l.groups == 1) {
    S* out = static_cast<S*>(out_);
    const S *dx = static_cast<const S*>(dx_), *x = static_cast<const S*>(x_);
    switch (l.channels) {
      case 1: return add_norm_term_short_rows<S, 1>(out, dx, x, map, begin, end);
      case 3: return add_norm_term_short_rows<S, 3>(out, dx, x, map, begin, end);
      case 6: return add_norm_term_short_rows<S, 6>(out, dx, x, map, begin, end);
      default: break;
    }
  }
  const int64_t per_group = l.channels / l.groups;
  for (int64_t r = begin; r < end; r++) {
    for (int64_t g = 0; g < l.groups; g++) {
      const W factor = map[r * l.groups + g];
      S* out = static_cast<S*>(out_) + r * l.channels + g * per_group;  // may be dx itself
      const S* dx = static_cast<const S*>(dx_) + r * l.channels + g * per_group;
      const S* __restrict x = static_cast<const S*>(x_) + r * l.channels + g * per_group;
#pragma omp simd
      for (int64_t c = 0; c < per_group; c++) out[c] = store<S>(load(dx[c]) + load(x[c]) * factor);
    }
  }
}

template <class S>
void add_norm_term_planes(
    void* out_, const void* dx_, const void* x_, const void* map_, Layout l, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const int64_t per_group = l.channels / l.groups;
  for (int64_t plane = begin; plane < end; plane++) {  // (image, channel)
    const W* __restrict map = static_cast<const W*>(map_) + plane / per_group * l.pixels;
    S* out = static_cast<S*>(out_) + plane * l.pixels;
    const S* dx = static_cast<const S*>(dx_) + plane * l.pixels;
    const S* __restrict x = static_cast<const S*>(x_) + plane * l.pixels;
#pragma omp simd
    for (int64_t p = 0; p < l.pixels; p++) out[p] = store<S>(load(dx[p]) + load(x[p]) * map[p]);
  }
}

template <class S>
void normalize_weight(const void* w_, void* w_hat_, int64_t columns, int64_t begin, int64_t end) {
  using W = Wide<S>;
  for (int64_t o = begin; o < end; o++) {
    const S* __restrict w = static_cast<const S*>(w_) + o * columns;
    S* __restrict w_hat = static_cast<S*>(w_hat_) + o * columns;
    const W squares = sum_squares(w, columns);
    const W reciprocal = squares == 0 ? W(0) : 1 / std::sqrt(squares);
#pragma omp simd
    for (int64_t k = 0; k < columns; k++) w_hat[k] = store<S>(load(w[k]) * reciprocal);
  }
}

template <class S>
void weight_norm_backward(
    const void* dw_hat_, const void* w_, void* dw_, int64_t columns, int64_t begin, int64_t end) {
  using W = Wide<S>;
  for (int64_t o = begin; o < end; o++) {
    const S* __restrict dw_hat = static_cast<const S*>(dw_hat_) + o * columns;
    const S* __restrict w = static_cast<const S*>(w_) + o * columns;
    S* __restrict dw = static_cast<S*>(dw_) + o * columns;
    // In double, and from w itself instead of the rounded w_hat: what is left after the projection is often small.
    double dot = 0, squares = 0;
#pragma omp simd reduction(+ : dot, squares)
    for (int64_t k = 0; k < columns; k++) {
      const double v = load(w[k]);
      dot += load(dw_hat[k]) * v;
      squares += v * v;
    }
    const double along = squares == 0 ? 0 : dot / squares, reciprocal = squares == 0 ? 0 : 1 / std::sqrt(squares);
#pragma omp simd
    for (int64_t k = 0; k < columns; k++) {
      dw[k] = store<S>(static_cast<W>((load(dw_hat[k]) - load(w[k]) * along) * reciprocal));
    }
  }
}

}  // namespace

void register_norm(Kernels* table, Type type) {
  BCOS_FOR_TYPE(type, S, {
    table->norm_rows = norm_rows<S>;
    table->norms_of_squares = norms_of_squares<S>;
    table->sum_squares_rows = sum_squares_rows<S>;
    table->sum_squares_planes = sum_squares_planes<S>;
    table->window_norm = window_norm<S>;
    table->window_spread = window_spread<S>;
    table->window_norm_rows = window_norm_rows<S>;
    table->window_spread_rows = window_spread_rows<S>;
    table->add_norm_term_rows = add_norm_term_rows<S>;
    table->add_norm_term_planes = add_norm_term_planes<S>;
    table->normalize_weight = normalize_weight<S>;
    table->weight_norm_backward = weight_norm_backward<S>;
  })
}

}  // namespace bcos::cpu::BCOS_ISA
