// In the place of CUDA's runtime: keeps what a launcher of a CUTLASS kernel for sm_80 would have launched, so that ptx.py
// can run it. Linked with the kernels' objects; the device that it tells of is an A100.
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
  uint32_t grid[3], threads, shared_bytes;
  unsigned char parameters[4096];
};

struct Configuration {
  Size3 grid, block;
  size_t shared;
  void* stream;
};

Launch launch;
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

}  // namespace

extern "C" {

// What went wrong, or an empty text. `bytes`: of the kernel's parameter. `out` is where the launch is written to.
const char* bcos_record(const char* name, const void* problem, int64_t bytes, Launch* out) {
  using namespace bcos::fused;
  parameter_bytes = bytes;
  launch = {};
  message = "unknown kernel";
#define BCOS_OF(stem)                                                                    \
  if (std::strcmp(name, #stem "_bfloat16") == 0) launched_by(&stem##_bfloat16, problem); \
  if (std::strcmp(name, #stem "_float16") == 0) launched_by(&stem##_float16, problem);
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
  launch = {launch.launched + 1, {grid.x, grid.y, grid.z}, block.x * block.y * block.z, static_cast<uint32_t>(shared), {}};
  std::memcpy(launch.parameters, arguments[0], parameter_bytes);
  return 0;
}
int cudaLaunchKernel(const void* kernel, Size3 grid, Size3 block, void** arguments, size_t shared, void* stream) {
  return __cudaLaunchKernel(const_cast<void*>(kernel), grid, block, arguments, shared, stream);
}
int cudaLaunchKernelExC(const void*, const void*, void**) { return 1; }

int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76;
  *value = attribute == kMajor ? 8 : attribute == kMinor ? 0 : attribute == kMultiprocessors ? 108 : -1;
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
