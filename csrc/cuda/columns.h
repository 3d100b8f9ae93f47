// Sums over rows, per channel: blocks of (lanes over packs of channels) x (rows), a split of the rows each; a second kernel adds
// the splits in order.
#pragma once

#include "teams.h"

namespace bcos::cuda {

constexpr int kRowsOfFinish = 8;

// Packs of channels along x, rows along y.
inline dim3 block_of(int64_t channels, int width) {
  unsigned lanes = 1;
  while (lanes < 32 && static_cast<int64_t>(lanes) * width < channels) lanes *= 2;
  return dim3(lanes, kThreads / lanes);
}

// f(row) for this thread's rows of the block's split.
template <class F>
__device__ inline void for_rows(int64_t rows, int64_t* first, int64_t* count, const F& f) {
  const int64_t size = (rows + gridDim.x - 1) / gridDim.x;
  *first = blockIdx.x * size < rows ? blockIdx.x * size : rows;
  *count = *first + size < rows ? size : rows - *first;
  for (int64_t row = *first + threadIdx.y; row < *first + *count; row += blockDim.y) f(row);
}

// The sums of a column of threads, at its first row.
template <int V>
__device__ inline void column_sum(float (&v)[V], float* shared) {
  const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (unsigned height = blockDim.y / 2; height > 0; height /= 2) {
    if (threadIdx.y >= height && threadIdx.y < 2 * height) {
#pragma unroll
      for (int i = 0; i < V; i++) shared[i * kThreads + thread - height * blockDim.x] = v[i];
    }
    __syncthreads();
    if (threadIdx.y < height) {
#pragma unroll
      for (int i = 0; i < V; i++) v[i] += shared[i * kThreads + thread];
    }
    __syncthreads();
  }
}

inline int64_t channels_of(const Segments& s) { return s.groups * s.channels; }

// Rows of a split: 16 a thread at least, and no more splits than fill a large GPU four times over.
inline int64_t splits_of(const Segments& s, int width) {
  const dim3 block = block_of(channels_of(s), width);
  const int64_t tiles = (channels_of(s) + block.x * width - 1) / (block.x * width);
  const int64_t most = 1024 / (tiles < 1024 ? tiles : 1024), by_rows = (s.rows + 16 * block.y - 1) / (16 * block.y);
  const int64_t splits = by_rows < most ? by_rows : most;
  return splits < 1 ? 1 : splits;
}

inline dim3 reduction_grid(const Segments& s, int64_t splits, const dim3& block, int width) {
  return dim3(static_cast<unsigned>(splits), static_cast<unsigned>((channels_of(s) + block.x * width - 1) / (block.x * width)));
}
inline dim3 finish_grid(const Segments& s) { return dim3(static_cast<unsigned>((channels_of(s) + 31) / 32)); }

}  // namespace bcos::cuda
