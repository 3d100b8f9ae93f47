// The CPU kernels as private ops bcos_kernels_cpp::*, against the LibTorch stable ABI. bcos_kernels/cpu.py allocates,
// brings tensors to a dense layout and calls them together with the library's convolutions and matrix products.
//
// Here: argument checks, the split of the work over threads, and what is per channel only.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "../math.h"
#include "kernels.h"

namespace {

using bcos::cpu::BatchNormArguments;
using bcos::cpu::BatchNormBackwardArguments;
using bcos::cpu::Kernels;
using bcos::cpu::Layout;
using bcos::cpu::Mode;
using bcos::cpu::ScaleArguments;
using bcos::cpu::ScaleBackwardArguments;
using bcos::cpu::Type;
using bcos::cpu::Window;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kGrain = 16384;  // elements of a task, at least: about the cost of starting a thread's share

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return Type::float32;
    case torch::headeronly::ScalarType::Double: return Type::float64;
    case torch::headeronly::ScalarType::BFloat16: return Type::bfloat16;
    case torch::headeronly::ScalarType::Half: return Type::float16;
    default: break;
  }
  STD_TORCH_CHECK(false, "bcos_kernels_cpp: expected float32, float64, bfloat16 or float16");
  return Type::float32;
}

template <class T = void>
T* data(const OptionalTensor& t) {
  return t.has_value() ? static_cast<T*>(t->data_ptr()) : nullptr;
}

void check_size(const Tensor& t, int64_t expected, const char* name) {
  STD_TORCH_CHECK(t.numel() == expected, "bcos_kernels_cpp: expected ", expected, " elements of ", name, ", got ", t.numel());
}

template <class F>
void in_parallel(int64_t items, int64_t elements_per_item, const F& f) {
  if (items == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_item));
  torch::stable::parallel_for(0, items, grain, f);
}

struct Scratch {
  std::unique_ptr<char[]> memory;
  explicit Scratch(int64_t elements, Type type)
      : memory(new char[static_cast<size_t>(elements) * (type == Type::float64 ? 8 : 4)]) {}
  void* get() const { return memory.get(); }
};

Window window_of(
    const Tensor& x, const Tensor& n, int64_t k0, int64_t k1, int64_t s0, int64_t s1, int64_t p0, int64_t p1, int64_t d0,
    int64_t d1) {
  return Window{x.size(2), x.size(3), n.size(2), n.size(3), {k0, k1}, {s0, s1}, {p0, p1}, {d0, d1}};
}

// (M, K) -> n (M)
void linear_norm(const Tensor& x, const Tensor& n) {
  const Kernels& k = kernels(type_of(x));
  const int64_t rows = x.size(0), columns = x.size(1);
  check_size(n, rows, "n");
  const void* px = x.data_ptr();
  void* pn = n.data_ptr();
  in_parallel(rows, columns, [&](int64_t begin, int64_t end) { k.norm_rows(px, pn, columns, begin, end); });
}

// x (N, C, H, W) -> n (N, G, P, Q)
void conv2d_norm(
    const Tensor& x, const Tensor& n, bool channels_last, int64_t k0, int64_t k1, int64_t s0, int64_t s1, int64_t p0,
    int64_t p1, int64_t d0, int64_t d1) {
  const Type type = type_of(x);
  const Kernels& k = kernels(type);
  const Window w = window_of(x, n, k0, k1, s0, s1, p0, p1, d0, d1);
  const Layout l{x.size(0), w.height * w.width, x.size(1), n.size(1), channels_last};
  const int64_t maps = l.images * l.groups;
  const Scratch map(maps * l.pixels, type), scratch(maps * w.height * w.out_width, type);
  const void* px = x.data_ptr();
  if (channels_last) {
    in_parallel(l.images * l.pixels, l.channels, [&](int64_t begin, int64_t end) {
      k.sum_squares_rows(px, map.get(), l, begin, end);
    });
  } else {
    in_parallel(maps, l.pixels * l.channels / l.groups, [&](int64_t begin, int64_t end) {
      k.sum_squares_planes(px, map.get(), l, begin, end);
    });
  }
  void* pn = n.data_ptr();
  in_parallel(maps, (w.height + w.out_height) * w.out_width * k1, [&](int64_t begin, int64_t end) {
    k.window_norm(map.get(), pn, scratch.get(), w, begin, end);
  });
}

