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

inline bool is_contiguous(const Tensor& t) { return t.is_contiguous(); }

inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4 || t.is_contiguous()) return false;
  int64_t step = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != step) return false;
    step *= t.size(d);
  }
  return true;
}

inline Tensor in_layout(const Tensor& t, bool channels_last) {
  if (channels_last ? is_channels_last(t) : t.is_contiguous()) return t;
  using torch::headeronly::MemoryFormat;
  return torch::stable::contiguous(t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// A new tensor with the usual strides of the layout, also where a dimension of size 1 leaves them open.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type, bool channels_last = false) {
  int64_t size[4], stride[4], step = 1;
  const int64_t dims = sizes.size();
  std::copy(sizes.begin(), sizes.end(), size);
  constexpr int64_t last[] = {1, 3, 2, 0}, contiguous[] = {3, 2, 1, 0};
  for (int64_t i = 0; i < dims; i++) {
    const int64_t d = channels_last ? last[i] : contiguous[4 - dims + i];
    stride[d] = step;
    step *= std::max<int64_t>(size[d], 1);
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, size, stride, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor nothing(ScalarType type) { return empty({0}, type); }

// A matrix in someone else's memory; transposed: (rows, columns) of its transpose, which lies row by row.
inline Tensor matrix(void* data, int64_t rows, int64_t columns, ScalarType type, bool transposed = false) {
  const int64_t size[] = {rows, columns};
  const int64_t stride[] = {transposed ? 1 : std::max<int64_t>(columns, 1), transposed ? std::max<int64_t>(rows, 1) : 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob_v2(
      data, 2, size, stride, 0, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &handle, aoti_torch_layout_strided(), nullptr, 0));
  return Tensor(handle);
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
