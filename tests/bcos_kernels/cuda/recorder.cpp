// In the place of CUDA's runtime and driver: keeps what a launcher of a CUTLASS kernel would have launched, so that ptx.py
// and ptx_hopper.py can run it. Linked with the kernels' objects; the device that it tells of is an A100 to the kernels for
// sm_80, to Hopper's an H200, or one with fewer multiprocessors. What the driver keeps in a tensor map nobody else knows:
// here it is the parameters themselves.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "../../../csrc/cuda/cutlass/kernels.h"

namespace {

struct Size3 {
  uint32_t x, y, z;
};

struct Launch {
  uint32_t launched;
  uint32_t grid[3], cluster[3], threads, shared_bytes;
  unsigned char parameters[4096];
};

struct Configuration {
  Size3 grid, block;
  size_t shared;
  void* stream;
};

// cudaLaunchConfig_t and its attributes, of which a cluster's size is one.
struct Attribute {
  uint32_t id;
  alignas(8) uint32_t value[16];
};
struct LaunchConfiguration {
  Size3 grid, block;
  size_t shared;
  void* stream;
  const Attribute* attributes;
  uint32_t count;
};
constexpr uint32_t kClusterDimension = 4;

Launch launch;
int multiprocessors;
bool hopper;
Configuration configuration;
int64_t parameter_bytes;
std::string message;

template <class Problem>
void launched_by(const bcos::fused::Kernel<Problem>* kernel, const void* problem) {
  if (kernel == nullptr) {
    message = "not linked";
    return;
  }
  const bcos::fused::Place place{0, nullptr, [](int64_t) -> void* { return nullptr; }};
  message = kernel->launch(*static_cast<const Problem*>(problem), place);
}

void record_launch(Size3 grid, Size3 cluster, Size3 block, void** arguments, size_t shared) {
  launch = {
      launch.launched + 1, {grid.x, grid.y, grid.z}, {cluster.x, cluster.y, cluster.z}, block.x * block.y * block.z,
      static_cast<uint32_t>(shared), {}};
  std::memcpy(launch.parameters, arguments[0], parameter_bytes);
}

// A tensor map as ptx_hopper.py reads it. Axes from the innermost on, those between channels and images for corners: cuda.h
// calls these {D, H, W} and tells no order; CUTLASS, NVIDIA's own, passes them as it passes sizes.
struct TensorMap {
  char mark[4];
  uint8_t im2col, rank, element_bytes, span;  // span: bytes within which 16-byte chunks change places, 0 for none
  uint64_t address, strides[4];
  uint32_t last[5];  // size - 1
  uint16_t box[5];
  uint8_t steps[5], unused;
  int16_t lower[3], upper[3];
  uint16_t channels, pixels;
  uint8_t padding[28];
};
static_assert(sizeof(TensorMap) == 128);

// What both modes ask for, by cuda.h: CUDA_SUCCESS (0) or CUDA_ERROR_INVALID_VALUE (1). Types of 16 bits alone.
int encode(
    TensorMap* map, int type, uint32_t rank, void* address, const uint64_t* sizes, const uint64_t* strides,
    const uint32_t* steps, int interleave, int swizzle, int fill, uint32_t inner) {
  constexpr int kUint16 = 1, kFloat16 = 6, kBfloat16 = 9;
  constexpr uint8_t kSpans[] = {0, 32, 64, 128};
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (type != kUint16 && type != kFloat16 && type != kBfloat16) return 1;
  if (reinterpret_cast<uintptr_t>(map) % 64 || at % 16 || at == 0) return 1;
  if (interleave != 0 || swizzle < 0 || swizzle > 3 || fill != 0) return 1;
  const uint32_t inner_bytes = inner * 2;
  if (inner_bytes % 16 || (swizzle > 0 && inner_bytes > kSpans[swizzle])) return 1;
  *map = {{'T', 'M', 'a', 'p'}, 0, static_cast<uint8_t>(rank), 2, kSpans[swizzle], at, {}, {}, {}, {}, 0, {}, {}, 0, 0, {}};
  for (uint32_t i = 0; i < rank; i++) {
    if (sizes[i] == 0 || sizes[i] > (uint64_t{1} << 32) || steps[i] == 0 || steps[i] > 8) return 1;
    map->last[i] = static_cast<uint32_t>(sizes[i] - 1);
    map->steps[i] = i == 0 ? 1 : static_cast<uint8_t>(steps[i]);
    if (i + 1 == rank) continue;
    if (strides[i] % 16 || strides[i] >= (uint64_t{1} << 40)) return 1;
    map->strides[i] = strides[i];
  }
  return 0;
}

int encode_tiled(
    TensorMap* map, int type, uint32_t rank, void* address, const uint64_t* sizes, const uint64_t* strides,
    const uint32_t* box, const uint32_t* steps, int interleave, int swizzle, int, int fill) {
  if (rank < 1 || rank > 5) return 1;
  if (encode(map, type, rank, address, sizes, strides, steps, interleave, swizzle, fill, box[0])) return 1;
  for (uint32_t i = 0; i < rank; i++) {
    if (box[i] == 0 || box[i] > 256) return 1;
    map->box[i] = static_cast<uint16_t>(box[i]);
  }
  return 0;
}

int encode_im2col(
    TensorMap* map, int type, uint32_t rank, void* address, const uint64_t* sizes, const uint64_t* strides,
    const int* lower, const int* upper, uint32_t channels, uint32_t pixels, const uint32_t* steps, int interleave,
    int swizzle, int, int fill) {
  if (rank < 3 || rank > 5 || channels == 0 || channels > 256 || pixels == 0 || pixels > 1024) return 1;
  if (encode(map, type, rank, address, sizes, strides, steps, interleave, swizzle, fill, channels)) return 1;
  map->im2col = 1;
  map->channels = static_cast<uint16_t>(channels);
  map->pixels = static_cast<uint16_t>(pixels);
  const int limit = rank == 3 ? 1 << 15 : rank == 4 ? 1 << 7 : 1 << 4;
  for (uint32_t i = 0; i < rank - 2; i++) {
    for (const int corner : {lower[i], upper[i]}) {
      if (corner < -limit || corner >= limit) return 1;
    }
    if (static_cast<int64_t>(sizes[i + 1]) - 1 + upper[i] < lower[i]) return 1;  // a box of no pixels
    map->lower[i] = static_cast<int16_t>(lower[i]);
    map->upper[i] = static_cast<int16_t>(upper[i]);
  }
  return 0;
}

}  // namespace

