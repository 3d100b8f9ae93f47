// The CUDA passes as private ops bcos_kernels_cuda::*, against the LibTorch stable ABI; bcos_kernels/cuda.py calls them and
// allocates what they write to.
//
// Compiled with BCOS_EMULATED (tests only) they are bcos_kernels_cuda_emulated::* of CPU tensors, over the emulation of the
// kernels.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if !defined(BCOS_EMULATED)
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

#include <optional>

#include "kernels.h"

namespace bcos::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define BCOS_CHECK(condition, ...) STD_TORCH_CHECK(condition, "bcos_kernels_cuda: ", __VA_ARGS__)

// The device of a tensor made the current one for the length of a call, and its current stream.
class Launch {
 public:
#if defined(BCOS_EMULATED)
  explicit Launch(const Tensor&) {}
  void check(const char*) const {}
#else
  explicit Launch(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
  // An error of a launch (none of a kernel that runs already) is told where it happened.
  void check(const char* op) const {
    const cudaError_t error = cudaGetLastError();
    BCOS_CHECK(error == cudaSuccess, op, " could not be launched: ", cudaGetErrorString(error));
  }
#endif
  Stream stream = nullptr;

 private:
#if !defined(BCOS_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: break;
  }
  BCOS_CHECK(false, "expected float32, bfloat16 or float16");
  return Type::float32;
}

// Whether a tensor's elements lie densely with dimension 1 innermost.
bool lies_in_rows(const Tensor& t) {
  if (t.dim() != 4) return t.is_contiguous();
  int64_t step = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != step) return false;
    step *= t.size(d);
  }
  return true;
}

int64_t channels_of(const Tensor& t) {
  BCOS_CHECK(t.dim() == 2 || t.dim() == 4, "expected a matrix or images, got ", t.dim(), " dimensions");
  return t.size(1);
}

Segments segments_of(const Tensor& t, int64_t groups, int64_t max_out = 1) {
  const int64_t channels = channels_of(t);
  BCOS_CHECK(groups > 0 && max_out > 0 && channels % (groups * max_out) == 0, "expected channels that ", groups,
             " groups and max_out ", max_out, " divide, got ", channels);
  return {channels == 0 ? 0 : t.numel() / channels, groups, channels / groups / max_out};
}

template <class T = void>
T* pointer(const Tensor& t, ScalarType type, int64_t count, const char* name) {
  BCOS_CHECK(t.scalar_type() == type, "expected another type of ", name);
  BCOS_CHECK(t.numel() == count, "expected ", count, " elements of ", name, ", got ", t.numel());
  BCOS_CHECK(lies_in_rows(t), "expected ", name, " dense, with channels innermost");
  return static_cast<T*>(t.data_ptr());
}
template <class T = void>
T* pointer(const OptionalTensor& t, ScalarType type, int64_t count, const char* name) {
  return t.has_value() ? pointer<T>(*t, type, count, name) : nullptr;
}
float* floats(const Tensor& t, int64_t count, const char* name) { return pointer<float>(t, ScalarType::Float, count, name); }
float* floats(const OptionalTensor& t, int64_t count, const char* name) {
  return pointer<float>(t, ScalarType::Float, count, name);
}

Window window_of(
    const Tensor& x, int64_t r, int64_t s, int64_t s0, int64_t s1, int64_t p0, int64_t p1, int64_t d0, int64_t d1) {
  if (x.dim() == 2) return {x.size(0), 1, 1, 1, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}};
  Window w{x.size(0), x.size(2), x.size(3), 0, 0, {r, s}, {s0, s1}, {p0, p1}, {d0, d1}};
  w.out_height = (w.height + 2 * p0 - d0 * (r - 1) - 1) / s0 + 1;
  w.out_width = (w.width + 2 * p1 - d1 * (s - 1) - 1) / s1 + 1;
  return w;
}

