// The B-cos layers on the CPU: the library's products, with the norm and the scaling around them.
//
// A layer whose windows are one pixel (linear, 1x1 convolution with channels innermost) is a matrix product over rows.
// It runs in blocks of rows that stay in a core's cache, so that of an activation only what the plain layer moves is
// moved:
//   forward   norms of the block's rows, the product, the scaling
//   backward  dL/da into a buffer of the block's size, dx = dL/da w + x q, dw += dL/da^T x
// Where the weight is large and the rows are few, and for every other convolution, the product runs over the whole
// batch, with one pass before and one after it.
#include "layers.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "passes.h"

namespace bcos::cpu {
namespace {

// Elements of a block's rows of x and of the output together: half a core's second-level cache, in float32.
constexpr int64_t kBlockElements = 1 << 17;
// Elements of the largest weight that every block may read again (1 MiB in float32), and whose gradient every thread
// may sum on its own.
constexpr int64_t kBlockWeight = 1 << 18;
constexpr int64_t kWorkspace = 64 << 20;  // bytes of the largest buffer that a thread keeps

Mode mode_of(int64_t mode) { return mode == 1 ? Mode::one : mode == 2 ? Mode::two : Mode::general; }

// Memory that a thread keeps from call to call, up to a size: a fresh buffer for every layer makes the C allocator give
// pages back to the system and fetch them again.
class Workspace {
 public:
  void* get(int64_t bytes, std::unique_ptr<char[]>* own) {
    if (bytes > kWorkspace) {
      own->reset(new char[static_cast<size_t>(bytes)]);
      return own->get();
    }
    if (size_ < bytes) {
      memory_.reset(new char[static_cast<size_t>(bytes)]);
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<char[]> memory_;
  int64_t size_ = 0;
};
thread_local Workspace whole_workspace, block_workspace;

void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}
// out = beta addend + a b
void multiply_add(const Tensor& out, const Tensor& addend, const Tensor& a, const Tensor& b, double beta) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), addend.get(), a.get(), b.get(), beta, 1.0));
}

char* at(const void* p, int64_t elements, int64_t bytes) {
  return p == nullptr ? nullptr : static_cast<char*>(const_cast<void*>(p)) + elements * bytes;
}

struct Layer {
  bool is_linear, channels_last;
  Tensor x, weight, w;  // dense, in one layout; w: normalised where that is asked for
  OptionalTensor bias;
  Window window;
  int64_t groups;
  Mode mode;
  double exponent;
  int64_t max_out;
  ScalarType dtype;
  Type type;
  Layout input, output;  // of a linear layer: one image of rows