extern "C" {

// What went wrong, or an empty text. `bytes`: of the kernel's parameter; `processors`: of the device. `out` is where the
// launch is written to.
const char* bcos_record(const char* name, const void* problem, int64_t bytes, int processors, Launch* out) {
  using namespace bcos::fused;
  parameter_bytes = bytes;
  multiprocessors = processors;
  hopper = std::strstr(name, "_sm80") == nullptr;
  launch = {};
  message = "unknown kernel";
#define BCOS_OF(stem)                                                                    \
  if (std::strcmp(name, #stem "_bfloat16") == 0) launched_by(&stem##_bfloat16, problem); \
  if (std::strcmp(name, #stem "_float16") == 0) launched_by(&stem##_float16, problem);
  BCOS_OF(linear_forward)
  BCOS_OF(linear_norm_forward)
  BCOS_OF(linear_backward_dx)
  BCOS_OF(conv2d_forward)
  BCOS_OF(conv2d_backward_dx)
  BCOS_OF(linear_forward_sm80)
  BCOS_OF(linear_backward_dx_sm80)
  BCOS_OF(conv2d_forward_sm80)
  BCOS_OF(conv2d_backward_dx_sm80)
#undef BCOS_OF
  *out = launch;
  return message.c_str();
}

// CUDA's runtime, as far as the objects call it.

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

uint32_t __cudaPushCallConfiguration(Size3 grid, Size3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
int __cudaPopCallConfiguration(Size3* grid, Size3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return 0;
}
int __cudaGetKernel(void** kernel, const void* function) {
  *kernel = const_cast<void*>(function);
  return 0;
}
int __cudaLaunchKernel(void*, Size3 grid, Size3 block, void** arguments, size_t shared, void*) {
  record_launch(grid, {1, 1, 1}, block, arguments, shared);
  return 0;
}
int cudaLaunchKernel(const void* kernel, Size3 grid, Size3 block, void** arguments, size_t shared, void* stream) {
  return __cudaLaunchKernel(const_cast<void*>(kernel), grid, block, arguments, shared, stream);
}
int cudaLaunchKernelExC(const LaunchConfiguration* with, const void*, void** arguments) {
  Size3 cluster{1, 1, 1};
  for (uint32_t i = 0; i < with->count; i++) {
    const Attribute& attribute = with->attributes[i];
    if (attribute.id != kClusterDimension) return 1;
    cluster = {attribute.value[0], attribute.value[1], attribute.value[2]};
  }
  if (with->grid.x % cluster.x + with->grid.y % cluster.y + with->grid.z % cluster.z != 0) return 1;
  record_launch(with->grid, cluster, with->block, arguments, with->shared);
  return 0;
}
int cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long, int* found) {
  *function = std::strcmp(name, "cuTensorMapEncodeTiled") == 0    ? reinterpret_cast<void*>(&encode_tiled)
              : std::strcmp(name, "cuTensorMapEncodeIm2col") == 0 ? reinterpret_cast<void*>(&encode_im2col)
                                                                  : nullptr;
  *found = *function == nullptr ? 1 : 0;
  return 0;
}

int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76;
  *value = attribute == kMajor              ? (hopper ? 9 : 8)
           : attribute == kMinor            ? 0
           : attribute == kMultiprocessors ? multiprocessors
                                            : -1;
  return 0;
}
int cudaFuncSetAttribute(const void*, int, int) { return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 2;
  return 0;
}
int cudaGetLastError() { return 0; }
const char* cudaGetErrorString(int) { return "an error"; }

}  // extern "C"
