// Layer normalisation of rows.
//
//   forward    mean, rstd = 1/sqrt(var + eps), y = (x - mean) rstd w + b, squares = sum y^2 per row, for the norms of the
//              next layer
//   backward   g = dy w, x^ = (x - mean) rstd:  dx = rstd (g - mean of g - x^ mean of g x^), the last term not in
//              explanation mode;  dw = sum dy x^, db = sum dy over rows
//
// Numerics: two passes for the moments, the second also telling what rounding left of the mean, so that a mean far from 0
// costs no digits; dw and db in float over blocks of rows, in double across them.
// Traffic: forward reads x and writes y, backward reads dy and x and writes dx; the passes over a row in between are from
// the nearest cache. Rows go in fours: the additions of one row's sum wait for each other, those of four do not.
#include "element.h"

namespace bcos::cpu::BCOS_ISA {
namespace {

constexpr int kTogether = 4;
constexpr int64_t kNear = 12 << 10;  // bytes
constexpr int64_t kRows = 64;  // rows whose shares of dw and db are summed in float

static_assert(kRows % kTogether == 0, "a block ends with four rows");

// Rows r to r + 3; past the end the last one again, so that there is one loop only.
template <class S>
struct Four {
  const S* of[kTogether];
  Four(const void* base, int64_t columns, int64_t r, int64_t end) {
    for (int i = 0; i < kTogether; i++) of[i] = static_cast<const S*>(base) + (r + i < end ? r + i : end - 1) * columns;
  }
};

// The next rows, on their way to the cache while these are worked on: to the nearest one unless they would drive these out
// (24 KB of 1536 floats did: a seventh of the forward's time).
template <class S>
inline void fetch(const void* base, int64_t columns, int64_t r, int64_t end) {
  const int64_t stop = r + kTogether < end ? r + kTogether : end;
  const char *p = reinterpret_cast<const char*>(static_cast<const S*>(base) + r * columns);
  const char *last = reinterpret_cast<const char*>(static_cast<const S*>(base) + stop * columns);
  if (last - p <= kNear) {
    for (; p < last; p += 64) __builtin_prefetch(p);
  } else {
    for (; p < last; p += 64) __builtin_prefetch(p, 0, 2);
  }
}

template <class S>
inline void sums(const Four<S>& x, int64_t n, Wide<S>* sum) {
  const S *__restrict x0 = x.of[0], *__restrict x1 = x.of[1], *__restrict x2 = x.of[2], *__restrict x3 = x.of[3];
  Wide<S> a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < n; i++) {
    a += load(x0[i]);
    b += load(x1[i]);
    c += load(x2[i]);
    d += load(x3[i]);
  }
  sum[0] = a, sum[1] = b, sum[2] = c, sum[3] = d;
}

// Sums of x - mean and of its square.
template <class S>
inline void moments(const Four<S>& x, int64_t n, const Wide<S>* mean, Wide<S>* first, Wide<S>* second) {
  using W = Wide<S>;
  const S *__restrict x0 = x.of[0], *__restrict x1 = x.of[1], *__restrict x2 = x.of[2], *__restrict x3 = x.of[3];
  const W m0 = mean[0], m1 = mean[1], m2 = mean[2], m3 = mean[3];
  W a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0;
#pragma omp simd reduction(+ : a, b, c, d, e, f, g, h)
  for (int64_t i = 0; i < n; i++) {
    const W v0 = load(x0[i]) - m0, v1 = load(x1[i]) - m1, v2 = load(x2[i]) - m2, v3 = load(x3[i]) - m3;
    a += v0;
    b += v1;
    c += v2;
    d += v3;
    e += v0 * v0;
    f += v1 * v1;
    g += v2 * v2;
    h += v3 * v3;
  }
  first[0] = a, first[1] = b, first[2] = c, first[3] = d;
  second[0] = e, second[1] = f, second[2] = g, second[3] = h;
}

// What a row's y is made of: y = (x - mean - slip) rstd w + b.
template <class W>
struct Moment {
  W mean, slip, rstd;
};

template <class S>
inline S normalized(S x, const Moment<Wide<S>>& m, Wide<S> scale, Wide<S> shift) {
  return store<S>((load(x) - m.mean - m.slip) * m.rstd * scale + shift);
}

template <class W>
inline W square(W v) {
  return v * v;
}

// y of four rows, and their sums of squares.
template <class S, bool emits>
inline void write_four(
    const Four<S>& x, S* y, const Wide<S>* __restrict scale, const Wide<S>* __restrict shift, int64_t n,
    const Moment<Wide<S>>* m, Wide<S>* squares) {
  using W = Wide<S>;
  S *__restrict y0 = y, *__restrict y1 = y + n, *__restrict y2 = y + 2 * n, *__restrict y3 = y + 3 * n;
  const S *__restrict x0 = x.of[0], *__restrict x1 = x.of[1], *__restrict x2 = x.of[2], *__restrict x3 = x.of[3];
  const Moment<W> m0 = m[0], m1 = m[1], m2 = m[2], m3 = m[3];
  W a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < n; i++) {
    const W w = scale[i], v = shift[i];
    y0[i] = normalized(x0[i], m0, w, v);
    y1[i] = normalized(x1[i], m1, w, v);
    y2[i] = normalized(x2[i], m2, w, v);
    y3[i] = normalized(x3[i], m3, w, v);
    if constexpr (emits) {
      a += square(load(y0[i]));
      b += square(load(y1[i]));
      c += square(load(y2[i]));
      d += square(load(y3[i]));
    }
  }
  if constexpr (emits) squares[0] = a, squares[1] = b, squares[2] = c, squares[3] = d;
}

