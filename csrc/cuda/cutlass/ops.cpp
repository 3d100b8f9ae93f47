// The CUTLASS kernels as private ops bcos_kernels_cutlass::*, against the LibTorch stable ABI. Ops of the same arguments
// with _sm80 behind their names call the kernels for that architecture; the others are Hopper's.
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

namespace bcos::fused {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kLimit = int64_t{1} << 31;  // CUTLASS counts rows, columns and pixels in 32 bits, sm_80's offsets too
constexpr int64_t kAlignment = 8;             // elements in the 16 bytes that copies to shared memory move
constexpr int64_t kElementBytes = 2;
constexpr int64_t kMaximalStride = 8;         // of the tensor memory accelerator's im2col mode
constexpr int64_t kMaximalWindow = 32;        // bits of the masks with which sm_80's convolutions predicate their loads

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

// Kernels copy 16 bytes at a time.
void check_address(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(
      !t.is_cuda() || reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0, op, ": expected ", name,
      " at an address that is a multiple of 16, got one at storage offset ", t.storage_offset());
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
  check_address(op, name, t);
}

// A value per row, pixel or output.
void check_vector(const char* op, const char* name, const Tensor& t, const Tensor& x, int64_t elements) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Float && t.device() == x.device() && is_packed(t, false), op, ": expected ", name,
      " in float32, contiguous, on the operands' device, got ", torch::headeronly::toString(t.scalar_type()), " ", shape(t));
  check_address(op, name, t);
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

// An op's name and the kernels behind it, null where the library was built without one.
template <class Problem>
struct Kernels {
  const char* op;
  const Kernel<Problem>*bfloat16, *float16;
};
#define BCOS_KERNELS_OF(name, Problem) Kernels<Problem>{#name, &name##_bfloat16, &name##_float16}
#define BCOS_KERNELS(stem, Problem) (is_sm80 ? BCOS_KERNELS_OF(stem##_sm80, Problem) : BCOS_KERNELS_OF(stem, Problem))

template <class Problem>
void enqueue(const Kernels<Problem>& kernels, const Tensor& x, const Tensor& weight, const Problem& problem) {
  const char* op = kernels.op;
  const bool is_bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  const Kernel<Problem>* kernel = is_bfloat16 ? kernels.bfloat16 : kernels.float16;
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

template <bool is_sm80>
Tensor linear_forward(
    const Tensor& x, const Tensor& weight, const Tensor& reciprocal_n, const OptionalTensor& reciprocal_weight_norm) {
  const auto kernels = BCOS_KERNELS(linear_forward, LinearForward);
  check_linear(kernels.op, x, weight, reciprocal_weight_norm);
  check_vector(kernels.op, "reciprocal_n", reciprocal_n, x, x.size(0));
  const Tensor y = new_tensor(x, {x.size(0), weight.size(0)});
  if (!x.is_cuda() || x.size(0) == 0) return y;
  enqueue(kernels, x, weight, linear_problem(y, x, weight, reciprocal_n, reciprocal_weight_norm));
  return y;
}

Tensor linear_norm_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& reciprocal_weight_norm) {
  const auto kernels = BCOS_KERNELS_OF(linear_norm_forward, LinearForward);
  check_linear(kernels.op, x, weight, reciprocal_weight_norm);
  const Tensor y = new_tensor(x, {x.size(0), weight.size(0)});
  if (!x.is_cuda() || x.size(0) == 0) return y;
  enqueue(kernels, x, weight, linear_problem(y, x, weight, std::nullopt, reciprocal_weight_norm));
  return y;
}

template <bool is_sm80>
Tensor linear_backward_dx(const Tensor& da, const Tensor& weight, const Tensor& x, const Tensor& q) {
  const auto kernels = BCOS_KERNELS(linear_backward_dx, LinearBackwardDx);
  const char* op = kernels.op;
  check_linear(op, x, weight, std::nullopt);
  check_operand(op, "da", da, x, 2);
  STD_TORCH_CHECK(
      da.size(0) == x.size(0) && da.size(1) == weight.size(0), op, ": expected da (", x.size(0), ", ", weight.size(0),
      "), got ", shape(da));
  check_vector(op, "q", q, x, x.size(0));
  const Tensor dx = new_tensor(x, {x.size(0), x.size(1)});
  if (!x.is_cuda() || x.size(0) == 0) return dx;
  enqueue(
      kernels, x, weight,
      LinearBackwardDx{dx.data_ptr(), data(da), data(weight), data(x), vector(q), x.size(0), weight.size(0), x.size(1)});
  return dx;
}

