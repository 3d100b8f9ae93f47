// The CUTLASS kernels for Hopper as private ops bcos_kernels_cutlass::*, against the LibTorch stable ABI.
//
// An op checks its tensors, allocates its output and enqueues one kernel on the current stream; nothing waits. On the
// meta device it checks and allocates alone.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "kernels.h"

namespace bcos::hopper {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kLimit = int64_t{1} << 31;  // CUTLASS counts rows, columns and pixels in 32 bits
constexpr int64_t kAlignment = 8;             // elements in the 16 bytes that the tensor memory accelerator moves
constexpr int64_t kMaximalStride = 8;         // of its im2col mode

std::string shape(const Tensor& t) {
  std::ostringstream text;
  text << "(";
  for (int64_t d = 0; d < t.dim(); d++) text << (d > 0 ? ", " : "") << t.size(d);
  text << ")";
  return text.str();
}

std::string pair(const int64_t (&v)[2]) {
  return "(" + std::to_string(v[0]) + ", " + std::to_string(v[1]) + ")";
}

// The order in which dimensions lie, outermost first, without gaps; where a size is 1 or 0, its stride is of no matter.
bool is_packed(const Tensor& t, bool channels_last) {
  constexpr int64_t last[] = {1, 3, 2, 0};
  int64_t step = 1;
  for (int64_t i = 0; i < t.dim(); i++) {
    const int64_t d = channels_last ? last[i] : t.dim() - 1 - i;
    if (t.size(d) > 1 && t.stride(d) != step) return false;
    step *= t.size(d);
  }
  return true;
}

// A matrix, or an image or weight with its channels innermost, of x's type and device.
void check_operand(const char* op, const char* name, const Tensor& t, const Tensor& x, int64_t dims) {
  STD_TORCH_CHECK(t.dim() == dims, op, ": expected ", name, " of ", dims, " dimensions, got ", shape(t));
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": expected ", name, " in bfloat16 or float16, got ",
      torch::headeronly::toString(type));
  STD_TORCH_CHECK(
      type == x.scalar_type() && t.device() == x.device(), op, ": expected all operands of one type on one device, got ",
      torch::headeronly::toString(x.scalar_type()), " and ", name, " in ", torch::headeronly::toString(type));
  STD_TORCH_CHECK(
      is_packed(t, dims == 4), op, ": expected ", name, dims == 4 ? " densely packed in channels_last" : " contiguous",
      ", got other strides of ", shape(t));
  for (int64_t d = 0; d < dims; d++) {
    STD_TORCH_CHECK(t.size(d) < kLimit, op, ": expected sizes of ", name, " below 2^31, got ", shape(t));
  }
  STD_TORCH_CHECK(
      !t.is_cuda() || reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, op, ": expected ", name,
      " at an address that is a multiple of 16, got one at storage offset ", t.storage_offset());
}

// A value per row, pixel or output.
void check_vector(const char* op, const char* name, const Tensor& t, const Tensor& x, int64_t elements) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Float && t.device() == x.device() && is_packed(t, false), op, ": expected ", name,
      " in float32, contiguous, on the operands' device, got ", torch::headeronly::toString(t.scalar_type()), " ", shape(t));
  STD_TORCH_CHECK(t.numel() == elements, op, ": expected ", elements, " elements of ", name, ", got ", shape(t));
}

void check_multiple(const char* op, const char* name, int64_t size) {
  STD_TORCH_CHECK(
      size > 0 && size % kAlignment == 0, op, ": expected ", name, " to be a positive multiple of ", kAlignment, ", got ",
      size);
}

const void* data(const Tensor& t) { return t.data_ptr(); }
const float* vector(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }
const float* vector(const OptionalTensor& t) { return t.has_value() ? vector(*t) : nullptr; }

Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_empty(like, sizes, type);
}

// (n, c, h, w) with channels innermost.
Tensor new_channels_last(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  const Tensor rows = new_tensor(like, {n, h, w, c});
  const int64_t sizes[] = {n, c, h, w}, strides[] = {h * w * c, 1, w * c, c};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(rows.get(), 4, sizes, strides, 0, &handle));
  return Tensor(handle);
}

