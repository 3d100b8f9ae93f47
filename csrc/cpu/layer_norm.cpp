// Launcher of layer normalisation, forward and backward; the passes over rows are in layer_norm_kernels.cpp.
#include "layer_norm.h"

#include <limits>

namespace bcos::cpu {
namespace {

// x seen as rows: the last `dims` dimensions are the columns.
struct Rows {
  Tensor x;
  int64_t rows = 1, columns = 1, outer;

  Rows(const Tensor& given, int64_t dims) : x(in_layout(given, false)), outer(given.dim() - dims) {
    STD_TORCH_CHECK(dims > 0 && outer >= 0, "bcos_kernels_cpp: expected 1 to ", x.dim(), " dimensions, got ", dims);
    for (int64_t d = 0; d < x.dim(); d++) (d < outer ? rows : columns) *= x.size(d);
  }
  bool empty() const { return rows == 0 || columns == 0; }
  ScalarType wide_type() const { return wide(x.scalar_type()); }
  Tensor new_statistics() const { return bcos::cpu::empty(x.sizes().data(), outer, wide_type(), false); }
  Tensor new_parameter() const { return bcos::cpu::empty(x.sizes().data() + outer, x.dim() - outer, wide_type(), false); }

  // A parameter in the statistics type; where there is none, `value` everywhere.
  Tensor parameter(const OptionalTensor& t, double value, const char* name) const {
    if (!t.has_value()) {
      Tensor constant = new_parameter();
      return torch::stable::fill_(constant, value);
    }
    check_size(*t, columns, name);
    return in_layout(t->scalar_type() == wide_type() ? *t : torch::stable::to(*t, wide_type()), false);
  }
};

template <class W>
void add_chunks(const double* sums, int64_t chunks, int64_t columns, int64_t from, const OptionalTensor& to) {
  if (!to.has_value()) return;
  W* out = data<W>(to);
  for (int64_t c = 0; c < columns; c++) {
    double sum = 0;
    for (int64_t i = 0; i < chunks; i++) sum += sums[(2 * i + from) * columns + c];
    out[c] = static_cast<W>(sum);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_forward(
    const Tensor& x, int64_t dims, const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool emits_squares) {
  const Rows in(x, dims);
  const Type type = type_of(x);
  const Tensor y = empty_like(in.x, x.scalar_type()), mean = in.new_statistics(), rstd = in.new_statistics();
  Tensor squares = emits_squares ? in.new_statistics() : nothing(in.wide_type());
  if (in.empty()) {  // without features: the mean of nothing
    Tensor of_mean = mean, of_rstd = rstd;
    torch::stable::fill_(of_mean, std::numeric_limits<double>::quiet_NaN());
    torch::stable::fill_(of_rstd, std::numeric_limits<double>::quiet_NaN());
    if (emits_squares) torch::stable::zero_(squares);
    return {y, mean, rstd, squares};
  }
  const Tensor scale = in.parameter(weight, 1, "weight"), shift = in.parameter(bias, 0, "bias");
  const LayerNormArguments s{
      in.x.data_ptr(), y.data_ptr(), mean.data_ptr(), rstd.data_ptr(), scale.data_ptr(), shift.data_ptr(),
      emits_squares ? squares.data_ptr() : nullptr, in.columns, eps};
  const Kernels& k = kernels(type);
  in_parallel(in.rows, in.columns, [&](int64_t begin, int64_t end) { k.layer_norm_rows(s, begin, end); });
  return {y, mean, rstd, squares};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Tensor& dy, const Tensor& x, int64_t dims, const OptionalTensor& weight, const Tensor& mean, const Tensor& rstd,
    bool detach, bool need_dx, bool need_dweight, bool need_dbias) {
  const Rows in(x, dims);
  const Type type = type_of(x);
  const Tensor g = in_layout(dy, false), m = in_layout(mean, false), r = in_layout(rstd, false);
  check_type(g, x.scalar_type(), "dy");
  check_size(g, in.x.numel(), "dy");
  for (const Tensor* t : {&m, &r}) {
    check_type(*t, in.wide_type(), "mean and rstd");
    check_size(*t, in.rows, "mean and rstd");
  }
  OptionalTensor dx, dweight, dbias;
  if (need_dx) dx = empty_like(in.x, x.scalar_type());
  if (need_dweight) dweight = in.new_parameter();
  if (need_dbias) dbias = in.new_parameter();
  const bool sums = need_dweight || need_dbias;
  if (in.empty()) {
    if (need_dweight) torch::stable::zero_(*dweight);
    if (need_dbias) torch::stable::zero_(*dbias);
  } else if (need_dx || sums) {
    const Tensor scale = in.parameter(weight, 1, "weight");
    const Chunks chunks(in.rows, in.columns);
    const int64_t values = sums ? chunks.count * 2 * in.columns : 0;
    const Scratch total(values * static_cast<int64_t>(sizeof(double))), scratch(wide_bytes(values, type));
    const LayerNormBackwardArguments s{
        data(dx), sums ? static_cast<double*>(total.get()) : nullptr, scratch.get(), g.data_ptr(), in.x.data_ptr(),
        scale.data_ptr(), m.data_ptr(), r.data_ptr(), in.columns, detach};
    const Kernels& k = kernels(type);
    chunks.each([&](int64_t i) { k.layer_norm_backward_rows(s, i, chunks.begin(i), chunks.end(i)); });
    for (const bool of_bias : {false, true}) {
      const OptionalTensor& to = of_bias ? dbias : dweight;
      type == Type::float64 ? add_chunks<double>(s.sums, chunks.count, in.columns, of_bias, to)
                            : add_chunks<float>(s.sums, chunks.count, in.columns, of_bias, to);
    }
  }
  const auto or_nothing = [&](const OptionalTensor& t) { return t.has_value() ? *t : nothing(in.wide_type()); };
  return {or_nothing(dx), or_nothing(dweight), or_nothing(dbias)};
}

}  // namespace bcos::cpu