void add_norm_term(const Tensor& dx, const Tensor& x, const void* map, const Tensor& out, const Layout& l) {
  const Kernels& k = kernels(type_of(x));
  check_size(dx, x.numel(), "dx");
  check_size(out, x.numel(), "out");
  const void* pdx = dx.data_ptr();
  void* pout = out.data_ptr();
  const void* px = x.data_ptr();
  if (l.rows) {
    in_parallel(l.images * l.pixels, l.channels, [&](int64_t begin, int64_t end) {
      k.add_norm_term_rows(pout, pdx, px, map, l, begin, end);
    });
  } else {
    in_parallel(l.images * l.channels, l.pixels, [&](int64_t begin, int64_t end) {
      k.add_norm_term_planes(pout, pdx, px, map, l, begin, end);
    });
  }
}

// out = dx + x * q per row: x, dx, out (M, K), q (M)
void linear_norm_backward(const Tensor& q, const Tensor& x, const Tensor& dx, const Tensor& out) {
  check_size(q, x.size(0), "q");
  add_norm_term(dx, x, q.data_ptr(), out, Layout{1, x.size(0), x.size(1), 1, true});
}

// out = dx + x * (transposed box filter of q); out may be dx
void conv2d_norm_backward(
    const Tensor& q, const Tensor& x, const Tensor& dx, const Tensor& out, bool channels_last, int64_t k0, int64_t k1, int64_t s0,
    int64_t s1, int64_t p0, int64_t p1, int64_t d0, int64_t d1) {
  const Type type = type_of(x);
  const Kernels& k = kernels(type);
  const Window w = window_of(x, q, k0, k1, s0, s1, p0, p1, d0, d1);
  const Layout l{x.size(0), w.height * w.width, x.size(1), q.size(1), channels_last};
  const bool pointwise = k0 * k1 == 1 && s0 == 1 && s1 == 1 && p0 == 0 && p1 == 0;
  if (pointwise) return add_norm_term(dx, x, q.data_ptr(), out, l);
  const int64_t maps = l.images * l.groups;
  const Scratch map(maps * l.pixels, type), scratch(maps * w.height * w.out_width, type);
  const void* pq = q.data_ptr();
  in_parallel(maps, (w.height + w.out_height) * w.out_width * k1, [&](int64_t begin, int64_t end) {
    k.window_spread(pq, map.get(), scratch.get(), w, begin, end);
  });
  add_norm_term(dx, x, map.get(), out, l);
}

Mode mode_of(int64_t mode) { return mode == 1 ? Mode::one : mode == 2 ? Mode::two : Mode::general; }

int64_t plane_blocks(const Layout& l) {
  return l.images * l.groups * ((l.pixels + bcos::cpu::kBlock - 1) / bcos::cpu::kBlock);
}

// a (layout, units) -> y; mode 1, 2, or 0 for general B with exponent B - 1
void scale(
    const Tensor& a, const Tensor& y, const OptionalTensor& kept, const OptionalTensor& index, const OptionalTensor& n,
    int64_t images, int64_t pixels, int64_t channels, int64_t groups, bool rows, int64_t max_out, int64_t mode,
    double exponent) {
  const Kernels& k = kernels(type_of(a));
  const Layout l{images, pixels, channels, groups, rows};
  check_size(a, images * pixels * channels * max_out, "a");
  check_size(y, images * pixels * channels, "y");
  if (mode != 1) check_size(*n, images * pixels * groups, "n");
  const ScaleArguments s{y.data_ptr(), a.data_ptr(), data(kept), data<uint8_t>(index), data(n), l, max_out,
                         mode_of(mode), exponent};
  if (rows) {
    in_parallel(images * pixels, channels * max_out, [&](int64_t begin, int64_t end) { k.scale_rows(s, begin, end); });
  } else {
    in_parallel(plane_blocks(l), channels / groups * max_out * std::min(pixels, bcos::cpu::kBlock),
                [&](int64_t begin, int64_t end) { k.scale_planes(s, begin, end); });
  }
}

