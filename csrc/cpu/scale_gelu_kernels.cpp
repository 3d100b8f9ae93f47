// The B-cos scaling (B = 2) and the GELU behind it in one pass, of rows.
//
//   forward    y = a |a|/n;  h = y Phi(y);  squares = sum h^2 per row
//   backward   dL/dy = dL/dh (Phi(y) + y phi(y)), Phi alone in explanation mode;  dL/da = 2 dL/dy |a|/n (1 likewise),
//              q = (dL/dn)/|x|, dL/dn = -sum dL/dy y / n
//
//   again      h = y Phi(y) of y, for a backward that has to have h and kept y alone: the forward's bits
//
// Traffic: forward reads a, writes h and y; backward reads dh and y, writes da; again reads y, writes h.
#include "element.h"

namespace bcos::cpu::BCOS_ISA {
namespace {

template <class S, bool keeps>
void forward(const ScaleGeluArguments& s, int64_t begin, int64_t end) {
  using W = Wide<S>;
  for (int64_t r = begin; r < end; r++) {
    const W reciprocal = 1 / static_cast<const W*>(s.n)[r];
    const S* a = static_cast<const S*>(s.a) + r * s.columns;  // may be y or h
    S* y = keeps ? static_cast<S*>(s.y) + r * s.columns : nullptr;
    S* h = static_cast<S*>(s.h) + r * s.columns;
    W squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < s.columns; c++) {
      const S scaled = store<S>(output_b2(static_cast<W>(load(a[c])), reciprocal));
      if constexpr (keeps) y[c] = scaled;
      const W v = load(scaled);
      h[c] = store<S>(v * normal(v).cdf);
      squares += load(h[c]) * load(h[c]);
    }
    if (s.squares != nullptr) static_cast<W*>(s.squares)[r] = squares;
  }
}

template <class S>
void gelu_rows(const void* y_, void* h_, int64_t columns, int64_t begin, int64_t end) {
  using W = Wide<S>;
  for (int64_t r = begin; r < end; r++) {  // by rows, as above: an element has the same place in a vector
    const S* __restrict y = static_cast<const S*>(y_) + r * columns;
    S* __restrict h = static_cast<S*>(h_) + r * columns;
#pragma omp simd
    for (int64_t c = 0; c < columns; c++) {
      const W v = load(y[c]);
      h[c] = store<S>(v * normal(v).cdf);
    }
  }
}

template <class S>
void scale_gelu_rows(const ScaleGeluArguments& s, int64_t begin, int64_t end) {
  s.y != nullptr ? forward<S, true>(s, begin, end) : forward<S, false>(s, begin, end);
}

template <class S, bool detach>
void backward(const ScaleGeluBackwardArguments& s, int64_t begin, int64_t end) {
  using W = Wide<S>;
  for (int64_t r = begin; r < end; r++) {
    const W n = static_cast<const W*>(s.n)[r], reciprocal = 1 / n, norm = n - W(kLinearNormEps);
    const S* __restrict dh = static_cast<const S*>(s.dh) + r * s.columns;
    const S* __restrict y = static_cast<const S*>(s.y) + r * s.columns;
    S* __restrict da = static_cast<S*>(s.da) + r * s.columns;
    W n_dn = 0;
#pragma omp simd reduction(+ : n_dn)
    for (int64_t c = 0; c < s.columns; c++) {
      const W v = load(y[c]);
      const auto gate = normal(v);
      const W dy = load(dh[c]) * (detach ? gate.cdf : gate.cdf + v * gate.density);
      const auto t = gradients_b2_from_y(dy, v, reciprocal, detach);
      da[c] = store<S>(t.da);
      n_dn += t.dn;
    }
    if (s.q != nullptr) static_cast<W*>(s.q)[r] = norm == 0 ? W(0) : n_dn / (n * norm);
  }
}

template <class S>
void scale_gelu_backward_rows(const ScaleGeluBackwardArguments& s, int64_t begin, int64_t end) {
  s.detach ? backward<S, true>(s, begin, end) : backward<S, false>(s, begin, end);
}

}  // namespace

void register_scale_gelu(Kernels* table, Type type) {
  BCOS_FOR_TYPE(type, S, {
    table->scale_gelu_rows = scale_gelu_rows<S>;
    table->scale_gelu_backward_rows = scale_gelu_backward_rows<S>;
    table->gelu_rows = gelu_rows<S>;
  })
}

}  // namespace bcos::cpu::BCOS_ISA
