// The uncentered BatchNorm, alone or behind a B-cos layer (B = 2), whose scaling is then a part of its passes.
//
// Math     v = x, or a |a|/n where norms are given;  z = act(v scale + shift + residual), scale = weight/sqrt(var + eps);
//          g = dL/dz where the ReLU is open;  dL/dv = g scale + factor (v - mean), factor = -sum(g v) scale/(rows (var + eps));
//          from dL/dv to dL/da and q = -sum_c dL/dv v / n^2 as in scale.cu; sum_c z^2 per row for the norms of the layer
//          that reads z.
// Grid     sums over rows: blocks of (lanes over packs of channels) x (rows), a split of the rows each; a second kernel adds the
//          splits in order. Elementwise passes: teams of lanes (teams.h) over rows, or segments where several groups have
//          several channels.
// Numerics float32; moments about the split's first row, joined in double by Chan's formula. The ReLU's mask is that of the
//          stored value.
// Traffic  training forward reads x twice and writes z; known statistics: reads x, writes z; backward reads dz and x twice (and z
//          twice where there was a residual), writes dx. That is what a plain BatchNorm with ReLU moves.
#include "columns.h"

namespace bcos::cuda {
namespace {

// How a pass finds the norm of an element: there is none, one a row, or one a group.
enum class By { none, row, group };

__device__ inline float value_of(float x, float reciprocal, By by) { return by == By::none ? x : output_b2(x, reciprocal); }

template <By BY>
__device__ inline float reciprocal_of(const float* n, int64_t row, int64_t c, const Segments& s) {
  if (BY == By::none) return 1.f;
  return 1.f / n[BY == By::row ? row : row * s.groups + c / s.channels];
}

// As it was stored: the ReLU's mask has to be the forward's.
template <class S>
__device__ inline bool is_open(float out) {
  return !(load(store<S>(out)) <= 0.f);
}

// --- sums over rows ---------------------------------------------------------------------------------------------------

template <class S, int V, By BY>
__global__ void moments_kernel(Moments p) {
  __shared__ float shared[V * kThreads];
  const S* x = static_cast<const S*>(p.x);
  const int64_t channels = p.s.groups * p.s.channels;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  const bool active = c < channels;
  float origin[V], sum[V], squares[V];
#pragma unroll
  for (int i = 0; i < V; i++) origin[i] = sum[i] = squares[i] = 0;
  bool begun = false;
  int64_t first = 0, count = 0;
  for_rows(p.s.rows, &first, &count, [&](int64_t row) {
    if (!active) return;
    if (!begun) {  // near enough to the mean not to cancel
      begun = true;
      const Pack<S, V> pack = read<V>(x + first * channels + c);
#pragma unroll
      for (int i = 0; i < V; i++) {
        origin[i] = value_of(load(pack.of[i]), reciprocal_of<BY>(p.n, first, c + i, p.s), BY);
      }
    }
    const Pack<S, V> pack = read<V>(x + row * channels + c);
#pragma unroll
    for (int i = 0; i < V; i++) {
      const float v = value_of(load(pack.of[i]), reciprocal_of<BY>(p.n, row, c + i, p.s), BY) - origin[i];
      sum[i] += v;
      squares[i] += v * v;
    }
  });
  column_sum<V>(sum, shared);
  column_sum<V>(squares, shared);
  if (!active || threadIdx.y != 0) return;
  float* mean = p.partial + 2 * blockIdx.x * channels;
#pragma unroll
  for (int i = 0; i < V; i++) {
    const float apart = count > 0 ? sum[i] / static_cast<float>(count) : 0.f;
    mean[c + i] = origin[i] + apart;
    mean[channels + c + i] = squares[i] - sum[i] * apart;
  }
}

struct Joined {
  double rows, mean, squares;  // squares: of the differences to the mean
};
__device__ inline Joined join(const Joined& a, const Joined& b) {  // Chan, Golub, LeVeque
  if (a.rows == 0) return b;
  if (b.rows == 0) return a;
  const double rows = a.rows + b.rows, apart = b.mean - a.mean;
  return {rows, a.mean + apart * b.rows / rows, a.squares + b.squares + apart * apart * a.rows * b.rows / rows};
}

__device__ inline void write_factors(const Factors& f, int64_t c, float var) {
  f.scale[c] = (f.weight == nullptr ? 1.f : f.weight[c]) / sqrtf(var + f.eps);
  f.shift[c] = f.bias == nullptr ? 0.f : f.bias[c];
}

__global__ void moments_finish_kernel(Moments p, int64_t splits) {
  __shared__ Joined shared[kRowsOfFinish * 32];
  const int64_t channels = p.s.groups * p.s.channels, c = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  const int64_t size = (p.s.rows + splits - 1) / splits;
  Joined all{0, 0, 0};
  for (int64_t i = threadIdx.y; c < channels && i < splits; i += kRowsOfFinish) {
    const int64_t first = i * size < p.s.rows ? i * size : p.s.rows;
    const int64_t count = first + size < p.s.rows ? size : p.s.rows - first;
    const float* part = p.partial + 2 * i * channels + c;
    all = join(all, {static_cast<double>(count), part[0], part[channels]});
  }
  shared[threadIdx.y * 32 + threadIdx.x] = all;
  __syncthreads();
  if (threadIdx.y != 0 || c >= channels) return;
  for (int y = 1; y < kRowsOfFinish; y++) all = join(all, shared[y * 32 + threadIdx.x]);
  const double var = all.squares / all.rows;
  p.mean[c] = static_cast<float>(all.mean);
  p.var[c] = static_cast<float>(var < 0 ? 0 : var);
  write_factors(p.f, c, p.var[c]);
}

__global__ void factors_kernel(Factors p) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c < p.channels) write_factors(p, c, p.var[c]);
}