void scale_backward(
    const Tensor& dy, const Tensor& source, const OptionalTensor& index, const OptionalTensor& n, const Tensor& da,
    const OptionalTensor& q, const OptionalTensor& db, int64_t images, int64_t pixels, int64_t channels, int64_t groups,
    bool rows, int64_t max_out, int64_t mode, double exponent, bool from_a, bool detach, bool linear_norm) {
  const Kernels& k = kernels(type_of(dy));
  const Layout l{images, pixels, channels, groups, rows};
  const int64_t outputs = images * pixels * channels;
  check_size(dy, outputs, "dy");
  check_size(source, outputs, "y or a");
  check_size(da, outputs * max_out, "da");
  if (mode != 1) check_size(*n, images * pixels * groups, "n");
  if (q.has_value()) check_size(*q, images * pixels * groups, "q");
  if (index.has_value()) check_size(*index, outputs, "index");
  if (db.has_value()) check_size(*db, rows ? images * pixels : plane_blocks(l), "db");
  const ScaleBackwardArguments s{da.data_ptr(),      data(q), data(db), dy.data_ptr(), source.data_ptr(),
                                 data<uint8_t>(index), data(n), l,       max_out,       mode_of(mode),
                                 exponent,           from_a,  detach,   linear_norm};
  if (rows) {
    in_parallel(images * pixels, channels * max_out, [&](int64_t begin, int64_t end) {
      k.scale_backward_rows(s, begin, end);
    });
  } else {
    in_parallel(plane_blocks(l), channels / groups * max_out * std::min(pixels, bcos::cpu::kBlock),
                [&](int64_t begin, int64_t end) { k.scale_backward_planes(s, begin, end); });
  }
}

// w, w_hat: dimension 0 outermost, the others in any common order
void normalize_weight(const Tensor& w, const Tensor& w_hat) {
  const Kernels& k = kernels(type_of(w));
  const int64_t units = w.size(0), columns = units == 0 ? 0 : w.numel() / units;
  const void* pw = w.data_ptr();
  void* ph = w_hat.data_ptr();
  in_parallel(units, columns, [&](int64_t begin, int64_t end) { k.normalize_weight(pw, ph, columns, begin, end); });
}

void weight_norm_backward(const Tensor& dw_hat, const Tensor& w, const Tensor& dw) {
  const Kernels& k = kernels(type_of(w));
  const int64_t units = w.size(0), columns = units == 0 ? 0 : w.numel() / units;
  const void *pg = dw_hat.data_ptr(), *pw = w.data_ptr();
  void* pd = dw.data_ptr();
  in_parallel(units, columns, [&](int64_t begin, int64_t end) {
    k.weight_norm_backward(pg, pw, pd, columns, begin, end);
  });
}

// Rows in as many chunks as there are threads: sums are per chunk, added in order, so a run repeats bit for bit.
struct Chunks {
  int64_t count, size;
  Chunks(int64_t rows, int64_t channels) {
    const int64_t threads = torch::stable::get_num_threads();
    count = std::max<int64_t>(1, std::min(threads, rows * channels / kGrain));
    size = (rows + count - 1) / count;
  }
};

template <class W>
void moments(const Tensor& x, const Layout& l, W* mean, W* var) {
  const Kernels& k = kernels(type_of(x));
  const void* px = x.data_ptr();
  if (!l.rows) {
    in_parallel(l.channels, l.images * l.pixels, [&](int64_t begin, int64_t end) {
      k.moments_planes(px, mean, var, l, begin, end);
    });
    return;
  }
  const int64_t rows = l.images * l.pixels, C = l.channels;
  const Chunks chunks(rows, C);
  std::vector<W> origin(C, W(0));
  std::vector<double> sums(chunks.count * 2 * C);
  const int64_t sample = std::min<int64_t>(rows, 16);  // their mean is near enough to the batch's not to cancel
  k.moments_rows(px, origin.data(), sums.data(), l, 0, sample);
  for (int64_t c = 0; c < C; c++) origin[c] = std::isfinite(sums[c]) ? static_cast<W>(sums[c] / sample) : W(0);
  torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      k.moments_rows(px, origin.data(), sums.data() + i * 2 * C, l, std::min(i * chunks.size, rows),
                     std::min((i + 1) * chunks.size, rows));
    }
  });
  for (int64_t c = 0; c < C; c++) {
    double first = 0, second = 0;
    for (int64_t i = 0; i < chunks.count; i++) {
      first += sums[i * 2 * C + c];
      second += sums[i * 2 * C + C + c];
    }
    const double shift = first / rows, v = second / rows - shift * shift;
    mean[c] = static_cast<W>(origin[c] + shift);
    var[c] = static_cast<W>(v < 0 ? 0 : v);
  }
}