template <class S>
inline Wide<S> write(
    const S* __restrict x, S* __restrict y, const Wide<S>* __restrict scale, const Wide<S>* __restrict shift, int64_t n,
    const Moment<Wide<S>>& m) {
  Wide<S> squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; i++) {
    y[i] = normalized(x[i], m, scale[i], shift[i]);
    squares += square(load(y[i]));
  }
  return squares;
}

template <class S, bool emits>
void forward(const LayerNormArguments& s, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const int64_t n = s.columns;
  const W count = static_cast<W>(n), eps = static_cast<W>(s.eps);
  const W *scale = static_cast<const W*>(s.scale), *shift = static_cast<const W*>(s.shift);
  W *means = static_cast<W*>(s.mean), *rstds = static_cast<W*>(s.rstd), *squares = static_cast<W*>(s.squares);
  for (int64_t r = begin; r < end; r += kTogether) {
    const Four<S> x(s.x, n, r, end);
    fetch<S>(s.x, n, r + kTogether, end);
    W mean[kTogether], first[kTogether], second[kTogether];
    Moment<W> m[kTogether];
    sums(x, n, mean);
    for (W& v : mean) v /= count;
    moments(x, n, mean, first, second);
    for (int i = 0; i < kTogether; i++) {
      const W slip = first[i] / count, var = second[i] / count - slip * slip;
      m[i] = {mean[i], slip, 1 / std::sqrt((var < 0 ? W(0) : var) + eps)};
      if (r + i >= end) continue;
      means[r + i] = mean[i] + slip;
      rstds[r + i] = m[i].rstd;
    }
    S* y = static_cast<S*>(s.y) + r * n;
    if (r + kTogether <= end) {
      write_four<S, emits>(x, y, scale, shift, n, m, emits ? squares + r : nullptr);
      continue;
    }
    for (int i = 0; r + i < end; i++) {
      const W sum = write(x.of[i], y + i * n, scale, shift, n, m[i]);
      if (emits) squares[r + i] = sum;
    }
  }
}

template <class S>
void layer_norm_rows(const LayerNormArguments& s, int64_t begin, int64_t end) {
  s.squares != nullptr ? forward<S, true>(s, begin, end) : forward<S, false>(s, begin, end);
}

// Sums of g and of g (x - mean).
template <class S>
inline void products(
    const Four<S>& dy, const Four<S>& x, const Wide<S>* __restrict scale, int64_t n, const Wide<S>* mean, Wide<S>* first,
    Wide<S>* second) {
  using W = Wide<S>;
  const S *__restrict x0 = x.of[0], *__restrict x1 = x.of[1], *__restrict x2 = x.of[2], *__restrict x3 = x.of[3];
  const S *__restrict y0 = dy.of[0], *__restrict y1 = dy.of[1], *__restrict y2 = dy.of[2], *__restrict y3 = dy.of[3];
  const W m0 = mean[0], m1 = mean[1], m2 = mean[2], m3 = mean[3];
  W a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0;
#pragma omp simd reduction(+ : a, b, c, d, e, f, g, h)
  for (int64_t i = 0; i < n; i++) {
    const W g0 = load(y0[i]) * scale[i], g1 = load(y1[i]) * scale[i];
    const W g2 = load(y2[i]) * scale[i], g3 = load(y3[i]) * scale[i];
    a += g0;
    b += g1;
    c += g2;
    d += g3;
    e += g0 * (load(x0[i]) - m0);
    f += g1 * (load(x1[i]) - m1);
    g += g2 * (load(x2[i]) - m2);
    h += g3 * (load(x3[i]) - m3);
  }
  first[0] = a, first[1] = b, first[2] = c, first[3] = d;
  second[0] = e, second[1] = f, second[2] = g, second[3] = h;
}

