// Whether a device runs a kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

namespace bcos::fused {

// What is wrong with a device that is to be of compute capability `major`.0, or at least of that; nothing where it is.
inline std::string wrong_device(int32_t device, int major, bool or_newer) {
  int got = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&got, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return std::string("the device cannot be asked: ") + cudaGetErrorString(error);
  if ((got == major && minor == 0) || (or_newer && got >= major)) return {};
  return "expected a device of compute capability " + std::to_string(major) + (or_newer ? ".0 or newer" : ".0") +
         ", got " + std::to_string(got) + "." + std::to_string(minor);
}

}  // namespace bcos::fused
