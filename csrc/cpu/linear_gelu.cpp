// The B-cos linear layer (B = 2) with a GELU behind it, as one op.
//
// Scaling, GELU and the sum of squares that the next layer's norms are made of are one pass over the product, in the cache
// where the layer runs in blocks; the backward goes from dL/dh and y to dL/da in one. The gradient of y is never written.
#include "linear_gelu.h"

namespace bcos::cpu {
namespace {

Layer layer_of(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool normalize_weight) {
  Layer l(x, weight, bias, 2, 1.0, normalize_weight, 1);
  STD_TORCH_CHECK(l.type != Type::float16, "bcos_kernels_cpp: linear_gelu expects no float16");
  return l;
}

}  // namespace

Outputs linear_gelu_forward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& squares_of_x,
    bool normalize_weight, bool keep, bool emits_squares) {
  const Layer l = layer_of(x, weight, bias, normalize_weight);
  const Kernels& k = kernels(l.type);
  const int64_t columns = l.output.channels, bytes = l.bytes(), wide_ = l.wide_bytes();
  const void* known = l.squares_of_input(squares_of_x);
  const Tensor n = l.new_norms();
  OptionalTensor h, y, squares;
  if (emits_squares) squares = empty({l.rows()}, wide(l.dtype));
  ScaleGeluArguments s{nullptr, nullptr, nullptr, n.data_ptr(), data(squares), columns};
  if (l.runs_in_blocks()) {
    h = l.new_output(l.dtype, columns);
    if (keep) y = l.new_output(l.dtype, columns);
    const OptionalTensor to = keep ? y : h;  // where the product goes
    product_in_blocks(
        l, chunks_of_rows(l), known, n.data_ptr(), false,
        [&](int64_t begin, void*) -> void* { return at(data(to), begin * columns, bytes); },
        [&](int64_t, int64_t begin, int64_t count, void* a) {
          ScaleGeluArguments block = s;
          block.a = a;
          block.h = at(data(h), begin * columns, bytes);
          block.y = keep ? a : nullptr;
          block.n = at(s.n, begin, wide_);
          block.squares = at(s.squares, begin, wide_);
          k.scale_gelu_rows(block, 0, count);
        });
  } else {
    const Tensor a = product(l);
    norms(l, known, n.data_ptr());
    if (keep) y = a;
    h = keep ? l.new_output(l.dtype, columns) : a;
    s.a = a.data_ptr();
    s.y = data(y);
    s.h = data(h);
    in_parallel(l.rows(), columns, [&](int64_t begin, int64_t end) { k.scale_gelu_rows(s, begin, end); });
  }
  const auto or_nothing = [&](const OptionalTensor& t, ScalarType type) { return t.has_value() ? *t : nothing(type); };
  return {*h, or_nothing(squares, wide(l.dtype)), or_nothing(y, l.dtype), n};
}

Tensor linear_gelu_again(const Tensor& y_) {
  const Tensor y = in_layout(y_, false);
  STD_TORCH_CHECK(y.dim() == 2, "bcos_kernels_cpp: linear_gelu_again expects y of shape (rows, features), got ", y.dim(), " dimensions");
  const int64_t rows = y.size(0), columns = y.size(1);
  const Tensor h = empty({rows, columns}, y.scalar_type());
  const Kernels& k = kernels(type_of(y));
  in_parallel(rows, columns, [&](int64_t begin, int64_t end) {
    k.gelu_rows(y.data_ptr(), h.data_ptr(), columns, begin, end);
  });
  return h;
}

std::tuple<Tensor, Tensor, Tensor> linear_gelu_backward(
    const Tensor& dh, const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& y_, const Tensor& n_,
    bool normalize_weight, bool detach, bool need_dx, bool need_dw, bool need_dbias) {
  const Layer l = layer_of(x, weight, bias, normalize_weight);
  const int64_t columns = l.output.channels, bytes = l.bytes();
  const Tensor g = in_layout(dh, false), y = in_layout(y_, false), n = in_layout(n_, false);
  for (const Tensor* t : {&g, &y}) {
    check_type(*t, l.dtype, "dh and y");
    check_size(*t, l.rows() * columns, "dh and y");
  }
  check_type(n, wide(l.dtype), "n");
  check_size(n, l.rows(), "n");
  const auto pull = [&](int64_t begin, int64_t count, void* da, void* q) {
    kernels(l.type).scale_gelu_backward_rows(
        {da, q, at(g.data_ptr(), begin * columns, bytes), at(y.data_ptr(), begin * columns, bytes),
         at(n.data_ptr(), begin, l.wide_bytes()), columns, detach},
        0, count);
  };
  Pull source;
  source.through_norm = !detach;
  source.rows = [&](int64_t begin, int64_t count, void* da, void* q, void*) { pull(begin, count, da, q); };
  source.whole = [&](void* da, void* q, void*) {
    in_parallel(l.rows(), columns, [&](int64_t begin, int64_t end) {
      pull(begin, end - begin, at(da, begin * columns, bytes), at(q, begin, l.wide_bytes()));
    });
  };
  const Gradients found = gradients(l, source, normalize_weight, {need_dx, need_dw, need_dbias, false});
  return {std::get<0>(found), std::get<1>(found), std::get<2>(found)};
}

}  // namespace bcos::cpu
