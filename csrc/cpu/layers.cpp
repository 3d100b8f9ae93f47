// The B-cos layers on the CPU: linear and conv2d, the product with the scaling behind it (layer.h).
#include "layers.h"

namespace bcos::cpu {
namespace {

ScaleArguments scaling(const Layer& l, void* y, const void* a, void* kept, uint8_t* index, const void* n) {
  return {y, a, kept, index, n, l.output, l.max_out, l.mode, l.exponent};
}

void forward_in_blocks(
    const Layer& l, const void* squares, const Tensor& y, const OptionalTensor& kept, const OptionalTensor& index,
    const Tensor& n) {
  const int64_t channels = l.output.channels, bytes = l.bytes();
  const bool maximum = l.max_out > 1;
  product_in_blocks(
      l, chunks_of_rows(l), squares, n.data_ptr(), maximum,
      [&](int64_t begin, void* buffer) -> void* {
        if (maximum) return buffer;
        return kept.has_value() ? at(data(kept), begin * channels, bytes) : at(y.data_ptr(), begin * channels, bytes);
      },
      [&](int64_t, int64_t begin, int64_t count, void* a) {
        ScaleArguments s = scaling(
            l, at(y.data_ptr(), begin * channels, bytes), a, maximum ? at(data(kept), begin * channels, bytes) : nullptr,
            reinterpret_cast<uint8_t*>(at(data<uint8_t>(index), begin * channels, 1)),
            at(n.data_ptr(), begin, l.wide_bytes()));
        s.layout = rows_layout(count, channels);
        kernels(l.type).scale_rows(s, 0, count);
      });
}

bool keeps_a(const Layer& l) {
  return l.mode == Mode::general || (l.mode == Mode::two && l.type == Type::float16);
}

Outputs forward(const Layer& l, const OptionalTensor& squares_, bool keep) {
  if (l.mode == Mode::one && l.max_out == 1) {
    return {product(l), nothing(wide(l.dtype)), nothing(l.dtype), nothing(ScalarType::Byte)};
  }
  const void* squares = l.squares_of_input(squares_);
  const Tensor n = l.mode == Mode::one ? nothing(wide(l.dtype)) : l.new_norms();
  const bool with_a = keep && keeps_a(l);
  OptionalTensor kept, index, y;
  if (keep && l.max_out > 1) index = l.new_output(ScalarType::Byte, l.output.channels);
  if (l.runs_forward_in_blocks()) {
    y = l.new_output(l.dtype, l.output.channels);
    if (with_a) kept = l.new_output(l.dtype, l.output.channels);
    forward_in_blocks(l, squares, *y, kept, index, n);
  } else {
    const Tensor a = product(l);
    if (with_a) kept = l.max_out == 1 ? a : l.new_output(l.dtype, l.output.channels);
    y = l.max_out == 1 && !with_a ? a : l.new_output(l.dtype, l.output.channels);
    const ScaleArguments s = scaling(
        l, y->data_ptr(), a.data_ptr(), l.max_out > 1 ? data(kept) : nullptr, data<uint8_t>(index), n.data_ptr());
    if (l.mode != Mode::one && !l.is_linear) {
      window_norms_and_scale(l.x.data_ptr(), squares, n.data_ptr(), s, l.type, l.input, l.window);
    } else {
      if (l.mode != Mode::one) norms(l, squares, n.data_ptr());
      scale(s, l.type);
    }
  }
  return {*y, n, with_a ? *kept : nothing(l.dtype), index.has_value() ? *index : nothing(ScalarType::Byte)};
}

// What the backward reads.
struct Given {
  Tensor dy, source;  // source: y, or a where from_a
  bool from_a, detach;
  OptionalTensor index;
  Tensor n;
};

ScaleBackwardArguments scaling_backward(const Layer& l, const Given& g, void* da, void* q, void* db) {
  return {da,        q,         db,      g.dy.data_ptr(), g.source.data_ptr(), data<uint8_t>(g.index), g.n.data_ptr(), l.output,
          l.max_out, l.mode, l.exponent, g.from_a,        g.detach,            l.is_linear};
}

Gradients backward(
    const Layer& l, const Tensor& dy_, const OptionalTensor& y, const Tensor& n_, const Tensor& a, const Tensor& index,
    bool normalize_weight, bool detach, Needs needs) {
  Given g{in_layout(dy_, l.channels_last), dy_, false, detach || l.mode == Mode::one, std::nullopt, n_};
  check_type(g.dy, l.dtype, "dy");
  check_size(g.dy, l.rows() * l.output.channels, "dy");
  if (l.mode == Mode::one) {
    g.source = g.dy;
  } else if (a.numel() != 0 || g.dy.numel() == 0) {
    g.source = a.numel() != 0 ? in_layout(a, l.channels_last) : g.dy;
    g.from_a = true;
  } else if (l.mode == Mode::two && y.has_value()) {
    g.source = in_layout(*y, l.channels_last);
  } else {  // computed again
    g.from_a = true;
    g.source = product(l);
    if (l.max_out > 1) {
      const Tensor units = g.source;
      g.source = l.new_output(l.dtype, l.output.channels);
      ScaleArguments s = scaling(l, g.source.data_ptr(), units.data_ptr(), nullptr, nullptr, nullptr);
      s.mode = Mode::one;
      scale(s, l.type);
    }
  }
  check_type(g.source, l.dtype, "y or a");
  check_size(g.source, l.rows() * l.output.channels, "y or a");
  if (l.max_out > 1) {
    g.index = in_layout(index, l.channels_last && index.dim() == 4);
    check_type(*g.index, ScalarType::Byte, "index");
    check_size(*g.index, l.rows() * l.output.channels, "index");
  }
  if (l.mode != Mode::one) {
    if (n_.numel() != l.windows()) {
      g.n = l.new_norms();
      norms(l, nullptr, g.n.data_ptr());
    } else {
      g.n = in_layout(n_, l.norms_channels_last());
    }
    check_type(g.n, wide(l.dtype), "n");
  }

  Pull pull;
  pull.through_norm = !g.detach;
  if (l.mode == Mode::one && l.max_out == 1) pull.passes_on = g.dy.data_ptr();
  pull.rows = [&](int64_t begin, int64_t count, void* da, void* q, void* db) {
    const int64_t channels = l.output.channels, bytes = l.bytes();
    ScaleBackwardArguments s = scaling_backward(l, g, da, q, db);
    s.dy = at(s.dy, begin * channels, bytes);
    s.source = at(s.source, begin * channels, bytes);
    s.index = reinterpret_cast<uint8_t*>(at(s.index, begin * channels, 1));
    s.n = at(s.n, begin, l.wide_bytes());
    s.layout = rows_layout(count, channels);
    kernels(l.type).scale_backward_rows(s, 0, count);
  };
  pull.whole = [&](void* da, void* q, void* db) { scale_backward(scaling_backward(l, g, da, q, db), l.type); };
  return gradients(l, pull, normalize_weight, needs);
}

}  // namespace

Outputs linear_forward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t mode, double exponent,
    bool normalize_weight, int64_t max_out, const OptionalTensor& squares, bool keep) {
  return forward(Layer(x, weight, bias, mode, exponent, normalize_weight, max_out), squares, keep);
}

