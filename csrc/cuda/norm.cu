// Norms of windows and of weights, and their gradients.
//
// Math     n = sqrt(sum p^2 + 1e-6) per window and group, |x| + 1e-12 per row of a linear layer: a box filter over the
//          map of sum_c x^2; backward dx += x * sum of q over the windows that hold the pixel, q = (dL/dn)/n.
//          w_hat = w/|w|;  dL/dw = (dL/dw_hat - w_hat (w_hat . dL/dw_hat))/|w|, 0 where |w| = 0.
// Grid     teams of lanes (teams.h) over segments; the box filter one thread a window and group.
// Traffic  segment_norms reads x; window_norms reads and writes the maps, which are 1/channels of x; add_norm_term reads x,
//          reads and writes dx; the weight's kernels read and write weights.
#include "teams.h"

namespace bcos::cuda {
namespace {

__device__ inline float norm_of(float squares, Norm norm) {
  switch (norm) {
    case Norm::squares: return squares;
    case Norm::linear: return sqrtf(squares) + static_cast<float>(kLinearNormEps);
    default: return sqrtf(squares + static_cast<float>(kConvNormEps));
  }
}

template <class S, int V>
__device__ inline float sum_of_squares(const S* x, int64_t channels, int lanes) {
  float sum = 0;
  for_packs<V>(channels, lanes, [&](int64_t c) {
    const Pack<S, V> pack = read<V>(x + c);
#pragma unroll
    for (int i = 0; i < V; i++) sum += load(pack.of[i]) * load(pack.of[i]);
  });
  return sum;
}

template <class S, int V>
__global__ void segment_norms_kernel(float* out, const S* x, int64_t segments, int64_t channels, Norm norm, int lanes) {
  for_segments(segments, lanes, [&](int64_t s, bool active) {
    const float sum = team_sum(active ? sum_of_squares<S, V>(x + s * channels, channels, lanes) : 0.f, lanes);
    if (active && leads(lanes)) out[s] = norm_of(sum, norm);
  });
}

__global__ void norms_of_squares_kernel(float* n, const float* squares, int64_t count, Norm norm) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    n[i] = norm_of(squares[i], norm);
  }
}

template <class S>
__global__ void window_norms_kernel(float* n, const float* squares, const S* x, Window w, int64_t groups) {
  const int64_t count = w.images * w.out_height * w.out_width * groups;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t g = i % groups, window = i / groups;
    const int64_t q = window % w.out_width, p = window / w.out_width % w.out_height;
    const int64_t image = window / w.out_width / w.out_height;
    float sum = 0;
    for (int64_t r = 0; r < w.kernel[0]; r++) {
      const int64_t h = p * w.stride[0] - w.padding[0] + r * w.dilation[0];
      if (h < 0 || h >= w.height) continue;
      for (int64_t s = 0; s < w.kernel[1]; s++) {
        const int64_t v = q * w.stride[1] - w.padding[1] + s * w.dilation[1];
        if (v < 0 || v >= w.width) continue;
        const int64_t at = ((image * w.height + h) * w.width + v) * groups + g;
        if (squares != nullptr) {
          sum += squares[at];
        } else {
          const float value = load(x[at]);
          sum += value * value;
        }
      }
    }
    n[i] = norm_of(sum, Norm::window);
  }
}

// The windows that hold a pixel of one axis by tap `tap`: whether there is one, and which.
__device__ inline bool window_of(int64_t pixel, int64_t tap, const Window& w, int axis, int64_t windows, int64_t* window) {
  const int64_t from = pixel + w.padding[axis] - tap * w.dilation[axis];
  if (from < 0 || from % w.stride[axis] != 0) return false;
  *window = from / w.stride[axis];
  return *window < windows;
}

template <class S, int V>
__global__ void add_norm_term_kernel(S* dx, const S* x, const float* q, Window w, int64_t groups, int64_t channels, int lanes) {
  const int64_t taps = w.kernel[0] * w.kernel[1];
  for_segments(w.images * w.height * w.width * groups, lanes, [&](int64_t segment, bool active) {
    const int64_t g = segment % groups, pixel = segment / groups;
    const int64_t v = pixel % w.width, h = pixel / w.width % w.height, image = pixel / w.width / w.height;
    float under = 0;
    for (int64_t tap = threadIdx.x & (lanes - 1); active && tap < taps; tap += lanes) {
      int64_t p, o;
      if (!window_of(h, tap / w.kernel[1], w, 0, w.out_height, &p)) continue;
      if (!window_of(v, tap % w.kernel[1], w, 1, w.out_width, &o)) continue;
      under += q[((image * w.out_height + p) * w.out_width + o) * groups + g];
    }
    under = team_sum(under, lanes);
    if (!active) return;
    for_packs<V>(channels, lanes, [&](int64_t c) {
      const int64_t at = segment * channels + c;
      const Pack<S, V> from = read<V>(x + at);
      Pack<S, V> to = read<V>(dx + at);
#pragma unroll
      for (int i = 0; i < V; i++) to.of[i] = store<S>(load(to.of[i]) + load(from.of[i]) * under);
      write(dx + at, to);
    });
  });
}

