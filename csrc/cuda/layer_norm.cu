// Layer normalisation of rows.
//
// Math     mean, rstd = 1/sqrt(var + eps), y = (x - mean) rstd w + b, sum y^2 per row for the norms of the layer that reads y;
//          with g = dy w and x^ = (x - mean) rstd: dx = rstd (g - mean of g - x^ mean of g x^), the last term not in
//          explanation mode; dw = sum dy x^, db = sum dy over rows.
// Grid     teams of lanes (teams.h) over rows; dw and db by columns (columns.h).
// Numerics float32; moments in two passes, the second also telling what rounding left of the mean; dw and db joined in double.
// Traffic  forward reads x and writes y, backward reads dy and x for dx, and again for dw and db, and writes dx. Rows that are
//          longer than what a team keeps in registers, or no multiple of 16 bytes, are read once more, three times in the
//          forward.
#include "columns.h"

namespace bcos::cuda {
namespace {

constexpr int kKept = 6, kKeptBackward = 4;  // packs of a row that a lane keeps: with 8 of them the forward takes 125 registers

// A row as a lane of its team sees it; KEPT packs in registers, or 0: every pass reads it.
template <class S, int V, int KEPT>
struct Row {
  const S* x;
  int64_t columns;
  int lanes;
  Pack<S, V> kept[KEPT > 0 ? KEPT : 1];