template <class Problem>
void enqueue(
    const char* op, const Kernel<Problem>* bfloat16, const Kernel<Problem>* float16, const Tensor& x, const Tensor& weight,
    const Problem& problem) {
  const bool is_bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  const Kernel<Problem>* kernel = is_bfloat16 ? bfloat16 : float16;
  STD_TORCH_CHECK(
      kernel != nullptr, op, ": expected a library built with ", op, is_bfloat16 ? "_bfloat16" : "_float16",
      ", got one without it");
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  // Let go after the launch: torch's allocator hands memory on in the stream's order.
  std::vector<Tensor> workspaces;
  const Place place{device, stream, [&](int64_t bytes) {
    workspaces.push_back(new_tensor(x, {bytes}, ScalarType::Byte));
    return workspaces.back().data_ptr();
  }};
  const std::string wrong = kernel->launch(problem, place);
  STD_TORCH_CHECK(wrong.empty(), op, ": ", wrong, " (x ", shape(x), ", weight ", shape(weight), ")");
}

void check_linear(
    const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& reciprocal_weight_norm) {
  check_operand(op, "x", x, x, 2);
  check_operand(op, "weight", weight, x, 2);
  STD_TORCH_CHECK(
      weight.size(1) == x.size(1), op, ": expected weight.size(1) == x.size(1) (in_features), got ", weight.size(1), " and ",
      x.size(1));
  check_multiple(op, "x.size(1) (in_features)", x.size(1));
  check_multiple(op, "weight.size(0) (out_features)", weight.size(0));
  if (reciprocal_weight_norm.has_value()) {
    check_vector(op, "reciprocal_weight_norm", *reciprocal_weight_norm, x, weight.size(0));
  }
}

LinearForward linear_problem(
    const Tensor& y, const Tensor& x, const Tensor& weight, const OptionalTensor& reciprocal_n,
    const OptionalTensor& reciprocal_weight_norm) {
  return {
      y.data_ptr(), data(x), data(weight), vector(reciprocal_n), vector(reciprocal_weight_norm), x.size(0), weight.size(0),
      x.size(1)};
}

Tensor linear_forward(
    const Tensor& x, const Tensor& weight, const Tensor& reciprocal_n, const OptionalTensor& reciprocal_weight_norm) {
  constexpr const char* op = "linear_forward";
  check_linear(op, x, weight, reciprocal_weight_norm);
  check_vector(op, "reciprocal_n", reciprocal_n, x, x.size(0));
  const Tensor y = new_tensor(x, {x.size(0), weight.size(0)});
  if (!x.is_cuda() || x.size(0) == 0) return y;
  const LinearForward problem = linear_problem(y, x, weight, reciprocal_n, reciprocal_weight_norm);
  enqueue(op, &linear_forward_bfloat16, &linear_forward_float16, x, weight, problem);
  return y;
}

Tensor linear_norm_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& reciprocal_weight_norm) {
  constexpr const char* op = "linear_norm_forward";
  check_linear(op, x, weight, reciprocal_weight_norm);
  const Tensor y = new_tensor(x, {x.size(0), weight.size(0)});
  if (!x.is_cuda() || x.size(0) == 0) return y;
  const LinearForward problem = linear_problem(y, x, weight, std::nullopt, reciprocal_weight_norm);
  enqueue(op, &linear_norm_forward_bfloat16, &linear_norm_forward_float16, x, weight, problem);
  return y;
}

Tensor linear_backward_dx(const Tensor& da, const Tensor& weight, const Tensor& x, const Tensor& q) {
  constexpr const char* op = "linear_backward_dx";
  check_linear(op, x, weight, std::nullopt);
  check_operand(op, "da", da, x, 2);
  STD_TORCH_CHECK(
      da.size(0) == x.size(0) && da.size(1) == weight.size(0), op, ": expected da (", x.size(0), ", ", weight.size(0),
      "), got ", shape(da));
  check_vector(op, "q", q, x, x.size(0));
  const Tensor dx = new_tensor(x, {x.size(0), x.size(1)});
  if (!x.is_cuda() || x.size(0) == 0) return dx;
  const LinearBackwardDx problem{
      dx.data_ptr(), data(da), data(weight), data(x), vector(q), x.size(0), weight.size(0), x.size(1)};
  enqueue(op, &linear_backward_dx_bfloat16, &linear_backward_dx_float16, x, weight, problem);
  return dx;
}

