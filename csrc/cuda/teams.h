// How the kernels split an activation: a team of lanes of one warp (a power of two of them, 32 at most) takes a segment,
// each lane a pack of channels at a time, so that a sum over channels is a few shuffles and neighbouring lanes read
// neighbouring 16 bytes.
#pragma once

#include "element.h"

namespace bcos::cuda {

constexpr int kThreads = 256;

struct Split {
  int lanes, blocks;
};

inline Split split_of(int64_t segments, int64_t channels, int width) {
  int lanes = 1;
  while (lanes < 32 && static_cast<int64_t>(lanes) * width < channels) lanes *= 2;
  const int64_t per_block = kThreads / lanes, blocks = (segments + per_block - 1) / per_block;
  return {lanes, static_cast<int>(blocks < (1 << 20) ? (blocks > 0 ? blocks : 1) : 1 << 20)};
}

// f(segment, whether there is one) for this thread's team; all threads of a warp make the same number of turns, as the
// shuffles in f need.
template <class F>
__device__ inline void for_segments(int64_t segments, int lanes, const F& f) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x / lanes;
  const int64_t first_of_warp = (thread & ~static_cast<int64_t>(31)) / lanes;
  for (int64_t offset = 0; first_of_warp + offset < segments; offset += step) {
    const int64_t segment = thread / lanes + offset;
    f(segment, segment < segments);
  }
}

// f(first channel of a pack) for the packs of a segment that are this lane's.
template <int V, class F>
__device__ inline void for_packs(int64_t channels, int lanes, const F& f) {
  for (int64_t c = (threadIdx.x & (lanes - 1)) * V; c < channels; c += static_cast<int64_t>(lanes) * V) f(c);
}

__device__ inline float team_sum(float v, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}
__device__ inline bool leads(int lanes) { return (threadIdx.x & (lanes - 1)) == 0; }

// Of a channel a group: segments are whole rows, and what there is per window is read per channel.
inline bool is_each(const Segments& s) { return s.groups > 1 && s.channels == 1; }
inline Segments whole_rows(const Segments& s) { return {s.rows, 1, s.groups * s.channels}; }

}  // namespace bcos::cuda
