// The scaling of the B-cos transform and its gradient, alone or with a GELU behind it.
//
// Math     y = a |a|/n (B = 2), a (|a|/n + 1e-6)^(B-1) (else), a = max over the units of an output;
//          dL/da, q = (dL/dn)/|p| per window and dL/dB from dy and y (B = 2) or a: math.h has the scalar formulas.
// Grid     teams of lanes (teams.h) over segments. With a channel a group a team takes a whole row instead, and norms are
//          read per channel.
// Numerics float32; 16-bit types are rounded once. Sums over channels are shuffles in a fixed order, dL/dB one partial sum a
//          block: a run repeats bit for bit.
// Width    16 bytes a lane, of a general B one element: its powers should be what such a pass takes long for (not measured),
//          and 8 of them in a row made nvcc take half as long again.
// Traffic  forward reads a, writes y; backward reads dy and y or a, writes da. GELU: the same, instead of a pass of its own.
#include "teams.h"

namespace bcos::cuda {
namespace {

template <bool GENERAL>
__device__ inline float output_of(float a, float reciprocal, Mode mode, float exponent) {
  if (GENERAL) return output_general(a, reciprocal, exponent);
  return mode == Mode::one ? a : output_b2(a, reciprocal);
}

template <bool GENERAL>
__device__ inline Gradients<float> gradients_of(
    float g, float v, float reciprocal, Mode mode, float exponent, bool from_a, bool detach) {
  if (GENERAL) return gradients_general(g, v, reciprocal, exponent, detach);
  if (mode == Mode::one) return {g, 0.f, 0.f};
  return from_a ? gradients_b2_from_a(g, v, reciprocal, detach) : gradients_b2_from_y(g, v, reciprocal, detach);
}

__device__ inline float exponent_of(const float* b, float exponent) { return b == nullptr ? exponent : *b - 1.f; }

// (dL/dn)/|p| from the sum of n dL/dn
__device__ inline float through_norm(float sum, float n, bool linear) {
  if (!linear) return sum / (n * n);
  const float norm = n - static_cast<float>(kLinearNormEps);
  return norm == 0.f ? 0.f : sum / n / norm;
}

template <class S, int V, bool EACH, bool GENERAL>
__global__ void scale_kernel(Scale p, int lanes) {
  const float exponent = exponent_of(p.b, p.exponent);
  const S* a = static_cast<const S*>(p.a);
  S* y = static_cast<S*>(p.y);
  for_segments(p.s.rows * p.s.groups, lanes, [&](int64_t segment, bool active) {
    if (!active) return;
    const int64_t base = segment * p.s.channels;
    const float* n = p.mode == Mode::one ? nullptr : p.n + (EACH ? base : segment);
    const float reciprocal = n == nullptr ? 1.f : 1.f / *n;
    for_packs<V>(p.s.channels, lanes, [&](int64_t c) {
      Pack<S, V> pack = read<V>(a + base + c);
#pragma unroll
      for (int i = 0; i < V; i++) {
        const float r = EACH && n != nullptr ? 1.f / n[c + i] : reciprocal;
        pack.of[i] = store<S>(output_of<GENERAL>(load(pack.of[i]), r, p.mode, exponent));
      }
      write(y + base + c, pack);
    });
  });
}

// The first of the largest units; a NaN is larger than everything.
template <class S, bool GENERAL>
__global__ void scale_maximum_kernel(Scale p, int lanes) {
  const float exponent = exponent_of(p.b, p.exponent);
  const S* a = static_cast<const S*>(p.a);
  for_segments(p.s.rows * p.s.groups, lanes, [&](int64_t segment, bool active) {
    if (!active) return;
    const float reciprocal = p.mode == Mode::one ? 1.f : 1.f / p.n[segment];
    for_packs<1>(p.s.channels, lanes, [&](int64_t c) {
      const int64_t at = segment * p.s.channels + c;
      const S* units = a + at * p.max_out;
      S best = units[0];
      int64_t index = 0;
      for (int64_t m = 1; m < p.max_out; m++) {
        const float value = load(units[m]), largest = load(best);
        if (value > largest || (value != value && largest == largest)) {
          best = units[m];
          index = m;
        }
      }
      if (p.index != nullptr) p.index[at] = static_cast<uint8_t>(index);
      if (p.kept != nullptr) static_cast<S*>(p.kept)[at] = best;
      static_cast<S*>(p.y)[at] = store<S>(output_of<GENERAL>(load(best), reciprocal, p.mode, exponent));
    });
  });
}

// The sum over a block's threads, at thread 0.
__device__ inline float block_sum(float v) {
  __shared__ float sums[kThreads / 32];
  v = team_sum(v, 32);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0;
  for (int i = 0; i < kThreads / 32; i++) total += sums[i];
  return total;
}

template <class S, int V, bool EACH, bool GENERAL>
__global__ void scale_backward_kernel(ScaleBackward p, int lanes) {
  const float exponent = exponent_of(p.b, p.exponent);
  const S *dy = static_cast<const S*>(p.dy), *source = static_cast<const S*>(p.source);
  S* da = static_cast<S*>(p.da);
  float db = 0;
  for_segments(p.s.rows * p.s.groups, lanes, [&](int64_t segment, bool active) {
    const int64_t base = segment * p.s.channels;
    const float* n = p.mode == Mode::one ? nullptr : p.n + (EACH ? base : segment);
    const float of_segment = n == nullptr || !active ? 1.f : *n, reciprocal = 1.f / of_segment;
    float sum = 0;
    if (active) {
      for_packs<V>(p.s.channels, lanes, [&](int64_t c) {
        const Pack<S, V> g = read<V>(dy + base + c), v = read<V>(source + base + c);
        Pack<S, V> result;
#pragma unroll
        for (int i = 0; i < V; i++) {
          const float r = EACH && n != nullptr ? 1.f / n[c + i] : reciprocal;
          const Gradients<float> t =
              gradients_of<GENERAL>(load(g.of[i]), load(v.of[i]), r, p.mode, exponent, p.from_a, p.detach);
          result.of[i] = store<S>(t.da);
          db += t.db;
          sum += t.dn;
          if (EACH && p.q != nullptr) p.q[base + c + i] = through_norm(t.dn, n[c + i], p.linear_norm);
        }
        write(da + base + c, result);
      });
    }
    if (EACH || p.q == nullptr) return;
    sum = team_sum(sum, lanes);
    if (active && leads(lanes)) p.q[segment] = through_norm(sum, of_segment, p.linear_norm);
  });
  if (p.db == nullptr) return;
  db = block_sum(db);
  if (threadIdx.x == 0) p.db[blockIdx.x] = db;
}

// dL/da goes to the winning unit, 0 to the others.
template <class S, bool GENERAL>
__global__ void scale_backward_maximum_kernel(ScaleBackward p, int lanes) {
  const float exponent = exponent_of(p.b, p.exponent);
  const S *dy = static_cast<const S*>(p.dy), *source = static_cast<const S*>(p.source);
  float db = 0;
  for_segments(p.s.rows * p.s.groups, lanes, [&](int64_t segment, bool active) {
    const float n = p.mode == Mode::one || !active ? 1.f : p.n[segment];
    float sum = 0;
    if (active) {
      for_packs<1>(p.s.channels, lanes, [&](int64_t c) {
        const int64_t at = segment * p.s.channels + c;
        const Gradients<float> t =
            gradients_of<GENERAL>(load(dy[at]), load(source[at]), 1.f / n, p.mode, exponent, p.from_a, p.detach);
        S* units = static_cast<S*>(p.da) + at * p.max_out;
        for (int64_t m = 0; m < p.max_out; m++) units[m] = store<S>(m == p.index[at] ? t.da : 0.f);
        db += t.db;
        sum += t.dn;
      });
    }
    if (p.q == nullptr) return;
    sum = team_sum(sum, lanes);
    if (active && leads(lanes)) p.q[segment] = through_norm(sum, n, p.linear_norm);
  });
  if (p.db == nullptr) return;
  db = block_sum(db);
  if (threadIdx.x == 0) p.db[blockIdx.x] = db;
}

template <class S, int V>
__global__ void scale_gelu_kernel(ScaleGelu p, int lanes) {
  const S* a = static_cast<const S*>(p.a);
  S* h = static_cast<S*>(p.h);
  for_segments(p.s.rows, lanes, [&](int64_t row, bool active) {
    float squares = 0;
    if (active) {
      const float reciprocal = 1.f / p.n[row];
      for_packs<V>(p.s.channels, lanes, [&](int64_t c) {
        Pack<S, V> pack = read<V>(a + row * p.s.channels + c);
#pragma unroll
        for (int i = 0; i < V; i++) {
          const float y = output_b2(load(pack.of[i]), reciprocal);
          pack.of[i] = store<S>(y * normal(y).cdf);
          squares += load(pack.of[i]) * load(pack.of[i]);
        }
        write(h + row * p.s.channels + c, pack);
      });
    }
    if (p.squares == nullptr) return;
    squares = team_sum(squares, lanes);
    if (active && leads(lanes)) p.squares[row] = squares;
  });
}

template <class S, int V>
__global__ void scale_gelu_backward_kernel(ScaleGeluBackward p, int lanes) {
  const S *dh = static_cast<const S*>(p.dh), *a = static_cast<const S*>(p.a);
  S* da = static_cast<S*>(p.da);
  for_segments(p.s.rows, lanes, [&](int64_t row, bool active) {
    const float n = active ? p.n[row] : 1.f, reciprocal = 1.f / n;
    float sum = 0;
    if (active) {
      for_packs<V>(p.s.channels, lanes, [&](int64_t c) {
        const int64_t at = row * p.s.channels + c;
        const Pack<S, V> g = read<V>(dh + at), v = read<V>(a + at);
        Pack<S, V> result;
#pragma unroll
        for (int i = 0; i < V; i++) {
          const float y = output_b2(load(v.of[i]), reciprocal);
          const Normal<float> gate = normal(y);
          const float dy = load(g.of[i]) * (p.detach ? gate.cdf : gate.cdf + y * gate.density);
          const Gradients<float> t = gradients_b2_from_a(dy, load(v.of[i]), reciprocal, p.detach);
          result.of[i] = store<S>(t.da);
          sum += t.dn;
        }
        write(da + at, result);
      });
    }
    if (p.q == nullptr) return;
    sum = team_sum(sum, lanes);
    if (active && leads(lanes)) p.q[row] = through_norm(sum, n, true);
  });
}

bool is_narrow(Mode mode, int64_t max_out) { return max_out > 1 || mode == Mode::general; }
int width_of(const Scale& p, int bytes) {
  return is_narrow(p.mode, p.max_out) ? 1 : vector_width(bytes, p.s.channels, {p.y, p.a});
}
int width_of(const ScaleBackward& p, int bytes) {
  return is_narrow(p.mode, p.max_out) ? 1 : vector_width(bytes, p.s.channels, {p.da, p.dy, p.source});
}

// A channel a group as whole rows.
template <class P>
bool make_each(P* p) {
  const bool each = is_each(p->s) && p->max_out == 1;
  if (each) p->s = whole_rows(p->s);
  return each;
}

Split split_of(const Segments& s, int width) { return cuda::split_of(s.rows * s.groups, s.channels, width); }

}  // namespace

void scale(Type type, const Scale& given, Stream stream) {
  Scale p = given;
  const bool each = make_each(&p);
  BCOS_FOR_TYPE(type, width_of(p, sizeof(S)), {
    const Split split = split_of(p.s, V);
    if (p.max_out > 1 && p.mode == Mode::general) {
      BCOS_LAUNCH((scale_maximum_kernel<S, true>), split.blocks, kThreads, stream, p, split.lanes);
    } else if (p.max_out > 1) {
      BCOS_LAUNCH((scale_maximum_kernel<S, false>), split.blocks, kThreads, stream, p, split.lanes);
    } else if (p.mode == Mode::general && each) {
      BCOS_LAUNCH((scale_kernel<S, 1, true, true>), split.blocks, kThreads, stream, p, split.lanes);
    } else if (p.mode == Mode::general) {
      BCOS_LAUNCH((scale_kernel<S, 1, false, true>), split.blocks, kThreads, stream, p, split.lanes);
    } else if (each) {
      BCOS_LAUNCH((scale_kernel<S, V, true, false>), split.blocks, kThreads, stream, p, split.lanes);
    } else {
      BCOS_LAUNCH((scale_kernel<S, V, false, false>), split.blocks, kThreads, stream, p, split.lanes);
    }
  })
}

int64_t scale_backward_blocks(Type type, const ScaleBackward& given) {
  ScaleBackward p = given;
  make_each(&p);
  BCOS_FOR_TYPE(type, width_of(p, sizeof(S)), { return split_of(p.s, V).blocks; })
  return 0;
}

void scale_backward(Type type, const ScaleBackward& given, Stream stream) {
  ScaleBackward p = given;
  const bool each = make_each(&p);
  BCOS_FOR_TYPE(type, width_of(p, sizeof(S)), {
    const Split split = split_of(p.s, V);
    if (p.max_out > 1 && p.mode == Mode::general) {
      BCOS_LAUNCH((scale_backward_maximum_kernel<S, true>), split.blocks, kThreads, stream, p, split.lanes);
    } else if (p.max_out > 1) {
      BCOS_LAUNCH((scale_backward_maximum_kernel<S, false>), split.blocks, kThreads, stream, p, split.lanes);
    } else if (p.mode == Mode::general && each) {
      BCOS_LAUNCH((scale_backward_kernel<S, 1, true, true>), split.blocks, kThreads, stream, p, split.lanes);
    } else if (p.mode == Mode::general) {
      BCOS_LAUNCH((scale_backward_kernel<S, 1, false, true>), split.blocks, kThreads, stream, p, split.lanes);
    } else if (each) {
      BCOS_LAUNCH((scale_backward_kernel<S, V, true, false>), split.blocks, kThreads, stream, p, split.lanes);
    } else {
      BCOS_LAUNCH((scale_backward_kernel<S, V, false, false>), split.blocks, kThreads, stream, p, split.lanes);
    }
  })
}

void scale_gelu(Type type, const ScaleGelu& p, Stream stream) {
  BCOS_FOR_TYPE(type, vector_width(sizeof(S), p.s.channels, {p.h, p.a}), {
    const Split split = split_of(p.s, V);
    BCOS_LAUNCH((scale_gelu_kernel<S, V>), split.blocks, kThreads, stream, p, split.lanes);
  })
}

void scale_gelu_backward(Type type, const ScaleGeluBackward& p, Stream stream) {
  BCOS_FOR_TYPE(type, vector_width(sizeof(S), p.s.channels, {p.da, p.dh, p.a}), {
    const Split split = split_of(p.s, V);
    BCOS_LAUNCH((scale_gelu_backward_kernel<S, V>), split.blocks, kThreads, stream, p, split.lanes);
  })
}

}  // namespace bcos::cuda