// What a row's dx is made of: dx = g slope - of_one - of_x x^. slope: rstd, or 0 of a single column, whose dx would else be
// what rounding leaves.
template <class W>
struct Row {
  W mean, rstd, slope, of_one, of_x;
};

// dx of R rows, and their shares of dw and db.
template <class S, int R, bool has_dx, bool has_sums>
inline void apply(
    const S* const* dy, const S* const* x, S* dx, const Wide<S>* __restrict scale, int64_t n, const Row<Wide<S>>* rows,
    Wide<S>* __restrict dw, Wide<S>* __restrict db) {
  using W = Wide<S>;
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    W of_dw = 0, of_db = 0;
#pragma GCC unroll 4
    for (int k = 0; k < R; k++) {
      const W gradient = load(dy[k][i]), x_hat = (load(x[k][i]) - rows[k].mean) * rows[k].rstd;
      if constexpr (has_sums) {
        of_dw += gradient * x_hat;
        of_db += gradient;
      }
      if constexpr (has_dx) {
        dx[k * n + i] = store<S>(gradient * scale[i] * rows[k].slope - rows[k].of_one - rows[k].of_x * x_hat);
      }
    }
    if constexpr (has_sums) {
      dw[i] += of_dw;
      db[i] += of_db;
    }
  }
}

template <class S, bool has_dx, bool has_sums>
void backward(const LayerNormBackwardArguments& s, int64_t chunk, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const int64_t n = s.columns;
  const W count = static_cast<W>(n);
  const W *scale = static_cast<const W*>(s.scale), *means = static_cast<const W*>(s.mean);
  const W* rstds = static_cast<const W*>(s.rstd);
  double* total = has_sums ? s.sums + chunk * 2 * n : nullptr;
  W *dw = has_sums ? static_cast<W*>(s.scratch) + chunk * 2 * n : nullptr, *db = has_sums ? dw + n : nullptr;
  for (int64_t i = 0; has_sums && i < 2 * n; i++) total[i] = 0;
  for (int64_t r0 = begin; r0 < end; r0 += kRows) {
    const int64_t r1 = r0 + kRows < end ? r0 + kRows : end;
    for (int64_t i = 0; has_sums && i < 2 * n; i++) dw[i] = 0;
    for (int64_t r = r0; r < r1; r += kTogether) {
      const Four<S> dy(s.dy, n, r, end), x(s.x, n, r, end);
      fetch<S>(s.dy, n, r + kTogether, end);
      Row<W> rows[kTogether];
      W mean[kTogether], first[kTogether], second[kTogether];
      for (int i = 0; i < kTogether; i++) {
        const int64_t row = r + i < end ? r + i : end - 1;
        mean[i] = means[row];
        rows[i] = {means[row], rstds[row], n == 1 ? W(0) : rstds[row], W(0), W(0)};
      }
      if (has_dx) {
        products(dy, x, scale, n, mean, first, second);
        for (int i = 0; i < kTogether; i++) {
          rows[i].of_one = first[i] / count * rows[i].slope;
          rows[i].of_x = s.detach ? W(0) : second[i] / count * rows[i].rstd * rows[i].slope;
        }
      }
      fetch<S>(s.x, n, r + kTogether, end);
      S* dx = has_dx ? static_cast<S*>(s.dx) + r * n : nullptr;
      if (r + kTogether <= r1) {
        apply<S, kTogether, has_dx, has_sums>(dy.of, x.of, dx, scale, n, rows, dw, db);
        continue;
      }
      for (int i = 0; r + i < r1; i++) {
        apply<S, 1, has_dx, has_sums>(dy.of + i, x.of + i, has_dx ? dx + i * n : nullptr, scale, n, rows + i, dw, db);
      }
    }
    for (int64_t i = 0; has_sums && i < 2 * n; i++) total[i] += dw[i];
  }
}

template <class S>
void layer_norm_backward_rows(const LayerNormBackwardArguments& s, int64_t chunk, int64_t begin, int64_t end) {
  if (s.dx == nullptr) return backward<S, false, true>(s, chunk, begin, end);
  s.sums == nullptr ? backward<S, true, false>(s, chunk, begin, end) : backward<S, true, true>(s, chunk, begin, end);
}

}  // namespace

void register_layer_norm(Kernels* table, Type type) {
  BCOS_FOR_TYPE(type, S, {
    table->layer_norm_rows = layer_norm_rows<S>;
    table->layer_norm_backward_rows = layer_norm_backward_rows<S>;
  })
}

}  // namespace bcos::cpu::BCOS_ISA
