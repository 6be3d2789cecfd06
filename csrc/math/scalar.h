// Scalar functions without cancellation or overflow, for the host and the device.
#pragma once
#include <cmath>
#include <limits>

#include "math/host_device.h"

namespace rlhf {

template <typename T> constexpr T infinity() { return std::numeric_limits<T>::infinity(); }

// log(1 + exp(x))
template <typename T> RLHF_HD T softplus(T x) { return (x > 0 ? x : T(0)) + std::log1p(std::exp(-std::fabs(x))); }

// 1 / (1 + exp(-x))
template <typename T> RLHF_HD T sigmoid(T x) {
  const T e = std::exp(-std::fabs(x));
  return (x < 0 ? e : T(1)) / (1 + e);
}

// exp(x) - 1 - x, which is x^2 / 2 near 0: there a Taylor series, whose first term left out is below 2^-53.
template <typename T> RLHF_HD T exp_minus_1_minus(T x) {
  if (!(std::fabs(x) < T(0.5))) return std::expm1(x) - x;
  T series = 1;
  for (int k = 15; k > 2; --k) series = 1 + series * x * (T(1) / k);
  return T(0.5) * x * x * series;
}

}  // namespace rlhf