Gradients linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t mode, double exponent,
    const OptionalTensor& y, const Tensor& n, const Tensor& a, const Tensor& index, bool normalize_weight,
    int64_t max_out, bool detach, bool need_dx, bool need_dw, bool need_dbias, bool need_db) {
  const Layer l(x, weight, bias, mode, exponent, normalize_weight, max_out);
  return backward(l, dy, y, n, a, index, normalize_weight, detach, {need_dx, need_dw, need_dbias, need_db});
}

Outputs conv2d_forward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t s0, int64_t s1, int64_t p0, int64_t p1,
    int64_t d0, int64_t d1, int64_t groups, int64_t mode, double exponent, bool normalize_weight, int64_t max_out,
    const OptionalTensor& squares, bool keep) {
  return forward(Layer(x, weight, bias, {s0, s1}, {p0, p1}, {d0, d1}, groups, mode, exponent, normalize_weight, max_out),
                 squares, keep);
}

Gradients conv2d_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t s0, int64_t s1,
    int64_t p0, int64_t p1, int64_t d0, int64_t d1, int64_t groups, int64_t mode, double exponent,
    const OptionalTensor& y, const Tensor& n, const Tensor& a, const Tensor& index, bool normalize_weight,
    int64_t max_out, bool detach, bool need_dx, bool need_dw, bool need_dbias, bool need_db) {
  const Layer l(x, weight, bias, {s0, s1}, {p0, p1}, {d0, d1}, groups, mode, exponent, normalize_weight, max_out);
  return backward(l, dy, y, n, a, index, normalize_weight, detach, {need_dx, need_dw, need_dbias, need_db});
}

}  // namespace bcos::cpu