  Layer(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias, int64_t mode, double exponent,
        bool normalize_weight, int64_t max_out)
      : is_linear(true), channels_last(false), x(in_layout(x_, false)), weight(in_layout(weight_, false)), w(weight),
        bias(bias), window{x.size(0), 1, x.size(0), 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}}, groups(1), mode(mode_of(mode)),
        exponent(exponent), max_out(max_out) {
    finish(normalize_weight);
    input = Layout{1, x.size(0), x.size(1), 1, true};
    output = Layout{1, x.size(0), weight.size(0) / max_out, 1, true};
  }

  Layer(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias, const int64_t (&stride)[2],
        const int64_t (&padding)[2], const int64_t (&dilation)[2], int64_t groups, int64_t mode, double exponent,
        bool normalize_weight, int64_t max_out)
      : is_linear(false), channels_last(is_channels_last(x_) || is_channels_last(weight_)),
        x(in_layout(x_, channels_last)), weight(in_layout(weight_, is_channels_last(weight_))),
        w(weight), bias(bias), window{x.size(2), x.size(3), 0, 0, {weight.size(2), weight.size(3)}, {}, {}, {}},
        groups(groups), mode(mode_of(mode)), exponent(exponent), max_out(max_out) {
    int64_t out[2];
    for (int i = 0; i < 2; i++) {
      window.stride[i] = stride[i];
      window.padding[i] = padding[i];
      window.dilation[i] = dilation[i];
      out[i] = (x.size(2 + i) + 2 * padding[i] - dilation[i] * (weight.size(2 + i) - 1) - 1) / stride[i] + 1;
    }
    window.out_height = out[0];
    window.out_width = out[1];
    finish(normalize_weight);
    // of one pixel both layouts are the same memory
    const bool rows = channels_last || (window.height * window.width == 1 && out[0] * out[1] == 1);
    input = Layout{x.size(0), window.height * window.width, x.size(1), groups, rows};
    output = Layout{x.size(0), out[0] * out[1], weight.size(0) / max_out, groups, rows};
  }

  void finish(bool normalize_weight) {
    dtype = x.scalar_type();
    type = type_of(x);
    check_type(weight, dtype, "weight");
    if (bias.has_value()) {
      check_type(*bias, dtype, "bias");
      bias = in_layout(*bias, false);
      check_size(*bias, weight.size(0), "bias");
    }
    if (normalize_weight) w = normalized(weight);
  }

  int64_t bytes() const { return bytes_of(type); }
  int64_t wide_bytes() const { return type == Type::float64 ? 8 : 4; }
  int64_t units() const { return output.channels * max_out; }
  int64_t depth() const { return is_linear ? x.size(1) : w.size(1) * w.size(2) * w.size(3); }
  int64_t rows() const { return output.images * output.pixels; }
  int64_t windows() const { return output.images * output.pixels * output.groups; }
  bool half() const { return type == Type::bfloat16 || type == Type::float16; }

  bool is_rows_times_matrix() const {
    return is_linear || (!half() && output.rows && groups == 1 && window.kernel[0] * window.kernel[1] == 1 &&
                         window.padding[0] == 0 && window.padding[1] == 0);
  }
  bool skips_pixels() const { return window.stride[0] != 1 || window.stride[1] != 1; }
  bool runs_in_blocks() const {
    return is_rows_times_matrix() && mode != Mode::one && units() * depth() <= kBlockWeight &&
           rows() * (units() + depth()) >= 2 * kGrain;
  }
  int64_t block_rows() const {
    return std::max<int64_t>(64, kBlockElements / std::max<int64_t>(1, units() + depth()) / 16 * 16);
  }

  Tensor new_output(ScalarType t, int64_t channels) const {
    if (is_linear) return empty({x.size(0), channels}, t);
    return empty({x.size(0), channels, window.out_height, window.out_width}, t, channels_last);
  }
  Tensor new_norms() const {
    if (is_linear) return empty({x.size(0)}, wide(dtype));
    return empty({x.size(0), groups, window.out_height, window.out_width}, wide(dtype));
  }
  Tensor new_input() const {
    if (is_linear) return empty({x.size(0), x.size(1)}, dtype);
    return empty({x.size(0), x.size(1), x.size(2), x.size(3)}, dtype, channels_last);
  }
  // Rows [begin, begin + count) of x: where they lie, or gathered into a buffer.
  const char* rows_of_input(int64_t begin, int64_t count, char* buffer) const {
    const char* base = static_cast<const char*>(x.data_ptr());
    const int64_t bytes_a_row = depth() * bytes();
    if (!skips_pixels()) return base + begin * bytes_a_row;
    for_pixels(begin, count, [&](int64_t i, int64_t pixel) {
      std::memcpy(buffer + i * bytes_a_row, base + pixel * bytes_a_row, bytes_a_row);
    });
    return buffer;
  }
  // f(i, input pixel of output row begin + i)
  template <class F>
  void for_pixels(int64_t begin, int64_t count, const F& f) const {
    int64_t q = begin % window.out_width, p = begin / window.out_width % window.out_height,
            image = begin / output.pixels;
    for (int64_t i = 0; i < count; i++) {
      f(i, (image * window.height + p * window.stride[0]) * window.width + q * window.stride[1]);
      if (++q == window.out_width) {
        q = 0;
        if (++p == window.out_height) p = 0, image++;
      }
    }
  }
};