// Of images x and a weight, both checked here.
Window window_of(
    const char* op, const Tensor& x, const Tensor& weight, int64_t s0, int64_t s1, int64_t p0, int64_t p1, int64_t d0,
    int64_t d1) {
  check_operand(op, "x", x, x, 4);
  check_operand(op, "weight", weight, x, 4);
  Window w{
      x.size(0), x.size(2), x.size(3), x.size(1), weight.size(0), weight.size(2), weight.size(3), 0, 0, {s0, s1}, {p0, p1},
      {d0, d1}};
  STD_TORCH_CHECK(
      weight.size(1) == w.c, op, ": expected weight.size(1) == x.size(1) (in_channels, one group), got ", weight.size(1),
      " and ", w.c);
  check_multiple(op, "x.size(1) (in_channels)", w.c);
  check_multiple(op, "weight.size(0) (out_channels)", w.o);
  for (int i = 0; i < 2; i++) {
    STD_TORCH_CHECK(
        w.stride[i] >= 1 && w.stride[i] <= kMaximalStride, op, ": expected strides from 1 to ", kMaximalStride, ", got ",
        pair(w.stride));
    STD_TORCH_CHECK(w.padding[i] >= 0, op, ": expected padding >= 0, got ", pair(w.padding));
    STD_TORCH_CHECK(w.dilation[i] >= 1, op, ": expected dilation >= 1, got ", pair(w.dilation));
  }
  const int64_t height = w.h + 2 * p0 - d0 * (w.r - 1) - 1, width = w.w + 2 * p1 - d1 * (w.s - 1) - 1;
  STD_TORCH_CHECK(
      w.r > 0 && w.s > 0 && height >= 0 && width >= 0, op, ": expected a window within the padded image, got x ", shape(x),
      ", weight ", shape(weight), ", padding ", pair(w.padding), ", dilation ", pair(w.dilation));
  w.p = height / s0 + 1;
  w.q = width / s1 + 1;
  STD_TORCH_CHECK(
      w.n * w.h * w.w < kLimit && w.n * w.p * w.q < kLimit, op, ": expected fewer than 2^31 pixels, got ",
      std::max(w.n * w.h * w.w, w.n * w.p * w.q));
  return w;
}

Tensor conv2d_forward(
    const Tensor& x, const Tensor& weight, const Tensor& reciprocal_n, const OptionalTensor& reciprocal_weight_norm,
    int64_t s0, int64_t s1, int64_t p0, int64_t p1, int64_t d0, int64_t d1) {
  constexpr const char* op = "conv2d_forward";
  const Window w = window_of(op, x, weight, s0, s1, p0, p1, d0, d1);
  check_vector(op, "reciprocal_n", reciprocal_n, x, w.n * w.p * w.q);
  if (reciprocal_weight_norm.has_value()) check_vector(op, "reciprocal_weight_norm", *reciprocal_weight_norm, x, w.o);

  const Tensor y = new_channels_last(x, w.n, w.o, w.p, w.q);
  if (!x.is_cuda() || w.n == 0) return y;
  const Conv2dForward problem{
      y.data_ptr(), data(x), data(weight), vector(reciprocal_n), vector(reciprocal_weight_norm), w};
  enqueue(op, &conv2d_forward_bfloat16, &conv2d_forward_float16, x, weight, problem);
  return y;
}

Tensor conv2d_backward_dx(
    const Tensor& da, const Tensor& weight, const Tensor& x, const Tensor& q, int64_t s0, int64_t s1, int64_t p0,
    int64_t p1, int64_t d0, int64_t d1) {
  constexpr const char* op = "conv2d_backward_dx";
  const Window w = window_of(op, x, weight, s0, s1, p0, p1, d0, d1);
  STD_TORCH_CHECK(
      s0 == 1 && s1 == 1, op, ": expected stride (1, 1), which alone CUTLASS's kernel computes, got ", pair(w.stride));
  check_operand(op, "da", da, x, 4);
  STD_TORCH_CHECK(
      da.size(0) == w.n && da.size(1) == w.o && da.size(2) == w.p && da.size(3) == w.q, op, ": expected da (", w.n, ", ",
      w.o, ", ", w.p, ", ", w.q, "), got ", shape(da));
  check_vector(op, "q", q, x, w.n * w.h * w.w);

  const Tensor dx = new_channels_last(x, w.n, w.c, w.h, w.w);
  if (!x.is_cuda() || w.n == 0) return dx;
  const Conv2dBackwardDx problem{dx.data_ptr(), data(da), data(weight), data(x), vector(q), w};
  enqueue(op, &conv2d_backward_dx_bfloat16, &conv2d_backward_dx_float16, x, weight, problem);
  return dx;
}

