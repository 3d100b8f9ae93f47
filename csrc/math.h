// The scalar mathematics of the B-cos transform, forward and derivative: one definition for the CPU and the CUDA kernels.
//
//   B = 1:  y = a
//   B = 2:  y = a |a| / n
//   else:   y = a c^(B-1),  c = |a| / n + 1e-6
//
// T is float or double: everything is computed in the statistics type, whatever the tensors' type is.
// Source: B-cos networks (arXiv:2306.10898); the epsilons are those of the package bcos 0.1.3.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define BCOS_HOST_DEVICE __host__ __device__
#else
#define BCOS_HOST_DEVICE
#endif

namespace bcos {

constexpr double kConvNormEps = 1e-6;     // under the root
constexpr double kLinearNormEps = 1e-12;  // added to the norm
constexpr double kCosineEps = 1e-6;       // added to |cos|, general B only

// BCOS_ISA is a namespace of its own for each instruction set: of an inline function that several objects
// carry the linker keeps one copy, which has to run everywhere.
#if defined(BCOS_ISA)
namespace BCOS_ISA {
#endif

template <class T>
BCOS_HOST_DEVICE inline T absolute(T v) {
  return v < T(0) ? -v : v;  // NaN stays NaN, -0 stays -0: both are harmless in a product
}

// log2 of a positive, normal float as whole + fraction, |fraction| <= 1/2, |error| about 1e-7 of the fraction.
struct Logarithm {
  float whole, fraction;
};
BCOS_HOST_DEVICE inline Logarithm logarithm_of_two(float c) {
  int32_t bits;
  std::memcpy(&bits, &c, 4);
  // mantissa in [sqrt(1/2), sqrt(2))
  const int32_t shifted = bits - 0x3f3504f3;
  const int32_t exponent = shifted >> 23;
  const int32_t mantissa_bits = bits - (exponent << 23);
  float m;
  std::memcpy(&m, &mantissa_bits, 4);
  const float s = (m - 1.f) / (m + 1.f), z = s * s;
  float p = 2.f / 11.f;
  p = p * z + 2.f / 9.f;
  p = p * z + 2.f / 7.f;
  p = p * z + 2.f / 5.f;
  p = p * z + 2.f / 3.f;
  p = p * z + 2.f;
  return {static_cast<float>(exponent), p * s * 1.442695040888963f};
}

// 2^(whole + part) for float, relative error about 1e-7 where the difference of whole and its nearest integer, and
// part, are known that well; branch-free, so that loops over it vectorise.
BCOS_HOST_DEVICE inline float power_of_two(float whole, float part) {
  float rounded = std::floor(whole + part + 0.5f);
  rounded = rounded < -250.f ? -250.f : (rounded > 250.f ? 250.f : rounded);
  float t = (whole - rounded) + part;
  t = (t < -1.f ? -1.f : (t > 1.f ? 1.f : t)) * 0.693147180559945f;  // beyond 1 only where the result is 0 or infinite
  float p = 1.f / 5040.f;
  p = p * t + 1.f / 720.f;
  p = p * t + 1.f / 120.f;
  p = p * t + 1.f / 24.f;
  p = p * t + 1.f / 6.f;
  p = p * t + 0.5f;
  p = p * t + 1.f;
  p = p * t + 1.f;
  // two factors, so that exponents beyond a float's range overflow and underflow gracefully
  const int32_t n = static_cast<int32_t>(rounded), half = n / 2;
  const int32_t first_bits = (half + 127) << 23, second_bits = (n - half + 127) << 23;
  float first, second;
  std::memcpy(&first, &first_bits, 4);
  std::memcpy(&second, &second_bits, 4);
  return p * first * second;
}

// c^exponent for c >= 1e-6, relative error about (1 + exponent) 1e-7; NaN stays NaN.
BCOS_HOST_DEVICE inline float cosine_power(float c, float exponent) {
  // exponent * log2 c in two parts, as its rounding would be the error of the power (5e-7 at c = 1e-6, B = 3): the
  // exponent's upper 16 bits times a whole number below 2^8 are exact
  int32_t bits;
  std::memcpy(&bits, &exponent, 4);
  bits &= static_cast<int32_t>(0xffffff00u);
  float upper;
  std::memcpy(&upper, &bits, 4);
  const Logarithm l = logarithm_of_two(c);
  const float result = power_of_two(upper * l.whole, (exponent - upper) * l.whole + exponent * l.fraction);
  return c <= 3.402823466e38f || exponent == 0.f ? result : c;
}
BCOS_HOST_DEVICE inline double cosine_power(double c, double exponent) { return std::pow(c, exponent); }
BCOS_HOST_DEVICE inline float natural_logarithm(float c) {
  const Logarithm l = logarithm_of_two(c);
  return c <= 3.402823466e38f ? (l.whole + l.fraction) * 0.693147180559945f : c;
}
BCOS_HOST_DEVICE inline double natural_logarithm(double c) { return std::log(c); }

// Distribution and density of the standard normal at x: GELU(x) = x cdf, its derivative cdf + x density. In float the
// tail is Abramowitz and Stegun's 7.1.26 (absolute error 1e-7, without cancellation on either side); branch-free.
template <class T>
struct Normal {
  T cdf, density;
};
BCOS_HOST_DEVICE inline Normal<float> normal(float x) {
  const float z = absolute(x) * 0.7071067811865475f, t = 1.f / (1.f + 0.3275911f * z);
  const float e = power_of_two(0.f, z * z * -1.442695040888963f);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = 0.5f * (p * t) * e;
  return {x < 0.f ? tail : 1.f - tail, e * 0.3989422804014327f};
}
BCOS_HOST_DEVICE inline Normal<double> normal(double x) {
  return {0.5 * std::erfc(-x * 0.7071067811865475244), std::exp(-0.5 * x * x) * 0.3989422804014326779};
}

// y from a and 1/n.
template <class T>
BCOS_HOST_DEVICE inline T output_b2(T a, T reciprocal_norm) {
  return a * (absolute(a) * reciprocal_norm);
}
template <class T>
BCOS_HOST_DEVICE inline T output_general(T a, T reciprocal_norm, T exponent) {
  return a * cosine_power(absolute(a) * reciprocal_norm + T(kCosineEps), exponent);
}

// What an element contributes to the gradients: da = dL/da, dn = its term of n * dL/dn, db = its term of dL/dB.
template <class T>
struct Gradients {
  T da, dn, db;
};

// B = 2: dL/da = 2 g |a|/n, n dL/dn = -g y. From y: |a|/n = sqrt(|y|/n).
template <class T>
BCOS_HOST_DEVICE inline Gradients<T> gradients_b2_from_y(T g, T y, T reciprocal_norm, bool detach) {
  const T ratio = std::sqrt(absolute(y) * reciprocal_norm);
  return {(detach ? T(1) : T(2)) * g * ratio, -g * y, T(0)};
}
template <class T>
BCOS_HOST_DEVICE inline Gradients<T> gradients_b2_from_a(T g, T a, T reciprocal_norm, bool detach) {
  const T ratio = absolute(a) * reciprocal_norm;
  return {(detach ? T(1) : T(2)) * g * ratio, -g * a * ratio, T(0)};
}

// General B: dL/da = g (c^(B-1) + (B-1) c^(B-2) |a|/n), n dL/dn = -g a (B-1) c^(B-2) |a|/n, dL/dB = g y log c.
template <class T>
BCOS_HOST_DEVICE inline Gradients<T> gradients_general(T g, T a, T reciprocal_norm, T exponent, bool detach) {
  const T ratio = absolute(a) * reciprocal_norm;
  const T c = ratio + T(kCosineEps);
  const T scale = cosine_power(c, exponent);
  if (detach) return {g * scale, T(0), T(0)};
  const T slope = exponent * (scale / c) * ratio;
  return {g * (scale + slope), -g * a * slope, g * a * scale * natural_logarithm(c)};
}

#if defined(BCOS_ISA)
}  // namespace BCOS_ISA
using namespace BCOS_ISA;
#endif

}  // namespace bcos