// The whole product: a matrix product where the layer is one, else a convolution.
bool product_is_matrix(const Layer& l) { return l.is_linear || (l.is_rows_times_matrix() && l.rows() > 0); }

// The rows of x that a matrix product over the whole batch takes: where they lie, or gathered.
struct Rows {
  std::unique_ptr<Scratch> memory;
  const void* data;
  explicit Rows(const Layer& l) : data(l.x.data_ptr()) {
    if (!l.skips_pixels()) return;
    const int64_t bytes_a_row = l.depth() * l.bytes();
    memory = std::make_unique<Scratch>(l.rows() * bytes_a_row);
    char* to = static_cast<char*>(memory->get());
    in_parallel(l.rows(), l.depth(), [&](int64_t begin, int64_t end) {
      l.rows_of_input(begin, end - begin, to + begin * bytes_a_row);
    });
    data = to;
  }
};

void multiply_rows(const Layer& l, void* out, const void* rows, int64_t count, const Tensor& w_transposed) {
  const Tensor to = matrix(out, count, l.units(), l.dtype), from = matrix(const_cast<void*>(rows), count, l.depth(), l.dtype);
  l.bias.has_value() ? multiply_add(to, *l.bias, from, w_transposed, 1.0) : multiply(to, from, w_transposed);
}

Tensor transposed_weight(const Layer& l) { return matrix(l.w.data_ptr(), l.depth(), l.units(), l.dtype, true); }

Tensor convolution(const Layer& l) {
  AtenTensorHandle result, bias = l.bias.has_value() ? l.bias->get() : nullptr;
  const int64_t none[] = {0, 0};
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution(
      l.x.get(), l.w.get(), bias == nullptr ? nullptr : &bias, l.window.stride, 2, l.window.padding, 2, l.window.dilation,
      2, 0, none, 2, l.groups, &result));
  return in_layout(Tensor(result), l.channels_last);
}

Tensor product(const Layer& l) {
  if (product_is_matrix(l)) {
    const Tensor a = l.new_output(l.dtype, l.units());
    multiply_rows(l, a.data_ptr(), Rows(l).data, l.rows(), transposed_weight(l));
    return a;
  }
  return convolution(l);
}

void norms(const Layer& l, void* n) {
  if (l.is_linear) return row_norms(l.x.data_ptr(), n, l.type, l.rows(), l.depth(), true);
  window_norms(l.x.data_ptr(), n, l.type, l.input, l.window);
}

ScaleArguments scaling(const Layer& l, void* y, const void* a, void* kept, uint8_t* index, const void* n) {
  return {y, a, kept, index, n, l.output, l.max_out, l.mode, l.exponent};
}

Layout rows_layout(int64_t rows, int64_t channels) { return {1, rows, channels, 1, true}; }

void forward_in_blocks(const Layer& l, const Tensor& y, const OptionalTensor& kept, const OptionalTensor& index, const Tensor& n) {
  const Kernels& k = kernels(l.type);
  const int64_t depth = l.depth(), units = l.units(), channels = l.output.channels, bytes = l.bytes();
  const int64_t block = l.block_rows();
  const Chunks chunks(l.rows(), depth + units);
  Tensor w_transposed = transposed_weight(l);
  // The product is faster (by a fifth for 512 -> 128) with the longer side of a small weight outermost.
  if (units < depth) w_transposed = torch::stable::contiguous(w_transposed);
  chunks.each([&](int64_t chunk) {
    std::unique_ptr<char[]> own;
    const int64_t gathered = l.skips_pixels() ? block * depth * bytes : 0;
    char* scratch = static_cast<char*>(block_workspace.get(gathered + (l.max_out > 1 ? block * units * bytes : 0), &own));
    for (int64_t begin = chunks.begin(chunk); begin < chunks.end(chunk); begin += block) {
      const int64_t count = std::min(block, chunks.end(chunk) - begin);
      const char* x = l.rows_of_input(begin, count, scratch);
      void* n_block = at(n.data_ptr(), begin, l.wide_bytes());
      void* y_block = at(y.data_ptr(), begin * channels, bytes);
      void* kept_block = at(data(kept), begin * channels, bytes);
      void* a = l.max_out > 1 ? scratch + gathered : kept_block != nullptr ? kept_block : y_block;
      multiply_rows(l, a, x, count, w_transposed);
      k.norm_rows(x, n_block, depth, l.is_linear, 0, count);  // after the product, which has brought x into the cache
      ScaleArguments s = scaling(l, y_block, a, l.max_out > 1 ? kept_block : nullptr,
                                 reinterpret_cast<uint8_t*>(at(data<uint8_t>(index), begin * channels, 1)), n_block);
      s.layout = rows_layout(count, channels);
      k.scale_rows(s, 0, count);
    }
  });
}

