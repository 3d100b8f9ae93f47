// The CPU kernels' interface: plain pointers and sizes, no torch. Each *_kernels.cpp is compiled once per instruction set
// (BCOS_ISA) and fills its part of a table; kernels(type) picks the table of the machine.
//
// Activations come in one of two dense layouts, described by Layout:
//   rows    channels innermost (channels_last convolutions, linear layers): element (image, pixel, channel)
//   planes  pixels innermost (contiguous convolutions):                     element (image, channel, pixel)
// Norms n and everything per window lie likewise, with the groups in the channels' place: (image, pixel, group) or (image,
// group, pixel). Work is split by the caller: a kernel does items [begin, end) of what its comment names.
#pragma once

#include <cstdint>

namespace bcos::cpu {

enum class Type { float32, float64, bfloat16, float16 };
enum class Mode { one, two, general };  // B = 1, B = 2, any other B

// Sizes of an activation seen by a kernel: rows or planes, see above.
struct Layout {
  int64_t images, pixels, channels, groups;
  bool rows;
};

struct Window {
  int64_t height, width;          // of the input map
  int64_t out_height, out_width;  // of the windows
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

struct ScaleArguments {
  void* y;          // (layout), may be a itself where max_out = 1
  const void* a;    // (layout, channels * max_out units)
  void* kept;       // a after the maximum, or null
  uint8_t* index;   // winning unit, or null
  const void* n;    // norms, statistics type; unused where mode = one
  Layout layout;
  int64_t max_out;
  Mode mode;
  double exponent;  // B - 1
};

struct ScaleBackwardArguments {
  void* da;              // (layout, channels * max_out units)
  void* q;               // (dL/dn)/|p| per window, or null where nothing flows through the norm
  void* db;              // dL/dB, one partial sum per item, or null
  const void* dy;        // (layout)
  const void* source;    // y, or a where from_a
  const uint8_t* index;  // winning unit, or null where max_out = 1
  const void* n;
  Layout layout;
  int64_t max_out;
  Mode mode;
  double exponent;
  bool from_a, detach, linear_norm;  // linear_norm: n = |p| + 1e-12 instead of sqrt(p^2 + 1e-6)
};

struct BatchNormArguments {
  const void* x;
  void* y;
  const void* residual;  // or null
  const void* scale;     // (C) statistics type: weight / sqrt(var + eps)
  const void* shift;     // (C) or null
  void* squares;         // rows only: sum_c y^2 of every row, statistics type, or null
  Layout layout;
  bool relu;
};

struct BatchNormBackwardArguments {
  const void* dy;
  const void* x;
  const void* y;       // for the ReLU mask, or null
  void* dresidual;     // the masked gradient, or null
  double* sums;        // reduce: (chunks, 2, C): sum g, sum g x
  void* dx;            // apply
  const void* scale;   // (C): weight / sqrt(var + eps)
  const void* factor;  // (C) of (x - mean), or null
  const void* mean;    // (C), or null
  const void* mask_scale;  // (C): with mask_shift, the ReLU's mask from x instead of y; or null
  const void* mask_shift;
  Layout layout;
};

// The B-cos scaling for B = 2 with a batch normalisation of known statistics behind it.
struct ScaleNormArguments {
  void* z;               // (rows), may be a itself
  const void* a;         // (rows)
  void* kept;            // y where `keeps` is output, dz/da as it is with all scales constant where it is slope
  const void* n;         // norms
  const void* residual;  // or null
  const void* scale;     // (C)
  const void* shift;     // (C)
  void* squares;         // sum_c z^2 of every row, or null
  Layout layout;
  enum class Keeps { nothing, output, slope } keeps;
  bool relu;
};

// From dL/dz to dL/da of the convolution, and q = (dL/dn)/|p| per window: the second pass of the normalisation's
// backward and the scaling's in one.
struct ScaleNormBackwardArguments {
  void* da;
  void* q;                                // or null
  void* dresidual;                        // with slope: the gradient behind the ReLU, or null
  const void *dz, *y, *slope, *z, *n;     // y, or slope; z: for the ReLU's mask, or null
  const void *scale, *factor, *mean;      // (C), as in BatchNormBackwardArguments
  const void *mask_scale, *mask_shift;    // (C): the mask from y, or null
  Layout layout;
  bool detach;
};

// The B-cos scaling for B = 2 with a GELU behind it; backward as ScaleNormBackwardArguments.
struct ScaleGeluArguments {
  void* h;          // (rows), may be a itself
  const void* a;    // (rows)
  void* y;          // what is kept: a itself or other memory than h's, or null
  const void* n;    // one a row
  void* squares;    // sum of h^2 of every row, or null
  int64_t columns;
};
struct ScaleGeluBackwardArguments {
  void* da;
  void* q;  // or null
  const void *dh, *y, *n;
  int64_t columns;
  bool detach;
};

// Layer normalisation; scale and shift (columns), mean, rstd and squares one a row, all in the statistics type.
struct LayerNormArguments {
  const void* x;
  void *y, *mean, *rstd;
  const void *scale, *shift;
  void* squares;  // sum of y^2 of every row, or null
  int64_t columns;
  double eps;
};
struct LayerNormBackwardArguments {
  void* dx;       // or null
  double* sums;   // (chunks, 2, columns): dw, db; or null
  void* scratch;  // (chunks, 2, columns), statistics type, beside the sums
  const void *dy, *x, *scale, *mean, *rstd;
  int64_t columns;
  bool detach;
};

struct Kernels {
  // norms; items are rows, (image, pixel) pairs or (image, group) planes
  // linear: |x| + 1e-12, else (a window of one pixel) sqrt(|x|^2 + 1e-6)
  void (*norm_rows)(const void* x, void* n, int64_t columns, bool linear, int64_t begin, int64_t end);
  // the same from the rows' sums of squares
  void (*norms_of_squares)(const void* squares, void* n, bool linear, int64_t begin, int64_t end);
  void (*sum_squares_rows)(const void* x, void* map, Layout layout, int64_t begin, int64_t end);
  void (*sum_squares_planes)(const void* x, void* map, Layout layout, int64_t begin, int64_t end);
  void (*window_norm)(const void* map, void* n, void* scratch, const Window& window, int64_t begin, int64_t end);
  void (*window_spread)(const void* q, void* map, void* scratch, const Window& window, int64_t begin, int64_t end);
  // with several groups, rows; items are rows (image, p) of windows and (image, h) of pixels
  void (*window_norm_rows)(
      const void* map_or_x, bool of_x, void* n, void* scratch, const Window& window, int64_t groups, int64_t begin,
      int64_t end);
  void (*window_spread_rows)(
      const void* q, void* dx, const void* x, void* scratch, const Window& window, Layout layout, int64_t begin,
      int64_t end);
  void (*add_norm_term_rows)(
      void* out, const void* dx, const void* x, const void* map, Layout layout, int64_t begin, int64_t end);
  void (*add_norm_term_planes)(
      void* out, const void* dx, const void* x, const void* map, Layout layout, int64_t begin, int64_t end);
  // weight normalisation; items are output units
  void (*normalize_weight)(const void* w, void* w_hat, int64_t columns, int64_t begin, int64_t end);
  void (*weight_norm_backward)(
      const void* dw_hat, const void* w, void* dw, int64_t columns, int64_t begin, int64_t end);
  // the scaling; items are (image, pixel) pairs, or blocks of `kBlock` pixels of (image, group) planes
  void (*scale_rows)(const ScaleArguments&, int64_t begin, int64_t end);
  void (*scale_planes)(const ScaleArguments&, int64_t begin, int64_t end);
  void (*scale_backward_rows)(const ScaleBackwardArguments&, int64_t begin, int64_t end);
  void (*scale_backward_planes)(const ScaleBackwardArguments&, int64_t begin, int64_t end);
  // batch normalisation; items are rows for *_rows, channels for the reductions of *_planes, (image, channel) else
  // moments_rows adds to sums (2, C): of x - origin and of its square
  void (*moments_rows)(const void* x, const void* origin, double* sums, Layout layout, int64_t begin, int64_t end);
  void (*moments_planes)(const void* x, void* mean, void* var, Layout layout, int64_t begin, int64_t end);
  void (*batch_norm_rows)(const BatchNormArguments&, int64_t begin, int64_t end);
  void (*batch_norm_planes)(const BatchNormArguments&, int64_t begin, int64_t end);
  void (*batch_norm_reduce_rows)(const BatchNormBackwardArguments&, int64_t chunk, int64_t begin, int64_t end);
  void (*batch_norm_reduce_planes)(const BatchNormBackwardArguments&, int64_t begin, int64_t end);
  void (*batch_norm_backward_rows)(const BatchNormBackwardArguments&, int64_t begin, int64_t end);
  void (*batch_norm_backward_planes)(const BatchNormBackwardArguments&, int64_t begin, int64_t end);
  // scaling and GELU together; items are rows
  void (*scale_gelu_rows)(const ScaleGeluArguments&, int64_t begin, int64_t end);
  void (*scale_gelu_backward_rows)(const ScaleGeluBackwardArguments&, int64_t begin, int64_t end);
  void (*gelu_rows)(const void* y, void* h, int64_t columns, int64_t begin, int64_t end);
  // layer normalisation; items are rows
  void (*layer_norm_rows)(const LayerNormArguments&, int64_t begin, int64_t end);
  void (*layer_norm_backward_rows)(const LayerNormBackwardArguments&, int64_t chunk, int64_t begin, int64_t end);
  // scaling and batch normalisation together; items are (image, pixel) pairs
  void (*scale_norm_rows)(const ScaleNormArguments&, int64_t begin, int64_t end);
  void (*scale_norm_backward_rows)(const ScaleNormBackwardArguments&, int64_t begin, int64_t end);
};

constexpr int64_t kBlock = 512;  // pixels of a plane that a kernel's local buffers hold

namespace baseline {
void register_scale(Kernels*, Type);
void register_norm(Kernels*, Type);
void register_batch_norm(Kernels*, Type);
void register_scale_norm(Kernels*, Type);
void register_scale_gelu(Kernels*, Type);
void register_layer_norm(Kernels*, Type);
}  // namespace baseline
#if defined(BCOS_HAVE_AVX2)
namespace avx2 {
void register_scale(Kernels*, Type);
void register_norm(Kernels*, Type);
void register_batch_norm(Kernels*, Type);
void register_scale_norm(Kernels*, Type);
void register_scale_gelu(Kernels*, Type);
void register_layer_norm(Kernels*, Type);
}  // namespace avx2
#endif
#if defined(BCOS_HAVE_AVX512)
namespace avx512 {
void register_scale(Kernels*, Type);
void register_norm(Kernels*, Type);
void register_batch_norm(Kernels*, Type);
void register_scale_norm(Kernels*, Type);
void register_scale_gelu(Kernels*, Type);
void register_layer_norm(Kernels*, Type);
}  // namespace avx512
#endif

const Kernels& kernels(Type type);

}  // namespace bcos::cpu