template <class S, int V, By BY>
__global__ void normalize_sums_kernel(NormalizeSums p) {
  __shared__ float shared[V * kThreads];
  const S *dz = static_cast<const S*>(p.dz), *x = static_cast<const S*>(p.x), *z = static_cast<const S*>(p.z);
  const int64_t channels = p.s.groups * p.s.channels;
  const int64_t c = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
  const bool active = c < channels;
  float g_sum[V], gv_sum[V];
#pragma unroll
  for (int i = 0; i < V; i++) g_sum[i] = gv_sum[i] = 0;
  int64_t first, count;
  for_rows(p.s.rows, &first, &count, [&](int64_t row) {
    if (!active) return;
    const int64_t at = row * channels + c;
    const Pack<S, V> gradient = read<V>(dz + at), of_x = read<V>(x + at);
    Pack<S, V> of_z = gradient;
    if (p.z != nullptr) of_z = read<V>(z + at);
#pragma unroll
    for (int i = 0; i < V; i++) {
      const float v = value_of(load(of_x.of[i]), reciprocal_of<BY>(p.n, row, c + i, p.s), BY);
      float g = load(gradient.of[i]);
      if (p.relu) {
        const bool open = p.z != nullptr ? !(load(of_z.of[i]) <= 0.f) : is_open<S>(v * p.scale[c + i] + p.shift[c + i]);
        g = open ? g : 0.f;
      }
      g_sum[i] += g;
      gv_sum[i] += g * v;
    }
  });
  column_sum<V>(g_sum, shared);
  column_sum<V>(gv_sum, shared);
  if (!active || threadIdx.y != 0) return;
  float* part = p.partial + 2 * blockIdx.x * channels + c;
#pragma unroll
  for (int i = 0; i < V; i++) {
    part[i] = g_sum[i];
    part[channels + i] = gv_sum[i];
  }
}

__global__ void normalize_sums_finish_kernel(NormalizeSums p, int64_t splits) {
  __shared__ double shared[2 * kRowsOfFinish * 32];
  const int64_t channels = p.s.groups * p.s.channels, c = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  double g = 0, gv = 0;
  for (int64_t i = threadIdx.y; c < channels && i < splits; i += kRowsOfFinish) {
    const float* part = p.partial + 2 * i * channels + c;
    g += part[0];
    gv += part[channels];
  }
  double* mine = shared + 2 * (threadIdx.y * 32 + threadIdx.x);
  mine[0] = g;
  mine[1] = gv;
  __syncthreads();
  if (threadIdx.y != 0 || c >= channels) return;
  for (int y = 1; y < kRowsOfFinish; y++) {
    g += shared[2 * (y * 32 + threadIdx.x)];
    gv += shared[2 * (y * 32 + threadIdx.x) + 1];
  }
  const float var = p.var[c] + p.eps;
  if (p.dbias != nullptr) p.dbias[c] = static_cast<float>(g);
  if (p.dweight != nullptr) p.dweight[c] = static_cast<float>(gv) / sqrtf(var);
  if (p.factor != nullptr) p.factor[c] = static_cast<float>(-gv * p.scale[c] / (static_cast<double>(p.s.rows) * var));
}

// --- elementwise passes -----------------------------------------------------------------------------------------------