template <class W>
void batch_norm_of(
    const Tensor& x, const Tensor& y, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& mean, const Tensor& var, bool training, double eps, bool relu,
    const Layout& l) {
  const Kernels& k = kernels(type_of(x));
  W* pvar = static_cast<W*>(var.data_ptr());
  if (training) moments<W>(x, l, data<W>(mean), pvar);
  std::vector<W> scale(l.channels), shift(l.channels, W(0));
  for (int64_t c = 0; c < l.channels; c++) {
    scale[c] = (weight.has_value() ? data<W>(weight)[c] : W(1)) / std::sqrt(pvar[c] + static_cast<W>(eps));
    if (bias.has_value()) shift[c] = data<W>(bias)[c];
  }
  const BatchNormArguments s{x.data_ptr(), y.data_ptr(), data(residual), scale.data(), shift.data(), l, relu};
  if (l.rows) {
    in_parallel(l.images * l.pixels, l.channels, [&](int64_t begin, int64_t end) { k.batch_norm_rows(s, begin, end); });
  } else {
    in_parallel(l.images * l.channels, l.pixels, [&](int64_t begin, int64_t end) { k.batch_norm_planes(s, begin, end); });
  }
}

// weight, bias, mean, var (C) in the statistics type; mean and var are written in training, read otherwise
void batch_norm(
    const Tensor& x, const Tensor& y, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& mean, const Tensor& var, bool training, double eps, bool relu,
    int64_t images, int64_t pixels, int64_t channels, bool rows) {
  const Layout l{images, pixels, channels, 1, rows};
  check_size(x, images * pixels * channels, "x");
  check_size(y, images * pixels * channels, "y");
  if (type_of(x) == Type::float64) {
    batch_norm_of<double>(x, y, residual, weight, bias, mean, var, training, eps, relu, l);
  } else {
    batch_norm_of<float>(x, y, residual, weight, bias, mean, var, training, eps, relu, l);
  }
}

template <class W>
void batch_norm_backward_of(
    const Tensor& dy, const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight, const OptionalTensor& mean,
    const Tensor& var, double eps, bool var_term, const OptionalTensor& dx, const OptionalTensor& dweight,
    const OptionalTensor& dbias, const OptionalTensor& dresidual, const Layout& l) {
  const Kernels& k = kernels(type_of(x));
  const int64_t C = l.channels, rows = l.images * l.pixels;
  const W* pvar = static_cast<const W*>(var.data_ptr());
  std::vector<W> inverse_std(C), scale(C), factor(C);
  for (int64_t c = 0; c < C; c++) {
    inverse_std[c] = 1 / std::sqrt(pvar[c] + static_cast<W>(eps));
    scale[c] = inverse_std[c] * (weight.has_value() ? data<W>(weight)[c] : W(1));
  }
  BatchNormBackwardArguments s{dy.data_ptr(), x.data_ptr(), data(y), data(dresidual), nullptr, data(dx),
                               scale.data(),  nullptr,      nullptr, l};
  if (var_term || dweight.has_value() || dbias.has_value() || dresidual.has_value()) {
    const Chunks chunks(rows, C);
    std::vector<double> sums((l.rows ? chunks.count : 1) * 2 * C);
    s.sums = sums.data();
    if (l.rows) {
      torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          k.batch_norm_reduce_rows(s, i, std::min(i * chunks.size, rows), std::min((i + 1) * chunks.size, rows));
        }
      });
      for (int64_t i = 1; i < chunks.count; i++) {
        for (int64_t c = 0; c < 2 * C; c++) sums[c] += sums[i * 2 * C + c];
      }
    } else {
      in_parallel(C, rows, [&](int64_t begin, int64_t end) { k.batch_norm_reduce_planes(s, begin, end); });
    }
    for (int64_t c = 0; c < C; c++) {
      if (dbias.has_value()) data<W>(dbias)[c] = static_cast<W>(sums[c]);
      if (dweight.has_value()) data<W>(dweight)[c] = static_cast<W>(sums[C + c] * inverse_std[c]);
      factor[c] = static_cast<W>(-sums[C + c] * scale[c] * inverse_std[c] * inverse_std[c] / std::max<int64_t>(rows, 1));
    }
    if (dresidual.has_value()) {
      s.dy = dresidual->data_ptr();  // masked already: no need to read y again
      s.y = nullptr;
    }
  }
  if (!dx.has_value()) return;
  if (var_term) {
    s.factor = factor.data();
    s.mean = data<W>(mean);
  }
  if (l.rows) {
    in_parallel(rows, C, [&](int64_t begin, int64_t end) { k.batch_norm_backward_rows(s, begin, end); });
  } else {
    in_parallel(l.images * C, l.pixels, [&](int64_t begin, int64_t end) { k.batch_norm_backward_planes(s, begin, end); });
  }
}

