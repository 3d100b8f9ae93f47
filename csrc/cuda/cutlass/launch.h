// From the arguments of a kernel for Hopper to its launch, saying what went wrong.
#pragma once

#include "tensor_maps.h"

#include <cutlass/cutlass.h>
#include <cutlass/kernel_hardware_info.hpp>

#include <string>

#include "devices.h"
#include "kernels.h"

namespace bcos::fused {

// Enqueues Operator (a device adapter of CUTLASS) on the place's stream; what went wrong, or nothing.
template <class Operator>
std::string launch(typename Operator::Arguments& arguments, const Place& place) {
  const std::string wrong = wrong_device(place.device, 9, /*or_newer*/ false);
  if (!wrong.empty()) return wrong;
  arguments.hw_info.device_id = place.device;
  arguments.hw_info.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(place.device);
  if (Operator::can_implement(arguments) != cutlass::Status::kSuccess) {
    return "expected sizes, padding and dilation within the limits of the kernel's tensor maps";
  }
  const auto bytes = static_cast<int64_t>(Operator::get_workspace_size(arguments));
  const auto stream = static_cast<cudaStream_t>(place.stream);
  Operator op;
  tensor_map_result = CUDA_SUCCESS;
  cutlass::Status status = op.initialize(arguments, bytes > 0 ? place.allocate(bytes) : nullptr, stream);
  if (tensor_map_result != CUDA_SUCCESS) {
    return "the driver refused a tensor map: CUresult " + std::to_string(static_cast<int>(tensor_map_result));
  }
  if (status == cutlass::Status::kSuccess) status = op.run(stream);
  if (status == cutlass::Status::kSuccess) return {};
  return std::string("the launch failed: ") + cutlass::cutlassGetStatusString(status);
}

template <class Problem, class Device>
constexpr Kernel<Problem> kernel_of(std::string (*launcher)(const Problem&, const Place&)) {
  return {
      launcher, static_cast<int32_t>(Device::MaxThreadsPerBlock), Device::DispatchPolicy::Stages,
      Device::SharedStorageSize};
}

}  // namespace bcos::fused