template <class S, int V, By BY>
__global__ void normalize_kernel(Normalize p, int lanes) {
  const S *x = static_cast<const S*>(p.x), *residual = static_cast<const S*>(p.residual);
  const int64_t channels = p.s.groups * p.s.channels;
  for_segments(p.s.rows, lanes, [&](int64_t row, bool active) {
    float squares = 0;
    if (active) {
      const float of_row = BY == By::row ? 1.f / p.n[row] : 1.f;
      for_packs<V>(channels, lanes, [&](int64_t c) {
        const int64_t at = row * channels + c;
        const Pack<S, V> from = read<V>(x + at);
        Pack<S, V> beside = from, z, slope;
        if (residual != nullptr) beside = read<V>(residual + at);
#pragma unroll
        for (int i = 0; i < V; i++) {
          const float r = BY == By::group ? reciprocal_of<BY>(p.n, row, c + i, p.s) : of_row;
          const float a = load(from.of[i]), scale = p.scale[c + i];
          float out = value_of(a, r, BY) * scale + p.shift[c + i];
          if (residual != nullptr) out += load(beside.of[i]);
          slope.of[i] = store<S>(p.relu && out <= 0.f ? 0.f : (BY == By::none ? scale : absolute(a) * r * scale));
          if (p.relu && out < 0.f) out = 0.f;  // NaN stays NaN
          z.of[i] = store<S>(out);
          squares += load(z.of[i]) * load(z.of[i]);
        }
        write(static_cast<S*>(p.z) + at, z);
        if (p.slope != nullptr) write(static_cast<S*>(p.slope) + at, slope);
      });
    }
    if (p.squares == nullptr) return;
    squares = team_sum(squares, lanes);
    if (active && leads(lanes)) p.squares[row] = squares;
  });
}

// EACH: a channel a group, with segments of whole rows and norms per channel.
template <class S, int V, bool WITH_NORM, bool EACH>
__global__ void normalize_backward_kernel(NormalizeBackward p, int lanes) {
  const S *dz = static_cast<const S*>(p.dz), *x = static_cast<const S*>(p.x), *z = static_cast<const S*>(p.z);
  S *dx = static_cast<S*>(p.dx), *dresidual = static_cast<S*>(p.dresidual);
  for_segments(p.s.rows * p.s.groups, lanes, [&](int64_t segment, bool active) {
    const int64_t base = segment * p.s.channels, first = p.s.groups == 1 ? 0 : segment % p.s.groups * p.s.channels;
    const float* n = WITH_NORM ? p.n + (EACH ? base : segment) : nullptr;
    const float of_segment = WITH_NORM && active ? *n : 1.f;
    float sum = 0;
    if (active) {
      for_packs<V>(p.s.channels, lanes, [&](int64_t c) {
        const Pack<S, V> gradient = read<V>(dz + base + c), from = read<V>(x + base + c);
        Pack<S, V> of_z = gradient, out, masked;
        if (z != nullptr) of_z = read<V>(z + base + c);
#pragma unroll
        for (int i = 0; i < V; i++) {
          const float norm = EACH ? n[c + i] : of_segment, r = WITH_NORM ? 1.f / norm : 1.f;
          const float a = load(from.of[i]), v = WITH_NORM ? output_b2(a, r) : a, scale = p.scale[first + c + i];
          float g = load(gradient.of[i]);
          if (p.relu) {
            const bool open = z != nullptr ? !(load(of_z.of[i]) <= 0.f) : is_open<S>(v * scale + p.shift[first + c + i]);
            g = open ? g : 0.f;
          }
          masked.of[i] = store<S>(g);
          float dv = g * scale;
          if (p.factor != nullptr) dv += p.factor[first + c + i] * (v - p.mean[first + c + i]);
          if (WITH_NORM) {
            const Gradients<float> t = gradients_b2_from_a(dv, a, r, p.detach);
            dv = t.da;
            sum += t.dn;
            if (EACH && p.q != nullptr) p.q[base + c + i] = t.dn / (norm * norm);
          }
          out.of[i] = store<S>(dv);
        }
        if (dresidual != nullptr) write(dresidual + base + c, masked);
        if (dx != nullptr) write(dx + base + c, out);
      });
    }
    if (!WITH_NORM || EACH || p.q == nullptr) return;
    sum = team_sum(sum, lanes);
    if (active && leads(lanes)) p.q[segment] = sum / (of_segment * of_segment);
  });
}

template <class S, int V>
__global__ void slope_backward_kernel(NormalizeBackward p, int lanes) {
  const S *dz = static_cast<const S*>(p.dz), *slope = static_cast<const S*>(p.slope), *z = static_cast<const S*>(p.z);
  for_segments(p.s.rows, lanes, [&](int64_t row, bool active) {
    if (!active) return;
    for_packs<V>(p.s.channels, lanes, [&](int64_t c) {
      const int64_t at = row * p.s.channels + c;
      Pack<S, V> g = read<V>(dz + at);
      if (p.dx != nullptr) {
        const Pack<S, V> of_slope = read<V>(slope + at);
        Pack<S, V> out;
#pragma unroll
        for (int i = 0; i < V; i++) out.of[i] = store<S>(load(g.of[i]) * load(of_slope.of[i]));
        write(static_cast<S*>(p.dx) + at, out);
      }
      if (p.dresidual != nullptr) {
        if (p.relu) {
          const Pack<S, V> of_z = read<V>(z + at);
#pragma unroll
          for (int i = 0; i < V; i++) g.of[i] = load(of_z.of[i]) <= 0.f ? store<S>(0.f) : g.of[i];
        }
        write(static_cast<S*>(p.dresidual) + at, g);
      }
    });
  });
}

