// What ops.cpp hands to the kernels and what it knows of them: no torch, CUDA or CUTLASS header, so that either side
// compiles without the other's.
//
// Every kernel is an instance of one translation unit for one element type and one architecture, and a library holds those
// that were asked for: the others' declarations are weak and stay null.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace bcos::fused {

// Where a kernel is launched. allocate gives bytes of device memory that live until the launch is enqueued.
struct Place {
  int32_t device;
  void* stream;
  std::function<void*(int64_t)> allocate;
};

struct LinearForward {
  void* y;                              // (M, N)
  const void *x, *weight;               // (M, K), (N, K)
  const float* reciprocal_n;            // (M,); linear_norm_forward computes its own
  const float* reciprocal_weight_norm;  // (N,) or null: 1
  int64_t m, n, k;
};

struct LinearBackwardDx {
  void* dx;                     // (M, K)
  const void *da, *weight, *x;  // (M, N), (N, K), (M, K)
  const float* q;               // (M,)
  int64_t m, n, k;
};

// x (N, H, W, C), weight (O, R, S, C), y (N, P, Q, O); stride, padding and dilation along height and width.
struct Window {
  int64_t n, h, w, c, o, r, s, p, q;
  int64_t stride[2], padding[2], dilation[2];
};

struct Conv2dForward {
  void* y;
  const void *x, *weight;
  const float* reciprocal_n;            // (N, P, Q)
  const float* reciprocal_weight_norm;  // (O,) or null: 1
  Window window;
};

struct Conv2dBackwardDx {
  void* dx;
  const void *da, *weight, *x;
  const float* q;  // (N, H, W)
  Window window;
};

// launch returns what went wrong, nothing if the kernel is enqueued.
template <class Problem>
struct Kernel {
  std::string (*launch)(const Problem&, const Place&);
  int32_t threads, stages, shared_bytes;
};

#define BCOS_DECLARE_KERNEL(stem, Problem)                            \
  extern const Kernel<Problem> stem##_bfloat16 __attribute__((weak)); \
  extern const Kernel<Problem> stem##_float16 __attribute__((weak));
// for compute capability 9.0
BCOS_DECLARE_KERNEL(linear_forward, LinearForward)
BCOS_DECLARE_KERNEL(linear_norm_forward, LinearForward)
BCOS_DECLARE_KERNEL(linear_backward_dx, LinearBackwardDx)
BCOS_DECLARE_KERNEL(conv2d_forward, Conv2dForward)
BCOS_DECLARE_KERNEL(conv2d_backward_dx, Conv2dBackwardDx)
// from compute capability 8.0 on
BCOS_DECLARE_KERNEL(linear_forward_sm80, LinearForward)
BCOS_DECLARE_KERNEL(linear_backward_dx_sm80, LinearBackwardDx)
BCOS_DECLARE_KERNEL(conv2d_forward_sm80, Conv2dForward)
BCOS_DECLARE_KERNEL(conv2d_backward_dx_sm80, Conv2dBackwardDx)
#undef BCOS_DECLARE_KERNEL

}  // namespace bcos::fused