Norm norm_of(int64_t norm) {
  BCOS_CHECK(norm >= 0 && norm <= 2, "expected a norm of 0, 1 or 2, got ", norm);
  return static_cast<Norm>(norm);
}
// As B_MODE of the Triton kernels: 1 and 2 for B = 1 and 2, 0 for any other B.
Mode mode_of(int64_t mode) { return mode == 1 ? Mode::one : mode == 2 ? Mode::two : Mode::general; }

// --- norms ------------------------------------------------------------------------------------------------------------

void segment_norms_op(const Tensor& out, const Tensor& x, int64_t groups, int64_t norm) {
  const Launch launch(x);
  const Segments s = segments_of(x, groups);
  const void* from = pointer(x, x.scalar_type(), x.numel(), "x");
  segment_norms(type_of(x), floats(out, s.rows * groups, "out"), from, s, norm_of(norm), launch.stream);
  launch.check("segment_norms");
}

void norms_of_squares_op(const Tensor& n, const Tensor& squares, int64_t norm) {
  const Launch launch(n);
  norms_of_squares(floats(n, n.numel(), "n"), floats(squares, n.numel(), "squares"), n.numel(), norm_of(norm), launch.stream);
  launch.check("norms_of_squares");
}

#define BCOS_WINDOW_ARGUMENTS \
  int64_t r, int64_t s, int64_t s0, int64_t s1, int64_t p0, int64_t p1, int64_t d0, int64_t d1
#define BCOS_WINDOW_VALUES r, s, s0, s1, p0, p1, d0, d1

void window_norms_op(
    const Tensor& n, const OptionalTensor& squares, const Tensor& x, BCOS_WINDOW_ARGUMENTS, int64_t groups) {
  const Launch launch(x);
  const Window w = window_of(x, BCOS_WINDOW_VALUES);
  BCOS_CHECK(squares.has_value() || groups == x.size(1), "expected sums of squares, or a channel a group");
  const float* map = floats(squares, w.images * w.height * w.width * groups, "squares");
  const void* from = pointer(x, x.scalar_type(), x.numel(), "x");
  window_norms(type_of(x), floats(n, w.images * w.out_height * w.out_width * groups, "n"), map, from, w, groups,
               launch.stream);
  launch.check("window_norms");
}

void add_norm_term_op(
    const Tensor& dx, const Tensor& x, const Tensor& q, BCOS_WINDOW_ARGUMENTS, int64_t groups) {
  const Launch launch(x);
  const Window w = window_of(x, BCOS_WINDOW_VALUES);
  add_norm_term(type_of(x), pointer(dx, x.scalar_type(), x.numel(), "dx"), pointer(x, x.scalar_type(), x.numel(), "x"),
                floats(q, w.images * w.out_height * w.out_width * groups, "q"), w, segments_of(x, groups), launch.stream);
  launch.check("add_norm_term");
}

int64_t depth_of(const Tensor& w) { return w.size(0) == 0 ? 0 : w.numel() / w.size(0); }

void normalize_weight_op(const Tensor& w_hat, const Tensor& w) {
  const Launch launch(w);
  const ScalarType type = w.scalar_type();
  normalize_weight(type_of(w), pointer(w_hat, type, w.numel(), "w_hat"), pointer(w, type, w.numel(), "w"), w.size(0),
                   depth_of(w), launch.stream);
  launch.check("normalize_weight");
}

void weight_norm_backward_op(const Tensor& dw, const Tensor& dw_hat, const Tensor& w) {
  const Launch launch(w);
  const ScalarType type = w.scalar_type();
  weight_norm_backward(type_of(w), pointer(dw, type, w.numel(), "dw"), pointer(dw_hat, type, w.numel(), "dw_hat"),
                       pointer(w, type, w.numel(), "w"), w.size(0), depth_of(w), launch.stream);
  launch.check("weight_norm_backward");
}

// --- scaling ----------------------------------------------------------------------------------------------------------

