// Definitions of layer.h.
#include "layer.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cmath>
#include <cstdlib>

#include "../capability.h"

namespace bcos::cpu {

thread_local Workspace whole_workspace, block_workspace;

bool prefers_convolution() {
  static const bool prefers = [] {
    if (const char* chosen = std::getenv("BCOS_CPU_NARROWING")) {
      if (std::strcmp(chosen, "convolution") == 0) return true;
      if (std::strcmp(chosen, "product") == 0) return false;
    }
    return is_amd();
  }();
  return prefers;
}

namespace {

void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}
// out = beta addend + a b
void multiply_add(const Tensor& out, const Tensor& addend, const Tensor& a, const Tensor& b, double beta) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), addend.get(), a.get(), b.get(), beta, 1.0));
}

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

}  // namespace

Tensor product(const Layer& l) {
  if (product_is_matrix(l) && !l.is_convolved()) {
    const Tensor a = l.new_output(l.dtype, l.units());
    multiply_rows(l, a.data_ptr(), Rows(l).data, l.rows(), transposed_weight(l));
    return a;
  }
  return convolution(l);
}

void norms(const Layer& l, const void* squares, void* n) {
  if (!l.is_linear) return window_norms(l.x.data_ptr(), squares, n, l.type, l.input, l.window);
  if (squares == nullptr) return row_norms(l.x.data_ptr(), n, l.type, l.rows(), l.depth(), true);
  kernels(l.type).norms_of_squares(squares, n, true, 0, l.rows());
}

Chunks chunks_of_rows(const Layer& l) { return Chunks(l.rows(), l.depth() + l.units()); }

void product_in_blocks(
    const Layer& l, const Chunks& chunks, const void* squares, void* n, bool buffered, const BlockOutput& output,
    const BlockFinish& finish) {
  const Kernels& k = kernels(l.type);
  const int64_t depth = l.depth(), units = l.units(), bytes = l.bytes(), wide = l.wide_bytes();
  const int64_t block = l.block_rows();
  Tensor w_transposed = transposed_weight(l);
  // The product is faster (by a fifth for 512 -> 128) with the longer side of a small weight outermost.
  if (units < depth) w_transposed = torch::stable::contiguous(w_transposed);
  chunks.each([&](int64_t chunk) {
    std::unique_ptr<char[]> own;
    const int64_t gathered = l.skips_pixels() ? block * depth * bytes : 0;
    char* scratch = static_cast<char*>(block_workspace.get(gathered + (buffered ? block * units * bytes : 0), &own));
    for (int64_t begin = chunks.begin(chunk); begin < chunks.end(chunk); begin += block) {
      const int64_t count = std::min(block, chunks.end(chunk) - begin);
      const char* x = l.rows_of_input(begin, count, scratch);
      char* n_block = at(n, begin, wide);
      void* a = output(begin, buffered ? scratch + gathered : nullptr);
      multiply_rows(l, a, x, count, w_transposed);
      if (squares == nullptr) {
        k.norm_rows(x, n_block, depth, l.is_linear, 0, count);  // after the product, which has brought x into the cache
      } else {
        if (l.skips_pixels()) {
          l.for_pixels(begin, count, [&](int64_t i, int64_t pixel) {
            std::memcpy(n_block + i * wide, static_cast<const char*>(squares) + pixel * wide, static_cast<size_t>(wide));
          });
        } else {
          std::memcpy(n_block, static_cast<const char*>(squares) + begin * wide, static_cast<size_t>(count * wide));
        }
        k.norms_of_squares(n_block, n_block, l.is_linear, 0, count);
      }
      finish(chunk, begin, count, a);
    }
  });
}