// Of images x and a weight, both checked here.
Window window_of(
    const char* op, bool is_sm80, const Tensor& x, const Tensor& weight, int64_t s0, int64_t s1, int64_t p0, int64_t p1,
    int64_t d0, int64_t d1) {
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
    STD_TORCH_CHECK(w.stride[i] >= 1, op, ": expected strides >= 1, got ", pair(w.stride));
    STD_TORCH_CHECK(
        is_sm80 || w.stride[i] <= kMaximalStride, op, ": expected strides from 1 to ", kMaximalStride, ", got ",
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
  if (!is_sm80) return w;
  STD_TORCH_CHECK(
      w.r <= kMaximalWindow && w.s <= kMaximalWindow, op, ": expected a window of up to ", kMaximalWindow, " x ",
      kMaximalWindow, ", got weight ", shape(weight));
  const int64_t elements = std::max({w.n * w.h * w.w * w.c, w.n * w.p * w.q * w.o, w.o * w.r * w.s * w.c});
  STD_TORCH_CHECK(
      elements < kLimit / kElementBytes, op, ": expected tensors of less than 2^31 bytes, got one of ",
      elements * kElementBytes);
  return w;
}

template <bool is_sm80>
Tensor conv2d_forward(
    const Tensor& x, const Tensor& weight, const Tensor& reciprocal_n, const OptionalTensor& reciprocal_weight_norm,
    int64_t s0, int64_t s1, int64_t p0, int64_t p1, int64_t d0, int64_t d1) {
  const auto kernels = BCOS_KERNELS(conv2d_forward, Conv2dForward);
  const char* op = kernels.op;
  const Window w = window_of(op, is_sm80, x, weight, s0, s1, p0, p1, d0, d1);
  check_vector(op, "reciprocal_n", reciprocal_n, x, w.n * w.p * w.q);
  if (reciprocal_weight_norm.has_value()) check_vector(op, "reciprocal_weight_norm", *reciprocal_weight_norm, x, w.o);

  const Tensor y = new_channels_last(x, w.n, w.o, w.p, w.q);
  if (!x.is_cuda() || w.n == 0) return y;
  enqueue(
      kernels, x, weight,
      Conv2dForward{y.data_ptr(), data(x), data(weight), vector(reciprocal_n), vector(reciprocal_weight_norm), w});
  return y;
}

template <bool is_sm80>
Tensor conv2d_backward_dx(
    const Tensor& da, const Tensor& weight, const Tensor& x, const Tensor& q, int64_t s0, int64_t s1, int64_t p0,
    int64_t p1, int64_t d0, int64_t d1) {
  const auto kernels = BCOS_KERNELS(conv2d_backward_dx, Conv2dBackwardDx);
  const char* op = kernels.op;
  const Window w = window_of(op, is_sm80, x, weight, s0, s1, p0, p1, d0, d1);
  STD_TORCH_CHECK(
      s0 == 1 && s1 == 1, op, ": expected stride (1, 1), which alone the kernel computes, got ", pair(w.stride));
  check_operand(op, "da", da, x, 4);
  STD_TORCH_CHECK(
      da.size(0) == w.n && da.size(1) == w.o && da.size(2) == w.p && da.size(3) == w.q, op, ": expected da (", w.n, ", ",
      w.o, ", ", w.p, ", ", w.q, "), got ", shape(da));
  check_vector(op, "q", q, x, w.n * w.h * w.w);

  const Tensor dx = new_channels_last(x, w.n, w.c, w.h, w.w);
  if (!x.is_cuda() || w.n == 0) return dx;
  enqueue(kernels, x, weight, Conv2dBackwardDx{dx.data_ptr(), data(da), data(weight), data(x), vector(q), w});
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
#define BCOS_DESCRIBE(name)                            \
  describe(text, #name "_bfloat16", &name##_bfloat16); \
  describe(text, #name "_float16", &name##_float16);
  BCOS_DESCRIBE(linear_forward)
  BCOS_DESCRIBE(linear_norm_forward)
  BCOS_DESCRIBE(linear_backward_dx)
  BCOS_DESCRIBE(conv2d_forward)
  BCOS_DESCRIBE(conv2d_backward_dx)
  BCOS_DESCRIBE(linear_forward_sm80)
  BCOS_DESCRIBE(linear_backward_dx_sm80)
  BCOS_DESCRIBE(conv2d_forward_sm80)
  BCOS_DESCRIBE(conv2d_backward_dx_sm80)
#undef BCOS_DESCRIBE
  return text.str();
}

}  // namespace

// Of an op and its twin for sm_80.
#define BCOS_DEFINE(stem, schema)        \
  m.def(#stem "(" schema ") -> Tensor"); \
  m.def(#stem "_sm80(" schema ") -> Tensor");
#define BCOS_IMPLEMENT(stem)              \
  m.impl(#stem, TORCH_BOX(&stem<false>)); \
  m.impl(#stem "_sm80", TORCH_BOX(&stem<true>));
#define BCOS_WINDOW "int s0, int s1, int p0, int p1, int d0, int d1"

STABLE_TORCH_LIBRARY(bcos_kernels_cutlass, m) {
  BCOS_DEFINE(linear_forward, "Tensor x, Tensor weight, Tensor reciprocal_n, Tensor? reciprocal_weight_norm")
  m.def("linear_norm_forward(Tensor x, Tensor weight, Tensor? reciprocal_weight_norm) -> Tensor");
  BCOS_DEFINE(linear_backward_dx, "Tensor da, Tensor weight, Tensor x, Tensor q")
  BCOS_DEFINE(
      conv2d_forward, "Tensor x, Tensor weight, Tensor reciprocal_n, Tensor? reciprocal_weight_norm, " BCOS_WINDOW)
  BCOS_DEFINE(conv2d_backward_dx, "Tensor da, Tensor weight, Tensor x, Tensor q, " BCOS_WINDOW)
  m.def("kernels() -> str");
}

#define BCOS_IMPLEMENT_ALL                                        \
  BCOS_IMPLEMENT(linear_forward)                                  \
  m.impl("linear_norm_forward", TORCH_BOX(&linear_norm_forward)); \
  BCOS_IMPLEMENT(linear_backward_dx)                              \
  BCOS_IMPLEMENT(conv2d_forward)                                  \
  BCOS_IMPLEMENT(conv2d_backward_dx)

STABLE_TORCH_LIBRARY_IMPL(bcos_kernels_cutlass, CUDA, m) { BCOS_IMPLEMENT_ALL }

STABLE_TORCH_LIBRARY_IMPL(bcos_kernels_cutlass, Meta, m) { BCOS_IMPLEMENT_ALL }

STABLE_TORCH_LIBRARY_IMPL(bcos_kernels_cutlass, CompositeExplicitAutograd, m) {
  m.impl("kernels", TORCH_BOX(&kernels));
}

}  // namespace bcos::fused