void scale_op(
    const Tensor& y, const OptionalTensor& kept, const OptionalTensor& index, const Tensor& a, const OptionalTensor& n,
    const OptionalTensor& b, int64_t groups, int64_t max_out, int64_t mode, double exponent) {
  const Launch launch(a);
  const ScalarType type = a.scalar_type();
  const Segments s = segments_of(a, groups, max_out);
  const int64_t outputs = s.rows * s.groups * s.channels;
  Scale p{};
  p.y = pointer(y, type, outputs, "y");
  BCOS_CHECK(max_out > 1 || !kept.has_value(), "expected nothing to keep a in for max_out 1, got a tensor");
  p.kept = pointer(kept, type, outputs, "kept");
  p.index = pointer<uint8_t>(index, ScalarType::Byte, outputs, "index");
  p.a = pointer(a, type, a.numel(), "a");
  p.mode = mode_of(mode);
  BCOS_CHECK(p.mode == Mode::one || n.has_value(), "expected norms");
  p.n = p.mode == Mode::one ? nullptr : floats(n, s.rows * groups, "n");
  p.b = floats(b, 1, "b");
  p.s = s;
  p.max_out = max_out;
  p.exponent = static_cast<float>(exponent);
  scale(type_of(a), p, launch.stream);
  launch.check("scale");
}

// Partial sums of dL/dB, none where they are not needed.
Tensor scale_backward_op(
    const Tensor& da, const OptionalTensor& q, const Tensor& dy, const Tensor& source, const OptionalTensor& index,
    const OptionalTensor& n, const OptionalTensor& b, int64_t groups, int64_t max_out, int64_t mode, double exponent,
    bool from_a, bool detach, bool linear_norm, bool need_db) {
  const Launch launch(dy);
  const ScalarType type = dy.scalar_type();
  const Segments s = segments_of(dy, groups);
  ScaleBackward p{};
  p.da = pointer(da, type, dy.numel() * max_out, "da");
  p.q = floats(q, s.rows * groups, "q");
  p.dy = pointer(dy, type, dy.numel(), "dy");
  p.source = pointer(source, type, dy.numel(), "y or a");
  p.index = pointer<uint8_t>(index, ScalarType::Byte, dy.numel(), "index");
  BCOS_CHECK(max_out == 1 || p.index != nullptr, "expected the winning units");
  p.mode = mode_of(mode);
  BCOS_CHECK(p.mode == Mode::one || n.has_value(), "expected norms");
  BCOS_CHECK(p.mode == Mode::two || from_a, "expected a for B other than 2");
  p.n = p.mode == Mode::one ? nullptr : floats(n, s.rows * groups, "n");
  p.b = floats(b, 1, "b");
  p.s = s;
  p.max_out = max_out;
  p.exponent = static_cast<float>(exponent);
  p.from_a = from_a;
  p.detach = detach;
  p.linear_norm = linear_norm;
  const Tensor db = torch::stable::new_empty(
      dy, {need_db ? scale_backward_blocks(type_of(dy), p) : 0}, std::make_optional(ScalarType::Float));
  p.db = need_db ? static_cast<float*>(db.data_ptr()) : nullptr;
  scale_backward(type_of(dy), p, launch.stream);
  launch.check("scale_backward");
  return db;
}

void scale_gelu_op(const Tensor& h, const OptionalTensor& squares, const Tensor& a, const Tensor& n) {
  const Launch launch(a);
  const ScalarType type = a.scalar_type();
  const Segments s = segments_of(a, 1);
  const ScaleGelu p{pointer(h, type, a.numel(), "h"), floats(squares, s.rows, "squares"), pointer(a, type, a.numel(), "a"),
                    floats(n, s.rows, "n"), s};
  scale_gelu(type_of(a), p, launch.stream);
  launch.check("scale_gelu");
}