template <class S, int V>
__global__ void normalize_weight_kernel(S* w_hat, const S* w, int64_t units, int64_t depth, int lanes) {
  for_segments(units, lanes, [&](int64_t u, bool active) {
    const float norm = sqrtf(team_sum(active ? sum_of_squares<S, V>(w + u * depth, depth, lanes) : 0.f, lanes));
    if (!active) return;
    const float reciprocal = norm == 0.f ? 0.f : 1.f / norm;
    for_packs<V>(depth, lanes, [&](int64_t k) {
      Pack<S, V> pack = read<V>(w + u * depth + k);
#pragma unroll
      for (int i = 0; i < V; i++) pack.of[i] = store<S>(load(pack.of[i]) * reciprocal);
      write(w_hat + u * depth + k, pack);
    });
  });
}

template <class S, int V>
__global__ void weight_norm_backward_kernel(S* dw, const S* dw_hat, const S* w, int64_t units, int64_t depth, int lanes) {
  for_segments(units, lanes, [&](int64_t u, bool active) {
    float squares = 0, dot = 0;
    if (active) {
      for_packs<V>(depth, lanes, [&](int64_t k) {
        const Pack<S, V> weight = read<V>(w + u * depth + k), gradient = read<V>(dw_hat + u * depth + k);
#pragma unroll
        for (int i = 0; i < V; i++) {
          squares += load(weight.of[i]) * load(weight.of[i]);
          dot += load(weight.of[i]) * load(gradient.of[i]);
        }
      });
    }
    squares = team_sum(squares, lanes);
    dot = team_sum(dot, lanes);
    if (!active) return;
    const float norm = sqrtf(squares), reciprocal = norm == 0.f ? 0.f : 1.f / norm;
    const float along = dot * reciprocal * reciprocal;
    for_packs<V>(depth, lanes, [&](int64_t k) {
      const Pack<S, V> weight = read<V>(w + u * depth + k);
      Pack<S, V> pack = read<V>(dw_hat + u * depth + k);
#pragma unroll
      for (int i = 0; i < V; i++) {
        pack.of[i] = store<S>((load(pack.of[i]) - load(weight.of[i]) * along) * reciprocal);
      }
      write(dw + u * depth + k, pack);
    });
  });
}

int blocks_of(int64_t threads) { return split_of(threads, 1, 1).blocks; }

template <class S>
const S* as(const void* p) {
  return static_cast<const S*>(p);
}

}  // namespace

void segment_norms(Type type, float* out, const void* x, Segments s, Norm norm, Stream stream) {
  BCOS_FOR_TYPE(type, vector_width(sizeof(S), s.channels, {x}), {
    const int64_t segments = s.rows * s.groups;
    const Split split = split_of(segments, s.channels, V);
    BCOS_LAUNCH((segment_norms_kernel<S, V>), split.blocks, kThreads, stream, out, as<S>(x), segments, s.channels, norm,
                split.lanes);
  })
}

void norms_of_squares(float* n, const float* squares, int64_t count, Norm norm, Stream stream) {
  BCOS_LAUNCH(norms_of_squares_kernel, blocks_of(count), kThreads, stream, n, squares, count, norm);
}

void window_norms(Type type_of_x, float* n, const float* squares, const void* x, Window w, int64_t groups, Stream stream) {
  const int blocks = blocks_of(w.images * w.out_height * w.out_width * groups);
  BCOS_FOR_TYPE(type_of_x, 1, {
    BCOS_LAUNCH((window_norms_kernel<S>), blocks, kThreads, stream, n, squares, as<S>(x), w, groups);
  })
}

void add_norm_term(Type type, void* dx, const void* x, const float* q, Window w, Segments pixels, Stream stream) {
  BCOS_FOR_TYPE(type, vector_width(sizeof(S), pixels.channels, {dx, x}), {
    const Split split = split_of(pixels.rows * pixels.groups, pixels.channels, V);
    BCOS_LAUNCH((add_norm_term_kernel<S, V>), split.blocks, kThreads, stream, static_cast<S*>(dx), as<S>(x), q, w,
                pixels.groups, pixels.channels, split.lanes);
  })
}

void normalize_weight(Type type, void* w_hat, const void* w, int64_t units, int64_t depth, Stream stream) {
  BCOS_FOR_TYPE(type, vector_width(sizeof(S), depth, {w_hat, w}), {
    const Split split = split_of(units, depth, V);
    BCOS_LAUNCH((normalize_weight_kernel<S, V>), split.blocks, kThreads, stream, static_cast<S*>(w_hat), as<S>(w), units,
                depth, split.lanes);
  })
}

void weight_norm_backward(
    Type type, void* dw, const void* dw_hat, const void* w, int64_t units, int64_t depth, Stream stream) {
  BCOS_FOR_TYPE(type, vector_width(sizeof(S), depth, {dw, dw_hat, w}), {
    const Split split = split_of(units, depth, V);
    BCOS_LAUNCH((weight_norm_backward_kernel<S, V>), split.blocks, kThreads, stream, static_cast<S*>(dw), as<S>(dw_hat),
                as<S>(w), units, depth, split.lanes);
  })
}

}  // namespace bcos::cuda
