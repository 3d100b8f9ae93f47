// What the launchers share: tensors of the LibTorch stable ABI as pointers, allocation, and the split over threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <vector>

#include "kernels.h"

namespace bcos::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kGrain = 16384;  // elements of a task, at least: about the cost of starting a thread's share

inline Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::Double: return Type::float64;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: break;
  }
  STD_TORCH_CHECK(false, "bcos_kernels_cpp: expected float32, float64, bfloat16 or float16");
  return Type::float32;
}

// The type of norms, statistics and sums.
inline ScalarType wide(ScalarType type) { return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

inline int64_t bytes_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

template <class T = void>
T* data(const OptionalTensor& t) {
  return t.has_value() ? static_cast<T*>(t->data_ptr()) : nullptr;
}

inline void check_size(const Tensor& t, int64_t expected, const char* name) {
  STD_TORCH_CHECK(t.numel() == expected, "bcos_kernels_cpp: expected ", expected, " elements of ", name, ", got ", t.numel());
}

inline void check_type(const Tensor& t, ScalarType expected, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == expected && t.is_cpu(), "bcos_kernels_cpp: expected another type or device of ", name);
}

inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4 || t.is_contiguous()) return false;
  int64_t step = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != step) return false;
    step *= t.size(d);
  }
  return true;
}

// The usual strides of a layout, also where a dimension of size 1 leaves them open.
inline std::vector<int64_t> strides_of(const int64_t* sizes, int64_t dims, bool channels_last) {
  std::vector<int64_t> strides(dims);
  constexpr int64_t last[] = {1, 3, 2, 0};
  for (int64_t i = 0, step = 1; i < dims; i++) {
    const int64_t d = channels_last ? last[i] : dims - 1 - i;
    strides[d] = step;
    step *= channels_last ? sizes[d] : std::max<int64_t>(sizes[d], 1);  // as torch has it where a size is 0
  }
  return strides;
}

inline int32_t code_of(ScalarType type) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
}

inline Tensor empty(const int64_t* sizes, int64_t dims, ScalarType type, bool channels_last) {
  const std::vector<int64_t> strides = strides_of(sizes, dims, channels_last);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides.data(), code_of(type), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, bool channels_last = false) {
  return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), type, channels_last);
}
// Of t's shape, in its layout (channels_last or contiguous).
inline Tensor empty_like(const Tensor& t, ScalarType type) {
  const auto sizes = t.sizes();
  return empty(sizes.data(), t.dim(), type, is_channels_last(t));
}

// Someone else's memory as a tensor.
inline Tensor alias(void* data, const int64_t* sizes, const int64_t* strides, int64_t dims, ScalarType type) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob_v2(
      data, dims, sizes, strides, 0, code_of(type), aoti_torch_device_type_cpu(), 0, &handle, aoti_torch_layout_strided(),
      nullptr, 0));
  return Tensor(handle);
}

inline bool has_strides(const Tensor& t, const std::vector<int64_t>& strides) {
  for (int64_t d = 0; d < t.dim(); d++) {
    if (t.stride(d) != strides[d]) return false;
  }
  return true;
}

// t in a dense layout, with the usual strides where dimensions of size 1 leave them open: with others the library's
// convolutions err (of a channels_last weight (O, C, 1, S) with strides (C S, 1, C, C), grouped ones in float32 return
// wrong values, some in float16 raise), and an op has to return the strides that its fake announces.
inline Tensor in_layout(const Tensor& t, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  Tensor dense = t;
  if (!(channels_last ? is_channels_last(t) : t.is_contiguous())) {
    dense = torch::stable::contiguous(t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }
  const auto sizes = dense.sizes();
  const std::vector<int64_t> strides = strides_of(sizes.data(), dense.dim(), channels_last);
  if (has_strides(dense, strides)) return dense;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      dense.get(), dense.dim(), sizes.data(), strides.data(), /*offset, on top of its own*/ 0, &handle));
  return Tensor(handle);
}

inline Tensor nothing(ScalarType type) { return empty({0}, type); }

// A matrix in someone else's memory; transposed: (rows, columns) of its transpose, which lies row by row.
inline Tensor matrix(void* data, int64_t rows, int64_t columns, ScalarType type, bool transposed = false) {
  const int64_t sizes[] = {rows, columns};
  const int64_t strides[] = {transposed ? 1 : std::max<int64_t>(columns, 1), transposed ? std::max<int64_t>(rows, 1) : 1};
  return alias(data, sizes, strides, 2, type);
}

template <class F>
void in_parallel(int64_t items, int64_t elements_per_item, const F& f) {
  if (items == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements_per_item));
  if (items <= grain) return f(0, items);
  torch::stable::parallel_for(0, items, grain, f);
}

// Items in at most as many chunks as there are threads; what is summed is summed per chunk and the chunks are added in
// order, so a run repeats bit for bit.
struct Chunks {
  int64_t items, count, size;
  Chunks(int64_t items, int64_t elements_per_item) : items(items) {
    const int64_t threads = torch::stable::get_num_threads();
    count = std::max<int64_t>(1, std::min(threads, items * elements_per_item / kGrain));
    size = (items + count - 1) / count;
  }
  int64_t begin(int64_t i) const { return std::min(i * size, items); }
  int64_t end(int64_t i) const { return std::min((i + 1) * size, items); }
  template <class F>
  void each(const F& f) const {
    if (count == 1) return f(0);
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) f(i);
    });
  }
};

// Memory for the length of a call.
struct Scratch {
  std::unique_ptr<char[]> memory;
  explicit Scratch(int64_t bytes) : memory(new char[static_cast<size_t>(bytes)]) {}
  void* get() const { return memory.get(); }
};

inline int64_t wide_bytes(int64_t elements, Type type) { return elements * (type == Type::float64 ? 8 : 4); }

}  // namespace bcos::cpu