void scale_gelu_backward_op(
    const Tensor& da, const OptionalTensor& q, const Tensor& dh, const Tensor& a, const Tensor& n, bool detach) {
  const Launch launch(a);
  const ScalarType type = a.scalar_type();
  const Segments s = segments_of(a, 1);
  const ScaleGeluBackward p{pointer(da, type, a.numel(), "da"), floats(q, s.rows, "q"), pointer(dh, type, a.numel(), "dh"),
                            pointer(a, type, a.numel(), "a"),   floats(n, s.rows, "n"), s, detach};
  scale_gelu_backward(type_of(a), p, launch.stream);
  launch.check("scale_gelu_backward");
}

// --- batch normalisation ----------------------------------------------------------------------------------------------

// scale and shift lie one behind the other: (2, C)
Factors factors_of(
    const Tensor& factors, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& var, double eps,
    int64_t channels) {
  float* scale = floats(factors, 2 * channels, "factors");
  return {scale, scale + channels, floats(weight, channels, "weight"), floats(bias, channels, "bias"),
          floats(var, channels, "var"), static_cast<float>(eps), channels};
}

void factors_op(
    const Tensor& out, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& var, double eps) {
  const Launch launch(var);
  if (var.numel() > 0) factors(factors_of(out, weight, bias, var, eps, var.numel()), launch.stream);
  launch.check("factors");
}

Tensor scratch(const Tensor& like, int64_t splits, int64_t channels) {
  return torch::stable::new_empty(like, {splits, 2, channels}, std::make_optional(ScalarType::Float));
}

void moments_op(
    const Tensor& mean, const Tensor& var, const Tensor& out, const Tensor& x, const OptionalTensor& n,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, int64_t groups) {
  const Launch launch(x);
  const Segments s = segments_of(x, groups);
  const int64_t channels = channels_of(x);
  if (channels == 0) return;
  const Tensor partial = scratch(x, reduction_splits(type_of(x), s), channels);
  Moments p{};
  p.mean = floats(mean, channels, "mean");
  p.var = floats(var, channels, "var");
  p.partial = static_cast<float*>(partial.data_ptr());
  p.f = factors_of(out, weight, bias, std::nullopt, eps, channels);
  p.x = pointer(x, x.scalar_type(), x.numel(), "x");
  p.n = floats(n, s.rows * groups, "n");
  p.s = s;
  moments(type_of(x), p, launch.stream);
  launch.check("moments");
}

void normalize_op(
    const Tensor& z, const OptionalTensor& slope, const OptionalTensor& squares, const Tensor& x, const OptionalTensor& n,
    const OptionalTensor& residual, const Tensor& factors, int64_t groups, bool relu) {
  const Launch launch(x);
  const ScalarType type = x.scalar_type();
  const Segments s = segments_of(x, groups);
  const int64_t channels = channels_of(x);
  Normalize p{};
  p.z = pointer(z, type, x.numel(), "z");
  p.slope = pointer(slope, type, x.numel(), "slope");
  p.squares = floats(squares, s.rows, "squares");
  p.x = pointer(x, type, x.numel(), "x");
  p.n = floats(n, s.rows * groups, "n");
  p.residual = pointer(residual, type, x.numel(), "residual");
  p.scale = floats(factors, 2 * channels, "factors");
  p.shift = p.scale + channels;
  p.s = s;
  p.relu = relu;
  normalize(type_of(x), p, launch.stream);
  launch.check("normalize");
}