bool keeps_a(const Layer& l) {
  return l.mode == Mode::general || (l.mode == Mode::two && l.type == Type::float16);
}

Outputs forward(const Layer& l, bool keep) {
  if (l.mode == Mode::one && l.max_out == 1) {
    return {product(l), nothing(wide(l.dtype)), nothing(l.dtype), nothing(ScalarType::Byte)};
  }
  const Tensor n = l.mode == Mode::one ? nothing(wide(l.dtype)) : l.new_norms();
  const bool with_a = keep && keeps_a(l);
  OptionalTensor kept, index, y;
  if (keep && l.max_out > 1) index = l.new_output(ScalarType::Byte, l.output.channels);
  if (l.runs_in_blocks()) {
    y = l.new_output(l.dtype, l.output.channels);
    if (with_a) kept = l.new_output(l.dtype, l.output.channels);
    forward_in_blocks(l, *y, kept, index, n);
  } else {
    const Tensor a = product(l);
    if (with_a) kept = l.max_out == 1 ? a : l.new_output(l.dtype, l.output.channels);
    y = l.max_out == 1 && !with_a ? a : l.new_output(l.dtype, l.output.channels);
    const ScaleArguments s = scaling(
        l, y->data_ptr(), a.data_ptr(), l.max_out > 1 ? data(kept) : nullptr, data<uint8_t>(index), n.data_ptr());
    if (l.mode != Mode::one && !l.is_linear) {
      window_norms_and_scale(l.x.data_ptr(), n.data_ptr(), s, l.type, l.input, l.window);
    } else {
      if (l.mode != Mode::one) norms(l, n.data_ptr());
      scale(s, l.type);
    }
  }
  return {*y, n, with_a ? *kept : nothing(l.dtype), index.has_value() ? *index : nothing(ScalarType::Byte)};
}

struct Needs {
  bool dx, dw, dbias, db;
};

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

Tensor like_weight(const Layer& l, ScalarType type) { return empty_like(l.weight, type); }

void zero_rows(const Tensor& t, int64_t rows, int64_t bytes_a_row) {
  char* p = static_cast<char*>(t.data_ptr());
  in_parallel(rows, bytes_a_row / 4, [&](int64_t begin, int64_t end) {
    std::memset(p + begin * bytes_a_row, 0, static_cast<size_t>((end - begin) * bytes_a_row));
  });
}

void scatter(const Layer& l, const Tensor& dx, const void* rows, int64_t begin, int64_t count) {
  char* to = static_cast<char*>(dx.data_ptr());
  const char* from = static_cast<const char*>(rows);
  const int64_t bytes_a_row = l.depth() * l.bytes();
  l.for_pixels(begin, count, [&](int64_t i, int64_t pixel) {
    std::memcpy(to + pixel * bytes_a_row, from + i * bytes_a_row, static_cast<size_t>(bytes_a_row));
  });
}

