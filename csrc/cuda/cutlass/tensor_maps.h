// Included before anything else of CUTLASS: keeps what the driver says of the tensor maps that CUTLASS has it encode.
// CUTLASS itself only asserts, and assertions are off (on, those of the device make WGMMA wait for each other), so that a
// refused map would be launched as it is.
#pragma once

#include <cutlass/cuda_host_adapter.hpp>

namespace bcos::fused {

// Of this thread's latest launch: the first refusal.
inline thread_local CUresult tensor_map_result = CUDA_SUCCESS;

inline CUresult record(CUresult result) {
  if (tensor_map_result == CUDA_SUCCESS) tensor_map_result = result;
  return result;
}
template <class... Arguments>
CUresult record_cuTensorMapEncodeTiled(Arguments... arguments) {
  return record(cutlass::call_cuTensorMapEncodeTiled(arguments...));
}
template <class... Arguments>
CUresult record_cuTensorMapEncodeIm2col(Arguments... arguments) {
  return record(cutlass::call_cuTensorMapEncodeIm2col(arguments...));
}

}  // namespace bcos::fused

#undef CUTLASS_CUDA_DRIVER_WRAPPER_CALL
#define CUTLASS_CUDA_DRIVER_WRAPPER_CALL(function) ::bcos::fused::record_##function