// dweight, dbias (C) in the statistics type; var_term: the variance is the batch's and not a constant;
// dresidual only together with y (without a mask it is dy itself)
void batch_norm_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight, const OptionalTensor& mean,
    const Tensor& var, double eps, bool var_term, const OptionalTensor& dx, const OptionalTensor& dweight,
    const OptionalTensor& dbias, const OptionalTensor& dresidual, int64_t images, int64_t pixels, int64_t channels,
    bool rows) {
  const Layout l{images, pixels, channels, 1, rows};
  check_size(x, images * pixels * channels, "x");
  check_size(dy, images * pixels * channels, "dy");
  STD_TORCH_CHECK(!dresidual.has_value() || y.has_value(), "bcos_kernels_cpp: expected y together with dresidual");
  if (type_of(x) == Type::float64) {
    batch_norm_backward_of<double>(dy, x, y, weight, mean, var, eps, var_term, dx, dweight, dbias, dresidual, l);
  } else {
    batch_norm_backward_of<float>(dy, x, y, weight, mean, var, eps, var_term, dx, dweight, dbias, dresidual, l);
  }
}

}  // namespace

#define BCOS_WINDOW "int k0, int k1, int s0, int s1, int p0, int p1, int d0, int d1"
#define BCOS_LAYOUT "int images, int pixels, int channels, int groups, bool rows"

STABLE_TORCH_LIBRARY(bcos_kernels_cpp, m) {
  m.def("linear_norm(Tensor x, Tensor(a!) n) -> ()");
  m.def("linear_norm_backward(Tensor q, Tensor x, Tensor dx, Tensor(a!) out) -> ()");
  m.def("conv2d_norm(Tensor x, Tensor(a!) n, bool channels_last, " BCOS_WINDOW ") -> ()");
  m.def("conv2d_norm_backward(Tensor q, Tensor x, Tensor dx, Tensor(a!) out, bool channels_last, " BCOS_WINDOW ") -> ()");
  m.def("scale(Tensor a, Tensor(a!) y, Tensor(b!)? kept, Tensor(c!)? index, Tensor? n, " BCOS_LAYOUT
        ", int max_out, int mode, float exponent) -> ()");
  m.def("scale_backward(Tensor dy, Tensor source, Tensor? index, Tensor? n, Tensor(a!) da, Tensor(b!)? q, Tensor(c!)? db, "
        BCOS_LAYOUT ", int max_out, int mode, float exponent, bool from_a, bool detach, bool linear_norm) -> ()");
  m.def("normalize_weight(Tensor w, Tensor(a!) w_hat) -> ()");
  m.def("weight_norm_backward(Tensor dw_hat, Tensor w, Tensor(a!) dw) -> ()");
  m.def("batch_norm(Tensor x, Tensor(a!) y, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(b!)? mean, "
        "Tensor(c!) var, bool training, float eps, bool relu, int images, int pixels, int channels, bool rows) -> ()");
  m.def("batch_norm_backward(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor? mean, Tensor var, float eps, "
        "bool var_term, Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias, Tensor(d!)? dresidual, int images, "
        "int pixels, int channels, bool rows) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(bcos_kernels_cpp, CPU, m) {
  m.impl("linear_norm", TORCH_BOX(&linear_norm));
  m.impl("linear_norm_backward", TORCH_BOX(&linear_norm_backward));
  m.impl("conv2d_norm", TORCH_BOX(&conv2d_norm));
  m.impl("conv2d_norm_backward", TORCH_BOX(&conv2d_norm_backward));
  m.impl("scale", TORCH_BOX(&scale));
  m.impl("scale_backward", TORCH_BOX(&scale_backward));
  m.impl("normalize_weight", TORCH_BOX(&normalize_weight));
  m.impl("weight_norm_backward", TORCH_BOX(&weight_norm_backward));
  m.impl("batch_norm", TORCH_BOX(&batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
}
