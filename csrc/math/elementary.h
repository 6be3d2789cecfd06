// Elementary functions without branches or calls for float, which a compiler's vectoriser takes; the library's for double.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "math/host_device.h"

namespace rlhf {

RLHF_HD float bits_to_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
RLHF_HD uint32_t float_to_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

// exp(r) - 1 - r for r in [-ln 2 / 2, ln 2 / 2], degree-7 minimax polynomial (Cephes expf).
RLHF_HD float exp_rest(float r) {
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r);
}

// exp(x) for x <= 0 to about 1 unit in the last place; below -87.33 it is 0, NaN stays NaN.
// exp(x) = 2^n exp(r), r = x - n ln 2.
RLHF_HD float exp_neg(float x) {
  const float c = x < -87.33f ? -87.33f : x;
  const float n = (c * 1.44269504f + 12582912.0f) - 12582912.0f;  // nearest integer: 1.5 * 2^23 leaves no fraction
  const float r = (c - n * 0.693359375f) + n * 2.12194440e-4f;    // ln 2 in two parts, the first product is exact
  const float scale = bits_to_float(uint32_t(int32_t(n) + 127) << 23);
  return x < -87.33f ? 0.0f : (exp_rest(r) + r + 1.0f) * scale;
}
RLHF_HD double exp_neg(double x) { return std::exp(x); }

// 2^t = 2^n (1 + q) for t <= 0: n the nearest integer, q = 2^(t - n) - 1 by a degree-6 minimax polynomial without a
// constant term, so that 2^0 is exactly 1. n + 127 stands in the last bits of `shifted`.
struct Exp2 {
  float q, shifted;
};
RLHF_HD Exp2 exp2_parts(float t) {
  const float c = -127.0f > t ? -127.0f : t;  // NaN stays NaN
  const float shifted = c + 12583039.0f, n = shifted - 12583039.0f, f = c - n;  // 1.5 * 2^23 + 127 leaves no fraction
  float q = 1.5353361934e-4f;
  q = q * f + 1.3398874406e-3f;
  q = q * f + 9.6184373575e-3f;
  q = q * f + 5.5503324712e-2f;
  q = q * f + 2.4022647914e-1f;
  q = q * f + 6.9314720286e-1f;
  return {q * f, shifted};
}
// 2^n, exactly 0 for n = -127; any number for NaN, whose q is NaN.
RLHF_HD float exp2_scale(const Exp2& e) { return bits_to_float(float_to_bits(e.shifted) << 23); }
// 2^t for t <= 0 to about 1 unit in the last place, exactly 0 from t = -127 down.
RLHF_HD float exp2_neg(float t) {
  const Exp2 e = exp2_parts(t);
  const float scale = exp2_scale(e);
  return e.q * scale + scale;
}
RLHF_HD double exp2_neg(double t) { return std::exp2(t); }

// tanh(x) to a few units in the last place, near 0 as well: -expm1(-2|x|) / (2 + expm1(-2|x|)) with the sign of x.
RLHF_HD float tanh_fast(float x) {
  const Exp2 e = exp2_parts(std::fabs(x) * -2.88539008f);  // 2 / ln 2
  const float scale = exp2_scale(e), expm1 = scale * e.q + (scale - 1.0f);
  return std::copysign(-expm1 / (2.0f + expm1), x);
}
RLHF_HD double tanh_fast(double x) { return std::tanh(x); }

// 1 - tanh(x)^2 = 4 e / (1 + e)^2 with e = exp(-2 |x|), which does not cancel where tanh is near 1.
RLHF_HD float tanh_slope_fast(float x) {
  const float e = exp2_neg(std::fabs(x) * -2.88539008f);  // 2 / ln 2
  return 4.0f * e / ((1.0f + e) * (1.0f + e));
}
RLHF_HD double tanh_slope_fast(double x) {
  const double e = std::exp(-2 * std::fabs(x));
  return 4 * e / ((1 + e) * (1 + e));
}

// exp(x) and exp(x) - 1 - x, both signs, to about 1 unit in the last place of exp(x), and near 0 of x^2 / 2: there
// 2^n = 1 and the second is the polynomial itself. 0 below -86.6, inf from 88.73; NaN stays NaN. The bounds are two
// statements, a minimum and a maximum to the compiler; above the upper one the product itself is infinite.
template <typename T> struct ExpParts { T exp, minus_1_minus; };
RLHF_HD ExpParts<float> exp_parts(float x) {
  const float low = -86.6f, high = 89.0f;
  const float raised = x < low ? low : x;
  const float c = raised > high ? high : raised;
  const float shifted = c * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;  // as in exp2_parts
  const float r = (c - n * 0.693359375f) + n * 2.12194440e-4f;                     // as in exp_neg
  const float rest = exp_rest(r);
  const float half_scale = bits_to_float((float_to_bits(shifted) + 126u) << 23);  // 2^128 is no float
  const float inside = (rest + r + 1.0f) * half_scale * 2.0f;
  const float exp = raised <= low ? 0.0f : inside;
  return {exp, n == 0.0f ? rest : (exp - 1.0f) - x};
}
RLHF_HD ExpParts<double> exp_parts(double x) {
  // exp(x) - 1 - x near 0: a Taylor series, whose first term left out is below 2^-53.
  if (!(std::fabs(x) < 0.5)) return {std::exp(x), std::expm1(x) - x};
  double series = 1;
  for (int k = 15; k > 2; --k) series = 1 + series * x * (1.0 / k);
  return {std::exp(x), 0.5 * x * x * series};
}
template <typename T> RLHF_HD T exp_any(T x) { return exp_parts(x).exp; }

RLHF_HD float expm1_any(float x) {
  const ExpParts<float> e = exp_parts(x);
  return std::fabs(x) < 0.5f ? e.minus_1_minus + x : e.exp - 1.0f;
}
RLHF_HD double expm1_any(double x) { return std::expm1(x); }

// log(x) for normal numbers x > 0; NaN stays NaN. log(x) = n ln 2 + log(1 + m) with a polynomial on [sqrt(1/2), sqrt(2))
// (Cephes logf), ln 2 in two parts.
RLHF_HD float log_normal(float x) {
  const uint32_t bits = float_to_bits(x);
  const int32_t n = int32_t(bits - 0x3f3504f3u) >> 23;
  const float m = bits_to_float(bits - (uint32_t(n) << 23)) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const float square = m * m, high = float(n) * 0.693359375f, low = float(n) * -2.12194440e-4f;
  const float y = ((m * square * p + low) - 0.5f * square) + m + high;
  return x != x ? x : y;
}
RLHF_HD double log_normal(double x) { return std::log(x); }

// log(1 + x) for -1 < x <= 1: the rounding of 1 + x is put back (Kahan).
RLHF_HD float log1p_any(float x) {
  const float u = 1.0f + x, lost = x - (u - 1.0f);
  return log_normal(u) + lost / u;
}
RLHF_HD double log1p_any(double x) { return std::log1p(x); }

}  // namespace rlhf