void backward_in_blocks(const Layer& l, const Given& g, const OptionalTensor& dx, const OptionalTensor& dw, void* whole_da, void* db) {
  const Kernels& k = kernels(l.type);
  const int64_t depth = l.depth(), units = l.units(), channels = l.output.channels, bytes = l.bytes(), wide = l.wide_bytes();
  const int64_t block = l.block_rows();
  const Chunks chunks(l.rows(), depth + units);
  const bool gathers = l.skips_pixels();
  if (dx.has_value() && gathers) zero_rows(*dx, l.input.images * l.input.pixels, depth * bytes);
  std::vector<Scratch> partial_dw;  // of the second chunk and later ones
  for (int64_t i = 1; dw.has_value() && i < chunks.count; i++) partial_dw.emplace_back(units * depth * bytes);
  const Tensor w = matrix(l.w.data_ptr(), units, depth, l.dtype);
  chunks.each([&](int64_t chunk) {
    std::unique_ptr<char[]> own;
    const int64_t q_bytes = block * wide, da_bytes = whole_da == nullptr ? block * units * bytes : 0;
    const int64_t x_bytes = gathers ? block * depth * bytes : 0;
    char* q = static_cast<char*>(block_workspace.get(q_bytes + da_bytes + 2 * x_bytes, &own));
    char* da_block = q + q_bytes;
    char* x_buffer = da_block + da_bytes;
    char* dx_buffer = x_buffer + x_bytes;
    OptionalTensor sum;
    if (dw.has_value()) sum = matrix(chunk == 0 ? dw->data_ptr() : partial_dw[chunk - 1].get(), units, depth, l.dtype);
    for (int64_t begin = chunks.begin(chunk); begin < chunks.end(chunk); begin += block) {
      const int64_t count = std::min(block, chunks.end(chunk) - begin);
      const char* x = l.rows_of_input(begin, count, x_buffer);
      char* da = whole_da == nullptr ? da_block : at(whole_da, begin * units, bytes);
      ScaleBackwardArguments s = scaling_backward(l, g, da, g.detach ? nullptr : q, at(db, begin, wide));
      s.dy = at(s.dy, begin * channels, bytes);
      s.source = at(s.source, begin * channels, bytes);
      s.index = reinterpret_cast<uint8_t*>(at(s.index, begin * channels, 1));
      s.n = at(s.n, begin, wide);
      s.layout = rows_layout(count, channels);
      k.scale_backward_rows(s, 0, count);
      const Tensor da_matrix = matrix(da, count, units, l.dtype);
      if (dx.has_value()) {
        char* to = gathers ? dx_buffer : at(dx->data_ptr(), begin * depth, bytes);
        multiply(matrix(to, count, depth, l.dtype), da_matrix, w);
        if (!g.detach) k.add_norm_term_rows(to, to, x, q, rows_layout(count, depth), 0, count);
        if (gathers) scatter(l, *dx, to, begin, count);
      }
      if (sum.has_value()) {
        const Tensor x_matrix = matrix(const_cast<char*>(x), count, depth, l.dtype);
        const Tensor da_transposed = matrix(da, units, count, l.dtype, true);
        const bool first = begin == chunks.begin(chunk);
        first ? multiply(*sum, da_transposed, x_matrix) : multiply_add(*sum, *sum, da_transposed, x_matrix, 1.0);
      }
    }
    // a chunk of no rows adds nothing
    if (sum.has_value() && chunks.begin(chunk) == chunks.end(chunk)) {
      std::memset(sum->data_ptr(), 0, static_cast<size_t>(units * depth * bytes));
    }
  });
  for (const Scratch& part : partial_dw) {
    in_parallel(units * depth, 1, [&](int64_t begin, int64_t end) {
      if (l.type == Type::float64) {
        double* to = static_cast<double*>(dw->data_ptr());
        const double* from = static_cast<const double*>(part.get());
        for (int64_t i = begin; i < end; i++) to[i] += from[i];
      } else {
        float* to = static_cast<float*>(dw->data_ptr());
        const float* from = static_cast<const float*>(part.get());
        for (int64_t i = begin; i < end; i++) to[i] += from[i];
      }
    });
  }
}