void normalize_sums_op(
    const OptionalTensor& dweight, const OptionalTensor& dbias, const OptionalTensor& factor, const Tensor& dz,
    const Tensor& x, const OptionalTensor& z, const OptionalTensor& n, const Tensor& factors, const Tensor& var, double eps,
    int64_t groups, bool relu) {
  const Launch launch(x);
  const ScalarType type = x.scalar_type();
  const Segments s = segments_of(x, groups);
  const int64_t channels = channels_of(x);
  if (channels == 0) return;
  const Tensor partial = scratch(x, reduction_splits(type_of(x), s), channels);
  NormalizeSums p{};
  p.dweight = floats(dweight, channels, "dweight");
  p.dbias = floats(dbias, channels, "dbias");
  p.factor = floats(factor, channels, "factor");
  p.partial = static_cast<float*>(partial.data_ptr());
  p.dz = pointer(dz, type, x.numel(), "dz");
  p.x = pointer(x, type, x.numel(), "x");
  p.z = pointer(z, type, x.numel(), "z");
  p.n = floats(n, s.rows * groups, "n");
  p.scale = floats(factors, 2 * channels, "factors");
  p.shift = p.scale + channels;
  p.var = floats(var, channels, "var");
  p.eps = static_cast<float>(eps);
  p.s = s;
  p.relu = relu;
  normalize_sums(type_of(x), p, launch.stream);
  launch.check("normalize_sums");
}

void normalize_backward_op(
    const OptionalTensor& dx, const OptionalTensor& q, const OptionalTensor& dresidual, const Tensor& dz,
    const OptionalTensor& x, const OptionalTensor& z, const OptionalTensor& slope, const OptionalTensor& n, const OptionalTensor& factors,
    const OptionalTensor& factor, const OptionalTensor& mean, int64_t groups, bool relu, bool detach) {
  const Launch launch(dz);
  const ScalarType type = dz.scalar_type();
  const Segments s = segments_of(dz, groups);
  const int64_t channels = channels_of(dz);
  NormalizeBackward p{};
  p.dx = pointer(dx, type, dz.numel(), "dx");
  p.q = floats(q, s.rows * groups, "q");
  p.dresidual = pointer(dresidual, type, dz.numel(), "dresidual");
  p.dz = pointer(dz, type, dz.numel(), "dz");
  p.x = pointer(x, type, dz.numel(), "x");
  p.z = pointer(z, type, dz.numel(), "z");
  p.slope = pointer(slope, type, dz.numel(), "slope");
  BCOS_CHECK(p.slope != nullptr || (x.has_value() && factors.has_value()), "expected x and factors, or a slope");
  BCOS_CHECK(p.slope == nullptr || p.dresidual == nullptr || !relu || p.z != nullptr, "expected z beside a slope");
  BCOS_CHECK(!factor.has_value() || mean.has_value(), "expected a mean beside the factor");
  p.n = floats(n, s.rows * groups, "n");
  p.scale = floats(factors, 2 * channels, "factors");
  p.shift = p.scale == nullptr ? nullptr : p.scale + channels;
  p.factor = floats(factor, channels, "factor");
  p.mean = factor.has_value() ? floats(mean, channels, "mean") : nullptr;
  p.s = s;
  p.relu = relu;
  p.detach = detach;
  normalize_backward(type_of(dz), p, launch.stream);
  launch.check("normalize_backward");
}

// --- layer normalisation ----------------------------------------------------------------------------------------------

// (rows, columns)
void check_matrix(const Tensor& x) { BCOS_CHECK(x.dim() == 2, "expected a matrix, got ", x.dim(), " dimensions"); }

void layer_norm_op(
    const Tensor& y, const Tensor& mean, const Tensor& rstd, const OptionalTensor& squares, const Tensor& x,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  const Launch launch(x);
  check_matrix(x);
  const ScalarType type = x.scalar_type();
  const int64_t rows = x.size(0), columns = x.size(1);
  LayerNorm p{};
  p.y = pointer(y, type, x.numel(), "y");
  p.mean = floats(mean, rows, "mean");
  p.rstd = floats(rstd, rows, "rstd");
  p.squares = floats(squares, rows, "squares");
  p.x = pointer(x, type, x.numel(), "x");
  p.weight = floats(weight, columns, "weight");
  p.bias = floats(bias, columns, "bias");
  p.rows = rows;
  p.columns = columns;
  p.eps = static_cast<float>(eps);
  layer_norm(type_of(x), p, launch.stream);
  launch.check("layer_norm");
}