By by_of(const float* n, const Segments& s) { return n == nullptr ? By::none : s.groups == 1 ? By::row : By::group; }

int width_of(int bytes, const Segments& s, std::initializer_list<const void*> pointers) {
  return vector_width(bytes, channels_of(s), pointers);
}

#define BCOS_FOR_BY(by, ...)                                                \
  switch (by) {                                                             \
    case By::none: { constexpr By BY = By::none; __VA_ARGS__; } break;      \
    case By::row: { constexpr By BY = By::row; __VA_ARGS__; } break;        \
    case By::group: { constexpr By BY = By::group; __VA_ARGS__; } break;    \
  }

}  // namespace

// By 16-byte packs, whatever the pointers allow later: the number has to be known before there are any.
int64_t reduction_splits(Type type, Segments s) { return splits_of(s, type == Type::float32 ? 4 : 8); }

void factors(const Factors& p, Stream stream) {
  const int blocks = static_cast<int>((p.channels + kThreads - 1) / kThreads);
  BCOS_LAUNCH(factors_kernel, blocks, kThreads, stream, p);
}

void moments(Type type, const Moments& p, Stream stream) {
  const int64_t splits = reduction_splits(type, p.s);
  BCOS_FOR_TYPE(type, width_of(sizeof(S), p.s, {p.x}), {
    const dim3 block = block_of(channels_of(p.s), V);
    BCOS_FOR_BY(by_of(p.n, p.s), {
      BCOS_LAUNCH((moments_kernel<S, V, BY>), reduction_grid(p.s, splits, block, V), block, stream, p);
    })
  })
  BCOS_LAUNCH(moments_finish_kernel, finish_grid(p.s), dim3(32, kRowsOfFinish), stream, p, splits);
}

void normalize(Type type, const Normalize& p, Stream stream) {
  BCOS_FOR_TYPE(type, width_of(sizeof(S), p.s, {p.z, p.slope, p.x, p.residual}), {
    const Split split = split_of(p.s.rows, channels_of(p.s), V);
    BCOS_FOR_BY(by_of(p.n, p.s), {
      BCOS_LAUNCH((normalize_kernel<S, V, BY>), split.blocks, kThreads, stream, p, split.lanes);
    })
  })
}

void normalize_sums(Type type, const NormalizeSums& p, Stream stream) {
  const int64_t splits = reduction_splits(type, p.s);
  BCOS_FOR_TYPE(type, width_of(sizeof(S), p.s, {p.dz, p.x, p.z}), {
    const dim3 block = block_of(channels_of(p.s), V);
    BCOS_FOR_BY(by_of(p.n, p.s), {
      BCOS_LAUNCH((normalize_sums_kernel<S, V, BY>), reduction_grid(p.s, splits, block, V), block, stream, p);
    })
  })
  BCOS_LAUNCH(normalize_sums_finish_kernel, finish_grid(p.s), dim3(32, kRowsOfFinish), stream, p, splits);
}

void normalize_backward(Type type, const NormalizeBackward& given, Stream stream) {
  NormalizeBackward p = given;
  const bool each = p.n != nullptr && is_each(p.s);
  if (p.slope != nullptr || p.n == nullptr || each) p.s = whole_rows(p.s);
  const int64_t segments = p.s.rows * p.s.groups;
  BCOS_FOR_TYPE(type, vector_width(sizeof(S), p.s.channels, {p.dx, p.dresidual, p.dz, p.x, p.z, p.slope}), {
    const Split split = split_of(segments, p.s.channels, V);
    if (p.slope != nullptr) {
      BCOS_LAUNCH((slope_backward_kernel<S, V>), split.blocks, kThreads, stream, p, split.lanes);
    } else if (p.n == nullptr) {
      BCOS_LAUNCH((normalize_backward_kernel<S, V, false, false>), split.blocks, kThreads, stream, p, split.lanes);
    } else if (each) {
      BCOS_LAUNCH((normalize_backward_kernel<S, V, true, true>), split.blocks, kThreads, stream, p, split.lanes);
    } else {
      BCOS_LAUNCH((normalize_backward_kernel<S, V, true, false>), split.blocks, kThreads, stream, p, split.lanes);
    }
  })
}

}  // namespace bcos::cuda