  __device__ Row(const S* x, int64_t columns, int lanes) : x(x), columns(columns), lanes(lanes) {
    if constexpr (KEPT > 0) {
      const int64_t first = (threadIdx.x & (lanes - 1)) * V;
#pragma unroll
      for (int k = 0; k < KEPT; k++) {
        const int64_t c = first + static_cast<int64_t>(k) * lanes * V;
        if (c < columns) kept[k] = read<V>(x + c);
      }
    }
  }
  // f(first column, pack, its place)
  template <class F>
  __device__ void each(const F& f) const {
    const int64_t first = (threadIdx.x & (lanes - 1)) * V;
    if constexpr (KEPT > 0) {
#pragma unroll
      for (int k = 0; k < KEPT; k++) {
        const int64_t c = first + static_cast<int64_t>(k) * lanes * V;
        if (c < columns) f(c, kept[k], k);
      }
    } else {
      for (int64_t c = first; c < columns; c += static_cast<int64_t>(lanes) * V) f(c, read<V>(x + c), 0);
    }
  }
  __device__ Pack<S, V> at(int64_t c, int k) const {
    if constexpr (KEPT > 0) return kept[k];
    return read<V>(x + c);
  }
};

template <class S, int V, int KEPT>
__global__ void layer_norm_kernel(LayerNorm p, int lanes) {
  const float count = static_cast<float>(p.columns);
  for_segments(p.rows, lanes, [&](int64_t r, bool active) {
    const Row<S, V, KEPT> row(static_cast<const S*>(p.x) + r * p.columns, active ? p.columns : 0, lanes);
    float sum = 0;
    row.each([&](int64_t, const Pack<S, V>& pack, int) {
#pragma unroll
      for (int i = 0; i < V; i++) sum += load(pack.of[i]);
    });
    const float mean = team_sum(sum, lanes) / count;
    float left = 0, moment = 0;
    row.each([&](int64_t, const Pack<S, V>& pack, int) {
#pragma unroll
      for (int i = 0; i < V; i++) {
        const float v = load(pack.of[i]) - mean;
        left += v;
        moment += v * v;
      }
    });
    const float slip = team_sum(left, lanes) / count, var = team_sum(moment, lanes) / count - slip * slip;
    const float rstd = 1.f / sqrtf((var < 0.f ? 0.f : var) + p.eps);
    float squares = 0;
    row.each([&](int64_t c, const Pack<S, V>& pack, int) {
      Pack<S, V> out;
#pragma unroll
      for (int i = 0; i < V; i++) {
        float y = (load(pack.of[i]) - mean - slip) * rstd;
        if (p.weight != nullptr) y *= p.weight[c + i];
        if (p.bias != nullptr) y += p.bias[c + i];
        out.of[i] = store<S>(y);
        squares += load(out.of[i]) * load(out.of[i]);
      }
      write(static_cast<S*>(p.y) + r * p.columns + c, out);
    });
    squares = team_sum(squares, lanes);
    if (!active || !leads(lanes)) return;
    p.mean[r] = mean + slip;
    p.rstd[r] = rstd;
    if (p.squares != nullptr) p.squares[r] = squares;
  });
}

template <class S, int V, int KEPT>
__global__ void layer_norm_backward_kernel(LayerNormBackward p, int lanes) {
  const float count = static_cast<float>(p.columns);
  for_segments(p.rows, lanes, [&](int64_t r, bool active) {
    const int64_t columns = active ? p.columns : 0, base = r * p.columns;
    const Row<S, V, KEPT> dy(static_cast<const S*>(p.dy) + base, columns, lanes);
    const Row<S, V, KEPT> x(static_cast<const S*>(p.x) + base, columns, lanes);
    const float mean = active ? p.mean[r] : 0.f, rstd = active ? p.rstd[r] : 0.f;
    float of_one = 0, of_x = 0;
    dy.each([&](int64_t c, const Pack<S, V>& gradient, int k) {
      const Pack<S, V> from = x.at(c, k);
#pragma unroll
      for (int i = 0; i < V; i++) {
        const float g = load(gradient.of[i]) * (p.weight == nullptr ? 1.f : p.weight[c + i]);
        of_one += g;
        of_x += g * (load(from.of[i]) - mean);
      }
    });
    of_one = team_sum(of_one, lanes) / count;
    of_x = team_sum(of_x, lanes) / count * rstd;
    if (p.detach) of_x = 0.f;
    // of a single column dx would be what rounding leaves
    const float slope = p.columns == 1 ? 0.f : rstd;
    dy.each([&](int64_t c, const Pack<S, V>& gradient, int k) {
      const Pack<S, V> from = x.at(c, k);
      Pack<S, V> out;
#pragma unroll
      for (int i = 0; i < V; i++) {
        const float g = load(gradient.of[i]) * (p.weight == nullptr ? 1.f : p.weight[c + i]);
        out.of[i] = store<S>((g - of_one - (load(from.of[i]) - mean) * rstd * of_x) * slope);
      }
      write(static_cast<S*>(p.dx) + base + c, out);
    });
  });
}

template <class S, int V>
__global__ void layer_norm_sums_kernel(LayerNormBackward p) {
  __shared__ float shared[V * kThreads];
  const S *dy = static_cast<const S*>(p.dy), *x = static_cast<const S*>(p.x);
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  const bool active = c < p.columns;
  float dw[V], db[V];
#pragma unroll
  for (int i = 0; i < V; i++) dw[i] = db[i] = 0;
  int64_t first, count;
  for_rows(p.rows, &first, &count, [&](int64_t row) {
    if (!active) return;
    const Pack<S, V> gradient = read<V>(dy + row * p.columns + c), from = read<V>(x + row * p.columns + c);
    const float mean = p.mean[row], rstd = p.rstd[row];
#pragma unroll
    for (int i = 0; i < V; i++) {
      dw[i] += load(gradient.of[i]) * (load(from.of[i]) - mean) * rstd;
      db[i] += load(gradient.of[i]);
    }
  });
  column_sum<V>(dw, shared);
  column_sum<V>(db, shared);
  if (!active || threadIdx.y != 0) return;
  float* part = p.partial + 2 * blockIdx.x * p.columns + c;
#pragma unroll
  for (int i = 0; i < V; i++) {
    part[i] = dw[i];
    part[p.columns + i] = db[i];
  }
}

__global__ void layer_norm_sums_finish_kernel(LayerNormBackward p, int64_t splits) {
  __shared__ double shared[2 * kRowsOfFinish * 32];
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  double dw = 0, db = 0;
  for (int64_t i = threadIdx.y; c < p.columns && i < splits; i += kRowsOfFinish) {
    const float* part = p.partial + 2 * i * p.columns + c;
    dw += part[0];
    db += part[p.columns];
  }
  double* mine = shared + 2 * (threadIdx.y * 32 + threadIdx.x);
  mine[0] = dw;
  mine[1] = db;
  __syncthreads();
  if (threadIdx.y != 0 || c >= p.columns) return;
  for (int y = 1; y < kRowsOfFinish; y++) {
    dw += shared[2 * (y * 32 + threadIdx.x)];
    db += shared[2 * (y * 32 + threadIdx.x) + 1];
  }
  if (p.dweight != nullptr) p.dweight[c] = static_cast<float>(dw);
  if (p.dbias != nullptr) p.dbias[c] = static_cast<float>(db);
}

// Whether a team keeps a row.
bool keeps(int kept, const Split& split, int width, int64_t columns) {
  return width > 1 && columns <= static_cast<int64_t>(kept) * split.lanes * width;
}

}  // namespace

void layer_norm(Type type, const LayerNorm& p, Stream stream) {
  BCOS_FOR_TYPE(type, vector_width(sizeof(S), p.columns, {p.y, p.x}), {
    const Split split = split_of(p.rows, p.columns, V);
    if (keeps(kKept, split, V, p.columns)) {
      BCOS_LAUNCH((layer_norm_kernel<S, V, (V > 1 ? kKept : 0)>), split.blocks, kThreads, stream, p, split.lanes);
    } else {
      BCOS_LAUNCH((layer_norm_kernel<S, V, 0>), split.blocks, kThreads, stream, p, split.lanes);
    }
  })
}

void layer_norm_backward(Type type, const LayerNormBackward& p, Stream stream) {
  if (p.dx != nullptr) {
    BCOS_FOR_TYPE(type, vector_width(sizeof(S), p.columns, {p.dx, p.dy, p.x}), {
      const Split split = split_of(p.rows, p.columns, V);
      if (keeps(kKeptBackward, split, V, p.columns)) {
        BCOS_LAUNCH((layer_norm_backward_kernel<S, V, (V > 1 ? kKeptBackward : 0)>), split.blocks, kThreads, stream, p,
                    split.lanes);
      } else {
        BCOS_LAUNCH((layer_norm_backward_kernel<S, V, 0>), split.blocks, kThreads, stream, p, split.lanes);
      }
    })
  }
  if (p.partial == nullptr) return;
  const Segments s{p.rows, 1, p.columns};
  const int64_t splits = reduction_splits(type, s);
  BCOS_FOR_TYPE(type, vector_width(sizeof(S), p.columns, {p.dy, p.x}), {
    const dim3 block = block_of(p.columns, V);
    BCOS_LAUNCH((layer_norm_sums_kernel<S, V>), reduction_grid(s, splits, block, V), block, stream, p);
  })
  BCOS_LAUNCH(layer_norm_sums_finish_kernel, finish_grid(s), dim3(32, kRowsOfFinish), stream, p, splits);
}

}  // namespace bcos::cuda
