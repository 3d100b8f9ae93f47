// The B-cos scaling of a linear output, and its gradient.
//
//   forward   y = a |a|/n (B = 2), a c^(B-1) (else), after the maximum over max_out units; B = 1: the maximum alone
//   backward  dL/da from (dy, y, n) for B = 2, from (dy, a, n) otherwise, and per window
//             q = (dL/dn)/|p|, dL/dn = -sum_o g (dy/dn terms): math.h holds the formulas
//
// Traffic: forward reads and writes y once, in place; backward reads dy and y, writes da.
#include "groups.h"

namespace bcos::cpu::BCOS_ISA {
namespace {

// One run of outputs: y[i] from a[i * max_out ...], i < count. `norm(i)` gives 1/n.
template <class S, Mode mode, class Norm>
inline void scale_run(
    S* __restrict y, const S* a, S* kept, uint8_t* index, int64_t count, int64_t max_out, int64_t unit_stride,
    int64_t output_stride, Wide<S> exponent, Norm norm) {
  using W = Wide<S>;
  if (max_out == 1 && kept == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
      const W v = load(a[i]);
      if constexpr (mode == Mode::two) y[i] = store<S>(output_b2(v, norm(i)));
      if constexpr (mode == Mode::general) y[i] = store<S>(output_general(v, norm(i), exponent));
      if constexpr (mode == Mode::one) y[i] = a[i];
    }
    return;
  }
  for (int64_t i = 0; i < count; i++) {
    const S* units = a + i * output_stride;
    W best = load(units[0]);
    int64_t winner = 0;
    for (int64_t m = 1; m < max_out; m++) {
      const W v = load(units[m * unit_stride]);
      // ties stay with the first unit; the first NaN wins over everything, as in torch's max
      if (v > best || (v != v && best == best)) {
        best = v;
        winner = m;
      }
    }
    if (index != nullptr) index[i] = static_cast<uint8_t>(winner);
    if (kept != nullptr) kept[i] = store<S>(best);
    if constexpr (mode == Mode::one) y[i] = store<S>(best);
    if constexpr (mode == Mode::two) y[i] = store<S>(output_b2(best, norm(i)));
    if constexpr (mode == Mode::general) y[i] = store<S>(output_general(best, norm(i), exponent));
  }
}

template <class T>
inline T* offset(T* pointer, int64_t by) {
  return pointer == nullptr ? nullptr : pointer + by;
}

template <class S, Mode mode>
void scale_rows_of_short_groups(const ScaleArguments& s, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const Layout& l = s.layout;
  W reciprocal[kBlock];
  for (int64_t r = begin; r < end; r++) {
    for_blocks_of_groups(l, [&](int64_t group, int64_t channel, int64_t groups, int64_t channels) {
      if constexpr (mode != Mode::one) {
        reciprocals(reciprocal, static_cast<const W*>(s.n) + r * l.groups + group, groups, l.channels / l.groups);
      }
      const int64_t at = r * l.channels + channel;
      scale_run<S, mode>(
          static_cast<S*>(s.y) + at, static_cast<const S*>(s.a) + at * s.max_out, offset(static_cast<S*>(s.kept), at),
          offset(s.index, at), channels, s.max_out, 1, s.max_out, static_cast<W>(s.exponent),
          [&reciprocal](int64_t i) { return reciprocal[i]; });
    });
  }
}

template <class S, Mode mode>
void scale_rows_of(const ScaleArguments& s, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const Layout& l = s.layout;
  if (has_short_groups(l)) return scale_rows_of_short_groups<S, mode>(s, begin, end);
  const int64_t per_group = l.channels / l.groups;
  const W* n = static_cast<const W*>(s.n);
  for (int64_t r = begin; r < end; r++) {
    for (int64_t g = 0; g < l.groups; g++) {
      W reciprocal = 0;
      if constexpr (mode != Mode::one) reciprocal = 1 / n[r * l.groups + g];
      const int64_t at = r * l.channels + g * per_group;
      scale_run<S, mode>(
          static_cast<S*>(s.y) + at, static_cast<const S*>(s.a) + at * s.max_out, offset(static_cast<S*>(s.kept), at),
          offset(s.index, at), per_group, s.max_out, 1, s.max_out, static_cast<W>(s.exponent),
          [reciprocal](int64_t) { return reciprocal; });
    }
  }
}

template <class S, Mode mode>
void scale_planes_of(const ScaleArguments& s, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const Layout& l = s.layout;
  const int64_t per_group = l.channels / l.groups;
  const int64_t blocks = (l.pixels + kBlock - 1) / kBlock;
  W reciprocal[kBlock];
  for (int64_t item = begin; item < end; item++) {  // (image, group, block)
    const int64_t plane = item / blocks, first = item % blocks * kBlock;
    const int64_t count = l.pixels - first < kBlock ? l.pixels - first : kBlock;
    if constexpr (mode != Mode::one) {
      const W* __restrict n = static_cast<const W*>(s.n) + plane * l.pixels + first;
      for (int64_t p = 0; p < count; p++) reciprocal[p] = 1 / n[p];
    }
    for (int64_t c = 0; c < per_group; c++) {
      const int64_t channel = plane * per_group + c;
      const int64_t at = channel * l.pixels + first;
      scale_run<S, mode>(
          static_cast<S*>(s.y) + at, static_cast<const S*>(s.a) + channel * s.max_out * l.pixels + first,
          offset(static_cast<S*>(s.kept), at), offset(s.index, at), count, s.max_out, l.pixels, 1,
          static_cast<W>(s.exponent), [&reciprocal](int64_t i) { return reciprocal[i]; });
    }
  }
}

template <class S>
void scale_rows(const ScaleArguments& s, int64_t begin, int64_t end) {
  if (s.mode == Mode::one) return scale_rows_of<S, Mode::one>(s, begin, end);
  if (s.mode == Mode::two) return scale_rows_of<S, Mode::two>(s, begin, end);
  return scale_rows_of<S, Mode::general>(s, begin, end);
}
template <class S>
void scale_planes(const ScaleArguments& s, int64_t begin, int64_t end) {
  if (s.mode == Mode::one) return scale_planes_of<S, Mode::one>(s, begin, end);
  if (s.mode == Mode::two) return scale_planes_of<S, Mode::two>(s, begin, end);
  return scale_planes_of<S, Mode::general>(s, begin, end);
}

// What a backward is built from: B = 2 from y, B = 2 from a, general B from a, and B = 1 (the maximum's gradient alone).
enum class Source { y, a, general, one };

template <class W, Source source>
inline Gradients<W> gradients(W g, W v, W reciprocal, W exponent, bool detach) {
  if constexpr (source == Source::y) return gradients_b2_from_y(g, v, reciprocal, detach);
  if constexpr (source == Source::a) return gradients_b2_from_a(g, v, reciprocal, detach);
  if constexpr (source == Source::general) return gradients_general(g, v, reciprocal, exponent, detach);
  return {g, W(0), W(0)};
}

// da[unit] of one output: dL/da at the winning unit, zero at the others.
template <class S>
inline void spread(S* da, Wide<S> value, int64_t winner, int64_t max_out, int64_t unit_stride) {
  for (int64_t m = 0; m < max_out; m++) da[m * unit_stride] = store<S>(m == winner ? value : Wide<S>(0));
}

// (dL/dn)/|p| from n dL/dn. The norm of a linear row without its epsilon may be 0: then nothing flows.
template <class W>
inline W per_norm(W n_dn, W n, bool linear_norm) {
  const W norm = linear_norm ? n - W(kLinearNormEps) : n;
  return norm == 0 ? W(0) : n_dn / (n * norm);
}

// Sums over a run of outputs: of n dL/dn and of dL/dB.
template <class W>
struct Sums {
  W n_dn, db;
};

// One run of outputs without a maximum; `norm(i)` gives 1/n. With `parts` what every output adds to n dL/dn goes there, too.
// detach is a constant: with a branch on it in the loop general B does not vectorise.
template <class S, Source source, bool detach, bool has_parts, class Norm>
inline Sums<Wide<S>> backward_run(
    S* __restrict da, const S* __restrict dy, const S* __restrict values, Wide<S>* __restrict parts, int64_t count,
    Wide<S> exponent, Norm norm) {
  using W = Wide<S>;
  W n_dn = 0, db = 0;
#pragma omp simd reduction(+ : n_dn, db)
  for (int64_t c = 0; c < count; c++) {
    const auto t = gradients<W, source>(load(dy[c]), load(values[c]), norm(c), exponent, detach);
    da[c] = store<S>(t.da);
    if constexpr (has_parts) parts[c] = t.dn;
    n_dn += t.dn;
    if constexpr (source == Source::general && !detach) db += t.db;
  }
  return {n_dn, db};
}

// The same with a maximum over units.
template <class S, Source source, bool detach, bool has_parts, class Norm>
inline Sums<Wide<S>> backward_run_of_maximum(
    S* __restrict da, const S* __restrict dy, const S* __restrict values, const uint8_t* index, Wide<S>* __restrict parts,
    int64_t count, int64_t max_out, Wide<S> exponent, Norm norm) {
  using W = Wide<S>;
  W n_dn = 0, db = 0;
  for (int64_t c = 0; c < count; c++) {
    const auto t = gradients<W, source>(load(dy[c]), load(values[c]), norm(c), exponent, detach);
    spread(da + c * max_out, t.da, index[c], max_out, 1);
    if constexpr (has_parts) parts[c] = t.dn;
    n_dn += t.dn;
    db += t.db;
  }
  return {n_dn, db};
}

template <class S, Source source, bool detach>
void backward_rows_of(const ScaleBackwardArguments& s, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const Layout& l = s.layout;
  const int64_t per_group = l.channels / l.groups;
  const bool short_groups = has_short_groups(l);
  W reciprocal[kBlock], parts[kBlock];
  // a run of channels from `at` on
  const auto run = [&s](auto has_parts, W* parts, int64_t at, int64_t count, auto norm) {
    constexpr bool kParts = decltype(has_parts)::value;
    const S* dy = static_cast<const S*>(s.dy) + at;
    const S* values = source == Source::one ? dy : static_cast<const S*>(s.source) + at;
    S* da = static_cast<S*>(s.da) + at * s.max_out;
    const W exponent = static_cast<W>(s.exponent);
    if (s.max_out == 1) return backward_run<S, source, detach, kParts>(da, dy, values, parts, count, exponent, norm);
    return backward_run_of_maximum<S, source, detach, kParts>(
        da, dy, values, s.index + at, parts, count, s.max_out, exponent, norm);
  };
  for (int64_t r = begin; r < end; r++) {
    const W* n = source == Source::one ? nullptr : static_cast<const W*>(s.n) + r * l.groups;
    W* q = s.q == nullptr ? nullptr : static_cast<W*>(s.q) + r * l.groups;
    W db = 0;
    if (source != Source::one && short_groups) {
      for_blocks_of_groups(l, [&](int64_t group, int64_t first, int64_t groups, int64_t channels) {
        reciprocals(reciprocal, n + group, groups, per_group);
        const auto norm = [&reciprocal](int64_t c) { return reciprocal[c]; };
        db += run(std::true_type{}, parts, r * l.channels + first, channels, norm).db;
        if (q == nullptr) return;
        sum_groups(parts, groups, per_group);
        for (int64_t g = 0; g < groups; g++) q[group + g] = per_norm(parts[g], n[group + g], s.linear_norm);
      });
    } else {
      for (int64_t g = 0; g < l.groups; g++) {
        const W value = source == Source::one ? W(1) : 1 / n[g];
        const auto norm = [value](int64_t) { return value; };
        const auto sums = run(std::false_type{}, nullptr, r * l.channels + g * per_group, per_group, norm);
        if (q != nullptr) q[g] = per_norm(sums.n_dn, source == Source::one ? W(1) : n[g], s.linear_norm);
        db += sums.db;
      }
    }
    if (s.db != nullptr) static_cast<W*>(s.db)[r] = db;
  }
}

template <class S, Source source, bool detach>
void backward_planes_of(const ScaleBackwardArguments& s, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const Layout& l = s.layout;
  const int64_t per_group = l.channels / l.groups;
  const int64_t blocks = (l.pixels + kBlock - 1) / kBlock;
  const W exponent = static_cast<W>(s.exponent);
  W reciprocal[kBlock], n_dn[kBlock];
  for (int64_t item = begin; item < end; item++) {  // (image, group, block)
    const int64_t plane = item / blocks, first = item % blocks * kBlock;
    const int64_t count = l.pixels - first < kBlock ? l.pixels - first : kBlock;
    const W* n = source == Source::one ? nullptr : static_cast<const W*>(s.n) + plane * l.pixels + first;
    for (int64_t p = 0; p < count; p++) {
      reciprocal[p] = source == Source::one ? W(1) : 1 / n[p];
      n_dn[p] = 0;
    }
    W db = 0;
    for (int64_t c = 0; c < per_group; c++) {
      const int64_t channel = plane * per_group + c, at = channel * l.pixels + first;
      const S* __restrict dy = static_cast<const S*>(s.dy) + at;
      const S* __restrict values = source == Source::one ? dy : static_cast<const S*>(s.source) + at;
      S* __restrict da = static_cast<S*>(s.da) + channel * s.max_out * l.pixels + first;
      if (s.max_out == 1) {
#pragma omp simd reduction(+ : db)
        for (int64_t p = 0; p < count; p++) {
          const auto t = gradients<W, source>(load(dy[p]), load(values[p]), reciprocal[p], exponent, detach);
          da[p] = store<S>(t.da);
          n_dn[p] += t.dn;
          if constexpr (source == Source::general) db += t.db;
        }
      } else {
        for (int64_t p = 0; p < count; p++) {
          const auto t = gradients<W, source>(load(dy[p]), load(values[p]), reciprocal[p], exponent, detach);
          spread(da + p, t.da, s.index[at + p], s.max_out, l.pixels);
          n_dn[p] += t.dn;
          db += t.db;
        }
      }
    }
    if (s.q != nullptr) {
      W* q = static_cast<W*>(s.q) + plane * l.pixels + first;
      for (int64_t p = 0; p < count; p++) q[p] = per_norm(n_dn[p], n[p], s.linear_norm);
    }
    if (s.db != nullptr) static_cast<W*>(s.db)[item] = db;
  }
}

inline Source source_of(const ScaleBackwardArguments& s) {
  if (s.mode == Mode::one) return Source::one;
  if (s.mode == Mode::general) return Source::general;
  return s.from_a ? Source::a : Source::y;
}

// Calls f with the source and whether scales are constant as types.
template <class F>
void for_source(const ScaleBackwardArguments& s, F f) {
  const auto with = [&](auto source) { s.detach ? f(source, std::true_type{}) : f(source, std::false_type{}); };
  switch (source_of(s)) {
    case Source::y: return with(std::integral_constant<Source, Source::y>{});
    case Source::a: return with(std::integral_constant<Source, Source::a>{});
    case Source::general: return with(std::integral_constant<Source, Source::general>{});
    case Source::one: return with(std::integral_constant<Source, Source::one>{});
  }
}

template <class S>
void scale_backward_rows(const ScaleBackwardArguments& s, int64_t begin, int64_t end) {
  for_source(s, [&](auto source, auto detach) {
    backward_rows_of<S, decltype(source)::value, decltype(detach)::value>(s, begin, end);
  });
}
template <class S>
void scale_backward_planes(const ScaleBackwardArguments& s, int64_t begin, int64_t end) {
  for_source(s, [&](auto source, auto detach) {
    backward_planes_of<S, decltype(source)::value, decltype(detach)::value>(s, begin, end);
  });
}

}  // namespace

void register_scale(Kernels* table, Type type) {
  BCOS_FOR_TYPE(type, S, {
    table->scale_rows = scale_rows<S>;
    table->scale_planes = scale_planes<S>;
    table->scale_backward_rows = scale_backward_rows<S>;
    table->scale_backward_planes = scale_backward_planes<S>;
  })
}

}  // namespace bcos::cpu::BCOS_ISA
