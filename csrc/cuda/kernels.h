// The CUDA kernels' interface: plain pointers, sizes and a stream, no torch. The launch functions check nothing (ops.cpp
// does) and wait for nothing; an error of a launch is left for the caller to ask for.
//
// Activations lie in rows, channels innermost (channels_last convolutions, linear layers): element (row, group, channel),
// a row being a pixel of an image or a row of a matrix. What there is per window (norms n, q) lies (row, group). A
// segment is the channels of one group in one row: they are contiguous, and there are rows * groups of them.
//
// Statistics (norms, sums, everything per channel) are float32 whatever the activations are.
#pragma once

#include <cstdint>

namespace bcos::cuda {

using Stream = void*;  // cudaStream_t

enum class Type { float32, bfloat16, float16 };
enum class Mode { one, two, general };  // B = 1, B = 2, any other B

struct Segments {
  int64_t rows, groups, channels;  // channels of one group
};

struct Window {
  int64_t images, height, width, out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

// --- norm.cu ----------------------------------------------------------------------------------------------------------

enum class Norm { squares, linear, window };  // sum x^2; sqrt of it + 1e-12; sqrt(it + 1e-6)

void segment_norms(Type type, float* out, const void* x, Segments s, Norm norm, Stream stream);
// n of every window from sum_c x^2 per pixel (float32, (image, pixel, group)), or from x itself where it has a channel a
// group.
void window_norms(Type type_of_x, float* n, const float* squares, const void* x, Window w, int64_t groups, Stream stream);
// norms of rows, from their sums of squares
void norms_of_squares(float* n, const float* squares, int64_t count, Norm norm, Stream stream);
// dx += x * (transposed box filter of q), in place
void add_norm_term(Type type, void* dx, const void* x, const float* q, Window w, Segments pixels, Stream stream);
// w_hat = w / |w|, rows of norm 0 stay 0; and from dL/dw_hat to dL/dw
void normalize_weight(Type type, void* w_hat, const void* w, int64_t units, int64_t depth, Stream stream);
void weight_norm_backward(
    Type type, void* dw, const void* dw_hat, const void* w, int64_t units, int64_t depth, Stream stream);

// --- scale.cu ---------------------------------------------------------------------------------------------------------

struct Scale {
  void* y;          // may be a itself where max_out = 1
  void* kept;       // a after the maximum, or null; null where max_out = 1: a is that already
  uint8_t* index;   // winning unit, or null
  const void* a;    // (segments, channels * max_out)
  const float* n;
  const float* b;   // B on the device, or null: then `exponent`
  Segments s;
  int64_t max_out;
  Mode mode;
  float exponent;  // B - 1
};
void scale(Type type, const Scale& p, Stream stream);

struct ScaleBackward {
  void* da;              // (segments, channels * max_out)
  float* q;              // (dL/dn)/|p| per window, or null
  float* db;             // partial sums of dL/dB, one a block, or null
  const void* dy;
  const void* source;    // y, or a where from_a
  const uint8_t* index;  // or null where max_out = 1
  const float* n;
  const float* b;
  Segments s;
  int64_t max_out;
  Mode mode;
  float exponent;
  bool from_a, detach, linear_norm;
};
int64_t scale_backward_blocks(Type type, const ScaleBackward& p);  // elements of db
void scale_backward(Type type, const ScaleBackward& p, Stream stream);

// B = 2 with a GELU behind it: h = gelu(y); a is kept as it is and serves the backward
struct ScaleGelu {
  void* h;         // may be a itself where nothing is kept
  float* squares;  // sum of h^2 per row, or null
  const void* a;
  const float* n;
  Segments s;
};
void scale_gelu(Type type, const ScaleGelu& p, Stream stream);
struct ScaleGeluBackward {
  void* da;
  float* q;
  const void *dh, *a;
  const float* n;
  Segments s;
  bool detach;
};
void scale_gelu_backward(Type type, const ScaleGeluBackward& p, Stream stream);

// --- batch_norm.cu ----------------------------------------------------------------------------------------------------
//
// v is what is normalised: x, or where n is not null the output y = a |a|/n of a B-cos layer (B = 2) with pre-scale
// output x. Then y is never stored: the passes below make of a convolution and the normalisation behind it what a plain
// network makes, no pass more.

// Splits of the rows whose sums the reductions write and their second kernels add, in order: the first dimension of
// their scratch.
int64_t reduction_splits(Type type, Segments s);

// Per channel: scale = weight / sqrt(var + eps), shift = bias. weight and bias may be null (1 and 0).
struct Factors {
  float *scale, *shift;
  const float *weight, *bias, *var;
  float eps;
  int64_t channels;
};
void factors(const Factors& p, Stream stream);

struct Moments {
  float *mean, *var;
  float* partial;  // (splits, 2, C) scratch
  Factors f;       // made of the variance; f.var is not read
  const void* x;
  const float* n;  // or null
  Segments s;
};
void moments(Type type, const Moments& p, Stream stream);

struct Normalize {
  void* z;               // act(v scale + shift + residual); may be x itself
  void* slope;           // dz/dx with all scales constant, 0 where the ReLU is closed, or null; may be x itself
  float* squares;        // sum_c z^2 per row, or null
  const void* x;
  const float* n;        // or null
  const void* residual;  // or null
  const float *scale, *shift;
  Segments s;
  bool relu;
};
void normalize(Type type, const Normalize& p, Stream stream);

// g = dL/dz where the ReLU is open: where z > 0, z being stored, or computed again from v (z null).
// dL/dv = g scale + factor (v - mean), factor = -sum(g v) scale / (rows (var + eps))
struct NormalizeSums {
  float *dweight, *dbias, *factor;  // (C); may be null
  float* partial;                   // (splits, 2, C) scratch
  const void *dz, *x, *z;
  const float* n;
  const float *scale, *shift, *var;
  float eps;
  Segments s;
  bool relu;
};
void normalize_sums(Type type, const NormalizeSums& p, Stream stream);

struct NormalizeBackward {
  void* dx;          // dL/dx, or null; may be dz itself
  float* q;          // (dL/dn)/|p| per window, or null
  void* dresidual;   // g, or null
  const void *dz, *x, *z;
  const void* slope;  // dL/dx = dz slope: x and what is per channel are not read; or null
  const float* n;
  const float *scale, *shift, *factor, *mean;  // factor null: nothing flows through the variance
  Segments s;
  bool relu, detach;
};
void normalize_backward(Type type, const NormalizeBackward& p, Stream stream);

// --- layer_norm.cu ----------------------------------------------------------------------------------------------------

struct LayerNorm {
  void* y;
  float *mean, *rstd;
  float* squares;  // sum of y^2 per row, or null
  const void* x;
  const float *weight, *bias;  // or null
  int64_t rows, columns;
  float eps;
};
void layer_norm(Type type, const LayerNorm& p, Stream stream);

struct LayerNormBackward {
  void* dx;                 // or null
  float *dweight, *dbias;   // or null
  float* partial;           // (reduction_splits, 2, columns) scratch, null where neither is needed
  const void *dy, *x;
  const float *weight, *mean, *rstd;  // weight may be null
  int64_t rows, columns;
  bool detach;
};
void layer_norm_backward(Type type, const LayerNormBackward& p, Stream stream);

}  // namespace bcos::cuda
