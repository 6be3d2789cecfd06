// Vectorisation for the CPU kernels: function clones per instruction set, element conversion, exp.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "math/scalar.h"

// The function is compiled once per level of the instruction set and the loader picks one. (Named processors would be
// picked only where they are that very model.) OpenMP regions are outlined before the clones are made, so the parallel
// loop stands outside and calls a cloned function on a row range.
#if !defined(__x86_64__) || !defined(__gnu_linux__) || defined(RLHF_FAST_NO_CLONES)
#define RLHF_CLONES
#elif !defined(__clang__) && __GNUC__ >= 12
#define RLHF_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define RLHF_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#endif
#define RLHF_INLINE inline __attribute__((always_inline))

namespace rlhf {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

RLHF_INLINE float bits_to_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
RLHF_INLINE uint32_t float_to_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

// The type in which an element type is computed.
template <typename T> struct Compute { using type = float; };
template <> struct Compute<double> { using type = double; };

RLHF_INLINE float load(const float& x) { return x; }
RLHF_INLINE double load(const double& x) { return x; }
RLHF_INLINE float load(const bf16& x) { return bits_to_float(uint32_t(x.bits) << 16); }
RLHF_INLINE float load(const f16& x) {
  // Branch-free: normal numbers by exponent shift, subnormals through a float subtraction.
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, body = x.bits & 0x7fffu;
  const uint32_t normal = (body << 13) + (112u << 23);
  const uint32_t special = (body << 13) + (224u << 23);  // inf and NaN
  const float subnormal = bits_to_float((body << 13) + (113u << 23)) - bits_to_float(113u << 23);
  uint32_t magnitude = body >= 0x7c00u ? special : normal;
  magnitude = body < 0x0400u ? float_to_bits(subnormal) : magnitude;
  return bits_to_float(magnitude | sign);
}

RLHF_INLINE void store(float& out, float x) { out = x; }
RLHF_INLINE void store(double& out, double x) { out = x; }
RLHF_INLINE void store(bf16& out, float x) {  // round to nearest even, NaN stays NaN
  const uint32_t u = float_to_bits(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out.bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
RLHF_INLINE void store(f16& out, float x) {  // round to nearest even, 65520 and more become inf
  const uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000u, body = u & 0x7fffffffu;
  const uint32_t normal = (body - (112u << 23) + 0xfffu + ((body >> 13) & 1u)) >> 13;
  // Adding 0.5 rounds a value below 2^-14 to a multiple of 2^-24, which then stands in the last bits.
  const uint32_t subnormal = float_to_bits(bits_to_float(body) + 0.5f) - float_to_bits(0.5f);
  uint32_t half = body < (113u << 23) ? subnormal : normal;
  half = body >= (143u << 23) ? (body > 0x7f800000u ? 0x7e00u : 0x7c00u) : half;
  out.bits = uint16_t(half | sign);
}

// exp(x) for x <= 0 to about 1 unit in the last place; below -87.33 it is 0, NaN stays NaN.
// exp(x) = 2^n exp(r), r = x - n ln 2 in [-ln 2 / 2, ln 2 / 2], degree-7 minimax polynomial (Cephes expf).
RLHF_INLINE float exp_neg(float x) {
  const float c = x < -87.33f ? -87.33f : x;
  const float n = (c * 1.44269504f + 12582912.0f) - 12582912.0f;  // nearest integer: 1.5 * 2^23 leaves no fraction
  const float r = (c - n * 0.693359375f) + n * 2.12194440e-4f;    // ln 2 in two parts, the first product is exact
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const float scale = bits_to_float(uint32_t(int32_t(n) + 127) << 23);
  return x < -87.33f ? 0.0f : p * scale;
}
RLHF_INLINE double exp_neg(double x) { return std::exp(x); }

// 2^t = 2^n (1 + q) for t <= 0: n the nearest integer, q = 2^(t - n) - 1 by a degree-6 minimax polynomial without a
// constant term, so that 2^0 is exactly 1. n stands in the last bits of `shifted`.
struct Exp2 {
  float q, shifted;
};
RLHF_INLINE Exp2 exp2_parts(float t) {
  const float c = -127.0f > t ? -127.0f : t;  // NaN stays NaN
  const float shifted = c + 12582912.0f, n = shifted - 12582912.0f, f = c - n;  // 1.5 * 2^23 leaves no fraction
  float q = 1.5353361934e-4f;
  q = q * f + 1.3398874406e-3f;
  q = q * f + 9.6184373575e-3f;
  q = q * f + 5.5503324712e-2f;
  q = q * f + 2.4022647914e-1f;
  q = q * f + 6.9314720286e-1f;
  return {q * f, shifted};
}
// 2^t for t <= 0 to about 1 unit in the last place, exactly 0 from t = -127 down: n is added to the exponent's bits.
RLHF_INLINE float exp2_neg(float t) {
  const Exp2 e = exp2_parts(t);
  return bits_to_float(float_to_bits(e.q + 1.0f) + (float_to_bits(e.shifted) << 23));
}
RLHF_INLINE double exp2_neg(double t) { return std::exp2(t); }

// tanh(x) to a few units in the last place, near 0 as well: -expm1(-2|x|) / (2 + expm1(-2|x|)) with the sign of x.
RLHF_INLINE float tanh_fast(float x) {
  const Exp2 e = exp2_parts(std::fabs(x) * -2.88539008f);  // 2 / ln 2
  const float scale = bits_to_float(0x3f800000u + (float_to_bits(e.shifted) << 23));  // 2^n
  const float expm1 = scale * e.q + (scale - 1.0f);
  return std::copysign(-expm1 / (2.0f + expm1), x);
}
RLHF_INLINE double tanh_fast(double x) { return std::tanh(x); }

// exp(x) and exp(x) - 1 - x, both signs, to about 1 unit in the last place of exp(x), and near 0 of x^2 / 2: there
// 2^n = 1 and the second is the polynomial itself. 0 below -86.6, inf from 88.73; NaN stays NaN. The bounds are two
// statements, a minimum and a maximum to the compiler; above the upper one the product itself is infinite.
template <typename T> struct ExpParts { T exp, minus_1_minus; };
RLHF_INLINE ExpParts<float> exp_parts(float x) {
  const float low = -86.6f, high = 89.0f;
  const float raised = x < low ? low : x;
  const float c = raised > high ? high : raised;
  const float shifted = c * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // as in exp2_parts
  const float r = (c - n * 0.693359375f) + n * 2.12194440e-4f;                     // as in exp_neg
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float rest = p * (r * r);
  const float half_scale = bits_to_float((float_to_bits(shifted) + 126u) << 23);  // 2^128 is no float
  const float inside = (rest + r + 1.0f) * half_scale * 2.0f;
  const float exp = raised <= low ? 0.0f : inside;
  return {exp, n == 0.0f ? rest : (exp - 1.0f) - x};
}
RLHF_INLINE ExpParts<double> exp_parts(double x) { return {std::exp(x), exp_minus_1_minus(x)}; }
template <typename T> RLHF_INLINE T exp_any(T x) { return exp_parts(x).exp; }

}  // namespace rlhf