// da w, brought to where its pixels are
Tensor matrix_input_gradient(const Layer& l, void* da) {
  const Tensor dx = l.new_input();
  std::unique_ptr<Scratch> rows;
  void* to = dx.data_ptr();
  if (l.skips_pixels()) {
    rows = std::make_unique<Scratch>(l.rows() * l.depth() * l.bytes());
    to = rows->get();
  }
  multiply(matrix(to, l.rows(), l.depth(), l.dtype), matrix(da, l.rows(), l.units(), l.dtype),
           matrix(l.w.data_ptr(), l.units(), l.depth(), l.dtype));
  if (rows) {
    zero_rows(dx, l.input.images * l.input.pixels, l.depth() * l.bytes());
    in_parallel(l.rows(), l.depth(), [&](int64_t begin, int64_t end) {
      scatter(l, dx, at(to, begin * l.depth(), l.bytes()), begin, end - begin);
    });
  }
  return dx;
}

// Of a short weight the projection of the weight norm leaves so little that the rounding of dL/dw_hat to 16 bits shows.
bool projects_in_float32(const Layer& l, bool normalize_weight) {
  return normalize_weight && l.half() && l.weight.size(0) > 0 && l.weight.numel() / l.weight.size(0) <= 32;
}

struct ConvolutionGradients {
  OptionalTensor dx, dw;
};

ConvolutionGradients convolution_gradients(
    const Layer& l, const Tensor& da, const Tensor& x, const Tensor& w, bool need_dx, bool need_dw) {
  AtenTensorHandle dx = nullptr, dw = nullptr, dbias = nullptr;
  const int64_t none[] = {0, 0};
  const int32_t mask[] = {need_dx, need_dw, 0};
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(
      da.get(), x.get(), w.get(), nullptr, 0, l.window.stride, 2, l.window.padding, 2, l.window.dilation, 2, 0, none, 2,
      l.groups, mask, 3, &dx, &dw, &dbias));
  const Tensor owner(dbias);
  ConvolutionGradients result;
  const Tensor dx_owner(dx), dw_owner(dw);
  if (need_dx) result.dx = in_layout(dx_owner, l.channels_last);
  if (need_dw) result.dw = dw_owner;
  return result;
}