template <class Problem>
void describe(std::ostringstream& text, const char* name, const Kernel<Problem>* kernel) {
  if (kernel == nullptr) return;
  text << name << " " << kernel->threads << " " << kernel->stages << " " << kernel->shared_bytes << "\n";
}

// The kernels that this library was built with, a line each: name, threads, stages, bytes of shared memory.
std::string kernels() {
  std::ostringstream text;
  describe(text, "linear_forward_bfloat16", &linear_forward_bfloat16);
  describe(text, "linear_forward_float16", &linear_forward_float16);
  describe(text, "linear_norm_forward_bfloat16", &linear_norm_forward_bfloat16);
  describe(text, "linear_norm_forward_float16", &linear_norm_forward_float16);
  describe(text, "linear_backward_dx_bfloat16", &linear_backward_dx_bfloat16);
  describe(text, "linear_backward_dx_float16", &linear_backward_dx_float16);
  describe(text, "conv2d_forward_bfloat16", &conv2d_forward_bfloat16);
  describe(text, "conv2d_forward_float16", &conv2d_forward_float16);
  describe(text, "conv2d_backward_dx_bfloat16", &conv2d_backward_dx_bfloat16);
  describe(text, "conv2d_backward_dx_float16", &conv2d_backward_dx_float16);
  return text.str();
}

}  // namespace

#define BCOS_WINDOW "int s0, int s1, int p0, int p1, int d0, int d1"

STABLE_TORCH_LIBRARY(bcos_kernels_cutlass, m) {
  m.def("linear_forward(Tensor x, Tensor weight, Tensor reciprocal_n, Tensor? reciprocal_weight_norm) -> Tensor");
  m.def("linear_norm_forward(Tensor x, Tensor weight, Tensor? reciprocal_weight_norm) -> Tensor");
  m.def("linear_backward_dx(Tensor da, Tensor weight, Tensor x, Tensor q) -> Tensor");
  m.def("conv2d_forward(Tensor x, Tensor weight, Tensor reciprocal_n, Tensor? reciprocal_weight_norm, " BCOS_WINDOW
        ") -> Tensor");
  m.def("conv2d_backward_dx(Tensor da, Tensor weight, Tensor x, Tensor q, " BCOS_WINDOW ") -> Tensor");
  m.def("kernels() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(bcos_kernels_cutlass, CUDA, m) {
  m.impl("linear_forward", TORCH_BOX(&linear_forward));
  m.impl("linear_norm_forward", TORCH_BOX(&linear_norm_forward));
  m.impl("linear_backward_dx", TORCH_BOX(&linear_backward_dx));
  m.impl("conv2d_forward", TORCH_BOX(&conv2d_forward));
  m.impl("conv2d_backward_dx", TORCH_BOX(&conv2d_backward_dx));
}

STABLE_TORCH_LIBRARY_IMPL(bcos_kernels_cutlass, Meta, m) {
  m.impl("linear_forward", TORCH_BOX(&linear_forward));
  m.impl("linear_norm_forward", TORCH_BOX(&linear_norm_forward));
  m.impl("linear_backward_dx", TORCH_BOX(&linear_backward_dx));
  m.impl("conv2d_forward", TORCH_BOX(&conv2d_forward));
  m.impl("conv2d_backward_dx", TORCH_BOX(&conv2d_backward_dx));
}

STABLE_TORCH_LIBRARY_IMPL(bcos_kernels_cutlass, CompositeExplicitAutograd, m) {
  m.impl("kernels", TORCH_BOX(&kernels));
}

}  // namespace bcos::hopper