namespace {

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

void backward_in_blocks(
    const Layer& l, const Pull& pull, const OptionalTensor& dx, const OptionalTensor& dw, void* whole_da, void* db) {
  const Kernels& k = kernels(l.type);
  const int64_t depth = l.depth(), units = l.units(), bytes = l.bytes(), wide = l.wide_bytes();
  const int64_t block = l.block_rows();
  const Chunks chunks = chunks_of_rows(l);
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
      pull.rows(begin, count, da, pull.through_norm ? q : nullptr, at(db, begin, wide));
      const Tensor da_matrix = matrix(da, count, units, l.dtype);
      if (dx.has_value()) {
        char* to = gathers ? dx_buffer : at(dx->data_ptr(), begin * depth, bytes);
        multiply(matrix(to, count, depth, l.dtype), da_matrix, w);
        if (pull.through_norm) k.add_norm_term_rows(to, to, x, q, rows_layout(count, depth), 0, count);
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

}  // namespace

Gradients gradients(const Layer& l, const Pull& pull, bool normalize_weight, Needs needs) {
  OptionalTensor dx, dw, dbias, db;
  const bool passes_on = pull.passes_on != nullptr;
  const bool blocks = l.runs_in_blocks() && !passes_on;
  const bool dw_in_blocks = blocks && needs.dw && !l.half();
  const bool needs_whole = !blocks || needs.dbias || (needs.dw && !dw_in_blocks);
  std::unique_ptr<char[]> own;
  void* whole_da = nullptr;
  if (needs_whole && !passes_on) whole_da = whole_workspace.get(l.rows() * l.units() * l.bytes(), &own);
  if (passes_on) whole_da = const_cast<void*>(pull.passes_on);
  OptionalTensor whole;  // in the shape and layout of the units
  if (whole_da != nullptr && l.is_linear) {
    whole = matrix(whole_da, l.rows(), l.units(), l.dtype);
  } else if (whole_da != nullptr) {
    const int64_t size[] = {l.x.size(0), l.units(), l.window.out_height, l.window.out_width};
    whole = alias(whole_da, size, strides_of(size, 4, l.channels_last).data(), 4, l.dtype);
  }
  std::unique_ptr<Scratch> db_parts;
  const int64_t parts = partial_sums(l.output);
  const bool sums_db = needs.db && l.mode == Mode::general;
  if (sums_db) db_parts = std::make_unique<Scratch>(wide_bytes(parts, l.type));
  void* db_memory = sums_db ? db_parts->get() : nullptr;

  if (blocks) {
    if (needs.dx) dx = l.new_input();
    if (dw_in_blocks) dw = empty_like(l.weight, l.dtype);
    backward_in_blocks(l, pull, dx, dw, whole_da, db_memory);
  } else if (!passes_on) {
    std::unique_ptr<Scratch> q;
    if (pull.through_norm) q = std::make_unique<Scratch>(wide_bytes(l.windows(), l.type));
    pull.whole(whole_da, q ? q->get() : nullptr, db_memory);
    if (needs.dx && product_is_matrix(l)) {
      dx = matrix_input_gradient(l, whole_da);
    } else if (needs.dx) {
      const bool both = needs.dw && !projects_in_float32(l, normalize_weight);
      ConvolutionGradients found = convolution_gradients(l, *whole, l.x, l.w, true, both);
      dx = found.dx;
      if (both) dw = found.dw;
    }
    if (needs.dx && q) {
      add_norm_gradient(dx->data_ptr(), l.x.data_ptr(), q->get(), l.type, l.input, l.window);
    }
  } else if (needs.dx) {
    dx = product_is_matrix(l) ? matrix_input_gradient(l, whole_da) : convolution_gradients(l, *whole, l.x, l.w, true, false).dx;
  }
  if (needs.dw && !dw.has_value()) {
    const bool wider = projects_in_float32(l, normalize_weight);
    const ScalarType type = wider ? ScalarType::Float : l.dtype;
    const Tensor from = wider ? torch::stable::to(*whole, type) : *whole, x = wider ? torch::stable::to(l.x, type) : l.x;
    if (product_is_matrix(l)) {
      dw = empty_like(l.weight, type);
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
  if (needs.dbias) dbias = sum_to_bias(l, *whole);
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


}  // namespace bcos::cpu
