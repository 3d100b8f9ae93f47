// One B-cos layer on the CPU: what it is, its product, and its gradients from dL/da. Launchers (layers.cpp,
// conv2d_batch_norm.cpp) put the passes around the product: the scaling alone, or with a batch normalisation behind it.
//
// A layer whose windows are one pixel (linear, 1x1 convolution with channels innermost) is a matrix product over rows.
// It runs in blocks of rows that stay in a core's cache, so that of an activation only what the plain layer moves is
// moved:
//   forward   norms of the block's rows, the product, the passes on its output
//   backward  dL/da into a buffer of the block's size, dx = dL/da w + x q, dw += dL/da^T x
// Where the weight is large and the rows are few, and for every other convolution, the product runs over the whole
// batch, with one pass before and one after it.
#pragma once

#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "passes.h"

namespace bcos::cpu {

// Elements of a block's rows of x and of the output together: half a core's second-level cache, in float32.
constexpr int64_t kBlockElements = 1 << 17;
// Elements of the largest weight that every block may read again (1 MiB in float32), and whose gradient every thread
// may sum on its own.
constexpr int64_t kBlockWeight = 1 << 18;
// Rows from which on a narrowing one-pixel convolution is the library's convolution where that is the faster.
constexpr int64_t kConvolvedRows = 1024;
constexpr int64_t kWorkspace = 64 << 20;  // bytes of the largest buffer that a thread keeps

inline Mode mode_of(int64_t mode) { return mode == 1 ? Mode::one : mode == 2 ? Mode::two : Mode::general; }

// Memory that a thread keeps from call to call, up to a size: a fresh buffer for every layer makes the C allocator give
// pages back to the system and fetch them again.
class Workspace {
 public:
  void* get(int64_t bytes, std::unique_ptr<char[]>* own) {
    bytes = std::max<int64_t>(bytes, 1);  // never null, which stands for "no buffer"
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
extern thread_local Workspace whole_workspace, block_workspace;

inline char* at(const void* p, int64_t elements, int64_t bytes) {
  return p == nullptr ? nullptr : static_cast<char*>(const_cast<void*>(p)) + elements * bytes;
}

// Whether narrowing products run as convolutions on this processor: the library's matrix products are Intel's.
// The environment variable BCOS_CPU_NARROWING=product|convolution decides it, for comparing.
bool prefers_convolution();

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

  // The squares that a launcher was given, checked; null where they are of no use.
  const void* squares_of_input(const OptionalTensor& squares) const {
    if (!squares.has_value() || mode == Mode::one || groups != 1) return nullptr;
    check_type(*squares, wide(dtype), "squares");
    check_size(*squares, input.images * input.pixels, "squares");
    STD_TORCH_CHECK(squares->is_contiguous(), "bcos_kernels_cpp: expected contiguous squares");
    return squares->data_ptr();
  }

  bool is_rows_times_matrix() const {
    return is_linear || (!half() && output.rows && groups == 1 && window.kernel[0] * window.kernel[1] == 1 &&
                         window.padding[0] == 0 && window.padding[1] == 0);
  }
  bool skips_pixels() const { return window.stride[0] != 1 || window.stride[1] != 1; }
  bool runs_in_blocks() const {
    return is_rows_times_matrix() && mode != Mode::one && units() * depth() <= kBlockWeight &&
           rows() * (units() + depth()) >= 2 * kGrain;
  }
  // A one-pixel layer with fewer outputs than inputs, forward: the library's convolution, whose output is small enough
  // to be passed over once more, where its matrix product is slow at this (measured on an AMD EPYC: 512 -> 128 at
  // 8 x 28^2 5.3 ms against 6.5, 256 -> 64 at 8 x 56^2 5.9 against 8.6).
  bool is_convolved() const {
    return !is_linear && dtype == ScalarType::Float && units() < depth() && rows() >= kConvolvedRows &&
           prefers_convolution();
  }
  bool runs_forward_in_blocks() const { return runs_in_blocks() && !is_convolved(); }
  int64_t block_rows() const {
    return std::max<int64_t>(64, kBlockElements / std::max<int64_t>(1, units() + depth()) / 16 * 16);
  }

  Tensor new_output(ScalarType t, int64_t channels) const {
    if (is_linear) return empty({x.size(0), channels}, t);
    return empty({x.size(0), channels, window.out_height, window.out_width}, t, channels_last);
  }
  Tensor new_norms() const {
    if (is_linear) return empty({x.size(0)}, wide(dtype));
    return empty({x.size(0), groups, window.out_height, window.out_width}, wide(dtype), norms_channels_last());
  }
  bool norms_channels_last() const { return channels_last && groups > 1; }
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

inline Layout rows_layout(int64_t rows, int64_t channels) { return {1, rows, channels, 1, true}; }

// The product with the weight, bias added, over the whole batch: (layout of the output, units).
Tensor product(const Layer& l);

// Norms of all windows. squares: sum_c x^2 per input pixel where the pass that wrote x has left it (one group), or null.
void norms(const Layer& l, const void* squares, void* n);

// The product in blocks of rows (where l.runs_in_blocks()), with their norms. output(begin, count, buffer): where a
// block's product goes, buffer being scratch memory for it or null where `buffered` is false; finish(chunk, begin, count,
// product): what is done with it while it is in the cache.
using BlockOutput = std::function<void*(int64_t begin, void* buffer)>;
using BlockFinish = std::function<void(int64_t chunk, int64_t begin, int64_t count, void* product)>;
Chunks chunks_of_rows(const Layer& l);
void product_in_blocks(
    const Layer& l, const Chunks& chunks, const void* squares, void* n, bool buffered, const BlockOutput& output,
    const BlockFinish& finish);

// Where a layer's gradients come from. rows fills dL/da of output rows [begin, begin + count) (channels innermost, one
// group), their q = (dL/dn)/|p| and, where it is not null, their parts of dL/dB, at the pointers given; whole does it for
// the whole batch, in the layout of the output. q may be null: then nothing flows through the norm.
struct Pull {
  std::function<void(int64_t begin, int64_t count, void* da, void* q, void* db)> rows;
  std::function<void(void* da, void* q, void* db)> whole;
  const void* passes_on = nullptr;  // dL/da itself where nothing has to be computed (B = 1)
  bool through_norm = true;
};

struct Needs {
  bool dx, dw, dbias, db;
};

// (dx, dw, dbias, dL/dB); what is not needed has no elements
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;
Gradients gradients(const Layer& l, const Pull& pull, bool normalize_weight, Needs needs);

}  // namespace bcos::cpu