void layer_norm_backward_op(
    const OptionalTensor& dx, const OptionalTensor& dweight, const OptionalTensor& dbias, const Tensor& dy, const Tensor& x,
    const OptionalTensor& weight, const Tensor& mean, const Tensor& rstd, bool detach) {
  const Launch launch(x);
  check_matrix(x);
  const ScalarType type = x.scalar_type();
  const int64_t rows = x.size(0), columns = x.size(1);
  const bool sums = dweight.has_value() || dbias.has_value();
  const Tensor partial = scratch(x, sums ? reduction_splits(type_of(x), {rows, 1, columns}) : 0, columns);
  LayerNormBackward p{};
  p.dx = pointer(dx, type, x.numel(), "dx");
  p.dweight = floats(dweight, columns, "dweight");
  p.dbias = floats(dbias, columns, "dbias");
  p.partial = sums ? static_cast<float*>(partial.data_ptr()) : nullptr;
  p.dy = pointer(dy, type, x.numel(), "dy");
  p.x = pointer(x, type, x.numel(), "x");
  p.weight = floats(weight, columns, "weight");
  p.mean = floats(mean, rows, "mean");
  p.rstd = floats(rstd, rows, "rstd");
  p.rows = rows;
  p.columns = columns;
  p.detach = detach;
  layer_norm_backward(type_of(x), p, launch.stream);
  launch.check("layer_norm_backward");
}

}  // namespace
}  // namespace bcos::cuda

#define BCOS_WINDOW_SCHEMA "int r, int s, int s0, int s1, int p0, int p1, int d0, int d1, "

#if defined(BCOS_EMULATED)
#define BCOS_LIBRARY bcos_kernels_cuda_emulated
#define BCOS_DEVICE CPU
#else
#define BCOS_LIBRARY bcos_kernels_cuda
#define BCOS_DEVICE CUDA
#endif
// one more level, for the names to be expanded
#define BCOS_OPS(...) STABLE_TORCH_LIBRARY(__VA_ARGS__)
#define BCOS_IMPLEMENTATIONS(...) STABLE_TORCH_LIBRARY_IMPL(__VA_ARGS__)

BCOS_OPS(BCOS_LIBRARY, m) {
  // norm: 0 sums of squares, 1 of a linear layer, 2 of a window; mode: 1 and 2 for B = 1 and 2, 0 for any other B
  m.def("segment_norms(Tensor(a!) out, Tensor x, int groups, int norm) -> ()");
  m.def("norms_of_squares(Tensor(a!) n, Tensor squares, int norm) -> ()");
  m.def("window_norms(Tensor(a!) n, Tensor? squares, Tensor x, " BCOS_WINDOW_SCHEMA "int groups) -> ()");
  m.def("add_norm_term(Tensor(a!) dx, Tensor x, Tensor q, " BCOS_WINDOW_SCHEMA "int groups) -> ()");
  m.def("normalize_weight(Tensor(a!) w_hat, Tensor w) -> ()");
  m.def("weight_norm_backward(Tensor(a!) dw, Tensor dw_hat, Tensor w) -> ()");
  m.def("scale(Tensor(a!) y, Tensor(b!)? kept, Tensor(c!)? index, Tensor a, Tensor? n, Tensor? b, int groups, int max_out, "
        "int mode, float exponent) -> ()");
  m.def("scale_backward(Tensor(a!) da, Tensor(b!)? q, Tensor dy, Tensor source, Tensor? index, Tensor? n, Tensor? b, "
        "int groups, int max_out, int mode, float exponent, bool from_a, bool detach, bool linear_norm, bool need_db) "
        "-> Tensor");
  m.def("scale_gelu(Tensor(a!) h, Tensor(b!)? squares, Tensor a, Tensor n) -> ()");
  m.def("scale_gelu_backward(Tensor(a!) da, Tensor(b!)? q, Tensor dh, Tensor a, Tensor n, bool detach) -> ()");
  m.def("factors(Tensor(a!) factors, Tensor? weight, Tensor? bias, Tensor var, float eps) -> ()");
  m.def("moments(Tensor(a!) mean, Tensor(b!) var, Tensor(c!) factors, Tensor x, Tensor? n, Tensor? weight, Tensor? bias, "
        "float eps, int groups) -> ()");
  m.def("normalize(Tensor(a!) z, Tensor(b!)? slope, Tensor(c!)? squares, Tensor x, Tensor? n, Tensor? residual, "
        "Tensor factors, int groups, bool relu) -> ()");
  m.def("normalize_sums(Tensor(a!)? dweight, Tensor(b!)? dbias, Tensor(c!)? factor, Tensor dz, Tensor x, Tensor? z, "
        "Tensor? n, Tensor factors, Tensor var, float eps, int groups, bool relu) -> ()");
  m.def("normalize_backward(Tensor(a!)? dx, Tensor(b!)? q, Tensor(c!)? dresidual, Tensor dz, Tensor? x, Tensor? z, "
        "Tensor? slope, Tensor? n, Tensor? factors, Tensor? factor, Tensor? mean, int groups, bool relu, bool detach) -> ()");
  m.def("layer_norm(Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd, Tensor(d!)? squares, Tensor x, Tensor? weight, "
        "Tensor? bias, float eps) -> ()");
  m.def("layer_norm_backward(Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias, Tensor dy, Tensor x, Tensor? weight, "
        "Tensor mean, Tensor rstd, bool detach) -> ()");
}

