// The B-cos scaling (B = 2) and the batch normalisation behind it in one pass, channels innermost.
//
//   forward, statistics known   y = a |a|/n;  z = relu(y scale + shift + residual);  squares = sum_c z^2 per row
//   backward                    g = dL/dz where z > 0;  dL/dy = g scale + factor (y - mean)
//                               dL/da = 2 dL/dy |a|/n (1 in explanation mode),  q = -sum_c dL/dy y / n^2
//   or from the slope           dL/da = dL/dz slope,  slope = scale |a|/n where z > 0: all scales constant
//
// Traffic: forward reads a, writes z in its place (and what is kept); backward reads dz and y, writes da.
#include "groups.h"

namespace bcos::cpu::BCOS_ISA {
namespace {

using Keeps = ScaleNormArguments::Keeps;

// A run of channels of one row from `at` on, the first of them `first`; `norm(c)` gives 1/n. Returns sum z^2.
template <class S, bool has_residual, bool has_relu, Keeps keeps, class Norm>
inline Wide<S> forward_run(const ScaleNormArguments& s, int64_t at, int64_t first, int64_t count, Norm norm) {
  using W = Wide<S>;
  const W* __restrict scale = static_cast<const W*>(s.scale) + first;
  const W* __restrict shift = static_cast<const W*>(s.shift) + first;
  const S* a = static_cast<const S*>(s.a) + at;
  S* z = static_cast<S*>(s.z) + at;
  const S* __restrict residual = has_residual ? static_cast<const S*>(s.residual) + at : nullptr;
  S* __restrict kept = keeps != Keeps::nothing ? static_cast<S*>(s.kept) + at : nullptr;
  W squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < count; c++) {
    const W value = load(a[c]), ratio = absolute(value) * norm(c);
    const S y = store<S>(value * ratio);  // rounded, as the backward and a recomputation find it
    W v = load(y) * scale[c] + shift[c];
    if constexpr (has_residual) v += load(residual[c]);
    if constexpr (keeps == Keeps::output) kept[c] = y;
    if constexpr (keeps == Keeps::slope) kept[c] = store<S>(has_relu && v <= 0 ? W(0) : ratio * scale[c]);
    if constexpr (has_relu) v = v < 0 ? W(0) : v;  // NaN stays NaN
    z[c] = store<S>(v);
    squares += load(z[c]) * load(z[c]);
  }
  return squares;
}

template <class S, bool has_residual, bool has_relu, Keeps keeps>
void forward(const ScaleNormArguments& s, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const Layout& l = s.layout;
  const int64_t per_group = l.channels / l.groups;
  const bool short_groups = has_short_groups(l);
  W reciprocal[kBlock];
  for (int64_t r = begin; r < end; r++) {
    const W* n = static_cast<const W*>(s.n) + r * l.groups;
    W squares = 0;
    if (short_groups) {
      for_blocks_of_groups(l, [&](int64_t group, int64_t first, int64_t groups, int64_t channels) {
        reciprocals(reciprocal, n + group, groups, per_group);
        squares += forward_run<S, has_residual, has_relu, keeps>(
            s, r * l.channels + first, first, channels, [&reciprocal](int64_t c) { return reciprocal[c]; });
      });
    } else {
      for (int64_t g = 0; g < l.groups; g++) {
        const W value = 1 / n[g];
        const int64_t first = g * per_group;
        squares += forward_run<S, has_residual, has_relu, keeps>(
            s, r * l.channels + first, first, per_group, [value](int64_t) { return value; });
      }
    }
    if (s.squares != nullptr) static_cast<W*>(s.squares)[r] = squares;
  }
}

template <class S, bool has_residual, bool has_relu>
void forward_of(const ScaleNormArguments& s, int64_t begin, int64_t end) {
  switch (s.keeps) {
    case Keeps::nothing: return forward<S, has_residual, has_relu, Keeps::nothing>(s, begin, end);
    case Keeps::output: return forward<S, has_residual, has_relu, Keeps::output>(s, begin, end);
    case Keeps::slope: return forward<S, has_residual, has_relu, Keeps::slope>(s, begin, end);
  }
}

template <class S>
void scale_norm_rows(const ScaleNormArguments& s, int64_t begin, int64_t end) {
  if (s.residual != nullptr) return s.relu ? forward_of<S, true, true>(s, begin, end) : forward_of<S, true, false>(s, begin, end);
  return s.relu ? forward_of<S, false, true>(s, begin, end) : forward_of<S, false, false>(s, begin, end);
}

enum class Mask { none, output, input };

// As forward_run. Returns n dL/dn summed over the run; with `parts` what every channel adds to it goes there, too.
template <class S, Mask mask, bool with_variance, bool has_parts, class Norm>
inline Wide<S> backward_run(
    const ScaleNormBackwardArguments& s, int64_t at, int64_t first, int64_t count, Norm norm, Wide<S>* __restrict parts) {
  using W = Wide<S>;
  const S* __restrict dz = static_cast<const S*>(s.dz) + at;
  const S* __restrict y = static_cast<const S*>(s.y) + at;
  const S* __restrict z = mask == Mask::output ? static_cast<const S*>(s.z) + at : nullptr;
  const W* __restrict scale = static_cast<const W*>(s.scale) + first;
  const W* __restrict factor = with_variance ? static_cast<const W*>(s.factor) + first : nullptr;
  const W* __restrict mean = with_variance ? static_cast<const W*>(s.mean) + first : nullptr;
  const W* __restrict mask_scale = mask == Mask::input ? static_cast<const W*>(s.mask_scale) + first : nullptr;
  const W* __restrict mask_shift = mask == Mask::input ? static_cast<const W*>(s.mask_shift) + first : nullptr;
  S* __restrict da = static_cast<S*>(s.da) + at;
  const bool detach = s.detach;
  W n_dn = 0;
#pragma omp simd reduction(+ : n_dn)
  for (int64_t c = 0; c < count; c++) {
    const W value = load(y[c]);
    W v = load(dz[c]);
    if constexpr (mask == Mask::output) v = load(z[c]) <= 0 ? W(0) : v;
    if constexpr (mask == Mask::input) {
      const W out = value * mask_scale[c] + mask_shift[c];
      v = load(store<S>(out < 0 ? W(0) : out)) <= 0 ? W(0) : v;  // as it was stored
    }
    v *= scale[c];
    if constexpr (with_variance) v += factor[c] * (value - mean[c]);
    const auto t = gradients_b2_from_y(v, value, norm(c), detach);
    da[c] = store<S>(t.da);
    if constexpr (has_parts) parts[c] = t.dn;
    n_dn += t.dn;
  }
  return n_dn;
}

template <class S, Mask mask, bool with_variance>
void backward(const ScaleNormBackwardArguments& s, int64_t begin, int64_t end) {
  using W = Wide<S>;
  const Layout& l = s.layout;
  const int64_t per_group = l.channels / l.groups;
  const bool short_groups = has_short_groups(l);
  W reciprocal[kBlock], parts[kBlock];
  for (int64_t r = begin; r < end; r++) {
    const W* n = static_cast<const W*>(s.n) + r * l.groups;
    W* q = s.q == nullptr ? nullptr : static_cast<W*>(s.q) + r * l.groups;
    if (short_groups) {
      for_blocks_of_groups(l, [&](int64_t group, int64_t first, int64_t groups, int64_t channels) {
        reciprocals(reciprocal, n + group, groups, per_group);
        const auto norm = [&reciprocal](int64_t c) { return reciprocal[c]; };
        backward_run<S, mask, with_variance, true>(s, r * l.channels + first, first, channels, norm, parts);
        if (q == nullptr) return;
        sum_groups(parts, groups, per_group);
#pragma omp simd
        for (int64_t g = 0; g < groups; g++) q[group + g] = parts[g] / (n[group + g] * n[group + g]);
      });
    } else {
      for (int64_t g = 0; g < l.groups; g++) {
        const W value = 1 / n[g];
        const int64_t first = g * per_group;
        const auto norm = [value](int64_t) { return value; };
        const W n_dn = backward_run<S, mask, with_variance, false>(s, r * l.channels + first, first, per_group, norm, nullptr);
        if (q != nullptr) q[g] = n_dn / (n[g] * n[g]);
      }
    }
  }
}

template <class S>
void backward_from_slope(const ScaleNormBackwardArguments& s, int64_t begin, int64_t end) {
  const int64_t C = s.layout.channels;
  for (int64_t r = begin; r < end; r++) {
    const S* __restrict dz = static_cast<const S*>(s.dz) + r * C;
    const S* __restrict slope = static_cast<const S*>(s.slope) + r * C;
    S* __restrict da = static_cast<S*>(s.da) + r * C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) da[c] = store<S>(load(dz[c]) * load(slope[c]));
    if (s.dresidual == nullptr) continue;
    const S* __restrict z = static_cast<const S*>(s.z) + r * C;
    S* __restrict dresidual = static_cast<S*>(s.dresidual) + r * C;
#pragma omp simd
    for (int64_t c = 0; c < C; c++) dresidual[c] = load(z[c]) <= 0 ? store<S>(Wide<S>(0)) : dz[c];
  }
}

template <class S, Mask mask>
void backward_of(const ScaleNormBackwardArguments& s, int64_t begin, int64_t end) {
  s.factor != nullptr ? backward<S, mask, true>(s, begin, end) : backward<S, mask, false>(s, begin, end);
}

template <class S>
void scale_norm_backward_rows(const ScaleNormBackwardArguments& s, int64_t begin, int64_t end) {
  if (s.slope != nullptr) return backward_from_slope<S>(s, begin, end);
  if (s.mask_scale != nullptr) return backward_of<S, Mask::input>(s, begin, end);
  return s.z != nullptr ? backward_of<S, Mask::output>(s, begin, end) : backward_of<S, Mask::none>(s, begin, end);
}

}  // namespace

void register_scale_norm(Kernels* table, Type type) {
  BCOS_FOR_TYPE(type, S, {
    table->scale_norm_rows = scale_norm_rows<S>;
    table->scale_norm_backward_rows = scale_norm_backward_rows<S>;
  })
}

}  // namespace bcos::cpu::BCOS_ISA