Tensor sum_to_bias(const Layer& l, const Tensor& da) {
  std::vector<int64_t> dims = l.is_linear ? std::vector<int64_t>{0} : std::vector<int64_t>{0, 2, 3};
  const torch::headeronly::IntHeaderOnlyArrayRef over(dims.data(), dims.size());
  const Tensor sum = torch::stable::sum(da, over, false, wide(l.dtype));
  return l.half() ? torch::stable::to(sum, l.dtype) : sum;
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
      norms(l, g.n.data_ptr());
    } else {
      g.n = in_layout(n_, false);
    }
    check_type(g.n, wide(l.dtype), "n");
  }

  OptionalTensor dx, dw, dbias, db;
  const bool passes_on = l.mode == Mode::one && l.max_out == 1;  // dL/da = dy
  const bool blocks = l.runs_in_blocks() && !passes_on;
  const bool dw_in_blocks = blocks && needs.dw && !l.half();
  const bool needs_whole = !blocks || needs.dbias || (needs.dw && !dw_in_blocks);
  std::unique_ptr<char[]> own;
  void* whole_da = nullptr;
  if (needs_whole && !passes_on) whole_da = whole_workspace.get(l.rows() * l.units() * l.bytes(), &own);
  Tensor da = g.dy;
  if (whole_da != nullptr) {  // in the shape and layout of the units
    const int64_t units = l.units();
    if (l.is_linear) {
      da = matrix(whole_da, l.rows(), units, l.dtype);
    } else {
      const int64_t size[] = {l.x.size(0), units, l.window.out_height, l.window.out_width};
      da = alias(whole_da, size, strides_of(size, 4, l.channels_last).data(), 4, l.dtype);
    }
  }
  std::unique_ptr<Scratch> db_parts;
  const int64_t parts = partial_sums(l.output);
  const bool sums_db = needs.db && l.mode == Mode::general;
  if (sums_db) db_parts = std::make_unique<Scratch>(wide_bytes(parts, l.type));
  void* db_memory = sums_db ? db_parts->get() : nullptr;

  if (blocks) {
    if (needs.dx) dx = l.new_input();
    if (dw_in_blocks) dw = like_weight(l, l.dtype);
    backward_in_blocks(l, g, dx, dw, whole_da, db_memory);
  } else if (!passes_on) {
    std::unique_ptr<Scratch> q;
    if (!g.detach) q = std::make_unique<Scratch>(wide_bytes(l.windows(), l.type));
    scale_backward(scaling_backward(l, g, whole_da, q ? q->get() : nullptr, db_memory), l.type);
    if (needs.dx && product_is_matrix(l)) {
      dx = matrix_input_gradient(l, whole_da);
    } else if (needs.dx) {
      const bool both = needs.dw && !projects_in_float32(l, normalize_weight);
      ConvolutionGradients found = convolution_gradients(l, da, l.x, l.w, true, both);
      dx = found.dx;
      if (both) dw = found.dw;
    }
    if (needs.dx && q) {
      add_norm_gradient(dx->data_ptr(), l.x.data_ptr(), q->get(), l.type, l.input, l.window);
    }
  } else if (needs.dx) {
    dx = product_is_matrix(l) ? matrix_input_gradient(l, da.data_ptr()) : convolution_gradients(l, da, l.x, l.w, true, false).dx;
  }
  if (needs.dw && !dw.has_value()) {
    const bool wider = projects_in_float32(l, normalize_weight);
    const ScalarType type = wider ? ScalarType::Float : l.dtype;
    const Tensor from = wider ? torch::stable::to(da, type) : da, x = wider ? torch::stable::to(l.x, type) : l.x;
    if (product_is_matrix(l)) {
      dw = like_weight(l, type);
      const Rows rows(l);
      multiply(matrix(dw->data_ptr(), l.units(), l.depth(), type), matrix(from.data_ptr(), l.units(), l.rows(), type, true),
               matrix(wider ? x.data_ptr() : const_cast<void*>(rows.data), l.rows(), l.depth(), type));
    } else {
      dw = convolution_gradients(l, from, x, wider ? torch::stable::to(l.w, type) : l.w, false, true).dw;
    }
  }
  if (needs.dw) {
    if (normalize_weight) {
      dw = weight_norm_gradient(*dw, l.weight);
    } else {
      dw = in_layout(*dw, is_channels_last(l.weight));
    }
  }
  if (needs.dbias) dbias = sum_to_bias(l, da);
  if (needs.db) {
    db = empty({}, wide(l.dtype));
    const int64_t count = sums_db ? parts : 0;
    double sum = 0;
    for (int64_t i = 0; i < count; i++) {
      sum += l.type == Type::float64 ? static_cast<double*>(db_memory)[i] : static_cast<float*>(db_memory)[i];
    }
    if (l.type == Type::float64) {
      *static_cast<double*>(db->data_ptr()) = sum;
    } else {
      *static_cast<float*>(db->data_ptr()) = static_cast<float>(sum);
    }
  }
  const auto or_nothing = [&](const OptionalTensor& t, bool needed) { return needed ? *t : nothing(l.dtype); };
  return {or_nothing(dx, needs.dx), or_nothing(dw, needs.dw), or_nothing(dbias, needs.dbias), or_nothing(db, needs.db)};
}

}  // namespace

Outputs linear_forward(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t mode, double exponent,
    bool normalize_weight, int64_t max_out, bool keep) {
  return forward(Layer(x, weight, bias, mode, exponent, normalize_weight, max_out), keep);
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
    bool keep) {
  return forward(Layer(x, weight, bias, {s0, s1}, {p0, p1}, {d0, d1}, groups, mode, exponent, normalize_weight, max_out), keep);
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