BCOS_IMPLEMENTATIONS(BCOS_LIBRARY, BCOS_DEVICE, m) {
  m.impl("segment_norms", TORCH_BOX(&bcos::cuda::segment_norms_op));
  m.impl("norms_of_squares", TORCH_BOX(&bcos::cuda::norms_of_squares_op));
  m.impl("window_norms", TORCH_BOX(&bcos::cuda::window_norms_op));
  m.impl("add_norm_term", TORCH_BOX(&bcos::cuda::add_norm_term_op));
  m.impl("normalize_weight", TORCH_BOX(&bcos::cuda::normalize_weight_op));
  m.impl("weight_norm_backward", TORCH_BOX(&bcos::cuda::weight_norm_backward_op));
  m.impl("scale", TORCH_BOX(&bcos::cuda::scale_op));
  m.impl("scale_backward", TORCH_BOX(&bcos::cuda::scale_backward_op));
  m.impl("scale_gelu", TORCH_BOX(&bcos::cuda::scale_gelu_op));
  m.impl("scale_gelu_backward", TORCH_BOX(&bcos::cuda::scale_gelu_backward_op));
  m.impl("factors", TORCH_BOX(&bcos::cuda::factors_op));
  m.impl("moments", TORCH_BOX(&bcos::cuda::moments_op));
  m.impl("normalize", TORCH_BOX(&bcos::cuda::normalize_op));
  m.impl("normalize_sums", TORCH_BOX(&bcos::cuda::normalize_sums_op));
  m.impl("normalize_backward", TORCH_BOX(&bcos::cuda::normalize_backward_op));
  m.impl("layer_norm", TORCH_BOX(&bcos::cuda::layer_norm_op));
  m.impl("layer_norm_backward", TORCH_BOX(&bcos::cuda::layer_norm_backward_op));
}

#if defined(BCOS_EMULATED)
#include "emulation.h"
// Bytes of activations and weights that kernels have read and written since the last call.
extern "C" void bcos_emulated_traffic(uint64_t* read, uint64_t* written) {
  emulation::Machine& m = emulation::machine();
  *read = m.bytes_read;
  *written = m.bytes_written;
  m.bytes_read = m.bytes_written = 0;
}
extern "C" void bcos_emulated_order(bool backwards) { emulation::machine().backwards = backwards; }
#endif
