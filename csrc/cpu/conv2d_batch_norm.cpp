// The B-cos convolution (B = 2) with an uncentered BatchNorm, residual and ReLU behind it, as one op.
//
//   training   the convolution; scaling and moments of y while a piece of it is in the cache; one pass y -> z
//   statistics known   the convolution; scaling, normalisation, residual and ReLU in one pass, in place
//   backward   one pass over dz and y for the channel sums; one from dz and y to dL/da, whose blocks a one-pixel layer
//              multiplies at once; no gradient of y is ever written
//
// Traffic beyond the convolution's own, in activations of its output: training 2 reads and 2 writes (1 write with
// known statistics), backward 4 reads and 1 write (none where it runs in blocks).
#include "conv2d_batch_norm.h"

#include <cstring>

#include "batch_norm.h"

namespace bcos::cpu {
namespace {

// Elements of a piece of an activation that is scaled and then read once more.
constexpr int64_t kPiece = 1 << 14;

Layer layer_of(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const int64_t (&stride)[2],
    const int64_t (&padding)[2], const int64_t (&dilation)[2], int64_t groups, bool normalize_weight) {
  Layer l(x, weight, bias, stride, padding, dilation, groups, 2, 1.0, normalize_weight, 1);
  STD_TORCH_CHECK(
      l.output.rows && l.type != Type::float16,
      "bcos_kernels_cpp: conv2d_batch_norm expects channels_last and no float16");
  return l;
}

OptionalTensor vector_of(const OptionalTensor& t, ScalarType type, int64_t channels, const char* name) {
  if (!t.has_value()) return std::nullopt;
  check_size(*t, channels, name);
  return in_layout(t->scalar_type() == type ? *t : torch::stable::to(*t, type), false);
}

// f(chunk, begin, end) for pieces of rows.
template <class F>
void in_pieces(const Chunks& chunks, int64_t elements_per_row, const F& f) {
  const int64_t piece = std::max<int64_t>(16, kPiece / std::max<int64_t>(1, elements_per_row) / 16 * 16);
  chunks.each([&](int64_t chunk) {
    for (int64_t begin = chunks.begin(chunk); begin < chunks.end(chunk); begin += piece) {
      f(chunk, begin, std::min(begin + piece, chunks.end(chunk)));
    }
  });
}

// a, scaled in place, and its moments.
template <class W>
Tensor scaled_with_moments(const Layer& l, const void* squares, const Tensor& n, W* mean, W* var) {
  const Kernels& k = kernels(l.type);
  const int64_t channels = l.output.channels, bytes = l.bytes();
  const auto scale = [&](void* y, const void* n_rows, const Layout& layout, int64_t begin, int64_t end) {
    k.scale_rows({y, y, nullptr, nullptr, n_rows, layout, 1, Mode::two, 1.0}, begin, end);
  };
  if (l.runs_forward_in_blocks()) {
    const Tensor y = l.new_output(l.dtype, channels);
    const Chunks chunks = chunks_of_rows(l);
    Moments<W> moments(chunks.count, channels);
    product_in_blocks(
        l, chunks, squares, n.data_ptr(), false,
        [&](int64_t begin, void*) -> void* { return at(y.data_ptr(), begin * channels, bytes); },
        [&](int64_t chunk, int64_t begin, int64_t count, void* a) {
          scale(a, at(n.data_ptr(), begin, l.wide_bytes()), rows_layout(count, channels), 0, count);
          moments.add(k, chunk, a, count);
        });
    moments.join(mean, var);
    return y;
  }
  const Tensor y = product(l);
  norms(l, squares, n.data_ptr());
  const Chunks chunks(l.rows(), channels);
  Moments<W> moments(chunks.count, channels);
  in_pieces(chunks, channels, [&](int64_t chunk, int64_t begin, int64_t end) {
    scale(y.data_ptr(), n.data_ptr(), l.output, begin, end);
    moments.add(k, chunk, at(y.data_ptr(), begin * channels, bytes), end - begin);
  });
  moments.join(mean, var);
  return y;
}

template <class W>
void with_known_statistics(
    const Layer& l, const void* squares_of_x, const Tensor& n, const OptionalTensor& kept,
    ScaleNormArguments::Keeps keeps, const OptionalTensor& residual, const std::vector<W>& scale,
    const std::vector<W>& shift, const OptionalTensor& squares, bool relu, OptionalTensor* z) {
  const Kernels& k = kernels(l.type);
  const int64_t channels = l.output.channels, bytes = l.bytes(), wide = l.wide_bytes();
  ScaleNormArguments s{nullptr,      nullptr,       data(kept), n.data_ptr(), data(residual), scale.data(),
                       shift.data(), data(squares), l.output,   keeps,        relu};
  if (l.runs_forward_in_blocks()) {
    *z = l.new_output(l.dtype, channels);
    char* to = static_cast<char*>((*z)->data_ptr());
    product_in_blocks(
        l, chunks_of_rows(l), squares_of_x, n.data_ptr(), false,
        [&](int64_t begin, void*) -> void* { return at(to, begin * channels, bytes); },
        [&](int64_t, int64_t begin, int64_t count, void* a) {
          ScaleNormArguments block = s;
          block.z = a;
          block.a = a;
          block.kept = at(s.kept, begin * channels, bytes);
          block.residual = at(s.residual, begin * channels, bytes);
          block.n = at(s.n, begin, wide);
          block.squares = at(s.squares, begin, wide);
          block.layout = rows_layout(count, channels);
          k.scale_norm_rows(block, 0, count);
        });
    return;
  }
  *z = product(l);
  s.z = (*z)->data_ptr();
  s.a = s.z;
  norms(l, squares_of_x, n.data_ptr());
  in_parallel(l.rows(), channels, [&](int64_t begin, int64_t end) { k.scale_norm_rows(s, begin, end); });
}

template <class W>
ConvolvedNormalized forward_of(
    const Layer& l, const OptionalTensor& squares_of_x, const OptionalTensor& running_var,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const OptionalTensor& residual, bool training,
    double eps, bool relu, bool keep, bool detach, bool emits_squares) {
  const ScalarType statistics = wide(l.dtype);
  const int64_t channels = l.output.channels;
  const void* known = l.squares_of_input(squares_of_x);
  const Tensor n = l.new_norms(), var = empty({channels}, statistics);
  const OptionalTensor mean = training ? OptionalTensor(empty({channels}, statistics)) : std::nullopt;
  OptionalTensor z, y, slope, squares;
  if (emits_squares) squares = empty({l.x.size(0), l.window.out_height, l.window.out_width}, statistics);
  if (training) {
    y = scaled_with_moments<W>(l, known, n, data<W>(mean), static_cast<W*>(var.data_ptr()));
  } else {
    std::memcpy(var.data_ptr(), running_var->data_ptr(), static_cast<size_t>(wide_bytes(channels, l.type)));
  }
  std::vector<W> scale, shift;
  forward_factors(norm_weight, norm_bias, static_cast<const W*>(var.data_ptr()), eps, channels, &scale, &shift);
  if (training) {
    z = l.new_output(l.dtype, channels);
    normalize({y->data_ptr(), z->data_ptr(), data(residual), scale.data(), shift.data(), data(squares), l.output, relu},
              l.type);
  } else {
    using Keeps = ScaleNormArguments::Keeps;
    const Keeps keeps = !keep ? Keeps::nothing : detach ? Keeps::slope : Keeps::output;
    const OptionalTensor kept = keep ? OptionalTensor(l.new_output(l.dtype, channels)) : std::nullopt;
    with_known_statistics(l, known, n, kept, keeps, residual, scale, shift, squares, relu, &z);
    (detach ? slope : y) = kept;
  }
  const auto or_nothing = [&](const OptionalTensor& t, ScalarType type) { return t.has_value() ? *t : nothing(type); };
  return {*z, or_nothing(squares, statistics), keep ? or_nothing(y, l.dtype) : nothing(l.dtype), or_nothing(slope, l.dtype),
          n,  or_nothing(mean, statistics),    var};
}

struct NormNeeds {
  bool dnorm_weight, dnorm_bias, dresidual;
};

template <class W>
ConvolvedNormalizedGradients backward_of(
    const Layer& l, const Tensor& dz, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
    const OptionalTensor& z, const OptionalTensor& y, const OptionalTensor& slope, const Tensor& n,
    const OptionalTensor& mean, const Tensor& var, bool normalize_weight, bool training, double eps, bool relu,
    bool detach, Needs needs, NormNeeds norm_needs) {
  const Kernels& k = kernels(l.type);
  const ScalarType statistics = wide(l.dtype);
  const int64_t channels = l.output.channels, bytes = l.bytes();
  OptionalTensor dnorm_weight, dnorm_bias, dresidual;
  if (norm_needs.dnorm_weight) dnorm_weight = empty({channels}, statistics);
  if (norm_needs.dnorm_bias) dnorm_bias = empty({channels}, statistics);
  // without a ReLU the residual's gradient is dz itself
  if (norm_needs.dresidual && relu) dresidual = l.new_output(l.dtype, channels);
  ScaleNormBackwardArguments s{};
  BatchNormPull<W> pull;
  s.n = n.data_ptr();
  s.detach = detach;
  if (slope.has_value()) {
    s.dz = dz.data_ptr();
    s.slope = data(slope);
    s.z = data(z);
    s.dresidual = data(dresidual);
  } else {
    const bool mask_from_y = relu && !z.has_value();
    pull.reduce({dz, *y, relu ? z : std::nullopt, norm_weight, norm_bias, mean, var, eps, mask_from_y,
                 training && !detach && (needs.dx || needs.dw || needs.dbias), dnorm_weight, dnorm_bias, dresidual, l.output});
    s.dz = pull.s.dy;
    s.y = data(y);
    s.z = pull.s.y;
    s.scale = pull.s.scale;
    s.factor = pull.s.factor;
    s.mean = pull.s.mean;
    s.mask_scale = pull.s.mask_scale;
    s.mask_shift = pull.s.mask_shift;
  }
  Pull source;
  source.through_norm = !detach;
  source.rows = [&](int64_t begin, int64_t count, void* da, void* q, void*) {
    ScaleNormBackwardArguments block = s;
    block.da = da;
    block.q = q;
    block.dz = at(s.dz, begin * channels, bytes);
    block.y = at(s.y, begin * channels, bytes);
    block.slope = at(s.slope, begin * channels, bytes);
    block.z = at(s.z, begin * channels, bytes);
    block.dresidual = at(s.dresidual, begin * channels, bytes);
    block.n = at(s.n, begin, l.wide_bytes());
    block.layout = rows_layout(count, channels);
    k.scale_norm_backward_rows(block, 0, count);
  };
  source.whole = [&](void* da, void* q, void*) {
    s.da = da;
    s.q = q;
    s.layout = l.output;
    in_parallel(l.rows(), channels, [&](int64_t begin, int64_t end) { k.scale_norm_backward_rows(s, begin, end); });
  };
  const bool inside = needs.dx || needs.dw || needs.dbias || (slope.has_value() && dresidual.has_value());
  Gradients found{nothing(l.dtype), nothing(l.dtype), nothing(l.dtype), nothing(l.dtype)};
  if (inside) found = gradients(l, source, normalize_weight, needs);
  const auto or_nothing = [&](const OptionalTensor& t) { return t.has_value() ? *t : nothing(statistics); };
  if (norm_needs.dresidual && !relu) dresidual = in_layout(torch::stable::clone(dz), l.channels_last);
  return {std::get<0>(found), std::get<1>(found), std::get<2>(found), or_nothing(dnorm_weight), or_nothing(dnorm_bias),
          or_nothing(dresidual)};
}

OptionalTensor dense(const Layer& l, const OptionalTensor& t, const char* name) {
  if (!t.has_value() || t->numel() == 0) return std::nullopt;
  check_type(*t, l.dtype, name);
  check_size(*t, l.rows() * l.output.channels, name);
  return in_layout(*t, l.channels_last);
}

}  // namespace

ConvolvedNormalized conv2d_batch_norm_forward(
    const Tensor& x, const OptionalTensor& squares, const Tensor& weight, const OptionalTensor& bias,
    const OptionalTensor& running_var, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
    const OptionalTensor& residual, int64_t s0, int64_t s1, int64_t p0, int64_t p1, int64_t d0, int64_t d1,
    int64_t groups, bool normalize_weight, bool training, double eps, bool relu, bool keep, bool detach,
    bool emits_squares) {
  const Layer l = layer_of(x, weight, bias, {s0, s1}, {p0, p1}, {d0, d1}, groups, normalize_weight);
  const ScalarType type = wide(l.dtype);
  const int64_t channels = l.output.channels;
  STD_TORCH_CHECK(l.rows() * channels != 0, "bcos_kernels_cpp: conv2d_batch_norm expects an output that is not empty");
  const OptionalTensor w = vector_of(norm_weight, type, channels, "norm_weight"),
                       b = vector_of(norm_bias, type, channels, "norm_bias"),
                       v = vector_of(running_var, type, channels, "running_var"), r = dense(l, residual, "residual");
  STD_TORCH_CHECK(training || v.has_value(), "bcos_kernels_cpp: conv2d_batch_norm expects running_var where training is false");
  if (l.type == Type::float64) {
    return forward_of<double>(l, squares, v, w, b, r, training, eps, relu, keep, detach, emits_squares);
  }
  return forward_of<float>(l, squares, v, w, b, r, training, eps, relu, keep, detach, emits_squares);
}

ConvolvedNormalizedGradients conv2d_batch_norm_backward(
    const Tensor& dz, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, const OptionalTensor& z, const OptionalTensor& y, const Tensor& slope,
    const Tensor& n, const Tensor& mean, const Tensor& var, int64_t s0, int64_t s1, int64_t p0, int64_t p1, int64_t d0,
    int64_t d1, int64_t groups, bool normalize_weight, bool training, double eps, bool relu, bool detach, bool need_dx,
    bool need_dw, bool need_dbias, bool need_dnorm_weight, bool need_dnorm_bias, bool need_dresidual) {
  const Layer l = layer_of(x, weight, bias, {s0, s1}, {p0, p1}, {d0, d1}, groups, normalize_weight);
  const ScalarType type = wide(l.dtype);
  const int64_t channels = l.output.channels;
  const OptionalTensor g = dense(l, dz, "dz"), zs = dense(l, z, "z"), ys = dense(l, y, "y"), t = dense(l, slope, "slope");
  STD_TORCH_CHECK(
      g.has_value() && (ys.has_value() || (t.has_value() && !need_dnorm_weight && !need_dnorm_bias)),
      "bcos_kernels_cpp: conv2d_batch_norm_backward expects dz, and y or slope");
  check_type(n, type, "n");
  check_size(n, l.windows(), "n");
  check_type(var, type, "var");
  check_size(var, channels, "var");
  if (training) check_size(mean, channels, "mean");
  const OptionalTensor w = vector_of(norm_weight, type, channels, "norm_weight"),
                       b = vector_of(norm_bias, type, channels, "norm_bias"),
                       m = training ? OptionalTensor(in_layout(mean, false)) : std::nullopt;
  const Tensor norms_ = in_layout(n, l.norms_channels_last()), v = in_layout(var, false);
  const Needs needs{need_dx, need_dw, need_dbias, false};
  const NormNeeds norm_needs{need_dnorm_weight, need_dnorm_bias, need_dresidual};
  if (l.type == Type::float64) {
    return backward_of<double>(l, *g, w, b, zs, ys, t, norms_, m, v, normalize_weight, training, eps, relu, detach, needs, norm_needs);
  }
  return backward_of<float>(l, *g, w, b, zs, ys, t, norms_, m, v, normalize_weight, training, eps, relu, detach, needs, norm_needs);
}

}  // namespace bcos::cpu
